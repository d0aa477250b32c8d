"""Rows that need not be written out: what a linear map reads decides where it runs.

A block of R rows of width d is a dense tensor [R, d] or one of the forms below; `linear`, `dense`, `narrow` and `take`
accept any of them. A linear map of gathered rows runs on the table, of mapped rows is composed with the map, of
factored edges is a [width, d_e] matrix per edge type. `TracedRows` are rows of a `row_program` being written down: the
same modules then add steps to it instead of computing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.row_program import SectionWriter, Value


class GatheredRows(NamedTuple):
    """``scale * table[index]``: table [P, d], index int64 [R], scale [R, 1] or None for 1."""

    table: Tensor
    index: Tensor
    scale: Tensor | None = None


class MappedRows(NamedTuple):
    """``hidden @ weight.T + bias``, a linear layer not yet applied: hidden [R, k], weight [d, k], bias [d] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class FactoredEdges(NamedTuple):
    """Layer-0 edge features ``maps[type] @ weight (+ offsets[type])`` of rank d_e.

    weights [R, d_e]; maps [T, d, d_e]; offsets [T, d] or None; types int64 [R], None if T = 1. T > 1 needs d_e = 1.
    """

    weights: Tensor
    maps: Tensor
    offsets: Tensor | None
    types: Tensor | None

    def is_scalar(self) -> bool:
        """Whether a row is its one number times the vector of its type."""
        return self.weights.shape[1] == 1 and self.offsets is None

    def mapped(self, weight: Tensor, bias: Tensor | None = None) -> FactoredEdges:
        """``rows @ weight.T + bias``."""
        offsets = bias if self.offsets is None else F.linear(self.offsets, weight, bias)
        return self._replace(maps=weight @ self.maps, offsets=offsets)

    def of_type(self, kind: int) -> FactoredEdges:
        """The rows as those of one type."""
        offsets = None if self.offsets is None else self.offsets[kind : kind + 1]
        return self._replace(maps=self.maps[kind : kind + 1], offsets=offsets, types=None)


