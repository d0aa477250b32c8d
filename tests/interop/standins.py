"""Stand-ins for the originals' models: their tree of modules, attributes and names, computed by the naive oracle.

They hold what `accelerate` may rely on, and nothing of the originals' code. ScaleGMN's result comes from
`reference.scalegmn`; that of Neural Graphs from our own model on the reference backend.
"""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import torch
from torch import nn

import scalegmn_fast
from scalegmn_fast.graph import Architecture, GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.models.config import resolve
from scalegmn_fast.reference.scalegmn import scalegmn
from scalegmn_fast.testing import random_network, random_sign_mask

ACTIVATIONS = {
    "elu": nn.ELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "identity": nn.Identity,
    "gelu": nn.GELU,
}  # fmt: skip
#: Names of the originals' classes, by the class of ours at the same path.
NAMES = {
    "Mlp": "mlp", "MlpNet": "MLPNet", "InvariantReadout": "PermScaleInvariantReadout",
    "ForwardLayer": "ScaleEq_GNN_layer", "PlainForwardLayer": "GNN_layer", "PlainMessage": "GNN_layer_aggr",
    "EquivariantMessage": "ScaleGMN_GNN_layer_aggr", "ForwardGnn": "ScaleGMN_GNN_fw",
    "BidirectionalGnn": "ScaleGMN_GNN_bidir", "Pna": "PNA", "PnaConv": "PNAConv",
    "DegreeScales": "DegreeScalerAggregation", "GraphFeatures": "GraphConstructor",
    "FourierFeatures": "GaussianEncoding", "ProbeFeatures": "GraphProbeFeatures", "EdgeUpdateMlp": "EdgeMLP",
    "VaryingGraphFeatures": "GraphConstructor",
    "NodeNorm": "LayerNorm", "NodePooling": "HomogeneousAggregator", "TransformerLayer": "RTLayer",
    "RelationalAttention": "RTAttention", "PairUpdate": "EdgeLayer", "PairMlp": "EdgeMLP",
}  # fmt: skip
KEPT = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.ModuleList, nn.Sequential, nn.Dropout, nn.Identity, nn.GELU)


def part(name: str) -> nn.Module:
    """An empty module of a class of this name."""
    if name not in globals():
        globals()[name] = type(name, (nn.Module,), {"__module__": __name__})
    return globals()[name]()


def mirrored(ours: nn.Module, describe) -> nn.Module:
    """The tree of modules with the originals' classes; ``describe(ours, theirs)`` adds their attributes."""
    if isinstance(ours, nn.ParameterList) or (isinstance(ours, KEPT) and not isinstance(ours, nn.ModuleList)):
        theirs = copy.deepcopy(ours)
        if isinstance(ours, nn.Sequential):
            for name, child in ours.named_children():
                setattr(theirs, name, mirrored(child, describe))
        return theirs
    if isinstance(ours, nn.ModuleList):
        return nn.ModuleList(mirrored(child, describe) for child in ours)
    kind = type(ours).__name__
    if kind == "_Activation":
        return ACTIVATIONS[ours.name]()
    theirs = part(NAMES.get(kind, kind))
    for name, child in ours.named_children():
        setattr(theirs, name, mirrored(child, describe))
    for name, value in ours.named_parameters(recurse=False):
        theirs.register_parameter(name, nn.Parameter(value.detach().clone()))
    for name, value in ours.named_buffers(recurse=False):
        theirs.register_buffer(name, value.clone())
    describe(ours, theirs)
    return theirs


# -- ScaleGMN --------------------------------------------------------------------------------------------------------


