"""Data sets of convolutional networks in the field's formats, labelled by test accuracy.

- small CNN zoo: a folder with ``weights.npy`` [n, numbers] (all training steps of all networks), ``metrics.csv.gz``
  (a row each: ``step``, ``test_accuracy``, ``config.activation``) and ``layout.csv`` (where each variable stands in a
  row of weights, and its shape as TensorFlow has it).
- CNN Wild Park: checkpoints ``.../checkpoint.pt`` with a state dict under ``model`` and the architecture under
  ``config`` (``activation`` and ``residual`` per hidden layer), and a JSON file of splits: ``{"train": {"path": [...],
  "score": [...], "step": [...]}}``.
"""

from __future__ import annotations

import ast
import collections
import csv
import gzip
import json
import math
import os
import pickle
import random
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .cnns import CnnSet
from .formats import _resolve
from .optional import progress
from .packed import SPLITS

__all__ = ["is_cnn_park", "is_cnn_zoo", "read_cnn_park", "read_cnn_zoo"]

_ZOO_FILES = ("weights.npy", "metrics.csv.gz", "layout.csv")
_ZOO_COLUMNS = {"metrics.csv.gz": ("step", "test_accuracy"), "layout.csv": ("varname", "start_idx", "end_idx", "shape")}


def is_cnn_zoo(folder: Path) -> bool:
    """Whether a folder is a small CNN zoo, complete or not."""
    return (folder / "weights.npy").is_file() or (folder / "metrics.csv.gz").is_file()


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as handle:
            reader = csv.DictReader(handle)
            rows = list(reader)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: truncated, or not a table of comma-separated values: {error}") from error
    for column in _ZOO_COLUMNS[path.name]:
        if column not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(reader.fieldnames or ()) or 'none'}")
    return rows


def _column(path: Path, rows: Sequence[Mapping[str, str]], name: str) -> np.ndarray:
    try:
        return np.array([float(row[name]) for row in rows])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the column {name!r} holds something else than numbers: {error}") from error


def _zoo_layers(path: Path, numbers: int) -> list[tuple[str, slice, tuple[int, ...]]]:
    """(kind, place in a row of weights, shape) of each variable."""
    result = []
    for row in _read_table(path):
        name = row["varname"]
        kind = next((kind for kind in ("kernel", "bias") if name.endswith(f"{kind}:0")), None)
        try:
            start, stop, shape = int(row["start_idx"]), int(row["end_idx"]), ast.literal_eval(row["shape"])
            shape = tuple(int(size) for size in (shape if isinstance(shape, tuple | list) else (shape,)))
        except (TypeError, ValueError, SyntaxError) as error:
            raise ValueError(f"{path}: {name!r} has no start_idx, end_idx and shape: {error}") from error
        ndims = {"kernel": (2, 4), "bias": (1,)}.get(kind, ())
        if len(shape) not in ndims:
            raise ValueError(
                f"{path}: {name!r} of shape {shape} is neither a kernel:0 of 2 or 4 dimensions nor a bias:0"
            )
        if not 0 <= start <= stop <= numbers or stop - start != math.prod(shape):
            raise ValueError(
                f"{path}: {name!r} of shape {shape} does not fit numbers {start} to {stop} of {numbers} in weights.npy"
            )
        result.append((kind, slice(start, stop), shape))
    counts = [sum(kind == wanted for kind, _, _ in result) for wanted in ("kernel", "bias")]
    if not result or counts[0] != counts[1]:
        raise ValueError(
            f"{path}: expected as many kernels as biases, and one at least, got {counts[0]} and {counts[1]}"
        )
    return result


