"""What Neural Graphs models accept besides one layout, and what they say to a batch that does not fit."""

import copy
import pickle

import pytest
import torch
from neural_graphs_cases import INR, LAYOUT, STATS, config_of
from torch import nn

from scalegmn_fast.graph import GraphBatch, from_cnns
from scalegmn_fast.models import from_config, neural_graphs_config, neural_graphs_names
from scalegmn_fast.testing import random_cnn, random_network, randomize_parameters, relative_error

pytestmark = pytest.mark.usefixtures("reference_backend")
KINDS = ("gnn", "gnn_edit", "gnn_varying", "transformer", "transformer_edit", "transformer_varying")
# Sums of a few dozen float64 numbers in another order.
TOLERANCE = 1e-11
ALONE = {"gnn_backbone.norm_scope": "graph"}


def model_of(kind, changes=None, seed=0):
    torch.manual_seed(seed)
    model = from_config(config_of(kind, changes)).double().eval()
    randomize_parameters(model, generator=torch.Generator().manual_seed(seed))
    return model


def batch_of(layout=LAYOUT, count=2, seed=0, d_e=1):
    return GraphBatch.from_weights(
        *random_network(layout, count, d_e=d_e, generator=torch.Generator().manual_seed(seed))
    )


def batch_for(kind, **options):
    return batch_of(d_e=9 if "varying" in kind else 1, **options)


def cnns(**options):
    generator = torch.Generator().manual_seed(3)
    return [
        random_cnn([2, 3, 5], [3], generator=generator, **options),
        random_cnn([2, 4], [3], generator=generator, **options),
        random_cnn([2, 3, 4, 3], [4, 3], kernels=[3, 2, 1], generator=generator, **options),
        random_cnn([2, 3, 5], [3], generator=generator, **options),
    ]


def as_list(out):
    return [out] if torch.is_tensor(out) else [*out[0], *out[1]]


def assert_mixed_equals_alone(model, parts):
    alone = [model(part) for part in parts]
    together = model(GraphBatch.cat(parts))
    if torch.is_tensor(alone[0]):
        assert relative_error(together, torch.cat(alone)) <= TOLERANCE
        return
    for out, expected in zip(together, alone, strict=True):
        for a, b in zip(as_list(out), as_list(expected), strict=True):
            assert relative_error(a, b) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gnn", ALONE),
        ("gnn", {"gnn_backbone.norm_scope": "node", "rev_edge_features": True}),
        ("gnn", {**ALONE, "pooling_method": "mean", "pooling_layer_idx": "all"}),
        ("gnn", {**ALONE, "pooling_method": "mean_edge", "pooling_layer_idx": "all", "rev_edge_features": True}),
        ("gnn", {**ALONE, "graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": INR}),
        ("gnn_edit", ALONE),
        ("gnn_edit", {**ALONE, "rev_edge_features": True, "exact_bias_readout": True, "normalize": True}),
        ("transformer", {}),
        ("transformer", {"pooling_method": "mean", "pooling_layer_idx": 1}),
        ("transformer", {"pooling_method": "max_edge", "pooling_layer_idx": "all", "rev_edge_features": True}),
        ("transformer", {"pooling_method": "cls_token", "use_cls_token": True}),
        ("transformer_edit", {"rev_edge_features": True}),
    ],
)
def test_mixed_layouts_equal_their_parts(kind, changes):
    """Widths vary; so do depths where no editing head and no probes ask for one."""
    parts = [batch_for(kind, count=2, seed=1), batch_for(kind, layout=[2, 3, 6, 3], count=1, seed=2)]
    if "edit" not in kind and "graph_constructor.num_probe_features" not in changes:
        parts.append(batch_for(kind, layout=[2, 7, 3], count=2, seed=3))
    assert_mixed_equals_alone(model_of(kind, changes), parts)


