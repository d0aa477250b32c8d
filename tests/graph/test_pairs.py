"""Structures derived from a plan: network order, messages both ways, all pairs of nodes."""

import pytest
import torch

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.graph.pairs import (
    NO_EDGE,
    TOKEN,
    message_edges,
    messages_by_graph,
    network_order,
    node_pairs,
    pairs_of_rows,
    select_nodes,
    select_pairs,
)
from scalegmn_fast.testing import random_network

LAYOUTS = {"equal": ([2, 3, 2],), "mixed": ([2, 3, 2], [2, 4, 3, 2], [2, 2])}


def plan_of(which):
    if which == "skipping":
        edges = torch.tensor([[0, 0, 1, 2, 3, 0], [1, 2, 3, 3, 4, 4]])
        batch = GraphBatch.from_edges(torch.zeros(10, 1), torch.cat([edges, edges + 5], 1), torch.zeros(12, 1),
                                      graph=torch.arange(2).repeat_interleave(5))  # fmt: skip
        return batch.plan
    return GraphBatch.cat([GraphBatch.from_weights(*random_network(layout, 2)) for layout in LAYOUTS[which]]).plan


@pytest.fixture(params=["equal", "mixed", "skipping"])
def plan(request):
    return plan_of(request.param)


def test_network_order(plan):
    order = network_order(plan)
    rows = order.rows
    keys = [(int(plan.node_graph[r]), int(plan.node_layer[r]), int(plan.node_position[r])) for r in rows.tolist()]
    assert keys == sorted(keys)
    assert torch.equal(rows[order.place], torch.arange(plan.num_nodes))
    assert order.sizes == tuple(torch.bincount(plan.node_graph).tolist())
    assert network_order(plan) is order


@pytest.mark.parametrize("both_ways", [False, True])
def test_message_edges(plan, both_ways):
    edges = message_edges(plan, both_ways)
    assert (edges.target.diff() >= 0).all()
    degree = torch.bincount(edges.target, minlength=plan.num_nodes)
    assert torch.equal(edges.ptr.diff().long(), degree)
    source, target = plan.index("source"), plan.index("target")
    row = torch.arange(plan.num_edges) if edges.row is None else edges.row
    assert torch.equal(edges.source, torch.cat([source, target])[row])
    assert torch.equal(edges.target, torch.cat([target, source])[row])
    if both_ways:
        assert torch.equal(row.sort().values, torch.arange(2 * plan.num_edges))
        assert torch.equal(row[edges.forward], torch.arange(plan.num_edges))
    assert edges.into_last == int((edges.target < plan.num_last).sum())
    order, ptr = messages_by_graph(plan, both_ways, False)
    owner = plan.index("node_graph")[edges.target]
    assert torch.equal(owner[order], owner.sort().values)
    assert torch.equal(ptr.diff().long(), torch.bincount(owner))


@pytest.mark.parametrize("token", [False, True])
def test_node_pairs(plan, token):
    pairs, order = node_pairs(plan, token), network_order(plan)
    sizes = [size + token for size in order.sizes]
    first = 0
    expected = []
    for size in sizes:
        expected += [(first + i, first + j) for i in range(size) for j in range(size)]
        first += size
    assert list(zip(pairs.row.tolist(), pairs.column.tolist(), strict=True)) == expected
    place = {pair: k for k, pair in enumerate(expected)}
    assert pairs.reverse.tolist() == [place[j, i] for i, j in expected]
    edges = {(s, t): k for k, (s, t) in enumerate(zip(plan.source.tolist(), plan.target.tolist(), strict=True))}
    rows = pairs.order.tolist()
    for (i, j), edge in zip(expected, pairs.edge.tolist(), strict=True):
        if plan.num_nodes in (rows[i], rows[j]):
            assert edge == TOKEN
        else:
            assert edge == edges.get((rows[i], rows[j]), NO_EDGE)
    assert torch.equal(pairs.edge[pairs.of_edge], torch.arange(plan.num_edges))
    assert pairs.graph_ptr.tolist() == [0, *torch.tensor([n * n for n in sizes]).cumsum(0).tolist()]
    assert torch.equal(torch.bincount(pairs.row), pairs.ptr.diff().long())


@pytest.mark.parametrize("token", [False, True])
def test_rows_of_a_table_of_edges(plan, token):
    pairs, count = node_pairs(plan, token), plan.num_edges
    one_way, both = pairs.edge_row(count, False), pairs.edge_row(count, True)
    back = pairs.edge[pairs.reverse]
    for k, edge in enumerate(pairs.edge.tolist()):
        assert one_way[k] == (edge if edge >= 0 else count - 1 - edge)
        reverse = int(back[k])
        assert both[k] == (edge if edge >= 0 else count + reverse if reverse >= 0 else 2 * count - 1 - edge)


@pytest.mark.parametrize("which", ["last", "all", 0, 1])
def test_selected_nodes(plan, which):
    chosen, order = select_nodes(plan, which), network_order(plan)
    layer, last = plan.index("node_layer"), plan.num_last
    wanted = [
        k
        for k, r in enumerate(order.rows.tolist())
        if which == "all" or (r < last if which == "last" else int(layer[r]) == which)
    ]
    assert chosen.network_rows.tolist() == wanted
    assert torch.equal(chosen.plan_rows, order.rows[chosen.network_rows])
    counts = torch.bincount(plan.index("node_graph")[chosen.plan_rows])
    assert torch.equal(chosen.ptr.diff().long(), counts)
    assert chosen.count == (int(counts[0]) if len(set(counts.tolist())) == 1 else None)
    rows, pairs = pairs_of_rows(plan, which), node_pairs(plan)
    assert rows.pair.tolist() == [p for p, i in enumerate(pairs.row.tolist()) if i in set(wanted)]
    assert torch.equal(rows.nodes[rows.row], pairs.row[rows.pair]) and torch.equal(rows.node, pairs.row[rows.pair])
    assert torch.equal(rows.reverse, pairs.reverse[rows.pair])
    assert torch.equal(rows.ptr.diff(), torch.bincount(rows.row, minlength=rows.nodes.shape[0]))
    assert torch.equal(rows.column, pairs.column[rows.pair])
    if rows.span is not None:
        start, count = rows.span
        assert (
            rows.nodes.reshape(plan.num_graphs, count)[:, 0].remainder(pairs.size).tolist() == [start] * plan.num_graphs
        )


def test_selected_pairs(plan):
    pairs, order = node_pairs(plan), network_order(plan)
    for side in ("row", "column"):
        chosen, ptr = select_pairs(pairs, plan, side)
        ends = getattr(pairs, side)
        assert chosen.tolist() == [p for p, end in enumerate(ends.tolist()) if order.rows[end] < plan.num_last]
        assert ptr[-1] == chosen.shape[0]


def test_tokens_are_selected():
    for which in LAYOUTS:
        plan = plan_of(which)
        rows, pairs = pairs_of_rows(plan, "last", token=True), node_pairs(plan, True)
        assert (pairs.order[rows.nodes] == plan.num_nodes).all() and rows.nodes.shape[0] == plan.num_graphs


def test_missing_layer():
    with pytest.raises(ValueError, match="pooling_layer_idx must be a layer of every network, got 3 for graph 0"):
        select_nodes(plan_of("mixed"), 3)
