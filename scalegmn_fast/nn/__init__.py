"""Building blocks of weight-space graph networks; each is usable alone."""

from .edge_update import EdgeUpdate
from .equivariant import EquivariantLayer, EquivariantNet, InvariantLayer, InvariantNet
from .graph_features import GraphFeatures, LayerStatistics, ProbeFeatures, VaryingGraphFeatures
from .message import CarriedMessage, Direction, EquivariantMessage, PlainMessage, SineUpdate
from .mlp import Mlp, MlpNet
from .pna import Pna, PnaConv
from .pooling import NodePooling
from .positional import GraphInit, PositionalEncoding
from .readout import DeepSet, InvariantReadout
from .relational_transformer import RelationalAttention, TransformerLayer
from .rows import FactoredEdges, GatedEdges, GatheredRows, MappedRows, RowClasses
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
    "GatedEdges",
    "GatheredRows",
    "GraphFeatures",
    "GraphInit",
    "InvariantLayer",
    "InvariantNet",
    "InvariantReadout",
    "LayerStatistics",
    "MappedRows",
    "Mlp",
    "MlpNet",
    "NodePooling",
    "PlainMessage",
    "Pna",
    "PnaConv",
    "PositionalEncoding",
    "ProbeFeatures",
    "RelationalAttention",
    "RowClasses",
    "SineUpdate",
    "TransformerLayer",
    "VaryingGraphFeatures",
    "WorkPlan",
    "set_work_plan",
]
