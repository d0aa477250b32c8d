"""ScaleGMN as in jkalogero/scalegmn: its classes over our ops, and its live models recognised by their structure."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .. import models
from ..graph import GraphBatch
from ..graph.pyg import from_pyg
from .twin import Correspondence, Option, UnsupportedError, class_name

#: Classes whose ``forward`` we know, by name.
FORWARDS = ("ScaleGMN", "ScaleGMN_equiv")
READOUTS = ("MLPNet", "PermScaleInvariantReadout", "DeepSet")

_ACTIVATIONS = {
    "ELU": "elu", "ReLU": "relu", "SiLU": "silu", "Tanh": "tanh", "Sigmoid": "sigmoid", "Sine": "sine",
    "Identity": "identity", "function": "identity",
}  # fmt: skip


def graph_of(model: models.ScaleGMN, batch: Any) -> GraphBatch:
    """The `GraphBatch` of a call's first argument: itself, that of a packed batch, or made from a PyG batch.

    Raises:
        UnsupportedError: a batch on which the original computes something else: other layouts than the model's, masks
            or types of nodes or edges that do not follow the structure.
    """
    if isinstance(batch, GraphBatch):
        return batch
    packed = getattr(batch, "graph_batch", None)
    if isinstance(packed, GraphBatch):
        return packed
    try:
        graph = from_pyg(batch, type_sizes=tuple(model.options.types))
    except (TypeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error
    layout = tuple(model.options.layout)
    if any(part.layout != layout for part in graph.plan.parts):
        raise UnsupportedError(f"the batch's layouts must be the model's {list(layout)}, got {set(graph.layouts)}")
    return graph


class ScaleGMN(models.ScaleGMN):
    """The original's class of this name: constructed from its ``scalegmn_args``, called with its PyG batches.

    Args:
        model_args: the original's dictionary, with ``layer_layout``; it is not modified. Keys of ours are welcome.

    ``model(batch)`` is [B, d_out]; ``w`` and ``b`` are ignored, as in the original. A `GraphBatch` serves as a batch.

    Raises:
        ValueError: see `models.config.resolve`.
        TypeError, ValueError: a batch that does not fit the model.
    """

    equivariant = False

    def __init__(self, model_args: dict, **kwargs):
        if bool(model_args.get("equivariant", False)) != self.equivariant:
            raise ValueError(
                f"model_args['equivariant'] must be {self.equivariant} for {type(self).__name__}, "
                f"got {model_args.get('equivariant', False)!r}"
            )
        super().__init__(model_args)

    def forward(self, batch, w=None, b=None):
        """[B, d_out], or (weights, biases); see the class."""
        try:
            return super().forward(graph_of(self, batch))
        except UnsupportedError as error:
            raise ValueError(str(error)) from error.__cause__


class ScaleGMN_equiv(ScaleGMN):  # noqa: N801 (the original's name)
    """The original's class of this name, see `ScaleGMN`: ``(weights, biases)``, lists of [B, n_in, n_out, d_e] and
    [B, n_out, d_v].
    """

    equivariant = True


# -- live models -----------------------------------------------------------------------------------------------------


def recognises(module: nn.Module) -> bool:
    """Whether a module looks like one of the original's models."""
    layers = getattr(getattr(module, "gnn", None), "fw_layers", None)
    return isinstance(layers, nn.ModuleList) and hasattr(module, "construct_graph") and hasattr(module, "layer_idx")


