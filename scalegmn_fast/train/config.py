"""Training configurations: the original's YAML format, overrides by dotted key, and checks that name the key."""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from scalegmn_fast.data.optional import require

__all__ = ["DEFAULT_BATCH_SIZE", "apply_overrides", "differences", "load_config", "validate_config"]

DEFAULT_BATCH_SIZE = 64

# Keys of each section. The ones marked "loader" belong to the original's data loading: accepted, without effect here,
# because a packed file already holds what they describe.
_TOP = {
    "batch_size", "data", "train_args", "scalegmn_args", "model", "optimization", "wandb", "wandb_args",
    "num_workers", "num_threads", "gpu_ids", "debug", "validate",  # loader
    "inr_model", "log_n_imgs",  # editing
}  # fmt: skip
_DATA = {
    "layer_layout", "normalize",
    "dataset", "dataset_path", "data_path", "metrics_path", "layout_path", "idcs_file", "split_path", "split_points",
    "prefix", "image_size", "activation_function", "node_pos_embed", "edge_pos_embed", "switch_to_canon", "extra_aug",
    "img_ds", "style_function", "data_format", "return_path", "debug", "max_kernel_size", "linear_as_conv",
    "flattening_method", "max_num_hidden_layers",  # loader
}  # fmt: skip
_TRAIN = {
    "num_epochs", "max_steps", "patience", "seed", "loss", "prediction", "cuda_graph",
    "val_acc_threshold", "eval_every",
}  # fmt: skip
_OPTIMIZATION = {"clip_grad", "clip_grad_max_norm", "optimizer_name", "optimizer_args", "scheduler_args"}
_SCHEDULER = {"scheduler", "warmup_steps", "scheduler_mode", "decay_rate", "decay_steps", "patience", "min_lr"}
_SECTIONS: dict[str, set[str]] = {
    "": _TOP,
    "data": _DATA,
    "train_args": _TRAIN,
    "optimization": _OPTIMIZATION,
    "optimization.scheduler_args": _SCHEDULER,
}
# Sections whose keys are checked elsewhere: by the optimiser's signature, or by W&B; those of the model by the model.
_OPEN = ("optimization.optimizer_args", "wandb_args", "wandb", "inr_model")
_MODELS = ("scalegmn_args", "model")

LOSSES = ("CrossEntropyLoss", "MSE", "BCE")
PREDICTIONS = ("auto", "sigmoid", "identity")
SCHEDULERS = ("WarmupLRScheduler", "StepLR", "ReduceLROnPlateau")


def load_config(source: str | os.PathLike | Mapping) -> dict:
    """Reads a whole configuration: a dict, the path of a YAML file, or a published name such as ``mnist_cls/scalegmn``
    or ``mnist_cls/pna``.

    A ``model`` that is a published Neural Graphs name becomes its dictionary. Returns a new plain dict; the argument is
    not changed. Numbers are converted later, by `validate_config`. Raises FileNotFoundError where ``source`` is
    neither a file nor a published name, ValueError where the file is not YAML or holds no mapping.
    """
    if isinstance(source, Mapping):
        return _with_model(_plain(source))
    path = os.fspath(source)
    if not os.path.isfile(path):
        from scalegmn_fast.models import neural_graphs_names, published_config, published_names

        from .published import neural_graphs_training

        if path in published_names():
            return _plain(published_config(path))
        if path in neural_graphs_names():
            return _plain(neural_graphs_training(path))
        names = [*published_names(), *neural_graphs_names()]
        near = difflib.get_close_matches(path, names, n=1, cutoff=0.4)
        hint = f"; the nearest published name is '{near[0]}'" if near else f"; published names: {', '.join(names)}"
        raise FileNotFoundError(f"config '{path}' is neither a file nor a published name{hint}")
    yaml = require("yaml", "reading a configuration")
    try:
        with open(path, encoding="utf-8") as f:
            conf = yaml.safe_load(f)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ValueError(f"config '{path}' is not readable YAML: {' '.join(str(e).split())}") from e
    if not isinstance(conf, dict):
        raise ValueError(f"config '{path}' must hold a mapping of sections, got {type(conf).__name__}")
    return _with_model(_plain(conf))


def _with_model(conf: dict) -> dict:
    """``conf`` with the dictionary of a published name in the place of the name, under ``model``."""
    if isinstance(conf.get("model"), str):
        from scalegmn_fast.models import neural_graphs_names

        from .published import neural_graphs_training

        name, names = conf["model"], neural_graphs_names()
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise ValueError(
                f"model must be a mapping or one of {', '.join(names)}, got {name!r}; the nearest is {near}"
            )
        conf["model"] = neural_graphs_training(name)["model"]
    return conf


