"""Message functions: what a neuron receives along its edges, aggregated per receiving neuron.

Source: spec, *One round of message passing*; ScaleGMN paper, section 4.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, ops
from . import fused
from .equivariant import CANONICAL_EPS, EquivariantNet, SymmetryPair
from .mlp import MlpNet
from .rows import (
    FactoredEdges,
    GatheredRows,
    RowClasses,
    Rows,
    TracedRows,
    UpdatedEdges,
    concat,
    dense,
    linear,
    multiply,
    narrow,
    take,
)
from .work import PlannedModule, WorkPlan

AGGREGATORS = {"add": "sum", "sum": "sum", "mean": "mean", "max": "max"}


class Direction(NamedTuple):
    """The messages of one round in one direction, sorted by receiver.

    Attributes:
        sender, receiver: int64 [M], node of each end.
        ptr: int32 [T + 1], messages of each of the T receivers that are computed.
        order: int64 [M], row of each message's edge features, or None where they stand in message order.
        classes: class of each message's receiver, in message order.
        sender_split: for `CarriedMessage` and ``hetero``: `RowSplit` of the messages by the sender's sign mask.
        pairs: (node int64 [P], type int64 [P], index int64 [M]), the (sender, edge type) pair of each message, for
            typed factored edge features; None writes those out.
        runs: (first message, messages, edge type) of ranges of messages along edges of one type, in order, where known.
    """

    sender: Tensor
    receiver: Tensor
    ptr: Tensor
    order: Tensor | None
    classes: RowClasses
    sender_split: object | None = None
    pairs: tuple[Tensor, Tensor, Tensor] | None = None
    runs: tuple[tuple[int, int, int], ...] = ()


class Message(PlannedModule):
    """A message function: `aggregate` sums its messages per receiver, and updates the same edges if asked to.

    Subclasses have ``reduce``, ``compute(x, e, edges, p)``, the messages [M, d_hid], and ``body(x, e, edges, p)``, what
    traces a message on the edge rows of a section.
    """

    reduce: str

    def aggregate(
        self,
        x: Tensor,
        e: Rows,
        edges: Direction,
        p: Rows | None = None,
        update=None,
        updated_rows: int = 0,
        nodes=None,
        keep: bool = True,
        read_once: bool = False,
    ) -> tuple[Tensor, Rows | None]:
        """Aggregated messages [T, d_hid], and updated edge features [updated_rows, d_out] (None without an update).

        Args:
            x: node features [N, d_in_v].
            e: edge features, at least as many rows as there are messages.
            edges: the messages.
            p: positional extras, a row per message.
            update: `EdgeUpdate` of the edges that the messages run along, or None.
            updated_rows: how many of them, from the first, are updated.
            nodes: `RowClasses` of the nodes, for the update.
            keep: write updated features out; otherwise whoever reads them computes them again (`UpdatedEdges`), where
                messages run fused and the update draws no dropout. Those that their readers compose linear maps with
                (`EdgeUpdate.composes`) are not written out either.
            read_once: one program alone reads the updated features, so that they may draw their dropout in it.
        """
        count = edges.sender.shape[0]
        updated_rows = 0 if update is None else updated_rows
        if not (fused.serves(self, x) and self.reduce in ("sum", "mean") and updated_rows <= count):
            if self.reduce == "max" and self.work == WorkPlan():
                backends.warn_unfused("gnn_args.aggregator 'max'", "messages and edge updates run", x)
            e = fused.written(e)
            own = narrow(e, 0, count) if edges.order is None else e
            out = ops.segment_reduce(self.compute(x, own, edges, p), edges.ptr, self.reduce)
            if update is None:
                return out, None
            ends = (edges.sender[:updated_rows], edges.receiver[:updated_rows])
            return out, update(x, narrow(e, 0, updated_rows), *ends, nodes)
        trace = later = None
        if update is not None:
            ends = update.ends(x, edges.sender, edges.receiver, nodes)
            composes, drops = update.composes(e), update.drops()
            if (composes and (read_once or not drops)) or not (keep or drops):
                ends = tuple(narrow(end, 0, updated_rows) for end in ends)
                later = UpdatedEdges(narrow(e, 0, updated_rows), update, ends)
            else:
                trace = partial(update.trace, ends=ends)
        symmetric = self.symmetric_rows(edges)
        if symmetric is None:
            sums, written = fused.messages(self.body(x, e, edges, p), e, edges, trace, updated_rows)
        else:
            sums, written = 0, None
            for side, name in enumerate(("sign", "scale")):
                part, rows = fused.subset_direction(edges, symmetric, side)
                part_p = None if p is None else take(p, rows)
                sums = sums + fused.messages(self.body(x, e, part, part_p), e, part, symmetry=name)[0]
            if trace is not None:
                written = fused.edges(trace, e, updated_rows)
        if self.reduce == "mean":
            sums = sums / (edges.ptr[1:] - edges.ptr[:-1]).clamp(min=1).unsqueeze(1)
        return sums, written if later is None else later

    def symmetric_rows(self, edges: Direction) -> RowClasses | None:
        """Classes, with the split, of the rows whose symmetry decides (``hetero``); else None."""
        return None


class MessageProduct(Message):
    """The product ``(w_e e_ij) * (w_v x_j)`` that scale-equivariant messages start from."""

    def add_maps(self, d_in_v: int, d_in_e: int, d_hid: int) -> None:
        self.w_v = nn.Linear(d_in_v, d_hid, bias=False)
        self.w_e = nn.Linear(d_in_e, d_hid, bias=False)

    def product(self, x: Tensor, e: Rows, edges: Direction) -> Rows:
        """[M, d_hid]; with one number per layer-0 edge it stays that number times a row of its (sender, type) pair."""
        paired = isinstance(e, FactoredEdges) and (e.types is None or edges.pairs is not None)
        if paired and e.offsets is None and e.weights.shape[1] == 1:
            maps = (self.w_e.weight @ e.maps)[:, :, 0]
            weights = e.weights if edges.order is None else e.weights[edges.order]
            if e.types is None:
                return GatheredRows(self.w_v(x) * maps[0], edges.sender, weights)
            nodes, types, index = edges.pairs
            return GatheredRows(self.w_v(x)[nodes] * maps[types], index, weights)
        mapped = linear(e, self.w_e.weight)
        if edges.order is not None:
            mapped = mapped[edges.order]
        senders = self.w_v(x)[edges.sender] if self.work.hoist else self.w_v(x[edges.sender])
        return mapped * senders

    def traced_product(self, x: Tensor, e: Rows, edges: Direction):
        """``f(edge rows)``: `product` on the rows of a section."""
        factored = isinstance(e, FactoredEdges) and (e.types is None or edges.pairs is not None)
        if factored and e.offsets is None and e.weights.shape[1] == 1:
            own = e if edges.order is not None else narrow(e, 0, edges.sender.shape[0])
            pairs = self.product(x, own, edges)
            return lambda rows: rows._replace(form=pairs)
        senders = GatheredRows(self.w_v(x), edges.sender)
        return lambda rows: multiply(linear(rows, self.w_e.weight), rows._replace(form=senders))


class EquivariantMessage(MessageProduct):
    """``EquivariantNet((w_e e_ij) * (w_v x_j), p)``, aggregated per receiver.

    Args:
        d_in_v, d_in_e, d_hid: widths of node features, edge features and messages.
        aggregator: ``add``, ``mean`` or ``max``.
        net: arguments of `EquivariantNet` but for the widths.
    """

    def __init__(self, d_in_v: int, d_in_e: int, d_hid: int, aggregator: str, **net):
        super().__init__()
        self.add_maps(d_in_v, d_in_e, d_hid)
        self.message_fn = EquivariantNet(d_in=d_hid, d_out=d_hid, **net)
        self.reduce = _reduction(aggregator)

    def compute(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None) -> Tensor:
        return self.message_fn(self.product(x, e, edges), p, edges.classes)

    def body(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None):
        product = self.traced_product(x, e, edges)

        def message(rows: TracedRows) -> TracedRows:
            return self.message_fn(product(rows), None if p is None else rows._replace(form=p), edges.classes)

        return message

    def symmetric_rows(self, edges: Direction) -> RowClasses | None:
        return edges.classes if self.message_fn.symmetry == "hetero" else None


class CarriedMessage(SymmetryPair, MessageProduct):
    """Message against the weights, carried by the receiver's own state: ``(W x_j) * phi(c([x_i, m_ij]), p)``.

    j is the receiver (the edge's source neuron), i the sender, ``m_ij = (w_e e_ij) * (w_v x_j)`` the product that runs
    along the edge and scales with q_i like x_i; c is taken jointly over the pair, so the gate is invariant and the
    message scales with q_j. Exact for ``scale`` and ``hetero`` without dividing by weights.
    """

    def __init__(
        self,
        d_in_v: int,
        d_in_e: int,
        d_hid: int,
        aggregator: str,
        *,
        mlp_args: dict,
        symmetry: str,
        sign_symmetrization: bool,
        d_extra: int = 0,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        self.add_maps(d_in_v, d_in_e, d_hid)
        self.W = nn.Linear(d_in_v, d_hid, bias=False)
        self.add_layers(d_in_v + d_hid, d_hid, mlp_args, symmetry, sign_symmetrization, eps, d_extra=d_extra)
        self.reduce = _reduction(aggregator)

    def compute(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None) -> Tensor:
        """``edges`` run against the weights."""
        along = edges._replace(sender=edges.receiver)
        pair = torch.cat([x[edges.sender], dense(self.product(x, e, along))], dim=1)
        gate = self.invariant(pair, p, self._pairs(edges))
        return linear(GatheredRows(x, edges.receiver), self.W.weight) * gate

    def body(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None):
        product = self.traced_product(x, e, edges._replace(sender=edges.receiver))
        receivers = GatheredRows(torch.nn.functional.linear(x, self.W.weight), edges.receiver)

        def message(rows: TracedRows) -> TracedRows:
            pair = concat([rows._replace(form=GatheredRows(x, edges.sender)), product(rows)])
            gate = self.invariant(pair, None if p is None else rows._replace(form=p), edges.classes)
            return multiply(gate, rows._replace(form=receivers))

        return message

    def symmetric_rows(self, edges: Direction) -> RowClasses | None:
        return self._pairs(edges) if self.symmetry == "hetero" else None

    @staticmethod
    def _pairs(edges: Direction) -> RowClasses:
        """A pair is invariant under the sender's symmetry, whatever the receiver's class."""
        return RowClasses(0, edges.sender.shape[0], 0, edges.sender_split)


class PlainMessage(Message):
    """``mlp([e_ij, x_j])``, aggregated per receiver: no symmetry but permutations.

    Args:
        d_hid: width of node features, edge features and messages.
        aggregator: ``add``, ``mean`` or ``max``.
        mlp_args: arguments of `Mlp`.
    """

    def __init__(self, d_hid: int, aggregator: str, mlp_args: dict):
        super().__init__()
        self.message_fn = MlpNet(2 * d_hid, d_hid, mlp_args)
        self.reduce = _reduction(aggregator)

    def compute(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None) -> Tensor:
        """p is not read (as in the original)."""
        senders = GatheredRows(x, edges.sender) if self.work.hoist else x[edges.sender]
        return self.message_fn(e if edges.order is None else take(e, edges.order), senders)

    def body(self, x: Tensor, e: Rows, edges: Direction, p: Rows | None):
        return lambda rows: self.message_fn(rows, rows._replace(form=GatheredRows(x, edges.sender)))


class SineUpdate(PlannedModule):
    """``sin(30 W x)``: the node update that acts like a SIREN layer (``update_as_act``). Odd, so sign-equivariant.

    Shapes: x [N, d_in] -> [N, d_out].
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.W = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30.0 * self.W(x))


def _reduction(aggregator: str) -> str:
    if aggregator not in AGGREGATORS:
        raise ValueError(f"aggregator must be one of {', '.join(AGGREGATORS)}, got {aggregator!r}")
    return AGGREGATORS[aggregator]
