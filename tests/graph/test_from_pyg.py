"""`GraphBatch.from_pyg`: batches as the original implementation makes them, and objects that only look like them."""

from types import SimpleNamespace

import pytest
import torch

from scalegmn_fast.graph import GraphBatch, GraphPlan
from scalegmn_fast.testing import random_network

LAYOUT = (2, 4, 3, 1)


def network(layout=LAYOUT, batch=3, seed=0, **options):
    return random_network(layout, batch, generator=torch.Generator().manual_seed(seed), **options)


def graph_of(weights, biases, b, input_value=1.0, bidirectional=False):
    """Attributes of network ``b``: nodes layer by layer, edges by source, then target; masks as columns."""
    layout = [weights[0].shape[1], *(w.shape[2] for w in weights)]
    starts = torch.tensor([0, *layout]).cumsum(0)
    index = [
        torch.cartesian_prod(torch.arange(n_in) + starts[layer], torch.arange(n_out) + starts[layer + 1]).T
        for layer, (n_in, n_out) in enumerate(zip(layout[:-1], layout[1:], strict=True))
    ]
    first = torch.full((layout[0], 1), input_value, dtype=weights[0].dtype)
    layer = torch.arange(len(layout)).repeat_interleave(torch.tensor(layout)).unsqueeze(1)
    attributes = {
        "x": torch.cat([first, *(bias[b] for bias in biases)]),
        "edge_index": torch.cat(index, 1),
        "edge_attr": torch.cat([w[b].flatten(0, 1) for w in weights]),
        "mask_hidden": (layer > 0) & (layer < len(layout) - 1),
        "mask_first_layer": layer == 0,
    }
    if bidirectional:
        attributes["bw_edge_index"] = attributes["edge_index"].flip(0)
        attributes["bw_edge_attr"] = attributes["edge_attr"].reciprocal()
    return attributes


def batch_of(*graphs, **more):
    """What PyG's collation makes of single graphs."""
    sizes = torch.tensor([len(g["x"]) for g in graphs])
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    joined = {name: torch.cat([g[name] for g in graphs]) for name in graphs[0] if "edge_index" not in name}
    for name in (name for name in graphs[0] if "edge_index" in name):
        joined[name] = torch.cat([g[name] + start for g, start in zip(graphs, ptr[:-1], strict=True)], 1)
    graph = torch.arange(len(graphs)).repeat_interleave(sizes)
    return SimpleNamespace(**{**joined, "batch": graph, "ptr": ptr, **more})


def assert_same_batch(a: GraphBatch, b: GraphBatch):
    assert a.plan is b.plan
    assert torch.equal(a.node_features, b.node_features)
    assert torch.equal(a.edge_features, b.edge_features)
    assert (a.sign_mask is None) == (b.sign_mask is None)
    assert a.sign_mask is None or torch.equal(a.sign_mask, b.sign_mask)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("d_e", [1, 9])
def test_batches_made_by_pyg(bidirectional, d_e):
    geometric = pytest.importorskip("torch_geometric.data")
    weights, biases = network(d_e=d_e)
    graphs = [graph_of(weights, biases, b, input_value=0.0, bidirectional=bidirectional) for b in range(3)]
    signs = [True, False, True]
    data = [geometric.Data(**graph, sign_mask=sign) for graph, sign in zip(graphs, signs, strict=True)]
    batch = geometric.Batch.from_data_list(data)
    expected = GraphBatch.from_weights(weights, biases, input_value=0.0, sign_mask=torch.tensor(signs))
    assert_same_batch(GraphBatch.from_pyg(batch), expected)
    found = GraphBatch.from_pyg(data[1])
    one = GraphBatch.from_weights(
        [w[1:2] for w in weights], [b[1:2] for b in biases], input_value=0.0, sign_mask=torch.tensor([False])
    )
    assert_same_batch(found, one)
    # the stand-in below is what PyG makes
    ours = batch_of(*graphs)
    for name in vars(ours):
        assert torch.equal(getattr(batch, name), getattr(ours, name)), name


