"""Readouts of Neural Graphs: from the nodes or edges of each graph to one row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..graph import GraphPlan
from ..graph.pairs import NodePairs, NodeSelection, messages_by_graph, network_order, select_nodes, select_pairs

SET_HEADS = 8


def segment_rows(x: Tensor, ptr: Tensor, count: int | None) -> tuple[Tensor, Tensor | None]:
    """Rows of each segment, [B, n, d], and bool [B, n] where they are (None if segments have `count` rows each)."""
    if count is not None:
        return x.unflatten(0, (-1, count)), None
    lengths = ptr.diff().long()
    place = torch.arange(int(lengths.max()), device=x.device)
    mask = place < lengths[:, None]
    slot = (ptr[:-1].long()[:, None] + place).clamp(max=x.shape[0] - 1)
    return torch.where(mask.unsqueeze(2), x[slot], 0), mask


class Attentional(nn.Module):
    """``sum_i softmax_i(gate_nn(x_i)) nn(x_i)`` per graph."""

    def __init__(self, d_in: int, d_hid: int, d_out: int):
        super().__init__()
        self.gate_nn = nn.Sequential(nn.Linear(d_in, d_hid), nn.SiLU(), nn.Linear(d_hid, 1))
        self.nn = nn.Sequential(nn.Linear(d_in, d_hid), nn.SiLU(), nn.Linear(d_hid, d_out))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, d_out] from x [B, n, d_in]; bool [B, n]: which rows there are."""
        gate = self.gate_nn(x)
        if mask is not None:
            gate = gate.masked_fill(~mask.unsqueeze(2), -torch.inf)
        return (torch.softmax(gate, dim=1) * self.nn(x)).sum(1)


class _SetAttention(nn.Module):
    """``h + relu(lin h)`` for ``h = x + attention(x, y, y)``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.lin = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        missing = None if mask is None else ~mask
        h = x + self.attn(x, y, y, missing, need_weights=False)[0]
        return h + torch.relu(self.lin(h))


class _SelfAttention(nn.Module):
    """A set that attends to itself; parameters below ``mab``."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.mab = _SetAttention(width, heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mab(x, x, mask)


class _SeedAttention(nn.Module):
    """Learnt seeds that attend to a set: as many rows as seeds."""

    def __init__(self, width: int, seeds: int, heads: int):
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.seed = nn.Parameter(torch.empty(1, seeds, width))
        nn.init.xavier_uniform_(self.seed)
        self.mab = _SetAttention(width, heads)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.mab(self.seed.expand(x.shape[0], -1, -1), torch.relu(self.lin(x)), mask)


class SetTransformer(nn.Module):
    """Four self-attention blocks over the nodes, one seed that attends to them, four more blocks; 8 heads.

    Source: Lee et al., "Set Transformer", ICML 2019; Buterez et al., "Graph Neural Networks with Adaptive Readouts",
    NeurIPS 2022.
    """

    def __init__(self, width: int):
        super().__init__()
        self.encoders = nn.ModuleList(_SelfAttention(width, SET_HEADS) for _ in range(4))
        self.pma = _SeedAttention(width, 1, SET_HEADS)
        self.decoders = nn.ModuleList(_SelfAttention(width, SET_HEADS) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, width] from x [B, n, width]; bool [B, n]: which rows there are."""
        for block in self.encoders:
            x = block(x, mask)
        x = self.pma(x, mask)
        for block in self.decoders:
            x = block(x)
        return x.squeeze(1)


class MultisetTransformer(nn.Module):
    """Eight seeds that attend to the nodes, a self-attention block over them, one seed that attends to those; 8 heads.

    Source: Baek, Kang, Hwang, "Accurate Learning of Graph Representations with Graph Multiset Pooling", ICLR 2021.
    """

    def __init__(self, width: int):
        super().__init__()
        self.pma1 = _SeedAttention(width, 8, SET_HEADS)
        self.encoders = nn.ModuleList([_SelfAttention(width, SET_HEADS)])
        self.pma2 = _SeedAttention(width, 1, SET_HEADS)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, width] from x [B, n, width]; bool [B, n]: which rows there are."""
        x = self.pma1(x, mask)
        for block in self.encoders:
            x = block(x)
        return self.pma2(x).squeeze(1)


