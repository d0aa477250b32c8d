"""The transformer of Neural Graphs: attention over all pairs of neurons, conditioned on the weights between them.

Source: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks", ICLR 2024;
after Diao and Loynd, "Relational Attention: Generalizing Transformers for Graph-Structured Tasks", ICLR 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.pairs import NodePairs, RowPairs
from ..reference.edge_mlp import edge_mlp
from ..reference.relational_attention import relational_attention
from . import fused_neural_graphs
from .fused_neural_graphs import PairFeatures, program_pairs


def _linear(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _mlp(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(_linear(width, hidden, bias=False), nn.GELU(), _linear(hidden, width), nn.Dropout(dropout))


def _norm(width: int, use_ln: bool) -> nn.Module:
    return nn.LayerNorm(width) if use_ln else nn.Identity()


class RelationalAttention(nn.Module):
    """See `reference.relational_attention`; then a linear layer. The logits' scale is 1 / sqrt(d_hid).

    Args:
        d_node, d_edge, d_hid: widths of nodes, edges and of all heads together.
        n_heads: a divisor of ``d_hid``.
        modulate_v: edges multiply values too.
    """

    def __init__(self, d_node: int, d_edge: int, d_hid: int, n_heads: int, modulate_v: bool):
        super().__init__()
        self.n_heads, self.scale = n_heads, d_hid**-0.5
        self.qkv_node = _linear(d_node, 3 * d_hid, bias=False)
        self.qkv_edge = _linear(d_edge, (4 if modulate_v else 3) * d_hid, bias=False)
        self.proj_out = _linear(d_hid, d_node)

    def forward(
        self, x: Tensor, features: PairFeatures, pairs: NodePairs, rows: RowPairs | None = None, writes: bool = True
    ) -> tuple[Tensor, PairFeatures]:
        """[N, d_node] from x [N, d_node] and the pairs' features, both in the order of ``pairs``; and those features.

        With ``rows`` only those nodes attend: [R, d_node]. With ``writes`` the features returned have passed their
        update.
        """
        heads = self.n_heads
        q, k, v = (part.flatten(1) for part in self.qkv_node(x).unflatten(1, (heads, 3, -1)).unbind(2))
        q = q if rows is None else q[rows.nodes]
        if fused_neural_graphs.serves(x):
            attended, features = fused_neural_graphs.attention(
                self, q, k, v, features, program_pairs(pairs, rows), writes
            )
            return self.proj_out(attended), features
        e = features.dense(pairs)
        features = PairFeatures(e)
        row, column, size = pairs.row, pairs.column, pairs.size
        shape = None if size is None else (size, size)
        if rows is not None:
            row, column, shape = rows.row, rows.column, None
            if rows.span is None:
                e = e[rows.pair]
            else:
                start, count = rows.span
                e, shape = e.unflatten(0, (-1, size, size))[:, start : start + count].flatten(0, 2), (count, size)
        attended = relational_attention(
            q, k, v, e, self.qkv_edge.weight, heads=heads, scale=self.scale, row=row, column=column, shape=shape
        )
        return self.proj_out(attended), features


class PairMlp(nn.Module):
    """``lin1(gelu(lin0_e [e_ij, e_ji] + lin0_s x_i + lin0_t x_j))`` per pair (i, j)."""

    def __init__(self, d_node: int, d_edge: int, d_edge_hid: int, dropout: float):
        super().__init__()
        self.lin0_e = _linear(2 * d_edge, d_edge_hid)
        self.lin0_s = _linear(d_node, d_edge_hid)
        self.lin0_t = _linear(d_node, d_edge_hid)
        self.lin1 = _linear(d_edge_hid, d_edge)
        self.dropout = dropout

    def forward(self, x: Tensor, e: Tensor, pairs: NodePairs) -> Tensor:
        """[P, d_edge] from x [N, d_node] and e [P, d_edge]."""
        edge, from_source, from_target, out = (
            (layer.weight, layer.bias) for layer in (self.lin0_e, self.lin0_s, self.lin0_t, self.lin1)
        )
        updated = edge_mlp(
            x,
            e,
            pairs.row,
            pairs.column,
            edge=edge,
            from_source=from_source,
            from_target=from_target,
            out=out,
            act="gelu",
            both_ways=True,
            reverse=pairs.reverse,
            size=pairs.size,
        )
        return F.dropout(updated, self.dropout, self.training)


class PairUpdate(nn.Module):
    """The edge update: `PairMlp` and an mlp, each with residual and LayerNorm (none with ``use_ln=False``)."""

    def __init__(self, d_node: int, d_edge: int, d_edge_hid: int, dropout: float, use_ln: bool):
        super().__init__()
        self.edge_mlp0 = PairMlp(d_node, d_edge, d_edge_hid, dropout)
        self.edge_mlp1 = _mlp(d_edge, d_edge_hid, dropout)
        self.eln0, self.eln1 = _norm(d_edge, use_ln), _norm(d_edge, use_ln)

    def forward(self, x: Tensor, e: Tensor, pairs: NodePairs) -> Tensor:
        """[P, d_edge] from x [N, d_node] and e [P, d_edge]."""
        e = self.eln0(e + self.edge_mlp0(x, e, pairs))
        return self.eln1(e + self.edge_mlp1(e))


class TransformerLayer(nn.Module):
    """Attention, residual, LayerNorm, mlp, residual, LayerNorm; then the edge update unless it is disabled.

    Args:
        d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid: widths of nodes, edges, attention and mlps.
        n_heads, modulate_v: see `RelationalAttention`.
        dropout: after the attention and every mlp.
        disable_edge_updates: leave edges as they are.
        use_ln: whether there are LayerNorms.
        tfixit_init, n_layers: initial weights of the node mlp times ``0.67 n_layers^(-1/4)``, of the attention that
            times sqrt(2); the edge mlps are left as they are, as in the original.
    """

    def __init__(
        self,
        d_node: int,
        d_edge: int,
        d_attn_hid: int,
        d_node_hid: int,
        d_edge_hid: int,
        n_heads: int,
        dropout: float = 0.0,
        disable_edge_updates: bool = False,
        modulate_v: bool = True,
        use_ln: bool = True,
        tfixit_init: bool = False,
        n_layers: int = 1,
    ):
        super().__init__()
        dropout = float(dropout)
        self.self_attn = RelationalAttention(d_node, d_edge, d_attn_hid, n_heads, modulate_v)
        self.lin0 = _linear(d_node, d_node)
        self.dropout0 = nn.Dropout(dropout)
        self.node_ln0, self.node_ln1 = _norm(d_node, use_ln), _norm(d_node, use_ln)
        self.node_mlp = _mlp(d_node, d_node_hid, dropout)
        self.edge_updates = None
        if not disable_edge_updates:
            self.edge_updates = PairUpdate(d_node, d_edge, d_edge_hid, dropout, use_ln)
        if tfixit_init:
            factor = 0.67 * n_layers**-0.25
            with torch.no_grad():
                for module, gain in ((self.node_mlp, factor), (self.self_attn, factor * 2**0.5)):
                    for name, parameter in module.named_parameters():
                        if "weight" in name:
                            parameter.mul_(gain)

    def forward(
        self,
        x: Tensor,
        features: PairFeatures,
        pairs: NodePairs,
        *,
        update_edges: bool = True,
        rows: RowPairs | None = None,
    ) -> tuple[Tensor, PairFeatures]:
        """Nodes [N, d_node], and the pairs' features, whose update the next layer runs.

        ``update_edges`` False where nothing reads the new edges; then ``rows`` gives those nodes alone, [R, d_node].
        """
        updates = self.edge_updates is not None and update_edges
        attended, features = self.self_attn(x, features, pairs, rows, writes=updates)
        attended = self.lin0(attended)
        x = self.node_ln0((x if rows is None else x[rows.nodes]) + self.dropout0(attended))
        x = self.node_ln1(x + self.node_mlp(x))
        return x, features._replace(update=self.edge_updates, x=x) if updates else features
