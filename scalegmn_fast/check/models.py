"""Published models against float64: a case holds a model, networks for it to read, and the exact results."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import scalegmn_fast

from ..graph import GraphBatch
from ..testing import relative_error
from .rows import worst

# A bound is a factor times the oracle's own error in float32, in units of rounding, and never less than the second
# number.
FACTOR, UNITS = 16.0, 256.0
QUICK_WIDTH = 16
BATCH = 2
# Gradients that are 0 in exact arithmetic (of what a softmax adds to all logits alike) are in float64 less than this
# part of the largest one.
ROUNDING = 1e-13


class ModelCase(ABC):
    """A published model with random parameters, the networks that it reads, and the oracle's results for them.

    A subclass sets `model` and `networks` (tensors of the networks by name, float32), defines the abstract methods,
    and calls `solve` at the end of its constructor.
    """

    model: nn.Module
    networks: dict[str, Tensor]

    def solve(self) -> None:
        """Computes what the checks compare with."""
        self.cotangents: list[Tensor] | None = None
        self.exact = self.oracle(torch.float64)
        largest = max(float(value.abs().max()) for key, value in self.exact.items() if not is_output(key))
        self.vanishing = {
            key: largest
            for key, value in self.exact.items()
            if not is_output(key) and 0.0 < float(value.abs().max()) < ROUNDING * largest
        }
        self.error_units = {
            key: self.error(key, value) / torch.finfo(value.dtype).eps
            for key, value in self.oracle(torch.float32).items()
        }

    @abstractmethod
    def graph(self, networks: Mapping[str, Tensor]) -> GraphBatch:
        """The networks as the model reads them."""

    @abstractmethod
    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """`results` of the computation that the model is compared with, in a dtype, on the CPU."""

    @abstractmethod
    def equivariance(self, backend: str, device: str, dtype: torch.dtype) -> tuple[float, float]:
        """How far the exactly equivariant variant of the model is from that, and a bound."""

    def placed(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The networks' tensors as leaves on a device."""
        return {name: value.detach().to(device, dtype).requires_grad_() for name, value in self.networks.items()}

    def results(self, outputs: Any, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs and the gradients of the leaves, by name."""
        outputs = [outputs] if isinstance(outputs, Tensor) else [*outputs[0], *outputs[1]]
        if self.cotangents is None:
            self.cotangents = [
                torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).cos().reshape(out.shape) for out in outputs
            ]
        inputs = list(leaves.values())
        cotangents = [cotangent.to(out) for cotangent, out in zip(self.cotangents, outputs, strict=True)]
        grads = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)
        found = {f"output[{k}]": out.detach() for k, out in enumerate(outputs)}
        for name, leaf, grad in zip(leaves, inputs, grads, strict=True):
            found[f"gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
        return found

    def error(self, key: str, value: Tensor) -> float:
        """Error of a result relative to the exact one's magnitude, or to the largest gradient's if that vanishes."""
        if key in self.vanishing:
            return float((value.detach().double().cpu() - self.exact[key]).abs().max()) / self.vanishing[key]
        return relative_error(value, self.exact[key])

    def check(self, backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        """(error, bound) of output, gradients and equivariance."""
        model, networks = deepcopy(self.model).to(device, dtype), self.placed(device, dtype)

        def compute() -> dict[str, Tensor]:
            return self.results(model(self.graph(networks)), {**networks, **trainable(model)})

        with scalegmn_fast.backend(backend):
            if backend == "triton":  # side by side; one after the other they take minutes
                with importlib.import_module("scalegmn_fast.kernels.launching").compile_ahead():
                    compute()
            actual = compute()
        return {**self.compare(actual, dtype), "equivariance": self.equivariance(backend, device, dtype)}

    def compare(self, actual: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        """The worst (error, bound) of outputs and of gradients."""
        eps = torch.finfo(dtype).eps
        typical = sorted(self.error_units.values())[len(self.error_units) // 2]
        checks: dict[str, list[tuple[float, float]]] = {"output": [], "gradients": []}
        for key, value in actual.items():
            bound = max(FACTOR * max(self.error_units[key], typical), UNITS) * eps
            checks["output" if is_output(key) else "gradients"].append((self.error(key, value), bound))
        return {quantity: worst(found) for quantity, found in checks.items()}


def is_output(key: str) -> bool:
    return key.startswith("output")


def numbered(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> dict[str, Tensor]:
    """Weights and biases of all layers by name."""
    named = {f"weights[{k}]": w for k, w in enumerate(weights)}
    return {**named, **{f"biases[{k}]": b for k, b in enumerate(biases)}}


def in_layers(networks: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases per layer: what `numbered` was given."""
    return tuple([value for name, value in networks.items() if name.startswith(kind)] for kind in ("weights", "biases"))


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
