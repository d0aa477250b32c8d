"""Neural Graphs as in mkofinas/neural-graphs: its classes over our ops, and its live models recognised by structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import models
from ..graph import Architecture, GraphBatch
from ..graph.pyg import from_pyg
from ..models.neural_graphs_base import EDGE_POOLS
from ..reference.activations import activation_name
from .twin import Correspondence, Option, UnsupportedError, class_name

#: Classes of models, by name; those of varying architectures take PyG batches, the others (weights, biases).
FIXED = ("GNNForClassification", "GNNParams", "RelationalTransformer", "RelationalTransformerParams")
VARYING = ("GNNForGeneralization", "DynamicRelationalTransformer")


def graph_of(model: nn.Module, inputs: Any) -> GraphBatch:
    """The `GraphBatch` of a call's argument: itself, that of a packed batch, or made from what the original takes.

    Raises:
        UnsupportedError: a batch on which the original computes something else.
    """
    if isinstance(inputs, GraphBatch):
        return inputs
    packed = getattr(inputs, "graph_batch", None)
    if isinstance(packed, GraphBatch):
        return packed
    try:
        if isinstance(inputs, tuple | list):
            return GraphBatch.from_weights(*inputs, input_value=0.0)
        graph = from_pyg(inputs)
        if hasattr(model.construct_graph, "proj_mlp_weight"):
            _check_linear_edges(inputs)
        return GraphBatch(
            graph.node_features, graph.edge_features, graph.plan, architectures=_architectures(model, inputs)
        )
    except (TypeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error


def _check_linear_edges(batch: Any) -> None:
    """The original projects the edges that ``mlp_edge_masks`` marks as those of linear layers; ours goes by layers."""
    marked, linear = getattr(batch, "mlp_edge_masks", None), getattr(batch, "node_types", None)
    if marked is not None and linear is not None:
        wrong = (marked.reshape(-1) != linear[batch.edge_index[1]].bool()).nonzero()
        if wrong.numel():
            raise ValueError(
                f"batch.mlp_edge_masks must mark the edges into linear layers (node_types of 1), "
                f"got {bool(marked.reshape(-1)[wrong[0]])} for edge {int(wrong[0])}"
            )


def _architectures(model: nn.Module, batch: Any) -> list[Architecture]:
    """What the batch says of its networks' layers."""
    activations = getattr(batch, "activations", None)
    method = model.flattening_method
    pixels = torch.as_tensor(getattr(batch, "fmap_size", 1)).reshape(-1).tolist()
    found = []
    for index, mask in enumerate(batch.conv_mask):
        convolutions = [bool(entry) for entry in mask]
        acts = None if activations is None else tuple(activations[index])
        entry = Architecture(tuple(convolutions), acts)
        if method == "repeat_nodes":
            entry = entry._replace(pixels=int(pixels[index]))
        elif method == "extra_layer":
            convolutions.insert(entry.last_convolution + 1, True)
            entry = entry._replace(convolutions=tuple(convolutions))
        found.append(entry)
    return found


def _served(model: nn.Module, inputs: Any) -> GraphBatch:
    try:
        return graph_of(model, inputs)
    except UnsupportedError as error:
        raise ValueError(str(error)) from error.__cause__


class _TakesWeights:
    """The original's call: ``model((weights, biases))``, or a `GraphBatch`."""

    def forward(self, inputs):
        return super().forward(_served(self, inputs))


class _TakesPyg:
    """The original's call: ``model(batch)`` with its PyG batch of networks, or a `GraphBatch`."""

    def __init__(self, *args, graph_constructor: dict, **kwargs):
        super().__init__(*args, graph_constructor=graph_constructor, **kwargs)
        self.flattening_method = graph_constructor.get("flattening_method", "repeat_nodes")

    def forward(self, batch):
        return super().forward(_served(self, batch))


class GNNForClassification(_TakesWeights, models.GNNForClassification):
    """The original's class of this name; see `models.GNNForClassification`."""


class GNNParams(_TakesWeights, models.GNNParams):
    """The original's class of this name; see `models.GNNParams`."""


class RelationalTransformer(_TakesWeights, models.RelationalTransformer):
    """The original's class of this name; see `models.RelationalTransformer`."""


class RelationalTransformerParams(_TakesWeights, models.RelationalTransformerParams):
    """The original's class of this name; see `models.RelationalTransformerParams`."""


