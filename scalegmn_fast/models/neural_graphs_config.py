"""Configurations of the Neural Graphs models: the original's constructor dictionaries, checked and completed.

hydra's own keys (``_target_``, ``_recursive_``, ``_convert_``) are ignored but for the model's ``_target_``. Keys that
are marked as ours are not in the original; their defaults give its behaviour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..nn.pna import JUMPS, NORM_SCOPES
from ..reference.activations import activation_name
from ..reference.pna_message import SCALERS
from ..reference.segment_reduce import REDUCTIONS
from .config import _unknown
from .memory import EDGE_MEMORY

_REQUIRED = object()
_HYDRA = ("_target_", "_recursive_", "_convert_")


class _Key(NamedTuple):
    """A key's check (raises ValueError with what was expected) and default."""

    check: Callable[[str, Any], Any]
    default: Any = _REQUIRED


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {value!r}")


def _integer(low: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise _wrong(name, f"an integer of at least {low}", value)
        return value

    return check


def _number(low: float, high: float = float("inf")) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
            try:
                value = float(value)
            except ValueError:
                pass
        if isinstance(value, bool | str) or not isinstance(value, int | float) or not low <= value < high:
            raise _wrong(name, f"a number in [{low:g}, {high:g})", value)
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _choice(*known: str | None) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise _wrong(name, f"one of {', '.join(map(str, known))}", value)
        return value

    return check


def _names(known: Sequence[str]) -> Callable[[str, Any], tuple[str, ...]]:
    def check(name: str, value: Any) -> tuple[str, ...]:
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not value or any(entry not in known for entry in value) or len(set(value)) < len(value):
            raise _wrong(name, f"a list of different names out of {', '.join(known)}", value)
        return tuple(value)

    return check


def _layout(name: str, value: Any) -> list[int]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or len(value) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value):
        raise _wrong(name, "a list of at least two positive layer sizes", value)
    return list(value)


def _histogram(name: str, value: Any) -> list[int]:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or any(not isinstance(n, int) or n < 0 for n in value) or sum(value[1:]) < 1:
        raise _wrong(name, "a histogram of degrees (how many nodes have degree 0, 1, ...; some above 0)", value)
    return list(value)


def _section(name: str, value: Any) -> dict:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {type(value).__name__}")
    return dict(value)


def _activation(name: str, value: Any) -> str:
    try:
        return activation_name(value)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('act: ')}") from None


def _empty(name: str, value: Any) -> dict:
    if value is not None and (not isinstance(value, Mapping) or value):
        raise _wrong(name, "None (activations with other than their default arguments are not supported)", value)
    return {}


def _layer_index(name: str, value: Any) -> str | int:
    if value in ("all", "last") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise _wrong(name, "'all', 'last' or a layer's number from 0", value)


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


_SIZE, _WIDTH, _COUNT = _integer(1), _integer(1), _integer(0)
_PROBABILITY = _number(0, 1)

