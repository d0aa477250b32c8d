"""What comparisons with an original implementation share: a training step of both in turn, memory, rows and tables."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from bench import harness, isolated, selection
from bench.checkouts import Repository
from bench.training import Problem, Training

KEY = ("config", "batch", "dtype", "mode")
LIMIT = 1e-3
#: glibc takes all memory from a heap that it never gives back, so that no step pays for its pages again.
TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**28)}
#: One compiler process, which ends with the process that measures.
COMPILED = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCH_LOGS": "-dynamo"}
#: Steps before the compiled original is timed: backward parts are compiled, and compiled again, in the first few.
COMPILED_WARM_UP = 6
ENVIRONMENTS = {"eager": {}, "compiled": COMPILED, "tuned allocator": TUNED_ALLOCATOR}

#: dtype, kind of table -> configuration -> mode -> row
Groups = dict[tuple[str, str], dict[str, dict[str, dict]]]


class Side(Protocol):
    """A model, and what calls it."""

    model: nn.Module

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        """The call to be timed."""


def under(dtype: str, call: Callable[[], object], device: str = "cpu") -> Callable[[], object]:
    """``call`` as it is, or under autocast to bfloat16."""
    if dtype != "bfloat16":
        return call

    def autocast():
        with torch.autocast(device, torch.bfloat16):
            return call()

    return autocast


def compiled_model(model: nn.Module) -> Callable:
    """``torch.compile`` of a model, which fails where it would go on without compiling."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model)


@torch.no_grad()
def difference(expected, found) -> float:
    """Largest difference of two outputs, tensor by tensor, over the largest value that is expected."""
    pairs = [(expected, found)] if torch.is_tensor(expected) else zip(sum(expected, []), sum(found, []), strict=True)
    return torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs]).max().item()


def compare(
    theirs: Side,
    ours: Side,
    problem: Problem,
    dtype: str,
    mode: str,
    *,
    rounds: int,
    seconds: float,
    warm_up: int = 0,
) -> dict:
    """What a row says of times; ``warm_up`` steps of the original go before."""
    ours.model.load_state_dict(theirs.model.state_dict(), strict=True)
    theirs.model.eval(), ours.model.eval()
    with torch.no_grad():
        error = difference(theirs.forward(problem)(), ours.forward(problem)())
    if not error <= LIMIT:
        return {"difference": error, "failed": f"outputs differ by {error:.1e}"}

    def step(side: Side, dtype: str, **options) -> Callable[[], None]:
        call = under(dtype, side.forward(problem, **options))
        return partial(Training(side.model, problem.config).step, call, problem)

    compiled = mode == "compiled"
    cases = {"original": step(theirs, dtype, compiled=compiled), "ours": step(ours, dtype)}
    if (dtype, mode) == ("float32", "eager"):
        cases["ours_bfloat16"] = step(copy.deepcopy(ours), "bfloat16")
    for _ in range(max(warm_up, COMPILED_WARM_UP if compiled else 0)):
        cases["original"]()
    with harness.others() as others:
        times = harness.alternate(cases, seconds=seconds, least=min(3, rounds), most=rounds)
    row = {"difference": error, **{side: harness.summary(values) for side, values in times.items()}}
    row["ratio"] = harness.ratios(times["original"], times["ours"])
    if "ours_bfloat16" in times:
        row["bfloat16_ratio"] = harness.ratios(times["original"], times["ours_bfloat16"])
    return row | {"others": others.share}


def with_floor(row: dict, step_flops: int) -> dict:
    """A row with the floor of our step, its matrix products at the peak that is measured now; a failed one as it is.

    The original's time over that floor is the ratio that no engine could exceed at this rate.
    """
    if "failed" in row:
        return row
    peak = harness.gemm_peak()
    ratio = {"median": row["original"]["median_ms"] / 1e3 * peak / step_flops}
    return row | {"step_flops": step_flops, "gemm_peak": peak, "floor_ratio": ratio}


def peak(side: Side, problem: Problem, dtype: str) -> int:
    """Peak bytes of the first training step over those before it."""
    training = Training(side.model, problem.config)
    training.prepare()
    return isolated.peak_bytes(partial(training.step, under(dtype, side.forward(problem)), problem))


