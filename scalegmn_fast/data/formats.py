"""Data sets of networks in the field's formats: one .pth state dict per network, and arrays in one .npz.

- DWS: state dicts anywhere under a folder and a JSON file of splits. MNIST INRs: ``{"train": {"path": [...], "label":
  [...]}}``; Fashion-MNIST INRs: the same, or ``{"train": [path, ...]}`` with the label in the state dict under
  ``label``.
- NFN CIFAR-10 INRs: ``randinit_smaller_<class>s/...net<index>.pth``; the splits are ranges of the index.
- stacked .npz: ``w0, w1, ..., b0, b1, ...`` over all networks, ``labels``, ``n_train``.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from .images import load_npz
from .optional import progress
from .packed import SPLITS

__all__ = ["NetworkSet", "load_pth", "read_dws", "read_network", "read_nfn", "read_stacked_npz"]


@dataclass
class NetworkSet:
    """Networks of one layout in memory.

    ``weights[l]`` [n, n_in, n_out, 1], ``biases[l]`` [n, n_out, 1]; ``labels`` int64 [n]; ``splits`` uint8 [n] (0
    train, 1 val, 2 test); ``metadata``: what is known of the networks; ``extras``: further arrays [n].
    """

    weights: list[torch.Tensor]
    biases: list[torch.Tensor]
    labels: torch.Tensor
    splits: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)


def load_pth(path: str | os.PathLike) -> Any:
    """``torch.load`` on the CPU with ``weights_only``: tensors and plain values; code in the file is refused, not
    run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: truncated, or not a .pth file of tensors and plain values: {reason}") from error


def read_network(path: str | os.PathLike) -> tuple[list[torch.Tensor], list[torch.Tensor], int | None]:
    """One network's ``(weights, biases, label)`` from a state dict file.

    Layers are the pairs ``<name>.weight`` [n_out, n_in] and ``<name>.bias`` [n_out] in the order of the state dict;
    weights come back as float32 [n_in, n_out, 1], biases as [n_out, 1]. ``label`` is the state dict's entry ``label``,
    or None. Raises ValueError that names the file and the entry: not a state dict, a layer without its bias, layers
    that do not follow each other, NaN or Inf.
    """
    path = Path(path)
    state = load_pth(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a state dict: it holds a {type(state).__name__}")
    weights: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    label = None
    used = set()
    for name, value in state.items():
        if name == "label":
            label = int(value)
            used.add(name)
        if not str(name).endswith("weight"):
            continue
        bias_name = str(name)[: -len("weight")] + "bias"
        if bias_name not in state:
            raise ValueError(f"{path}: {name} has no {bias_name}")
        weight, bias = state[name], state[bias_name]
        for entry, tensor, ndim in ((name, weight, 2), (bias_name, bias, 1)):
            if not isinstance(tensor, torch.Tensor) or tensor.ndim != ndim:
                got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"{path}: {entry} must be a tensor of {ndim} dimensions, got {got}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{path}: {entry} holds {'NaN' if bool(torch.isnan(tensor).any()) else 'Inf'}")
        if weights and weight.shape[1] != weights[-1].shape[1]:
            raise ValueError(
                f"{path}: {name} has {weight.shape[1]} inputs after a layer of {weights[-1].shape[1]} neurons"
            )
        if len(bias) != len(weight):
            raise ValueError(f"{path}: {bias_name} has {len(bias)} entries, {name} has {len(weight)} outputs")
        weights.append(weight.detach().to(torch.float32).t().unsqueeze(-1))
        biases.append(bias.detach().to(torch.float32).unsqueeze(-1))
        used |= {name, bias_name}
    if not weights:
        raise ValueError(f"{path}: no entry ends in 'weight'; it has {', '.join(map(str, list(state)[:8])) or 'none'}")
    unused = [name for name in state if name not in used]
    if unused:
        raise ValueError(f"{path}: {unused[0]!r} is neither a weight, nor the bias of one, nor the label")
    return weights, biases, label


