"""`GraphBatch`: from tensors and back, joining, moving, pickling, and every way in which the input can be wrong."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from scalegmn_fast.graph import GraphBatch, GraphPlan
from scalegmn_fast.graph.batch import SPLITS
from scalegmn_fast.testing import random_network, random_sign_mask


def network(layout=(2, 4, 3, 1), batch=3, d_e=1, seed=0, **options):
    return random_network(layout, batch, d_e=d_e, generator=torch.Generator().manual_seed(seed), **options)


def edges_of(weights, biases, input_value=1.0):
    """The same networks as node rows by graph and layer, and source-major edges."""
    count, layout = weights[0].shape[0], [weights[0].shape[1], *(w.shape[2] for w in weights)]
    nodes, index, features, graph = [], [], [], []
    for b in range(count):
        start = b * sum(layout)
        nodes += [torch.full((layout[0], 1), input_value, dtype=weights[0].dtype), *(bias[b] for bias in biases)]
        for w in weights:
            for i, j in itertools.product(range(w.shape[1]), range(w.shape[2])):
                index.append((start + i, start + w.shape[1] + j))
                features.append(w[b, i, j])
            start += w.shape[1]
        graph += [b] * sum(layout)
    return torch.cat(nodes), torch.tensor(index).T, torch.stack(features), torch.tensor(graph)


def assert_same_batch(a: GraphBatch, b: GraphBatch):
    assert torch.equal(a.node_features, b.node_features)
    assert torch.equal(a.edge_features, b.edge_features)
    assert (a.layouts, a.symmetry) == (b.layouts, b.symmetry)
    for name in ("source", "target", "node_graph", "source_order"):
        assert torch.equal(getattr(a.plan, name), getattr(b.plan, name))
    assert (a.sign_mask is None) == (b.sign_mask is None)
    assert a.sign_mask is None or torch.equal(a.sign_mask, b.sign_mask)


@pytest.mark.parametrize("layout", [(2, 1), (1, 1, 1), (2, 5, 3, 1), (3, 2, 2, 2, 4)])
@pytest.mark.parametrize("d_e", [1, 3])
def test_weights_come_back(layout, d_e):
    weights, biases = network(layout, d_e=d_e)
    batch = GraphBatch.from_weights(weights, biases, input_value=0.25)
    assert batch.layouts == (layout,) * 3
    assert (batch.num_graphs, batch.num_nodes, batch.num_edges) == (3, 3 * sum(layout), batch.plan.num_edges)
    first = batch.node_features[-batch.plan.num_first :]
    assert torch.equal(first, torch.full_like(first, 0.25))
    back_weights, back_biases = batch.to_weights()
    for tensors, back in ((weights, back_weights), (biases, back_biases)):
        assert len(tensors) == len(back)
        assert all(torch.equal(a, b) for a, b in zip(tensors, back, strict=True))


def test_edges_hold_the_weight_between_their_ends():
    weights, biases = network((2, 3, 2), batch=2)
    batch = GraphBatch.from_weights(weights, biases)
    plan = batch.plan
    for edge in range(batch.num_edges):
        s, t = int(plan.source[edge]), int(plan.target[edge])
        assert plan.node_graph[s] == plan.node_graph[t]
        layer, graph = int(plan.node_layer[s]), int(plan.node_graph[s])
        expected = weights[layer][graph, plan.node_position[s], plan.node_position[t]]
        assert torch.equal(batch.edge_features[edge], expected)


def test_tensors_without_feature_dimension():
    weights, biases = network()
    flat = GraphBatch.from_weights([w.squeeze(-1) for w in weights], [b.squeeze(-1) for b in biases])
    assert_same_batch(flat, GraphBatch.from_weights(weights, biases))


def test_from_edges_is_from_weights():
    weights, biases = network(d_e=2)
    mask = torch.tensor([True, False, True])
    expected = GraphBatch.from_weights(weights, biases, sign_mask=mask)
    nodes, index, features, graph = edges_of(weights, biases)
    found = GraphBatch.from_edges(nodes, index, features, graph=graph, sign_mask=mask)
    assert_same_batch(found, expected)
    assert found.plan is expected.plan

    shuffle = torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = GraphBatch.from_edges(nodes, index[:, shuffle], features[shuffle], graph=graph, sign_mask=mask)
    assert_same_batch(shuffled, expected)
    per_node = GraphBatch.from_edges(nodes, index, features, graph=graph, sign_mask=mask[graph])
    assert_same_batch(per_node, expected)


def test_from_edges_of_one_graph_with_a_skip():
    index = torch.tensor([[0, 1, 0], [1, 2, 2]])
    batch = GraphBatch.from_edges(torch.tensor([[0.0], [1.0], [2.0]]), index, torch.tensor([[1.0], [12.0], [2.0]]))
    assert batch.node_features.flatten().tolist() == [2.0, 1.0, 0.0]
    ends = [(int(s), int(t)) for s, t in zip(batch.plan.source, batch.plan.target, strict=True)]
    assert dict(zip(ends, batch.edge_features.flatten().tolist(), strict=True)) == {
        (1, 0): 12.0,
        (2, 0): 2.0,
        (2, 1): 1.0,
    }
    assert batch.layouts == (None,)
    with pytest.raises(ValueError, match="to_weights needs dense stacks of layers"):
        batch.to_weights()


def test_mixed_layouts_from_edges_come_back_in_runs():
    parts = [network((2, 3, 1), 1, seed=0), network((2, 3, 1), 1, seed=1), network((1, 4), 1, seed=2)]
    rows, offset = [], 0
    for number, part in enumerate(parts):
        nodes, index, features, graph = edges_of(*part)
        rows.append((nodes, index + offset, features, graph + number))
        offset += len(nodes)
    nodes, index, features, graph = (torch.cat(t, 1 if k == 1 else 0) for k, t in enumerate(zip(*rows, strict=True)))
    batch = GraphBatch.from_edges(nodes, index, features, graph=graph)
    assert batch.layouts == ((2, 3, 1), (2, 3, 1), (1, 4))
    (weights, _), (other, _) = batch.to_weights()
    assert torch.equal(weights[0], torch.cat([parts[0][0][0], parts[1][0][0]]))
    assert torch.equal(other[0], parts[2][0][0])


@pytest.mark.parametrize("path", ["weights", "edges", "cat", "to_weights"])
def test_gradients_reach_the_weights(path):
    weights, biases = network((2, 3, 2), batch=2)
    leaves = [t.requires_grad_() for t in (*weights, *biases)]

    def features(*leaves):
        w, b = list(leaves[:2]), list(leaves[2:])
        if path == "edges":
            nodes, index, edge_features, graph = edges_of(w, b)
            batch = GraphBatch.from_edges(nodes, index, edge_features, graph=graph)
        else:
            batch = GraphBatch.from_weights(w, b)
        if path == "cat":
            batch = GraphBatch.cat([batch, GraphBatch.from_weights(w[:1], b[:1])])
        if path == "to_weights":
            return tuple(itertools.chain(*batch.to_weights()))
        return batch.node_features, batch.edge_features

    assert torch.autograd.gradcheck(features, leaves)


def test_cat_keeps_the_order_of_graphs():
    parts = [network((2, 3, 1), 2, seed=0), network((3, 2), 1, seed=1), network((2, 3, 1), 1, seed=2)]
    masks = [torch.tensor([True, False]), torch.tensor([True]), random_sign_mask((2, 3, 1), 1, per_neuron=True)]
    batches = [GraphBatch.from_weights(*part, sign_mask=mask) for part, mask in zip(parts, masks, strict=True)]
    joined = GraphBatch.cat(batches)
    assert joined.layouts == ((2, 3, 1), (2, 3, 1), (3, 2), (2, 3, 1))
    for (weights, biases), part in zip(joined.to_weights(), parts, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((*weights, *biases), (*part[0], *part[1]), strict=True))
    # every graph's nodes keep their features and masks, in plan order
    graphs = [(batch, k) for batch in batches for k in range(batch.num_graphs)]
    for number, (batch, k) in enumerate(graphs):
        rows, own = joined.plan.node_graph == number, batch.plan.node_graph == k
        assert torch.equal(joined.node_features[rows], batch.node_features[own])
        assert torch.equal(joined.sign_mask[rows], batch.sign_mask[own])
    # outputs of graph b are row b of the last-layer nodes
    assert joined.plan.node_graph[: joined.plan.num_last].tolist() == [0, 1, 2, 2, 3]
    assert GraphBatch.cat(batches[:1]) is batches[0]


@pytest.mark.parametrize(
    ("symmetries", "expected"),
    [
        (("sign", "sign"), "sign"),
        (("sign", "scale"), "hetero"),
        (("hetero", "sign"), "hetero"),
        (("permutation", "scale"), "permutation"),
        (("sign", None), None),
        ((None, None), None),
    ],
)
def test_symmetry_of_a_joined_batch(symmetries, expected):
    batches = []
    for symmetry in symmetries:
        mask = None if symmetry == "permutation" or None in symmetries else torch.ones(3, dtype=torch.bool)
        batch = GraphBatch.from_weights(*network(), sign_mask=mask)
        batches.append(
            GraphBatch(batch.node_features, batch.edge_features, batch.plan, batch.sign_mask, symmetry=symmetry)
        )
    joined = GraphBatch.cat(batches)
    assert joined.symmetry == expected
    assert joined.to(torch.float32).symmetry == expected
    assert joined.with_features(joined.node_features, joined.edge_features).symmetry == expected


def test_sign_mask_per_graph_and_per_neuron():
    layout = (2, 3, 2)
    weights, biases = network(layout, batch=2)
    per_graph = GraphBatch.from_weights(weights, biases, sign_mask=torch.tensor([True, False]))
    assert torch.equal(per_graph.sign_mask, per_graph.plan.node_graph == 0)
    mask = random_sign_mask(layout, 2, per_neuron=True, generator=torch.Generator().manual_seed(3))
    batch = GraphBatch.from_weights(weights, biases, sign_mask=mask)
    starts = torch.tensor([0, 2, 5])
    for node in range(batch.num_nodes):
        neuron = starts[batch.plan.node_layer[node]] + batch.plan.node_position[node]
        assert batch.sign_mask[node] == mask[batch.plan.node_graph[node], neuron]


@pytest.mark.parametrize("rows", SPLITS)
def test_sign_split_partitions_every_block(rows):
    layout = (2, 3, 2, 1)
    mask = random_sign_mask(layout, 3, per_neuron=True, generator=torch.Generator().manual_seed(5))
    batch = GraphBatch.from_weights(*network(layout), sign_mask=mask)
    plan = batch.plan
    order = plan.source_order.long()
    flags = {
        "nodes": batch.sign_mask,
        "edges": batch.sign_mask[plan.target.long()],
        "reversed": batch.sign_mask[plan.source.long()[order]],
        "reversed_senders": batch.sign_mask[plan.target.long()[order]],
    }[rows]
    split = batch.sign_split(rows)
    assert split is batch.sign_split(rows)
    bounds = sorted(split.counts)
    assert (bounds[0], bounds[-1]) == (0, len(flags))
    for start, stop in itertools.combinations(bounds, 2):
        true_rows, false_rows = split.select(start, stop)
        assert true_rows.tolist() == flags[start:stop].nonzero().flatten().tolist()
        assert false_rows.tolist() == (~flags[start:stop]).nonzero().flatten().tolist()


def test_moving_changes_device_and_dtype_only():
    batch = GraphBatch.from_weights(*network(), sign_mask=torch.tensor([True, False, True]))
    half = batch.to(torch.bfloat16)
    assert half.node_features.dtype == half.edge_features.dtype == torch.bfloat16
    assert half.plan is batch.plan
    assert torch.equal(half.edge_features.double(), batch.edge_features.bfloat16().double())
    batch.sign_split("nodes")
    assert torch.equal(batch.to("cpu").sign_split("nodes").true_rows, batch.sign_split("nodes").true_rows)
    moved = batch.to("meta", torch.float16)
    assert {t.device.type for t in (moved.node_features, moved.edge_features, moved.sign_mask, moved.plan.source)} == {
        "meta"
    }
    assert moved.dtype == torch.float16
    # the partitions went along: nothing has to be counted on the device
    for rows in SPLITS:
        assert moved.sign_split(rows).counts == batch.sign_split(rows).counts
        assert moved.sign_split(rows).true_rows.device.type == "meta"
    with pytest.raises(TypeError, match="dtype must be floating point, got torch.int32"):
        batch.to(torch.int32)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="shows what happens without an accelerator")
def test_pin_memory_without_accelerator_says_so():
    with pytest.raises(RuntimeError, match="pin_memory needs an accelerator.*none on this machine"):
        GraphBatch.from_weights(*network()).pin_memory()


@pytest.mark.gpu
def test_moving_to_a_gpu_copies_the_plan_once_and_nothing_waits():
    batch = GraphBatch.from_weights(*network(), sign_mask=torch.tensor([True, False, True]))
    moved = batch.pin_memory().to("cuda", torch.float32, non_blocking=True)
    again = batch.pin_memory().to("cuda:0", torch.float32, non_blocking=True)
    assert moved.plan is again.plan
    assert_same_batch(moved.to("cpu", torch.float64), batch.to(torch.float32).to(torch.float64))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in SPLITS:
            moved.sign_split(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    joined = GraphBatch.cat([moved, again])
    assert_same_batch(joined.to("cpu"), GraphBatch.cat([moved.to("cpu"), again.to("cpu")]))
    assert pickle.loads(pickle.dumps(moved)).plan is batch.plan.to("cuda")


def test_pickle_and_deepcopy_leave_caches_behind():
    batch = GraphBatch.from_weights(*network(), sign_mask=torch.tensor([True, False, True]))
    size = len(pickle.dumps(batch))
    for rows in SPLITS:
        batch.sign_split(rows)
    batch.plan.edge_types(2, 2), batch.plan.to("meta")
    assert len(pickle.dumps(batch)) == size
    for other in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert_same_batch(other, batch)
        assert other.plan is batch.plan
        assert other.node_features is not batch.node_features
        assert torch.equal(other.sign_split("edges").true_rows, batch.sign_split("edges").true_rows)


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, k):
        parts = [GraphBatch.from_weights(*network(seed=k)), GraphBatch.from_weights(*network((2, 5), seed=k))]
        return GraphBatch.cat(parts)


def test_batches_come_from_dataloader_workers():
    loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=1)
    for k, batch in enumerate(loader):
        assert_same_batch(batch, Batches()[k])


class OneRound(nn.Module):
    def forward(self, batch: GraphBatch):
        plan = batch.plan
        messages = batch.node_features[plan.index("source")] * batch.edge_features
        out = torch.zeros_like(batch.node_features).index_add(0, plan.index("target"), messages)
        out = out + plan.node_types(2, 2).unsqueeze(1) + plan.edge_types(2, 2).sum()
        live = plan.live_nodes(1)
        return batch.with_features(out, batch.edge_features), out[:live].sum(), messages[: plan.edges_into(live)]


def test_batches_pass_into_compiled_functions():
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    torch.compiler.reset()
    compiled = torch.compile(OneRound(), backend=count, fullgraph=True)
    for size in (3, 3, 4, 5, 6):
        batch = GraphBatch.from_weights(*network((2, 3, 5, 2), batch=size))
        if size > 3:
            expected = OneRound()(batch)  # fills the plan's cache
        found = compiled(batch)
        if size == 3:
            expected = OneRound()(batch)
        assert_same_batch(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[2], expected[2])
    # a fresh plan, one with its cache filled, and that with sizes as variables for all other batches
    assert len(graphs) == 3
    torch.compiler.reset()


def test_exported_programs_take_batches_of_the_same_plan():
    layout = (2, 5, 2, 3)
    program = torch.export.export(OneRound(), (GraphBatch.from_weights(*network(layout, seed=1)),))
    batch = GraphBatch.from_weights(*network(layout, seed=2))
    found, expected = program.module()(batch), OneRound()(batch)
    assert_same_batch(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    # nothing of the tracer stays behind in the plan
    assert torch.equal(batch.plan.index("source"), batch.plan.source.long())


def w(*shape, **options):
    return torch.zeros(shape, **options)


GOOD_W, GOOD_B = [w(2, 3, 4), w(2, 4, 1)], [w(2, 4), w(2, 1)]


@pytest.mark.parametrize(
    ("weights", "biases", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "weights must hold at least one layer, got none"),
        (GOOD_W, GOOD_B[:1], {}, ValueError, "biases must hold one tensor per layer, 2, got 1"),
        (w(2, 3, 4), GOOD_B, {}, TypeError, "weights must be a sequence of tensors, one per layer, got Tensor"),
        (GOOD_W, None, {}, TypeError, "biases must be a sequence of tensors, one per layer, got NoneType"),
        ([GOOD_W[0], 3], GOOD_B, {}, TypeError, r"weights\[1\] must be a torch.Tensor, got int"),
        ([GOOD_W[0], w(4, 1)], GOOD_B, {}, ValueError, r"weights\[1\] must have 3 or 4 dimensions, got shape \[4, 1\]"),
        (GOOD_W, [w(2, 4), w(1)], {}, ValueError, r"biases\[1\] must have 2 or 3 dimensions, got shape \[1\]"),
        (
            [GOOD_W[0], w(2, 5, 1)],
            GOOD_B,
            {},
            ValueError,
            r"weights\[1\] must have shape \[2, 4, 1, 1\], got \[2, 5, 1, 1\]",
        ),
        (
            [GOOD_W[0], w(3, 4, 1)],
            GOOD_B,
            {},
            ValueError,
            r"weights\[1\] must have shape \[2, 4, 1, 1\], got \[3, 4, 1, 1\]",
        ),
        ([w(2, 3, 4, 9), w(2, 4, 1)], GOOD_B, {}, ValueError, r"weights\[1\] must have shape \[2, 4, 1, 9\], got"),
        (
            [w(2, 3, 4, 0), w(2, 4, 1, 0)],
            GOOD_B,
            {},
            ValueError,
            r"weights\[0\] must hold at least one number per edge",
        ),
        (GOOD_W, [w(2, 4), w(2, 2)], {}, ValueError, r"biases\[1\] must have shape \[2, 1, 1\], got \[2, 2, 1\]"),
        (GOOD_W, [w(2, 4), w(2, 1, 2)], {}, ValueError, r"biases\[1\] must have shape \[2, 1, 1\], got \[2, 1, 2\]"),
        ([w(0, 3, 4), w(0, 4, 1)], [w(0, 4), w(0, 1)], {}, ValueError, r"weights\[0\] must hold at least one network"),
        ([w(2, 3, 0), w(2, 0, 1)], [w(2, 0), w(2, 1)], {}, ValueError, r"two positive layer sizes, got \[3, 0, 1\]"),
        (
            GOOD_W,
            [w(2, 4), w(2, 1, dtype=torch.float64)],
            {},
            TypeError,
            r"biases\[1\].*torch.float32, got torch.float64",
        ),
        (
            [w(2, 3, 4, dtype=torch.int64)],
            GOOD_B[:1],
            {},
            TypeError,
            r"weights\[0\] must be floating point.*got torch.int64",
        ),
        (
            GOOD_W,
            [w(2, 4), w(2, 1, device="meta")],
            {},
            ValueError,
            r"biases\[1\] must be on weights\[0\]'s device cpu, got meta",
        ),
        (
            GOOD_W,
            GOOD_B,
            {"sign_mask": torch.ones(3).bool()},
            ValueError,
            r"sign_mask must have shape \[2\] or \[2, 8\], got \[3\]",
        ),
        (GOOD_W, GOOD_B, {"sign_mask": torch.ones(2)}, TypeError, "sign_mask must be a bool tensor, got torch.float32"),
        (GOOD_W, GOOD_B, {"sign_mask": [True, False]}, TypeError, "sign_mask must be a bool tensor, got list"),
        (
            GOOD_W,
            GOOD_B,
            {"sign_mask": w(2, dtype=torch.bool, device="meta")},
            ValueError,
            "sign_mask must be on cpu, got meta",
        ),
    ],
)
def test_bad_weights(weights, biases, options, error, message):
    with pytest.raises(error, match=message):
        GraphBatch.from_weights(weights, biases, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node_features": w(4, 1)}, ValueError, r"node_features must have shape \[5, d\], got \[4, 1\]"),
        ({"edge_features": w(6)}, ValueError, r"edge_features must have shape \[6, d\], got \[6\]"),
        (
            {"edge_features": w(6, 1, dtype=torch.int64)},
            TypeError,
            "edge_features must be floating point, got torch.int64",
        ),
        (
            {"edge_features": w(6, 1).double()},
            TypeError,
            "edge_features must have node_features' dtype torch.float32, got",
        ),
        ({"edge_features": w(6, 1, device="meta")}, ValueError, "must be on one device, got cpu, meta, cpu"),
        ({"sign_mask": w(4).bool()}, ValueError, r"sign_mask must have shape \[5\], got \[4\]"),
        ({"sign_mask": w(5)}, TypeError, "sign_mask must be a bool tensor, got torch.float32"),
        (
            {"symmetry": "even"},
            ValueError,
            "symmetry must be one of sign, scale, hetero, permutation or None, got 'even'",
        ),
    ],
)
def test_bad_parts(changes, error, message):
    good = {"node_features": w(5, 1), "edge_features": w(6, 1), "plan": GraphPlan.from_layout((2, 2, 1), 1)}
    assert GraphBatch(**good).num_edges == 6
    with pytest.raises(error, match=message):
        GraphBatch(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node_features": [[0.0]]}, TypeError, "node_features must be a torch.Tensor, got list"),
        ({"node_features": w(3)}, ValueError, r"node_features must have 2 dimensions, got shape \[3\]"),
        ({"edge_features": w(2)}, ValueError, r"edge_features must have 2 dimensions, got shape \[2\]"),
        ({"edge_features": w(3, 1)}, ValueError, "edge_features must have 2 rows, one per edge, got 3"),
        ({"edge_index": torch.zeros(2, 2)}, TypeError, "edge_index must be of an integer type, got float32"),
        (
            {"edge_index": torch.tensor([[0, 1], [1, 0]])},
            ValueError,
            "edge_index must be acyclic.*got the cycle 0 -> 1 -> 0",
        ),
        ({"node_features": w(0, 1)}, ValueError, "num_nodes must be at least 1"),
        ({"graph": [0, 0, 0]}, TypeError, "graph must be a torch.Tensor, got list"),
        ({"graph": torch.zeros(2, dtype=torch.int64)}, ValueError, r"graph must have shape \[3\], got \[2\]"),
        ({"sign_mask": w(2).bool()}, ValueError, r"sign_mask must have shape \[1\] or \[3\], got \[2\]"),
        ({"sign_mask": w(1)}, TypeError, "sign_mask must be a bool tensor, got torch.float32"),
        ({"edge_features": w(2, 1, device="meta")}, ValueError, "must be on one device, got cpu, meta, cpu"),
    ],
)
def test_bad_edges(changes, error, message):
    good = {"node_features": w(3, 1), "edge_index": torch.tensor([[0, 1], [1, 2]]), "edge_features": w(2, 1)}
    assert GraphBatch.from_edges(**good).layouts == ((1, 1, 1),)
    with pytest.raises(error, match=message):
        GraphBatch.from_edges(**{**good, **changes})


def test_bad_cat_and_split():
    batch = GraphBatch.from_weights(*network())
    masked = GraphBatch.from_weights(*network(), sign_mask=torch.ones(3, dtype=torch.bool))
    for batches, error, message in (
        ([], ValueError, "batches must hold at least one GraphBatch, got none"),
        ([batch, "b"], TypeError, r"batches\[1\] must be a GraphBatch, got str"),
        ([batch, batch.to(torch.float32)], ValueError, "one dtype, got .'torch.float32', 'torch.float64'."),
        ([batch, batch.to("meta")], ValueError, "one device, got .'cpu', 'meta'."),
        ([batch, GraphBatch.from_weights(*network(d_e=2))], ValueError, r"one width of edge_features, got \[1, 2\]"),
        ([batch, masked], ValueError, "sign_mask must be given for all batches or none, got it for 1 of 2"),
    ):
        with pytest.raises(error, match=message):
            GraphBatch.cat(batches)
    with pytest.raises(ValueError, match="sign_mask is needed.*got a batch without one"):
        batch.sign_split("nodes")
    with pytest.raises(ValueError, match="rows must be one of nodes, edges, reversed, reversed_senders, got 'hidden'"):
        masked.sign_split("hidden")
