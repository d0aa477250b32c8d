"""The edge update: ``e' = (W e) * phi([c(x_source), c(x_target)])``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .equivariant import CANONICAL_EPS, SymmetryPair
from .mlp import Mlp
from .rows import (
    FactoredEdges,
    GatedEdges,
    GatheredRows,
    RowClasses,
    Rows,
    TracedRows,
    add,
    by_symmetry,
    dense,
    linear,
    multiply,
)


class EdgeUpdate(SymmetryPair):
    """Equivariant edge update; for ``permutation`` the plain mlp ``phi([e, x_source, x_target])``.

    Args:
        d_in: width of node and edge features.
        d_out: width of the new edge features.
        mlp_args: arguments of `nn.Mlp` for phi and rho.
        symmetry, sign_symmetrization, eps: the canonicalisation c (without final mlp).

    c runs on nodes and so do both halves of phi's first linear layer; edges gather and add (identity *hoist*).
    Source: spec, *One round of message passing*.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        mlp_args: dict,
        symmetry: str,
        sign_symmetrization: bool,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        permutation = symmetry == "permutation"
        self.phi = Mlp((3 if permutation else 2) * d_in, d_out, **mlp_args)
        if not permutation:
            self.W = nn.Linear(d_in, d_out, bias=False)
        self.add_layers(d_in, d_out, mlp_args, symmetry, sign_symmetrization, eps, final_mlp=False)

    def forward(
        self, x: Tensor, e: Rows, source: Tensor, target: Tensor, classes: RowClasses | None = None
    ) -> Tensor | GatedEdges:
        """New edge features [E, d_out] from node features x [N, d], edge features e [E, d] and their ends, int64 [E].

        ``classes`` are the nodes' (needed for ``hetero`` only). Those of `FactoredEdges` may be `GatedEdges`.
        """
        if self.symmetry == "permutation":
            return self.phi(e, self._gathered(x, source), self._gathered(x, target))
        if self.work.hoist:
            canonical = self._canonical(x, classes)
            ends = [GatheredRows(canonical, index) for index in (source, target)]
        else:
            ends = [self._canonical(x[index], classes, index) for index in (source, target)]
        if self.composes(e) and e.types is None:
            return self._gated(e, self.phi.first(*ends))
        return linear(e, self.W.weight) * self.phi(*ends)

    def ends(self, x: Tensor, source: Tensor, target: Tensor, classes: RowClasses | None) -> tuple[GatheredRows, ...]:
        """What an edge's update reads of its ends: rows of node tables, for `trace`."""
        if self.symmetry == "permutation":
            return GatheredRows(x, source), GatheredRows(x, target)
        canonical, first = self._canonical(x, classes), self.phi.fc[0]
        maps = first.weight.split(x.shape[1], dim=1)
        return tuple(
            GatheredRows(F.linear(canonical, weight, bias), index)
            for weight, bias, index in zip(maps, (first.bias, None), (source, target), strict=True)
        )

    def trace(self, e: TracedRows, ends: tuple[GatheredRows, ...]) -> TracedRows:
        """The update on the rows of a section of a row program."""
        rows = [e._replace(form=end) for end in ends]
        if self.symmetry == "permutation":
            return self.phi(e, *rows)
        if self.composes(e.form) and e.form.types is None:
            return e._replace(form=self._gated(e.form, add(*rows)))
        return multiply(linear(e, self.W.weight), self.phi.after_first(add(*rows)))

    def composes(self, e: Rows) -> bool:
        """Whether linear maps of the new features of e are composed with phi's last one (identity *across*).

        Those of edges of several types are so in programs alone, where a section has one type.
        """
        plain = self.symmetry != "permutation" and self.phi.ends_linear
        return self.work.across and plain and isinstance(e, FactoredEdges) and e.is_scalar()

    def _gated(self, e: FactoredEdges, z: Tensor | TracedRows) -> GatedEdges:
        hidden, last = self.phi.before_last(z), self.phi.fc[-1]
        hidden = hidden.value() if isinstance(hidden, TracedRows) else hidden
        return GatedEdges(hidden, last.weight, last.bias, e.mapped(self.W.weight))

    def drops(self) -> bool:
        """Whether the update draws dropout masks."""
        return self.training and self.phi.dropout > 0

    def _gathered(self, x: Tensor, index: Tensor) -> Rows:
        return GatheredRows(x, index) if self.work.hoist else x[index]

    def _canonical(self, x: Tensor, classes: RowClasses | None, index: Tensor | None = None) -> Tensor:
        if self.symmetry != "hetero":
            return dense(self.g1.canonical(x))
        if classes is None:
            raise ValueError(
                "classes are needed by symmetry 'hetero' (they say which rows have the sign symmetry), got None"
            )
        sign, scale = (
            lambda rows, _, layer=layer: dense(layer.canonical(rows)) for layer in (self.g_sign, self.g_scale)
        )
        if index is None:
            return by_symmetry(self.work.partition, x, classes, sign, scale)
        sign_rows, _ = classes.sign_rows()
        mask = x.new_zeros(classes.last + classes.hidden + classes.first, dtype=torch.bool)
        mask[sign_rows] = True
        return torch.where(mask[index].unsqueeze(1), sign(x, None), scale(x, None))
