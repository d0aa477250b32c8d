"""Configurations: the original's ``scalegmn_args`` dictionaries and files, and our own `ScaleGMNConfig`."""

from __future__ import annotations

import copy
import difflib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..nn.mlp import ACTIVATIONS
from .memory import EDGE_MEMORY

_REQUIRED = object()

#: Keys of ``scalegmn_args`` and their defaults. The last four are ours; their defaults reproduce the original.
_TOP = {
    "d_in_v": 1,
    "d_in_e": 1,
    "d_hid": None,
    "num_layers": _REQUIRED,
    "direction": "forward",
    "equivariant": False,
    "symmetry": _REQUIRED,
    "jit": False,
    "compile": False,
    "readout_range": "last_layer",
    "gnn_skip_connections": False,
    "concat_mlp_directions": False,
    "reciprocal": False,
    "node_pos_embed": False,
    "edge_pos_embed": False,
    "_max_kernel_height": None,
    "_max_kernel_width": None,
    "layer_layout": None,
    "out_scale": 0.01,
    "graph_init": _REQUIRED,
    "positional_encodings": None,
    "gnn_args": _REQUIRED,
    "mlp_args": _REQUIRED,
    "readout_args": None,
    "bidirectional_edges": "original",
    "canonical_eps": 1e-10,
    "dropout_equivariant_output": True,
    "edge_memory": "auto",
    "exact_edge_encoding": False,
}
_SECTIONS = {
    "graph_init": {
        "d_in_v": 1,
        "d_in_e": 1,
        "project_node_feats": True,
        "project_edge_feats": True,
        "d_node": None,
        "d_edge": None,
    },
    "positional_encodings": {
        "final_linear_pos_embed": False,
        "sum_pos_enc": False,
        "po_as_different_linear": False,
        "equiv_net": False,
        "sum_on_io": True,
        "equiv_on_hidden": True,
        "num_mlps": 2,
        "layer_equiv_on_hidden": False,
    },
    "gnn_args": {
        "d_hid": None,
        "message_fn_layers": 1,
        "message_fn_skip_connections": False,
        "update_node_feats_fn_layers": 1,
        "update_node_feats_fn_skip_connections": False,
        "update_edge_attr": True,
        "dropout": 0.0,
        "dropout_all": False,
        "update_as_act": False,
        "update_as_act_arg": "sum",
        "mlp_on_io": False,
        "msg_equiv_on_hidden": True,
        "upd_equiv_on_hidden": True,
        "layer_msg_equiv_on_hidden": False,
        "layer_upd_equiv_on_hidden": False,
        "msg_num_mlps": 2,
        "upd_num_mlps": 2,
        "pos_embed_msg": False,
        "pos_embed_upd": False,
        "layer_norm": False,
        "aggregator": "add",
        "sign_symmetrization": True,
    },
    "mlp_args": {
        "d_k": _REQUIRED,
        "activation": "elu",
        "dropout": 0.0,
        "final_activation": "identity",
        "batch_norm": False,
        "layer_norm": False,
        "bias": True,
        "skip": False,
        "weight_init": None,
        "weight_init_args": None,
        "w0": 30.0,
    },
    "readout_args": {"d_out": _REQUIRED, "d_rho": None},
}
_CHOICES = {
    "direction": ("forward", "bidirectional"),
    "symmetry": ("sign", "scale", "hetero", "permutation"),
    "readout_range": ("last_layer", "full_graph"),
    "bidirectional_edges": ("original", "reciprocal", "carried"),
    "edge_memory": EDGE_MEMORY,
    "gnn_args.update_as_act_arg": ("cat", "sum"),
    "gnn_args.aggregator": ("add", "sum", "mean", "max"),
    "mlp_args.activation": ACTIVATIONS,
    "mlp_args.final_activation": ACTIVATIONS,
    "gnn_args.msg_num_mlps": (1, 2, 3),
    "gnn_args.upd_num_mlps": (1, 2, 3),
    "positional_encodings.num_mlps": (1, 2, 3),
}


