"""ScaleGMN: graph metanetworks equivariant to the permutations and scalings of the networks they read.

Source: Kalogeropoulos, Bouritsas, Panagakis, "Scale Equivariant Graph Metanetworks", NeurIPS 2024; spec, whole page.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..graph import GraphBatch
from ..graph.ends import reversed_edge_types, rows_by_graph, types_at
from ..nn import (
    CarriedMessage,
    DeepSet,
    EdgeUpdate,
    EquivariantMessage,
    EquivariantNet,
    FactoredEdges,
    GatheredRows,
    GraphInit,
    InvariantReadout,
    Mlp,
    MlpNet,
    PlainMessage,
    PositionalEncoding,
    SineUpdate,
    WorkPlan,
    fused,
    set_work_plan,
)
from ..nn.rows import Rows, dense, narrow, take
from ..nn.work import PlannedModule
from .config import resolve
from .memory import keeps_edges
from .rounds import (
    Types,
    backward_messages,
    edge_encoding_classes,
    ends_split,
    forward_messages,
    node_classes,
)


class _Options:
    """What every part of the model reads of its configuration."""

    def __init__(self, args: dict):
        gnn = args["gnn_args"]
        self.args, self.gnn, self.mlp = args, gnn, args["mlp_args"]
        self.symmetry, self.equivariant = args["symmetry"], args["equivariant"]
        self.num_layers, self.d_hid = args["num_layers"], gnn["d_hid"]
        self.d_node, self.d_edge = args["graph_init"]["d_node"], args["graph_init"]["d_edge"]
        self.d_in_v, self.d_in_e = args["graph_init"]["d_in_v"], args["graph_init"]["d_in_e"]
        self.eps = args["canonical_eps"]
        self.updates_edges = gnn["update_edge_attr"]
        self.symmetrizes = gnn["sign_symmetrization"]
        self.layout = args["layer_layout"]
        self.types = Types(self.layout[0], len(self.layout) - 2)
        self.edge_types = self.types if args["edge_pos_embed"] else None
        self.reads_edges_once = self.symmetry != "hetero" and args["bidirectional_edges"] != "carried"

    def is_last(self, index: int) -> bool:
        return index == self.num_layers - 1

    def widths(self, index: int) -> tuple[int, int]:
        """(node width, edge width) of a round's input."""
        if index == 0:
            return self.d_node, self.d_edge
        return self.d_hid, self.d_hid if self.updates_edges else self.d_edge

    def node_output(self, index: int) -> int:
        return self.d_in_v if self.equivariant and self.is_last(index) else self.d_hid

    def edge_update(self, index: int, d_out: int) -> EdgeUpdate:
        d_out = self.d_in_e if self.equivariant and self.is_last(index) else d_out
        return EdgeUpdate(self.widths(index)[0], d_out, self.mlp, self.symmetry, self.symmetrizes, self.eps)

    def message(self, index: int) -> nn.Module:
        d_v, d_e = self.widths(index)
        if self.symmetry == "permutation":
            return PlainMessage(self.d_hid, self.gnn["aggregator"], self.mlp)
        return EquivariantMessage(d_v, d_e, **self.message_args())

    def message_args(self) -> dict:
        return {
            "d_hid": self.d_hid,
            "aggregator": self.gnn["aggregator"],
            "n_layers": self.gnn["message_fn_layers"],
            "skip_connections": self.gnn["message_fn_skip_connections"],
            **self.net("msg", self.gnn["pos_embed_msg"]),
        }

    def carried(self, index: int) -> CarriedMessage:
        d_v, d_e = self.widths(index)
        return CarriedMessage(
            d_v,
            d_e,
            self.d_hid,
            self.gnn["aggregator"],
            mlp_args=self.mlp,
            symmetry=self.symmetry,
            sign_symmetrization=self.symmetrizes,
            d_extra=self.d_hid * self.gnn["pos_embed_msg"],
            eps=self.eps,
        )

    def update(self, index: int, d_in: int) -> nn.Module:
        d_out = self.node_output(index)
        if self.symmetry == "permutation":
            return MlpNet(d_in, d_out, self.mlp)
        return EquivariantNet(
            self.gnn["update_node_feats_fn_layers"],
            d_in,
            d_out,
            skip_connections=self.gnn["update_node_feats_fn_skip_connections"],
            **self.net("upd", self.gnn["pos_embed_upd"]),
        )

    def net(self, kind: str, extra: bool) -> dict:
        return {
            "mlp_args": self.mlp,
            "d_extra": self.d_hid * bool(extra),
            "symmetry": self.symmetry,
            "equiv_on_hidden": self.gnn[f"{kind}_equiv_on_hidden"],
            "layer_equiv_on_hidden": self.gnn[f"layer_{kind}_equiv_on_hidden"],
            "mlp_on_io": self.gnn["mlp_on_io"],
            "num_mlps": self.gnn[f"{kind}_num_mlps"],
            "sign_symmetrization": self.symmetrizes,
            "eps": self.eps,
        }


