"""Positional encodings of node and edge types, and the projection of raw weights and biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .equivariant import CANONICAL_EPS, EquivariantNet
from .rows import FactoredEdges, GatheredRows, RowClasses, Rows, by_class, dense
from .work import PlannedModule


class GraphInit(PlannedModule):
    """Bias-free linear maps bias -> d_node (``proj_bias``) and weight -> d_edge (``proj_weight``).

    Without ``project_node_feats`` (or ``project_edge_feats``) the raw features are used and must have that width.
    """

    def __init__(self, d_in_v, d_in_e, d_node, d_edge, project_node_feats=True, project_edge_feats=True):
        super().__init__()
        for name, projects, raw, out in (
            ("node", project_node_feats, d_in_v, d_node),
            ("edge", project_edge_feats, d_in_e, d_edge),
        ):
            if not projects and raw != out:
                key = {"node": "d_in_v", "edge": "d_in_e"}[name]
                raise ValueError(
                    f"graph_init.project_{name}_feats False needs {key} equal to d_{name}, got {raw} and {out}"
                )
        self.proj_bias = nn.Linear(d_in_v, d_node, bias=False) if project_node_feats else None
        self.proj_weight = nn.Linear(d_in_e, d_edge, bias=False) if project_edge_feats else None

    def nodes(self, biases: Tensor) -> Tensor:
        """[N, d_v] -> [N, d_node]."""
        return biases if self.proj_bias is None else self.proj_bias(biases)

    def edges(self, weights: Tensor) -> Rows:
        """[E, d_e] -> [E, d_edge], factored while the identity *low_rank* is on."""
        if self.proj_weight is None:
            return weights
        if not self.work.low_rank:
            return self.proj_weight(weights)
        return FactoredEdges(weights, self.proj_weight.weight.unsqueeze(0), None, None)


class PositionalEncoding(PlannedModule):
    """One embedding p per node or edge type, applied to the projected features.

    Args:
        param: ``node`` or ``edge``.
        d_in, d_hid: widths of the features and of p (equal unless ``equiv_net`` or ``po_as_different_linear``).
        num_param_types: number of types.
        sum_on_io: hidden node rows are multiplied by p, p is added to the others; else all are multiplied. Edges are
            always multiplied.
        sum_pos_enc: p is added everywhere. Breaks the scale and sign symmetries; always so for ``permutation``.
        equiv_net: hidden nodes, and edges, go through an `EquivariantNet` that reads p as an extra feature.
        po_as_different_linear: a [d_hid, d_in] matrix per type, applied after.
        final_linear_pos_embed: a bias-free linear map, applied last.
        others: see `EquivariantNet`.

    Source: spec, *Before and after*.
    """

    def __init__(
        self,
        d_in: int,
        d_hid: int,
        num_param_types: int,
        param: str,
        *,
        final_linear_pos_embed: bool = False,
        sum_pos_enc: bool = False,
        po_as_different_linear: bool = False,
        equiv_net: bool = False,
        sum_on_io: bool = True,
        num_layers: int = 1,
        mlp_args: dict | None = None,
        symmetry: str = "sign",
        sign_symmetrization: bool = False,
        mlp_on_io: bool = False,
        num_mlps: int = 2,
        equiv_on_hidden: bool = True,
        layer_equiv_on_hidden: bool = True,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        if symmetry == "permutation":
            sum_pos_enc, equiv_net, po_as_different_linear, final_linear_pos_embed = True, False, False, False
        self.param, self.sum_pos_enc, self.sum_on_io = param, sum_pos_enc, sum_on_io
        if po_as_different_linear:
            self.linears = nn.Parameter(torch.empty(num_param_types, d_hid, d_hid if equiv_net else d_in))
            nn.init.kaiming_uniform_(self.linears, a=math.sqrt(5))
        self.pos_embed = nn.Parameter(torch.randn(num_param_types, d_hid))
        if equiv_net:
            self.init_fn = EquivariantNet(
                num_layers,
                d_in,
                d_hid,
                mlp_args,
                d_hid,
                symmetry,
                equiv_on_hidden,
                layer_equiv_on_hidden,
                mlp_on_io,
                num_mlps,
                sign_symmetrization,
                eps=eps,
            )
        if final_linear_pos_embed:
            self.final_linear = nn.Linear(d_hid, d_hid, bias=False)

    def forward(self, rows: Rows, types: Tensor, classes: RowClasses) -> Rows:
        """Encoded features of the rows; ``types`` int64 [R], ``classes`` as for `EquivariantNet`."""
        if hasattr(self, "init_fn"):
            encoded = self._equivariant(dense(rows), types, classes)
        elif isinstance(rows, FactoredEdges) and (rows.maps.shape[2] == 1 or self._one_type()):
            return self._factored(rows, types)
        else:
            encoded = self._elementwise(dense(rows), types, classes)
            if hasattr(self, "final_linear"):
                encoded = self.final_linear(encoded)
        if hasattr(self, "linears"):
            encoded = torch.bmm(self.linears[types], encoded.unsqueeze(2)).squeeze(2)
        return encoded

    def _one_type(self) -> bool:
        return self.pos_embed.shape[0] == 1

    def _elementwise(self, x: Tensor, types: Tensor, classes: RowClasses) -> Tensor:
        p = self.pos_embed[types]
        if self.sum_pos_enc:
            return x + p
        if self.param == "edge" or not self.sum_on_io:
            return x * p
        sizes = [classes.last, classes.hidden, classes.first]
        (last, hidden, first), (p_last, p_hidden, p_first) = x.split(sizes), p.split(sizes)
        return torch.cat([last + p_last, hidden * p_hidden, first + p_first])

    def _equivariant(self, x: Tensor, types: Tensor, classes: RowClasses) -> Tensor:
        p = GatheredRows(self.pos_embed, types)
        if self.param == "edge" or not self.sum_on_io:
            return self.init_fn(x, p, classes)

        def hidden(parts, rows):
            return self.init_fn(*parts, classes=rows)

        def others(parts, _):
            return parts[0] + dense(parts[1])

        return by_class(self.work.partition, (x, p), classes, [(hidden, ("hidden",)), (others, ("last", "first"))])

    def _factored(self, edges: FactoredEdges, types: Tensor) -> FactoredEdges:
        p = self.pos_embed
        maps, offsets = (edges.maps, p) if self.sum_pos_enc else (edges.maps * p.unsqueeze(2), None)
        if self.sum_pos_enc:
            maps = maps.expand(p.shape[0], -1, -1)
        if hasattr(self, "final_linear"):
            maps = self.final_linear.weight @ maps
            offsets = None if offsets is None else self.final_linear(offsets)
        if hasattr(self, "linears"):
            maps = self.linears @ maps
            offsets = None if offsets is None else torch.bmm(self.linears, offsets.unsqueeze(2)).squeeze(2)
        return FactoredEdges(edges.weights, maps, offsets, None if self._one_type() else types)
