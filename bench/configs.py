"""Every published configuration, ours alone: forward and training step, memory, share of the GEMM peak.

    python -m bench.configs [--config NAME ...] [--batch 1 16 own ...] [--seconds S] [--output FILE]

float32, random networks; forward is without gradients. Peak memory is the highest resident set during one call, minus
that before it. The share is the floating-point operations of the matrix products that the model asks for (backward
included, recomputation not), over the peak of a square one of 2048 measured in the same process, over the time.
Each row is written at once, in the place of the one of the same configuration and batch, unless other processes took
more than --others of the processors meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import harness, isolated, selection
from bench.training import Problem, Training
from scalegmn_fast.models import from_config, published_config, published_names
from scalegmn_fast.nn.work import PlannedModule

KEY = ("config", "batch")


def flops(model: nn.Module, graph, loss: Callable[[object], Tensor] | None = None) -> int:
    """Floating-point operations of the matrix products of a forward; with ``loss``, of the backward too.

    Counted on the unfused computation: inside a fused op PyTorch's counter sees nothing. The model is as before after.
    """
    works = {module: module.work for module in model.modules() if isinstance(module, PlannedModule)}
    for module, work in works.items():
        module.work = replace(work, fuse=False)
    try:
        with FlopCounterMode(display=False) as counter:
            out = model(graph)
            if loss is not None:
                loss(out).backward()
    finally:
        for module, before in works.items():
            module.work = before
    return counter.get_total_flops()


def flops_at(model: nn.Module, config: dict, batch: int) -> tuple[int, int]:
    """`flops` of forward and of training step; from 16 networks on they grow in proportion, so 32 are the most run."""

    def count(size: int) -> tuple[int, int]:
        problem = Problem(config, size)
        graph = problem.graph()
        return flops(model, graph), flops(model, graph, problem.loss)

    if batch <= 32:
        return count(batch)
    forward, step = ((b - a) * (batch - 16) // 16 + a for a, b in zip(count(16), count(32), strict=True))
    return forward, step


def without_gradients(model: nn.Module, graph) -> Callable[[], object]:
    """A forward in eval mode."""
    model.eval()

    def forward():
        with torch.no_grad():
            return model(graph)

    return forward


def peak(config: dict, batch: int, what: str) -> dict:
    """Peak memory of the first forward or training step of a process."""
    model, problem = from_config(config), Problem(config, batch)
    graph, training = problem.graph(), Training(model, config)
    training.prepare()
    forward = without_gradients(model, graph) if what == "forward" else None
    step = partial(training.step, lambda: model(graph), problem)
    return {f"{what}_bytes": isolated.peak_bytes(forward or step)}


def times(config: dict, batch: int, seconds: float) -> dict:
    """Times of forward and training step, three rounds or more."""
    model, problem = from_config(config), Problem(config, batch)
    graph = problem.graph()
    with harness.others() as others:
        found = harness.alternate({"forward": without_gradients(model, graph)}, seconds=seconds, least=3)
        step = partial(Training(model, config).step, lambda: model(graph), problem)
        found |= harness.alternate({"step": step}, seconds=seconds, least=3)
    return {what: harness.summary(values) for what, values in found.items()} | {"others": others.share}


def operations(config: dict, batch: int) -> dict:
    """Operations of forward and training step, and how many the machine does in a second."""
    forward, step = flops_at(from_config(config), config, batch)
    return {"forward_flops": forward, "step_flops": step, "gemm_peak": harness.gemm_peak()}


def measure(config: dict, batch: int, seconds: float, limit: float, *more: Callable[[dict, int], dict]) -> dict:
    """Memory, times and ``more``, each in a process of its own: memory that one leaves behind serves no other."""
    row: dict = {}
    parts = [partial(peak, what="forward"), partial(peak, what="step"), partial(times, seconds=seconds), *more]
    for part in parts:
        row |= isolated.attempt(part, config, batch, seconds=limit)
        if "failed" in row:
            break
    return row


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["configuration", "batch"]
    for what in ("forward", "step"):
        header += [f"{what} (ms)", "p20 to p80", "GFLOP", "of the GEMM peak", "MB"]
    body = []
    order = {name: place for place, name in enumerate(published_names())}
    for row in sorted(data["rows"], key=lambda row: (order[row["config"]], row["batch"])):
        line = [row["config"], row["batch"]]
        for what in () if "failed" in row else ("forward", "step"):
            times, count = row[what], row[f"{what}_flops"]
            share = count / row["gemm_peak"] / (times["median_ms"] / 1e3)
            line += [
                f"{times['median_ms']:.1f}",
                f"{times['p20_ms']:.1f} to {times['p80_ms']:.1f}",
                f"{count / 1e9:.2f}",
                f"{share:.0%}",
                f"{row[f'{what}_bytes'] / 1e6:.0f}",
            ]
        body.append((line + [row.get("failed", "")] + [""] * len(header))[: len(header)])
    peaks = [row["gemm_peak"] / 1e9 for row in data["rows"] if "gemm_peak" in row]
    caption = f"\n\nGEMM peak: {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s." if peaks else ""
    return harness.table(header, body) + caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    selection.add_arguments(parser, batch=["1", "16", "own"])
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="per row, for forward and for step; three rounds run"
    )
    selection.add_output(parser, "configs", "a part of a row")
    args = parser.parse_args()
    selection.check(parser, args)
    rows = []
    for name, batch in selection.cases(args):
        row = {"benchmark": "configs", "config": name, "batch": batch, "dtype": "float32"}
        row |= measure(published_config(name), batch, args.seconds, args.limit, operations)
        if harness.record(args.output, row, KEY, args.others):
            rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