class _NodeAndEdgeUpdate:
    """The updates of a forward round, beside its message function (in the original's parameter names)."""

    def add_updates(self, options: _Options, index: int) -> None:
        d_v, _ = options.widths(index)
        gnn = options.gnn
        self.act = gnn["update_as_act_arg"] if gnn["update_as_act"] and options.symmetry != "permutation" else None
        if self.act == "cat":
            self.update_node_feats_fn = SineUpdate(options.d_hid + d_v, options.node_output(index))
        elif self.act == "sum":
            self.w_msg = nn.Linear(options.d_hid, d_v, bias=False)
            self.w_h = nn.Linear(d_v, d_v, bias=False)
            self.update_node_feats_fn = SineUpdate(d_v, options.node_output(index))
        else:
            self.update_node_feats_fn = options.update(index, options.d_hid + d_v)
        if options.updates_edges and (options.equivariant or not options.is_last(index)):
            self.update_edge_attr_fn = options.edge_update(index, options.d_hid)

    def update_nodes(self, x: Tensor, aggregated: Tensor, p: Rows | None, classes) -> Tensor:
        """New features of the rows that received."""
        if self.act == "sum":
            return self.update_node_feats_fn(self.w_h(x) + self.w_msg(aggregated))
        joined = torch.cat([x, aggregated], dim=1)
        if self.act == "cat":
            return self.update_node_feats_fn(joined)
        return _update(self.update_node_feats_fn, joined, p, classes)


class ForwardLayer(EquivariantMessage, _NodeAndEdgeUpdate):
    """One round of the forward model: message, node update, edge update."""

    def __init__(self, options: _Options, index: int):
        super().__init__(*options.widths(index), **options.message_args())
        self.add_updates(options, index)


class PlainForwardLayer(PlainMessage, _NodeAndEdgeUpdate):
    """One round of the forward model for the symmetry ``permutation``."""

    def __init__(self, options: _Options, index: int):
        super().__init__(options.d_hid, options.gnn["aggregator"], options.mlp)
        self.add_updates(options, index)


def _update(module: nn.Module, joined: Tensor, p: Rows | None, classes) -> Tensor:
    return module(joined) if isinstance(module, MlpNet) else module(joined, p, classes)


