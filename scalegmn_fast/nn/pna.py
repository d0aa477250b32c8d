"""The graph network of Neural Graphs: principal neighbourhood aggregation (PNA) with edge features that it updates.

Source: Corso et al., "Principal Neighbourhood Aggregation for Graph Nets", NeurIPS 2020; with updated and modulating
edges: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks", ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from ..graph import GraphPlan
from ..graph.pairs import MessageEdges, network_order
from ..reference.activations import activation, activation_name
from ..reference.edge_mlp import edge_mlp
from ..reference.pna_message import aggregate_statistics, degree_scales, pna_message
from . import fused_neural_graphs
from .fused_neural_graphs import ACTIVATIONS, EdgeState

JUMPS = ("last", "cat", "max", "lstm")
NORM_SCOPES = ("batch", "graph", "node")


class _Activation(nn.Module):
    """Stands at its place in a Sequential of linear layers."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return activation(x, self.name)


def _mlp(d_in: int, d_out: int, layers: int, act: str) -> nn.Sequential:
    modules = [nn.Linear(d_in, d_out)]
    for _ in range(layers - 1):
        modules += [_Activation(act), nn.Linear(d_out, d_out)]
    return nn.Sequential(*modules)


class DegreeScales(nn.Module):
    """Averages of a histogram of degrees, [1] each: of the degree and of ``log(degree + 1)``.

    Args:
        histogram: how many nodes have degree 0, 1, ...
        trained: parameters instead of buffers.
    """

    def __init__(self, histogram: Sequence[int], trained: bool = False):
        super().__init__()
        count = torch.as_tensor(histogram, dtype=torch.float64)
        degree = torch.arange(count.numel(), dtype=torch.float64)
        for name, value in (("avg_deg_lin", degree), ("avg_deg_log", torch.log(degree + 1))):
            average = ((value * count).sum() / count.sum()).reshape(1).to(torch.get_default_dtype())
            if trained:
                self.register_parameter(name, nn.Parameter(average))
            else:
                self.register_buffer(name, average)


class PnaConv(nn.Module):
    """One round of messages: ``lin(post_nn([x, aggregated messages]))``, tower by tower.

    Args:
        d_in, d_out, edge_dim: widths of x, the result and the edge features.
        aggregators, scalers: names, see `reference.pna_message`.
        deg: histogram of degrees for the scalers.
        towers: parts that have their own networks; each reads all of x, or its share with ``divide_input``.
        pre_layers, post_layers: linear layers before and after the aggregation, ReLU between them.
        train_norm: learn the averages of the degrees.
        modulate_edges, gating_edges: "affine", and with both "gate" in `reference.pna_message`; else "concat".
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        aggregators: Sequence[str],
        scalers: Sequence[str],
        deg: Sequence[int],
        edge_dim: int,
        towers: int = 1,
        pre_layers: int = 1,
        post_layers: int = 1,
        divide_input: bool = False,
        train_norm: bool = False,
        modulate_edges: bool = False,
        gating_edges: bool = False,
    ):
        super().__init__()
        self.aggregators, self.scalers = tuple(aggregators), tuple(scalers)
        self.towers, self.divide_input = towers, divide_input
        self.width = d_in // towers if divide_input else d_in
        self.modulation = ("gate" if gating_edges else "affine") if modulate_edges else "concat"
        self.aggr_module = DegreeScales(deg, train_norm)
        self.edge_encoder = nn.Linear(edge_dim, (2 if modulate_edges else 1) * self.width)
        read = (2 if modulate_edges else 3) * self.width
        self.pre_nns = nn.ModuleList(_mlp(read, self.width, pre_layers, "relu") for _ in range(towers))
        aggregated = (len(self.aggregators) * len(self.scalers) + 1) * self.width
        self.post_nns = nn.ModuleList(_mlp(aggregated, d_out // towers, post_layers, "relu") for _ in range(towers))
        self.lin = nn.Linear(d_out, d_out)

    def linear_maps(self, tower: int) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of the maps of a tower's messages."""
        return [(layer.weight, layer.bias) for layer in self.pre_nns[tower] if isinstance(layer, nn.Linear)]

    def forward(
        self, x: Tensor, state: EdgeState, edges: MessageEdges, rows: int | None = None, writes: int = 0, head=()
    ) -> tuple[Tensor, EdgeState]:
        """New features of the first ``rows`` nodes (all if None), and edge features.

        Args:
            x: [N, d_in]; state: of the messages into these rows, or of more.
            writes: of so many edges, into the first rows, the result holds the features after their updates and
                ``head`` (modules as for `fused_neural_graphs.chain`); 0: it is what was given.
        """
        rows = x.shape[0] if rows is None else rows
        if rows < x.shape[0]:
            into = edges.into_last
            edges = edges._replace(source=edges.source[:into], target=edges.target[:into], ptr=edges.ptr[: rows + 1])
        unserved = ["gnn_backbone.towers above 1"] if self.towers > 1 else []
        unserved += [f"gnn_backbone.act {update.act!r}" for update, _ in state.updates if update.act not in ACTIVATIONS]
        if not unserved and fused_neural_graphs.serves(x):
            return self._fused(x, state, edges, rows, writes, head)
        for option in unserved:
            backends.warn_unfused(option, "messages and edge updates run", x)
        e = state.dense(edges.source, edges.target)
        aggregated = pna_message(
            x,
            e,
            edges.source,
            edges.target,
            edges.ptr,
            pre=[self.linear_maps(tower) for tower in range(self.towers)],
            encoder=(self.edge_encoder.weight, self.edge_encoder.bias),
            modulation=self.modulation,
            aggregators=self.aggregators,
            scalers=self.scalers,
            avg_deg_log=self.aggr_module.avg_deg_log,
            avg_deg_lin=self.aggr_module.avg_deg_lin,
            divide_input=self.divide_input,
        )
        own = x[:rows].unflatten(1, (-1, self.width)).expand(-1, self.towers, -1)
        joined = torch.cat([own, aggregated], dim=2)
        out = self.lin(torch.cat([post(joined[:, tower]) for tower, post in enumerate(self.post_nns)], dim=1))
        return out, EdgeState(fused_neural_graphs.chain(head, e[:writes])) if writes else state

    def _fused(self, x: Tensor, state: EdgeState, edges: MessageEdges, rows: int, writes: int, head):
        statistics, written = fused_neural_graphs.message_statistics(self, x, state, edges, rows, writes, head)
        degree = edges.ptr.diff().to(statistics.dtype)
        parts = aggregate_statistics(statistics, degree, self.aggregators)
        averages = (self.aggr_module.avg_deg_log, self.aggr_module.avg_deg_lin)
        scales = degree_scales(degree, self.scalers, *(average.to(statistics.dtype) for average in averages))
        out = fused_neural_graphs.updated_nodes(self, x[:rows], parts, scales)
        return out, EdgeState(written) if writes else state