def _read_networks(
    files: Sequence[Path], labels: Sequence[int | None], show_progress: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Stack the networks of ``files``; a label that is None is taken from the file."""
    weights: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    found = torch.empty(len(files), dtype=torch.int64)
    for index, file in enumerate(progress(files, desc="read", unit="network", disable=not show_progress)):
        layer_weights, layer_biases, label = read_network(file)
        if not weights:
            weights = [torch.empty(len(files), *w.shape) for w in layer_weights]
            biases = [torch.empty(len(files), *b.shape) for b in layer_biases]
        layout = [tuple(w.shape[:2]) for w in layer_weights]
        first = [tuple(w.shape[1:3]) for w in weights]
        if layout != first:
            raise ValueError(
                f"{file}: its layers are {layout}, those of {files[0]} are {first}; a packed file has one layout"
            )
        for stack, value in zip([*weights, *biases], [*layer_weights, *layer_biases], strict=True):
            stack[index] = value
        chosen = labels[index] if labels[index] is not None else label
        if chosen is None:
            raise ValueError(f"{file}: no label, neither in the splits nor in the state dict")
        found[index] = chosen
    return weights, biases, found


def _load_splits(path: Path) -> dict[str, tuple[list[str], list[int | None]]]:
    """Paths and labels of each split of a DWS splits file."""
    if not path.is_file():
        raise FileNotFoundError(f"no splits file at {path}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated, or not a JSON file: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected an object with {', '.join(SPLITS)}")
    result = {}
    for split, entry in content.items():
        if split not in SPLITS:
            raise ValueError(f"{path}: unknown split {split!r}; expected {', '.join(SPLITS)}")
        paths, labels = (entry.get("path"), entry.get("label")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths):
            raise ValueError(f"{path}: split {split!r} must be a list of paths, or have one under 'path'")
        if labels is not None and (not isinstance(labels, list) or len(labels) != len(paths)):
            got = len(labels) if isinstance(labels, list) else type(labels).__name__
            raise ValueError(f"{path}: split {split!r} has {len(paths)} paths; its labels must be as many, got {got}")
        try:
            result[split] = (paths, [None] * len(paths) if labels is None else [int(label) for label in labels])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: split {split!r} has a label that is not an integer: {error}") from error
    return result


def _resolve(root: Path, paths: Sequence[str], splits_file: Path) -> list[Path]:
    """Files of ``paths``, which may start with folders that the data no longer stands in: those are dropped."""
    dropped = 0
    result = []
    for text in paths:
        parts = [p for p in PurePosixPath(text).parts if p not in (".", "/")]
        for drop in (dropped, *range(len(parts))):
            candidate = root.joinpath(*parts[drop:])
            if candidate.is_file():
                dropped = drop
                break
        else:
            raise FileNotFoundError(f"{splits_file}: {text!r} is not under {root}, with or without its leading folders")
        result.append(candidate)
    return result


def read_dws(root: str | os.PathLike, splits: str | os.PathLike, *, show_progress: bool = False) -> NetworkSet:
    """A DWS data set (MNIST INRs, Fashion-MNIST INRs): state dicts under ``root``, ``splits`` a JSON file.

    Networks come in the order train, val, test of the splits file. Leading folders of its paths that do not exist under
    ``root`` are dropped. Labels come from the splits file, else from the state dicts. Raises FileNotFoundError or
    ValueError that name the file.
    """
    root, splits = Path(root), Path(splits)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    table = _load_splits(splits)
    names: list[str] = []
    labels: list[int | None] = []
    codes: list[int] = []
    for code, split in enumerate(SPLITS):
        if split in table:
            names += table[split][0]
            labels += table[split][1]
            codes += [code] * len(table[split][0])
    if not names:
        raise ValueError(f"{splits}: it lists no networks")
    files = _resolve(root, names, splits)
    seen: dict[Path, int] = {}
    for index, file in enumerate(files):
        if file in seen:
            first, second = SPLITS[codes[seen[file]]], SPLITS[codes[index]]
            raise ValueError(f"{splits}: {names[index]!r} is listed twice, in {first} and in {second}")
        seen[file] = index
    weights, biases, found = _read_networks(files, labels, show_progress)
    metadata = {"activation": "sine", "w0": 30.0, "symmetry": "sign", "input_value": 1.0, "output_offset": 0.5}
    return NetworkSet(weights, biases, found, np.array(codes, np.uint8), metadata)


def read_nfn(
    root: str | os.PathLike,
    *,
    split_points: tuple[int, int] = (45_000, 50_000),
    prefix: str = "randinit_smaller",
    augmented: int = 0,
    show_progress: bool = False,
) -> NetworkSet:
    """The NFN CIFAR-10 INRs: ``<prefix>_<class>s/...net<index>.pth`` under ``root``.

    Indices below ``split_points[0]`` are for training, below ``split_points[1]`` for validation, the others for
    testing. ``augmented``: how many sets ``<prefix>_aug<k>_<class>s`` of further fits to add to the training part;
    their networks of validation and test images are left out. Networks come by set, then by index. Raises
    FileNotFoundError or ValueError: no networks, an index twice or missing, split points outside the indices.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder at {root}")
    val_point, test_point = split_points
    files: list[Path] = []
    labels: list[int | None] = []
    codes: list[int] = []
    for name in [prefix, *(f"{prefix}_aug{k}" for k in range(augmented))]:
        found: dict[int, tuple[Path, int]] = {}
        for folder in sorted(root.glob(f"{name}_[0-9]s")):
            for file in sorted(folder.glob("*.pth")):
                match = re.search(r"net(\d+)\.pth$", file.name)
                if match is None:
                    raise ValueError(f"{file}: expected a name that ends in net<index>.pth")
                index = int(match.group(1))
                if index in found:
                    raise ValueError(f"{file}: network {index} is also {found[index][0]}")
                found[index] = (file, int(folder.name[-2]))
        if not found:
            raise FileNotFoundError(f"no networks at {root / (name + '_<class>s')}/...net<index>.pth")
        missing = next((i for i in range(len(found)) if i not in found), None)
        if missing is not None:
            raise ValueError(f"{root}: {name} has {len(found)} networks, but none with index {missing}")
        if name == prefix and not 0 < val_point <= test_point <= len(found):
            raise ValueError(
                f"split_points {[val_point, test_point]} must be ascending and within {len(found)} networks"
            )
        for index in sorted(found):
            code = 0 if index < val_point else 1 if index < test_point else 2
            if name == prefix or code == 0:
                files.append(found[index][0])
                labels.append(found[index][1])
                codes.append(code)
    weights, biases, classes = _read_networks(files, labels, show_progress)
    metadata = {"activation": "sine", "w0": 30.0, "symmetry": "sign", "input_value": 1.0}
    return NetworkSet(weights, biases, classes, np.array(codes, np.uint8), metadata)


def read_stacked_npz(path: str | os.PathLike) -> NetworkSet:
    """Stacked INRs in one .npz: ``w0, w1, ...`` [n, n_in, n_out], ``b0, b1, ...`` [n, n_out], ``labels`` [n],
    ``n_train``.

    The first ``n_train`` networks are for training, the others for testing. Further arrays [n] are kept as extras. The
    dtype of weights and biases is kept. Raises FileNotFoundError or ValueError that names the array.
    """
    path = Path(path)
    arrays = load_npz(path)
    layers = sum(re.fullmatch(r"w\d+", name) is not None for name in arrays)
    expected = [f"{kind}{layer}" for kind in "wb" for layer in range(max(1, layers))] + ["labels", "n_train"]
    missing = [name for name in expected if name not in arrays]
    if missing:
        raise ValueError(f"{path}: no array {missing[0]!r}; it has {', '.join(arrays) or 'none'}")
    n = len(arrays["labels"])
    n_train = arrays["n_train"]
    if n_train.ndim or n_train.dtype.kind not in "iu" or not 0 < int(n_train) <= n:
        raise ValueError(f"{path}: n_train must be a number from 1 to {n}, got {n_train}")
    for name in expected[:-2]:
        ndim = 3 if name[0] == "w" else 2
        if arrays[name].ndim != ndim or len(arrays[name]) != n or arrays[name].dtype.kind != "f":
            array = arrays[name]
            raise ValueError(
                f"{path}: {name} must be {n} networks in {ndim} dimensions, got {array.dtype} {list(array.shape)}"
            )
    splits = np.where(np.arange(n) < int(n_train), 0, 2).astype(np.uint8)
    metadata = {"activation": "sine", "w0": 30.0, "symmetry": "sign", "input_value": 1.0, "output_offset": 0.5}
    return NetworkSet(
        [torch.from_numpy(arrays[f"w{layer}"]).unsqueeze(-1) for layer in range(layers)],
        [torch.from_numpy(arrays[f"b{layer}"]).unsqueeze(-1) for layer in range(layers)],
        torch.from_numpy(arrays["labels"].astype(np.int64)),
        splits,
        metadata,
        {name: array for name, array in arrays.items() if name not in expected and array.shape[:1] == (n,)},
    )