def apply_overrides(conf: dict, overrides: Iterable[str]) -> dict:
    """Returns a copy of ``conf`` with every ``key.sub=value`` of ``overrides`` set; values are read as YAML.

    A key must stand in ``conf`` or be known to its section, the model's included; otherwise ValueError names it and the
    nearest valid one.
    """
    conf = copy.deepcopy(conf)
    yaml = require("yaml", "reading a configuration")
    for item in overrides:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ValueError(f"override '{item}': expected key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ValueError(f"override '{item}': the value is not YAML: {' '.join(str(e).split())}") from e
        *sections, last = key.split(".")
        node, prefix = conf, ""
        for name in sections:
            _check_key(conf, node, prefix, name, key)
            if node.get(name) is None:
                node[name] = {}
            node, prefix = node[name], f"{prefix}.{name}" if prefix else name
            if not isinstance(node, dict):
                raise ValueError(f"override '{item}': '{prefix}' is a value, not a section")
        _check_key(conf, node, prefix, last, key)
        if isinstance(node.get(last), dict) and not (value is None or isinstance(value, dict)):
            if not (prefix == "" and last == "wandb"):
                raise ValueError(f"override '{item}': '{key}' is a section; its keys: {', '.join(node[last])}")
        node[last] = value
    return conf


def validate_config(conf: Mapping) -> dict:
    """Checks the training sections of ``conf`` and returns a copy with numbers as numbers and ``"None"`` as None.

    ``scalegmn_args`` or ``model``, of which there must be one, is left to the model. Raises ValueError naming the key,
    what was expected and what came, and for an unknown key the nearest valid one.
    """
    conf = _with_model(_plain(conf))
    for section, known in _SECTIONS.items():
        node = _section(conf, section)
        for key in node:
            if key not in known:
                raise ValueError(_unknown(f"{section}.{key}" if section else key, section, known))
    found = [key for key in _MODELS if conf.get(key) is not None]
    if len(found) != 1:
        got = "both" if found else "neither"
        raise ValueError(f"config: one of the sections 'scalegmn_args' and 'model' must describe the model, got {got}")
    conf = {key: value for key, value in conf.items() if key not in _MODELS or key in found}
    if not isinstance(conf[found[0]], dict):
        raise ValueError(f"config: '{found[0]}' must be a section (a mapping), got {conf[found[0]]!r}")
    if found == ["model"] and "_target_" not in conf["model"]:
        raise ValueError(
            "model._target_ is missing: it names the Neural Graphs model, such as nn.gnn.GNNForClassification"
        )
    for name in ("data", "train_args", "optimization"):
        if conf.get(name) is None:
            conf[name] = {}
    if isinstance(conf.get("wandb"), dict):  # the published CIFAR files put the arguments under "wandb"
        conf.setdefault("wandb_args", conf.pop("wandb"))

    conf["batch_size"] = _integer(conf, "batch_size", DEFAULT_BATCH_SIZE, low=1)
    train, data, optimization = conf["train_args"], conf["data"], conf["optimization"]
    train["num_epochs"] = _integer(train, "num_epochs", 100, low=1, section="train_args")
    train["max_steps"] = _integer(train, "max_steps", None, low=1, section="train_args")
    train["patience"] = _integer(train, "patience", None, low=1, section="train_args")
    train["seed"] = _integer(train, "seed", 0, low=0, section="train_args")
    train["loss"] = _choice(train, "loss", "CrossEntropyLoss", LOSSES, section="train_args")
    train["prediction"] = _choice(train, "prediction", "auto", PREDICTIONS, section="train_args")

    train["cuda_graph"] = _flag(train, "cuda_graph", section="train_args")

    normalize = data.get("normalize", "auto")
    if normalize not in (True, False, "auto"):
        raise ValueError(f"data.normalize must be true, false or auto, got {normalize!r}")
    data["normalize"] = normalize

    optimization["clip_grad"] = _flag(optimization, "clip_grad", section="optimization")
    optimization["clip_grad_max_norm"] = _real(optimization, "clip_grad_max_norm", 10.0, "optimization", positive=True)
    optimization["optimizer_name"] = optimization.get("optimizer_name", "AdamW")
    optimization["optimizer_args"] = {
        k: _number(v, f"optimization.optimizer_args.{k}") for k, v in (optimization.get("optimizer_args") or {}).items()
    }
    scheduler = dict(optimization.get("scheduler_args") or {})
    scheduler = {k: None if v == "None" else v for k, v in scheduler.items()}
    where = "optimization.scheduler_args"
    if scheduler.get("scheduler") is not None:
        name = _choice(scheduler, "scheduler", None, SCHEDULERS, section=where)
        if name == "WarmupLRScheduler":
            scheduler["warmup_steps"] = _integer(scheduler, "warmup_steps", 10000, low=1, section=where)
        elif name == "StepLR":
            scheduler["decay_steps"] = _integer(scheduler, "decay_steps", None, low=1, section=where, required=True)
            scheduler["decay_rate"] = _real(scheduler, "decay_rate", None, where, positive=True, required=True)
        else:
            scheduler["scheduler_mode"] = _choice(scheduler, "scheduler_mode", "min", ("min", "max"), section=where)
            scheduler["decay_rate"] = _real(scheduler, "decay_rate", None, where, positive=True, required=True)
            if scheduler["decay_rate"] >= 1:
                raise ValueError(f"{where}.decay_rate must be below 1, got {scheduler['decay_rate']}")
            scheduler["patience"] = _integer(scheduler, "patience", 10, low=0, section=where)
            scheduler["min_lr"] = _real(scheduler, "min_lr", 0.0, where)
    optimization["scheduler_args"] = scheduler
    return conf


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Lists ``(dotted key, old value, new value)`` for every leaf at which two nested dicts differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{prefix}.{key}" if prefix else str(key)
            found += differences(old.get(key), new.get(key), where)
        return found
    return [] if old == new else [(prefix, old, new)]


def _plain(value):
    """Copies nested mappings and sequences into plain dicts and lists, so that they can be saved anywhere."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _section(conf: dict, dotted: str) -> dict:
    node = conf
    for name in dotted.split(".") if dotted else ():
        node = node.get(name)
        if node is None:
            return {}
        if not isinstance(node, dict):
            raise ValueError(f"config: '{dotted}' must be a section (a mapping), got {node!r}")
    return node


def _unknown(key: str, section: str, known: Iterable[str], item: str | None = None) -> str:
    near = difflib.get_close_matches(key.rpartition(".")[2], sorted(known), n=1, cutoff=0.5)
    prefix = f"{section}." if section else ""
    hint = f"the nearest valid key is '{prefix}{near[0]}'" if near else f"valid keys: {', '.join(sorted(known))}"
    return f"unknown key '{key}'{f' in override {item!r}' if item else ''}; {hint}"


def _check_key(conf: dict, node: dict, prefix: str, name: str, key: str) -> None:
    known = _model_keys(conf, prefix) if prefix.split(".")[0] in _MODELS else _SECTIONS.get(prefix, set())
    if name in node or prefix in _OPEN or known is None or name in known:
        return
    raise ValueError(_unknown(_name(prefix, name), prefix, {*node, *known}, item=key))


def _model_keys(conf: dict, prefix: str) -> set[str] | None:
    """The keys of a section of the model; None where the model alone knows them."""
    section, _, inner = prefix.partition(".")
    if section == "scalegmn_args":
        from scalegmn_fast.models.config import known_keys

        return known_keys(inner)
    from scalegmn_fast.models.neural_graphs_config import known_keys

    return known_keys((conf.get("model") or {}).get("_target_"), inner)


def _number(value, key: str):
    """A number given as a number or as text (PyYAML reads ``1e-3`` as text); booleans, None and lists pass."""
    if isinstance(value, list):
        return [_number(v, key) for v in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be a number, got {value!r}") from None


def _name(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def _flag(node: dict, key: str, *, section: str) -> bool:
    value = node.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{_name(section, key)} must be true or false, got {value!r}")
    return value


def _integer(node: dict, key: str, default, *, low: int, section: str = "", required: bool = False):
    value = node.get(key, default)
    value = default if value in (None, "None") else value
    if value is None:
        if required:
            raise ValueError(f"{_name(section, key)} is missing")
        return None
    number = value if isinstance(value, bool) else _number(value, _name(section, key))
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != int(number) or number < low:
        raise ValueError(f"{_name(section, key)} must be an integer of at least {low}, got {value!r}")
    return int(number)


def _real(node: dict, key: str, default, section: str, *, positive: bool = False, required: bool = False):
    value = node.get(key, default)
    value = default if value in (None, "None") else value
    if value is None and required:
        raise ValueError(f"{section}.{key} is missing")
    number = _number(value, f"{section}.{key}")
    if isinstance(number, (bool, list)) or not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{section}.{key} must be a {'positive' if positive else 'nonnegative'} number, got {value!r}")
    return float(number)


def _choice(node: dict, key: str, default, choices: tuple[str, ...], *, section: str):
    value = node.get(key, default)
    if value is None:
        return default
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"{section}.{key} must be one of {', '.join(choices)}, got {value!r}{hint}")
    return value
