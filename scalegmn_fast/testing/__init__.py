"""Oracles, tolerances, random cases and equivariance checks, for the project's tests, its benchmarks and its users.

Needs torch and numpy alone.
"""

from scalegmn_fast.testing.cases import (
    random_biases,
    random_cnn,
    random_config,
    random_layout,
    random_network,
    random_sign_mask,
    random_weights,
    randomize_parameters,
)
from scalegmn_fast.testing.dispatch import Dispatched
from scalegmn_fast.testing.golden import GoldenVector, load_vector
from scalegmn_fast.testing.group import (
    GroupElement,
    act,
    act_on_sign_mask,
    equivariance_error,
    flip_signs,
    permute_hidden,
    random_group_element,
    scale_hidden,
)
from scalegmn_fast.testing.tolerance import assert_close_to_float64, float64_bound, nan_poisoned, relative_error

__all__ = [
    "Dispatched",
    "GoldenVector",
    "GroupElement",
    "act",
    "act_on_sign_mask",
    "assert_close_to_float64",
    "equivariance_error",
    "flip_signs",
    "float64_bound",
    "load_vector",
    "nan_poisoned",
    "permute_hidden",
    "random_biases",
    "random_cnn",
    "random_config",
    "random_group_element",
    "random_layout",
    "random_network",
    "random_sign_mask",
    "random_weights",
    "randomize_parameters",
    "relative_error",
    "scale_hidden",
]
