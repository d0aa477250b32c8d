"""Rounds of the Neural Graphs networks as row programs.

What a round reads of its edges and the update that makes those edges are one program: messages, logits, values and the
layers of the edge mlps stay in the cache. In memory are edge features of one round at a time, node rows, and what the
reductions keep per node.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..graph.pairs import NodePairs, RowPairs
from ..ops.row_program import RowProgram, SectionWriter
from .recompute import Tables
from .rows import GatheredRows, TracedRows, add, add_vector, concat, dropout, linear, multiply, norm_act

#: Activations that programs have under the name that Neural Graphs configurations give them.
ACTIVATIONS = ("identity", "relu", "elu", "silu", "gelu", "tanh", "sigmoid")


def serves(x: Tensor) -> bool:
    """Whether an engine of `row_program` runs programs on tensors like x."""
    return backends.fuses(x)


def _activated(rows: TracedRows, name: str) -> TracedRows:
    return norm_act(rows, None, name, 1.0)


def mapped_rows(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weight.T + bias`` as a program, whose result is the engine's."""
    program = RowProgram()
    section = program.section(rows.shape[0])
    section.write(section.linear(section.load(rows), weight, bias))
    return program.run()[1]


def _mapped(rows: TracedRows, weight: Tensor, bias: Tensor | None = None) -> TracedRows:
    """A linear map within the program, of table rows too: the engine maps each row once per tile."""
    return rows._replace(form=rows.section.linear(rows.value(), weight, bias))


# -- messages of the graph network ------------------------------------------------------------------------------------


def edge_mlp(e: TracedRows, module, x: Tensor, source: Tensor, target: Tensor, tables: Tables) -> TracedRows:
    """`EdgeUpdateMlp` on the rows of a section."""
    hidden = linear(e, module.lin_e.weight, module.lin_e.bias)
    for layer, index in ((module.lin_s, source), (module.lin_t, target)):
        hidden = add(
            hidden, e._replace(form=GatheredRows(tables.made(mapped_rows, x, layer.weight, layer.bias), index))
        )
    return linear(_activated(hidden, module.act), module.lin1.weight, module.lin1.bias)


class EdgeState(NamedTuple):
    """Edge features of the messages, with the updates that they have yet to pass.

    Attributes:
        e: [M, d_e]; updates: `EdgeUpdateMlp` modules, each with the node features that it reads.
    """

    e: Tensor
    updates: tuple = ()

    def dense(self, source: Tensor, target: Tensor) -> Tensor:
        """[R, d_e], updated, of the first R messages, those that the ends int64 [R] are of."""
        e = self.e[: source.shape[0]]
        for update, x in self.updates:
            e = update(x, e, source, target)
        return e

    def trace(self, section: SectionWriter, source: Tensor, target: Tensor, tables: Tables) -> TracedRows:
        """The features, updated, on the rows of a section."""
        rows = TracedRows(section, section.load(self.e))
        for update, x in self.updates:
            rows = edge_mlp(rows, update, x, source, target, tables)
        return rows


def message_statistics(
    conv, x: Tensor, state: EdgeState, edges, rows: int, writes: int = 0, head=()
) -> tuple[Tensor, Tensor]:
    """(statistics [R, 4 F] of the messages per receiver, ``head`` of the first ``writes`` edges) of a `PnaConv`.

    Args:
        conv: the `PnaConv`, of one tower.
        x: [N, F]; rows: R.
        state: the edge features, of the messages into the first R nodes or of more.
        edges: `MessageEdges` into the first R nodes.
        writes: number of edges, all into some of the first nodes.
        head: modules as for `chain`.
    """
    program, total, tables = RowProgram(), edges.source.shape[0], Tables()
    weight, bias = conv.linear_maps(0)[0]
    to_target = tables.made(mapped_rows, x[:rows], weight[:, : conv.width], bias)
    to_source = tables.made(mapped_rows, x, weight[:, conv.width : 2 * conv.width])
    for count, written in ((writes, True), (total - writes, False)):
        if count == 0 and (written or writes):
            continue
        section = program.section(count)
        read = state.trace(section, edges.source, edges.target, tables)
        if written:
            section.write(_chained(read, head).value())
        section.summarize(_message(conv, read, edges, to_target, to_source).value())
    with tables.forgotten():
        return program.run(edges.ptr.long())


