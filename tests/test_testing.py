"""The tools that the other tests rest on: each must be able to say no."""

from __future__ import annotations

import random

import pytest
import torch

from scalegmn_fast import testing
from scalegmn_fast.testing import relative_error


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def function_of(weights, biases, activations, x):
    """Output of the batch of networks themselves at the inputs x [B, n_0]."""
    for layer, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = torch.einsum("bi,bio->bo", x, w[..., 0]) + b[..., 0]
        if layer < len(weights) - 1:
            x = activations(x, layer)
    return x


ACTIVATION = {
    "sign": lambda x, mask: torch.tanh(x),
    "scale": lambda x, mask: torch.relu(x),
    "permutation": lambda x, mask: torch.sigmoid(x),
    "hetero": lambda x, mask: torch.where(mask[:, None], torch.tanh(x), torch.relu(x)),
}


@pytest.mark.parametrize("symmetry", ["sign", "scale", "hetero", "permutation"])
def test_a_group_element_leaves_the_function_unchanged(symmetry):
    layout = [2, 5, 4, 3]
    weights, biases = testing.random_network(layout, 3, generator=generator())
    mask = torch.tensor([True, False, True])
    element = testing.random_group_element(layout, symmetry, batch=3, sign_mask=mask, generator=generator(1))
    x = torch.randn(3, 2, dtype=torch.float64, generator=generator(2))
    moved = testing.act(weights, biases, element)
    assert relative_error(moved[0][1], weights[1]) > 0.1

    def activation(values, layer):
        return ACTIVATION[symmetry](values, mask)

    assert relative_error(function_of(*moved, activation, x), function_of(weights, biases, activation, x)) < 1e-13


def test_a_mask_per_neuron_moves_with_its_neurons():
    layout = [2, 6, 1]
    weights, biases = testing.random_network(layout, 2, generator=generator())
    mask = testing.random_sign_mask(layout, 2, per_neuron=True, generator=generator(3))
    element = testing.random_group_element(layout, "hetero", batch=2, sign_mask=mask, generator=generator(1))
    moved_mask = testing.act_on_sign_mask(mask, element, layout)
    x = torch.randn(2, 2, dtype=torch.float64, generator=generator(2))

    def activation(flags):
        return lambda values, layer: torch.where(flags[:, 2:8], torch.tanh(values), torch.relu(values))

    before = function_of(weights, biases, activation(mask), x)
    after = function_of(*testing.act(weights, biases, element), activation(moved_mask), x)
    assert relative_error(after, before) < 1e-13


def test_flipping_twice_is_exact():
    layout = [2, 5, 4, 3]
    weights, biases = testing.random_network(layout, 2, generator=generator())
    signs = testing.random_group_element(layout, "sign", batch=2, generator=generator(1)).scales
    twice = testing.flip_signs(*testing.flip_signs(weights, biases, signs), signs)
    assert all(
        torch.equal(a, b)
        for kind, given in zip(twice, (weights, biases), strict=True)
        for a, b in zip(kind, given, strict=True)
    )
    with pytest.raises(ValueError, match="must hold 1 and -1"):
        testing.flip_signs(weights, biases, [2 * sign for sign in signs])
    with pytest.raises(ValueError, match="one entry per hidden layer"):
        testing.scale_hidden(weights, biases, signs[:1])


def test_equivariance_error_sees_a_function_that_does_not_move():
    layout = [2, 5, 3]
    weights, biases = testing.random_network(layout, 2, generator=generator())
    element = testing.random_group_element(layout, "scale", batch=2, generator=generator(1))
    options = {"weights": weights, "biases": biases, "element": element}
    assert testing.equivariance_error(lambda w, b, mask: (w, b), **options) == 0.0
    assert testing.equivariance_error(lambda w, b, mask: ([x * x for x in w], b), **options) > 0.1
    assert testing.equivariance_error(lambda w, b, mask: b[0].sum(1), **options) > 0.01
    assert testing.equivariance_error(lambda w, b, mask: b[1].sum(1), **options) == 0.0


def test_relative_error():
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a) == 0.0
    assert relative_error(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert relative_error(torch.tensor([1.0, float("nan")]), a) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    special = torch.tensor([float("nan"), float("inf"), 1.0])
    assert relative_error(special, special) == 0.0
    assert relative_error(torch.ones(3), special) == float("inf")
    with pytest.raises(ValueError, match="must have the shape"):
        relative_error(torch.ones(2), torch.ones(3))


def test_close_to_float64_follows_the_eager_error():
    exact = torch.linspace(0.1, 1.0, 64, dtype=torch.float64).sin()
    eager = torch.linspace(0.1, 1.0, 64).sin()
    testing.assert_close_to_float64(eager, eager, exact)
    bound = testing.float64_bound(eager, exact)
    assert 16 * torch.finfo(torch.float32).eps <= bound < 1e-5
    with pytest.raises(AssertionError, match="exceeds"):
        testing.assert_close_to_float64(eager + 2 * bound, eager, exact)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_close_to_float64(eager.bfloat16(), eager, exact)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close_to_float64(eager[:3], eager, exact)


def test_poisoned_memory_is_nan_and_restored():
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    with testing.nan_poisoned():
        assert torch.empty(5).isnan().all()
        assert torch.empty_like(torch.zeros(3, dtype=torch.float64)).isnan().all()
    assert before == (torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled())


def test_random_configurations_cover_every_kind_and_repeat():
    drawn = [testing.random_config(random.Random(seed)) for seed in range(64)]
    assert drawn[5] == testing.random_config(random.Random(5))
    kinds = {(c["symmetry"], c["direction"], c["equivariant"]) for c in drawn}
    assert len(kinds) == 16
    for c in (testing.random_config(random.Random(seed), exact=True) for seed in range(64)):
        assert c["canonical_eps"] == 0.0
        if c["direction"] == "bidirectional" and c["symmetry"] in ("scale", "hetero"):
            assert c["bidirectional_edges"] in ("reciprocal", "carried")
    with pytest.raises(ValueError, match="symmetry must be one of"):
        testing.random_config(random.Random(0), symmetry="rotation")
