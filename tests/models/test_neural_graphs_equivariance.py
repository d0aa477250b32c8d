"""Neural Graphs models move exactly as the hidden neurons of their input networks are permuted."""

from __future__ import annotations

import pytest
import torch
from neural_graphs_cases import INR, LAYOUT, config_of

from scalegmn_fast.graph import GraphBatch, from_cnns
from scalegmn_fast.models import from_config
from scalegmn_fast.testing import (
    equivariance_error,
    random_cnn,
    random_group_element,
    random_network,
    randomize_parameters,
    relative_error,
)

TOLERANCE = 1e-10
pytestmark = pytest.mark.usefixtures("reference_backend")

REV = {"rev_edge_features": True}
PROBES = {"graph_constructor.num_probe_features": 4, "graph_constructor.inr_model": INR}
CASES = {
    "gnn": [
        {},
        REV,
        {**PROBES, **REV},
        {"gnn_backbone.towers": 2, "gnn_backbone.pre_layers": 2, "gnn_backbone.post_layers": 2},
        {"gnn_backbone.modulate_edges": False, "gnn_backbone.aggregators": ["sum", "var", "max"]},
        {"gnn_backbone.gating_edges": True, "gnn_backbone.scalers": ["attenuation", "linear", "inverse_linear"]},
        {"pooling_method": "mean", "pooling_layer_idx": "all", "gnn_backbone.norm_scope": "graph"},
        {"pooling_method": "max", "pooling_layer_idx": 1, "gnn_backbone.norm_kwargs": {"mode": "node"}},
        {"pooling_method": "cat_mean", "pooling_layer_idx": "all", "gnn_backbone.jk": "cat"},
        {"pooling_method": "mean_edge", "pooling_layer_idx": "all", **REV},
        {"pooling_method": "max_edge", "pooling_layer_idx": "last"},
        {"graph_constructor.zero_out_bias": True, "graph_constructor.input_layers": 2},
        {"graph_constructor.zero_out_weights": True, "gnn_backbone.update_edge_attr": False},
    ],
    "gnn_edit": [
        {"exact_bias_readout": True},
        {"exact_bias_readout": True, "normalize": True, **REV},
        {"exact_bias_readout": True, "gnn_backbone.norm_scope": "graph", **PROBES},
    ],
    "gnn_varying": [
        {},
        REV,
        {"pooling_method": "attentional_aggregation", "pooling_layer_idx": "all"},
        {"pooling_method": "set_transformer", "pooling_layer_idx": 1},
        {"pooling_method": "graph_multiset_transformer", "pooling_layer_idx": "all"},
    ],
    "transformer": [
        {},
        REV,
        PROBES,
        {"modulate_v": False, "use_ln": False, "n_heads": 1},
        {"use_cls_token": True, "pooling_method": "cls_token"},
        {"pooling_method": "mean", "pooling_layer_idx": 2},
        {"pooling_method": "mean_edge", "pooling_layer_idx": "all", **REV},
        {"pooling_method": "mean_edge", "pooling_layer_idx": "last"},
        {"pooling_method": "max_edge", "pooling_layer_idx": "all"},
        {"pooling_method": "cat_mean", "pooling_layer_idx": "all", "disable_edge_updates": True},
    ],
    "transformer_edit": [{}, REV, {"normalize": True, "disable_edge_updates": True}, PROBES],
    "transformer_varying": [
        {},
        REV,
        {"use_cls_token": True, "pooling_method": "cls_token"},
        {"pooling_method": "mean_edge", "pooling_layer_idx": "last"},
        {"pooling_method": "attentional_aggregation", "pooling_layer_idx": "all"},
        {"pooling_method": "set_transformer", "pooling_layer_idx": "all"},
    ],
}


def model_of(kind, changes, seed=0):
    torch.manual_seed(seed)
    model = from_config(config_of(kind, changes)).double().eval()
    randomize_parameters(model, generator=torch.Generator().manual_seed(seed))
    return model


def error_of(kind, changes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights, biases = random_network(LAYOUT, 3, d_e=9 if "varying" in kind else 1, generator=generator)
    element = random_group_element(LAYOUT, "permutation", batch=3, generator=generator)
    return equivariance_error(model_of(kind, changes, seed), weights, biases, element)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, changes) for kind, cases in CASES.items() for changes in cases],
    ids=lambda value: value if isinstance(value, str) else "-".join(k.split(".")[-1] for k in value) or "default",
)
def test_permutations(kind, changes):
    for seed in range(2):
        assert error_of(kind, changes, seed) <= TOLERANCE


def test_shifted_biases_are_not_equivariant():
    """The check itself: the original's GNNParams reads biases from other neurons."""
    assert error_of("gnn_edit", {}) > 1e-6


def test_models_see_the_weights():
    """A model that ignored its input would pass every test above."""
    generator = torch.Generator().manual_seed(0)
    for kind in CASES:
        model = model_of(kind, {})
        d_e = 9 if "varying" in kind else 1
        first, second = (
            model(GraphBatch.from_weights(*random_network(LAYOUT, 2, d_e=d_e, generator=generator))) for _ in range(2)
        )
        first, second = (out if torch.is_tensor(out) else out[0][0] for out in (first, second))
        assert relative_error(first, second) > 1e-6


def permuted_last_convolution(state, permutation, pixels):
    """The same function with the last convolution's channels in another order."""
    state = dict(state)
    state["1.weight"], state["1.bias"] = state["1.weight"][permutation], state["1.bias"][permutation]
    columns = state["2.weight"].unflatten(1, (-1, pixels))[:, permutation]
    state["2.weight"] = columns.flatten(1)
    return state


@pytest.mark.parametrize(("order", "exact"), [(False, True), (True, False)])
@pytest.mark.parametrize("kind", ["gnn_varying", "transformer_varying"])
def test_flattened_channels(kind, order, exact):
    """Neurons of one channel are joined to that channel's columns; in the original's order they are not."""
    model = model_of(kind, {"graph_constructor.flattening_method": "repeat_nodes"})
    generator = torch.Generator().manual_seed(1)
    state = random_cnn([2, 3, 5], [3], pixels=4, generator=generator)
    moved = permuted_last_convolution(state, torch.randperm(5, generator=generator), 4)
    outs = [
        model(from_cnns([network], flattening_method="repeat_nodes", original_pixel_order=order))
        for network in (state, moved)
    ]
    error = relative_error(outs[1], outs[0])
    assert error <= TOLERANCE if exact else error > 1e-6


@pytest.mark.parametrize("kind", ["gnn_varying", "transformer_varying"])
def test_extra_layer(kind):
    model = model_of(kind, {"graph_constructor.flattening_method": "extra_layer"})
    generator = torch.Generator().manual_seed(1)
    state = random_cnn([2, 3, 5], [3], pixels=4, generator=generator)
    moved = permuted_last_convolution(state, torch.randperm(5, generator=generator), 4)
    outs = [model(from_cnns([network], flattening_method="extra_layer")) for network in (state, moved)]
    assert relative_error(outs[1], outs[0]) <= TOLERANCE