def read_cnn_zoo(
    folder: str | os.PathLike,
    *,
    order: str | os.PathLike | None = None,
    step: int = 86,
    activation: str | None = None,
) -> CnnSet:
    """A small CNN zoo's networks after ``step``; each pools its feature maps before its linear layers.

    ``order``: file with one row number of ``weights.npy`` per line, the order in which networks are split: the second
    half is for testing, of the first a fifth, drawn with Python's generator seeded by 0, for validation. With the
    order released with the data that is the published split; without, rows stay as they are. ``activation``: keep
    networks of that activation alone (after splitting). Labels: ``test_accuracy``.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """
    folder = Path(folder)
    for name in _ZOO_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"a small CNN zoo has {', '.join(_ZOO_FILES)}; no file at {folder / name}")
    try:
        weights = np.load(folder / "weights.npy", mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{folder / 'weights.npy'}: truncated, or not an array: {error}") from error
    metrics_path = folder / "metrics.csv.gz"
    rows = _read_table(metrics_path)
    if weights.ndim != 2 or weights.dtype.kind != "f" or len(weights) != len(rows):
        raise ValueError(
            f"{folder / 'weights.npy'} must hold floats [{len(rows)}, numbers], a row per row of {metrics_path.name}, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    variables = _zoo_layers(folder / "layout.csv", weights.shape[1])
    steps, labels = _column(metrics_path, rows, "step"), _column(metrics_path, rows, "test_accuracy")
    places = np.arange(len(rows)) if order is None else _read_order(Path(order), len(rows))
    places = places[steps[places] == step]
    if not len(places):
        found = ", ".join(f"{value:g}" for value in np.unique(steps))
        raise ValueError(f"step must be one of those in {metrics_path} ({found or 'none'}), got {step}")
    codes = np.full(len(places), 2, np.uint8)
    first = list(range(len(places) // 2))
    random.Random(0).shuffle(first)
    codes[first] = 1
    codes[first[: int(0.8 * len(first))]] = 0
    names = [row.get("config.activation") or None for row in rows]
    if activation is not None:
        kept = np.array([names[place] == activation for place in places])
        if not kept.any():
            found = ", ".join(sorted({str(names[place]) for place in places}))
            raise ValueError(f"activation must be one of those in {metrics_path} ({found}), got {activation!r}")
        places, codes = places[kept], codes[kept]
    networks = []
    for place in places.tolist():
        numbers = torch.from_numpy(np.array(weights[place], np.float32))
        if not bool(torch.isfinite(numbers).all()):
            raise ValueError(f"{folder / 'weights.npy'}: row {place} holds NaN or Inf")
        values = [(kind, numbers[where].view(shape)) for kind, where, shape in variables]
        kernels = [v.permute(3, 2, 0, 1) if v.ndim == 4 else v.t() for kind, v in values if kind == "kernel"]
        biases = [v for kind, v in values if kind == "bias"]
        layers = [(kernel.contiguous(), bias) for kernel, bias in zip(kernels, biases, strict=True)]
        _check_layers(f"{folder / 'layout.csv'}", layers)
        networks.append(layers)
    hidden = len(networks[0]) - 1
    return CnnSet(
        networks,
        [None if names[place] is None else [names[place]] * hidden for place in places],
        [None] * len(networks),
        torch.from_numpy(labels[places].astype(np.float32)),
        codes,
        extras={"row": places.astype(np.int64)},
    )


def _read_order(path: Path, count: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        order = np.array([int(float(text)) for text in path.read_text().replace(",", "\n").split()])
    except ValueError as error:
        raise ValueError(f"{path}: expected one row number per line: {error}") from error
    if sorted(order.tolist()) != list(range(count)):
        raise ValueError(f"{path}: expected every row number from 0 to {count - 1} once, got {len(order)} numbers")
    return order


def _check_layers(where: str, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raises ValueError unless every layer reads what the one before it has."""
    for layer, ((before, _), (weight, _)) in enumerate(zip(layers, layers[1:], strict=False), start=1):
        channels = before.shape[0]
        flattens = before.ndim == 4 and weight.ndim == 2 and weight.shape[1] % channels == 0
        if weight.shape[1] != channels and not flattens or weight.ndim > before.ndim:
            raise ValueError(
                f"{where}: layer {layer} has a weight {list(weight.shape)} after one of {list(before.shape)}"
            )


class _Inert:
    """What stands for the objects of a configuration library in a checkpoint: they keep their state, and do nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


_INERT = (
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode", "omegaconf.nodes.IntegerNode", "omegaconf.nodes.StringNode",
    "typing.Any", "typing.List", "experiments.cnn_generalization.dataset.cnn_sampler.CNNConfig",
)  # fmt: skip
_PLAIN = {dict: "dict", list: "list", int: "int", str: "str"}


def _load_checkpoint(path: Path) -> Any:
    """``torch.load`` of tensors and plain values; configuration objects become inert ones, all else is refused."""
    allowed = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _INERT]
    allowed += [(kind, f"builtins.{name}") for kind, name in _PLAIN.items()]
    allowed += [(kind, f"__builtin__.{name}") for kind, name in _PLAIN.items()]
    allowed += [(int, "__builtin__.long"), (str, "__builtin__.unicode"), collections.defaultdict]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: truncated, or not a checkpoint of tensors and plain values: {reason}") from error


def _unwrapped(value: Any) -> Any:
    """Plain values of inert configuration objects."""
    if isinstance(value, _Inert):
        state = value.state
        return _unwrapped(state["_content"] if "_content" in state else state.get("_val"))
    if isinstance(value, Mapping):
        return {key: _unwrapped(entry) for key, entry in value.items()}
    return [_unwrapped(entry) for entry in value] if isinstance(value, list | tuple) else value


def _read_checkpoint(path: Path) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[str], list[int]]:
    """(layers, activations, residuals) of one network."""
    found = _load_checkpoint(path)
    if not isinstance(found, dict) or not isinstance(found.get("model"), Mapping):
        raise ValueError(f"{path}: expected a dict with a state dict under 'model', got {type(found).__name__}")
    state = dict(found["model"])
    layers = []
    for name, weight in state.items():
        bias = state.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else weight
        if not isinstance(weight, torch.Tensor) or not isinstance(bias, torch.Tensor):
            raise ValueError(f"{path}: {name} must be a tensor with a bias beside it")
        if name.endswith("weight"):
            if weight.ndim not in (2, 4) or bias.shape != weight.shape[:1]:
                raise ValueError(f"{path}: {name} and its bias have shapes {list(weight.shape)} and {list(bias.shape)}")
            layers.append((weight.float(), bias.float()))
    if 2 * len(layers) != len(state) or not layers:
        raise ValueError(f"{path}: expected weights and their biases alone, got {', '.join(state) or 'nothing'}")
    _check_layers(str(path), layers)
    config = _unwrapped(found.get("config"))
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected the architecture as a mapping under 'config', got {type(config).__name__}")
    for name, kind in (("activation", str), ("residual", int)):
        value = config.get(name)
        if not isinstance(value, list) or len(value) != len(layers) - 1 or not all(isinstance(v, kind) for v in value):
            raise ValueError(
                f"{path}: config.{name} must have one {kind.__name__} for each of {len(layers) - 1} hidden layers, "
                f"got {value!r}"
            )
    return layers, config["activation"], config["residual"]


def is_cnn_park(splits: str | os.PathLike) -> bool:
    """Whether a JSON file of splits lists scores, as the CNN Wild Park's does."""
    try:
        content = json.loads(Path(splits).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and any(isinstance(e, dict) and "score" in e for e in content.values())


def read_cnn_park(root: str | os.PathLike, splits: str | os.PathLike, *, show_progress: bool = False) -> CnnSet:
    """The CNN Wild Park's networks: checkpoints under ``root``, ``splits`` a JSON file.

    Networks come in the order train, val, test of the splits file, labelled by its scores; its steps are kept as the
    extra ``step``. Leading folders of its paths that do not exist under ``root`` are dropped. Code in a checkpoint is
    refused, not run. All networks are held in memory. Raises FileNotFoundError or ValueError that name the file.
    """
    root, splits = Path(root), Path(splits)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    if not splits.is_file():
        raise FileNotFoundError(f"no splits file at {splits}")
    try:
        table = json.loads(splits.read_text())
    except ValueError as error:
        raise ValueError(f"{splits}: truncated, or not a JSON file: {error}") from error
    unknown = [name for name in table if name not in SPLITS] if isinstance(table, dict) else [type(table).__name__]
    if unknown:
        raise ValueError(f"{splits}: expected an object with {', '.join(SPLITS)}, got {unknown[0]!r}")
    paths: list[str] = []
    columns: dict[str, list[float]] = {"score": [], "step": []}
    codes: list[int] = []
    for code, split in enumerate(SPLITS):
        entry = table.get(split, {"path": [], "score": []})
        listed = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
            raise ValueError(f"{splits}: split {split!r} must have a list of paths under 'path'")
        for name, found in columns.items():
            values = entry.get(name, [] if name == "score" else [-1] * len(listed))
            numbers = isinstance(values, list) and all(isinstance(v, int | float) for v in values)
            if not numbers or len(values) != len(listed):
                raise ValueError(f"{splits}: split {split!r} has {len(listed)} paths; {name!r} must be as many numbers")
            found += values
        paths += listed
        codes += [code] * len(listed)
    if not paths:
        raise ValueError(f"{splits}: it lists no networks")
    files = _resolve(root, paths, splits)
    found = [_read_checkpoint(f) for f in progress(files, desc="read", unit="network", disable=not show_progress)]
    layers, activations, residuals = (list(column) for column in zip(*found, strict=True))
    return CnnSet(
        layers,
        activations,
        residuals,
        torch.tensor(columns["score"], dtype=torch.float32),
        np.array(codes, np.uint8),
        extras={"step": np.array(columns["step"], np.int64)},
    )