@dataclass
class ScaleGMNConfig:
    """A new model's configuration: exact behaviour by default (docs/models.md).

    Attributes:
        layout: layer sizes of the networks to be read; mixed batches share the first and last.
        symmetry: ``sign`` (odd activations), ``scale`` (positively homogeneous), ``hetero`` (either, per network or
            neuron, by the batch's sign mask) or ``permutation``.
        direction: ``forward`` or ``bidirectional``.
        equivariant: new weights and biases instead of a vector per network.
        d_out: width of the invariant output.
        d_hid, num_layers: width and number of rounds.
        d_in_v, d_in_e: numbers per bias and per weight (kernel height x width for CNNs).
        readout_range: ``last_layer`` or ``full_graph``.
        node_pos_embed, edge_pos_embed: positional encodings per node and edge type.
        bidirectional_edges: edge features of messages against the weights. ``carried`` (exact, no division by weights)
            for scale and hetero unless given; ``original`` otherwise, where it is exact.
        canonical_eps: eps in ``x / (||x|| + eps)``; 0 makes scale invariance exact.
        dropout: after each round.
        dropout_equivariant_output: dropout also on the equivariant head's result.
        edge_memory: ``store`` writes every round's edge features out, [E, d_hid], and keeps them for the backward pass.
            ``recompute`` writes none: each round computes them again from the networks' weights, tile by tile, which
            costs a few products per edge and earlier round; the memory left is that of nodes and of the weights
            themselves. ``auto``: ``store`` unless, on a CPU, that would take more than half of the memory that is
            available. ``recompute`` is of row programs; with dropout in the mlps, rounds in training are stored.
        exact_edge_encoding: in an ``equiv_net`` positional net, edges into output neurons scale with their source.
        sections: overrides of single keys of the original's sections, e.g. ``{"mlp_args": {"activation": "elu"}}``.
    """

    layout: Sequence[int]
    symmetry: str = "sign"
    direction: str = "forward"
    equivariant: bool = False
    d_out: int = 10
    d_hid: int = 128
    num_layers: int = 4
    d_in_v: int = 1
    d_in_e: int = 1
    readout_range: str = "last_layer"
    node_pos_embed: bool = True
    edge_pos_embed: bool = False
    bidirectional_edges: str | None = None
    canonical_eps: float = 1e-10
    dropout: float = 0.0
    dropout_equivariant_output: bool = False
    edge_memory: str = "auto"
    exact_edge_encoding: bool = True
    sections: dict = field(default_factory=dict)

    def to_args(self) -> dict:
        """The configuration as an ``scalegmn_args`` dictionary."""
        scaled = self.symmetry in ("scale", "hetero")
        args = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("layout", "d_out", "dropout", "sections")
        }
        args["bidirectional_edges"] = self.bidirectional_edges or ("carried" if scaled else "original")
        args["layer_layout"] = list(self.layout)
        args["graph_init"] = {"d_in_v": self.d_in_v, "d_in_e": self.d_in_e}
        args["positional_encodings"] = {}
        args["gnn_args"] = {"dropout": self.dropout, "mlp_on_io": True}
        args["mlp_args"] = {"d_k": [self.d_hid], "activation": "silu", "layer_norm": True}
        args["readout_args"] = {"d_out": self.d_out}
        for section, values in self.sections.items():
            if section not in _SECTIONS:
                raise ValueError(_unknown("sections", section, _SECTIONS))
            args[section] = {**args[section], **values}
        return args


def resolve(config) -> dict:
    """A complete, checked ``scalegmn_args`` dictionary from any accepted form; the input is not modified.

    Args:
        config: a `ScaleGMNConfig`; a ``scalegmn_args`` dictionary; a whole configuration of the original (a dictionary
            with ``scalegmn_args``, or the path of its YAML file); or the name of a published configuration.

    ``d_hid`` sets every hidden width, ``gnn_args.dropout_all`` copies the dropout into the mlps and
    ``_max_kernel_height/_width`` set ``d_in_e``, as in the original's scripts; a warning says what they override.

    Raises:
        ValueError: unknown keys (with the nearest valid one), values outside their choices, contradictions.
        FileNotFoundError: a path that does not exist.
    """
    if isinstance(config, ScaleGMNConfig):
        args = config.to_args()
    else:
        whole = load(config)
        if "scalegmn_args" in whole:
            args = copy.deepcopy(dict(whole["scalegmn_args"]))
            data = whole.get("data") or {}
            if args.get("layer_layout") is None:
                args["layer_layout"] = data.get("layer_layout")
        else:
            args = copy.deepcopy(dict(whole))
    args = _complete(args)
    _common_keys(args)
    _check(args)
    _warn_of_broken_symmetry(args)
    return args


