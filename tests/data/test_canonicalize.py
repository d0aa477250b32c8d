"""Canonicalisation: the function stays, equivalent networks become equal, a second pass changes no bit."""

import argparse
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalegmn_fast.data import PackedDataset, canonicalize, evaluate_inrs, write_packed

LAYOUTS = [(2, 4, 3, 1), (1, 3, 2), (3, 2, 2, 2, 2), (2, 5, 1)]


def random_networks(rng, layout, batch, spread, w0, boundaries=True, margin=0.0):
    """Networks whose phases range over several periods; some biases, weights and neurons at the named boundaries.

    Other phases keep ``margin`` away from the ends of the canonical range: nearer than the roundings of a shifted copy
    it is not defined which of the two representatives a neuron has.
    """
    weights, biases = [], []
    for layer, (n_in, n_out) in enumerate(zip(layout, layout[1:], strict=False)):
        weight = torch.from_numpy(rng.normal(size=(batch, n_in, n_out)) / math.sqrt(n_in))
        bias = torch.from_numpy(rng.uniform(-spread, spread, size=(batch, n_out)))
        if boundaries:
            w0_layer = w0[min(layer, len(w0) - 1)]
            quarter = math.pi / 2 / w0_layer
            beyond = bias - quarter * (bias / quarter).round()
            bias = torch.where(beyond.abs() * w0_layer < margin, bias + 2 * margin / w0_layer, bias)
            ends = torch.from_numpy(rng.integers(-6, 7, size=(batch, n_out))).double() * quarter
            bias = torch.where(torch.from_numpy(rng.random((batch, n_out)) < 0.3), ends, bias)
            bias = torch.where(torch.from_numpy(rng.random((batch, n_out)) < 0.15), 0.0, bias)
            dead = torch.from_numpy(rng.random((batch, 1, n_out)) < 0.1)
            weight = torch.where(dead, 0.0, weight)
        weights.append(weight)
        biases.append(bias)
    return weights, biases


def transformed(rng, weights, biases, w0, activation):
    """The same functions, every hidden neuron moved by a random element of its symmetry group."""
    weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
    for layer in range(len(weights) - 1):
        shape = biases[layer].shape
        if activation == "relu":
            scale = torch.from_numpy(np.exp(rng.normal(size=shape)))
            weights[layer] *= scale[:, None]
            biases[layer] *= scale
            weights[layer + 1] /= scale[:, :, None]
            continue
        sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=shape))
        weights[layer] *= sign[:, None]
        biases[layer] *= sign
        weights[layer + 1] *= sign[:, :, None]
        if activation == "sine":
            reflect = torch.from_numpy(rng.random(shape) < 0.5)
            weights[layer] *= torch.where(reflect, -1.0, 1.0)[:, None]
            biases[layer] = torch.where(reflect, math.pi / w0[layer] - biases[layer], biases[layer])
            biases[layer] += torch.from_numpy(rng.integers(-3, 4, size=shape)).double() * (2 * math.pi / w0[layer])
    return weights, biases


