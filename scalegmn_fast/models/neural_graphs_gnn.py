"""NG-GNN: message passing over the graph of a network. See `neural_graphs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import GraphBatch
from ..graph.pairs import message_edges, nodes_before
from ..nn.fused_neural_graphs import chain
from ..nn.graph_features import GraphFeatures, VaryingGraphFeatures
from ..nn.pna import Pna
from ..nn.pooling import NodePooling, pool_messages
from .memory import keeps_edges
from .neural_graphs_base import EDGE_POOLS, Editor, NeuralGraph, check_pooling, head, pooled_width
from .neural_graphs_config import backbone_arguments, feature_arguments


class _Gnn(NeuralGraph):
    """What the graph networks share."""

    gnn: Pna
    rev_edge_features: bool

    def _run(self, graph: GraphBatch, last_only: bool, edge_head=None) -> tuple[Tensor, Tensor | None]:
        """(nodes in plan order, ``edge_head`` of the messages' features or None) after all rounds."""
        edges = message_edges(graph.plan, self.rev_edge_features)
        x, e = self.construct_graph.nodes(graph), self.construct_graph.edges(graph, order=edges.row)
        copies = 2 * self.gnn.num_layers if torch.is_grad_enabled() else 2
        stores = keeps_edges(self.gnn.edge_memory, copies * e.numel() * e.element_size(), e.device)
        return self.gnn(x, e, edges, graph.plan, last_only=last_only, stores=stores, edge_head=edge_head)


class GNNForClassification(_Gnn):
    """NG-GNN of networks of one layout: [B, d_out].

    Args:
        d_hid: width of node and edge features and of the head.
        d_out: width of the result.
        graph_constructor: arguments of `nn.GraphFeatures` but for the widths and the layout.
        gnn_backbone: arguments of `nn.Pna`; its widths must be ``d_hid``; ``deg`` None for the layout's degrees.
        layer_layout: layer sizes. Batches may hold networks with fewer or wider hidden layers where the pooling allows.
        rev_edge_features: messages against the weights, too.
        pooling_method, pooling_layer_idx: see `nn.NodePooling`; "mean_edge" and "max_edge" are over all pairs of nodes,
            those without an edge count as 0.

    ``model(graph)`` takes a `GraphBatch`; features of its input neurons are not read (they have no bias).
    Deterministic.

    Raises:
        ValueError: an argument out of range, or a batch that does not fit the model.
        TypeError: the input is no `GraphBatch`.
    """

    def __init__(
        self,
        d_hid: int,
        d_out: int,
        graph_constructor: dict,
        gnn_backbone: dict,
        layer_layout: Sequence[int],
        rev_edge_features: bool,
        pooling_method: str,
        pooling_layer_idx: str | int,
        compile: bool = False,
        jit: bool = False,
    ):
        super().__init__()
        layout = list(layer_layout)
        check_pooling(pooling_method, pooling_layer_idx, layout, ("d_hid", d_hid))
        self.rev_edge_features, self.pooling_method = rev_edge_features, pooling_method
        self.pooling_layer_idx = pooling_layer_idx
        features = feature_arguments(
            graph_constructor,
            varying=False,
            d_node=d_hid,
            d_edge=d_hid,
            layer_layout=layout,
            rev_edge_features=rev_edge_features,
        )
        self.construct_graph = GraphFeatures(**features)
        self._set_sizes(layout[0], layout[-1], len(layout) - 2, features["d_in"], features["d_edge_in"])
        self.pool = NodePooling(pooling_method, pooling_layer_idx, d_hid, d_hid, len(layout))
        pooled = pooled_width(pooling_method, pooling_layer_idx, layout, layout[-1], d_hid, d_hid)
        self.proj_out = head([pooled, d_hid, d_hid, d_out])
        self.gnn = Pna(**backbone_arguments(gnn_backbone, d_hid, layout))

    def embed(self, graph: GraphBatch) -> Tensor:
        self._check(graph)
        pools_edges = self.pooling_method in EDGE_POOLS
        reads_last = self.pooling_layer_idx == "last" and not pools_edges
        x, e = self._run(graph, reads_last, () if pools_edges else None)
        if pools_edges:
            both_ways, which = self.rev_edge_features, self.pooling_layer_idx
            return pool_messages(e, graph.plan, both_ways, self.pooling_method, which)
        return self.pool(x, graph.plan)


class GNNForGeneralization(_Gnn):
    """NG-GNN of networks of varying architectures: [B, d_out].

    Args: those of `GNNForClassification`, and
        graph_constructor: arguments of `nn.VaryingGraphFeatures` but for the widths and those below.
        gnn_backbone: with ``deg``, the histogram of degrees.
        input_channels, num_classes: input and output neurons of every network.
        layer_layout: needed by the pooling "cat" of other than the last layer.
    """

    def __init__(
        self,
        d_hid: int,
        d_out: int,
        graph_constructor: dict,
        gnn_backbone: dict,
        rev_edge_features: bool,
        pooling_method: str,
        pooling_layer_idx: str | int,
        compile: bool = False,
        jit: bool = False,
        input_channels: int = 3,
        num_classes: int = 10,
        layer_layout: Sequence[int] | None = None,
    ):
        super().__init__()
        check_pooling(pooling_method, pooling_layer_idx, layer_layout, ("d_hid", d_hid))
        self.rev_edge_features, self.pooling_layer_idx = rev_edge_features, pooling_layer_idx
        features = feature_arguments(
            graph_constructor,
            varying=True,
            d_node=d_hid,
            d_edge=d_hid,
            rev_edge_features=rev_edge_features,
            input_channels=input_channels,
            num_classes=num_classes,
        )
        self.construct_graph = VaryingGraphFeatures(**features)
        hidden = features["max_num_hidden_layers"]
        self._set_sizes(input_channels, num_classes, hidden, features["d_in"], features["d_edge_in"])
        pooled = pooled_width(pooling_method, pooling_layer_idx, layer_layout, num_classes, d_hid, d_hid)
        self.pool = NodePooling(pooling_method, pooling_layer_idx, d_hid, d_hid)
        self.proj_out = head([pooled, d_hid, d_hid, d_out])
        self.gnn = Pna(**backbone_arguments(gnn_backbone, d_hid, None))

    def embed(self, graph: GraphBatch) -> Tensor:
        self._check(graph)
        x, _ = self._run(graph, self.pooling_layer_idx == "last")
        return self.pool(x, graph.plan)


class GNNParams(_Gnn, Editor):
    """NG-GNN that edits networks: ``(weights, biases)`` in the shapes of `GraphBatch.from_weights`, with d_out numbers
    each (a list of pairs for a batch of several layouts).

    Args: those of `GNNForClassification`, and
        stats: see `nn.LayerStatistics`; override those of the ``graph_constructor``.
        normalize: return ``out * std + mean``.
        out_scale: initial factor of every layer.
        exact_bias_readout: read the new bias of a neuron from that neuron, unlike the original (docs/models.md).
    """

    exact_layout = True

    def __init__(
        self,
        d_hid: int,
        d_out: int,
        graph_constructor: dict,
        gnn_backbone: dict,
        layer_layout: Sequence[int],
        rev_edge_features: bool,
        stats: dict | None = None,
        normalize: bool = False,
        compile: bool = False,
        jit: bool = False,
        out_scale: float = 0.01,
        exact_bias_readout: bool = False,
    ):
        super().__init__()
        layout = list(layer_layout)
        self.rev_edge_features, self.exact_bias_readout = rev_edge_features, exact_bias_readout
        features = feature_arguments(
            graph_constructor,
            varying=False,
            d_node=d_hid,
            d_edge=d_hid,
            layer_layout=layout,
            rev_edge_features=rev_edge_features,
            stats=stats,
        )
        self.construct_graph = GraphFeatures(**features)
        self._set_sizes(layout[0], layout[-1], len(layout) - 2, features["d_in"], features["d_edge_in"])
        self.add_heads(d_hid, d_hid, d_out)
        self.gnn = Pna(**backbone_arguments(gnn_backbone, d_hid, layout))
        self.add_scales(len(layout) - 1, out_scale, normalize, stats)

    def forward(self, graph: GraphBatch):
        self._check(graph)
        x, e = self._run(graph, last_only=False, edge_head=self.proj_edge)
        forward = message_edges(graph.plan, self.rev_edge_features).forward
        shifted = None if self.exact_bias_readout else nodes_before(graph.plan, self.num_first)
        return self.read_back(graph, chain(self.proj_node, x, shifted), e if forward is None else e[forward])
