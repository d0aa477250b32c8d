"""`GraphPlan`: its order, checked by brute force on random acyclic graphs, its cache, pickles and errors."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from scalegmn_fast.graph import GraphPlan
from scalegmn_fast.graph import plan as plan_module
from scalegmn_fast.graph.plan import FIRST, HIDDEN, LAST

TENSORS = ("source", "target", "target_ptr", "source_order", "source_ptr", "node_graph", "node_layer", "node_position")


def assert_same_plan(a: GraphPlan, b: GraphPlan):
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype == torch.int32, name
        assert torch.equal(x.cpu(), y.cpu()), name
    for name in ("num_graphs", "blocks", "parts", "max_layer", "edges_from_first", "layouts"):
        assert getattr(a, name) == getattr(b, name), name


@st.composite
def dags(draw, max_graphs=3, max_nodes=9):
    """(edge_index, num_nodes, graph): several acyclic graphs of arbitrary shape, nodes and edges in any order."""
    edges, graph = [], []
    for number in range(draw(st.integers(1, max_graphs))):
        nodes = draw(st.integers(2, max_nodes))
        pairs = [(i, j) for i in range(nodes) for j in range(i + 1, nodes)]
        chosen = draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
        edges += [(i + len(graph), j + len(graph)) for i, j in chosen]
        graph += [number] * nodes
    rename = draw(st.permutations(range(len(graph))))
    edges = [(rename[i], rename[j]) for i, j in draw(st.permutations(edges))]
    renamed_graph = np.empty(len(graph), dtype=np.int64)
    renamed_graph[list(rename)] = graph
    return np.array(edges).T, len(graph), renamed_graph


def describe(edge_index, num_nodes):
    """Class, longest path from a source and shortest path to an output of each node, by plain recursion."""
    senders = [[int(s) for s, t in edge_index.T if t == node] for node in range(num_nodes)]
    receivers = [[int(t) for s, t in edge_index.T if s == node] for node in range(num_nodes)]

    def layer(node):
        return 1 + max(map(layer, senders[node])) if senders[node] else 0

    def node_class(node):
        return FIRST if not senders[node] else HIDDEN if receivers[node] else LAST

    def distance(node):
        return 1 + min(map(distance, receivers[node])) if receivers[node] else 0 if senders[node] else np.inf

    nodes = range(num_nodes)
    return senders, [node_class(k) for k in nodes], [layer(k) for k in nodes], [distance(k) for k in nodes]


@settings(deadline=None, max_examples=60)
@given(dags())
def test_order_classes_and_liveness_of_any_acyclic_graph(case):
    edge_index, num_nodes, graph = case
    plan, node_order, edge_order = GraphPlan.from_edges(edge_index, num_nodes, graph)
    senders, classes, layers, distances = describe(edge_index, num_nodes)

    assert sorted(node_order) == list(range(num_nodes))
    assert sorted(edge_order) == list(range(edge_index.shape[1]))
    rank = np.argsort(node_order)
    source, target = plan.source.numpy(), plan.target.numpy()
    assert (source == rank[edge_index[0, edge_order]]).all()
    assert (target == rank[edge_index[1, edge_order]]).all()
    assert sorted(zip(target, source, strict=True)) == list(zip(target, source, strict=True))
    assert (plan.node_graph.numpy() == graph[node_order]).all()
    assert plan.node_layer.tolist() == [layers[k] for k in node_order]
    assert plan.max_layer == max(layers)

    # classes are ranges: last, hidden, first; blocks say how many of each distance
    in_order = [classes[k] for k in node_order]
    assert in_order == [LAST] * plan.num_last + [HIDDEN] * plan.num_hidden + [FIRST] * plan.num_first
    row = 0
    for block in plan.blocks:
        nodes = node_order[row : row + block.nodes]
        assert {classes[k] for k in nodes} == {block.node_class}
        assert (
            min([distances[k] for k in nodes if distances[k] < np.inf], default=plan_module._UNREACHABLE)
            == block.distance
        )
        if block.node_class != FIRST:
            assert {distances[k] for k in nodes} == {block.distance}
        assert sum(len(senders[k]) for k in nodes) == block.edges
        assert list(graph[nodes]) == sorted(graph[nodes])
        row += block.nodes
    assert row == num_nodes

    # both CSR structures list what they should
    for node in range(num_nodes):
        a, b = plan.target_ptr[node : node + 2].tolist()
        assert sorted(source[a:b]) == sorted(rank[k] for k in senders[node_order[node]])
        a, b = plan.source_ptr[node : node + 2].tolist()
        edges = plan.source_order[a:b].tolist()
        assert edges == [k for k in range(plan.num_edges) if source[k] == node]
    assert plan.edges_from_first == sum(classes[k] == FIRST for k in edge_index[0])
    from_first = plan.source_order[plan.num_edges - plan.edges_from_first :]
    assert all(classes[node_order[source[k]]] == FIRST for k in from_first)

    # every node that can influence an output within k edges, and every edge into one, is in the prefix
    for k in range(max(layers) + 2):
        live = plan.live_nodes(k)
        assert {node for node in range(num_nodes) if distances[node] <= k} <= set(node_order[:live])
        if live < num_nodes:
            assert all(distances[node] <= k for node in node_order[:live])
        assert plan.edges_into(live) == int((target < live).sum())
    for node_class in (LAST, HIDDEN, FIRST):
        assert plan.edges_into_class(node_class) == sum(classes[k] == node_class for k in edge_index[1])


@settings(deadline=None, max_examples=25)
@given(dags(), st.randoms())
def test_order_of_the_edges_given_does_not_matter(case, rng):
    edge_index, num_nodes, graph = case
    plan, node_order, edge_order = GraphPlan.from_edges(edge_index, num_nodes, graph)
    shuffle = list(range(edge_index.shape[1]))
    rng.shuffle(shuffle)
    other, other_nodes, other_edges = GraphPlan.from_edges(edge_index[:, shuffle], num_nodes, graph)
    assert_same_plan(plan, other)
    assert (node_order == other_nodes).all()
    assert (edge_order == np.array(shuffle)[other_edges]).all()


def dense_edges(layouts):
    """Source-major edges of stacks of dense layers, one after another."""
    edges, graph = [], []
    for number, layout in enumerate(layouts):
        offset = len(graph) + np.cumsum([0, *layout])
        for layer, (n_in, n_out) in enumerate(zip(layout[:-1], layout[1:], strict=True)):
            edges += [(offset[layer] + i, offset[layer + 1] + j) for i in range(n_in) for j in range(n_out)]
        graph += [number] * sum(layout)
    return np.array(edges).T, len(graph), np.array(graph)


layouts = st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple)


@settings(deadline=None, max_examples=40)
@given(st.lists(layouts, min_size=1, max_size=4))
def test_edges_layouts_and_cat_give_one_plan(found):
    edge_index, num_nodes, graph = dense_edges(found)
    plan, _, _ = GraphPlan.from_edges(edge_index, num_nodes, graph)
    assert plan.layouts == tuple(found)
    joined = GraphPlan.cat([GraphPlan.from_layout(layout, 1) for layout in found])
    assert joined.layouts == tuple(found)
    for name in TENSORS:
        assert torch.equal(getattr(plan, name), getattr(joined, name)), name
    assert plan.blocks == joined.blocks
    general = general_plan(edge_index, num_nodes, graph)
    assert_same_plan(plan, general)
    if len(set(found)) == 1:
        assert plan is GraphPlan.from_layout(found[0], len(found))


def general_plan(edge_index, num_nodes, graph):
    """The plan as built from the edges alone, without the short cut for dense layouts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_dense_plan", lambda runs: None)
        runs = []
        make = plan_module._parts
        patch.setattr(plan_module, "_parts", lambda *args: runs.append(make(*args)) or (plan_module.Part(None, 0, ()),))
        plan, _, _ = GraphPlan.from_edges(edge_index, num_nodes, graph)
    blocks = plan_module.merge_slices([part.blocks for part in runs[0]])[2]
    values = {**plan._fields(), "blocks": blocks, "parts": runs[0]}
    return GraphPlan(**values)