def values(weights, biases, activation, w0):
    points = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None].expand(-1, weights[0].shape[1]).clone()
    points *= torch.linspace(0.3, 1.0, points.shape[1], dtype=torch.float64)
    return evaluate_inrs(
        [w.double() for w in weights], [b.double() for b in biases], points, activation=activation, w0=w0
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(LAYOUTS),
    activation=st.sampled_from(["sine", "sine", "tanh", "relu"]),
    base=st.sampled_from([1.0, 7.5, 30.0]),
    per_layer=st.booleans(),
)
def test_equivalent_networks_become_equal_and_keep_their_function(seed, layout, activation, base, per_layer):
    rng = np.random.default_rng(seed)
    w0 = [base * (1 + 0.4 * layer * per_layer) for layer in range(len(layout) - 2)]
    weights, biases = random_networks(rng, layout, 6, 8.0 / base, w0)
    options = {"activation": activation, "w0": w0, "normalize_scale": activation == "relu"}
    canonical = canonicalize(weights, biases, **options)
    before, after = values(weights, biases, activation, w0), values(*canonical, activation, w0)
    assert torch.allclose(before, after, rtol=1e-10, atol=1e-10 * float(before.abs().max()))

    again = canonicalize(*canonical, **options)
    for first, second in zip([*canonical[0], *canonical[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(first, second)

    moved = transformed(rng, weights, biases, w0, activation)
    assert not all(torch.equal(a, b) for a, b in zip(moved[1], biases, strict=True))
    other = canonicalize(*moved, **options)
    for first, second in zip([*canonical[0], *canonical[1]], [*other[0], *other[1]], strict=True):
        assert torch.allclose(first, second, rtol=1e-11, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), activation=st.sampled_from(["sine", "tanh", "relu"]))
def test_float32_networks(seed, activation):
    rng = np.random.default_rng(seed)
    w0 = [30.0, 30.0]
    double = random_networks(rng, (2, 6, 5, 1), 8, 0.3, w0, margin=1e-3)
    moved = transformed(rng, *double, w0, activation)
    single, moved = ([[t.float() for t in part] for part in networks] for networks in (double, moved))
    options = {"activation": activation, "normalize_scale": activation == "relu"}
    canonical, other = canonicalize(*single, **options), canonicalize(*moved, **options)
    assert all(t.dtype == torch.float32 for part in canonical for t in part)
    for first, second in zip([*canonical[0], *canonical[1]], [*other[0], *other[1]], strict=True):
        assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    again = canonicalize(*canonical, **options)
    assert all(torch.equal(a, b) for p, q in zip(canonical, again, strict=True) for a, b in zip(p, q, strict=True))


def one_neuron(w, b, v, w0=30.0):
    result = canonicalize(
        [torch.tensor([[[w]]], dtype=torch.float64), torch.tensor([[[v]]], dtype=torch.float64)],
        [torch.tensor([[b]], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)],
        w0=w0,
    )
    return result[0][0].item(), result[1][0].item(), result[0][1].item(), result[1][1].item()


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ((0.5, 0.01, 2.0), (0.5, 0.01, 2.0)),
        ((0.5, -0.01, 2.0), (-0.5, 0.01, -2.0)),
        ((0.5, 0.01 + 2 * math.pi / 30, 2.0), (0.5, 0.01, 2.0)),
        ((-0.5, math.pi / 30 - 0.01, 2.0), (0.5, 0.01, 2.0)),
        ((0.5, 0.01 - math.pi / 30, 2.0), (0.5, 0.01, -2.0)),
        ((-0.5, 0.0, 2.0), (0.5, 0.0, -2.0)),
        ((-0.5, math.pi / 30, 2.0), (0.5, 0.0, 2.0)),
        ((-0.5, math.pi / 60, 2.0), (0.5, math.pi / 60, 2.0)),
        ((-0.5, -math.pi / 60, 2.0), (0.5, math.pi / 60, -2.0)),
        ((0.5, 3 * math.pi / 60, 2.0), (0.5, math.pi / 60, -2.0)),
        ((0.0, 0.0, 2.0), (0.0, 0.0, 0.0)),
        ((0.0, -0.01, 2.0), (0.0, 0.01, -2.0)),
    ],
)
def test_sine_neuron_lands_on_its_representative(network, expected):
    assert one_neuron(*network) == pytest.approx((*expected, 0.25), rel=1e-12, abs=1e-15)


def test_biases_a_rounding_away_from_a_boundary_count_as_on_it():
    for boundary in (0.0, math.pi / 60, math.pi / 30, -math.pi / 60):
        on, below, above = (one_neuron(-0.5, boundary + d, 2.0) for d in (0.0, -1e-17, 1e-17))
        assert on == below == above


def test_period_is_that_of_w0_and_not_two_pi():
    w, b, v, _ = one_neuron(0.5, 1.0, 2.0)
    assert 0 <= b <= math.pi / 60
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    assert torch.allclose(v * torch.sin(30 * (x * w + b)), 2.0 * torch.sin(30 * (x * 0.5 + 1.0)), atol=1e-13)


def test_relu_neurons_get_unit_norm_and_dead_ones_no_outgoing_weight():
    weights = [torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[2.0], [5.0]]])]
    biases = [torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0]])]
    (first, second), (bias, _) = canonicalize(weights, biases, activation="relu", normalize_scale=True)
    assert first.flatten().tolist() == pytest.approx([0.6, 0.0])
    assert bias.flatten().tolist() == pytest.approx([0.8, 0.0])
    assert second.flatten().tolist() == pytest.approx([10.0, 0.0])


