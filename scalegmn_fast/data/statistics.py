"""Per-layer mean and standard deviation of weights and biases, and normalising by them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from .cnns import PackedCnns
from .files import atomic_write
from .packed import PackedDataset

__all__ = ["LayerStatistics"]

_CHUNK_FLOATS = 1 << 23


class LayerStatistics:
    """Means and standard deviations of weights and biases, layer by layer, and normalisation by them.

    ``weight_mean[l]``, ``weight_std[l]``: float32, of a shape that broadcasts to [n_in, n_out, d_e]; ``bias_mean[l]``,
    ``bias_std[l]``: to [n_out, 1]. One number per layer and kernel tap ([1, 1, d_e], [1, 1]) keeps every permutation
    symmetry; zero means (``center=False``) keep sign and scale symmetries too. Published statistics hold one number per
    parameter. Raises ValueError where a list's length or shape is wrong, or a standard deviation is not positive and
    finite.
    """

    def __init__(
        self,
        weight_mean: Sequence[torch.Tensor],
        weight_std: Sequence[torch.Tensor],
        bias_mean: Sequence[torch.Tensor],
        bias_std: Sequence[torch.Tensor],
    ):
        lists = {"weight_mean": weight_mean, "weight_std": weight_std, "bias_mean": bias_mean, "bias_std": bias_std}
        for name, values in lists.items():
            if len(values) != len(weight_mean) or not len(values):
                raise ValueError(f"{name}: expected one tensor per layer ({len(weight_mean)}), got {len(values)}")
            ndim = 3 if name.startswith("weight") else 2
            for layer, value in enumerate(values):
                if value.ndim != ndim:
                    raise ValueError(f"{name}[{layer}] must have {ndim} dimensions, got shape {list(value.shape)}")
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{name}[{layer}] holds NaN or Inf")
                if name.endswith("std") and not bool((value > 0).all()):
                    raise ValueError(f"{name}[{layer}] must be positive, got a least value of {float(value.min())}")
        self.weight_mean = [v.detach().to(torch.float32) for v in weight_mean]
        self.weight_std = [v.detach().to(torch.float32) for v in weight_std]
        self.bias_mean = [v.detach().to(torch.float32) for v in bias_mean]
        self.bias_std = [v.detach().to(torch.float32) for v in bias_std]

    @classmethod
    def from_dataset(cls, dataset: PackedDataset | PackedCnns, indices=None, *, center: bool = True) -> LayerStatistics:
        """Statistics of the networks ``indices`` (the training split where not given): one number per layer and kernel
        tap.

        Accumulated in float64, chunk by chunk. ``center=False``: the means are zero and the deviations are from zero.
        Taps that never vary, such as the padding of small kernels, get mean 0 and deviation 1: they stay as they are.
        CNNs of a `PackedCnns` have one number per layer, over the kernels as they are, without padding; so do layers
        that only some networks have, and a layer that none of them has gets mean 0 and deviation 1.
        """
        selected = dataset.split("train") if indices is None else torch.as_tensor(indices)
        if len(selected) == 0:
            raise ValueError("indices: statistics need at least one network, got none")
        varying = isinstance(dataset, PackedCnns)
        layers = dataset.hidden_layers + 1
        # Count, mean and sum of squared deviations per tap, merged over chunks; weights first.
        moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        for weights, biases in (_kernels if varying else _chunks)(dataset, selected):
            for kind, blocks in enumerate((weights, biases)):
                for layer, block in enumerate(blocks):
                    rows = block.double().reshape(-1, 1 if varying else block.shape[-1])
                    _merge(moments, kind * layers + layer, rows, center)
        means, stds = [], []
        for position in range(2 * layers):
            neutral = (1, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
            count, mean, squares = moments.get(position, neutral)
            std = (squares / count).sqrt()
            changes = std > 1e-12 * mean.abs()
            shape = (1, 1, -1) if position < layers else (1, 1)
            means.append(torch.where(changes, mean, 0.0).reshape(shape))
            stds.append(torch.where(changes, std, 1.0).reshape(shape))
        return cls(means[:layers], stds[:layers], means[layers:], stds[layers:])

    def _check(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> None:
        layers = len(self.weight_mean)
        if len(weights) != layers or len(biases) != layers:
            raise ValueError(f"expected weights and biases of {layers} layers, got {len(weights)} and {len(biases)}")
        for kind, values, means in (("weights", weights, self.weight_mean), ("biases", biases, self.bias_mean)):
            for layer, (value, mean) in enumerate(zip(values, means, strict=True)):
                fits = value.ndim == mean.ndim + 1 and all(
                    m in (1, v) for m, v in zip(mean.shape, value.shape[1:], strict=True)
                )
                if not fits:
                    raise ValueError(
                        f"{kind}[{layer}]: shape {list(value.shape)} does not fit statistics of {list(mean.shape)}"
                    )

    def normalize(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """``(value - mean) / std`` of weights [b, n_in, n_out, d_e] and biases [b, n_out, 1], in their dtype and
        device."""
        self._check(weights, biases)
        return (
            [(w - m.to(w)) / s.to(w) for w, m, s in zip(weights, self.weight_mean, self.weight_std, strict=True)],
            [(b - m.to(b)) / s.to(b) for b, m, s in zip(biases, self.bias_mean, self.bias_std, strict=True)],
        )

    def normalize_layers(
        self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(value - mean) / std`` of one network's ``(weight, bias)`` pairs, whatever their shapes; statistics must
        have one number per layer, and may have more layers than the network."""
        numbers = (self.weight_mean, self.weight_std, self.bias_mean, self.bias_std)
        if len(layers) > len(self.weight_mean) or any(v.numel() != 1 for values in numbers for v in values):
            raise ValueError(
                f"statistics must hold one number for each of {len(layers)} layers, got "
                f"{[v.numel() for v in self.weight_mean]}"
            )
        found = [[float(value) for value in values] for values in zip(*numbers, strict=True)]
        return [
            ((weight - wm) / ws, (bias - bm) / bs)
            for (weight, bias), (wm, ws, bm, bs) in zip(layers, found[: len(layers)], strict=True)
        ]

    def denormalize(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """``value * std + mean``: undoes `normalize`."""
        self._check(weights, biases)
        return (
            [w * s.to(w) + m.to(w) for w, m, s in zip(weights, self.weight_mean, self.weight_std, strict=True)],
            [b * s.to(b) + m.to(b) for b, m, s in zip(biases, self.bias_mean, self.bias_std, strict=True)],
        )

    def state_dict(self) -> dict[str, dict[str, list[torch.Tensor]]]:
        """The nesting of the published statistics files: ``{"weights": {"mean": [...], "std": [...]}, "biases":
        ...}``."""
        return {
            "weights": {"mean": list(self.weight_mean), "std": list(self.weight_std)},
            "biases": {"mean": list(self.bias_mean), "std": list(self.bias_std)},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, dict[str, list[torch.Tensor]]]) -> LayerStatistics:
        """From `state_dict`, or from the contents of a published statistics file.

        The published statistics of CNNs hold one number per kernel tap, [height, width], and a single one for linear
        layers; they become [1, 1, d_e] with d_e = height * width of the largest kernel, a linear layer's number
        at the first tap and mean 0, deviation 1 at the others.
        """
        parts = []
        for kind in ("weights", "biases"):
            for moment in ("mean", "std"):
                try:
                    values = [torch.as_tensor(v) for v in state[kind][moment]]
                except (KeyError, TypeError) as error:
                    raise ValueError(
                        f"statistics lack {kind!r} -> {moment!r}, a list of one tensor per layer"
                    ) from error
                parts.append((kind, moment, values))
        taps = max(
            (math.prod(v.shape) for kind, _, vs in parts if kind == "weights" for v in vs if v.ndim == 2), default=1
        )

        def shaped(kind: str, moment: str, value: torch.Tensor) -> torch.Tensor:
            if kind == "biases":
                return value.reshape(1, 1) if value.ndim < 2 else value
            if value.ndim > 2:
                return value
            full = torch.full((1, 1, taps), 0.0 if moment == "mean" else 1.0)
            full[0, 0, : value.numel()] = value.reshape(-1)
            return full

        return cls(*([shaped(kind, moment, v) for v in values] for kind, moment, values in parts))

    def save(self, path: str | os.PathLike) -> None:
        """Write `state_dict` to a .pth file, atomically."""
        with atomic_write(path) as handle:
            torch.save(self.state_dict(), handle)

    @classmethod
    def load(cls, path: str | os.PathLike) -> LayerStatistics:
        """From a .pth file of `save` or a published one; never runs code from the file (``weights_only``)."""
        from .formats import load_pth

        state = load_pth(path)
        if not isinstance(state, dict):
            raise ValueError(f"{Path(path)}: not a statistics file: it holds a {type(state).__name__}, not a dict")
        try:
            return cls.from_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{Path(path)}: {error}") from error


