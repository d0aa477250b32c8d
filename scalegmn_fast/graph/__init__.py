"""Graphs of networks: neurons as nodes, weights as edges, in the order in which they are computed."""

from .batch import GraphBatch
from .plan import GraphPlan

__all__ = ["GraphBatch", "GraphPlan"]
