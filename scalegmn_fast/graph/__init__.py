"""Graphs of networks: neurons as nodes, weights as edges, in the order in which they are computed."""

from .architecture import Architecture
from .batch import GraphBatch
from .cnns import from_cnns
from .plan import GraphPlan
from .tracing import SymmetryError, TracedNetwork, trace

__all__ = ["Architecture", "GraphBatch", "GraphPlan", "SymmetryError", "TracedNetwork", "from_cnns", "trace"]