@pytest.mark.parametrize("flattening", [None, "repeat_nodes", "extra_layer"])
@pytest.mark.parametrize("linear_as_conv", [True, False])
@pytest.mark.parametrize("kind", ["gnn_varying", "transformer_varying"])
def test_mixed_architectures_equal_one_by_one(kind, linear_as_conv, flattening):
    """Depths, widths, kernels, activations and residual connections of CNNs vary within a batch."""
    changes = {
        "graph_constructor.flattening_method": flattening,
        "graph_constructor.linear_as_conv": linear_as_conv,
        "rev_edge_features": True,
        "pooling_method": "attentional_aggregation",
        "pooling_layer_idx": "all",
        **(ALONE if kind == "gnn_varying" else {}),
    }
    states = cnns() if flattening is None else cnns(pixels=4)
    activations = [["relu", "tanh"], ["gelu"], ["silu", "relu", "none", "leaky_relu"], ["sigmoid", "relu"]]
    residuals = [[-1, -1], [-1], [-1, -1, 0, 1 if flattening != "repeat_nodes" else -1], [-1, -1]]
    options = {"kernel_size": (3, 3), "linear_as_conv": linear_as_conv, "flattening_method": flattening}

    def part(*which):
        return from_cnns(
            [states[k] for k in which],
            activations=[activations[k] for k in which],
            residual_connections=[residuals[k] for k in which],
            **options,
        )

    model = model_of(kind, changes)
    alone = torch.cat([model(part(k)) for k in range(4)])
    assert relative_error(model(part(0, 1, 2, 3)), alone) <= TOLERANCE
    assert relative_error(model(GraphBatch.cat([part(0, 1), part(2, 3)])), alone) <= TOLERANCE


def test_original_norm_depends_on_the_batch():
    """The original's LayerNorm is over all nodes of the batch; the default reproduces it."""
    model, parts = model_of("gnn"), [batch_of(seed=1), batch_of(seed=2)]
    together = model(GraphBatch.cat(parts))
    assert relative_error(together, torch.cat([model(part) for part in parts])) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_every_builder_gives_the_same(kind):
    """The input value of first-layer neurons, which have no bias, is not read."""
    model = model_of(kind, {"gnn_backbone.norm_scope": "node"} if "gnn" in kind else {})
    generator = torch.Generator().manual_seed(0)
    d_e = 9 if "varying" in kind else 1
    weights, biases = random_network(LAYOUT, 2, d_e=d_e, generator=generator)
    expected = as_list(model(GraphBatch.from_weights(weights, biases, input_value=0.0)))
    batches = [GraphBatch.from_weights(weights, biases, input_value=5.0)]
    if d_e == 1:
        layers = zip(weights, biases, strict=True)
        stacks = [(w.squeeze(3).transpose(1, 2), b.squeeze(2)) for w, b in layers]
        states = [
            {
                f"{k}.{name}": t[n]
                for k, pair in enumerate(stacks)
                for name, t in zip(("weight", "bias"), pair, strict=True)
            }
            for n in range(2)
        ]
        batches.append(GraphBatch.from_state_dicts(states))
        modules = []
        for state in states:
            network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
            network.load_state_dict({f"{2 * int(name[0])}{name[1:]}": t for name, t in state.items()})
            modules.append(network)
        batches.append(GraphBatch.from_modules(modules))
    for batch in batches:
        for a, b in zip(as_list(model(batch)), expected, strict=True):
            assert torch.equal(a, b)


