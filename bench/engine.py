"""What each part of the CPU engine gives: a training step without it, against one with all, in turn.

    python -m bench.engine [--config NAME ...] [--batch own 16 ...] [--rounds N] [--output FILE]

Two processes hold the same model and batch, one as the package comes and one with a part changed by an environment
variable or an option; they step in turn, and the other one waits. Above 1 the part pays. float32 unless said otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench import harness, isolated, selection
from bench.comparison import under
from bench.training import Problem, Training
from scalegmn_fast.models import from_config, published_config

KEY = ("config", "batch", "part")


class Part(NamedTuple):
    """What is changed: environment variables of the process, keys of ``scalegmn_args``, dtype; and what that means."""

    meaning: str
    environment: dict[str, str] = {}
    options: dict[str, str] = {}
    dtype: str = "float32"


PARTS = {
    "products: BLAS": Part("matrix products of tiles by the BLAS that PyTorch links", {"SCALEGMN_FAST_GEMM": "blas"}),
    "products: addmm": Part("matrix products of tiles by PyTorch's own operator", {"SCALEGMN_FAST_GEMM": "torch"}),
    "no pool": Part("every buffer comes from the system", {"SCALEGMN_FAST_POOL_MB": "0"}),
    "row code: AVX2": Part("row code for AVX2", {"SCALEGMN_FAST_ISA": "avx2"}),
    "row code: baseline": Part("row code for SSE2", {"SCALEGMN_FAST_ISA": "baseline"}),
    "edges recomputed": Part("no edge features are kept", options={"edge_memory": "recompute"}),
    "bfloat16": Part("products of bfloat16 rows, under autocast", dtype="bfloat16"),
}


def training_step(name: str, batch: int, options: dict[str, str], dtype: str) -> Callable[[], None]:
    """A configuration's training step on a fixed batch."""
    config = published_config(name)
    config["scalegmn_args"] |= {"edge_memory": "store", **options}
    torch.manual_seed(0)
    model, problem = from_config(config), Problem(config, batch)
    graph = problem.graph()
    return partial(Training(model, config).step, under(dtype, lambda: model(graph)), problem)


def compare(name: str, batch: int, part: str, rounds: int, limit: float) -> dict:
    """What a row says of a part."""
    changed = PARTS[part]
    with (
        isolated.Stepper(training_step, name, batch, {}, "float32", seconds=limit) as whole,
        isolated.Stepper(
            training_step, name, batch, changed.options, changed.dtype, seconds=limit, environment=changed.environment
        ) as without,
    ):
        times = harness.alternate({"all": whole.step, "changed": without.step}, seconds=0, least=rounds)
    return {
        **{side: harness.summary(values) for side, values in times.items()},
        "ratio": harness.ratios(times["changed"], times["all"]),
    }


def page(data: dict) -> str:
    """The rows as a Markdown table, one line a part."""
    cases = list(dict.fromkeys((row["config"], row["batch"]) for row in data["rows"]))
    found = {(row["config"], row["batch"], row["part"]): row for row in data["rows"]}
    body = [
        [part, PARTS[part].meaning, *(_cell(found.get((*case, part))) for case in cases)]
        for part in PARTS
        if any((*case, part) in found for case in cases)
    ]
    return harness.table(["changed", "means", *(f"{name}, batch {batch}" for name, batch in cases)], body)


def _cell(row: dict | None) -> str:
    if row is None or "failed" in row:
        return row["failed"] if row else ""
    ratio = row["ratio"]
    return f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    selection.add_arguments(parser, batch=["16"])
    parser.add_argument("--rounds", type=int, default=9, help="steps of each process")
    selection.add_output(parser, "engine", "a step")
    args = parser.parse_args()
    selection.check(parser, args)
    rows = []
    for name, batch in selection.cases(args):
        for part in PARTS:
            row = {"benchmark": "engine", "config": name, "batch": batch, "part": part}
            try:
                row |= compare(name, batch, part, args.rounds, args.limit)
            except isolated.MeasurementError as failure:
                row["failed"] = str(failure)
            if harness.record(args.output, row, KEY, args.others):
                rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
