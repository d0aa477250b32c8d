"""A training step of ours against the original's, in turn in one process: same weights, same batch, same loss.

    python -m bench.compare_original --scalegmn CHECKOUT [--config NAME ...] [--batch own 16 ...] [--rounds N]
        [--seconds S] [--limit S] [--others SHARE] [--dtype float32|bfloat16]
        [--compiled] [--tuned-allocator] [--memory] [--no-eager] [--output FILE]

CHECKOUT is one of https://github.com/jkalogero/scalegmn, which is imported from there. The weights are the original's
initial ones plus normal noise of 0.1: at the initial ones some outputs do not depend on the input. Outputs are compared
first, in eval mode and float32; where they differ by more than 1e-3 of the largest nothing is timed. Batches are built
beforehand on both sides. A step is forward, loss, backward, clipping and AdamW, dropout as configured; with bfloat16
the forward of both runs under autocast. Rows of float32 time a third side, ours under autocast. Where bfloat16 dies of
SIGILL (a virtual machine that announces AMX and has none), set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16.

Each measurement is a process of its own, and its row is written at once, in the place of the row of the same
configuration, batch, dtype and mode: configurations can be measured one at a time. A row that was timed while other
processes took more than --others of the processors is not written.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial

import torch

from bench import harness, isolated, selection
from bench.original import Original, is_checkout
from bench.training import Problem, Training
from scalegmn_fast.models import from_config, published_config, published_names
from scalegmn_fast.testing import randomize_parameters

KEY = ("config", "batch", "dtype", "mode")
LIMIT = 1e-3
#: glibc takes all memory from a heap that it never gives back, so that no step pays for its pages again.
TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": str(2**28)}
#: One compiler process, which ends with the process that measures.
COMPILED = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCH_LOGS": "-dynamo"}
#: Steps before the compiled original is timed: backward parts are compiled, and compiled again, in the first few.
COMPILED_WARM_UP = 6
ENVIRONMENTS = {"eager": {}, "compiled": COMPILED, "tuned allocator": TUNED_ALLOCATOR}


def under(dtype: str, call: Callable[[], object]) -> Callable[[], object]:
    """``call`` as it is, or under autocast to bfloat16."""
    if dtype == "float32":
        return call

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return autocast


class Theirs:
    """The original's model of a configuration."""

    def __init__(self, root: str, name: str):
        self.original = Original(root)
        self.config = self.original.config(name)
        torch.manual_seed(0)
        self.model = self.original.model(self.config)
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        weights, biases = problem.weights, problem.biases
        batch = self.original.batch(self.config, weights, biases, problem.input_value, problem.sign_mask)
        called = self.model
        if compiled:
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than go on without compiling
            called = torch.compile(self.model)
        return lambda: self.original.call(called, batch, weights, biases)


class Ours:
    """Our model of a configuration."""

    def __init__(self, name: str):
        self.model = from_config(published_config(name))
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem) -> Callable[[], object]:
        graph = problem.graph()
        return lambda: self.model(graph)


@torch.no_grad()
def difference(expected, found) -> float:
    """Largest difference of two outputs, tensor by tensor, over the largest value that is expected."""
    pairs = [(expected, found)] if torch.is_tensor(expected) else zip(sum(expected, []), sum(found, []), strict=True)
    return torch.stack([(b - a).abs().max() / a.abs().max() for a, b in pairs]).max().item()