_FEATURES = {
    "rev_edge_features": _Key(_flag, False),
    "zero_out_bias": _Key(_flag, False),
    "zero_out_weights": _Key(_flag, False),
    "inp_factor": _Key(_number(0), 1.0),
    "input_layers": _Key(_SIZE, 1),
    "sin_emb": _Key(_flag, False),
    "sin_emb_dim": _Key(_SIZE, 128),
    "use_pos_embed": _Key(_flag, True),
    "num_probe_features": _Key(_COUNT, 0),
    "inr_model": _Key(_optional(_section), None),
    "stats": _Key(_optional(_section), None),
}
#: Keys of ``graph_constructor``; widths and layout come from the model.
FIXED_FEATURES = {"d_in": _Key(_WIDTH), "d_edge_in": _Key(_WIDTH), **_FEATURES}
VARYING_FEATURES = {
    "d_in": _Key(_WIDTH),
    "d_edge_in": _Key(_WIDTH),
    "max_num_hidden_layers": _Key(_COUNT),
    **_FEATURES,
    "input_channels": _Key(_SIZE, 3),
    "linear_as_conv": _Key(_flag, True),
    "flattening_method": _Key(_choice("repeat_nodes", "extra_layer", None), "repeat_nodes"),
    "max_spatial_resolution": _Key(_SIZE, 64),
    "num_classes": _Key(_SIZE, 10),
    "use_act_embed": _Key(_flag, True),
    "shift_weight_stats": _Key(_flag, True),  # ours
}
#: Keys of ``gnn_backbone``.
BACKBONE = {
    "in_channels": _Key(_WIDTH),
    "hidden_channels": _Key(_WIDTH),
    "num_layers": _Key(_SIZE),
    "out_channels": _Key(_optional(_WIDTH), None),
    "dropout": _Key(_PROBABILITY, 0.0),
    "act": _Key(_optional(_activation), "relu"),
    "act_first": _Key(_flag, False),
    "act_kwargs": _Key(_empty, None),
    "norm": _Key(_optional(_choice("layernorm", "layer_norm", "LayerNorm")), None),
    "norm_kwargs": _Key(_optional(_section), None),
    "norm_scope": _Key(_optional(_choice(*NORM_SCOPES)), None),  # ours
    "jk": _Key(_optional(_choice(*JUMPS)), None),
    "update_edge_attr": _Key(_flag, False),
    "final_edge_update": _Key(_flag, True),
    "aggregators": _Key(_names(REDUCTIONS)),
    "scalers": _Key(_names(SCALERS)),
    "deg": _Key(_optional(_histogram), None),
    "edge_dim": _Key(_WIDTH),
    "towers": _Key(_SIZE, 1),
    "pre_layers": _Key(_SIZE, 1),
    "post_layers": _Key(_SIZE, 1),
    "divide_input": _Key(_flag, False),
    "train_norm": _Key(_flag, False),
    "modulate_edges": _Key(_flag, False),
    "gating_edges": _Key(_flag, False),
    "edge_memory": _Key(_choice(*EDGE_MEMORY), "auto"),  # ours
}
_INR = {
    "in_features": _Key(_SIZE, 2),
    "n_layers": _Key(_integer(2), 3),
    "hidden_features": _Key(_SIZE, 32),
    "out_features": _Key(_SIZE, 1),
    "pe_features": _Key(_optional(_SIZE), None),
    "fix_pe": _Key(_flag, True),
}
_NORM = {"mode": _Key(_choice("graph", "node"), "graph"), "eps": _Key(_number(0), 1e-5), "affine": _Key(_flag, True)}

_GNN = {
    "d_hid": _Key(_WIDTH),
    "d_out": _Key(_WIDTH),
    "graph_constructor": _Key(_section),
    "gnn_backbone": _Key(_section),
    "compile": _Key(_flag, False),
    "jit": _Key(_flag, False),
}
_TRANSFORMER = {
    "d_node": _Key(_WIDTH),
    "d_edge": _Key(_WIDTH),
    "d_attn_hid": _Key(_WIDTH),
    "d_node_hid": _Key(_WIDTH),
    "d_edge_hid": _Key(_WIDTH),
    "d_out_hid": _Key(_WIDTH),
    "d_out": _Key(_WIDTH),
    "n_layers": _Key(_SIZE),
    "n_heads": _Key(_SIZE),
    "graph_constructor": _Key(_section),
    "dropout": _Key(_PROBABILITY, 0.0),
    "node_update_type": _Key(_choice("rt"), "rt"),
    "disable_edge_updates": _Key(_flag, False),
    "rev_edge_features": _Key(_flag, False),
    "modulate_v": _Key(_flag, True),
    "use_ln": _Key(_flag, True),
    "tfixit_init": _Key(_flag, False),
}
_POOLS = ("cat", "mean", "max", "cat_mean", "mean_edge", "max_edge")
_SET_POOLS = ("attentional_aggregation", "set_transformer", "graph_multiset_transformer")
_EDITING = {
    "layer_layout": _Key(_layout),
    "stats": _Key(_optional(_section), None),
    "normalize": _Key(_flag, False),
    "out_scale": _Key(_number(float("-inf")), 0.01),
}
_VARYING = {
    "input_channels": _Key(_SIZE, 3),
    "num_classes": _Key(_SIZE, 10),
    "layer_layout": _Key(_optional(_layout), None),
}
_TOKEN = {"use_cls_token": _Key(_flag, True)}
_TRANSFORMER_POOL = {**_TOKEN, "pooling_layer_idx": _Key(_layer_index, "last")}

