"""Checkouts of the originals, where an environment variable names one; `bench` is imported from the repository."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))


def checkout(variable: str, where: str, file: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set to a checkout of {where}, which this test runs")
    root = Path(os.environ[variable]).resolve()
    assert (root / file).exists(), f"{variable} must name a checkout of {where}, got {root}"
    return root


@pytest.fixture
def scalegmn_root():
    return checkout("SCALEGMN_FAST_ORIGINAL", "github.com/jkalogero/scalegmn", "inr_classification.py")


@pytest.fixture
def neural_graphs_root():
    where = "github.com/mkofinas/neural-graphs"
    return checkout("SCALEGMN_FAST_ORIGINAL_NEURAL_GRAPHS", where, "nn/relational_transformer.py")