class EdgeUpdateMlp(nn.Module):
    """``lin1(act(lin_e e + lin_s x_source + lin_t x_target))`` per message."""

    def __init__(self, edge_dim: int, node_dim: int, act: str):
        super().__init__()
        self.act = act
        self.lin_e = nn.Linear(edge_dim, edge_dim)
        self.lin_s = nn.Linear(node_dim, edge_dim)
        self.lin_t = nn.Linear(node_dim, edge_dim)
        self.lin1 = nn.Linear(edge_dim, edge_dim)

    def forward(self, x: Tensor, e: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """[M, edge_dim] from x [N, node_dim], e [M, edge_dim] and the ends of the messages, int64 [M]."""
        edge, from_source, from_target, out = (
            (layer.weight, layer.bias) for layer in (self.lin_e, self.lin_s, self.lin_t, self.lin1)
        )
        return edge_mlp(
            x, e, source, target, edge=edge, from_source=from_source, from_target=from_target, out=out, act=self.act
        )


class NodeNorm(nn.Module):
    """Layer normalisation of node features over the whole batch, each graph, or each node.

    Args:
        width: number of features.
        scope: "batch": one mean and deviation for all numbers of all nodes, ``(x - mean) / (std + eps)``, as the
            original implementation has it; a network's result depends on the others in its batch. "graph":
            ``(x - mean) / sqrt(var + eps)`` over all numbers of a graph. "node": `nn.LayerNorm`.
        eps, affine: as for `nn.LayerNorm`.
    """

    def __init__(self, width: int, scope: str, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.scope, self.eps = scope, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, plan: GraphPlan) -> Tensor:
        """[N, width] -> [N, width], nodes in plan order."""
        if self.scope == "node":
            return F.layer_norm(x, x.shape[1:], self.weight, self.bias, self.eps)
        if self.scope == "batch":
            x = x - x.mean()
            out = x / (x.std(correction=0) + self.eps)
        else:
            order, owner = network_order(plan), plan.index("node_graph")
            x = x - self._graph_means(x, order)[owner]
            out = x / (self._graph_means(x.square(), order) + self.eps).sqrt()[owner]
        return out if self.weight is None else out * self.weight + self.bias

    @staticmethod
    def _graph_means(x: Tensor, order) -> Tensor:
        return ops.segment_reduce(x.mean(dim=1, keepdim=True), order.ptr, "mean", order=order.rows)


class _Jump(nn.Module):
    """Attention over rounds by a bidirectional LSTM; parameters ``lstm.*``, ``att.*``."""

    def __init__(self, width: int, rounds: int):
        super().__init__()
        hidden = rounds * width // 2
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.att = nn.Linear(2 * hidden, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        x = torch.stack(xs, dim=1)
        weights = torch.softmax(self.att(self.lstm(x)[0]), dim=1)
        return (x * weights).sum(dim=1)


class Pna(nn.Module):
    """Rounds of `PnaConv`; normalisation, activation and dropout after each but the last, then `EdgeUpdateMlp`.

    Args:
        in_channels, hidden_channels, out_channels: widths of node features; ``out_channels`` None: hidden.
        num_layers: rounds.
        dropout: after each activation.
        act, act_first: the activation, and whether it stands before the normalisation.
        norm: "layernorm" or None; norm_kwargs: ``mode`` ("graph" or "node"), ``eps``, ``affine``.
        norm_scope: see `NodeNorm`; None for "node" in that mode, else "batch".
        jk: None, or what a linear layer reads of the rounds: "last", "cat" (all), "max" or "lstm". The last round is
            then followed by normalisation and activation too.
        update_edge_attr: update edges between rounds; final_edge_update: have (frozen) parameters for the last, too,
            which computes nothing.
        edge_memory: what who runs this does about ``stores``; see `models.memory`.
        others: see `PnaConv`.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        act: str | None = "relu",
        act_first: bool = False,
        norm: str | None = None,
        norm_kwargs: dict | None = None,
        norm_scope: str | None = None,
        jk: str | None = None,
        update_edge_attr: bool = False,
        final_edge_update: bool = True,
        edge_memory: str = "auto",
        **conv,
    ):
        super().__init__()
        self.edge_memory = edge_memory
        self.dropout, self.act_first, self.jk_mode = float(dropout), act_first, jk
        self.act = "identity" if act is None else activation_name(act)
        self.num_layers = num_layers
        out = hidden_channels if out_channels is None else out_channels
        ends = out if jk is None else hidden_channels
        widths = [in_channels, *[hidden_channels] * (num_layers - 1), ends]
        self.convs = nn.ModuleList(PnaConv(a, b, **conv) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.norms = None
        if norm is not None:
            options = dict(norm_kwargs or {})
            scope = norm_scope or ("node" if options.pop("mode", "graph") == "node" else "batch")
            options.pop("mode", None)
            count = num_layers - (jk is None)
            self.norms = nn.ModuleList(NodeNorm(hidden_channels, scope, **options) for _ in range(count))
        if jk == "lstm":
            self.jk = _Jump(hidden_channels, num_layers)
        if jk is not None:
            self.lin = nn.Linear(hidden_channels * (num_layers if jk == "cat" else 1), out)
        self.edge_update = None
        if update_edge_attr:
            rounds = range(num_layers if final_edge_update else num_layers - 1)
            self.edge_update = nn.ModuleList(
                EdgeUpdateMlp(conv["edge_dim"], hidden_channels, self.act).requires_grad_(index < num_layers - 1)
                for index in rounds
            )

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        edges: MessageEdges,
        plan: GraphPlan,
        *,
        last_only: bool = False,
        stores: bool = True,
        edge_head: Sequence[nn.Module] | None = (),
    ) -> tuple[Tensor, Tensor | None]:
        """(node features, edge features of the messages) after the rounds.

        Args:
            x: [N, in_channels], nodes in plan order; e: [M, edge_dim], edges in the order of the messages.
            last_only: nothing but the last layer's nodes is read: the last round computes only those.
            stores: write updated edges out, instead of updating them again in every round (row programs).
            edge_head: modules that the edges returned pass, as for `fused_neural_graphs.chain`; None: none are read.
        """
        shrinks = last_only and self.jk_mode is None
        rounds, state = [], EdgeState(e)
        for index, conv in enumerate(self.convs):
            left = self.num_layers - 1 - index
            head = edge_head if left == 0 and edge_head is not None else ()
            writes = 0
            if state.updates or head:
                read = edges.into_last if shrinks and left == 1 else e.shape[0]
                writes = read if (stores if left else edge_head is not None) else 0
            rows = plan.num_last if shrinks and left == 0 else None
            x, state = conv(x, state, edges, rows, writes, head)
            if left == 0 and self.jk_mode is None:
                break
            x = self._between(x, index, plan)
            rounds.append(x)
            if self.edge_update is not None and left:
                state = state._replace(updates=(*state.updates, (self.edge_update[index], x)))
        if self.jk_mode is not None:
            x = self.lin(self._jumped(rounds))
        return x, None if edge_head is None else state.e

    def _between(self, x: Tensor, index: int, plan: GraphPlan) -> Tensor:
        norm = None if self.norms is None else self.norms[index]
        if (
            not self.act_first
            and self.act in ACTIVATIONS
            and (norm is None or norm.scope == "batch")
            and fused_neural_graphs.serves(x)
        ):
            return fused_neural_graphs.between_rounds(x, norm, self.act, self.dropout, self.training)
        if self.act_first:
            x = activation(x, self.act)
        if self.norms is not None:
            x = self.norms[index](x, plan)
        if not self.act_first:
            x = activation(x, self.act)
        return F.dropout(x, self.dropout, self.training)

    def _jumped(self, rounds: list[Tensor]) -> Tensor:
        if self.jk_mode == "last":
            return rounds[-1]
        if self.jk_mode == "cat":
            return torch.cat(rounds, dim=1)
        if self.jk_mode == "max":
            return torch.stack(rounds, dim=2).max(dim=2).values
        return self.jk(rounds)
