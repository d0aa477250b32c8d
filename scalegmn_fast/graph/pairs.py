"""What is derived from a plan for networks over both directions of an edge and over all pairs of nodes.

Everything here is made once per plan and cached with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import FIRST, GraphPlan

NO_EDGE, TOKEN = -1, -2


class NetworkOrder(NamedTuple):
    """Nodes graph by graph, in each from the first layer to the last, in each layer by position.

    Attributes:
        rows: int64 [N], plan row of each node; place: int64 [N], the inverse.
        ptr: int32 [B + 1], nodes ``ptr[g]:ptr[g + 1]`` are those of graph g.
        sizes: nodes of each graph.
    """

    rows: Tensor
    place: Tensor
    ptr: Tensor
    sizes: tuple[int, ...]

    @property
    def size(self) -> int | None:
        """Nodes of every graph, None if graphs differ."""
        return self.sizes[0] if min(self.sizes) == max(self.sizes) else None


class MessageEdges(NamedTuple):
    """Messages sorted by the row they end in.

    Attributes:
        source, target: int64 [M], plan nodes; ptr: int32 [N + 1], CSR by target.
        row: int64 [M], row of each message's edge features among those of the edges followed by those of the reversed
            edges; None if it is its own number.
        forward: int64 [E], the message along each edge, in plan order; None if it is its own number.
        into_last: messages into last-layer nodes, a prefix, and as many as there are edges into them.
    """

    source: Tensor
    target: Tensor
    ptr: Tensor
    row: Tensor | None
    forward: Tensor | None
    into_last: int


@dataclass(frozen=True, eq=False)
class NodePairs:
    """All pairs (i, j) of nodes of one graph, sorted by graph, then i, then j; nodes in `NetworkOrder`.

    Attributes:
        order: int64 [N'], plan row of each node; a class token, the first node of its graph, has N.
        ptr: int32 [N' + 1], pairs ``ptr[i]:ptr[i + 1]`` are those of node i.
        graph_ptr: int32 [B + 1], the pairs of each graph.
        edge: int64 [P], plan edge from i to j; `NO_EDGE`, or `TOKEN` where i or j is a class token.
        row, column, reverse: int64 [P], i, j and the number of the pair (j, i).
        of_edge: int64 [E], pair of each plan edge.
        size: nodes of every graph (with the token), None if graphs differ.
    """

    order: Tensor
    ptr: Tensor
    graph_ptr: Tensor
    edge: Tensor
    row: Tensor
    column: Tensor
    reverse: Tensor
    of_edge: Tensor
    size: int | None

    def edge_row(self, num_edges: int, both_ways: bool) -> Tensor:
        """int64 [P], row of each pair in a table of edge features.

        The table: one row per edge, with `both_ways` one per reversed edge, one for pairs without an edge, one for
        pairs with a class token.
        """
        found = self.edge
        count = num_edges
        if both_ways:
            back = self.edge[self.reverse]
            found = torch.where((found == NO_EDGE) & (back >= 0), back + num_edges, found)
            count = 2 * num_edges
        return torch.where(found >= 0, found, count + NO_EDGE - found)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def network_order(plan: GraphPlan) -> NetworkOrder:
    """The nodes of a plan in network order."""
    return plan._cached("network_order", _network_order, plan)


def _network_order(plan: GraphPlan) -> NetworkOrder:
    sizes = tuple(map(sum, plan.layer_widths()))
    rows = torch.arange(plan.num_nodes, device=plan.device)
    place = torch.where(rows < plan.num_last, 2, 1)
    place = torch.where(rows >= plan.num_nodes - plan.num_first, FIRST - 2, place)
    for key in (plan.index("node_position"), plan.index("node_layer"), place, plan.index("node_graph")):
        rows = rows[torch.sort(key[rows], stable=True).indices]
    place = torch.empty_like(rows)
    place[rows] = torch.arange(plan.num_nodes, device=plan.device)
    ptr = _offsets(torch.tensor(sizes, device=plan.device)).int()
    return NetworkOrder(rows, place, ptr, sizes)


def nodes_before(plan: GraphPlan, places: int) -> Tensor:
    """int64 [N]: for each node in plan order the one ``places`` before it in its network (itself for input neurons)."""
    return plan._cached(("nodes_before", places), _nodes_before, plan, places)


def _nodes_before(plan: GraphPlan, places: int) -> Tensor:
    order = network_order(plan)
    is_input = plan.index("node_layer") == 0
    return order.rows[torch.where(is_input, order.place, order.place - places)]


def message_edges(plan: GraphPlan, both_ways: bool) -> MessageEdges:
    """Messages along the edges, with `both_ways` also against them."""
    return plan._cached(("message_edges", both_ways), _message_edges, plan, both_ways)


def _message_edges(plan: GraphPlan, both_ways: bool) -> MessageEdges:
    source, target, into_last = plan.index("source"), plan.index("target"), plan.edges_into(plan.num_last)
    if not both_ways:
        return MessageEdges(source, target, plan.target_ptr, None, None, into_last)
    ends, others = torch.cat([target, source]), torch.cat([source, target])
    ends, row = torch.sort(ends, stable=True)
    number = torch.empty_like(row)
    number[row] = torch.arange(row.shape[0], device=row.device)
    degree = (plan.target_ptr.diff() + plan.source_ptr.diff()).long()
    return MessageEdges(others[row], ends, _offsets(degree).int(), row, number[: plan.num_edges].clone(), into_last)


def node_pairs(plan: GraphPlan, token: bool = False) -> NodePairs:
    """All pairs of nodes of each graph; `token` adds a node to every graph that stands for no neuron.

    Raises:
        ValueError: more than 2^31 - 1 pairs.
    """
    return plan._cached(("node_pairs", token), _node_pairs, plan, token)


def _node_pairs(plan: GraphPlan, token: bool) -> NodePairs:
    order = network_order(plan)
    sizes = [size + token for size in order.sizes]
    count = sum(size * size for size in sizes)
    if count >= 2**31:
        raise ValueError(f"a batch may have at most 2^31 - 1 pairs of nodes, got {count}")
    device = plan.device
    size = torch.tensor(sizes, device=device)
    graph = torch.repeat_interleave(torch.arange(len(sizes), device=device), size, output_size=sum(sizes))
    first_node, first_pair = _offsets(size), _offsets(size * size)
    size_of_row = size[graph]
    ptr = _offsets(size_of_row)
    row = torch.repeat_interleave(torch.arange(sum(sizes), device=device), size_of_row, output_size=count)
    place = torch.arange(count, device=device) - ptr[row]  # of j in its graph
    owner = graph[row]
    column = place + first_node[owner]
    reverse = first_pair[owner] + place * size[owner] + row - first_node[owner]

    node_graph = plan.index("node_graph")
    local = order.place - order.ptr.long()[node_graph] + token
    source, target = plan.index("source"), plan.index("target")
    edge_graph = node_graph[source]
    of_edge = first_pair[edge_graph] + local[source] * size[edge_graph] + local[target]
    edge = torch.full((count,), NO_EDGE, device=device)
    edge[of_edge] = torch.arange(plan.num_edges, device=device)
    rows = order.rows
    if token:
        edge = torch.where((place == 0) | (row == first_node[owner]), TOKEN, edge)
        rows = torch.full_like(graph, plan.num_nodes)
        rows[torch.arange(plan.num_nodes, device=device) + node_graph[order.rows] + 1] = order.rows
    uniform = sizes[0] if min(sizes) == max(sizes) else None
    return NodePairs(rows, ptr.int(), first_pair.int(), edge, row, column, reverse, of_edge, uniform)


def pair_edge_rows(plan: GraphPlan, both_ways: bool, token: bool) -> tuple[Tensor, Tensor]:
    """`NodePairs.edge_row` of the plan's pairs, and of their reverses."""
    return plan._cached(("pair_edge_rows", both_ways, token), _pair_edge_rows, plan, both_ways, token)


def _pair_edge_rows(plan: GraphPlan, both_ways: bool, token: bool) -> tuple[Tensor, Tensor]:
    pairs = node_pairs(plan, token)
    rows = pairs.edge_row(plan.num_edges, both_ways)
    return rows, rows[pairs.reverse]


class NodeSelection(NamedTuple):
    """Some nodes of every graph.

    Attributes:
        plan_rows, network_rows: int64 [R], their rows in plan order and in network order, graph by graph.
        ptr: int32 [B + 1]; count: nodes of every graph, None if graphs differ.
    """

    plan_rows: Tensor
    network_rows: Tensor
    ptr: Tensor
    count: int | None


def select_nodes(plan: GraphPlan, which: str | int) -> NodeSelection:
    """The nodes that a readout reads: "all", "last" (the last layer's) or those of layer number `which` from 0.

    Raises:
        ValueError: a graph has no such layer.
    """
    return plan._cached(("selection", which), _select_nodes, plan, which)


def _select_nodes(plan: GraphPlan, which: str | int) -> NodeSelection:
    order = network_order(plan)
    rows = order.rows
    if which == "last":
        chosen = (rows < plan.num_last).nonzero().squeeze(1)
    elif which == "all":
        chosen = torch.arange(plan.num_nodes, device=plan.device)
    else:
        chosen = (plan.index("node_layer")[rows] == which).nonzero().squeeze(1)
    counts = torch.bincount(plan.index("node_graph")[rows[chosen]], minlength=plan.num_graphs)
    sizes = counts.tolist()
    if min(sizes) == 0:
        raise ValueError(
            f"pooling_layer_idx must be a layer of every network, got {which!r} for graph {sizes.index(0)}"
        )
    count = sizes[0] if min(sizes) == max(sizes) else None
    return NodeSelection(rows[chosen], chosen, _offsets(counts).int(), count)


class RowPairs(NamedTuple):
    """The pairs (i, j) of some nodes i of every graph.

    Attributes:
        nodes: int64 [R], the nodes i, in network order.
        span: (start, count) if those are nodes ``start`` to ``start + count - 1`` of every graph and graphs have equal
            sizes: then the others are not needed.
        ptr: int64 [R + 1], the pairs of each of ``nodes``.
        pair, reverse: int64 [P], number of each pair and of (j, i); row: int64 [P], place of its i in ``nodes``; node,
            column: int64 [P], its i and j.
    """

    nodes: Tensor
    span: tuple[int, int] | None
    ptr: Tensor
    pair: Tensor
    reverse: Tensor
    row: Tensor
    node: Tensor
    column: Tensor


def pairs_of_rows(plan: GraphPlan, which: str | int, token: bool = False) -> RowPairs:
    """The pairs whose first node is one of `select_nodes` (with `token`, one of the class tokens)."""
    return plan._cached(("pairs_of_rows", which, token), _pairs_of_rows, plan, which, token)


def _pairs_of_rows(plan: GraphPlan, which: str | int, token: bool) -> RowPairs:
    pairs = node_pairs(plan, token)
    if token:
        nodes, count = (pairs.order == plan.num_nodes).nonzero().squeeze(1), 1
    else:
        chosen = select_nodes(plan, which)
        nodes, count = chosen.network_rows, chosen.count
    span = None
    if pairs.size is not None and count is not None:
        span = (int(nodes[0]), count)
    lengths = pairs.ptr.diff()[nodes]
    ptr = _offsets(lengths.long())
    row = torch.repeat_interleave(torch.arange(nodes.shape[0], device=nodes.device), lengths)
    pair = pairs.ptr[nodes].long()[row] + torch.arange(row.shape[0], device=row.device) - ptr[row]
    return RowPairs(nodes, span, ptr, pair, pairs.reverse[pair], row, nodes[row], pairs.column[pair])


def messages_by_graph(plan: GraphPlan, both_ways: bool, into_last: bool) -> tuple[Tensor, Tensor]:
    """(order int64 [M], ptr int32 [B + 1]): messages grouped by graph, with `into_last` those into its last layer."""
    return plan._cached(("messages_by_graph", both_ways, into_last), _messages_by_graph, plan, both_ways, into_last)


def _messages_by_graph(plan: GraphPlan, both_ways: bool, into_last: bool) -> tuple[Tensor, Tensor]:
    edges = message_edges(plan, both_ways)
    target = edges.target[: edges.into_last] if into_last else edges.target
    owner, order = torch.sort(plan.index("node_graph")[target], stable=True)
    bounds = torch.arange(plan.num_graphs + 1, device=plan.device)
    return order, torch.searchsorted(owner, bounds, out_int32=True)


def select_pairs(pairs: NodePairs, plan: GraphPlan, side: str) -> tuple[Tensor, Tensor]:
    """(order int64 [R], ptr int32 [B + 1]): the pairs whose `side` ("row" or "column") is a last-layer node."""
    return plan._cached(("selected_pairs", side), _select_pairs, pairs, plan, side)


def _select_pairs(pairs: NodePairs, plan: GraphPlan, side: str) -> tuple[Tensor, Tensor]:
    is_last = (pairs.order < plan.num_last)[pairs.row if side == "row" else pairs.column]
    chosen = is_last.nonzero().squeeze(1)
    return chosen, torch.searchsorted(chosen, pairs.graph_ptr.long(), out_int32=True)