@pytest.mark.parametrize("left_out", [(), ("ptr",), ("batch",), ("mask_hidden", "mask_first_layer")])
def test_what_may_be_left_out(left_out):
    weights, biases = network()
    batch = batch_of(*(graph_of(weights, biases, b) for b in range(3)))
    for name in left_out:
        delattr(batch, name)
    assert_same_batch(GraphBatch.from_pyg(batch), GraphBatch.from_weights(weights, biases))


def test_a_single_graph_without_batch():
    weights, biases = network(batch=1)
    graph = SimpleNamespace(**graph_of(weights, biases, 0), batch=None, ptr=None, sign_mask=True)
    expected = GraphBatch.from_weights(weights, biases, sign_mask=torch.tensor([True]))
    assert_same_batch(GraphBatch.from_pyg(graph), expected)


def test_mixed_architectures_keep_their_numbers():
    parts = [network(batch=1), network((3, 5), batch=1, seed=1), network(batch=1, seed=2)]
    found = GraphBatch.from_pyg(batch_of(*(graph_of(*part, 0) for part in parts)))
    expected = GraphBatch.cat([GraphBatch.from_weights(*part) for part in parts])
    assert found.layouts == expected.layouts == (LAYOUT, (3, 5), LAYOUT)
    assert torch.equal(found.node_features, expected.node_features)
    assert torch.equal(found.edge_features, expected.edge_features)
    assert torch.equal(found.plan.source, expected.plan.source)


def test_networks_with_skips():
    graph = SimpleNamespace(
        x=torch.arange(4.0).unsqueeze(1),
        edge_index=torch.tensor([[0, 1, 0, 2], [1, 2, 2, 3]]),
        edge_attr=torch.arange(4.0).unsqueeze(1),
        mask_hidden=torch.tensor([False, True, True, False]),
        mask_first_layer=torch.tensor([True, False, False, False]),
    )
    batch = GraphBatch.from_pyg(graph)
    assert batch.layouts == (None,)
    assert batch.node_features.flatten().tolist() == [3, 2, 1, 0]


def test_gradients_reach_the_features():
    weights, biases = network(batch=2)
    batch = batch_of(*(graph_of(weights, biases, b) for b in range(2)))

    def features(x, edge_attr):
        found = GraphBatch.from_pyg(SimpleNamespace(**{**vars(batch), "x": x, "edge_attr": edge_attr}))
        return found.node_features, found.edge_features

    assert torch.autograd.gradcheck(features, (batch.x.requires_grad_(), batch.edge_attr.requires_grad_()))


def good():
    weights, biases = network(batch=2)
    return vars(batch_of(*(graph_of(weights, biases, b, bidirectional=True) for b in range(2))))