def compare(root: str, name: str, batch: int, dtype: str, mode: str, rounds: int, seconds: float) -> dict:
    """What a row says of times."""
    problem = Problem(published_config(name), batch)
    graph = problem.graph()
    theirs, our = Theirs(root, name), Ours(name)
    our.model.load_state_dict(theirs.model.state_dict(), strict=True)
    theirs.model.eval(), our.model.eval()
    with torch.no_grad():
        error = difference(theirs.forward(problem)(), our.forward(problem)())
    if not error <= LIMIT:
        return {"difference": error, "failed": f"outputs differ by {error:.1e}"}
    their_forward = theirs.forward(problem, compiled=mode == "compiled")
    forwards = {"original": (theirs.model, their_forward), "ours": (our.model, our.forward(problem))}
    cases = {
        side: partial(Training(model, problem.config).step, under(dtype, forward), problem)
        for side, (model, forward) in forwards.items()
    }
    if (dtype, mode) == ("float32", "eager"):
        narrow = copy.deepcopy(our.model)
        step = Training(narrow, problem.config).step
        cases["ours_bfloat16"] = partial(step, under("bfloat16", lambda: narrow(graph)), problem)
    for _ in range(COMPILED_WARM_UP if mode == "compiled" else 0):
        cases["original"]()
    with harness.others() as others:
        times = harness.alternate(cases, seconds=seconds, least=min(3, rounds), most=rounds)
    return {
        "difference": error,
        **{side: harness.summary(values) for side, values in times.items()},
        "ratio": harness.ratios(times["original"], times["ours"]),
        **(
            {"bfloat16_ratio": harness.ratios(times["original"], times["ours_bfloat16"])}
            if "ours_bfloat16" in times
            else {}
        ),
        "others": others.share,
    }


def peak(root: str | None, name: str, batch: int, dtype: str) -> int:
    """Peak bytes of the first training step over those before it, of the original in ``root`` or of ours (None)."""
    side = Theirs(root, name) if root else Ours(name)
    problem = Problem(published_config(name), batch)
    training = Training(side.model, problem.config)
    training.prepare()
    return isolated.peak_bytes(partial(training.step, under(dtype, side.forward(problem)), problem))


def compare_memory(root: str, name: str, batch: int, dtype: str, limit: float) -> dict:
    """What a row says of memory; each side in a process of its own."""
    row = {}
    for side, where in (("original", root), ("ours", None)):
        try:
            row[side] = isolated.run(peak, where, name, batch, dtype, seconds=limit)
        except isolated.MeasurementError as failure:
            row.setdefault("failed", f"{side}: {failure}")
    return row if "failed" in row else {**row, "ratio": {"median": row["original"] / row["ours"]}}


def measure(args: argparse.Namespace, name: str, batch: int, mode: str) -> dict:
    """One row, whatever happens."""
    row = {"benchmark": "compare_original", "config": name, "batch": batch, "dtype": args.dtype, "mode": mode}
    if mode == "memory":
        return row | compare_memory(args.scalegmn, name, batch, args.dtype, args.limit)
    case = (args.scalegmn, name, batch, args.dtype, mode, args.rounds, args.seconds)
    return row | isolated.attempt(compare, *case, seconds=args.limit, environment=ENVIRONMENTS[mode])


def kind_of(row: dict) -> str:
    """``16``, ``own`` or another number: the table that a row belongs in besides that of 16."""
    return "own" if row["batch"] == selection.own_batch(row["config"]) else str(row["batch"])


def groups(rows: list[dict]) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """(dtype, kind of batch) -> configuration -> mode -> row, in the order of the published configurations."""
    order = {name: place for place, name in enumerate(published_names())}
    found: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
    for row in sorted(rows, key=lambda row: (row["dtype"] != "float32", order[row["config"]])):
        for kind in {kind_of(row), "16"} if row["batch"] == 16 else {kind_of(row)}:
            group = found.setdefault((row["dtype"], kind), {})
            group.setdefault(row["config"], {})[row["mode"]] = row
    return dict(sorted(found.items(), key=lambda item: (item[0][0] != "float32", item[0][1] != "16", item[0][1])))


def mean_ratio(group: dict[str, dict[str, dict]], mode: str, key: str = "ratio") -> str:
    """Geometric mean of a mode's ratios, and their number; empty if there is none."""
    found = [modes[mode][key]["median"] for modes in group.values() if key in modes.get(mode, {})]
    return f"**{statistics.geometric_mean(found):.2f}x** ({len(found)})" if found else ""