def configuration(module: nn.Module) -> dict:
    """The ``scalegmn_args`` of a live model, read off its attributes and shapes.

    Raises:
        AttributeError, IndexError, UnsupportedError: an attribute is missing or has an unknown value.
    """
    gnn, init = module.gnn, module.construct_graph
    layer, symmetry = gnn.fw_layers[0], gnn.symmetry
    scaled, bidirectional = symmetry != "permutation", module.direction == "bidirectional"
    update = gnn.update_node_feats_fn[0] if bidirectional else layer.update_node_feats_fn
    perceptron = next((child for child in gnn.modules() if class_name(child) == "mlp"), None)
    if perceptron is None:
        raise UnsupportedError("gnn holds no mlp")
    args = {
        "num_layers": len(gnn.fw_layers),
        "direction": module.direction,
        "symmetry": symmetry,
        "equivariant": bool(gnn.equivariant),
        "layer_layout": [int(n) for n in module.nodes_per_layer],
        "gnn_skip_connections": bool(gnn.gnn_skip_connections),
        "node_pos_embed": bool(module.node_pos_embed),
        "edge_pos_embed": bool(module.edge_use_pos_embed),
        "graph_init": {
            "d_in_v": init.proj_bias.in_features,
            "d_in_e": init.proj_weight.in_features,
            "d_node": init.proj_bias.out_features,
            "d_edge": init.proj_weight.out_features,
            "project_node_feats": init.project_node_feats,
            "project_edge_feats": init.project_edge_feats,
        },
        "mlp_args": _mlp_args(perceptron),
        "gnn_args": {
            "d_hid": gnn.d_hid,
            "dropout": float(gnn.dropout),
            "update_edge_attr": bool(layer.update_edge_attr),
            "aggregator": layer.aggr,
        },
    }
    if scaled:
        args["gnn_args"] |= {
            **_net_args(layer.message_fn, "msg", "message_fn"),
            "pos_embed_msg": bool(layer.pos_embed_msg),
            "pos_embed_upd": bool(layer.pos_embed_upd),
            "sign_symmetrization": bool(layer.message_fn.eq_layers[0].g.sign_symmetrization),
            "mlp_on_io": bool(layer.message_fn.mlp_on_io),
        }
        if not bidirectional and layer.update_as_act:
            args["gnn_args"] |= {"update_as_act": True, "update_as_act_arg": layer.update_as_act_arg}
        else:
            args["gnn_args"] |= _net_args(update, "upd", "update_node_feats_fn")
    for name in ("positional_embeddings", "positional_embeddings_edge"):
        if hasattr(module, name):
            args["positional_encodings"] = _position_args(getattr(module, name), args.get("positional_encodings"))
    if not gnn.equivariant:
        args |= {"readout_range": gnn.readout_range, "readout_args": _readout_args(gnn)}
    if bidirectional and not gnn.equivariant and gnn.only_last_layer:
        args["concat_mlp_directions"] = bool(gnn.concat_mlp_directions)
    return args


def _mlp_args(module: nn.Module) -> dict:
    return {
        "d_k": [layer.out_features for layer in module.fc[:-1]],
        "activation": _activation(module.activation),
        "final_activation": _activation(module.final_activation),
        "batch_norm": bool(module.batch_norm),
        "layer_norm": bool(module.layer_norm),
        "bias": module.fc[0].bias is not None,
        "skip": bool(module.skip),
        "dropout": float(module.dropout.p),
        "w0": _frequency(module),
    }


def _frequency(module: nn.Module) -> float:
    """The frequency of an mlp's sines; that of configurations if it has none."""
    found = {float(act.w0) for act in (module.activation, module.final_activation) if hasattr(act, "w0")} or {30.0}
    if len(found) > 1:
        raise UnsupportedError("an mlp has sines of two frequencies, which ours has not")
    return found.pop()


def _activation(module: Any) -> str:
    name = type(module).__name__
    if name not in _ACTIVATIONS or getattr(module, "alpha", 1.0) != 1.0:
        raise UnsupportedError(f"an mlp's activation is {module!r}, which is unknown")
    return _ACTIVATIONS[name]


def _net_args(net: nn.Module, kind: str, function: str) -> dict:
    return {
        f"{kind}_equiv_on_hidden": bool(net.equiv_on_hidden),
        f"layer_{kind}_equiv_on_hidden": bool(net.layer_equiv_on_hidden),
        f"{kind}_num_mlps": int(net.num_mlps),
        f"{function}_layers": len(net.eq_layers),
        f"{function}_skip_connections": bool(net.skip_connections),
    }


def _position_args(module: nn.Module, other: dict | None) -> dict:
    args = {
        "final_linear_pos_embed": bool(module.final_linear_pos_embed),
        "sum_pos_enc": bool(module.sum_pos_enc),
        "po_as_different_linear": bool(module.different_linear),
        "equiv_net": bool(module.equiv_net),
        "sum_on_io": bool(module.sum_on_io),
    }
    if module.equiv_net:
        net = module.init_fn
        args |= {
            "num_mlps": int(net.num_mlps),
            "equiv_on_hidden": bool(net.equiv_on_hidden),
            "layer_equiv_on_hidden": bool(net.layer_equiv_on_hidden),
        }
    if other is not None and other != args:
        raise UnsupportedError("positional_embeddings and positional_embeddings_edge have different options")
    return args


