"""The models against the golden vectors, and against the oracle on random configurations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.reference.scalegmn import scalegmn
from scalegmn_fast.testing import (
    load_vector,
    random_config,
    random_network,
    random_sign_mask,
    randomize_parameters,
    relative_error,
)

VECTORS = sorted((Path(__file__).parent / "golden" / "scalegmn").glob("*.npz"))
TOLERANCE = 1e-10
pytestmark = [
    pytest.mark.filterwarnings("ignore:not exactly equivariant"),
    pytest.mark.usefixtures("reference_backend"),
]


def as_list(out):
    return [out] if torch.is_tensor(out) else [*out[0], *out[1]]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradient_of(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_golden_vector(path):
    vector = load_vector(path)
    model = from_config(vector.config).double().eval()
    model.load_state_dict(vector.state, strict=True)
    weights, biases = leaves(vector.weights), leaves(vector.biases)
    batch = GraphBatch.from_weights(weights, biases, input_value=vector.input_value, sign_mask=vector.sign_mask)

    outputs = as_list(model(batch))
    assert len(outputs) == len(vector.outputs)
    for actual, expected in zip(outputs, vector.outputs, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE

    torch.autograd.backward(outputs, vector.cotangents)
    for given_leaves, grads in ((weights, vector.weight_grads), (biases, vector.bias_grads)):
        for leaf, grad in zip(given_leaves, grads, strict=True):
            assert relative_error(leaf.grad, grad) <= TOLERANCE
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert vector.state_grads.keys() <= parameters.keys()
    for name, grad in vector.state_grads.items():
        assert relative_error(gradient_of(parameters[name]), grad) <= TOLERANCE, name


def compare_with_oracle(config, seed, *, spread=0.3):
    """Output and all gradients of a model of this configuration against the oracle's, in float64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = from_config(config).double().eval()
    randomize_parameters(model, generator=generator, spread=spread)
    layout, batch = config["layer_layout"], 1 + seed % 3
    d_e = config.get("_max_kernel_height", 1) * config.get("_max_kernel_width", 1)
    weights, biases = (leaves(t) for t in random_network(layout, batch, d_e=d_e, generator=generator))
    mask = random_sign_mask(layout, batch, per_neuron=seed % 2 == 1, generator=generator)
    input_value = float(seed % 2)

    outputs = as_list(model(GraphBatch.from_weights(weights, biases, input_value=input_value, sign_mask=mask)))
    cotangents = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    torch.autograd.backward(outputs, cotangents)

    state = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in model.state_dict().items()}
    oracle_weights, oracle_biases = leaves(weights), leaves(biases)
    expected = as_list(scalegmn(config, state, oracle_weights, oracle_biases, input_value=input_value, sign_mask=mask))
    torch.autograd.backward(expected, cotangents)

    for actual, wanted in zip(outputs, expected, strict=True):
        assert relative_error(actual, wanted) <= TOLERANCE
    pairs = {f"weights[{k}]": pair for k, pair in enumerate(zip(weights, oracle_weights, strict=True))}
    pairs |= {f"biases[{k}]": pair for k, pair in enumerate(zip(biases, oracle_biases, strict=True))}
    pairs |= {name: (parameter, state[name]) for name, parameter in model.named_parameters()}
    gradients = {name: tuple(map(gradient_of, pair)) for name, pair in pairs.items()}
    # Gradients that are mathematically zero are rounding errors in both; below this they count as zero.
    negligible = 1e-14 * max(float(wanted.abs().max()) for _, wanted in gradients.values())
    for name, (actual, wanted) in gradients.items():
        assert float((actual - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max()) + negligible, name


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31 - 1))
def test_random_configurations_equal_the_oracle(seed):
    compare_with_oracle(random_config(random.Random(seed)), seed)


@pytest.mark.parametrize("bidirectional_edges", ["original", "reciprocal", "carried"])
@pytest.mark.parametrize("equivariant", [False, True])
@pytest.mark.parametrize("symmetry", ["scale", "hetero"])
def test_every_kind_of_backward_edges_equals_the_oracle(symmetry, equivariant, bidirectional_edges):
    for seed in range(3):
        config = random_config(
            random.Random(seed), symmetry=symmetry, direction="bidirectional", equivariant=equivariant
        )
        compare_with_oracle({**config, "bidirectional_edges": bidirectional_edges}, seed)


def test_sine_inside_the_mlps():
    """One round with small parameters: sin(30 x) multiplies rounding errors by 30 in every mlp of the chain."""
    config = random_config(random.Random(3), symmetry="sign", direction="forward", equivariant=False)
    config["num_layers"] = 1
    config["gnn_args"] |= {"message_fn_layers": 1, "update_node_feats_fn_layers": 1, "update_as_act": False}
    config["mlp_args"] |= {"activation": "sine", "layer_norm": False, "batch_norm": False}
    compare_with_oracle(config, 3, spread=0.01)