class _ScaleGMN(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = resolve(config)
        for name, child in from_config(config).named_children():
            setattr(self, name, mirrored(child, self._describe))
        self.names = [*dict(self.named_parameters(remove_duplicate=False)), *dict(self.named_buffers())]
        args = self.config
        self.nodes_per_layer, self.direction = args["layer_layout"], args["direction"]
        self.layer_idx = torch.cumsum(torch.tensor([0, *self.nodes_per_layer]), 0)
        self.node_pos_embed, self.edge_use_pos_embed = args["node_pos_embed"], args["edge_pos_embed"]

    def _describe(self, ours: nn.Module, theirs: nn.Module) -> None:
        args, gnn, mlp = self.config, self.config["gnn_args"], self.config["mlp_args"]
        kind = type(theirs).__name__
        if kind == "mlp":
            theirs.activation, theirs.final_activation = (
                ACTIVATIONS[mlp[key]]() for key in ("activation", "final_activation")
            )
            theirs.dropout = nn.Dropout(mlp["dropout"])
            theirs.batch_norm, theirs.layer_norm, theirs.skip = mlp["batch_norm"], mlp["layer_norm"], mlp["skip"]
        elif kind in ("InvariantLayer", "InvariantNet", "PermScaleInvariantReadout"):
            theirs.symmetry, theirs.sign_symmetrization = ours.symmetry, gnn["sign_symmetrization"]
            theirs.equiv_on_hidden = getattr(ours, "equiv_on_hidden", False)
        elif kind == "GraphInit":
            theirs.project_node_feats = theirs.project_edge_feats = True
        elif kind == "PositionalEncoding":
            given = {"different_linear": "po_as_different_linear"}
            for name in ("final_linear_pos_embed", "sum_pos_enc", "different_linear", "equiv_net", "sum_on_io"):
                setattr(theirs, name, args["positional_encodings"][given.get(name, name)])
            if theirs.equiv_net:
                self._describe_net(theirs.init_fn, args["positional_encodings"], "", "message_fn_layers")
        elif kind in ("ScaleGMN_GNN_fw", "ScaleGMN_GNN_bidir"):
            theirs.symmetry, theirs.d_hid, theirs.dropout = args["symmetry"], gnn["d_hid"], gnn["dropout"]
            theirs.equivariant, theirs.gnn_skip_connections = args["equivariant"], args["gnn_skip_connections"]
            theirs.readout_range = args["readout_range"]
            theirs.only_last_layer = theirs.readout_range == "last_layer"
            theirs.concat_mlp_directions = args["concat_mlp_directions"]
            if args["symmetry"] != "permutation":
                for layer in [*theirs.fw_layers, *getattr(theirs, "bw_layers", [])]:
                    self._describe_net(layer.message_fn, gnn, "msg_", "message_fn_layers")
                    if hasattr(layer, "update_node_feats_fn"):
                        self._describe_net(layer.update_node_feats_fn, gnn, "upd_", "update_node_feats_fn_layers")
                for net in getattr(theirs, "update_node_feats_fn", []):
                    self._describe_net(net, gnn, "upd_", "update_node_feats_fn_layers")
        elif hasattr(theirs, "message_fn"):
            theirs.aggr, theirs.update_edge_attr = gnn["aggregator"], gnn["update_edge_attr"]
            theirs.update_as_act, theirs.update_as_act_arg = gnn["update_as_act"], gnn["update_as_act_arg"]
            theirs.pos_embed_msg, theirs.pos_embed_upd = gnn["pos_embed_msg"], gnn["pos_embed_upd"]

    @staticmethod
    def _describe_net(net: nn.Module, options: dict, kind: str, layers: str) -> None:
        if type(net).__name__ != "EquivariantNet":
            return
        net.equiv_on_hidden, net.num_mlps = options[f"{kind}equiv_on_hidden"], options[f"{kind}num_mlps"]
        net.layer_equiv_on_hidden = options[f"layer_{kind}equiv_on_hidden"]
        net.mlp_on_io = options.get("mlp_on_io", False)
        net.skip_connections = hasattr(net, "skip_layers")

    def forward(self, batch, w=None, b=None):
        weights, biases, value = networks_of(batch, self.nodes_per_layer)
        state = {name: functools.reduce(getattr, name.split("."), self) for name in self.names}
        return scalegmn(
            self.config, state, weights, biases, input_value=value, sign_mask=getattr(batch, "sign_mask", None)
        )


class ScaleGMN(_ScaleGMN):
    def forward(self, batch, w=None, b=None):
        return super().forward(batch, w, b)


class ScaleGMN_equiv(_ScaleGMN):  # noqa: N801
    def forward(self, batch, w=None, b=None):
        return super().forward(batch, w, b)


def scalegmn_model(config: dict) -> nn.Module:
    return (ScaleGMN_equiv if config["equivariant"] else ScaleGMN)(config)


def networks_of(batch, layout):
    """(weights, biases, input value) of a batch in the original's order of rows."""
    count = len(batch.ptr) - 1
    x, e = batch.x.unflatten(0, (count, -1)), batch.edge_attr.unflatten(0, (count, -1))
    first, *biases = x.split(list(layout), 1)
    sizes = [a * b for a, b in zip(layout[:-1], layout[1:], strict=True)]
    weights = [w.unflatten(1, (a, b)) for w, a, b in zip(e.split(sizes, 1), layout[:-1], layout[1:], strict=True)]
    return weights, biases, float(first.flatten()[0])


class Batch(SimpleNamespace):
    """What the original's scripts use of a PyG batch."""

    def to(self, target):
        return Batch(**{k: v.to(target) if torch.is_tensor(v) else v for k, v in vars(self).items()})


def graph_fields(config: dict) -> dict:
    """Attributes of one network's graph that all networks of a layout share."""
    layout, forward = config["layer_layout"], config["direction"] == "forward"
    starts = [0, *torch.tensor(layout).cumsum(0).tolist()]
    layer = torch.arange(len(layout)).repeat_interleave(torch.tensor(layout)).unsqueeze(1)
    blocks = [
        torch.cartesian_prod(torch.arange(a) + starts[i], torch.arange(b) + starts[i + 1])
        for i, (a, b) in enumerate(zip(layout[:-1], layout[1:], strict=True))
    ]
    edge_index = torch.cat(blocks).T.contiguous()
    fields = {"edge_index": edge_index} | ({} if forward else {"bw_edge_index": edge_index.flip(0)})
    return fields | {"mask_hidden": (layer > 0) & (layer < len(layout) - 1), "mask_first_layer": layer == 0}


def scalegmn_batch(config: dict, count: int = 3, seed: int = 0, dtype=torch.float64) -> Batch:
    """A batch of random networks as PyG collates it."""
    generator = torch.Generator().manual_seed(seed)
    layout, d_e = config["layer_layout"], resolve(config)["graph_init"]["d_in_e"]
    weights, biases = random_network(layout, count, d_e=d_e, generator=generator)
    fields = graph_fields(config)
    nodes = sum(layout)
    offset = torch.arange(count).repeat_interleave(fields["edge_index"].shape[1]) * nodes
    joined = {
        name: value.repeat(1, count) + offset if "index" in name else value.repeat(count, 1)
        for name, value in fields.items()
    }
    first = torch.ones(count, layout[0], 1, dtype=weights[0].dtype)
    if config["symmetry"] == "hetero":
        joined["sign_mask"] = random_sign_mask(layout, count, per_neuron=False, generator=generator)
    return Batch(
        x=torch.cat([first, *biases], 1).flatten(0, 1).to(dtype),
        edge_attr=torch.cat([w.flatten(1, 2) for w in weights], 1).flatten(0, 1).to(dtype),
        label=torch.randint(0, 2, (count,), generator=generator),
        batch=torch.arange(count).repeat_interleave(nodes), ptr=torch.arange(count + 1) * nodes, num_graphs=count,
        **joined,
    )  # fmt: skip


# -- Neural Graphs ---------------------------------------------------------------------------------------------------


class _NeuralGraph(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        object.__setattr__(self, "ours", from_config(config))
        self.config, self.nodes_per_layer = config, config["layer_layout"]
        for name in ("pooling_method", "pooling_layer_idx", "use_cls_token", "normalize"):
            if name in config:
                setattr(self, name, config[name])
        if "out_scale" in config or "normalize" in config:
            self.stats = config["stats"]
        for name, child in self.ours.named_children():
            setattr(self, name, mirrored(child, self._describe))

    def _describe(self, ours: nn.Module, theirs: nn.Module) -> None:
        config, kind = self.config, type(theirs).__name__
        if kind == "GraphConstructor":
            theirs.rev_edge_features, theirs.nodes_per_layer = (
                config.get("rev_edge_features", False),
                self.nodes_per_layer,
            )
            for name in ("zero_out_bias", "zero_out_weights"):
                setattr(theirs, name, config["graph_constructor"].get(name, False))
            theirs.use_pos_embed = config["graph_constructor"].get("use_pos_embed", True)
            theirs.stats = config.get("stats") or config["graph_constructor"].get("stats") or {}
            theirs.gpf = getattr(theirs, "gpf", None)
            if "input_channels" in config:
                theirs.num_inputs, theirs.num_classes = config["input_channels"], config["num_classes"]
                for name in ("max_num_hidden_layers", "linear_as_conv", "flattening_method", "use_act_embed"):
                    setattr(theirs, name, config["graph_constructor"][name])
        elif kind == "PNA":
            given = config["gnn_backbone"]
            for name in ("in_channels", "hidden_channels", "out_channels", "num_layers", "dropout", "update_edge_attr"):
                setattr(theirs, name, given[name])
            theirs.act, theirs.act_first, theirs.jk_mode = ACTIVATIONS[given["act"]](), False, None
            for update in theirs.edge_update:
                update.act = theirs.act
        elif kind == "PNAConv":
            given = config["gnn_backbone"]
            for name in ("edge_dim", "modulate_edges", "gating_edges"):
                setattr(theirs, name, given[name])
            theirs.towers, theirs.divide_input = 1, False
            theirs.aggr_module.scaler = given["scalers"]
            theirs.aggr_module.aggr = part("MultiAggregation")
            names = (f"{name.capitalize()}Aggregation" for name in given["aggregators"])
            theirs.aggr_module.aggr.aggrs = nn.ModuleList(map(part, names))
        elif kind == "LayerNorm":
            theirs.mode, theirs.eps = "graph", ours.eps
        elif kind == "RTAttention":
            theirs.d_node, theirs.d_edge, theirs.d_hid = (config[f"d_{name}"] for name in ("node", "edge", "attn_hid"))
            theirs.n_heads, theirs.modulate_v = config["n_heads"], config["modulate_v"]
        elif kind == "RTLayer" and ours.edge_updates is None:
            theirs.edge_updates = part("NoEdgeLayer")
        elif kind == "EdgeMLP" and hasattr(ours, "dropout"):
            theirs.drop = nn.Dropout(ours.dropout)

    def run(self, inputs, architectures=None):
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        ours = self.ours.train(self.training)
        graph = GraphBatch.from_weights(*inputs, input_value=0.0)
        graph = GraphBatch(graph.node_features, graph.edge_features, graph.plan, architectures=architectures)
        with scalegmn_fast.backend("reference"):
            return torch.func.functional_call(ours, state, (graph,))


class GNNForClassification(_NeuralGraph):
    def forward(self, inputs):
        return self.run(inputs)


class GNNParams(_NeuralGraph):
    def forward(self, inputs):
        return self.run(inputs)


class RelationalTransformer(_NeuralGraph):
    def forward(self, inputs):
        return self.run(inputs)


class RelationalTransformerParams(_NeuralGraph):
    def forward(self, inputs):
        return self.run(inputs)


class _Cnns(_NeuralGraph):
    def run_batch(self, batch):
        *inputs, _ = networks_of(batch, self.nodes_per_layer)
        acts = getattr(batch, "activations", [None] * len(batch.conv_mask))
        known = [Architecture(tuple(map(bool, mask)), a) for mask, a in zip(batch.conv_mask, acts, strict=True)]
        return self.run(inputs, known)


class GNNForGeneralization(_Cnns):
    def forward(self, batch):
        return self.run_batch(batch)


class DynamicRelationalTransformer(_Cnns):
    def forward(self, batch):
        return self.run_batch(batch)


def cnn_batch(config: dict, count: int = 3, dtype=torch.float64) -> Batch:
    """A batch of CNNs with one linear layer as PyG collates it, their activations known."""
    layout, kernel = config["layer_layout"], config["graph_constructor"]["d_edge_in"]
    generator = torch.Generator().manual_seed(0)
    weights, biases = random_network(layout, count, d_e=kernel, generator=generator)
    weights[-1][..., 1:] = 0  # the linear layer's one number
    nodes, fields = sum(layout), graph_fields({**config, "direction": "forward"})
    offset = torch.arange(count).repeat_interleave(fields["edge_index"].shape[1]) * nodes
    edge_index = fields["edge_index"].repeat(1, count) + offset
    linear = (torch.arange(nodes) >= nodes - layout[-1]).long().repeat(count)
    first = torch.zeros(count, layout[0], 1, dtype=weights[0].dtype)
    hidden = len(layout) - 2
    return Batch(
        x=torch.cat([first, *biases], 1).flatten(0, 1).to(dtype), edge_index=edge_index,
        edge_attr=torch.cat([w.flatten(1, 2) for w in weights], 1).flatten(0, 1).to(dtype),
        batch=torch.arange(count).repeat_interleave(nodes), ptr=torch.arange(count + 1) * nodes,
        conv_mask=[[1] * hidden + [0]] * count, activations=[("relu", "tanh", "gelu")[:hidden]] * count,
        node_types=linear, mlp_edge_masks=linear[edge_index[1]].bool(), fmap_size=torch.ones(count, dtype=torch.int64),
    )  # fmt: skip


def neural_graphs_model(config: dict) -> nn.Module:
    return globals()[config["_target_"].rpartition(".")[2]](config)