class GatedEdges(NamedTuple):
    """Edge features ``(hidden @ weight.T + bias) * base``, the linear layer not yet applied.

    hidden [R, k] (a step's value inside of a program); weight [d, k]; bias [d] or None; base: scalar, of one type.
    A row of the base is a number times a vector, so a linear map of the rows is one of ``hidden``, times that number.
    """

    hidden: Tensor | Value
    weight: Tensor
    bias: Tensor | None
    base: FactoredEdges

    def composed(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a linear map of the rows as a map of ``hidden``, but for the number of each row."""
        scaled = weight * self.base.maps[0, :, 0]
        return scaled @ self.weight, None if self.bias is None else F.linear(self.bias, scaled)


class UpdatedEdges(NamedTuple):
    """Edge features that are not written out: ``update.trace(base, ends)``, computed again by whoever reads them.

    base: the features before, a row per edge; update: `EdgeUpdate`; ends: what it reads of the edges' ends.
    """

    base: Rows
    update: object
    ends: tuple[GatheredRows, ...]


class TracedRows(NamedTuple):
    """Rows of a section of a `row_program`.

    form: a step's value, or rows that are still to be read: gathered rows or edges, over the program's rows.
    row_class: their class; absent: classes without rows anywhere, whose branches still have to get zero gradients.
    symmetry: for ``hetero`` "sign" or "scale".
    """

    section: SectionWriter
    form: Value | GatheredRows | FactoredEdges | GatedEdges
    row_class: str = "hidden"
    absent: tuple[str, ...] = ()
    symmetry: str | None = None

    def value(self) -> Value:
        """The rows as a step's value."""
        section, form = self.section, self.form
        if isinstance(form, Value):
            return form
        if isinstance(form, GatheredRows):
            rows = section.load(form.table, form.index)
            return rows if form.scale is None else section.scale(rows, form.scale)
        if isinstance(form, GatedEdges):
            gate = section.linear(form.hidden, form.weight, form.bias)
            return section.mul(self._replace(form=form.base).value(), gate)
        if form.types is None:
            offsets = form.offsets
            rows = section.load(form.weights)
            return section.linear(rows, form.maps[0], offsets if offsets is None or offsets.ndim == 1 else offsets[0])
        rows = section.scale(section.load(form.maps[:, :, 0], form.types), form.weights)
        if form.offsets is None:
            return rows
        return (
            section.add_vector(rows, form.offsets)
            if form.offsets.ndim == 1
            else section.load_add(rows, form.offsets, form.types)
        )

    def linear(self, weight: Tensor, bias: Tensor | None) -> TracedRows:
        form = self.form
        if isinstance(form, FactoredEdges):
            return self._replace(form=self._replace(form=form.mapped(weight, bias)).value())
        if isinstance(form, GatedEdges):
            mapped = self.section.scale(self.section.linear(form.hidden, *form.composed(weight)), form.base.weights)
            return self._replace(form=mapped if bias is None else self.section.add_vector(mapped, bias))
        if isinstance(form, GatheredRows) and self.section.rows >= form.table.shape[0]:
            scaled_bias = bias is not None and form.scale is not None
            table = F.linear(form.table, weight, None if scaled_bias else bias)
            mapped = self._replace(form=GatheredRows(table, form.index, form.scale))
            return mapped._replace(form=self.section.add_vector(mapped.value(), bias)) if scaled_bias else mapped
        return self._replace(form=self.section.linear(self.value(), weight, bias))


Rows = Tensor | GatheredRows | MappedRows | FactoredEdges | GatedEdges | UpdatedEdges | TracedRows
Branches = Sequence[tuple[Callable[..., Rows], tuple[str, ...]]]


def count(rows: Rows) -> int:
    """Number of rows."""
    if isinstance(rows, Tensor):
        return rows.shape[0]
    if isinstance(rows, GatheredRows):
        return rows.index.shape[0]
    if isinstance(rows, TracedRows):
        return rows.section.rows
    return count(rows[0])


def width(rows: Rows) -> int:
    """Width of a row."""
    if isinstance(rows, Tensor):
        return rows.shape[1]
    if isinstance(rows, GatheredRows):
        return rows.table.shape[1]
    if isinstance(rows, TracedRows):
        return rows.form.width if isinstance(rows.form, Value) else width(rows.form)
    return rows[1].shape[-2]


def linear(rows: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor | TracedRows:
    """``rows @ weight.T + bias`` as a dense [R, out]."""
    if isinstance(rows, TracedRows):
        return rows.linear(weight, bias)
    if isinstance(rows, Tensor):
        return F.linear(rows, weight, bias)
    if isinstance(rows, GatheredRows):
        if rows.index.shape[0] < rows.table.shape[0]:
            return F.linear(dense(rows), weight, bias)
        if rows.scale is None:
            return F.linear(rows.table, weight, bias)[rows.index]
        out = rows.scale * F.linear(rows.table, weight)[rows.index]
        return out if bias is None else out + bias
    if isinstance(rows, MappedRows):
        if _surely(count(rows) < rows.weight.shape[1]):
            return linear(dense(rows), weight, bias)
        composed = rows.bias if rows.bias is None else F.linear(rows.bias, weight, bias)
        return linear(rows.hidden, weight @ rows.weight, bias if composed is None else composed)
    if isinstance(rows, GatedEdges):
        out = rows.base.weights * F.linear(rows.hidden, *rows.composed(weight))
        return out if bias is None else out + bias
    return dense(rows.mapped(weight, bias))


def _surely(condition: bool) -> bool:
    """A condition on sizes; in a program for sizes that vary, whether it holds for all."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def dense(rows: Rows) -> Tensor | TracedRows:
    """The rows written out, [R, d]."""
    if isinstance(rows, Tensor | TracedRows):
        return rows
    if isinstance(rows, GatheredRows):
        gathered = rows.table[rows.index]
        return gathered if rows.scale is None else rows.scale * gathered
    if isinstance(rows, MappedRows):
        return linear(rows.hidden, rows.weight, rows.bias)
    if isinstance(rows, GatedEdges):
        return dense(rows.base) * F.linear(rows.hidden, rows.weight, rows.bias)
    return _apply_maps(rows.weights, rows.maps, rows.offsets, rows.types)


def add(a: Tensor | TracedRows, b: Tensor | TracedRows) -> Tensor | TracedRows:
    """``a + b``."""
    return a + b if isinstance(a, Tensor) else _join(a, b, a.section.add, a.section.load_add)


def multiply(a: Tensor | TracedRows, b: Tensor | TracedRows) -> Tensor | TracedRows:
    """``a * b`` elementwise."""
    return a * b if isinstance(a, Tensor) else _join(a, b, a.section.mul, a.section.load_mul)


def _join(a: TracedRows, b: TracedRows, values, with_table) -> TracedRows:
    form = b.form
    if isinstance(form, GatheredRows) and form.scale is None:
        return a._replace(form=with_table(a.value(), form.table, form.index))
    return a._replace(form=values(a.value(), b.value()))


def concat(parts: list[Tensor | TracedRows]) -> Tensor | TracedRows:
    """The parts side by side."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=1)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined._replace(form=joined.section.concat(joined.value(), part.value()))
    return joined


def norm_act(rows: Tensor | TracedRows, norm, activation: str, w0: float) -> Tensor | TracedRows:
    """``act(norm(rows))``; norm is a LayerNorm or None."""
    if isinstance(rows, TracedRows):
        if norm is None and activation == "identity":
            return rows
        weight, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        return rows._replace(form=rows.section.norm_act(rows.value(), weight, shift, activation, w0))
    rows = rows if norm is None else norm(rows)
    match activation:
        case "identity":
            return rows
        case "sine":
            return torch.sin(w0 * rows)
        case "elu":
            return F.elu(rows)
        case "silu":
            return F.silu(rows)
    return getattr(torch, activation)(rows)


def symmetrize(rows: Tensor | TracedRows, bias, norm, activation: str, w0: float) -> Tensor | TracedRows:
    """``act(norm(rows + bias)) + act(norm(bias - rows))``; norm is a LayerNorm or None."""
    weight, shift = (None, None) if norm is None else (norm.weight, norm.bias)
    if isinstance(rows, TracedRows):
        return rows._replace(form=rows.section.symmetrize(rows.value(), bias, weight, shift, activation, w0))
    return ops.symmetrize(rows, bias, weight, shift, kind="activation", activation=activation, w0=w0)


def dropout(rows: Tensor | TracedRows, probability: float, training: bool) -> Tensor | TracedRows:
    """Dropout while training."""
    if isinstance(rows, Tensor):
        return F.dropout(rows, probability, training)
    if not training or probability == 0:
        return rows
    return rows._replace(form=rows.section.dropout(rows.value(), probability))


def add_vector(rows: Tensor | TracedRows, vector: Tensor | None) -> Tensor | TracedRows:
    """The rows plus a vector [d], or None for 0."""
    if vector is None:
        return rows
    if isinstance(rows, Tensor):
        return rows + vector
    return rows._replace(form=rows.section.add_vector(rows.value(), vector))


def _apply_maps(weights: Tensor, maps: Tensor, offsets: Tensor | None, types: Tensor | None) -> Tensor:
    if types is None:
        return F.linear(weights, maps[0], offsets if offsets is None or offsets.ndim == 1 else offsets[0])
    out = weights * maps[:, :, 0][types]
    if offsets is None:
        return out
    return out + (offsets if offsets.ndim == 1 else offsets[types])


def narrow(rows: Rows, start: int, length: int) -> Rows:
    """A range of rows."""
    if start == 0 and length == count(rows):
        return rows
    return _map(rows, lambda t: t.narrow(0, start, length))


def take(rows: Rows, index: Tensor) -> Rows:
    """Rows by number, int64 [K]."""
    return _map(rows, lambda t: t[index])


def _map(rows: Rows, fn) -> Rows:
    if isinstance(rows, Tensor):
        return fn(rows)
    if isinstance(rows, GatheredRows):
        return GatheredRows(rows.table, fn(rows.index), None if rows.scale is None else fn(rows.scale))
    if isinstance(rows, MappedRows):
        return MappedRows(fn(rows.hidden), rows.weight, rows.bias)
    if isinstance(rows, UpdatedEdges):
        return rows._replace(base=_map(rows.base, fn), ends=tuple(_map(end, fn) for end in rows.ends))
    if isinstance(rows, GatedEdges):
        return rows._replace(hidden=fn(rows.hidden), base=_map(rows.base, fn))
    return FactoredEdges(fn(rows.weights), rows.maps, rows.offsets, None if rows.types is None else fn(rows.types))


def negate(rows: Rows) -> Rows:
    """The rows with the other sign."""
    if isinstance(rows, TracedRows):
        return rows._replace(form=rows.section.negate(rows.value()))
    if isinstance(rows, GatheredRows) and rows.scale is not None:
        return GatheredRows(rows.table, rows.index, -rows.scale)
    return -dense(rows)


class RowClasses(NamedTuple):
    """How many rows are of each class, in this order, and for ``hetero`` which of them have the sign symmetry.

    A row's class is that of its node; for a message, of its target node. ``split`` is a `graph.batch.RowSplit` or any
    object with its ``select``; row 0 is its row ``start``.
    """

    last: int
    hidden: int
    first: int
    split: object | None = None
    start: int = 0

    def range_of(self, name: str) -> tuple[int, int]:
        """(start, length) of a class."""
        return {
            "last": (0, self.last),
            "hidden": (self.last, self.hidden),
            "first": (self.last + self.hidden, self.first),
        }[name]

    def only(self, name: str) -> RowClasses:
        """The rows of one class, as a block of hidden rows."""
        start, length = self.range_of(name)
        return RowClasses(0, length, 0, self.split, self.start + start)

    def sign_rows(self) -> tuple[Tensor, Tensor]:
        """(rows with the sign symmetry, rows with the scale symmetry), int64, relative to row 0."""
        if self.split is None:
            raise ValueError("sign_mask is needed by symmetry 'hetero', got a batch without one")
        return self.split.select(self.start, self.start + self.last + self.hidden + self.first)


def clamped(row: int, low: int, high: int) -> int:
    """The row, or the end of low..high that it is beyond. `torch.export` of PyTorch 2.11 does not understand `min`."""
    if row <= low:
        return low
    return high if row >= high else row


def by_class(partition: bool, parts: tuple[Rows, ...], classes: RowClasses, branches: Branches) -> Tensor:
    """Run each class of rows through its own branch.

    Args:
        partition: slice the rows by class; otherwise run every branch on all rows and select by a mask.
        parts: blocks of rows of equal count, handed to a branch together.
        classes: the row classes.
        branches: (function, names of its classes); ``function(parts, classes) -> [R, d]``.

    A branch without rows runs on none, so that its parameters get zero gradients instead of no gradients (optimisers
    with weight decay and DistributedDataParallel see the same parameters in every step).
    """
    if isinstance(parts[0], TracedRows):
        return _traced_by_class(parts, classes, branches)
    if not partition:
        return _masked(parts, classes, branches)
    pieces = {}
    for branch, names in branches:
        filled = [name for name in names if classes.range_of(name)[1]] or names[:1]
        for name in filled:
            start, length = classes.range_of(name)
            pieces[name] = branch(tuple(narrow(part, start, length) for part in parts), classes.only(name))
    ordered = [pieces[name] for name in ("last", "hidden", "first") if name in pieces]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


def _traced_by_class(parts: tuple[TracedRows, ...], classes: RowClasses, branches: Branches) -> TracedRows:
    """The branch of the rows' class; inside it they are hidden rows, as in `RowClasses.only`."""
    own, absent = parts[0].row_class, parts[0].absent
    inner = tuple(part._replace(row_class="hidden", absent=("last", "first")) for part in parts)
    out = None
    for branch, names in branches:
        if own in names:
            out = branch(inner, classes)
        elif set(names) <= set(absent):
            branch(inner, classes)  # read by nobody: not computed, but its parameters get zero gradients
    return out


def _masked(parts, classes: RowClasses, branches: Branches) -> Tensor:
    total = classes.last + classes.hidden + classes.first
    everything = RowClasses(0, total, 0, classes.split, classes.start)
    out = 0
    for branch, names in branches:
        values = branch(parts, everything)
        mask = values.new_zeros(total, 1)
        for name in names:
            start, length = classes.range_of(name)
            mask[start : start + length] = 1
        out = out + mask * values
    return out


def by_symmetry(partition: bool, rows: Rows, classes: RowClasses, sign, scale) -> Tensor:
    """hetero: ``sign`` on rows with the sign symmetry, ``scale`` on the others; [R, d].

    Both are called as ``f(rows, chosen)``: the rows, and their int64 numbers among all rows (None: all of them).
    """
    if isinstance(rows, TracedRows):
        return (sign if rows.symmetry == "sign" else scale)(rows, None)
    sign_rows, scale_rows = classes.sign_rows()
    if not partition:
        mask = torch.zeros(count(rows), 1, dtype=torch.bool, device=sign_rows.device).index_fill(0, sign_rows, True)
        return torch.where(mask, sign(rows, None), scale(rows, None))
    a, b = sign(take(rows, sign_rows), sign_rows), scale(take(rows, scale_rows), scale_rows)
    out = a.new_empty(count(rows), a.shape[1])
    return out.index_copy(0, sign_rows, a).index_copy(0, scale_rows, b.to(a.dtype))
