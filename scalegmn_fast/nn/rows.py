"""Rows that need not be written out: what a linear map reads decides where it runs.

A block of R rows of width d is a dense tensor [R, d] or one of the forms below; `linear`, `dense`, `narrow` and `take`
accept any of them. A linear map of gathered rows runs on the table, of mapped rows is composed with the map, of
factored edges is a [width, d_e] matrix per edge type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GatheredRows(NamedTuple):
    """``scale * table[index]``: table [P, d], index int64 [R], scale [R, 1] or None for 1."""

    table: Tensor
    index: Tensor
    scale: Tensor | None = None


class MappedRows(NamedTuple):
    """``hidden @ weight.T + bias``: a linear layer not yet applied."""

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


Rows = Tensor | GatheredRows | MappedRows | FactoredEdges


def count(rows: Rows) -> int:
    """Number of rows."""
    if isinstance(rows, Tensor):
        return rows.shape[0]
    if isinstance(rows, GatheredRows):
        return rows.index.shape[0]
    return rows[0].shape[0]


def width(rows: Rows) -> int:
    """Width of a row."""
    if isinstance(rows, Tensor):
        return rows.shape[1]
    if isinstance(rows, GatheredRows):
        return rows.table.shape[1]
    return rows[1].shape[-2]


def linear(rows: Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` as a dense [R, out]."""
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
        if rows.hidden.shape[0] < rows.weight.shape[1]:
            return F.linear(dense(rows), weight, bias)
        composed = rows.bias if rows.bias is None else F.linear(rows.bias, weight, bias)
        return F.linear(rows.hidden, weight @ rows.weight, bias if composed is None else composed)
    maps = weight @ rows.maps
    offsets = bias if rows.offsets is None else F.linear(rows.offsets, weight, bias)
    return _apply_maps(rows.weights, maps, offsets, rows.types)


def dense(rows: Rows) -> Tensor:
    """The rows written out, [R, d]."""
    if isinstance(rows, Tensor):
        return rows
    if isinstance(rows, GatheredRows):
        gathered = rows.table[rows.index]
        return gathered if rows.scale is None else rows.scale * gathered
    if isinstance(rows, MappedRows):
        return F.linear(rows.hidden, rows.weight, rows.bias)
    return _apply_maps(rows.weights, rows.maps, rows.offsets, rows.types)


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
    return FactoredEdges(fn(rows.weights), rows.maps, rows.offsets, None if rows.types is None else fn(rows.types))


def negate(rows: Rows) -> Rows:
    """The rows with the other sign."""
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


def by_class(partition: bool, parts: tuple[Rows, ...], classes: RowClasses, branches: dict) -> Tensor:
    """Run each class of rows through its own branch.

    Args:
        partition: slice the rows by class; otherwise run every branch on all rows and select by a mask.
        parts: blocks of rows of equal count, handed to a branch together.
        classes: the row classes.
        branches: function -> names of its classes; ``function(parts, classes) -> [R, d]``.

    A branch without rows runs on none, so that its parameters get zero gradients instead of no gradients (optimisers
    with weight decay and DistributedDataParallel see the same parameters in every step).
    """
    if not partition:
        return _masked(parts, classes, branches)
    pieces = {}
    for branch, names in branches.items():
        filled = [name for name in names if classes.range_of(name)[1]] or names[:1]
        for name in filled:
            start, length = classes.range_of(name)
            pieces[name] = branch(tuple(narrow(part, start, length) for part in parts), classes.only(name))
    ordered = [pieces[name] for name in ("last", "hidden", "first") if name in pieces]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


def _masked(parts, classes: RowClasses, branches: dict) -> Tensor:
    total = classes.last + classes.hidden + classes.first
    everything = RowClasses(0, total, 0, classes.split, classes.start)
    out = 0
    for branch, names in branches.items():
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
    sign_rows, scale_rows = classes.sign_rows()
    if not partition:
        mask = torch.zeros(count(rows), 1, dtype=torch.bool, device=sign_rows.device).index_fill(0, sign_rows, True)
        return torch.where(mask, sign(rows, None), scale(rows, None))
    a, b = sign(take(rows, sign_rows), sign_rows), scale(take(rows, scale_rows), scale_rows)
    out = a.new_empty(count(rows), a.shape[1])
    return out.index_copy(0, sign_rows, a).index_copy(0, scale_rows, b.to(a.dtype))