def test_cnn_state_dicts():
    """`GraphBatch.from_state_dicts` serves networks that pool their feature maps, `from_cnns` all."""
    model, states = model_of("gnn_varying"), cnns()
    expected = model(from_cnns(states, kernel_size=(3, 3)))
    assert torch.equal(model(GraphBatch.from_state_dicts(states, kernel_size=(3, 3))), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind):
    model, other, batch = model_of(kind), model_of(kind, seed=1), batch_for(kind)
    other.load_state_dict(model.state_dict(), strict=True)
    for a, b in zip(as_list(model(batch)), as_list(other(batch)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_and_copies_give_the_same(kind):
    model, batch = model_of(kind), batch_for(kind)
    nodes, edges = batch.node_features.clone(), batch.edge_features.clone()
    expected = as_list(model(batch))
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for a, b in zip(as_list(other(batch)), expected, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(batch.node_features, nodes) and torch.equal(batch.edge_features, edges)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model, batch = model_of(kind).float(), batch_for(kind).to(dtype=torch.float32)
    expected = as_list(model(batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = as_list(model(batch))
    sum(out.float().sum() for out in outs).backward()
    for out, wanted in zip(outs, expected, strict=True):
        # bfloat16 has 8 bits; three rounds and their norms multiply its rounding by a few.
        assert relative_error(out.float(), wanted) < 0.2
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["gnn", "gnn_varying", "transformer", "transformer_varying"])
@pytest.mark.parametrize("rev", [False, True])
def test_last_round_on_what_is_read_changes_nothing(kind, rev):
    """A readout of the last layer computes its nodes alone in the last round."""
    model, batch = model_of(kind, {"rev_edge_features": rev}), batch_for(kind)
    shrunk = model(batch)
    if "gnn" in kind:
        x, _ = model._run(batch, last_only=False)
        whole = model.pool(x, batch.plan)
    else:
        x, _, _ = model._run(batch, reads_edges=False)
        whole = model.pool(x, batch.plan, "network")
    assert relative_error(shrunk, model.proj_out(whole)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_weights_and_parameters(kind):
    model = model_of(kind)
    weights, biases = random_network(LAYOUT, 2, d_e=9 if "varying" in kind else 1)
    leaves = [t.requires_grad_() for t in (*weights, *biases)]
    sum(out.square().sum() for out in as_list(model(GraphBatch.from_weights(weights, biases)))).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= {"construct_graph.act_emb.embedding.weight"} | {
        name for name in without if "edge_updates" in name or "edge_update.2" in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    """No graph break; what a plan derives is made by the first eager call. ``aot_eager`` traces what inductor would."""
    model, batch = model_of(kind), batch_for(kind)
    expected = as_list(model(batch))
    outs = as_list(torch.compile(model, fullgraph=True, backend="aot_eager")(batch))
    for a, b in zip(outs, expected, strict=True):
        assert relative_error(a, b) < 1e-12
    sum(out.sum() for out in outs).backward()


def test_dropout_is_for_training():
    for kind, key in (("gnn", "gnn_backbone.dropout"), ("transformer", "dropout")):
        model, batch = model_of(kind, {key: 0.5}), batch_of()
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))


def test_statistics_as_tensors_and_in_any_dtype():
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in STATS.items()}
    first = model_of("gnn")
    second = model_of("gnn", {"graph_constructor.stats": tensors})
    assert torch.equal(first(batch_of()), second(batch_of()))
    single = first.float()(batch_of().to(dtype=torch.float32))
    assert single.dtype == torch.float32


def test_shifted_statistics():
    """The original standardises layer l by entry l - 1; each layer by its own is the new key's."""
    plain = {"weights_mean": [9.0, 0.1, 0.2], "weights_std": [9.0, 0.5, 2.0]}
    shifted = {"weights_mean": [0.1, 0.2, 9.0], "weights_std": [0.5, 2.0, 9.0]}
    neutral = {"weights_mean": [0.0, 0.1, 0.2], "weights_std": [1.0, 0.5, 2.0]}
    key, option = "graph_constructor.stats", "graph_constructor.shift_weight_stats"
    own = model_of("gnn_varying", {key: neutral, option: False})
    late = model_of("gnn_varying", {key: shifted})
    other = model_of("gnn_varying", {key: plain, option: False})
    batch = batch_for("gnn_varying")
    assert torch.equal(own(batch), late(batch)) and not torch.equal(own(batch), other(batch))


def test_fixit_scales_attention_and_node_mlp():
    """And not the edge mlps, as in the original."""
    plain, scaled = (
        model_before.state_dict()
        for model_before in (
            _fresh("transformer", {}),
            _fresh("transformer", {"tfixit_init": True}),
        )
    )
    factor = 0.67 * 2**-0.25
    for name, value in plain.items():
        gain = 1.0
        if "weight" in name and "node_mlp" in name:
            gain = factor
        elif "weight" in name and "self_attn" in name:
            gain = factor * 2**0.5
        assert torch.allclose(scaled[name], gain * value), name


def _fresh(kind, changes):
    torch.manual_seed(0)
    return from_config(config_of(kind, changes))


@pytest.mark.parametrize("name", neural_graphs_names())
def test_published_configurations_run(name):
    """Forward and backward at the published widths on two small networks, float64."""
    config = neural_graphs_config(name)
    torch.manual_seed(0)
    if "layer_layout" in config and config["_target_"].startswith(("nn.gnn", "nn.dense", "nn.relational")):
        layout = config["layer_layout"] = [2, 5, 4, 1]
        batch = GraphBatch.from_weights(*random_network(layout, 2))
    else:
        channels, d_e = config["input_channels"], config["graph_constructor"]["d_edge_in"]
        batch = GraphBatch.cat(
            [
                GraphBatch.from_weights(*random_network([channels, *hidden, 10], 1, d_e=d_e))
                for hidden in ([3, 4], [2, 3, 3])
            ]
        )
        networks = from_cnns(
            [random_cnn([channels, 3, 4], [10])], kernel_size=(int(d_e**0.5),) * 2, linear_as_conv=False
        )
        batch = networks if not config["graph_constructor"]["linear_as_conv"] else batch
    model = from_config(config).double()
    outs = as_list(model(batch))
    assert all(torch.isfinite(out).all() for out in outs)
    sum(out.square().sum() for out in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bad_batches_are_named():
    with pytest.raises(TypeError, match="graph must be a GraphBatch .* got tuple"):
        model_of("gnn")(random_network(LAYOUT, 2))
    with pytest.raises(ValueError, match=r"layout must have 2 input and 3 output neurons .* got \[2, 4, 1\]"):
        model_of("transformer")(batch_of([2, 4, 1]))
    with pytest.raises(ValueError, match="layout must have at most 4 layers .* got 5"):
        model_of("gnn")(batch_of([2, 3, 3, 3, 3]))
    with pytest.raises(ValueError, match="weights must have 1 numbers each .* got 9"):
        model_of("gnn")(batch_of(d_e=9))
    with pytest.raises(ValueError, match="layout must have 4 layers like the model's, got "):
        model_of("transformer_edit")(batch_of([2, 6, 3]))
    probes = model_of("gnn", {"graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": INR})
    with pytest.raises(ValueError, match="probe features need networks of 3 layers of weights"):
        probes(batch_of([2, 6, 3]))
    with pytest.raises(ValueError, match="'cat' needs networks of equally many neurons"):
        changes = {"pooling_layer_idx": 1, "layer_layout": LAYOUT}
        model_of("gnn_varying", changes)(
            GraphBatch.cat([batch_for("gnn_varying"), batch_for("gnn_varying", layout=[2, 3, 4, 3])])
        )
    with pytest.raises(ValueError, match="pooling_layer_idx must be a layer of every network, got 3 for graph 0"):
        model_of("gnn_varying", {"pooling_layer_idx": 3, "pooling_method": "mean"})(
            batch_for("gnn_varying", layout=[2, 5, 3])
        )
    for name, value, expected in (
        ("linear_as_conv", False, "linear_as_conv=False"),
        ("flattening_method", "repeat_nodes", "repeat_nodes"),
    ):
        changes = {f"graph_constructor.{name}": value}
        with pytest.raises(ValueError, match=f"architectures are needed by {expected}"):
            model_of("gnn_varying", changes)(batch_for("gnn_varying"))
    small = model_of(
        "gnn_varying",
        {"graph_constructor.flattening_method": "repeat_nodes", "graph_constructor.max_spatial_resolution": 3},
    )
    with pytest.raises(ValueError, match="at most max_spatial_resolution = 3 pixels, got 4"):
        small(from_cnns(cnns(pixels=4), kernel_size=(3, 3), flattening_method="repeat_nodes"))
    with pytest.raises(
        ValueError, match="stats.weights_mean must hold a number for each of 4 layers of weights, got 3"
    ):
        model_of("gnn_varying", {"graph_constructor.stats": STATS})(batch_for("gnn_varying", layout=[2, 3, 3, 3, 3]))
