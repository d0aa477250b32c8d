"""Checkpoints that are either whole or absent: atomic writes, integrity checks, weights_only loading."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from scalegmn_fast.data.files import atomic_write

__all__ = ["capture_rng", "load_checkpoint", "restore_rng", "save_checkpoint", "write_json"]

FORMAT = "scalegmn_fast.checkpoint"
VERSION = 1
_REQUIRED = ("model", "config", "layout", "epoch", "step", "seed")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON atomically; NaN and infinity become null, so that every JSON reader takes the file."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as f:
        f.write(text.encode())


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Writes ``state`` (tensors, dicts, lists, numbers and strings only) atomically, marked with format and version."""
    plain = {"format": FORMAT, "version": VERSION, **_plain(state, "state")}
    with atomic_write(path) as f:
        torch.save(plain, f)


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code from the file.

    Raises FileNotFoundError, or ValueError for a file that is truncated, corrupt (checksums are verified), not a
    checkpoint of this package, or of a newer version. Nothing is written.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as e:  # zipfile raises various types on damaged headers
        raise ValueError(f"checkpoint '{path}' is truncated or not a checkpoint: {e}") from e
    if damaged is not None:
        raise ValueError(f"checkpoint '{path}' is corrupt: the checksum of '{damaged}' does not match")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"checkpoint '{path}' cannot be read as plain tensors: {str(e).splitlines()[0]}") from e
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        what = f"a dict with keys {', '.join(map(str, list(state)[:4]))}..." if isinstance(state, dict) else type(state)
        raise ValueError(f"checkpoint '{path}' was not written by scalegmn_fast's trainer: it holds {what}")
    if state.get("version") != VERSION:
        raise ValueError(f"checkpoint '{path}' has version {state.get('version')!r}; this package reads {VERSION}")
    missing = [k for k in _REQUIRED if k not in state]
    if missing:
        raise ValueError(f"checkpoint '{path}' lacks {', '.join(missing)}")
    return state


def capture_rng() -> dict[str, Any]:
    """The states of torch's (CPU and CUDA), NumPy's and Python's global generators, as plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, torch.tensor(words), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Sets the generators to what `capture_rng` returned; CUDA's only where as many devices are present."""
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "cuda" in state and torch.cuda.is_available() and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _plain(value: Any, where: str) -> Any:
    """Copies ``value`` into plain containers; tensors are detached, brought to the CPU and compacted."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if value is None:
        return None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {k if isinstance(k, int) else str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where) for v in value]
    raise TypeError(f"{where}: expected tensors, dicts, lists, numbers and strings, got {type(value).__name__}")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
