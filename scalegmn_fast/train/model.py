"""The model of a configuration, made to fit a dataset: layout, degrees and statistics that the data determine."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scalegmn_fast.data import LayerStatistics, PackedCnns, PackedDataset
from scalegmn_fast.nn.pna import NodeNorm

__all__ = [
    "batch_statistics",
    "build_model",
    "edits",
    "fitted",
    "layer_statistics",
    "mixing_norm",
    "varies",
    "width_key",
]

_WIDTHS = ("in_channels", "hidden_channels", "out_channels", "edge_dim")


def model_key(config: Mapping[str, Any]) -> str:
    """The section that describes the model: ``model`` (Neural Graphs) or ``scalegmn_args``."""
    return "model" if "model" in config else "scalegmn_args"


def width_key(config: Mapping[str, Any]) -> str:
    """The key of the model's output width."""
    return "model.d_out" if "model" in config else "scalegmn_args.readout_args.d_out"


def varies(config: Mapping[str, Any]) -> bool:
    """Whether the model reads networks of varying architectures."""
    constructor = (config.get("model") or {}).get("graph_constructor") or {}
    return "max_num_hidden_layers" in constructor


def edits(config: Mapping[str, Any]) -> bool:
    """Whether the model gives changes of the networks, to be trained on target images."""
    args = config[model_key(config)]
    return bool(args.get("equivariant")) or str(args.get("_target_")).endswith("Params")


def fitted(config: dict, dataset) -> tuple[dict, Any]:
    """``(config, dataset)`` made for each other; new objects where something changes.

    A dataset of CNNs makes its batches as ``graph_constructor`` reads them; for a model that edits networks batches
    have target images in the place of labels. A Neural Graphs model gets the data's
    layout; with ``gnn_backbone.deg`` null and architectures that vary, the training split's histogram of in-degrees.

    Raises ValueError where the configuration contradicts the data; the message names the key.
    """
    if edits(config):
        dataset = _with_targets(config, dataset)
    if "model" not in config:
        if dataset.layout is None:
            raise ValueError(
                "scalegmn_args reads networks of one layout, the data hold several: use a model of varying "
                "architectures (cnn_park/pna, cnn_park/rtransformer)"
            )
        return config, dataset
    config = copy.deepcopy(config)
    model = config["model"]
    constructor = model.get("graph_constructor")
    if not isinstance(constructor, dict):
        raise ValueError(f"model.graph_constructor must be a mapping, got {constructor!r}")
    backbone = model.get("gnn_backbone")
    if isinstance(backbone, dict):
        for key in _WIDTHS:
            backbone.setdefault(key, model.get("d_hid"))
    if not varies(config):
        if dataset.layout is None:
            raise ValueError(
                f"model._target_ {model.get('_target_')!r} reads networks of one layout, the data hold several: use a "
                "model of varying architectures (cnn_park/pna, cnn_park/rtransformer)"
            )
        _check_numbers_per_weight(constructor, dataset.edge_dim)
        return config, dataset
    ends = dataset.ends if isinstance(dataset, PackedCnns) else (dataset.layout[0], dataset.layout[-1])
    for key, what, expected in zip(("input_channels", "num_classes"), ("input", "output"), ends, strict=True):
        given = model.get(key, {"input_channels": 3, "num_classes": 10}[key])
        if given != expected:
            raise ValueError(f"model.{key} is {given} but the networks in the data have {expected} {what} neurons")
    deepest, limit = dataset.hidden_layers, constructor["max_num_hidden_layers"]
    deepest += isinstance(dataset, PackedCnns) and constructor.get("flattening_method") == "extra_layer"
    if isinstance(limit, int) and deepest > limit:
        raise ValueError(
            f"model.graph_constructor.max_num_hidden_layers is {limit} but networks in the data have {deepest}"
        )
    if isinstance(dataset, PackedCnns):
        numbers = constructor.get("d_edge_in")
        side = math.isqrt(numbers) if isinstance(numbers, int) and numbers > 0 else 0
        if side == 0 or side * side != numbers or max(dataset.kernel_size) > side:
            height, width = dataset.kernel_size
            raise ValueError(
                f"model.graph_constructor.d_edge_in must be the numbers of a square kernel that holds the data's "
                f"{height} x {width}, got {numbers!r}"
            )
        dataset = dataset.as_read(
            kernel_size=(side, side),
            linear_as_conv=constructor.get("linear_as_conv", True),
            flattening_method=constructor.get("flattening_method", "repeat_nodes"),
        )
    else:
        _check_numbers_per_weight(constructor, dataset.edge_dim)
    if isinstance(backbone, dict) and backbone.get("deg") is None:
        backbone["deg"] = _degrees(dataset, model.get("rev_edge_features") is True)
    return config, dataset


def _with_targets(config: Mapping[str, Any], dataset):
    if not isinstance(dataset, PackedDataset):
        raise ValueError(
            "a model that edits networks is trained on target images of INRs, got a dataset of CNNs: use an invariant "
            "model (scalegmn_args.equivariant: false, or another model._target_)"
        )
    asked = config["data"].get("style_function")
    stored = dataset.metadata.get("target")
    stored = stored.get("style") if isinstance(stored, dict) else None
    if asked is not None and stored is not None and asked != stored:
        raise ValueError(f"data.style_function is {asked!r} but the targets in {dataset.path} are of style {stored!r}")
    return dataset.with_targets()