class _Gnn(PlannedModule):
    """What both directions share: rounds' skips and dropout, and the invariant head."""

    def __init__(self, options: _Options):
        super().__init__()
        self.options = options
        args = options.args
        self.dropout = options.gnn["dropout"]
        self.reads_last_only = not options.equivariant and args["readout_range"] == "last_layer"
        self.drops_output = args["dropout_equivariant_output"]
        self.edge_memory = args["edge_memory"]
        if not options.equivariant:
            self.num_first, self.num_last = options.layout[0], options.layout[-1]

    def add_skips_and_readout(self, d_readout: int) -> None:
        options, args = self.options, self.options.args
        if args["gnn_skip_connections"]:
            rounds = options.num_layers - options.equivariant
            self.skip_layers = nn.ModuleList(nn.Linear(options.d_hid, options.d_hid, bias=False) for _ in range(rounds))
        if options.equivariant:
            return
        d_out, d_rho = args["readout_args"]["d_out"], args["readout_args"]["d_rho"]
        if self.reads_last_only:
            self.readout = MlpNet(d_readout, d_out, options.mlp)
        elif options.symmetry == "permutation":
            self.readout = DeepSet(options.d_hid, d_rho, d_out, options.mlp)
        else:
            self.readout = InvariantReadout(
                options.d_hid,
                d_rho,
                d_out,
                options.mlp,
                options.symmetry,
                self.num_first + self.num_last,
                options.symmetrizes,
                options.eps,
            )

    def next_x(self, index: int, x: Tensor, updated: Tensor) -> Tensor:
        if hasattr(self, "skip_layers") and index < len(self.skip_layers):
            updated = self.skip_layers[index](x) + updated
        is_output = self.options.equivariant and self.options.is_last(index)
        if is_output and not self.drops_output:
            return updated
        return F.dropout(updated, self.dropout, self.training)

    def keeps_edges(self, plan, x: Tensor) -> bool:
        """Whether updated edge features are written out (``edge_memory``)."""
        copies = 2 * self.options.num_layers if torch.is_grad_enabled() else 2
        return keeps_edges(self.edge_memory, copies * plan.num_edges * self.options.d_hid * x.element_size(), x.device)

    def forward(self, *inputs):
        """Arguments as of ``rounds``; [B, d_out], or (nodes, edges) for an equivariant head."""
        x, e = self.rounds(*inputs)
        return (x, e) if self.options.equivariant else self.readout(*self.readout_inputs(inputs[0], x))

    def embed(self, *inputs) -> Tensor:
        """What the readout's last mlp reads, [B, d]; arguments as of ``rounds``."""
        read = self.readout_inputs(inputs[0], self.rounds(*inputs)[0])
        return read[0] if self.reads_last_only else self.readout.embed(*read)

    def readout_inputs(self, graph: GraphBatch, x: Tensor) -> tuple:
        """Arguments of the readout from the nodes after all rounds."""
        if self.reads_last_only:
            return (self.ends(graph, x),)
        if isinstance(self.readout, DeepSet):
            return (x, *rows_by_graph(graph.plan, hidden_only=False))
        return (x, node_classes(graph), *rows_by_graph(graph.plan, hidden_only=True))


class ForwardGnn(_Gnn):
    """Rounds along the weights only."""

    def __init__(self, options: _Options):
        super().__init__(options)
        layer = PlainForwardLayer if options.symmetry == "permutation" else ForwardLayer
        self.fw_layers = nn.ModuleList(layer(options, index) for index in range(options.num_layers))
        self.add_skips_and_readout(options.layout[-1] * options.d_hid)

    def rounds(self, graph: GraphBatch, x: Tensor, e: Rows, p: GatheredRows | None) -> tuple[Tensor, Rows]:
        """(nodes, edges) after all rounds; of the nodes those alone that the readout reads, and what precedes them."""
        plan, options = graph.plan, self.options
        shrinks = self.reads_last_only and self.work.liveness
        keeps = self.keeps_edges(plan, x)
        for index, layer in enumerate(self.fw_layers):
            remaining = options.num_layers - 1 - index
            receivers = plan.live_nodes(remaining) if shrinks else plan.num_nodes
            edges = forward_messages(graph, x.shape[0], receivers, e, options.edge_types)
            reads_p = options.gnn["pos_embed_msg"] and options.symmetry != "permutation"
            message_p = None
            if reads_p:
                message_p = GatheredRows(p.table, types_at(plan, "target", *options.types)[: edges.receiver.shape[0]])
            update, needed = getattr(layer, "update_edge_attr_fn", None), 0
            if update is not None:
                needed = plan.edges_into(plan.live_nodes(remaining - 1)) if shrinks else plan.num_edges
            nodes = node_classes(graph, x.shape[0])
            keep = keeps or options.is_last(index)
            aggregated, updated_e = layer.aggregate(
                x, e, edges, message_p, update, needed, nodes, keep, options.reads_edges_once
            )
            e = e if updated_e is None else updated_e
            rows = node_classes(graph, receivers)
            update_p = narrow(p, 0, receivers) if options.gnn["pos_embed_upd"] else None
            x = narrow(x, 0, receivers)
            x = self.next_x(index, x, layer.update_nodes(x, aggregated, update_p, rows))
        return x, e

    def ends(self, graph: GraphBatch, x: Tensor) -> Tensor:
        """Last-layer nodes, [B, n_L * d_hid]."""
        return x[: graph.plan.num_last].reshape(graph.plan.num_graphs, -1)