def known_keys(section: str = "") -> set[str] | None:
    """The keys of ``scalegmn_args`` or of a section in it; None for what is no section with keys of its own."""
    return {*_TOP} if not section else {*_SECTIONS[section]} if section in _SECTIONS else None


def load(config) -> dict:
    """The dictionary of a configuration: of a mapping itself, of a YAML file, or of a published name."""
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise TypeError(
            f"config must be a ScaleGMNConfig, a dictionary, a path or a published name, got {type(config).__name__}"
        )
    from .published import published_config, published_names

    if isinstance(config, str) and config in published_names():
        return published_config(config)
    if not os.path.exists(config):
        near = difflib.get_close_matches(str(config), published_names(), n=1)
        hint = f"; the nearest published configuration is {near[0]!r}" if near else ""
        raise FileNotFoundError(f"config {str(config)!r} is neither a file nor a published configuration{hint}")
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a configuration file needs PyYAML: pip install 'scalegmn_fast[train]'") from error
    with open(config, encoding="utf-8") as file:
        try:
            found = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"config {str(config)!r} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"config {str(config)!r} must hold a mapping, got {type(found).__name__}")
    return found


def _unknown(where: str, key: str, known) -> str:
    near = difflib.get_close_matches(str(key), [str(k) for k in known], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(map(str, known))}"
    return f"unknown key {key!r} in {where}{hint}"


def _filled(where: str, given: Mapping, known: Mapping) -> dict:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping, got {type(given).__name__}")
    for key in given:
        if key not in known:
            raise ValueError(_unknown(where, key, known))
    missing = [key for key, default in known.items() if default is _REQUIRED and key not in given]
    if missing:
        raise ValueError(f"{where} needs the key {missing[0]!r}, got only {', '.join(map(repr, given)) or 'nothing'}")
    return {key: given.get(key, default) for key, default in known.items()}


def _complete(args: dict) -> dict:
    args = _filled("scalegmn_args", args, _TOP)
    for section, known in _SECTIONS.items():
        if section == "readout_args" and args["equivariant"]:
            args[section] = args[section] or {}
            continue
        args[section] = _filled(section, args[section] or {}, known)
    mlp = args["mlp_args"]
    mlp["d_k"] = [_number("mlp_args.d_k", value, int) for value in mlp["d_k"]]
    for section, key in (("gnn_args", "dropout"), ("mlp_args", "dropout"), ("mlp_args", "w0")):
        args[section][key] = _number(f"{section}.{key}", args[section][key], float)
    for key in ("canonical_eps", "out_scale"):
        args[key] = _number(key, args[key], float)
    return args


def _number(name: str, value, kind):
    """Numbers may come as strings: YAML 1.1 reads ``1e-3`` as one."""
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _common_keys(args: dict) -> None:
    init, gnn, mlp, readout = args["graph_init"], args["gnn_args"], args["mlp_args"], args["readout_args"]
    changed = []

    def override(section: dict, name: str, key: str, value) -> None:
        if section.get(key) is not None and section[key] != value:
            changed.append(f"{name}.{key} {section[key]} -> {value}")
        section[key] = value

    if args["d_hid"] is not None:
        override(init, "graph_init", "d_node", args["d_hid"])
        override(init, "graph_init", "d_edge", args["d_hid"])
        override(gnn, "gnn_args", "d_hid", args["d_hid"])
        override(mlp, "mlp_args", "d_k", [args["d_hid"]] * len(mlp["d_k"]))
        if not args["equivariant"]:
            override(readout, "readout_args", "d_rho", args["d_hid"])
    if args["_max_kernel_height"] is not None:
        init["d_in_e"] = args["_max_kernel_height"] * (args["_max_kernel_width"] or args["_max_kernel_height"])
    if gnn["dropout_all"]:
        override(mlp, "mlp_args", "dropout", gnn["dropout"])
    for name, section in (("graph_init.d_node", init), ("graph_init.d_edge", init), ("gnn_args.d_hid", gnn)):
        if section[name.split(".")[1]] is None:
            raise ValueError(f"scalegmn_args needs d_hid or {name}, got neither")
    if not args["equivariant"] and readout["d_rho"] is None:
        readout["d_rho"] = gnn["d_hid"]
    if changed:
        warnings.warn(f"d_hid and dropout_all override other keys: {'; '.join(changed)}", stacklevel=4)


