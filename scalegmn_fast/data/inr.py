"""Evaluating stacks of implicit neural representations (INRs): coordinate networks that stand for images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .files import atomic_write
from .optional import require
from .packed import PackedDataset

__all__ = [
    "ACTIVATIONS",
    "coordinates",
    "evaluate_inrs",
    "images_of",
    "layer_w0",
    "plot_reconstructions",
    "psnr",
    "reconstruct",
]

ACTIVATIONS = ("sine", "relu", "tanh")


def coordinates(height: int, width: int) -> torch.Tensor:
    """Pixel centres (column, row) from -1 to 1 with the corners at ±1: float32 [height * width, 2], row-major."""
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([grid[1].reshape(-1), grid[0].reshape(-1)], dim=1)


def layer_w0(w0: float | Sequence[float], hidden_layers: int) -> list[float]:
    """One w0 per hidden layer; ValueError where their number is wrong or one is not positive."""
    values = [float(v) for v in (w0 if isinstance(w0, Sequence) else [w0])]
    if len(values) == 1:
        values = values * hidden_layers
    if len(values) != hidden_layers:
        raise ValueError(f"w0: expected one value or one for each of {hidden_layers} hidden layers, got {len(values)}")
    if any(not 0.0 < v < float("inf") for v in values):
        raise ValueError(f"w0 must be positive and finite, got {values}")
    return values


def evaluate_inrs(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    points: torch.Tensor,
    *,
    activation: str = "sine",
    w0: float | Sequence[float] = 30.0,
    output_offset: float = 0.0,
) -> torch.Tensor:
    """Values [B, P, n_out] of B networks at ``points`` [P, n_in].

    ``weights[l]`` [B, n_in, n_out(, 1)], ``biases[l]`` [B, n_out(, 1)]; hidden layers compute ``sin(w0 (x W + b))``, or
    relu or tanh of ``x W + b`` (then w0 is not used), the last layer ``x W + b + output_offset``. In the dtype of the
    weights.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    scales = layer_w0(w0, len(weights) - 1)
    x = points.to(weights[0].dtype).expand(weights[0].shape[0], -1, -1)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        weight = weight.squeeze(-1) if weight.ndim == 4 else weight
        x = torch.baddbmm(bias.reshape(len(bias), 1, -1), x, weight)
        if layer < len(weights) - 1:
            if activation == "sine":
                x = torch.sin(x * scales[layer])
            else:
                x = torch.relu(x) if activation == "relu" else torch.tanh(x)
    return x + output_offset


def psnr(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per network, for images [B, ...] with peak 1; values are not clipped."""
    error = (values.double() - targets.double()).square().flatten(1).mean(1)
    return (-10.0 * torch.log10(error.clamp_min(1e-20))).float()


def reconstruct(dataset: PackedDataset, indices, *, shape: tuple[int, int] | None = None) -> torch.Tensor:
    """Images float32 [b, height, width, channels] that the networks ``indices`` of a packed dataset of INRs stand for.

    ``shape`` (height, width) is that of the images they were fitted to unless given: any other resolution works.
    """
    if dataset.layout[0] != 2:
        raise ValueError(f"images need networks with 2 inputs (column, row), got layout {dataset.layout}")
    if shape is None:
        if "image_shape" not in dataset.metadata:
            raise ValueError(f"{dataset.path} does not say its image_shape: give shape")
        shape = tuple(dataset.metadata["image_shape"][:2])
    return images_of(*dataset.weights(indices), dataset.metadata, shape)


def images_of(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    metadata: Mapping[str, Any],
    shape: tuple[int, int],
) -> torch.Tensor:
    """Images [B, height, width, channels] of B networks, as a packed dataset's ``metadata`` says they are evaluated.

    ``weights``, ``biases`` as for :func:`evaluate_inrs`; differentiable. Metadata: ``activation`` (sine where it is not
    given), ``w0`` (30), ``output_offset`` (0).
    """
    values = evaluate_inrs(
        weights,
        biases,
        coordinates(*shape).to(weights[0].device),
        activation=metadata.get("activation", "sine"),
        w0=metadata.get("w0") or 30.0,
        output_offset=metadata.get("output_offset", 0.0),
    )
    return values.reshape(len(values), *shape, -1)


def plot_reconstructions(
    path: str | os.PathLike,
    out_png: str | os.PathLike,
    *,
    count: int = 40,
    indices: Sequence[int] | None = None,
    shape: tuple[int, int] | None = None,
    columns: int = 10,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw what INRs of a packed dataset stand for, with label, split and PSNR, into the file ``out_png``.

    ``indices`` of the networks, or ``count`` of them spread evenly over the classes. ``shape``: pixels to evaluate.
    """
    dataset = PackedDataset(path)
    if indices is None:
        labels = dataset.labels
        order = torch.argsort(labels, stable=True)
        chosen = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
    else:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
    images = reconstruct(dataset, chosen, shape=shape).clamp(0, 1)
    quality = dataset.extra("psnr", chosen) if "psnr" in dataset.extras else None
    figure_module = require("matplotlib.figure", "plotting")
    columns = max(1, min(columns, len(chosen)))
    rows = -(-len(chosen) // columns)
    figure = figure_module.Figure(figsize=(1.25 * columns, 1.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.set_axis_off()
    for position, index in enumerate(chosen.tolist()):
        image = images[position].numpy()
        axes[position].imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        label = dataset.labels[index].item()
        title = class_names[label] if class_names is not None else f"{label:g}"
        if quality is not None:
            title += f"  {quality[position].item():.0f} dB"
        axes[position].set_title(title, fontsize=8)
    layout = "-".join(map(str, dataset.layout))
    figure.suptitle(
        f"{len(chosen)} of {len(dataset)} INRs {layout} ({dataset.metadata.get('activation', 'sine')})", fontsize=9
    )
    with atomic_write(out_png) as handle:
        figure.savefig(handle, format="png", dpi=120)