@settings(deadline=None, max_examples=25)
@given(dags(), dags(), layouts)
def test_cat_is_the_plan_of_all_graphs(a, b, layout):
    cases = [a, dense_edges([layout, layout]), b]
    joined = GraphPlan.cat([GraphPlan.from_edges(*case)[0] for case in cases])
    nodes, graphs = np.cumsum([0] + [c[1] for c in cases]), np.cumsum([0] + [c[2].max() + 1 for c in cases])
    edge_index = np.concatenate([c[0] + n for c, n in zip(cases, nodes[:-1], strict=True)], 1)
    graph = np.concatenate([c[2] + g for c, g in zip(cases, graphs[:-1], strict=True)])
    whole, _, _ = GraphPlan.from_edges(edge_index, int(nodes[-1]), graph)
    for name in (*TENSORS, "num_graphs", "blocks", "max_layer", "edges_from_first", "layouts"):
        x, y = getattr(joined, name), getattr(whole, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


def test_types_number_neurons_and_layers():
    plan = GraphPlan.from_layout((2, 3, 2, 2), 2)
    # per graph: outputs 4 and 5, second hidden layer 3, first hidden layer 2, inputs 0 and 1
    assert plan.node_types(2, 2).tolist() == [4, 5] * 2 + [3] * 4 + [2] * 6 + [0, 1] * 2
    # edges: into output k: 3 + k; second layer of weights: 2; first layer: the input's number
    assert plan.edge_types(2, 2).tolist() == [3, 3, 4, 4] * 2 + [2] * 12 + [0, 1] * 6
    assert GraphPlan.from_layout((2, 3), 1).edge_types(2, 0).tolist() == [0, 1] * 3


def test_inner_edges_leave_one_hidden_layer():
    plan = GraphPlan.from_layout((2, 3, 4, 5, 2), 2)
    assert plan.inner_edges() == ((20, 40, 2), (60, 24, 1))  # (outputs, then) 4 -> 5, 3 -> 4; not 2 -> 3
    for start, count, layer in plan.inner_edges():
        assert set(plan.node_layer[plan.index("source")[start : start + count]].tolist()) == {layer}
    # one edge from the output: 3 of layer 2, and 6 of layer 1; two: 4 of layer 1 alone, and inputs
    deep, shallow = GraphPlan.from_layout((2, 4, 3, 3), 1), GraphPlan.from_layout((2, 6, 3), 1)
    assert deep.inner_edges() == ((9, 12, 1),)
    assert GraphPlan.cat([deep, shallow]).inner_edges() == ()
    irregular, _, _ = GraphPlan.from_edges([[0, 1, 2, 0], [1, 2, 3, 3]], 4)
    assert irregular.inner_edges() == ()


def test_cached_index_tensors():
    plan = GraphPlan.from_layout((2, 4, 1), 3)
    assert plan.index("source").dtype == torch.int64
    assert plan.index("source") is plan.index("source")
    assert torch.equal(plan.index("source"), plan.source.long())
    sender, receiver = plan.reversed_ends()
    assert torch.equal(receiver, plan.source.long().sort().values)
    assert torch.equal(sender, plan.target.long()[plan.source_order.long()])


def test_plans_of_layouts_are_shared_and_the_cache_is_bounded():
    assert GraphPlan.from_layout([2, 3, 1], 4) is GraphPlan.from_layout((2, 3, 1), 4)
    cache = plan_module._PlanCache(max_plans=3, max_edges=100)
    made = []

    def make(layout, count):
        made.append((layout, count))
        return plan_module._plan_of_layout(layout, count)

    for count in (1, 2, 3, 1, 4):  # 1 is used again, so 2 is the one to go
        cache.get(((2, 3), count), make)
    assert [count for _, count in cache.plans] == [3, 1, 4]
    cache.get(((2, 3), 2), make)
    assert [count for _, count in made] == [1, 2, 3, 4, 2]
    cache.get(((10, 30), 1), make)  # more edges than allowed: alone, but there
    assert list(cache.plans) == [((10, 30), 1)]
    assert cache.edges == 300


def test_default_device_does_not_reach_the_cache():
    with torch.device("meta"):
        plan = GraphPlan.from_layout((3, 5, 2), 7)
    assert plan.device.type == "cpu"


def test_fake_tensors_do_not_reach_the_caches():
    real = GraphPlan.from_layout((5, 3, 2), 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(GraphPlan.from_layout((5, 3, 2, 4), 2).source, FakeTensor)
        assert isinstance(real.index("source"), FakeTensor)
        assert isinstance(real.edge_types(5, 1), FakeTensor)
    assert not isinstance(GraphPlan.from_layout((5, 3, 2, 4), 2).source, FakeTensor)
    assert torch.equal(real.index("source"), real.source.long())
    assert not isinstance(real.edge_types(5, 1), FakeTensor)


def test_moving_copies_once():
    plan = GraphPlan.from_layout((2, 3, 1), 2)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    assert moved is plan.to(torch.device("meta"))
    assert (moved.blocks, moved.parts, moved.edges_from_first) == (plan.blocks, plan.parts, plan.edges_from_first)
    other = GraphPlan.from_layout((2, 4, 1), 1).to("meta")
    assert GraphPlan.cat([moved, other]).device.type == "meta"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what happens without an accelerator")
def test_pin_memory_without_accelerator_says_so():
    with pytest.raises(RuntimeError, match="pin_memory needs an accelerator.*none on this machine"):
        GraphPlan.from_layout((2, 3, 1), 2).pin_memory()


def test_copies_are_the_plan_and_pickles_hold_no_cache():
    plan = GraphPlan.from_layout((2, 64, 64, 1), 16)
    plan.index("source"), plan.edge_types(2, 2), plan.to("meta")
    assert copy.copy(plan) is plan
    assert copy.deepcopy([plan])[0] is plan
    data = pickle.dumps(plan)
    assert len(data) < 500
    assert pickle.loads(data) is plan

    joined = GraphPlan.cat([plan, GraphPlan.from_layout((3, 4), 2)])
    assert len(pickle.dumps(joined)) < 800
    assert_same_plan(pickle.loads(pickle.dumps(joined)), joined)

    skipping, _, _ = GraphPlan.from_edges(np.array([[0, 0, 1], [1, 2, 2]]), 3)
    size = len(pickle.dumps(skipping))
    skipping.index("source"), skipping.reversed_ends(), skipping.to("meta")
    assert len(pickle.dumps(skipping)) == size
    assert_same_plan(pickle.loads(pickle.dumps(skipping)), skipping)
    assert pickle.loads(pickle.dumps(plan.to("meta"))).device.type == "meta"


def test_a_batch_too_large_for_int32_is_refused_before_anything_is_built():
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"at most 2\^31 - 1 nodes and edges, got .* and 2200000000 edges"):
        GraphPlan.from_layout((1000, 1000, 100), 2000)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0], [0]], 1), ValueError, "acyclic.*got the cycle 0 -> 0"),
        (([[0, 1, 2, 3, 2], [1, 2, 3, 1, 4]], 5), ValueError, "acyclic.*got the cycle"),
        (([[0, 1], [1, 2]], 0), ValueError, "num_nodes must be at least 1.*got 0"),
        (([[0, 1], [1, 5]], 3), ValueError, "edge_index must hold nodes 0 to 2, got 0 to 5"),
        (([[0, -1], [1, 2]], 3), ValueError, "edge_index must hold nodes 0 to 2, got -1 to 2"),
        (([[0, 1, 0], [1, 2, 1]], 3), ValueError, "edge_index must hold each edge once, got 0 -> 1 more than once"),
        (([[0.0], [1.0]], 2), TypeError, "edge_index must be of an integer type, got float64"),
        (([0, 1], 2), ValueError, r"edge_index must have shape \[2, E\], got \[2\]"),
        (([[0, 1], [1, 2], [2, 3]], 4), ValueError, r"edge_index must have shape \[2, E\], got \[3, 2\]"),
        (([[0, 1], [1, 2]], 3, [0, 0]), ValueError, r"graph must have shape \[3\], got \[2\]"),
        (([[0, 1], [1, 2]], 3, [0.0, 0.0, 0.0]), TypeError, "graph must be of an integer type, got float64"),
        (([[0, 1], [1, 2]], 3, [0, 0, -1]), ValueError, "graph must hold graph numbers from 0, got -1"),
        (
            ([[0, 1], [1, 2]], 3, [0, 0, 1]),
            ValueError,
            "must join nodes of one graph, got edge 1 from graph 0 to graph 1",
        ),
        (([[0, 2], [1, 3]], 4, [0, 0, 2, 2]), ValueError, "every graph needs an edge, got none in graph 1"),
        (([[0, 2], [1, 3]], 4, [0, 0, 10**12, 10**12]), ValueError, "without gaps, got 1000000000000 with 4 nodes"),
        ((np.zeros((2, 0), dtype=int), 2), ValueError, "every graph needs an edge, got none in graph 0"),
    ],
)
def test_bad_edges(arguments, error, message):
    edge_index, num_nodes, *graph = arguments
    with pytest.raises(error, match=message):
        GraphPlan.from_edges(np.asarray(edge_index), num_nodes, *map(np.asarray, graph))


