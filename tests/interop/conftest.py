"""Whether tests may run the originals themselves."""

import os
from pathlib import Path

import pytest

CHECKOUTS = {
    "SCALEGMN_FAST_ORIGINAL": ("github.com/jkalogero/scalegmn", "inr_classification.py"),
    "SCALEGMN_FAST_ORIGINAL_NEURAL_GRAPHS": ("github.com/mkofinas/neural-graphs", "nn/relational_transformer.py"),
}


@pytest.fixture
def checkout(request):
    """The checkout that an environment variable names, by the marker ``original(VARIABLE)``."""
    variable = request.node.get_closest_marker("original").args[0]
    where, file = CHECKOUTS[variable]
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set to a checkout of {where}")
    root = Path(os.environ[variable]).resolve()
    assert (root / file).exists(), f"{variable} must name a checkout of {where}, got {root}"
    return root
