"""Neural Graphs against the golden vectors of the original implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scalegmn_fast import backend
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.testing import load_vector, relative_error

VECTORS = sorted((Path(__file__).parent / "golden" / "neural_graphs").glob("*.npz"))
TOLERANCE = 1e-10


def as_list(out):
    return [out] if torch.is_tensor(out) else [*out[0], *out[1]]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradient_of(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def batch_of(weights, biases):
    """The vectors of varying architectures have a linear layer at the end, a 1 x 1 kernel."""
    d_e = max(w.shape[-1] for w in weights)
    weights = [F.pad(w, ((d_e - 1) // 2, d_e // 2)) if w.shape[-1] == 1 else w for w in weights]
    return GraphBatch.from_weights(weights, biases)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_golden_vector(path, reference_backend):
    check_vector(path)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_golden_vector_as_row_programs(path):
    with backend("cpp"):
        check_vector(path)


def check_vector(path):
    """Outputs and every gradient; the names, order and shapes of the state."""
    vector = load_vector(path)
    model = from_config(vector.config).double().eval()
    assert list(model.state_dict()) == list(vector.state)
    model.load_state_dict(vector.state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, vector.state[name]), name
    weights, biases = leaves(vector.weights), leaves(vector.biases)

    outputs = as_list(model(batch_of(weights, biases)))
    assert len(outputs) == len(vector.outputs)
    for actual, expected in zip(outputs, vector.outputs, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE

    torch.autograd.backward(outputs, vector.cotangents)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert vector.state_grads.keys() <= parameters.keys()
    pairs = {name: (gradient_of(parameters[name]), grad) for name, grad in vector.state_grads.items()}
    for kind, given, grads in (("weights", weights, vector.weight_grads), ("biases", biases, vector.bias_grads)):
        pairs |= {
            f"{kind}[{k}]": (gradient_of(leaf), grad) for k, (leaf, grad) in enumerate(zip(given, grads, strict=True))
        }
    # Some gradients are 0 in exact arithmetic (a bias before a softmax); below this both are rounding errors.
    negligible = 1e-14 * max(float(grad.abs().max()) for _, grad in pairs.values())
    for name, (actual, grad) in pairs.items():
        error = float((actual - grad).abs().max())
        assert error <= TOLERANCE * float(grad.abs().max()) + negligible, name


def test_there_are_vectors():
    assert len(VECTORS) == 20
