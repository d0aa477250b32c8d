"""Models move exactly as their input networks move."""

from __future__ import annotations

import random

import pytest
import torch

from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.testing import (
    equivariance_error,
    random_config,
    random_group_element,
    random_network,
    random_sign_mask,
    randomize_parameters,
    relative_error,
)

TOLERANCE = 1e-10
pytestmark = [
    pytest.mark.filterwarnings("ignore:not exactly equivariant"),
    pytest.mark.usefixtures("reference_backend"),
]
SYMMETRIES = ("sign", "scale", "hetero", "permutation")
DIRECTIONS = ("forward", "bidirectional")
HEADS = ("invariant", "equivariant")


def case(config, seed, *, symmetry=None, permute=True, per_neuron=False, batch=2):
    """A model with random parameters, random networks and a random group element."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = from_config(config).double().eval()
    randomize_parameters(model, generator=generator)
    layout = config["layer_layout"]
    d_e = config.get("_max_kernel_height", 1) * config.get("_max_kernel_width", 1)
    weights, biases = random_network(layout, batch, d_e=d_e, generator=generator)
    mask = random_sign_mask(layout, batch, per_neuron=per_neuron, generator=generator)
    element = random_group_element(
        layout,
        symmetry or config["symmetry"],
        batch=batch,
        sign_mask=mask,
        permute=permute,
        generator=generator,
    )
    return model, weights, biases, element, mask


def error_of(config, seed, **options):
    model, weights, biases, element, mask = case(config, seed, **options)
    return equivariance_error(model, weights, biases, element, sign_mask=mask, input_value=float(seed % 2))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_permutation_and_scaling_together(symmetry, direction, head):
    for seed in range(8):
        config = random_config(
            random.Random(seed), symmetry=symmetry, direction=direction, equivariant=head == "equivariant", exact=True
        )
        # An edge between a sign and a scale neuron has neither symmetry, which an equivariant net on edges would need.
        per_neuron = seed % 2 == 1 and not config["positional_encodings"]["equiv_net"]
        assert error_of(config, seed, per_neuron=per_neuron) <= TOLERANCE, seed


@pytest.mark.parametrize("bidirectional_edges", ["reciprocal", "carried"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("symmetry", ["sign", "scale", "hetero"])
def test_backward_edges(symmetry, head, bidirectional_edges):
    for seed in range(20, 24):
        config = random_config(
            random.Random(seed),
            symmetry=symmetry,
            direction="bidirectional",
            equivariant=head == "equivariant",
            exact=True,
        )
        config["bidirectional_edges"] = bidirectional_edges
        assert error_of(config, seed) <= TOLERANCE, seed


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sign_flips_change_no_bit(direction, head):
    """No sum changes its order under sign flips, so that the outputs are equal and not only close."""
    for seed in range(8):
        config = random_config(
            random.Random(seed), symmetry="sign", direction=direction, equivariant=head == "equivariant", exact=True
        )
        assert error_of(config, seed, permute=False) == 0.0, seed


@pytest.mark.parametrize("symmetry", ["scale", "hetero"])
def test_original_backward_edges_are_not_equivariant(symmetry):
    """The check itself: the original's bidirectional model must be caught."""
    errors = []
    for seed in range(4):
        config = random_config(random.Random(seed), symmetry=symmetry, direction="bidirectional", exact=True)
        errors.append(error_of({**config, "bidirectional_edges": "original"}, seed))
    assert max(errors) > 1e-6


@pytest.mark.parametrize(
    ("symmetry", "foreign"), [("sign", "scale"), ("scale", "sign"), ("permutation", "sign"), ("permutation", "scale")]
)
def test_models_see_what_is_not_their_symmetry(symmetry, foreign):
    """A model that ignored its input would pass every other test here."""
    errors = []
    for seed in range(4):
        config = random_config(random.Random(seed), symmetry=symmetry, exact=True)
        errors.append(error_of(config, seed, symmetry=foreign, permute=False))
    assert max(errors) > 1e-6


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_graphs_of_a_batch_do_not_see_each_other(symmetry):
    for seed in range(4):
        config = random_config(random.Random(seed), symmetry=symmetry, equivariant=False, exact=True)
        model, weights, biases, _, mask = case(config, seed, batch=3)
        with torch.no_grad():
            together = model(GraphBatch.from_weights(weights, biases, sign_mask=mask))
            alone = torch.cat(
                [
                    model(
                        GraphBatch.from_weights(
                            [w[k : k + 1] for w in weights], [b[k : k + 1] for b in biases], sign_mask=mask[k : k + 1]
                        )
                    )
                    for k in range(3)
                ]
            )
        assert relative_error(together, alone) <= TOLERANCE