def test_kernel_taps_and_trailing_axes_keep_their_shapes():
    torch.manual_seed(0)
    weights = [torch.randn(3, 2, 4, 9), torch.randn(3, 4, 2, 9)]
    biases = [torch.randn(3, 4, 1), torch.randn(3, 2, 1)]
    new_weights, new_biases = canonicalize(weights, biases, activation="tanh")
    sign = biases[0].sign()
    assert torch.equal(new_biases[0], biases[0].abs())
    assert torch.equal(new_weights[0], weights[0] * sign.reshape(3, 1, 4, 1))
    assert torch.equal(new_weights[1], weights[1] * sign.reshape(3, 4, 1, 1))
    assert torch.equal(new_biases[1], biases[1])


def test_inputs_are_not_modified():
    rng = np.random.default_rng(0)
    weights, biases = random_networks(rng, (2, 4, 1), 3, 1.0, [30.0])
    copies = [t.clone() for t in (*weights, *biases)]
    canonicalize(weights, biases)
    assert all(torch.equal(a, b) for a, b in zip([*weights, *biases], copies, strict=True))


def good(dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(3, 2, 4, dtype=dtype), torch.randn(3, 4, 1, dtype=dtype)], [
        torch.randn(3, 4, dtype=dtype),
        torch.randn(3, 1, dtype=dtype),
    ]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda w, b: w.pop(), {}, ValueError, "as many weights as biases"),
        (lambda w, b: w.__setitem__(1, w[1][:, :3]), {}, ValueError, r"weights\[1\]"),
        (lambda w, b: b.__setitem__(0, b[0][:, :3]), {}, ValueError, r"biases\[0\]"),
        (lambda w, b: w.__setitem__(0, w[0][0]), {}, ValueError, "layer 0"),
        (lambda w, b: w.__setitem__(0, w[0].half()), {}, TypeError, r"weights\[0\].*float16"),
        (lambda w, b: b[1].fill_(math.nan), {}, ValueError, r"biases\[1\] holds NaN or Inf"),
        (lambda w, b: None, {"activation": "gelu"}, ValueError, "sine, relu, tanh.*'gelu'"),
        (lambda w, b: None, {"activation": "relu"}, ValueError, "normalize_scale"),
        (lambda w, b: None, {"normalize_scale": True}, ValueError, "no scale symmetry"),
        (lambda w, b: None, {"w0": [30.0, 30.0]}, ValueError, "each of 1 hidden layers, got 2"),
        (lambda w, b: None, {"w0": 0.0}, ValueError, "w0 must be positive"),
    ],
)
def test_bad_arguments(change, options, error, message):
    weights, biases = good()
    change(weights, biases)
    with pytest.raises(error, match=message):
        canonicalize(weights, biases, **options)


def run_command(*arguments):
    command = importlib.import_module("scalegmn_fast.data.canonicalize")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([*map(str, arguments), "--quiet"]))


def test_command(tmp_path, capsys):
    rng = np.random.default_rng(1)
    weights, biases = random_networks(rng, (2, 4, 3, 1), 9, 0.5, [30.0])
    splits = {"train": range(6), "val": [6], "test": [7, 8]}
    metadata = {"activation": "sine", "w0": 30.0, "note": "kept"}
    write_packed(
        tmp_path / "in.safetensors", weights, biases, np.arange(9), splits, metadata, extras={"psnr": np.ones(9)}
    )
    assert run_command(tmp_path / "in.safetensors", tmp_path / "out.safetensors") == 0
    assert "hidden neurons rewritten" in capsys.readouterr().out
    before, after = PackedDataset(tmp_path / "in.safetensors"), PackedDataset(tmp_path / "out.safetensors")
    expected = canonicalize(*before.weights(slice(None)))
    found = after.weights(slice(None))
    assert all(torch.equal(a, b) for p, q in zip(expected, found, strict=True) for a, b in zip(p, q, strict=True))
    assert torch.equal(after.labels, before.labels) and torch.equal(after.splits, before.splits)
    assert after.metadata == {**metadata, "canonical": "phase and sign"}
    assert after.extras == ("psnr",)


def test_command_without_w0_or_activation(tmp_path):
    weights, biases = good()
    write_packed(tmp_path / "a.safetensors", weights, biases, [0, 1, 2], {"train": [0, 1, 2]}, {})
    with pytest.raises(ValueError, match="--activation"):
        run_command(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="--w0"):
        run_command(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--activation", "sine")
    assert run_command(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--activation", "tanh") == 0
