"""Figures of the benchmarks page, drawn from the rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from bench import compare_original

COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#9aa0a6")


def speed_ups(rows: list[dict], path: Path) -> bool:
    """Bars of original / ours per configuration and batch size, p20 to p80 as lines, diamonds where our step would be
    at its floor; False if there is none to draw."""
    groups = {
        kind: {name: modes["eager"] for name, modes in group.items() if "ratio" in modes.get("eager", {})}
        for (dtype, kind), group in compare_original.COMPARISON.groups(rows).items()
        if dtype == "float32" and kind in ("batch 16", compare_original.OWN)
    }
    groups = {kind: timed for kind, timed in groups.items() if timed}
    names = list(dict.fromkeys(name for timed in groups.values() for name in timed))
    if not names:
        return False
    figure = _figure(8.5, 1.2 + 0.22 * len(names) * (1 + len(groups)))
    axis = figure.subplots()
    height = 0.8 / len(groups)
    for place, (kind, timed) in enumerate(groups.items()):
        offset = (place - (len(groups) - 1) / 2) * height
        ratios = {name: row["ratio"] for name, row in timed.items()}
        floors = {name: row["floor_ratio"]["median"] for name, row in timed.items() if "floor_ratio" in row}
        medians = [ratios[name]["median"] for name in ratios]
        mean = statistics.geometric_mean(medians)
        errors = [
            [ratio["median"] - ratio["p20"] for ratio in ratios.values()],
            [ratio["p80"] - ratio["median"] for ratio in ratios.values()],
        ]
        batch = "their own batch" if kind == compare_original.OWN else kind
        axis.barh(
            [names.index(name) + offset for name in ratios],
            medians,
            height * 0.92,
            xerr=errors,
            color=COLOURS[place],
            error_kw={"elinewidth": 1, "ecolor": "#333333"},
            label=f"{batch} (geometric mean {mean:.2f}x)",
        )
        places = [names.index(name) + offset for name in floors]
        label = "at the floor of the products" if place == 0 else None
        axis.scatter(list(floors.values()), places, marker="D", s=10, color="#333333", zorder=3, label=label)
    axis.axvline(1, color=COLOURS[3], linewidth=1, linestyle="--")
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="time of the original / ours", xlim=(0, None))
    axis.set_title("Training step, float32, same process, in turn")
    axis.margins(y=0.01)
    axis.invert_yaxis()
    figure.legend(frameon=False, loc="outside lower center", ncols=3, columnspacing=1, handlelength=1.5)
    _save(figure, axis, path=path)
    return True


def scaling(rows: list[dict], path: Path) -> bool:
    """Time and memory per edge over the number of edges; False if there is nothing to draw."""
    rows = sorted((row for row in rows if "failed" not in row), key=lambda row: row["edges"])
    if not rows:
        return False
    figure = _figure(9.0, 3.4)
    axes = figure.subplots(1, 2)
    edges = [row["edges"] for row in rows]
    for colour, what in zip(COLOURS, ("forward", "step"), strict=False):
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.8, "label": what}
        axes[0].plot(edges, [1e3 * row[what]["median_ms"] / row["edges"] for row in rows], **style)
        axes[1].plot(edges, [row[f"{what}_bytes"] / row["edges"] for row in rows], **style)
    axes[0].set(title="Microseconds per edge")
    axes[1].set(title="Peak bytes per edge")
    for axis in axes:
        axis.set(xscale="log", xlabel="edges of the network", ylim=(0, None))
        axis.legend(frameon=False)
    _save(figure, *axes, path=path)
    return True


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure, *axes, path: Path) -> None:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e6e8eb", linewidth=0.8)
        axis.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