def _check_numbers_per_weight(constructor: Mapping[str, Any], expected: int) -> None:
    if constructor.get("d_edge_in") != expected:
        raise ValueError(
            f"model.graph_constructor.d_edge_in must be {expected}, the numbers per weight in the data, "
            f"got {constructor.get('d_edge_in')!r}"
        )


def _degrees(dataset, both_ways: bool) -> list[int]:
    """How many neurons of the training networks have 0, 1, ... incoming messages."""
    histogram = torch.zeros(0, dtype=torch.int64)
    for part in torch.as_tensor(dataset.split("train")).split(256):
        plan = dataset.batch(part)[0].plan
        ends = [plan.index("target"), plan.index("source")] if both_ways else [plan.index("target")]
        found = torch.bincount(torch.bincount(torch.cat(ends), minlength=plan.num_nodes))
        size = max(len(found), len(histogram))
        found, histogram = (nn.functional.pad(x, (0, size - len(x))) for x in (found, histogram))
        histogram = histogram + found
    return histogram.tolist()


def mixing_norm(model: nn.Module) -> str | None:
    """The first normalisation that makes a network's result in training depend on the others in its batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"batch norm ({name})"
        if isinstance(module, NodeNorm) and module.scope == "batch":
            return f"gnn_backbone.norm_scope 'batch' ({name})"
    return None


def layer_statistics(config: Mapping[str, Any], dataset, indices) -> LayerStatistics | None:
    """The training split's statistics where the configuration asks for them, else None.

    ``data.normalize: auto`` does so for ScaleGMN's symmetry ``permutation``, and for a Neural Graphs model without
    ``graph_constructor.stats`` (of an editing model: ``stats``; a mapping of nulls stands for none wanted). A mean is
    subtracted only where no symmetry forbids it.
    """
    mode = config["data"]["normalize"]
    if "model" not in config:
        symmetry = config["scalegmn_args"].get("symmetry")
        if mode is False or (mode == "auto" and symmetry != "permutation"):
            return None
        # subtracting a mean would break the sign and scale symmetries, dividing by a number per layer does not
        return LayerStatistics.from_dataset(dataset, indices, center=symmetry == "permutation")
    constructor = config["model"]["graph_constructor"]
    given = config["model"].get("stats") if edits(config) else None
    given = constructor.get("stats") if given is None else given
    if mode is False or (mode == "auto" and given is not None):
        return None
    if varies(config) and constructor.get("flattening_method") == "extra_layer":
        raise ValueError(
            "data.normalize must be false with model.graph_constructor.flattening_method 'extra_layer', which gives "
            f"layers of the networks other numbers, got {mode!r}"
        )
    return LayerStatistics.from_dataset(dataset, indices)


def batch_statistics(config: Mapping[str, Any], statistics: LayerStatistics | None) -> LayerStatistics | None:
    """What ``dataset.batch`` takes: a Neural Graphs model has the statistics itself."""
    return None if "model" in config else statistics


def build_model(
    config: Mapping[str, Any], layout: Sequence[int] | None, statistics: LayerStatistics | None = None
) -> nn.Module:
    """Makes the model of a validated configuration for networks of ``layout`` (None: several layouts).

    ``statistics``: of the networks, for a Neural Graphs model, instead of those of its configuration.

    Raises ValueError where the configuration has another layout than the data.
    """
    from scalegmn_fast.models import from_config

    section = model_key(config)
    args = dict(config[section])
    if layout is not None:
        layout = [int(n) for n in layout]
        given = {"data.layer_layout": config["data"].get("layer_layout")}
        if not varies(config):
            given[f"{section}.layer_layout"] = args.get("layer_layout")
        for key, value in given.items():
            if value is not None and [int(n) for n in value] != layout:
                raise ValueError(
                    f"{key} is {[int(n) for n in value]} but the networks in the data have layout {layout}; "
                    f"correct one of them, or take the data's with --set {key}=null"
                )
    if section == "scalegmn_args" or not varies(config):
        args["layer_layout"] = layout
    if section == "model" and (statistics is not None or config["data"]["normalize"] is False):
        constructor = args["graph_constructor"]
        layers = constructor["max_num_hidden_layers"] + 1 if varies(config) else 0
        stats = _as_stats(statistics, layers)
        args["graph_constructor"] = {**constructor, "stats": stats}
        if edits(config):
            args["stats"] = stats
    return from_config(args)


def _as_stats(statistics: LayerStatistics | None, layers: int) -> dict[str, list[torch.Tensor]] | None:
    """Statistics as ``graph_constructor`` takes them, for at least so many layers; the added ones change nothing."""
    if statistics is None:
        return None
    result = {}
    for kind, name in (("weights", "weight"), ("biases", "bias")):
        for moment, neutral in (("mean", 0.0), ("std", 1.0)):
            values = [value.reshape(-1) for value in getattr(statistics, f"{name}_{moment}")]
            values += [torch.full_like(values[0], neutral)] * (layers - len(values))
            result[f"{kind}_{moment}"] = values
    return result