class GNNForGeneralization(_TakesPyg, models.GNNForGeneralization):
    """The original's class of this name, by keyword arguments; see `models.GNNForGeneralization`."""


class DynamicRelationalTransformer(_TakesPyg, models.DynamicRelationalTransformer):
    """The original's class of this name, by keyword arguments; see `models.DynamicRelationalTransformer`."""


# -- live models -----------------------------------------------------------------------------------------------------


def recognises(module: nn.Module) -> bool:
    """Whether a module looks like one of the original's models."""
    return hasattr(module, "construct_graph") and (
        hasattr(getattr(module, "gnn", None), "convs") or isinstance(getattr(module, "layers", None), nn.ModuleList)
    )


def build(module: nn.Module) -> nn.Module:
    """Our model with a live one's configuration, giving the original's numbers.

    Raises:
        UnsupportedError: a module or an option that we do not know, or cannot reproduce.
    """
    owner = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__).__name__
    if owner not in (*FIXED, *VARYING):
        raise UnsupportedError(f"its forward is that of {owner}, not of {' or '.join((*FIXED, *VARYING))}")
    try:
        ours = getattr(models, owner)(**_arguments(owner, module))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error
    ours.flattening_method = getattr(module.construct_graph, "flattening_method", None)
    return ours


def _arguments(owner: str, module: nn.Module) -> dict:
    """Constructor arguments of a live model, read off its attributes and shapes."""
    features = module.construct_graph
    args = {"graph_constructor": _features(features, owner in VARYING)}
    if "rev_edge_features" in vars(features):
        args["rev_edge_features"] = bool(features.rev_edge_features)
    if owner in VARYING:
        args |= {"input_channels": features.num_inputs, "num_classes": features.num_classes}
    else:
        args["layer_layout"] = [int(n) for n in module.nodes_per_layer]
    if hasattr(module, "weight_scale"):
        args |= {"stats": module.stats, "normalize": bool(module.normalize), "d_out": _width(module.proj_node[-1])}
        del args["graph_constructor"]["stats"]
    else:
        args |= {
            "pooling_method": module.pooling_method,
            "pooling_layer_idx": module.pooling_layer_idx,
            "d_out": _width(module.proj_out[-1]),
        }
    if hasattr(module, "gnn"):
        return args | {"d_hid": features.proj_node_in.out_features, "gnn_backbone": _backbone(module.gnn)}
    if owner == "DynamicRelationalTransformer":
        args["d_in"] = args["graph_constructor"].pop("d_in")
    return args | _transformer(owner, module)


