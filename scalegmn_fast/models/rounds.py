"""The plan of work: which nodes and messages each round of a model still has to compute."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..graph import GraphBatch
from ..graph.ends import sender_pairs
from ..graph.plan import FIRST, HIDDEN, LAST
from ..nn import Direction, FactoredEdges, RowClasses
from ..nn.rows import Rows, clamped


class Types(NamedTuple):
    """Sizes that number the types of nodes and edges: first-layer neurons, hidden layers."""

    num_first: int
    num_hidden_layers: int


def node_classes(graph: GraphBatch, nodes: int | None = None) -> RowClasses:
    """Classes of the first ``nodes`` nodes (all if None)."""
    plan = graph.plan
    nodes = plan.num_nodes if nodes is None else nodes
    last = clamped(plan.num_last, 0, nodes)
    hidden = clamped(plan.num_hidden, 0, nodes - last)
    return RowClasses(last, hidden, nodes - last - hidden, _split(graph, "nodes"))


def _split(graph: GraphBatch, rows: str):
    return None if graph.sign_mask is None else graph.sign_split(rows)


def forward_messages(graph: GraphBatch, senders: int, receivers: int, e: Rows, types: Types | None) -> Direction:
    """Messages along the weights, of edge features e, from the first ``senders`` nodes into the first ``receivers``.

    ``types`` if edges have types.
    """
    plan = graph.plan
    edges = plan.edges_into(receivers)
    source, target = plan.index("source")[:edges], plan.index("target")[:edges]
    last = clamped(plan.edges_into_class(LAST), 0, edges)
    paired = isinstance(e, FactoredEdges) and e.types is not None
    pairs = sender_pairs(plan, senders, edges, last, *types) if paired else None
    inner = () if types is None else plan.inner_edges()
    runs = tuple((first, length, types.num_first + layer - 1) for first, length, layer in inner)
    classes = RowClasses(last, edges - last, 0, _split(graph, "edges"))
    return Direction(source, target, plan.target_ptr[: receivers + 1], None, classes, None, pairs, runs)


def backward_messages(graph: GraphBatch, only_first: bool, ordered: bool) -> Direction:
    """Messages against the weights, into every node or into first-layer nodes only.

    Edge features stand in ``plan.source_order`` (``ordered``) or in plan order.
    """
    plan = graph.plan
    sender, receiver = plan.reversed_ends()
    first = plan.edges_from_first
    start = plan.num_edges - first if only_first else 0
    ptr = plan.source_ptr[plan.num_nodes - plan.num_first :] - start if only_first else plan.source_ptr
    order = None if ordered else plan.index("source_order")[start:]
    senders = _split(graph, "reversed_senders")
    if senders is not None and start:
        senders = _Shifted(senders, start)
    classes = RowClasses(0, plan.num_edges - start - first, first, _split(graph, "reversed"), start)
    return Direction(sender[start:], receiver[start:], ptr, order, classes, senders)


class _Shifted(NamedTuple):
    """A `RowSplit` seen from row ``start``."""

    split: object
    start: int

    def select(self, start: int, stop: int):
        return self.split.select(self.start + start, self.start + stop)


class _Ends(NamedTuple):
    """A `RowSplit` of nodes seen from the last-layer rows followed by the first-layer rows."""

    split: object
    last: int
    first_start: int

    def select(self, start: int, stop: int):
        if stop <= self.last:
            return self.split.select(start, stop)
        shift = self.first_start - self.last
        if start >= self.last:
            return self.split.select(start + shift, stop + shift)
        head = self.split.select(start, self.last)
        tail = self.split.select(self.first_start, stop + shift)
        offset = self.last - start
        return tuple(torch.cat([a, b + offset]) for a, b in zip(head, tail, strict=True))


def ends_split(graph: GraphBatch):
    """Sign and scale rows among last-layer and first-layer nodes, or None without a sign mask."""
    split = _split(graph, "nodes")
    plan = graph.plan
    return None if split is None else _Ends(split, plan.num_last, plan.num_nodes - plan.num_first)


def edge_encoding_classes(graph: GraphBatch, exact: bool) -> RowClasses:
    """Row classes of edges inside an equivariant positional net.

    By target, as the original has it; ``exact``: an edge scales if either end does, so that only edges that join first
    to last neurons directly are not hidden rows. Those stand among the edges into last neurons.
    """
    plan = graph.plan
    last = plan.edges_into_class(LAST)
    split = _split(graph, "edges")
    if not exact:
        return RowClasses(last, plan.num_edges - last, 0, split)
    has_hidden = any(block.node_class == HIDDEN for block in plan.blocks)
    direct = any(block.node_class == FIRST and block.distance == 1 for block in plan.blocks)
    if direct and has_hidden:
        raise ValueError(
            "positional_encodings.equiv_net is exact only for networks whose input and output neurons are not joined "
            "directly, or which have no hidden neurons"
        )
    return RowClasses(last, 0, 0, split) if direct else RowClasses(0, plan.num_edges, 0, split)
