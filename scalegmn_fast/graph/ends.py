"""What is derived from a plan for the rounds of ScaleGMN: types of the messages' ends, rows by graph.

Everything here is made once per plan and cached with it: an index that lasts is sorted once, not in every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import GraphPlan


class SenderPairs(NamedTuple):
    """Rows that first-round messages are multiples of.

    Attributes:
        node, type: int64 [P], a sender and the type of edges that leave it.
        index: int64 [M], the row of each message's edge.
    """

    node: Tensor
    type: Tensor
    index: Tensor


def sender_pairs(
    plan: GraphPlan, senders: int, edges: int, into_last: int, num_first: int, num_hidden_layers: int
) -> SenderPairs:
    """The (node, edge type) pairs of the first ``edges`` messages, sent by the first ``senders`` nodes.

    Edges into hidden neurons have the type of their source, so a row per node serves them; the first ``into_last``,
    those into output neurons, have their target's type and a row each.
    """
    sizes = (senders, edges, into_last, num_first, num_hidden_layers)
    return plan._cached(("sender_pairs", *sizes), _sender_pairs, plan, *sizes)


def _sender_pairs(plan, senders, edges, into_last, num_first, num_hidden_layers) -> SenderPairs:
    source, edge_types = plan.index("source"), plan.edge_types(num_first, num_hidden_layers)
    layer, position = plan.index("node_layer"), plan.index("node_position")
    of_node = torch.where(layer == 0, position, num_first + layer - 1)
    of_node = torch.where(layer < num_hidden_layers, of_node, 0)[:senders]
    nodes = torch.arange(senders, device=plan.device)
    rows = torch.arange(into_last, device=plan.device) + senders
    return SenderPairs(
        torch.cat([nodes, source[:into_last]]),
        torch.cat([of_node, edge_types[:into_last]]),
        torch.cat([rows, source[into_last:edges]]),
    )


def types_at(plan: GraphPlan, where: str, num_first: int, num_hidden_layers: int) -> Tensor:
    """int64, `GraphPlan.node_types` of some nodes.

    ``where``: "source" or "target" of each edge; "reversed", of each reversed edge's source, in ``source_order``;
    "outer", of the last-layer nodes and then the first-layer ones.
    """
    types = (num_first, num_hidden_layers)
    return plan._cached(("types_at", where, *types), _types_at, plan, where, *types)


def _types_at(plan: GraphPlan, where: str, num_first: int, num_hidden_layers: int) -> Tensor:
    types = plan.node_types(num_first, num_hidden_layers)
    if where == "outer":
        return torch.cat([types[: plan.num_last], types[plan.num_nodes - plan.num_first :]])
    return types[plan.reversed_ends()[0] if where == "reversed" else plan.index(where)]


def reversed_edge_types(plan: GraphPlan, num_first: int, num_hidden_layers: int) -> Tensor:
    """int64 [E], `GraphPlan.edge_types` of the reversed edges, in ``source_order``."""
    types = (num_first, num_hidden_layers)
    return plan._cached(("reversed_types", *types), lambda: plan.edge_types(*types)[plan.index("source_order")])


def rows_by_graph(plan: GraphPlan, hidden_only: bool) -> tuple[Tensor, Tensor]:
    """(order int64 [R], ptr int32 [B + 1]): rows (all nodes, or the hidden ones counted from 0) grouped by graph."""
    return plan._cached(("rows_by_graph", hidden_only), _rows_by_graph, plan, hidden_only)


def _rows_by_graph(plan: GraphPlan, hidden_only: bool) -> tuple[Tensor, Tensor]:
    owner = plan.index("node_graph")
    if hidden_only:
        owner = owner[plan.num_last : plan.num_last + plan.num_hidden]
    grouped, order = torch.sort(owner, stable=True)
    bounds = torch.arange(plan.num_graphs + 1, device=plan.device)
    return order, torch.searchsorted(grouped, bounds, out_int32=True)