@settings(deadline=None, max_examples=30)
@given(dags(max_graphs=2), st.data())
def test_a_cycle_is_named(case, data):
    edge_index, num_nodes, graph = case
    path = [int(edge_index[0, 0]), int(edge_index[1, 0])]
    while (following := edge_index[1, edge_index[0] == path[-1]]).size and data.draw(st.booleans()):
        path.append(int(following[0]))
    closed = np.concatenate([edge_index, [[path[-1]], [path[0]]]], 1)
    with pytest.raises(ValueError, match="got the cycle") as caught:
        GraphPlan.from_edges(closed, num_nodes, graph)
    cycle = [int(node) for node in str(caught.value).split("cycle ")[1].split(" -> ") if node != "..."]
    assert cycle[0] == cycle[-1]
    edges = set(map(tuple, closed.T.tolist()))
    if "..." not in str(caught.value):
        assert all(pair in edges for pair in zip(cycle[:-1], cycle[1:], strict=True))


@pytest.mark.parametrize(
    ("layout", "count", "message"),
    [
        ((3,), 1, r"at least two positive layer sizes, got \[3\]"),
        ((), 1, r"at least two positive layer sizes, got \[\]"),
        ((3, 0, 1), 1, r"at least two positive layer sizes, got \[3, 0, 1\]"),
        ((3, 1), 0, "num_graphs must be at least 1.*got 0"),
    ],
)
def test_bad_layouts(layout, count, message):
    with pytest.raises(ValueError, match=message):
        GraphPlan.from_layout(layout, count)


def test_bad_joins_and_prefixes():
    plan = GraphPlan.from_layout((2, 3, 1), 2)
    with pytest.raises(ValueError, match="plans must hold at least one GraphPlan, got none"):
        GraphPlan.cat([])
    with pytest.raises(ValueError, match=r"plans must be on one device, got \['cpu', 'meta'\]"):
        GraphPlan.cat([plan, plan.to("meta")])
    with pytest.raises(ValueError, match="num_nodes must be a block boundary of the plan, got 3"):
        plan.edges_into(3)
