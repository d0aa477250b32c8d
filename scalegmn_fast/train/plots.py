"""Figures of a training run as PNG files, drawn without a display and written atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from scalegmn_fast.data.files import atomic_write
from scalegmn_fast.data.optional import require

__all__ = ["draw_confusion", "draw_curves", "draw_edits", "draw_scatter", "require_matplotlib"]

TRAIN, VALIDATION, TEST, GREY = "#4269d0", "#ff725c", "#3ca951", "#9aa0a6"

#: score of a task -> its name in figures
TITLES = {"accuracy": "Accuracy", "tau": "Kendall's tau", "psnr": "PSNR (dB)"}


def require_matplotlib() -> None:
    """Raises ImportError naming the extra where matplotlib is missing."""
    require("matplotlib", "drawing plots")


def draw_curves(path: str | os.PathLike, history: Mapping[str, Any]) -> None:
    """Draws loss, score and learning rate over epochs from the contents of ``metrics.json``."""
    rows = history["epochs"]
    if not rows:
        return
    score, best = history["score"], history.get("best")
    fig = _figure(12.0, 3.6)
    loss_axis, score_axis, lr_axis = fig.subplots(1, 3)
    x = [r["epoch"] for r in rows]
    marker = "o" if len(rows) < 12 else None
    style = {"linewidth": 1.8, "marker": marker, "markersize": 4}

    loss_axis.plot(x, _column(rows, "train", "loss"), color=TRAIN, label="train", **style)
    loss_axis.plot(x, _column(rows, "val", "loss"), color=VALIDATION, label="validation", **style)
    loss_axis.set(title="Loss", xlabel="epoch")

    if score == "accuracy":
        score_axis.plot(x, _column(rows, "train", score), color=TRAIN, label="train", **style)
    score_axis.plot(x, _column(rows, "val", score), color=VALIDATION, label="validation", **style)
    score_axis.set(title=TITLES[score], xlabel="epoch")
    if score == "accuracy":
        from matplotlib.ticker import PercentFormatter

        score_axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if best:
        for axis in (loss_axis, score_axis):
            axis.axvline(best["epoch"], color=GREY, linewidth=1, linestyle=":", zorder=0)
        score_axis.plot(
            best["epoch"], best["val"][score], "o", color=VALIDATION, markersize=7, markerfacecolor="white",
            markeredgewidth=1.8, label=f"best: epoch {best['epoch']}",
        )  # fmt: skip
        test = history.get("test")
        if test:
            label = f"test: {_score_text(score, test[score])}"
            score_axis.plot(best["epoch"], test[score], "*", color=TEST, markersize=12, label=label)
    rates = [(0.0, rows[0]["lr_first"])] + [(r["epoch"], r["lr"]) for r in rows]
    lr_axis.plot([e for e, _ in rates], [v for _, v in rates], color=TRAIN, linewidth=1.8)
    lr_axis.set(title="Learning rate", xlabel="epoch", ylim=(0, None))
    lr_axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in (loss_axis, score_axis, lr_axis):
        _clean(axis)
        axis.set_xlim(0, max(max(x), 1) * 1.02)
        axis.xaxis.get_major_locator().set_params(integer=True)
    loss_axis.set_ylim(bottom=0)
    loss_axis.legend(frameon=False)
    score_axis.legend(frameon=False, loc="lower right")
    _save(fig, path)


def draw_confusion(path: str | os.PathLike, confusion: Sequence[Sequence[int]], title: str) -> None:
    """Draws a confusion matrix: colour is the share of the true class, the number its percentage."""
    import numpy as np

    counts = np.asarray(confusion)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(counts)
    size = min(max(4.6, 0.52 * n + 1.6), 12)
    fig = _figure(size + 0.6, size)
    axis = fig.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(n) if n <= 25 else range(0, n, max(1, n // 10))
    axis.set(title=title, xlabel="predicted class", ylabel="true class", xticks=ticks, yticks=ticks)
    if n <= 25:
        for i in range(n):
            for j in range(n):
                if counts[i, j]:
                    colour = "white" if share[i, j] > 0.55 else "#1f2d3d"
                    text = f"{100 * share[i, j]:.0f}" if share[i, j] >= 0.005 else "<1"
                    axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8.5 if n <= 12 else 6.5)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    bar = fig.colorbar(image, ax=axis, shrink=0.82, pad=0.03, label="% of the true class")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    bar.outline.set_visible(False)
    _save(fig, path)


def draw_scatter(path: str | os.PathLike, actual: Sequence[float], predicted: Sequence[float], title: str) -> None:
    """Draws predicted against actual values of a regression, with the diagonal."""
    fig = _figure(5.2, 5.0)
    axis = fig.subplots()
    low, high = min(*actual, *predicted), max(*actual, *predicted)
    axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.scatter(actual, predicted, s=12, color=TRAIN, alpha=min(1.0, max(0.15, 200 / len(actual))), linewidths=0)
    axis.set(title=title, xlabel="actual", ylabel="predicted")
    axis.set_aspect("equal", adjustable="datalim")
    _clean(axis)
    _save(fig, path)


def draw_edits(path: str | os.PathLike, rows: Mapping[str, Any], title: str) -> None:
    """Draws rows of images: name -> tensor [n, height, width, channels] with values from 0 to 1, clipped."""
    count = len(next(iter(rows.values())))
    fig = _figure(1.1 * count + 0.8, 1.15 * len(rows) + 0.5)
    axes = fig.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images.clamp(0, 1).numpy(), strict=True):
            axis.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name)
    fig.suptitle(title, fontsize=10)
    _save(fig, path)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _clean(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)


def _column(rows, split: str, key: str) -> list[float]:
    return [float("nan") if r[split].get(key) is None else r[split][key] for r in rows]


def _score_text(score: str, value: float) -> str:
    return f"{100 * value:.1f}%" if score == "accuracy" else f"{value:.1f} dB" if score == "psnr" else f"{value:.3f}"


def _save(fig, path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(fig)
    with atomic_write(path) as f:
        fig.savefig(f, format="png")