@dataclass(frozen=True)
class Comparison:
    """The command line, rows and tables of a benchmark against an original.

    Attributes:
        name: of the benchmark and of its result file.
        summary: what it measures, in a line.
        original: what it compares with.
        compare: (checkout, configuration, batch, dtype, mode, rounds, seconds) -> what a row says of times.
        peak: (checkout, or None for ours, configuration, batch, dtype) -> bytes.
        kinds: row -> the tables that it belongs in, in words; first: the one that stands before the others.
    """

    name: str
    summary: str
    original: Repository
    compare: Callable[..., dict]
    peak: Callable[[str | None, str, int, str], int]
    kinds: Callable[[dict], set[str]]
    first: str = ""

    def arguments(self, given: list[str] | None = None) -> argparse.Namespace:
        """The command line, checked."""
        parser = argparse.ArgumentParser(prog=f"python -m bench.{self.name}", description=self.summary)
        self.original.add_option(parser, "checkout", required=True)
        selection.add_arguments(parser, batch=self.original.batch, names=self.original.names)
        parser.add_argument("--rounds", type=int, default=30, help="at most, per row")
        parser.add_argument(
            "--seconds", type=float, default=60.0, help="per row, after which no round begins past the third"
        )
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        parser.add_argument("--compiled", action="store_true", help="also against torch.compile of the original")
        parser.add_argument(
            "--tuned-allocator", action="store_true", help="also with both on a heap that keeps its pages"
        )
        parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
        parser.add_argument("--no-eager", action="store_true", help="only what the three flags before add")
        selection.add_output(parser, self.name, "a row")
        args = parser.parse_args(given)
        selection.check(parser, args, names=self.original.names)
        if args.rounds < 1:
            parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
        self.original.check(parser, args.checkout)
        flags = {"eager": not args.no_eager, "compiled": args.compiled, "tuned allocator": args.tuned_allocator}
        args.modes = [mode for mode, on in {**flags, "memory": args.memory}.items() if on]
        return args

    def main(self, given: list[str] | None = None) -> None:
        """Measure and record what the command line says, and print its tables."""
        args = self.arguments(given)
        rows = []
        for name, batch in selection.cases(args, own_batch=self.original.own_batch):
            for mode in args.modes:
                row = self.measure(args, name, batch, mode)
                if harness.record(args.output, row, KEY, args.others):
                    rows.append(row)
        print(self.page({"rows": rows}))

    def measure(self, args: argparse.Namespace, name: str, batch: int, mode: str) -> dict:
        """One row, whatever happens."""
        row = {"benchmark": self.name, "config": name, "batch": batch, "dtype": args.dtype, "mode": mode}
        if mode == "memory":
            return row | self.compare_memory(args.checkout, name, batch, args.dtype, args.limit)
        case = (args.checkout, name, batch, args.dtype, mode, args.rounds, args.seconds)
        return row | isolated.attempt(self.compare, *case, seconds=args.limit, environment=ENVIRONMENTS[mode])

    def compare_memory(self, root: str, name: str, batch: int, dtype: str, limit: float) -> dict:
        """What a row says of memory; each side in a process of its own."""
        row = {}
        for side, where in (("original", root), ("ours", None)):
            try:
                row[side] = isolated.run(self.peak, where, name, batch, dtype, seconds=limit)
            except isolated.MeasurementError as failure:
                row.setdefault("failed", f"{side}: {failure}")
        return row if "failed" in row else {**row, "ratio": {"median": row["original"] / row["ours"]}}

    def groups(self, rows: list[dict]) -> Groups:
        """The rows by table, in the order of the published configurations."""
        order = {name: place for place, name in enumerate(self.original.names)}
        found: Groups = {}
        for row in sorted(rows, key=lambda row: (row["dtype"] != "float32", order[row["config"]])):
            for kind in self.kinds(row):
                found.setdefault((row["dtype"], kind), {}).setdefault(row["config"], {})[row["mode"]] = row
        return dict(
            sorted(found.items(), key=lambda item: (item[0][0] != "float32", item[0][1] != self.first, item[0][1]))
        )

    def page(self, data: dict) -> str:
        """Per dtype and kind a table of all modes, with the geometric means."""
        parts = []
        for (dtype, kind), group in self.groups(data["rows"]).items():
            lines = [_line(name, modes) for name, modes in group.items()]
            lines.append(
                {"configuration": "geometric mean (of)"}
                | {column: mean_ratio(group, *source) for column, source in RATIOS.items()}
            )
            header = [column for column in COLUMNS if any(line.get(column) for line in lines)]
            body = [[line.get(column, "") for column in header] for line in lines]
            parts.append(f"{dtype}, {kind}:\n\n{harness.table(header, body)}")
        return "\n\n".join(parts)


COLUMNS = (
    "configuration", "batch", "original (ms)", "ours (ms)", "original / ours", "p20 to p80", "rounds",
    "original / ours in bfloat16", "floor (ms)", "ours / floor", "original / floor", "compiled original / ours",
    "tuned allocator", "original (MB)", "ours (MB)", "memory", "outputs differ by",
)  # fmt: skip
#: Columns of ratios: mode and key of a row
RATIOS = {
    "original / ours": ("eager", "ratio"),
    "original / ours in bfloat16": ("eager", "bfloat16_ratio"),
    "original / floor": ("eager", "floor_ratio"),
    "compiled original / ours": ("compiled", "ratio"),
    "tuned allocator": ("tuned allocator", "ratio"),
    "memory": ("memory", "ratio"),
}


def mean_ratio(group: dict[str, dict[str, dict]], mode: str, key: str = "ratio") -> str:
    """Geometric mean of a mode's ratios, and their number; empty if there is none."""
    found = [modes[mode][key]["median"] for modes in group.values() if key in modes.get(mode, {})]
    return f"**{statistics.geometric_mean(found):.2f}x** ({len(found)})" if found else ""


def _line(name: str, modes: dict[str, dict]) -> dict[str, str]:
    """The cells of a configuration that there are, by column."""
    eager, memory = modes.get("eager", {}), modes.get("memory", {})
    line = {"configuration": name, "batch": str(next(iter(modes.values()))["batch"])}
    for column, (mode, key) in RATIOS.items():
        row = modes.get(mode, {})
        if key in row:
            line[column] = f"{row[key]['median']:.2f}x"
        elif key == "ratio":
            line[column] = row.get("failed", "")
    for side in ("original", "ours"):
        if side in eager:
            line[f"{side} (ms)"] = f"{eager[side]['median_ms']:.0f}"
        if side in memory:
            line[f"{side} (MB)"] = f"{memory[side] / 1e6:.0f}"
    if "ratio" in eager:
        line["p20 to p80"] = f"{eager['ratio']['p20']:.2f} to {eager['ratio']['p80']:.2f}"
        line["rounds"] = str(eager["ours"]["rounds"])
    if "step_flops" in eager:
        floor = 1e3 * eager["step_flops"] / eager["gemm_peak"]
        line["floor (ms)"] = f"{floor:.0f}"
        line["ours / floor"] = f"{eager['ours']['median_ms'] / floor:.1f}"
    if "difference" in eager:
        line["outputs differ by"] = f"{eager['difference']:.0e}"
    return line
