"""Golden vectors: outputs and gradients of the original implementation, in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GoldenVector", "load_vector"]


@dataclass(frozen=True)
class GoldenVector:
    """One run of the original model, all tensors float64 (counters int64) on the CPU.

    ``outputs`` is one tensor for an invariant head, the new weights followed by the new biases for an equivariant one.
    Gradients are those of ``sum(<output, cotangent>)``; parameters that the original never uses have none. Vectors of
    Neural Graphs have no sign mask and the input value 0.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    weights: list[Tensor]
    biases: list[Tensor]
    input_value: float
    sign_mask: Tensor | None
    outputs: list[Tensor]
    cotangents: list[Tensor]
    weight_grads: list[Tensor]
    bias_grads: list[Tensor]
    state_grads: dict[str, Tensor]


def load_vector(path: str | PathLike[str]) -> GoldenVector:
    """Reads a golden vector (``.npz``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a golden vector; names the array that is missing.
    """
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}

    def take(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"{path}: expected an array {name!r}, got {sorted(arrays)[:8]} ...")
        return arrays[name]

    def numbered(prefix: str) -> list[Tensor]:
        take(f"{prefix}/0")
        count = sum(name.startswith(f"{prefix}/") for name in arrays)
        return [torch.from_numpy(take(f"{prefix}/{k}")) for k in range(count)]

    def named(prefix: str) -> dict[str, Tensor]:
        start = len(prefix) + 1
        return {
            name[start:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith(prefix + "/")
        }

    return GoldenVector(
        config=json.loads(str(take("config"))),
        state=named("state"),
        weights=numbered("weights"),
        biases=numbered("biases"),
        input_value=float(arrays.get("input_node_value", 0.0)),
        sign_mask=torch.from_numpy(arrays["sign_mask"]) if "sign_mask" in arrays else None,
        outputs=numbered("out"),
        cotangents=numbered("cotangent"),
        weight_grads=numbered("grad_weights"),
        bias_grads=numbered("grad_biases"),
        state_grads=named("grad_state"),
    )