def _features(features: nn.Module, varying: bool) -> dict:
    rows = 3 if features.rev_edge_features else 1
    args = {
        "zero_out_bias": bool(features.zero_out_bias),
        "zero_out_weights": bool(features.zero_out_weights),
        "use_pos_embed": bool(features.use_pos_embed),
        "stats": dict(features.stats) or None,
        "d_in": 1,
        "d_edge_in": 1,
    }
    for name, key, share in (("proj_weight", "d_edge_in", rows), ("proj_bias", "d_in", 1)):
        if hasattr(features, name):
            chain = getattr(features, name)
            layers = [layer for layer in chain if class_name(layer) == "Linear"]
            fourier = class_name(chain[0]) == "GaussianEncoding"
            width = chain[0].b.shape[1] if fourier else layers[0].in_features
            args |= {key: width // share, "input_layers": len(layers), "sin_emb": fourier}
            if fourier:
                args["sin_emb_dim"] = chain[0].b.shape[0]
    if varying:
        args |= {
            "max_num_hidden_layers": features.max_num_hidden_layers,
            "linear_as_conv": bool(features.linear_as_conv),
            "flattening_method": features.flattening_method,
            "use_act_embed": bool(features.use_act_embed),
        }
        if hasattr(features, "spatial_embed"):
            args["max_spatial_resolution"] = features.spatial_embed.shape[0]
    elif features.gpf is not None:
        layout = features.nodes_per_layer
        inr = {"in_features": layout[0], "n_layers": len(features.gpf.proj) - 1, "out_features": layout[-1]}
        args |= {"num_probe_features": features.gpf.inputs.shape[1], "inr_model": inr}
    return args


def _backbone(gnn: nn.Module) -> dict:
    conv = gnn.convs[0]
    args = {
        "in_channels": gnn.in_channels,
        "hidden_channels": gnn.hidden_channels,
        "out_channels": gnn.out_channels,
        "num_layers": gnn.num_layers,
        "dropout": float(gnn.dropout),
        "act": None if gnn.act is None else _activation(gnn.act),
        "act_first": bool(gnn.act_first),
        "jk": gnn.jk_mode,
        "update_edge_attr": bool(gnn.update_edge_attr),
        "aggregators": [_snake(class_name(part), "Aggregation") for part in conv.aggr_module.aggr.aggrs],
        "scalers": list(conv.aggr_module.scaler),
        "deg": [0, 1],  # the averages over degrees are the live model's own
        "train_norm": isinstance(conv.aggr_module.avg_deg_lin, nn.Parameter),
        "edge_dim": conv.edge_dim,
        "towers": conv.towers,
        "divide_input": bool(conv.divide_input),
        "pre_layers": sum(class_name(layer) == "Linear" for layer in conv.pre_nns[0]),
        "post_layers": sum(class_name(layer) == "Linear" for layer in conv.post_nns[0]),
        "modulate_edges": bool(conv.modulate_edges),
        "gating_edges": bool(conv.gating_edges),
    }
    if gnn.update_edge_attr:
        args["final_edge_update"] = len(gnn.edge_update) == gnn.num_layers
    if gnn.norms is not None and len(gnn.norms):
        norm = gnn.norms[0]
        args |= {
            "norm": "layernorm",
            "norm_kwargs": {"mode": norm.mode, "eps": float(norm.eps), "affine": norm.weight is not None},
        }
    return args


def _transformer(owner: str, module: nn.Module) -> dict:
    layers = list(module.layers)
    layer, attention = layers[0], layers[0].self_attn
    disabled = [class_name(entry.edge_updates) == "NoEdgeLayer" for entry in layers]
    updates = next((entry.edge_updates for entry, off in zip(layers, disabled, strict=True) if not off), None)
    args = {
        "d_node": attention.d_node,
        "d_edge": attention.d_edge,
        "d_attn_hid": attention.d_hid,
        "d_node_hid": _hidden(layer.node_mlp),
        "d_edge_hid": 1 if updates is None else _hidden(updates.edge_mlp1),
        "d_out_hid": 1,
        "n_layers": len(layers),
        "n_heads": attention.n_heads,
        "dropout": float(layer.dropout0.p),
        "disable_edge_updates": disabled[0],
        "modulate_v": bool(attention.modulate_v),
        "use_ln": class_name(layer.node_ln0) == "LayerNorm",
    }
    if owner != "RelationalTransformerParams":
        args |= {"d_out_hid": _width(module.proj_out[0]), "use_cls_token": bool(module.use_cls_token)}
    return args


def _width(layer: nn.Module) -> int:
    return layer.out_features


def _hidden(chain: nn.Module) -> int:
    """Width after the first layer of an mlp, which copies of a scripted module cannot index."""
    return next(chain.children()).weight.shape[0]


def _snake(name: str, suffix: str) -> str:
    return name.removesuffix(suffix).lower()


def _activation(module: nn.Module) -> str:
    name = class_name(module)
    defaults = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none", "beta": 1, "threshold": 20}
    for key, value in defaults.items():
        if getattr(module, key, value) != value:
            raise UnsupportedError(f"an activation is {module!r}, with other than its default arguments")
    try:
        return activation_name(name)
    except ValueError:
        raise UnsupportedError(f"an activation is {module!r}, which is unknown") from None


def graph_from_call(model: nn.Module, *args, **kwargs) -> GraphBatch:
    """`graph_of` the original's call.

    Raises:
        UnsupportedError: what `graph_of` does not serve, and batches where the original's result depends on padding.
    """
    (inputs,) = (*args, *kwargs.values())
    graph = graph_of(model, inputs)
    if type(model).__name__ in FIXED:
        layers = model.max_hidden_layers + 2
        if any(part.layout is None or len(part.layout) != layers for part in graph.plan.parts):
            raise UnsupportedError(f"the batch's layouts must have {layers} layers, got {set(graph.layouts)}")
        return graph
    sizes = set(map(sum, graph.plan.layer_widths()))
    pads = type(model).__name__ == "DynamicRelationalTransformer" or model.pooling_layer_idx == "all"
    if pads and len(sizes) > 1:
        raise UnsupportedError(
            "networks of different sizes: the original's result depends on its padding, ours does not"
        )
    return graph


def unreached(model: nn.Module, graph: GraphBatch) -> tuple[str, ...] | None:
    """Paths of modules whose parameters the original's backward pass leaves without gradients; None: not known."""
    if getattr(model, "pooling_method", None) in EDGE_POOLS:
        return None
    paths = ["construct_graph.proj_mlp_edge_in"]
    if not any(entry is not None and entry.activations for entry in graph.architectures or ()):
        paths.append("construct_graph.act_emb")
    if hasattr(model, "gnn"):
        if model.gnn.edge_update is not None and len(model.gnn.edge_update) == model.gnn.num_layers:
            paths.append(f"gnn.edge_update.{model.gnn.num_layers - 1}")
    elif not hasattr(model, "weight_scale"):
        paths.append(f"layers.{len(model.layers) - 1}.edge_updates")
    return tuple(paths)


def notes(model: nn.Module) -> list[str]:
    """What does not run in fused kernels, or differs from the original, in a model that runs on our ops."""
    found = []
    if hasattr(model, "gnn"):
        if model.gnn.convs[0].towers > 1:
            found.append("several towers: messages run as PyTorch operators")
        drops = model.gnn.dropout
    else:
        drops = model.layers[0].dropout0.p
    if drops:
        found.append("dropout draws other masks than the original, of the same distribution")
    return found


def _attribute(name: str) -> Option:
    return Option(name, lambda ours: getattr(ours, name), lambda theirs: getattr(theirs, name))


def _equal_activations(name: str, of: Callable[[nn.Module], str]) -> Option:
    return Option(name, of, lambda theirs: _activation(getattr(theirs, name)))


_PASSIVE_ACTIVATIONS = (
    "ReLU", "LeakyReLU", "ELU", "SELU", "GELU", "SiLU", "Mish", "Softplus", "Tanh", "Sigmoid", "Identity",
)  # fmt: skip
SAME = Correspondence(
    classes={
        "Pna": ("PNA",),
        "PnaConv": ("PNAConv",),
        "DegreeScales": ("DegreeScalerAggregation",),
        "GraphFeatures": ("GraphConstructor",),
        "VaryingGraphFeatures": ("GraphConstructor",),
        "FourierFeatures": ("GaussianEncoding",),
        "ProbeFeatures": ("GraphProbeFeatures",),
        "EdgeUpdateMlp": ("EdgeMLP",),
        "NodeNorm": ("LayerNorm",),
        "NodePooling": ("HomogeneousAggregator", "HeterogeneousAggregator"),
        "_Activation": _PASSIVE_ACTIVATIONS,
        "_Jump": ("JumpingKnowledge",),
        "TransformerLayer": ("RTLayer",),
        "RelationalAttention": ("RTAttention",),
        "PairUpdate": ("EdgeLayer",),
        "PairMlp": ("EdgeMLP",),
        "Attentional": ("AttentionalAggregation",),
        "SetTransformer": ("SetTransformerAggregation",),
        "MultisetTransformer": ("GraphMultisetTransformer",),
    },
    passive=(
        *_PASSIVE_ACTIVATIONS, "Dropout", "Rearrange", "NoEdgeLayer", "TrimToLayer", "JumpingKnowledge",
        "MultiAggregation", "FusedAggregation", "SumAggregation", "MeanAggregation", "MinAggregation",
        "MaxAggregation", "StdAggregation", "VarAggregation", "ModuleList", "HomogeneousAggregator",
        "HeterogeneousAggregator", "CatAggregation", "Flatten",
    ),
    options={
        "LayerNorm": (_attribute("eps"),),
        "NodeNorm": (
            _attribute("eps"),
            Option("mode", lambda ours: "node" if ours.scope == "node" else "graph", lambda theirs: theirs.mode),
        ),
        "EdgeUpdateMlp": (_equal_activations("act", lambda ours: ours.act),),
        "_Activation": (Option("name", lambda ours: ours.name, _activation),),
        "PnaConv": (_attribute("towers"), _attribute("divide_input")),
        "RelationalAttention": (_attribute("n_heads"),),
    },
    live={
        "Pna": ("dropout", lambda theirs: theirs.dropout),
        "Dropout": ("p", lambda theirs: theirs.p),
        "PairMlp": ("dropout", lambda theirs: theirs.drop.p),
    },
)  # fmt: skip
