"""Scale- and sign-equivariant building blocks: canonicalisation, invariant and equivariant layers and nets.

Source: ScaleGMN paper, section 4 and appendix A.1; spec, *Building blocks*. ``symmetry`` is ``sign`` (q = -1 or 1),
``scale`` (q > 0) or ``hetero`` (either, per row). Rows are [R, d] or a form of `nn.rows`; ``classes`` tells which rows
belong to last-layer, hidden and first-layer neurons (all hidden if None). Everything is deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from . import fused
from .mlp import Mlp, MlpNet
from .rows import (
    GatheredRows,
    RowClasses,
    Rows,
    TracedRows,
    add,
    by_class,
    by_symmetry,
    count,
    dense,
    linear,
    multiply,
    take,
)
from .work import PlannedModule

CANONICAL_EPS = 1e-10
SYMMETRIES = ("sign", "scale", "hetero", "permutation")


def normalize_rows(rows: Rows, eps: float) -> Rows:
    """``x / (||x||_2 + eps)`` per row; the norm in float32 or better; a zero row gives 0 with zero gradient."""
    if isinstance(rows, TracedRows):
        if isinstance(rows.form, GatheredRows):
            return rows._replace(form=_through_table(rows.form, lambda form: normalize_rows(form, eps)))
        return rows._replace(form=rows.section.normalize(rows.value(), eps))
    if not isinstance(rows, GatheredRows) or rows.scale is None:
        return ops.symmetrize(dense(rows), kind="normalize", eps=eps)
    wide = torch.promote_types(rows.table.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows.table.to(wide), dim=1, keepdim=True)[rows.index]
    scale = rows.scale.to(wide)
    length = scale.abs() * norms
    zero = length == 0
    unit = torch.where(zero, 0.0, scale / torch.where(zero, 1.0, length + eps))
    return GatheredRows(rows.table, rows.index, unit.to(rows.scale.dtype))


def absolute_rows(rows: Rows) -> Rows:
    """``|x|`` elementwise."""
    if isinstance(rows, TracedRows):
        if isinstance(rows.form, GatheredRows):
            return rows._replace(form=_through_table(rows.form, absolute_rows))
        return rows._replace(form=rows.section.abs(rows.value()))
    if isinstance(rows, GatheredRows) and rows.scale is not None:
        return GatheredRows(rows.table.abs(), rows.index, rows.scale.abs())
    return ops.symmetrize(dense(rows), kind="abs")


def _through_table(rows: GatheredRows, canonicalise) -> GatheredRows:
    """The canonicalisation of gathered rows, on the table."""
    if rows.scale is None:
        return rows._replace(table=canonicalise(rows.table))
    return canonicalise(rows)


class Canonicalization(PlannedModule):
    """The invariant c(x) of a row under its own sign or scale.

    sign: ``rho(x) + rho(-x)`` with an mlp rho, or ``|x|`` (``sign_symmetrization`` False);
    scale: ``x / (||x|| + eps)``.
    """

    def __init__(
        self, width: int, mlp_args: dict, symmetry: str, sign_symmetrization: bool, eps: float = CANONICAL_EPS
    ):
        super().__init__()
        if symmetry not in ("sign", "scale", "permutation"):
            raise ValueError(f"symmetry must be 'sign', 'scale' or 'permutation', got {symmetry!r}")
        self.symmetry, self.eps = symmetry, eps
        if symmetry == "sign" and sign_symmetrization:
            self.rho = Mlp(width, width, **mlp_args)

    def canonical(self, rows: Rows) -> Rows:
        """c(x), possibly as rows whose last linear map is still to come."""
        if self.symmetry == "scale":
            return normalize_rows(rows, self.eps)
        if self.symmetry == "permutation":
            return rows
        return self.rho.symmetrized(rows) if hasattr(self, "rho") else absolute_rows(rows)


class InvariantLayer(Canonicalization):
    """``phi([c(x), p])``, phi an mlp and p the optional positional embedding; without ``final_mlp``: c(x).

    Args:
        d_in, d_out: widths of x and of the result.
        mlp_args: arguments of `Mlp` for phi and rho.
        symmetry: ``sign`` or ``scale``.
        sign_symmetrization: symmetrise by rho instead of ``|x|``.
        d_extra: width of p (0: none).
        final_mlp: whether there is a phi.
        eps: of the scale canonicalisation.

    Shapes: x [R, d_in], extra [R, d_extra] -> [R, d_out]. Invariant: multiplying a row of x by its q changes nothing.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        mlp_args: dict,
        symmetry: str,
        sign_symmetrization: bool = True,
        d_extra: int = 0,
        final_mlp: bool = True,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__(d_in, mlp_args, symmetry, sign_symmetrization, eps)
        if final_mlp:
            self.phi = Mlp(d_in + d_extra, d_out, **mlp_args)

    def forward(self, x: Rows, extra: Rows | None = None) -> Tensor:
        canonical = self.canonical(x)
        if not hasattr(self, "phi"):
            return dense(canonical)
        return self.phi(canonical) if extra is None else self.phi(canonical, extra)


