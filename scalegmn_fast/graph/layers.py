"""Networks as their layers' parameters, and how weights become edge features: what the builders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

LINEAR_TAPS = ("centre", "first")


class Network(NamedTuple):
    """One network as its layers' parameters.

    Attributes:
        label: the network in messages; names: its layers there, appended to the label.
        weights: [out, in] or [out, in, kh, kw] per layer; biases: [out] or None per layer.
    """

    label: str
    names: list[str]
    weights: list[Tensor]
    biases: list[Tensor | None]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the weights."""
        return tuple(tuple(w.shape) for w in self.weights)


class Grid(NamedTuple):
    """How weights become edge features.

    Attributes:
        height, width: the size to which kernels are padded.
        d_e: numbers per edge, at least height * width.
        tap: the place of a linear layer's weight among them.
    """

    height: int
    width: int
    d_e: int
    tap: int


def check_list(name: str, values) -> None:
    """Raises TypeError, ValueError where the argument ``name`` is no list of networks, or an empty one."""
    if not isinstance(values, Sequence) or isinstance(values, str | nn.Module):
        raise TypeError(f"{name} must be a list, one entry per network, got {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} must hold at least one network, got an empty list")


def layout_of(network: Network) -> tuple[int, ...]:
    """Neurons (channels) per layer, inputs first."""
    return (network.weights[0].shape[1], *(w.shape[0] for w in network.weights))


def pixels_of(network: Network) -> list[int]:
    """Per layer, how many of its inputs belong to one neuron before it: 1, or the pixels of a flattened channel.

    Raises:
        ValueError: a layer that does not fit the one before it.
    """
    counts = []
    previous = network.weights[0]
    for index, w in enumerate(network.weights):
        width = previous.shape[0] if index else w.shape[1]
        count = w.shape[1] // width if width else 0
        flattens = w.ndim == 2 and previous.ndim == 4
        if w.numel() == 0 or count * width != w.shape[1] or (count > 1 and not flattens):
            expected = f"{width}, or a multiple of it after Flatten" if flattens else str(width)
            raise ValueError(
                f"{network.label}{network.names[index]} must read the {width} neurons before it: expected {expected} "
                f"inputs, got shape {list(w.shape)}"
            )
        counts.append(count)
        previous = w
    return counts


def check_tensors(networks: list[Network]) -> None:
    """Raises TypeError, ValueError where a parameter has another dtype or device than the first weight."""
    first = networks[0].weights[0]
    for network in networks:
        for name, w, b in zip(network.names, network.weights, network.biases, strict=True):
            for kind, value in (("weight", w), ("bias", b)):
                if value is None:
                    continue
                if not value.is_floating_point() or value.dtype != first.dtype:
                    raise TypeError(
                        f"{network.label}{name}: {kind} must be floating point of the first weight's dtype "
                        f"{first.dtype}, got {value.dtype}"
                    )
                if value.device != first.device:
                    raise ValueError(
                        f"{network.label}{name}: {kind} must be on the first weight's device {first.device}, "
                        f"got {value.device}"
                    )


def grid_of(networks: list[Network], pixels: int, kernel_size: tuple[int, int] | None, linear_tap: str) -> Grid:
    """The grid of a batch: that of its largest kernels, or ``kernel_size``, for linear layers of up to ``pixels``.

    Raises:
        TypeError, ValueError: ``kernel_size`` is no pair of integers or too small, ``linear_tap`` is unknown.
    """
    if linear_tap not in LINEAR_TAPS:
        raise ValueError(f"linear_tap must be one of {', '.join(LINEAR_TAPS)}, got {linear_tap!r}")
    kernels = {w.shape[2:] for network in networks for w in network.weights if w.ndim == 4} | {(1, 1)}
    height, width = (max(kernel[axis] for kernel in kernels) for axis in (0, 1))
    if kernel_size is not None:
        given = tuple(kernel_size) if isinstance(kernel_size, Sequence) else kernel_size
        if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(size, int) for size in given):
            raise TypeError(f"kernel_size must be two integers, height and width, got {kernel_size!r}")
        if given[0] < height or given[1] < width:
            raise ValueError(f"kernel_size must be at least the largest kernels, {(height, width)}, got {given}")
        height, width = given
    tap = (height - 1) // 2 * width + (width - 1) // 2 if linear_tap == "centre" else 0
    return Grid(height, width, max(height * width, pixels), tap)


def edge_features(weight: Tensor, pixels: int, grid: Grid) -> Tensor:
    """[B, out, in, *kernel] or [B, out, in * pixels] -> [B, in, out, d_e], as `builders` says. Differentiable."""
    if weight.ndim == 5:
        rows, columns = grid.height - weight.shape[3], grid.width - weight.shape[4]
        if rows or columns:
            weight = F.pad(weight, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        features, before = weight.flatten(3), 0
    elif pixels > 1:
        features, before = weight.unflatten(2, (-1, pixels)), 0
    else:
        features, before = weight.unsqueeze(-1), grid.tap
    after = grid.d_e - before - features.shape[-1]
    if before or after:
        features = F.pad(features, (before, after))
    return features.transpose(1, 2)
