"""How time and memory grow with the size of the network that is read: seconds and bytes per edge.

    python -m bench.scaling [--max-edges 1e6] [--scalegmn CHECKOUT] [--seconds S] [--output FILE]

One network 2-w-w-1 of growing width, read by the model of ``mnist_cls/scalegmn`` at 64 hidden features, float32:
forward (without gradients) and training step. Each size runs in processes of its own that may take nine tenths of the
free memory: one that runs out is reported as such, and ends the run. With a checkout of
https://github.com/jkalogero/scalegmn also the memory of the original's training step, up to the size at which it fails.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise

from bench import comparison, harness, isolated, selection
from bench.compare_original import Theirs
from bench.configs import measure
from bench.training import Problem
from scalegmn_fast.models import published_config

KEY = ("edges",)
NAME = "mnist_cls/scalegmn"


def layout_of(edges: float) -> list[int]:
    """2-w-w-1 with about that many edges, ``w^2 + 3 w`` of them."""
    width = max(1, round((edges + 2.25) ** 0.5 - 1.5))
    return [2, width, width, 1]


def resize(config: dict, layout: list[int]) -> None:
    """Change a configuration to networks of another layout, read with 64 hidden features."""
    config["data"]["layer_layout"] = layout
    config["scalegmn_args"]["d_hid"] = 64


def config_of(layout: list[int]) -> dict:
    """``mnist_cls/scalegmn``, resized."""
    config = published_config(NAME)
    resize(config, layout)
    return config


def original_peak(root: str, layout: list[int]) -> dict:
    """Peak memory of the original's training step."""
    theirs = Theirs(root, NAME, partial(resize, layout=layout))
    return {"original_bytes": comparison.peak(theirs, Problem(config_of(layout), 1), "float32")}


def sizes(most: float) -> list[list[int]]:
    """Layouts of 1e3 edges and more, two per factor of ten."""
    found, edges = [], 1e3
    while edges <= 1.01 * most:
        found.append(layout_of(edges))
        edges *= 10**0.5
    return found


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["network", "edges"]
    for what in ("forward", "step"):
        header += [f"{what} (ms)", "us per edge", "MB", "bytes per edge"]
    compared = any("original" in row for row in data["rows"])
    if compared:
        header += ["original's step (MB)", "bytes per edge"]
    body = []
    for row in sorted(data["rows"], key=lambda row: row["edges"]):
        line = ["-".join(map(str, row["layout"])), row["edges"]]
        for what in () if "failed" in row else ("forward", "step"):
            time, size = row[what]["median_ms"], row[f"{what}_bytes"]
            line += [
                f"{time:.1f}",
                f"{1e3 * time / row['edges']:.2f}",
                f"{size / 1e6:.0f}",
                f"{size / row['edges']:.0f}",
            ]
        theirs = row.get("original", {})
        if "failed" not in row and "original_bytes" in theirs:
            size = theirs["original_bytes"]
            line += [f"{size / 1e6:.0f}", f"{size / row['edges']:.0f}"]
        elif "failed" not in row:
            line.append(theirs.get("failed", ""))
        body.append((line + [row.get("failed", "")] + [""] * len(header))[: len(header)])
    return harness.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-edges", type=float, default=1e6)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="per size, for forward and for step; three rounds run"
    )
    parser.add_argument("--scalegmn", metavar="CHECKOUT", help="of github.com/jkalogero/scalegmn")
    selection.add_output(parser, "scaling", "a part of a row")
    args = parser.parse_args()
    if args.max_edges < 1e3:
        parser.error(f"argument --max-edges: expected at least 1000, got {args.max_edges:g}")
    rows, original = [], args.scalegmn
    for layout in sizes(args.max_edges):
        row = {"benchmark": "scaling", "layout": layout, "edges": sum(a * b for a, b in pairwise(layout))}
        row |= measure(config_of(layout), 1, args.seconds, args.limit)
        if original:
            row["original"] = isolated.attempt(original_peak, original, layout, seconds=args.limit)
            original = None if "failed" in row["original"] else original
        if harness.record(args.output, row, KEY, args.others):
            rows.append(row)
        if "failed" in row:
            break
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