class SymmetryPair(PlannedModule):
    """Invariant layers of one symmetry (``g1``), or of both for ``hetero`` (``g_sign``, ``g_scale``)."""

    def add_layers(self, d_in, d_out, mlp_args, symmetry, sign_symmetrization, eps, **options) -> None:
        if symmetry not in SYMMETRIES:
            raise ValueError(f"symmetry must be one of {', '.join(SYMMETRIES)}, got {symmetry!r}")
        self.symmetry = symmetry
        if symmetry == "hetero":
            self.g_sign = InvariantLayer(d_in, d_out, mlp_args, "sign", sign_symmetrization, eps=eps, **options)
            self.g_scale = InvariantLayer(d_in, d_out, mlp_args, "scale", eps=eps, **options)
        else:
            self.g1 = InvariantLayer(d_in, d_out, mlp_args, symmetry, sign_symmetrization, eps=eps, **options)

    def invariant(self, x: Rows, extra: Rows | None, classes: RowClasses | None) -> Tensor:
        """g(x, p), each row by its own symmetry."""
        if self.symmetry != "hetero":
            return self.g1(x, extra)
        if classes is None:
            raise ValueError(
                "classes are needed by symmetry 'hetero' (they say which rows have the sign symmetry), got None"
            )

        def run(layer):
            def on_rows(rows, chosen):
                if extra is None:
                    return layer(rows)
                return layer(rows, extra if chosen is None else take(extra, chosen))

            return on_rows

        return by_symmetry(self.work.partition, x, classes, run(self.g_sign), run(self.g_scale))


class InvariantNet(SymmetryPair):
    """g(x, p) of an equivariant layer: canonicalised on hidden rows, a plain mlp on the others if ``equiv_on_hidden``.

    Args:
        num_mlps: 2: ``phi_in`` on first and last rows; 3: ``phi_in`` on first, ``phi_last`` on last rows.
        others: see `InvariantLayer`.

    Shapes: x [R, d_in], extra [R, d_extra] -> [R, d_out].

    Raises:
        ValueError: ``num_mlps`` other than 2 or 3 with ``equiv_on_hidden``.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        mlp_args: dict,
        symmetry: str,
        d_extra: int = 0,
        equiv_on_hidden: bool = False,
        num_mlps: int = 2,
        sign_symmetrization: bool = True,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        self.equiv_on_hidden = equiv_on_hidden
        if equiv_on_hidden:
            if num_mlps not in (2, 3):
                raise ValueError(f"num_mlps must be 2 or 3 with equiv_on_hidden, got {num_mlps}")
            self.phi_in = Mlp(d_in + d_extra, d_out, **mlp_args)
            if num_mlps == 3:
                self.phi_last = Mlp(d_in + d_extra, d_out, **mlp_args)
        self.add_layers(d_in, d_out, mlp_args, symmetry, sign_symmetrization, eps, d_extra=d_extra)

    def forward(self, x: Rows, extra: Rows | None = None, classes: RowClasses | None = None) -> Tensor:
        if not self.equiv_on_hidden:
            return self.invariant(x, extra, classes)
        classes = classes or RowClasses(0, count(x), 0)

        def hidden(parts, rows):
            return self.invariant(parts[0], parts[1] if len(parts) > 1 else None, rows)

        def first(parts, _):
            return self.phi_in(*parts)

        def last(parts, _):
            return self.phi_last(*parts)

        if hasattr(self, "phi_last"):
            branches = [(last, ("last",)), (hidden, ("hidden",)), (first, ("first",))]
        else:
            branches = [(hidden, ("hidden",)), (first, ("last", "first"))]
        return by_class(self.work.partition, (x,) if extra is None else (x, extra), classes, branches)


class EquivariantLayer(PlannedModule):
    """``(W x) * g(x, p)``: scales with x. W has no bias.

    Arguments as of `EquivariantNet`; ``equiv_on_hidden`` and ``num_mlps`` are those of g, an `InvariantNet` (an
    `MlpNet` for the symmetry ``permutation``).

    Shapes: x [R, d_in], extra [R, d_extra] -> [R, d_out].
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        mlp_args: dict,
        d_extra: int = 0,
        symmetry: str = "sign",
        equiv_on_hidden: bool = False,
        num_mlps: int = 2,
        sign_symmetrization: bool = False,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        self.W = nn.Linear(d_in, d_out, bias=False)
        if symmetry == "permutation":
            self.g = MlpNet(d_in, d_out, mlp_args, d_extra)
        else:
            self.g = InvariantNet(
                d_in, d_out, mlp_args, symmetry, d_extra, equiv_on_hidden, num_mlps, sign_symmetrization, eps
            )

    def forward(self, x: Rows, extra: Rows | None = None, classes: RowClasses | None = None) -> Tensor:
        if isinstance(self.g, MlpNet):
            gate = self.g(x) if extra is None else self.g(x, extra)
        else:
            gate = self.g(x, extra, classes)
        return multiply(linear(x, self.W.weight), gate)