class BidirectionalGnn(_Gnn):
    """Rounds along and against the weights."""

    def __init__(self, options: _Options):
        super().__init__(options)
        rounds = range(options.num_layers)
        self.edges_back = options.args["bidirectional_edges"]
        self.fw_layers = nn.ModuleList(options.message(index) for index in rounds)
        self.add_skips_and_readout(2 * options.d_hid)
        back = options.carried if self.edges_back == "carried" else options.message
        self.bw_layers = nn.ModuleList(back(index) for index in rounds)
        self.update_node_feats_fn = nn.ModuleList(
            options.update(index, options.widths(index)[0] + 2 * options.d_hid) for index in rounds
        )
        self.updates_back = options.updates_edges and options.symmetry == "scale" and self.edges_back != "carried"
        if options.updates_edges:
            updated = [index for index in rounds if options.equivariant or not options.is_last(index)]
            self.fw_update_edge_attr_fn = nn.ModuleList(
                options.edge_update(index, options.widths(index)[1]) for index in updated
            )
            if self.updates_back:
                self.bw_update_edge_attr_fn = nn.ModuleList(
                    options.edge_update(index, options.widths(index)[1]) for index in updated
                )
                if options.equivariant:
                    self.bw_update_edge_attr_fn[-1].requires_grad_(False)
        if self.reads_last_only:
            for name, count in (("project_first", self.num_first), ("project_last", self.num_last)):
                if options.args["concat_mlp_directions"]:
                    setattr(self, name, Mlp(count * options.d_hid, options.d_hid, **options.mlp))
                else:
                    setattr(self, name, nn.Linear(count * options.d_hid, options.d_hid))

    def rounds(self, graph: GraphBatch, x: Tensor, e: Rows, p: GatheredRows | None, back: Rows) -> tuple[Tensor, Rows]:
        """As `ForwardGnn.rounds`; ``back``: the reversed edges in ``plan.source_order`` (plan order if ``carried``)."""
        plan, options = graph.plan, self.options
        carried = self.edges_back == "carried"
        reads_p = options.gnn["pos_embed_msg"] and options.symmetry != "permutation"
        keeps = self.keeps_edges(plan, x)
        for index in range(options.num_layers):
            keep = keeps or options.is_last(index)
            ends_only = self.reads_last_only and self.work.liveness and options.is_last(index)
            receivers = plan.num_last if ends_only else plan.num_nodes
            along = forward_messages(graph, x.shape[0], receivers, e, options.edge_types)
            against_features = e if carried else back
            against = backward_messages(graph, ends_only, ordered=not carried)
            if ends_only and not carried:
                count = against.sender.shape[0]
                against_features = narrow(back, plan.num_edges - count, count)

            along_p = against_p = None
            if reads_p:
                stop, start = along.sender.shape[0], plan.num_edges - against.sender.shape[0]
                along_p = GatheredRows(p.table, types_at(plan, "source", *options.types)[:stop])
                against_p = GatheredRows(p.table, types_at(plan, "reversed", *options.types)[start:])

            update = back_update = None
            if options.updates_edges and index < len(self.fw_update_edge_attr_fn):
                update = self.fw_update_edge_attr_fn[index]
                if self.updates_back and not options.is_last(index):
                    back_update = self.bw_update_edge_attr_fn[index]
            classes, edges = node_classes(graph), plan.num_edges
            before, once = e, options.reads_edges_once
            from_inputs, e = self.fw_layers[index].aggregate(x, e, along, along_p, update, edges, classes, keep, once)
            from_outputs, updated_back = self.bw_layers[index].aggregate(
                x,
                before if carried else against_features,
                against,
                against_p,
                back_update,
                edges,
                classes,
                keep,
                once,
            )
            e, back = before if e is None else e, back if updated_back is None else updated_back
            rows, update_p = node_classes(graph), p
            if ends_only:
                first = plan.num_nodes - plan.num_first
                x = torch.cat([x[: plan.num_last], x[first:]])
                from_inputs = F.pad(from_inputs, (0, 0, 0, plan.num_first))
                from_outputs = F.pad(from_outputs, (0, 0, plan.num_last, 0))
                rows = rows._replace(hidden=0, split=ends_split(graph))
                if p is not None:
                    update_p = GatheredRows(p.table, types_at(plan, "outer", *options.types))
            joined = torch.cat([x, from_inputs, from_outputs], dim=1)
            update_p = update_p if options.gnn["pos_embed_upd"] else None
            x = self.next_x(index, x, _update(self.update_node_feats_fn[index], joined, update_p, rows))
        return x, e

    def ends(self, graph: GraphBatch, x: Tensor) -> Tensor:
        """Projections of last-layer and of first-layer nodes, [B, 2 d_hid]."""
        graphs, plan = graph.plan.num_graphs, graph.plan
        last = self.project_last(x[: plan.num_last].reshape(graphs, -1))
        first = self.project_first(x[x.shape[0] - plan.num_first :].reshape(graphs, -1))
        return torch.cat([last, first], dim=1)