def _message(conv, read: TracedRows, edges, to_target: Tensor, to_source: Tensor) -> TracedRows:
    width, (weight, bias) = conv.width, (conv.edge_encoder.weight, conv.edge_encoder.bias)
    first, *others = conv.linear_maps(0)
    h = read._replace(form=GatheredRows(to_target, edges.target))
    h = add(h, h._replace(form=GatheredRows(to_source, edges.source)))
    if conv.modulation == "concat":
        maps = first[0][:, 2 * width :]
        h = add(h, linear(read, maps @ weight, F.linear(bias, maps)))
    for layer in others:
        h = linear(_activated(h, "relu"), *layer)
    if conv.modulation == "concat":
        return h
    scale = linear(read, weight[:width], bias[:width])
    if conv.modulation == "gate":
        return multiply(_activated(scale, "sigmoid"), h)
    return add(multiply(scale, h), linear(read, weight[width:], bias[width:]))


def updated_nodes(conv, own: Tensor, parts: list[Tensor], scales: list[Tensor | None]) -> Tensor:
    """``lin(post_nn(...))`` of a `PnaConv` of one tower: of [own, parts times each scale], never written side by side.

    own, parts: [R, F]; scales: [R], or None for 1.
    """
    program = RowProgram()
    section = program.section(own.shape[0])
    first, *others = conv.post_nns[0]
    rows, joined = (concat([TracedRows(section, section.load(t)) for t in given]) for given in ([own], parts))
    weight, *weights = first.weight.split([own.shape[1], *[joined.form.width] * len(scales)], dim=1)
    out = linear(rows, weight, first.bias)
    for weight, scale in zip(weights, scales, strict=True):
        mapped = linear(joined, weight)
        if scale is not None:
            mapped = mapped._replace(form=section.scale(mapped.value(), scale[:, None]))
        out = add(out, mapped)
    for layer in others:
        out = linear(out, layer.weight, layer.bias) if isinstance(layer, torch.nn.Linear) else _activated(out, "relu")
    section.write(linear(out, conv.lin.weight, conv.lin.bias).value())
    return program.run()[1]


def between_rounds(x: Tensor, norm, act: str, probability: float, training: bool) -> Tensor:
    """``dropout(act(norm(x)))`` of nodes [N, d]; norm: a `NodeNorm` of scope "batch" or None."""
    program = RowProgram()
    section = program.section(x.shape[0])
    rows = TracedRows(section, section.load(x))
    if norm is not None:
        factor = (x.std(correction=0) + norm.eps).reciprocal().expand(x.shape[1])
        factor = factor if norm.weight is None else factor * norm.weight
        rows = add_vector(rows, -x.mean().expand(x.shape[1]))
        rows = linear(rows, factor.diag(), norm.bias)
    section.write(dropout(_activated(rows, act), probability, training).value())
    return program.run()[1]


# -- attention over pairs ---------------------------------------------------------------------------------------------


class PairRows(NamedTuple):
    """The pairs (i, j) of a program.

    Attributes:
        ptr: int64 [R + 1], the pairs of each i that attends.
        attending: int64 [P], place of i among those that attend.
        row, column: int64 [P], i and j among all nodes.
        number, reverse: int64 [P], of the pair and of (j, i) among all pairs; number None: its own.
    """

    ptr: Tensor
    attending: Tensor
    row: Tensor
    column: Tensor
    number: Tensor | None
    reverse: Tensor


def program_pairs(pairs: NodePairs, rows: RowPairs | None = None) -> PairRows:
    """All pairs, or those of some nodes i."""
    if rows is None:
        return PairRows(pairs.ptr.long(), pairs.row, pairs.row, pairs.column, None, pairs.reverse)
    return PairRows(rows.ptr, rows.row, rows.node, rows.column, rows.pair, rows.reverse)


class PairFeatures(NamedTuple):
    """Edge features of all pairs, with an update that they have yet to pass.

    Attributes:
        e: [P, d_e], or rows of a table, as the first layer's are: equal ones are stored once.
        update: `PairUpdate` or None; x: the node features that it reads.
        back: int64 [P], for rows of a table the row of each (j, i).
    """

    e: Tensor | GatheredRows
    update: object = None
    x: Tensor | None = None
    back: Tensor | None = None

    def dense(self, pairs: NodePairs) -> Tensor:
        """[P, d_e], updated and written out."""
        if self.update is not None and serves(self.x):
            return self._written(program_pairs(pairs))
        e = self.e if isinstance(self.e, Tensor) else self.e.table[self.e.index]
        return e if self.update is None else self.update(self.x, e, pairs)

    def _written(self, pairs: PairRows) -> Tensor:
        program = RowProgram()
        section = program.section(pairs.row.shape[0])
        section.write(self.trace(section, pairs).value())
        return program.run()[1]

    def _read(self, section: SectionWriter, pairs: PairRows, reverse: bool) -> TracedRows:
        if isinstance(self.e, GatheredRows):
            index = self.back if reverse else self.e.index
            index = index if pairs.number is None else index[pairs.number]
            return TracedRows(section, GatheredRows(self.e.table, index))
        return TracedRows(section, section.load(self.e, pairs.reverse if reverse else pairs.number))

    def trace(self, section: SectionWriter, pairs: PairRows) -> TracedRows:
        """The features, updated, on the rows of a section."""
        own = self._read(section, pairs, reverse=False)
        if self.update is None:
            return own
        return pair_update(own, self._read(section, pairs, reverse=True), self.update, self.x, pairs)


