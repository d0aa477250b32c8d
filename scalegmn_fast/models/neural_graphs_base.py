"""What the Neural Graphs models share: checks of batches and poolings, and the editing head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..graph import GraphBatch
from ..nn.graph_features import GraphFeatures, LayerStatistics, VaryingGraphFeatures
from ..nn.pooling import SET_HEADS

#: Poolings of edges.
EDGE_POOLS = ("mean_edge", "max_edge")


def head(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the widths with ReLU between them."""
    modules: list[nn.Module] = []
    for d_in, d_out in zip(widths[:-1], widths[1:], strict=True):
        modules += [nn.ReLU(), nn.Linear(d_in, d_out)]
    return nn.Sequential(*modules[1:])


def _scales(count: int, value: float) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.tensor(value)) for _ in range(count))


def check_pooling(method: str, which: str | int, layout: Sequence[int] | None, width: tuple[str, int]) -> None:
    """Raises ValueError for a pooling that has no meaning, or does not fit the (name, width) of node features."""
    if method in ("set_transformer", "graph_multiset_transformer") and width[1] % SET_HEADS:
        raise ValueError(f"{width[0]} must be divisible by {SET_HEADS} with pooling_method {method!r}, got {width[1]}")
    if method in EDGE_POOLS and which not in ("all", "last"):
        raise ValueError(f"pooling_layer_idx must be 'all' or 'last' with pooling_method {method!r}, got {which!r}")
    if method == "cat_mean" and which != "all":
        raise ValueError(f"pooling_layer_idx must be 'all' with pooling_method 'cat_mean', got {which!r}")
    if method == "cat" and which != "last" and layout is None:
        raise ValueError(f"layer_layout is needed by pooling_method 'cat' of layer {which!r}, got None")
    if layout is not None and isinstance(which, int) and which >= len(layout):
        raise ValueError(f"pooling_layer_idx must be a layer of {list(layout)}, got {which}")


def pooled_width(method: str, which: str | int, layout: Sequence[int] | None, last: int, nodes: int, edges: int) -> int:
    """Width of what a pooling returns."""
    if method in EDGE_POOLS:
        return edges
    if method == "cat_mean":
        return len(layout) * nodes
    if method == "cat":
        return nodes * (last if which == "last" else sum(layout) if which == "all" else layout[which])
    return nodes


class NeuralGraph(nn.Module):
    """What all models share: the check of a batch; and of those with an invariant head, that it reads an embedding."""

    construct_graph: GraphFeatures | VaryingGraphFeatures
    exact_layout = False  # whether every network must have the model's depth

    def forward(self, graph: GraphBatch) -> Tensor:
        return self.read_out(self.embed(graph))

    def embed(self, graph: GraphBatch) -> Tensor:
        """The graph embedding [B, d], what the pooling gives: ``model.read_out(model.embed(graph))`` is
        ``model(graph)``. Raises ValueError for a model that edits networks, else as ``forward``."""
        raise ValueError(f"{type(self).__name__} edits networks: expected a model with an invariant head")

    def read_out(self, embedding: Tensor) -> Tensor:
        """[B, d_out] from what ``embed`` gives."""
        return self.proj_out(embedding)

    def _set_sizes(self, first: int, last: int, hidden_layers: int, d_v: int, d_e: int) -> None:
        self.num_first, self.num_last, self.max_hidden_layers = first, last, hidden_layers
        self.d_v, self.d_e = d_v, d_e

    def _check(self, graph: GraphBatch) -> None:
        if not isinstance(graph, GraphBatch):
            raise TypeError(
                f"graph must be a GraphBatch (GraphBatch.from_weights makes one), got {type(graph).__name__}"
            )
        for name, features, expected in (
            ("biases", graph.node_features, self.d_v),
            ("weights", graph.edge_features, self.d_e),
        ):
            if features.shape[1] != expected:
                raise ValueError(
                    f"{name} must have {expected} numbers each (as the model's config says), got {features.shape[1]}"
                )
        plan = graph.plan
        for layout, count, blocks in plan.parts:
            shown = list(layout) if layout else "a graph that is no stack of layers"
            ends = {kind: sum(b.nodes for b in blocks if b.node_class == kind) for kind in (0, 2)}
            if ends[2] != count * self.num_first or ends[0] != count * self.num_last:
                raise ValueError(
                    f"layout must have {self.num_first} input and {self.num_last} output neurons like the model's, "
                    f"got {shown}"
                )
            if self.exact_layout and (layout is None or len(layout) != self.max_hidden_layers + 2):
                raise ValueError(f"layout must have {self.max_hidden_layers + 2} layers like the model's, got {shown}")
        if plan.max_layer > self.max_hidden_layers + 1:
            raise ValueError(
                f"layout must have at most {self.max_hidden_layers + 2} layers like the model's, "
                f"got {plan.max_layer + 1}"
            )
        if isinstance(self.construct_graph, VaryingGraphFeatures):
            self.construct_graph.check(graph)
        stats = self.construct_graph.stats
        for key, value in stats.values.items():
            if value is not None and value.shape[0] < plan.max_layer:
                raise ValueError(
                    f"stats.{key} must hold a number for each of {plan.max_layer} layers of weights, "
                    f"got {value.shape[0]}"
                )


class Editor:
    """New weights and biases from the last features: mlps, statistics, a learnt scale per layer."""

    def add_heads(self, d_node: int, d_edge: int, d_out: int) -> None:
        self.proj_edge = head([d_edge, d_edge, d_out])
        self.proj_node = head([d_node, d_node, d_out])

    def add_scales(self, layers: int, out_scale: float, normalize: bool, stats) -> None:
        self.weight_scale, self.bias_scale = _scales(layers, out_scale), _scales(layers, out_scale)
        self.restores, self.stats = normalize, LayerStatistics(stats)

    def read_back(self, graph: GraphBatch, x: Tensor, e: Tensor):
        """``GraphBatch.to_weights`` of nodes and edges in plan order, in the networks' scale."""
        found = graph.with_features(x, e).to_weights()
        single = isinstance(found, tuple)
        results = [tuple(map(list, part)) for part in ([found] if single else found)]
        if self.restores:
            results = [
                (self.stats.restored("weights", weights), self.stats.restored("biases", biases))
                for weights, biases in results
            ]
        results = [
            (
                [w * scale for w, scale in zip(weights, self.weight_scale, strict=True)],
                [b * scale for b, scale in zip(biases, self.bias_scale, strict=True)],
            )
            for weights, biases in results
        ]
        return results[0] if single else results
