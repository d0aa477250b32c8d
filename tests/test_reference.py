"""The oracle against the golden vectors of the original implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scalegmn_fast.reference.scalegmn import scalegmn
from scalegmn_fast.testing import load_vector, random_network, relative_error

VECTORS = sorted((Path(__file__).parent / "golden" / "scalegmn").glob("*.npz"))
TOLERANCE = 1e-10
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def run(vector):
    """Outputs, and the leaves whose gradients the vector holds."""
    state = {name: t.clone().requires_grad_(t.is_floating_point()) for name, t in vector.state.items()}
    weights = [w.clone().requires_grad_() for w in vector.weights]
    biases = [b.clone().requires_grad_() for b in vector.biases]
    out = scalegmn(vector.config, state, weights, biases, input_value=vector.input_value, sign_mask=vector.sign_mask)
    return [out] if torch.is_tensor(out) else [*out[0], *out[1]], state, weights, biases


def test_the_vectors_are_there():
    assert len(VECTORS) == 37


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_outputs_and_all_gradients(path):
    vector = load_vector(path)
    outputs, state, weights, biases = run(vector)
    assert len(outputs) == len(vector.outputs)
    for actual, expected in zip(outputs, vector.outputs, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE

    torch.autograd.backward(outputs, vector.cotangents)
    for leaves, grads in ((weights, vector.weight_grads), (biases, vector.bias_grads)):
        for leaf, grad in zip(leaves, grads, strict=True):
            assert relative_error(leaf.grad, grad) <= TOLERANCE
    for name, leaf in state.items():
        if name in vector.state_grads:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            assert relative_error(grad, vector.state_grads[name]) <= TOLERANCE, name
        elif not name.endswith(BUFFERS):
            assert leaf.grad is None, f"{name} has no effect on the original's output"


def test_accepts_tensors_without_the_feature_axis():
    vector = load_vector(next(path for path in VECTORS if path.stem == "mnist_cls__scalegmn"))
    flat = scalegmn(
        vector.config, vector.state, [w[..., 0] for w in vector.weights], [b[..., 0] for b in vector.biases]
    )
    assert relative_error(flat, vector.outputs[0]) <= TOLERANCE


def test_reciprocal_edges_are_unused_where_weights_are_their_own_reciprocal():
    """w / ||w||^2 = w for weights of norm 1; then "reciprocal" must be "original"."""
    vector = load_vector(next(path for path in VECTORS if path.stem == "cifar10__scalegmn_relu_bidir"))
    unit = [w / w.norm(dim=-1, keepdim=True) for w in vector.weights]
    original = scalegmn(vector.config, vector.state, unit, vector.biases, input_value=0.0)
    reciprocal = scalegmn(
        {**vector.config, "bidirectional_edges": "reciprocal"}, vector.state, unit, vector.biases, input_value=0.0
    )
    assert relative_error(reciprocal, original) <= TOLERANCE


def test_zero_rows_have_zero_gradient():
    """A network whose weights and biases are all 0, at canonical_eps 0: finite values and gradients."""
    vector = load_vector(next(path for path in VECTORS if path.stem == "cifar10__scalegmn_relu"))
    weights = [torch.zeros_like(w).requires_grad_() for w in vector.weights]
    biases = [torch.zeros_like(b).requires_grad_() for b in vector.biases]
    out = scalegmn({**vector.config, "canonical_eps": 0.0}, vector.state, weights, biases, input_value=0.0)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in [*weights, *biases])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetry": "rotation"}, "symmetry must be one of"),
        ({"direction": "sideways"}, "direction must be one of"),
        ({"bidirectional_edges": "inverse"}, "bidirectional_edges must be"),
        ({"readout_range": "first_layer"}, "readout_range must be one of"),
        ({"layer_layout": [2, 6, 5, 2]}, "must have layer_layout"),
    ],
)
def test_bad_options_are_named(change, message):
    vector = load_vector(next(path for path in VECTORS if path.stem == "mnist_cls__scalegmn"))
    with pytest.raises(ValueError, match=message):
        scalegmn({**vector.config, **change}, vector.state, vector.weights, vector.biases)


def test_hetero_needs_a_mask():
    vector = load_vector(next(path for path in VECTORS if path.stem == "cifar10__scalegmn_hetero"))
    with pytest.raises(ValueError, match="sign_mask must be given"):
        scalegmn(vector.config, vector.state, vector.weights, vector.biases, input_value=0.0)


def test_a_mask_per_neuron_equals_one_per_graph_where_it_is_constant():
    vector = load_vector(next(path for path in VECTORS if path.stem == "cifar10__scalegmn_hetero_bidir"))
    per_neuron = vector.sign_mask[:, None].expand(-1, sum(vector.config["layer_layout"]))
    out = scalegmn(vector.config, vector.state, vector.weights, vector.biases, input_value=0.0, sign_mask=per_neuron)
    assert relative_error(out, vector.outputs[0]) <= TOLERANCE


def test_second_order_gradients():
    vector = load_vector(next(path for path in VECTORS if path.stem == "opt__editing_scale"))
    weights, biases = random_network(vector.config["layer_layout"], 1, generator=torch.Generator().manual_seed(0))

    def first(w):
        new_weights, _ = scalegmn(vector.config, vector.state, [w, *weights[1:]], biases)
        return new_weights[0]

    assert torch.autograd.gradgradcheck(first, weights[0].requires_grad_(), fast_mode=True)
