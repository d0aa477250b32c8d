"""Building blocks of weight-space graph networks; each is usable alone."""

from .edge_update import EdgeUpdate
from .equivariant import EquivariantLayer, EquivariantNet, InvariantLayer, InvariantNet
from .message import CarriedMessage, Direction, EquivariantMessage, PlainMessage, SineUpdate
from .mlp import Mlp, MlpNet
from .positional import GraphInit, PositionalEncoding
from .readout import DeepSet, InvariantReadout
from .rows import FactoredEdges, GatheredRows, MappedRows, RowClasses
from .work import WorkPlan, set_work_plan

__all__ = [
    "CarriedMessage",
    "DeepSet",
    "Direction",
    "EdgeUpdate",
    "EquivariantLayer",
    "EquivariantMessage",
    "EquivariantNet",
    "FactoredEdges",
    "GatheredRows",
    "GraphInit",
    "InvariantLayer",
    "InvariantNet",
    "InvariantReadout",
    "MappedRows",
    "Mlp",
    "MlpNet",
    "PlainMessage",
    "PositionalEncoding",
    "RowClasses",
    "SineUpdate",
    "WorkPlan",
    "set_work_plan",
]