def pair_update(own: TracedRows, back: TracedRows, module, x: Tensor, pairs: PairRows) -> TracedRows:
    """`PairUpdate` on the rows of a section; ``back``: the features of (j, i)."""
    first, training = module.edge_mlp0, module.training
    weight, bias = first.lin0_e.weight, first.lin0_e.bias
    if isinstance(own.form, GatheredRows):
        forth_map, back_map = weight.chunk(2, dim=1)
        hidden = add(_mapped(own, forth_map, bias), _mapped(back, back_map))
    else:
        hidden = linear(concat([own, back]), weight, bias)
    for layer, index in ((first.lin0_s, pairs.row), (first.lin0_t, pairs.column)):
        hidden = add(hidden, own._replace(form=GatheredRows(F.linear(x, layer.weight, layer.bias), index)))
    updated = linear(_activated(hidden, "gelu"), first.lin1.weight, first.lin1.bias)
    e = _normed(add(dropout(updated, first.dropout, training), own), module.eln0)
    second = module.edge_mlp1
    hidden = _activated(linear(e, second[0].weight), "gelu")
    updated = dropout(linear(hidden, second[2].weight, second[2].bias), second[3].p, training)
    return _normed(add(e, updated), module.eln1)


def _normed(rows: TracedRows, norm) -> TracedRows:
    return norm_act(rows, norm if isinstance(norm, torch.nn.LayerNorm) else None, "identity", 1.0)


def attention(
    module, q: Tensor, k: Tensor, v: Tensor, features: PairFeatures, pairs: PairRows, writes: bool
) -> tuple[Tensor, PairFeatures]:
    """(attended [R, d], the pairs' features) of a `RelationalAttention`; q [R, d], k and v [N, d], head by head.

    With ``writes`` features that had an update to pass have passed it.
    """
    program = RowProgram()
    section = program.section(pairs.row.shape[0])
    e = features.trace(section, pairs)
    written = writes and features.update is not None
    if written:
        section.write(e.value())
    heads, width = module.n_heads, q.shape[1]
    maps = module.qkv_edge.weight.unflatten(0, (heads, -1, width // heads)).unbind(1)
    parts = [_mapped(e, part.flatten(0, 1)) for part in maps]
    query = add(parts[0], e._replace(form=GatheredRows(q, pairs.attending)))
    key = add(parts[1], e._replace(form=GatheredRows(k, pairs.column)))
    values = e._replace(form=GatheredRows(v, pairs.column))
    value = add(multiply(parts[3], values), parts[2]) if len(parts) == 4 else add(parts[2], values)
    section.attend(value.value(), section.head_dot(query.value(), key.value(), heads, module.scale))
    attended, rows = program.run(pairs.ptr)
    return attended, PairFeatures(rows) if written else features


# -- chains of layers --------------------------------------------------------------------------------------------------


def chain(modules, rows: Tensor, index: Tensor | None = None) -> Tensor:
    """A chain of `FourierFeatures`, Linear, SiLU and ReLU modules on rows [R, d], or on those that int64
    ``index`` names.

    Fused, nothing between them is written.
    """
    if not serves(rows):
        rows = rows if index is None else rows[index]
        for module in modules:
            rows = module(rows)
        return rows
    program = RowProgram()
    section = program.section((rows if index is None else index).shape[0])
    section.write(_chained(TracedRows(section, section.load(rows, index)), modules).value())
    return program.run()[1]


def _chained(rows: TracedRows, modules) -> TracedRows:
    for module in modules:
        if isinstance(module, torch.nn.Linear):
            rows = linear(rows, module.weight, module.bias)
        elif isinstance(module, torch.nn.SiLU | torch.nn.ReLU):
            rows = _activated(rows, type(module).__name__.lower())
        else:
            rows = _fourier(rows, module.b)
    return rows


def _fourier(rows: TracedRows, frequencies: Tensor) -> TracedRows:
    """``[cos(2 pi b x), sin(2 pi b x)]``, with cos(y) = sin(y + pi / 2)."""
    angles = 2 * math.pi * frequencies
    phases = torch.cat([angles.new_full((angles.shape[0],), math.pi / 2), angles.new_zeros(angles.shape[0])])
    return _activated(linear(rows, angles.repeat(2, 1), phases), "sine")