#: Constructor arguments of the models, by class name.
MODELS = {
    "GNNForClassification": {
        **_GNN,
        "layer_layout": _Key(_layout),
        "rev_edge_features": _Key(_flag),
        "pooling_method": _Key(_choice(*_POOLS)),
        "pooling_layer_idx": _Key(_layer_index),
    },
    "GNNParams": {
        **_GNN,
        **_EDITING,
        "rev_edge_features": _Key(_flag),
        "exact_bias_readout": _Key(_flag, False),  # ours
    },
    "GNNForGeneralization": {
        **_GNN,
        **_VARYING,
        "rev_edge_features": _Key(_flag),
        "pooling_method": _Key(_choice("cat", "mean", "max", *_SET_POOLS)),
        "pooling_layer_idx": _Key(_layer_index),
    },
    "RelationalTransformer": {
        **_TRANSFORMER,
        **_TRANSFORMER_POOL,
        "layer_layout": _Key(_layout),
        "pooling_method": _Key(_choice(*_POOLS, "cls_token"), "cat"),
    },
    "RelationalTransformerParams": {**_TRANSFORMER, **_EDITING},
    "DynamicRelationalTransformer": {
        **_TRANSFORMER,
        **_TRANSFORMER_POOL,
        **_VARYING,
        "d_in": _Key(_WIDTH),
        "pooling_method": _Key(_choice("cat", "mean", "max", *_SET_POOLS, "mean_edge", "max_edge", "cls_token"), "cat"),
    },
}
_TARGETS = {
    "nn.gnn.GNNForClassification": "GNNForClassification",
    "nn.dense_gnn.GNNParams": "GNNParams",
    "nn.dynamic_gnn.GNNForGeneralization": "GNNForGeneralization",
    "nn.relational_transformer.RelationalTransformer": "RelationalTransformer",
    "nn.dense_relational_transformer.RelationalTransformerParams": "RelationalTransformerParams",
    "nn.dynamic_relational_transformer.DynamicRelationalTransformer": "DynamicRelationalTransformer",
}


def completed(name: str, given: Any, known: Mapping[str, _Key], set_by_model: Sequence[str] = ()) -> dict[str, Any]:
    """All keys of a section with their values or defaults; hydra's keys, and those the model sets, left out.

    Raises:
        ValueError: something else than a mapping; an unknown or missing key; a value of a wrong type or out of range.
            The message names the key, what was expected and what came.
    """
    section = _section(name, given)
    for key, value in section.items():
        if key in _HYDRA or key in set_by_model:
            continue
        if key not in known:
            raise ValueError(_unknown(name, key, known))
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{name}.{key} must be resolved (hydra does it from a whole configuration), got {value!r}")
    result = {}
    for key, (check, default) in known.items():
        if key in section:
            result[key] = check(f"{name}.{key}", section[key])
        elif default is _REQUIRED:
            given_keys = ", ".join(repr(k) for k in section if k not in _HYDRA) or "nothing"
            raise ValueError(f"{name} needs the key {key!r}, got only {given_keys}")
        else:
            result[key] = default
    return result


def known_keys(target: Any, section: str = "") -> set[str] | None:
    """The keys of the dictionary of a model, by its ``_target_``, or of a section in it.

    None for an unknown ``_target_``, and for what is no section with keys of its own.
    """
    if target not in _TARGETS:
        return None
    keys = MODELS[_TARGETS[target]]
    features = VARYING_FEATURES if "input_channels" in keys else FIXED_FEATURES
    sections = {"": keys, "graph_constructor": features, "gnn_backbone": BACKBONE, "gnn_backbone.norm_kwargs": _NORM}
    return {*_HYDRA, *sections[section]} if section in sections else None