def flipped(mask, node):
    return mask ^ (torch.arange(len(mask)) == node).unsqueeze(1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: {"x": None}, TypeError, "batch.x must be a tensor of 2 dimensions, got NoneType"),
        (
            lambda g: {"edge_attr": g["edge_attr"][:, 0]},
            TypeError,
            r"batch.edge_attr must be a tensor of 2.*got \[46\]",
        ),
        (
            lambda g: {"edge_index": g["edge_index"].float()},
            TypeError,
            "edge_index must be of an integer type, got float32",
        ),
        (
            lambda g: {"edge_attr": g["edge_attr"][1:]},
            ValueError,
            "batch.edge_attr must have .* rows, one per edge, got",
        ),
        (
            lambda g: {"edge_attr": g["edge_attr"].long()},
            TypeError,
            "edge_features must be floating point, got torch.int64",
        ),
        (
            lambda g: {"mask_hidden": flipped(g["mask_hidden"], 9)},
            ValueError,
            "batch.mask_hidden must mark the nodes with both incoming and outgoing edges, got True for node 9",
        ),
        (
            lambda g: {"mask_hidden": flipped(g["mask_hidden"], 12)},
            ValueError,
            "batch.mask_hidden must mark .*, got False for node 12",
        ),
        (
            lambda g: {"mask_first_layer": flipped(g["mask_first_layer"], 10)},
            ValueError,
            "batch.mask_first_layer must mark the nodes with no incoming edges, got False for node 10",
        ),
        (
            lambda g: {"mask_hidden": g["mask_hidden"][1:]},
            ValueError,
            r"mask_hidden must be bool \[20\] or \[20, 1\], got",
        ),
        (
            lambda g: {"mask_hidden": g["mask_hidden"].float()},
            ValueError,
            "mask_hidden must be bool.*got torch.float32",
        ),
        (lambda g: {"mask_first_layer": [True]}, ValueError, "mask_first_layer must be bool.*got list"),
        (
            lambda g: {"edge_index": g["edge_index"].flip(0), "bw_edge_index": None},
            ValueError,
            "mask_first_layer must mark",
        ),
        (
            lambda g: {"bw_edge_index": g["edge_index"]},
            ValueError,
            "batch.bw_edge_index must be edge_index with its rows",
        ),
        (
            lambda g: {"sign_mask": torch.ones(3).bool()},
            ValueError,
            r"sign_mask must have shape \[2\] or \[20\], got \[3\]",
        ),
        (lambda g: {"sign_mask": torch.ones(2)}, TypeError, "sign_mask must be a bool tensor, got torch.float32"),
        (
            lambda g: {"ptr": torch.tensor([0, 10, 19])},
            ValueError,
            r"batch.ptr must rise from 0 .*, 20, got \[0, 10, 19\]",
        ),
        (lambda g: {"ptr": torch.tensor([0, 10, 10, 20])}, ValueError, r"batch.ptr must rise from 0"),
        (
            lambda g: {"ptr": torch.tensor([0, 9, 20])},
            ValueError,
            "batch.batch must number the nodes as batch.ptr does",
        ),
        (
            lambda g: {"batch": torch.zeros(20, dtype=torch.int64), "ptr": None, "sign_mask": torch.ones(2).bool()},
            ValueError,
            r"sign_mask must have shape \[1\]",
        ),
        (
            lambda g: {
                "x": torch.zeros(0, 1),
                "edge_index": torch.zeros(2, 0).long(),
                "edge_attr": torch.zeros(0, 1),
                "batch": None,
                "ptr": None,
                "bw_edge_index": None,
            },
            ValueError,
            "num_nodes must be at least 1",
        ),
    ],
)
def test_bad_input(change, error, message):
    attributes = good()
    batch = SimpleNamespace(**{**attributes, **change(attributes)})
    with pytest.raises(error, match=message):
        GraphBatch.from_pyg(batch)


def test_a_structure_is_sorted_and_checked_once(monkeypatch):
    attributes = good()
    GraphBatch.from_pyg(SimpleNamespace(**attributes))
    calls, make = [], GraphPlan.from_edges
    monkeypatch.setattr(GraphPlan, "from_edges", lambda *args: calls.append(1) or make(*args))
    equal = {name: value.clone() for name, value in good().items()}
    found = GraphBatch.from_pyg(SimpleNamespace(**{**equal, "x": equal["x"] + 1, "edge_attr": equal["edge_attr"] * 2}))
    first = GraphBatch.from_pyg(SimpleNamespace(**attributes))
    assert not calls and found.plan is first.plan
    assert torch.equal(found.node_features, first.node_features + 1)
    assert torch.equal(found.edge_features, first.edge_features * 2)
    equal["mask_hidden"][9] ^= True
    with pytest.raises(ValueError, match=r"batch.mask_hidden must mark .* got True for node 9"):
        GraphBatch.from_pyg(SimpleNamespace(**equal))
    with pytest.raises(ValueError, match=r"batch.bw_edge_index must be edge_index with its rows"):
        GraphBatch.from_pyg(SimpleNamespace(**{**attributes, "bw_edge_index": attributes["edge_index"]}))
