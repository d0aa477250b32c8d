"""Any feed-forward module as a graph of neurons, with the symmetry group of its weights."""

from .network import SymmetryError, TracedNetwork
from .program import trace

__all__ = ["SymmetryError", "TracedNetwork", "trace"]