def page(data: dict) -> str:
    """Per dtype and batch size a table of all modes, with the geometric means."""
    parts = []
    for (dtype, kind), group in groups(data["rows"]).items():
        batch = "its own batch" if kind == "own" else f"batch {kind}"
        header = [
            "configuration", "batch", "original (ms)", "ours (ms)", "original / ours", "p20 to p80", "rounds",
            "original / ours in bfloat16", "compiled original / ours", "tuned allocator", "original (MB)", "ours (MB)",
            "memory", "outputs differ by",
        ]  # fmt: skip
        body = [_line(name, modes) for name, modes in group.items()]
        means = ["geometric mean (of)", *[""] * (len(header) - 1)]
        means[7] = mean_ratio(group, "eager", "bfloat16_ratio")
        for column, mode in ((4, "eager"), (8, "compiled"), (9, "tuned allocator"), (12, "memory")):
            means[column] = mean_ratio(group, mode)
        body.append(means)
        used = [any(line[column] for line in body) for column in range(len(header))]
        header, *body = ([cell for cell, on in zip(line, used, strict=True) if on] for line in (header, *body))
        parts.append(f"{dtype}, {batch}:\n\n{harness.table(header, body)}")
    return "\n\n".join(parts)


def _line(name: str, modes: dict[str, dict]) -> list[str]:
    eager, memory = modes.get("eager", {}), modes.get("memory", {})

    def ratio(mode: str) -> str:
        row = modes.get(mode, {})
        return f"{row['ratio']['median']:.2f}x" if "ratio" in row else row.get("failed", "")

    def milliseconds(side: str) -> str:
        return f"{eager[side]['median_ms']:.0f}" if side in eager else ""

    def megabytes(side: str) -> str:
        return f"{memory[side] / 1e6:.0f}" if side in memory else ""

    spread = f"{eager['ratio']['p20']:.2f} to {eager['ratio']['p80']:.2f}" if "ratio" in eager else ""
    narrow = f"{eager['bfloat16_ratio']['median']:.2f}x" if "bfloat16_ratio" in eager else ""
    error = f"{eager['difference']:.0e}" if "difference" in eager else ""
    return [
        name, str(next(iter(modes.values()))["batch"]), milliseconds("original"), milliseconds("ours"), ratio("eager"),
        spread, str(eager["ours"]["rounds"]) if "ours" in eager else "", narrow, ratio("compiled"),
        ratio("tuned allocator"),
        megabytes("original"), megabytes("ours"), ratio("memory"), error,
    ]  # fmt: skip


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scalegmn", required=True, metavar="CHECKOUT", help="a checkout of the original")
    selection.add_arguments(parser, batch=["16"])
    parser.add_argument("--rounds", type=int, default=30, help="at most, per row")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="per row, after which no round begins past the third"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="also against torch.compile of the original")
    parser.add_argument("--tuned-allocator", action="store_true", help="also with both on a heap that keeps its pages")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of a step")
    parser.add_argument("--no-eager", action="store_true", help="only what the three flags before add")
    selection.add_output(parser, "compare_original", "a row")
    args = parser.parse_args(given)
    selection.check(parser, args)
    if args.rounds < 1:
        parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
    if not is_checkout(args.scalegmn):
        parser.error(
            "argument --scalegmn: expected a checkout of github.com/jkalogero/scalegmn, "
            f"got {args.scalegmn!r}, where no src/scalegmn/models.py is"
        )
    flags = {"eager": not args.no_eager, "compiled": args.compiled, "tuned allocator": args.tuned_allocator}
    args.modes = [mode for mode, on in {**flags, "memory": args.memory}.items() if on]
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    rows = []
    for name, batch in selection.cases(args):
        for mode in args.modes:
            row = measure(args, name, batch, mode)
            if harness.record(args.output, row, KEY, args.others):
                rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