def _readout_args(gnn: nn.Module) -> dict:
    readout = gnn.readout
    if class_name(readout) not in READOUTS:
        raise UnsupportedError(f"gnn.readout is a {class_name(readout)}, expected {' or '.join(READOUTS)}")
    last = (readout.rho if class_name(readout) == "MLPNet" else readout.global_mlp).fc[-1]
    if gnn.only_last_layer:
        return {"d_out": last.out_features, "d_rho": gnn.d_hid}
    inner = readout.local_mlp if class_name(readout) == "DeepSet" else readout.phi
    return {"d_out": last.out_features, "d_rho": inner.fc[-1].out_features}


def build(module: nn.Module) -> models.ScaleGMN:
    """Our model with a live one's configuration, giving the original's numbers.

    Raises:
        UnsupportedError: a module or an option that we do not know, or cannot reproduce.
    """
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__).__name__
    if owner not in FORWARDS:
        raise UnsupportedError(f"its forward is that of {owner}, not of {' or '.join(FORWARDS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return models.ScaleGMN(configuration(module))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error


def graph_from_call(model: models.ScaleGMN, batch: Any, w: Any = None, b: Any = None) -> GraphBatch:
    """`graph_of` the original's call."""
    return graph_of(model, batch)


def unreached(model: models.ScaleGMN, graph: GraphBatch) -> tuple[str, ...]:
    """Paths of modules whose parameters the original's backward pass leaves without gradients."""
    if not model.options.equivariant:
        return ("gnn.readout.phi",) if model.config["readout_range"] == "full_graph" else ()
    return (f"gnn.bw_update_edge_attr_fn.{model.options.num_layers - 1}",)


def _attribute(name: str, convert=lambda value: value) -> Option:
    return Option(name, lambda ours: convert(getattr(ours, name)), lambda theirs: convert(getattr(theirs, name)))


SAME = Correspondence(
    classes={
        "ScaleGMN": FORWARDS,
        "Mlp": ("mlp",),
        "MlpNet": ("MLPNet",),
        "InvariantReadout": ("PermScaleInvariantReadout",),
        "ForwardLayer": ("ScaleEq_GNN_layer",),
        "PlainForwardLayer": ("GNN_layer",),
        "EquivariantMessage": ("ScaleGMN_GNN_layer_aggr",),
        "PlainMessage": ("GNN_layer_aggr",),
        "ForwardGnn": ("ScaleGMN_GNN_fw",),
        "BidirectionalGnn": ("ScaleGMN_GNN_bidir",),
        "ModuleDict": ("DeepSetsAggregation",),
    },
    passive=(
        "Dropout", *(name for name in _ACTIVATIONS if name != "function"), "DeepSetsAggregation", "InvariantLayer",
        "SumAggregation", "MeanAggregation", "MaxAggregation",
    ),
    options={
        "Mlp": (
            Option("activation", lambda ours: ours.activation, lambda theirs: _activation(theirs.activation)),
            Option("final_activation", lambda ours: ours.final_activation, lambda m: _activation(m.final_activation)),
            _attribute("skip", bool),
            Option("w0", lambda ours: ours.w0, lambda theirs: _frequency(theirs)),
            Option("layer_norm", lambda ours: ours.ln is not None, lambda theirs: bool(theirs.layer_norm)),
            Option("batch_norm", lambda ours: ours.bn is not None, lambda theirs: bool(theirs.batch_norm)),
        ),
        "InvariantLayer": (_attribute("symmetry"),),
        "InvariantNet": (_attribute("symmetry"), _attribute("equiv_on_hidden", bool)),
        "InvariantReadout": (_attribute("symmetry"),),
        "LayerNorm": (_attribute("eps"),),
        "BatchNorm1d": (_attribute("eps"), _attribute("momentum"), _attribute("track_running_stats")),
    },
    live={
        "Mlp": ("dropout", lambda theirs: theirs.dropout.p),
        "ForwardGnn": ("dropout", lambda theirs: theirs.dropout),
        "BidirectionalGnn": ("dropout", lambda theirs: theirs.dropout),
    },
)  # fmt: skip


def notes(model: models.ScaleGMN) -> list[str]:
    """What does not run in fused kernels, or differs from the original, in a model that runs on our ops."""
    found = []
    if model.config["mlp_args"]["batch_norm"]:
        found.append("batch norm: runs as PyTorch operators, every branch on every row")
    if model.options.gnn["aggregator"] == "max":
        found.append("aggregator 'max': messages run as PyTorch operators")
    if model.gnn.dropout or model.config["mlp_args"]["dropout"]:
        found.append("dropout draws other masks than the original, of the same distribution")
    if model.options.symmetry in ("scale", "hetero"):
        found.append("rows of zeros have the gradient 0 under normalisation (the original's is 1e10)")
    return found