class EquivariantNet(PlannedModule):
    """n equivariant layers in a row, with the configurations' rules for rows that are not hidden.

    Args:
        n_layers: number of layers.
        d_in, d_out: widths of the input and of every output.
        mlp_args: arguments of `Mlp`.
        d_extra: width of the positional embedding p (0: none).
        symmetry: ``sign``, ``scale`` or ``hetero``.
        equiv_on_hidden: inside a layer, only g on hidden rows is canonicalised (see `InvariantNet`).
        layer_equiv_on_hidden: other rows go through equivariant layers of their own.
        mlp_on_io: other rows go through plain mlps.
        num_mlps: 1: other rows as if hidden; 2: one module for all others; 3: one for first, one for last rows.
        sign_symmetrization, eps: see `InvariantLayer`.
        skip_connections: add ``skip_layers[i](x)``, a bias-free linear map, to each layer's output.

    Shapes: x [R, d_in], extra [R, d_extra] -> [R, d_out]. Equivariant: multiplying a hidden row of x by its q
    multiplies its output row by q.

    Raises:
        ValueError: ``num_mlps`` outside 1..3, or 1 with ``equiv_on_hidden`` alone.
    """

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        d_out: int,
        mlp_args: dict,
        d_extra: int = 0,
        symmetry: str = "sign",
        equiv_on_hidden: bool = False,
        layer_equiv_on_hidden: bool = False,
        mlp_on_io: bool = False,
        num_mlps: int = 2,
        sign_symmetrization: bool = False,
        skip_connections: bool = False,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        if num_mlps not in (1, 2, 3):
            raise ValueError(f"num_mlps must be 1, 2 or 3, got {num_mlps}")
        self.symmetry = symmetry
        widths = [(d_out if index else d_in) for index in range(n_layers)]
        separate = mlp_on_io or layer_equiv_on_hidden

        def layer(width: int, by_hidden: bool) -> EquivariantLayer:
            return EquivariantLayer(
                width, d_out, mlp_args, d_extra, symmetry, by_hidden, num_mlps, sign_symmetrization, eps
            )

        self.eq_layers = nn.ModuleList(layer(width, equiv_on_hidden and not separate) for width in widths)
        self.eq_layers_in, self.eq_layers_last = None, None
        if mlp_on_io:
            self.eq_layers_in = nn.ModuleList(MlpNet(width, d_out, mlp_args, d_extra) for width in widths)
            if num_mlps == 3:
                self.eq_layers_last = nn.ModuleList(MlpNet(width, d_out, mlp_args, d_extra) for width in widths)
        elif layer_equiv_on_hidden and num_mlps > 1:
            self.eq_layers_in = nn.ModuleList(layer(width, False) for width in widths)
            if num_mlps == 3:
                self.eq_layers_last = nn.ModuleList(layer(width, False) for width in widths)
        self.separate = separate and num_mlps > 1
        if self.eq_layers_in is not None and not self.separate:
            self.eq_layers_in.requires_grad_(False)
        if skip_connections:
            self.skip_layers = nn.ModuleList(nn.Linear(width, d_out, bias=False) for width in widths)
        self.skip_connections = skip_connections

    def forward(self, x: Rows, extra: Rows | None = None, classes: RowClasses | None = None) -> Tensor:
        if isinstance(x, Tensor) and isinstance(extra, GatheredRows | None) and fused.serves(self, x):
            return fused.net(self, x, extra, classes or RowClasses(0, count(x), 0))
        for index, layer in enumerate(self.eq_layers):
            out = self._layer(index, layer, x, extra, classes)
            x = add(linear(x, self.skip_layers[index].weight), out) if self.skip_connections else out
        return dense(x)

    def _layer(self, index: int, layer: EquivariantLayer, x: Rows, extra, classes: RowClasses | None) -> Tensor:
        if not self.separate:
            return layer(x, extra, classes)
        classes = classes or RowClasses(0, count(x), 0)

        def through(module):
            def branch(parts, rows):
                return module(*parts) if isinstance(module, MlpNet) else module(*parts, classes=rows)

            return branch

        first = through(self.eq_layers_in[index])
        branches = [(through(layer), ("hidden",))]
        if self.eq_layers_last is None:
            branches.append((first, ("last", "first")))
        else:
            branches += [(through(self.eq_layers_last[index]), ("last",)), (first, ("first",))]
        return by_class(self.work.partition, (x,) if extra is None else (x, extra), classes, branches)