class NodePooling(nn.Module):
    """One row per graph from its nodes.

    Args:
        method: "mean", "max", "cat" (of equally many nodes per graph), "cat_mean" (means of the layers, concatenated),
            "attentional_aggregation", "set_transformer" or "graph_multiset_transformer".
        which: "all" nodes, those of the "last" layer, or of a layer by its number from 0.
        width, hidden: of the nodes, and of the attention's mlps.
        num_layers: layers of neurons, for "cat_mean".
    """

    def __init__(self, method: str, which: str | int, width: int, hidden: int, num_layers: int = 0):
        super().__init__()
        self.method, self.which, self.num_layers = method, which, num_layers
        if method == "attentional_aggregation":
            self.pool = Attentional(width, hidden, width)
        elif method == "set_transformer":
            self.pool = SetTransformer(width)
        elif method == "graph_multiset_transformer":
            self.pool = MultisetTransformer(width)

    def forward(self, x: Tensor, plan: GraphPlan, rows: str = "plan") -> Tensor:
        """[B, d] from nodes [R, width].

        ``rows`` says which, in what order: "plan" (all, or a prefix that holds those that are read), "network" (all),
        or "selected" (those that are read, graph by graph).
        """
        if self.method == "cat_mean":
            layers = range(self.num_layers)
            return torch.cat([self._reduced(x, select_nodes(plan, layer), "mean", rows) for layer in layers], dim=1)
        chosen = select_nodes(plan, self.which)
        if self.method in ("mean", "max"):
            return self._reduced(x, chosen, self.method, rows)
        x = x if rows == "selected" else x[_order(chosen, rows)]
        if self.method == "cat":
            if chosen.count is None:
                raise ValueError("pooling_method 'cat' needs networks of equally many neurons, got different numbers")
            return x.reshape(plan.num_graphs, -1)
        return self.pool(*segment_rows(x, chosen.ptr, chosen.count))

    @staticmethod
    def _reduced(x: Tensor, chosen: NodeSelection, name: str, rows: str) -> Tensor:
        return ops.segment_reduce(x, chosen.ptr, name, order=_order(chosen, rows))


def _order(chosen: NodeSelection, rows: str) -> Tensor | None:
    return {"plan": chosen.plan_rows, "network": chosen.network_rows, "selected": None}[rows]


def pool_messages(e: Tensor, plan: GraphPlan, both_ways: bool, method: str, which: str) -> Tensor:
    """Mean or maximum over all pairs of nodes of each graph, [B, d], where pairs without a message count as 0.

    Args:
        e: [M, d], in the order of `message_edges`; the others as there and for `NodePooling` ("mean_edge", "max_edge";
            "last": pairs whose second node is in the last layer).
    """
    order, ptr = messages_by_graph(plan, both_ways, which == "last")
    if method == "max_edge":
        return torch.relu(ops.segment_reduce(e, ptr, "max", order=order))
    sizes = network_order(plan).ptr.diff()
    columns = select_nodes(plan, which).ptr.diff()
    return ops.segment_reduce(e, ptr, "sum", order=order) / (sizes.to(e.dtype) * columns)[:, None]


def pool_pairs(e: Tensor, plan: GraphPlan, pairs: NodePairs, method: str, which: str, side: str) -> Tensor:
    """Mean or maximum over the pairs of each graph, [B, d], from e [P, d].

    "last": over those whose `side` ("row" or "column") is a last-layer node.
    """
    name = method.removesuffix("_edge")
    if which == "all":
        return ops.segment_reduce(e, pairs.graph_ptr, name)
    order, ptr = select_pairs(pairs, plan, side)
    return ops.segment_reduce(e, ptr, name, order=order)