def model_arguments(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(class name, checked constructor arguments) of a dictionary with ``_target_``; the input is not modified.

    Raises:
        ValueError: an unknown ``_target_``, and what `completed` rejects.
    """
    target = config.get("_target_")
    if target not in _TARGETS:
        raise ValueError(f"_target_ must be one of {', '.join(_TARGETS)}, got {target!r}")
    name = _TARGETS[target]
    return name, completed(name, config, MODELS[name])


def backbone_arguments(given: Any, width: int, layout: Sequence[int] | None) -> dict[str, Any]:
    """Checked arguments of `nn.Pna` from ``gnn_backbone``, for node and edge features of a width.

    Without ``deg`` the histogram is that of the layout's in-degrees; a model of varying layouts needs it.
    """
    args = completed("gnn_backbone", given, BACKBONE)
    for key in ("in_channels", "edge_dim"):
        if args[key] != width:
            raise ValueError(f"gnn_backbone.{key} must equal d_hid, {width}, got {args[key]}")
    out = args["hidden_channels"] if args["out_channels"] is None else args["out_channels"]
    if out != width:
        raise ValueError(f"gnn_backbone.out_channels must equal d_hid, {width}, got {out}")
    for key in ("hidden_channels", "out_channels"):
        value = args[key] or out
        if value % args["towers"]:
            raise ValueError(f"gnn_backbone.towers must divide {key}, {value}, got {args['towers']}")
    if args["divide_input"] and args["in_channels"] % args["towers"]:
        raise ValueError(f"gnn_backbone.towers must divide in_channels, {args['in_channels']}, got {args['towers']}")
    if args["update_edge_attr"] and args["act"] is None:
        raise ValueError("gnn_backbone.update_edge_attr needs an act, got act None")
    args["norm_kwargs"] = completed("gnn_backbone.norm_kwargs", args["norm_kwargs"] or {}, _NORM)
    del args["act_kwargs"]
    if args["deg"] is None:
        if layout is None:
            raise ValueError("gnn_backbone needs the key 'deg' where layouts vary, got none")
        args["deg"] = layout_degrees(layout)
    return args


def layout_degrees(layout: Sequence[int]) -> list[int]:
    """How many neurons of a layout have 0, 1, ... incoming weights."""
    histogram = [0] * (max(layout) + 1)
    for degree, count in zip([0, *layout[:-1]], layout, strict=True):
        histogram[degree] += count
    return histogram


def feature_arguments(given: Any, *, varying: bool, **set_by_model) -> dict[str, Any]:
    """Checked arguments of `nn.GraphFeatures` or `nn.VaryingGraphFeatures` from ``graph_constructor``.

    ``set_by_model`` override the section's.
    """
    known = VARYING_FEATURES if varying else FIXED_FEATURES
    section = _section("graph_constructor", given)
    section.update({key: value for key, value in set_by_model.items() if key in known})
    args = completed("graph_constructor", section, known, tuple(set_by_model))
    args.update(set_by_model)
    if varying:
        del args["inr_model"], args["num_probe_features"]  # without effect, as in the original
    elif args["num_probe_features"]:
        args["inr_model"] = _inr_arguments(args["inr_model"], args["layer_layout"])
    return args


def _inr_arguments(given: Any, layout: Sequence[int]) -> dict[str, Any]:
    if given is None:
        raise ValueError("graph_constructor.num_probe_features needs inr_model, got None")
    target = given.get("_target_", "nn.inr.INRPerLayer")
    if target != "nn.inr.INRPerLayer":
        raise ValueError(f"inr_model._target_ must be 'nn.inr.INRPerLayer', got {target!r}")
    args = completed("inr_model", given, _INR)
    if args["pe_features"] is not None:
        raise ValueError(
            "inr_model.pe_features must be None (probe features of encoded inputs are not supported), "
            f"got {args['pe_features']}"
        )
    for key, expected in (("in_features", layout[0]), ("n_layers", len(layout) - 1), ("out_features", layout[-1])):
        if args[key] != expected:
            raise ValueError(f"inr_model.{key} must be {expected} for layer_layout {list(layout)}, got {args[key]}")
    return args