def _check(args: dict) -> None:
    for name, choices in _CHOICES.items():
        section, _, key = name.rpartition(".")
        value = (args[section] if section else args)[key]
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    layout = args["layer_layout"]
    if layout is None:
        raise ValueError("scalegmn_args needs layer_layout (the layer sizes of the networks to be read), got none")
    if not isinstance(layout, Sequence) or len(layout) < 2 or any(int(n) != n or n < 1 for n in layout):
        raise ValueError(f"layer_layout must hold at least two positive layer sizes, got {layout!r}")
    args["layer_layout"] = [int(n) for n in layout]
    if args["num_layers"] < 1:
        raise ValueError(f"num_layers must be at least 1, got {args['num_layers']}")
    if args["canonical_eps"] < 0:
        raise ValueError(f"canonical_eps must not be negative, got {args['canonical_eps']}")
    for section in ("gnn_args", "mlp_args"):
        if not 0 <= args[section]["dropout"] < 1:
            raise ValueError(f"{section}.dropout must be in [0, 1), got {args[section]['dropout']}")
    gnn, init = args["gnn_args"], args["graph_init"]
    if init["d_node"] != gnn["d_hid"]:
        raise ValueError(f"graph_init.d_node must equal gnn_args.d_hid, got {init['d_node']} and {gnn['d_hid']}")
    if gnn["update_edge_attr"] and init["d_edge"] != gnn["d_hid"]:
        raise ValueError(
            "graph_init.d_edge must equal gnn_args.d_hid with update_edge_attr, "
            f"got {init['d_edge']} and {gnn['d_hid']}"
        )
    if args["equivariant"] and not gnn["update_edge_attr"]:
        raise ValueError(
            "equivariant needs gnn_args.update_edge_attr (new weights are the last edge features), got False"
        )
    if args["symmetry"] == "permutation":
        if args["bidirectional_edges"] == "carried":
            raise ValueError("bidirectional_edges 'carried' needs a scaling to carry, got symmetry 'permutation'")
        return
    separate = {
        "msg": gnn["mlp_on_io"] or gnn["layer_msg_equiv_on_hidden"],
        "upd": gnn["mlp_on_io"] or gnn["layer_upd_equiv_on_hidden"],
    }
    for kind, is_separate in separate.items():
        if gnn[f"{kind}_num_mlps"] == 1 and gnn[f"{kind}_equiv_on_hidden"] and not is_separate:
            raise ValueError(
                f"gnn_args.{kind}_num_mlps must be 2 or 3 with {kind}_equiv_on_hidden "
                f"(or set mlp_on_io or layer_{kind}_equiv_on_hidden), got 1"
            )
    for kind in ("msg", "upd"):
        if gnn[f"pos_embed_{kind}"] and not args["node_pos_embed"]:
            raise ValueError(f"gnn_args.pos_embed_{kind} needs node_pos_embed, got node_pos_embed False")


def _warn_of_broken_symmetry(args: dict) -> None:
    """Options under which the model no longer has the symmetry it is named after (spec, departures 1 and 4)."""
    if args["symmetry"] == "permutation":
        return
    gnn, positions = args["gnn_args"], args["positional_encodings"]
    scaled = args["symmetry"] in ("scale", "hetero")
    broken = []
    if (args["node_pos_embed"] or args["edge_pos_embed"]) and positions["sum_pos_enc"]:
        broken.append("positional_encodings.sum_pos_enc")
    if args["edge_pos_embed"] and positions["equiv_net"] and not args["exact_edge_encoding"]:
        broken.append("positional_encodings.equiv_net (exact_edge_encoding: True mends it)")
    if gnn["aggregator"] == "max" and args["symmetry"] in ("sign", "hetero"):
        broken.append("gnn_args.aggregator 'max'")
    if gnn["update_as_act"] and args["direction"] == "forward" and scaled:
        broken.append("gnn_args.update_as_act")
    if args["direction"] == "bidirectional" and scaled and args["bidirectional_edges"] == "original":
        broken.append("bidirectional_edges 'original' ('carried' and 'reciprocal' are exact)")
    if broken:
        warnings.warn(f"not exactly equivariant for symmetry {args['symmetry']!r}: {'; '.join(broken)}", stacklevel=4)