def _chunks(dataset: PackedDataset, selected: torch.Tensor):
    """``(weights, biases)`` of the networks, so many at a time that they fit into memory."""
    per_network = sum(a * b for a, b in zip(dataset.layout, dataset.layout[1:], strict=False)) * dataset.edge_dim
    for part in selected.split(max(1, _CHUNK_FLOATS // per_network)):
        yield dataset.weights(part)


def _kernels(dataset: PackedCnns, selected: torch.Tensor):
    """``(weights, biases)``, each stacked over networks of one architecture."""
    rows = dataset.rows(selected)
    for row in rows.unique().tolist():
        shapes = [s for w in dataset.architectures[row]["weights"] for s in (w, w[:1])]
        sizes = [math.prod(shape) for shape in shapes]
        for part in selected[rows == row].split(max(1, _CHUNK_FLOATS // sum(sizes))):
            pieces = torch.stack([dataset.parameters(index) for index in part.tolist()]).split(sizes, dim=1)
            yield pieces[::2], pieces[1::2]


def _merge(moments: dict, position: int, rows: torch.Tensor, center: bool) -> None:
    """Adds rows [r, taps] to the moments of a position."""
    count, mean = len(rows), rows.mean(0) if center else torch.zeros(rows.shape[1], dtype=torch.float64)
    squares = (rows - mean).square().sum(0)
    if position in moments:
        count_before, mean_before, squares_before = moments[position]
        total, shift = count + count_before, mean - mean_before
        squares = squares_before + squares + shift.square() * (count * count_before / total)
        count, mean = total, mean_before + shift * (count / total)
    moments[position] = (count, mean, squares)