class ScaleGMN(PlannedModule):
    """ScaleGMN over a `GraphBatch`; use `models.from_config` to build one from a configuration.

    ``model(graph)`` gives [B, d_out] (invariant head) or ``(weights, biases)`` in the shapes of
    ``GraphBatch.from_weights`` (equivariant head; a list of pairs for a batch of several layouts).
    ``model.embed(graph)`` gives the graph embedding [B, d] that an invariant head's last mlp reads.

    The batch may mix layouts: input and output layers must have the model's widths, hidden layers may have any width,
    and there may be fewer of them (an equivariant head wants the model's number of layers). The batch is not modified.
    Deterministic on every backend. Parameter names are those of the original implementation.

    Raises:
        TypeError: the input is no `GraphBatch`.
        ValueError: a batch that does not fit the model (feature widths, layer sizes, depth, a missing sign mask).
    """

    def __init__(self, config):
        super().__init__()
        args = resolve(config)
        options = _Options(args)
        self.options, self.config = options, args
        init = args["graph_init"]
        self.construct_graph = GraphInit(**init)
        types = options.types
        if args["node_pos_embed"]:
            count = types.num_first + types.num_hidden_layers + options.layout[-1]
            self.positional_embeddings = self._encoding("node", init["d_node"], count)
        if args["edge_pos_embed"]:
            count = types.num_first
            if len(options.layout) > 2:
                count += types.num_hidden_layers - 1 + options.layout[-1]
            self.positional_embeddings_edge = self._encoding("edge", init["d_edge"], count)
        bidirectional = args["direction"] == "bidirectional"
        self.gnn = BidirectionalGnn(options) if bidirectional else ForwardGnn(options)
        if options.equivariant:
            scales = [nn.ParameterList(_scalar(args["out_scale"]) for _ in options.layout[1:]) for _ in range(2)]
            self.weight_scale, self.bias_scale = scales
        if args["mlp_args"]["batch_norm"]:
            set_work_plan(self, WorkPlan.none())

    def _encoding(self, param: str, width: int, count: int) -> PositionalEncoding:
        options = self.options
        return PositionalEncoding(
            width,
            width,
            count,
            param,
            **options.args["positional_encodings"],
            num_layers=options.gnn["message_fn_layers"],
            mlp_args=options.mlp,
            symmetry=options.symmetry,
            sign_symmetrization=options.symmetrizes,
            mlp_on_io=options.gnn["mlp_on_io"],
            eps=options.eps,
        )

    def forward(self, graph: GraphBatch):
        out = self.gnn(*self._gnn_inputs(graph))
        return self._read_back(graph, *out) if self.options.equivariant else out

    def embed(self, graph: GraphBatch) -> Tensor:
        """The graph embedding [B, d]: ``model.read_out(model.embed(graph))`` is ``model(graph)``.

        d is ``layout[-1] * d_hid`` (forward) or ``2 * d_hid`` (bidirectional) for readouts of the last layer; over the
        full graph ``d_rho``, for other symmetries than ``permutation`` and ``d_hid`` for each input and output neuron.

        Raises ValueError for an equivariant head, else as ``forward``.
        """
        if self.options.equivariant:
            raise ValueError("equivariant: expected a model with an invariant head, got one that returns networks")
        return self.gnn.embed(*self._gnn_inputs(graph))

    def read_out(self, embedding: Tensor) -> Tensor:
        """[B, d_out] from what ``embed`` gives."""
        return (self.gnn.readout if self.gnn.reads_last_only else self.gnn.readout.global_mlp)(embedding)

    def _gnn_inputs(self, graph: GraphBatch) -> tuple:
        self._check(graph)
        options, plan = self.options, graph.plan
        if options.symmetry != "hetero" and graph.sign_mask is not None:
            graph = GraphBatch(graph.node_features, graph.edge_features, plan)
        if self.config["mlp_args"]["batch_norm"]:
            backends.warn_unfused("mlp_args.batch_norm", "the whole model runs", graph.node_features)
        x = self.construct_graph.nodes(graph.node_features)
        p = None
        if hasattr(self, "positional_embeddings"):
            types = plan.node_types(*options.types)
            x = self.positional_embeddings(x, types, node_classes(graph))
            p = GatheredRows(self.positional_embeddings.pos_embed, types)
        e = self._edges(graph, graph.edge_features)
        if isinstance(self.gnn, ForwardGnn):
            return graph, x, e, p
        return graph, x, e, p, self._reversed_edges(graph, e)

    def _edges(self, graph: GraphBatch, features: Tensor) -> Rows:
        edges = self.construct_graph.edges(features)
        if not hasattr(self, "positional_embeddings_edge"):
            return edges
        exact = self.config["exact_edge_encoding"] and self.config["positional_encodings"]["equiv_net"]
        types = graph.plan.edge_types(*self.options.types)
        return self.positional_embeddings_edge(edges, types, edge_encoding_classes(graph, exact))

    def _reversed_edges(self, graph: GraphBatch, e: Rows) -> Rows:
        mode = self.gnn.edges_back
        if mode == "carried":
            return e
        if mode == "reciprocal":
            e = self._edges(graph, _reciprocal(graph.edge_features))
        rows = take(e, graph.plan.index("source_order"))
        if isinstance(rows, FactoredEdges) and rows.types is not None:
            rows = rows._replace(types=reversed_edge_types(graph.plan, *self.options.types))
        return rows

    def _read_back(self, graph: GraphBatch, x: Tensor, e: Tensor):
        parts = graph.with_features(x, dense(fused.written(e))).to_weights()
        single = isinstance(parts, tuple)
        scaled = [
            (
                [w * s for w, s in zip(weights, self.weight_scale, strict=True)],
                [b * s for b, s in zip(biases, self.bias_scale, strict=True)],
            )
            for weights, biases in ([parts] if single else parts)
        ]
        return scaled[0] if single else scaled

    def _check(self, graph: GraphBatch) -> None:
        if not isinstance(graph, GraphBatch):
            raise TypeError(
                f"graph must be a GraphBatch (GraphBatch.from_weights makes one), got {type(graph).__name__}"
            )
        options, plan = self.options, graph.plan
        for name, features, expected in (
            ("biases", graph.node_features, options.d_in_v),
            ("weights", graph.edge_features, options.d_in_e),
        ):
            if features.shape[1] != expected:
                raise ValueError(
                    f"{name} must have {expected} numbers each (as the model's config says), got {features.shape[1]}"
                )
        if options.symmetry == "hetero" and graph.sign_mask is None:
            raise ValueError("sign_mask is needed by symmetry 'hetero', got a batch without one")
        model = list(options.layout)
        fixed = (
            not options.equivariant
            or hasattr(self, "positional_embeddings")
            or hasattr(self, "positional_embeddings_edge")
        )
        for layout, count, blocks in plan.parts:
            shown = list(layout) if layout else "a graph that is no stack of layers"
            ends = {kind: sum(b.nodes for b in blocks if b.node_class == kind) for kind in (0, 2)}
            if fixed and (ends[2] != count * model[0] or ends[0] != count * model[-1]):
                raise ValueError(
                    f"layout must have {model[0]} input and {model[-1]} output neurons "
                    f"like the model's {model}, got {shown}"
                )
            if options.equivariant and (layout is None or len(layout) != len(model)):
                raise ValueError(f"layout must have {len(model)} layers like the model's {model}, got {shown}")
        if plan.max_layer > len(model) - 1:
            raise ValueError(
                f"layout must have at most {len(model)} layers like the model's {model}, got {plan.max_layer + 1}"
            )


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(float(value)))


def _reciprocal(weights: Tensor) -> Tensor:
    """``w / ||w||^2`` per edge, 0 where w = 0: scales as q_source / q_target."""
    square = weights.square().sum(dim=1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, weights / torch.where(zero, 1.0, square))
