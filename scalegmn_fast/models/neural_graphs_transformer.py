"""NG-T: attention over all pairs of neurons of a network. See `neural_graphs`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import GraphBatch
from ..graph.pairs import NodePairs, network_order, node_pairs, pair_edge_rows, pairs_of_rows
from ..nn.fused_neural_graphs import PairFeatures, chain
from ..nn.graph_features import GraphFeatures, VaryingGraphFeatures
from ..nn.pooling import NodePooling, pool_pairs
from ..nn.relational_transformer import TransformerLayer
from ..nn.rows import GatheredRows
from .neural_graphs_base import EDGE_POOLS, Editor, NeuralGraph, check_pooling, head, pooled_width
from .neural_graphs_config import feature_arguments


class _Transformer(NeuralGraph):
    """What the transformers share."""

    def add_layers(self, args: dict, disabled: Sequence[bool]) -> None:
        self.layers = nn.ModuleList(
            TransformerLayer(**args, disable_edge_updates=is_disabled, n_layers=len(disabled))
            for is_disabled in disabled
        )

    def _run(
        self, graph: GraphBatch, reads_edges: bool, token: Tensor | None = None, reads: str | int = "all"
    ) -> tuple[Tensor, Tensor | None, NodePairs]:
        """(nodes in network order, pairs' features if something reads them, pairs) after all layers.

        Where only some nodes are read (``reads`` as for `select_nodes`, or the tokens) and no edges, those alone.
        """
        plan, both_ways, has_token = graph.plan, self.construct_graph.rev_edge_features, token is not None
        pairs = node_pairs(plan, has_token)
        x, e = self.construct_graph.nodes(graph), self.construct_graph.edges(graph, absent=True)
        if has_token:
            x, e = torch.cat([x, token.unsqueeze(0)]), F.pad(e, (0, 0, 0, 1))
        x = x[pairs.order]
        row, back = pair_edge_rows(plan, both_ways, has_token)
        features = PairFeatures(GatheredRows(e, row), back=back)
        rows = None
        if not reads_edges and (has_token or reads != "all"):
            rows = pairs_of_rows(plan, reads, has_token)
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            updates = reads_edges or not is_last
            x, features = layer(x, features, pairs, update_edges=updates, rows=rows if is_last else None)
        return x, features.dense(pairs) if reads_edges else None, pairs


class _TransformerClassifier(_Transformer):
    """What the transformers with an invariant head share."""

    edge_side: str

    def add_body(
        self, args: dict, n_layers: int, disable: bool, use_cls_token: bool, method: str, which: str | int
    ) -> None:
        if use_cls_token != (method == "cls_token"):
            raise ValueError(
                "use_cls_token must be True with pooling_method 'cls_token' and False with others, "
                f"got {use_cls_token} with {method!r}"
            )
        self.pooling_method, self.pooling_layer_idx = method, which
        keeps = method == "mean_edge" or which == "all"
        self.add_layers(args, [not keeps and (disable or index == n_layers - 1) for index in range(n_layers)])

    def embed(self, graph: GraphBatch) -> Tensor:
        self._check(graph)
        method, which, plan = self.pooling_method, self.pooling_layer_idx, graph.plan
        pools_edges = method in EDGE_POOLS
        reads = "all" if method == "cat_mean" else which
        x, e, pairs = self._run(graph, pools_edges, getattr(self, "cls_token", None), reads)
        if method == "cls_token":
            return x
        if pools_edges:
            return pool_pairs(e, plan, pairs, method, which, self.edge_side)
        return self.pool(x, plan, "network" if reads == "all" else "selected")


class RelationalTransformer(_TransformerClassifier):
    """NG-T of networks of one layout: [B, d_out].

    Args:
        d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid: see `nn.TransformerLayer`.
        d_out_hid, d_out: widths of the head's hidden layer and result.
        n_layers, n_heads: number of layers and of heads.
        layer_layout, graph_constructor, rev_edge_features, pooling_method, pooling_layer_idx: as for
            `GNNForClassification` (the pooling's pairs have features of their own here). "cls_token" reads a learnt
            node that stands before the neurons.
        dropout, modulate_v, use_ln, tfixit_init: see `nn.TransformerLayer`.
        node_update_type: "rt".
        disable_edge_updates: in all layers but with the pooling "mean_edge" or of "all" layers; else edges are updated
            in all layers but the last.
        use_cls_token: True with, and only with, the pooling "cls_token".

    Inputs, determinism and errors as for `GNNForClassification`.
    """

    edge_side = "column"

    def __init__(
        self,
        d_node: int,
        d_edge: int,
        d_attn_hid: int,
        d_node_hid: int,
        d_edge_hid: int,
        d_out_hid: int,
        d_out: int,
        n_layers: int,
        n_heads: int,
        layer_layout: Sequence[int],
        graph_constructor: dict,
        dropout: float = 0.0,
        node_update_type: str = "rt",
        disable_edge_updates: bool = False,
        use_cls_token: bool = True,
        pooling_method: str = "cat",
        pooling_layer_idx: str | int = "last",
        rev_edge_features: bool = False,
        modulate_v: bool = True,
        use_ln: bool = True,
        tfixit_init: bool = False,
    ):
        super().__init__()
        layout = list(layer_layout)
        check_pooling(pooling_method, pooling_layer_idx, layout, ("d_node", d_node))
        _check_transformer(node_update_type, d_attn_hid, n_heads)
        features = feature_arguments(
            graph_constructor,
            varying=False,
            d_node=d_node,
            d_edge=d_edge,
            layer_layout=layout,
            rev_edge_features=rev_edge_features,
        )
        self.construct_graph = GraphFeatures(**features)
        self._set_sizes(layout[0], layout[-1], len(layout) - 2, features["d_in"], features["d_edge_in"])
        if use_cls_token:
            self.cls_token = nn.Parameter(torch.randn(d_node))
        args = _layer_args(
            d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, n_heads, dropout, modulate_v, use_ln, tfixit_init
        )
        self.add_body(args, n_layers, disable_edge_updates, use_cls_token, pooling_method, pooling_layer_idx)
        self.pool = NodePooling(pooling_method, pooling_layer_idx, d_node, d_out_hid, len(layout))
        pooled = pooled_width(pooling_method, pooling_layer_idx, layout, layout[-1], d_node, d_edge)
        self.proj_out = head([pooled, d_out_hid, d_out])


class DynamicRelationalTransformer(_TransformerClassifier):
    """NG-T of networks of varying architectures: [B, d_out].

    Args: those of `RelationalTransformer`, and
        d_in: numbers per bias.
        graph_constructor: arguments of `nn.VaryingGraphFeatures` but for the widths and those below.
        input_channels, num_classes, layer_layout: as for `GNNForGeneralization`.
        pooling_method: "mean_edge" of the last layer is over the pairs whose first node is in it.
    """

    edge_side = "row"

    def __init__(
        self,
        d_in: int,
        d_node: int,
        d_edge: int,
        d_attn_hid: int,
        d_node_hid: int,
        d_edge_hid: int,
        d_out_hid: int,
        d_out: int,
        n_layers: int,
        n_heads: int,
        graph_constructor: dict,
        dropout: float = 0.0,
        node_update_type: str = "rt",
        disable_edge_updates: bool = False,
        use_cls_token: bool = True,
        pooling_method: str = "cat",
        pooling_layer_idx: str | int = "last",
        rev_edge_features: bool = False,
        modulate_v: bool = True,
        use_ln: bool = True,
        tfixit_init: bool = False,
        input_channels: int = 3,
        num_classes: int = 10,
        layer_layout: Sequence[int] | None = None,
    ):
        super().__init__()
        check_pooling(pooling_method, pooling_layer_idx, layer_layout, ("d_node", d_node))
        _check_transformer(node_update_type, d_attn_hid, n_heads)
        features = feature_arguments(
            graph_constructor,
            varying=True,
            d_in=d_in,
            d_node=d_node,
            d_edge=d_edge,
            rev_edge_features=rev_edge_features,
            input_channels=input_channels,
            num_classes=num_classes,
        )
        self.construct_graph = VaryingGraphFeatures(**features)
        hidden = features["max_num_hidden_layers"]
        self._set_sizes(input_channels, num_classes, hidden, d_in, features["d_edge_in"])
        if use_cls_token:
            self.cls_token = nn.Parameter(torch.randn(d_node))
        args = _layer_args(
            d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, n_heads, dropout, modulate_v, use_ln, tfixit_init
        )
        self.add_body(args, n_layers, disable_edge_updates, use_cls_token, pooling_method, pooling_layer_idx)
        self.pool = NodePooling(pooling_method, pooling_layer_idx, d_node, d_out_hid)
        pooled = pooled_width(pooling_method, pooling_layer_idx, layer_layout, num_classes, d_node, d_edge)
        self.proj_out = head([pooled, d_out_hid, d_out_hid, d_out])


class RelationalTransformerParams(_Transformer, Editor):
    """NG-T that edits networks; see `RelationalTransformer` and, for ``stats``, ``normalize``, ``out_scale`` and the
    result, `GNNParams`. ``d_out_hid`` has no effect, as in the original.
    """

    exact_layout = True

    def __init__(
        self,
        d_node: int,
        d_edge: int,
        d_attn_hid: int,
        d_node_hid: int,
        d_edge_hid: int,
        d_out_hid: int,
        d_out: int,
        n_layers: int,
        n_heads: int,
        layer_layout: Sequence[int],
        graph_constructor: dict,
        dropout: float = 0.0,
        node_update_type: str = "rt",
        disable_edge_updates: bool = False,
        rev_edge_features: bool = False,
        modulate_v: bool = True,
        use_ln: bool = True,
        tfixit_init: bool = False,
        stats: dict | None = None,
        normalize: bool = False,
        out_scale: float = 0.01,
    ):
        super().__init__()
        layout = list(layer_layout)
        _check_transformer(node_update_type, d_attn_hid, n_heads)
        features = feature_arguments(
            graph_constructor,
            varying=False,
            d_node=d_node,
            d_edge=d_edge,
            layer_layout=layout,
            rev_edge_features=rev_edge_features,
            stats=stats,
        )
        self.construct_graph = GraphFeatures(**features)
        self._set_sizes(layout[0], layout[-1], len(layout) - 2, features["d_in"], features["d_edge_in"])
        args = _layer_args(
            d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, n_heads, dropout, modulate_v, use_ln, tfixit_init
        )
        self.add_layers(args, [disable_edge_updates] * n_layers)
        self.add_heads(d_node, d_edge, d_out)
        self.add_scales(len(layout) - 1, out_scale, normalize, stats)

    def forward(self, graph: GraphBatch):
        self._check(graph)
        x, e, pairs = self._run(graph, reads_edges=True)
        place = network_order(graph.plan).place
        return self.read_back(graph, chain(self.proj_node, x, place), chain(self.proj_edge, e, pairs.of_edge))


def _layer_args(
    d_node, d_edge, d_attn_hid, d_node_hid, d_edge_hid, n_heads, dropout, modulate_v, use_ln, tfixit_init
) -> dict:
    return dict(locals())


def _check_transformer(node_update_type: str, d_attn_hid: int, n_heads: int) -> None:
    if node_update_type != "rt":
        raise ValueError(f"node_update_type must be 'rt', the only one there is, got {node_update_type!r}")
    if d_attn_hid % n_heads:
        raise ValueError(f"n_heads must divide d_attn_hid, {d_attn_hid}, got {n_heads}")
