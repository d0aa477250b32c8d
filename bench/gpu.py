"""What `make gpu-check` measures on a GPU: ceilings, training steps, the ops; and the page made of it.

A row is written as soon as it is measured, so that whatever comes after it loses nothing. Everything runs on any
device; on a CPU the tests do so.
"""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import scalegmn_fast
from bench import compare_neural_graphs, compare_original, comparison, configs, harness, isolated, message, ops
from bench.compare_original import Ours, Theirs
from bench.training import Problem, Training
from scalegmn_fast.models import neural_graphs_config, published_config, published_names
from scalegmn_fast.ops import segment_reduce, symmetrize
from scalegmn_fast.train.cuda_graph import GraphedStep, Recorder

KEY = ("benchmark", "config", "batch", "dtype", "op", "direction", "rows", "width", "backend")
#: Batch sizes and types in which steps are measured, the first for every configuration before the next.
PASSES = (("16", "float32"), ("own", "tf32"), ("own", "bfloat16"), ("16", "tf32"), ("own", "float32"))
#: Of these the original is also compiled, which takes a while.
COMPILED = ("mnist_cls/scalegmn", "cifar10/scalegmn_relu", "mnist_cls/scalegmn_bidir", "fmnist_cls/scalegmn")
#: What Triton's row programs are measured on: every kernel of a configuration is compiled first.
TRITON = (*COMPILED, "mnist_cls/pna", "mnist_cls/rtransformer")
TRITON_PASSES = (("own", "tf32"), ("own", "bfloat16"), ("16", "tf32"))
#: Engine that runs rounds as row programs, per benchmark; on a CPU it is the only one.
ENGINES = {"cuda": {"steps": "cuda", "triton": "triton", "compiled": "cuda"}, "cpu": {}}
SLOW = ("original", "compiled original", "reference")
FAST = ("ours", "graph", *(f"{how} {engine}" for engine in ("cuda", "triton") for how in ("rows", "graph rows")))
CASES = SLOW + FAST
RATIOS = {f"{slow} / {fast}": (slow, fast) for slow, fast in itertools.product(SLOW, FAST)}
COLUMNS = (
    "configuration", "batch", *(f"{case} (ms)" for case in CASES), *RATIOS, "floor (ms)",
    *(f"{case} / floor" for case in FAST), *(f"{case} (MB)" for case in CASES),
    *(f"memory, original / {case}" for case in FAST), *(f"{case} launches" for case in FAST), "failed",
)  # fmt: skip
#: Neural Graphs' configurations for networks of one layout.
NEURAL_GRAPHS = tuple(compare_neural_graphs.names())
#: What a table of steps is called, per benchmark.
TITLES = {
    "steps": "Training step",
    "triton": "Training step, row programs in Triton",
    "compiled": "Training step against the compiled original",
}
#: Steps before anything is timed: kernels are compiled, steps recorded.
WARM_UP = 5


@dataclass(frozen=True)
class Place:
    """Where rows are measured, where they are written, and until when (`time.monotonic`)."""

    device: str
    output: Path
    until: float
    original: str | None = None
    recorder: Callable[[], Recorder | None] = lambda: None

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    def write(self, *rows: dict) -> dict:
        return harness.merge(self.output, list(rows), KEY, self.device)

    def rows(self) -> list[dict]:
        return harness.merge(self.output, [], KEY, self.device)["rows"]


def slug(name: str) -> str:
    """A GPU's name as a file name: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure_ceilings(place: Place, megabytes: int = 2048, size: int = 8192) -> str:
    """Copy bandwidth, and the rate of a square product per type. What it says of them in a line."""
    bandwidth = harness.copy_bandwidth(megabytes, place.device)
    place.write({"benchmark": "ceilings", "op": "copy", "rate": bandwidth})
    said = [f"copy {bandwidth / 1e9:.0f} GB/s"]
    for dtype, (_, kind) in harness.DTYPES.items():
        with harness.precision(dtype):
            rate = harness.gemm_peak(size, place.device, kind)
        place.write({"benchmark": "ceilings", "op": "gemm", "dtype": dtype, "rate": rate})
        said.append(f"{dtype} {rate / 1e12:.1f} TFLOP/s")
    return ", ".join(said)


def ceilings(rows: list[dict]) -> dict[str, float]:
    """Rate of "copy" and of each type of product, of the rows that have them."""
    return {row.get("dtype", row["op"]): row["rate"] for row in rows if row["benchmark"] == "ceilings"}


def names() -> tuple[str, ...]:
    """The configurations whose steps are measured: ScaleGMN's, then those of Neural Graphs for one layout."""
    return (*published_names(), *NEURAL_GRAPHS)


def subject(name: str, batch: int) -> tuple[Problem, Callable[[], comparison.Side]]:
    """The networks of a configuration and their loss, and what makes our model of it."""
    if name not in NEURAL_GRAPHS:
        return Problem(published_config(name), batch), lambda: Ours(name)
    config = neural_graphs_config(name)
    return compare_neural_graphs.problem_of(config, batch), lambda: compare_neural_graphs.Ours(config)


def benchmark_of(name: str) -> comparison.Comparison:
    """The comparison on a CPU that a configuration has its own batch size and its tables from."""
    return (compare_neural_graphs if name in NEURAL_GRAPHS else compare_original).COMPARISON


def step_cases(place: Place, name: str, batch: int, dtype: str, benchmark: str) -> dict[str, Callable[[], Callable]]:
    """What makes a training step of each side, each with a model of its own: same batch, loss and types."""
    problem, make = subject(name, batch)
    problem = problem.to(place.device)
    kind = torch.device(place.device).type
    engine = ENGINES[kind].get(benchmark)

    def trained(side, call, capturable: bool = False) -> Callable[[], None]:
        training = Training(side.model, problem.config, capturable)
        return lambda: training.step(comparison.under(dtype, call, kind), problem)

    def ours() -> comparison.Side:
        side = make()
        side.model.to(place.device)
        return side

    def eager() -> Callable[[], None]:
        side = ours()
        return trained(side, side.forward(problem))

    def graphed() -> Callable[[], None]:
        side, graph, recorder = ours(), problem.graph(), place.recorder()
        if graph.sign_mask is not None:
            raise isolated.MeasurementError("batches with a sign mask are not recorded")
        training = Training(side.model, problem.config, capturable=recorder is None)

        def step(graph, _):
            training.step(comparison.under(dtype, lambda: side.model(graph), kind), problem)

        recorded = GraphedStep(step, recorder=recorder)
        return lambda: recorded(graph, problem.target)

    def on(backend: str, make_step: Callable[[], Callable[[], None]]) -> Callable[[], None]:
        chosen = scalegmn_fast.backend(backend)
        if backend == "triton":
            from scalegmn_fast.kernels.launching import compile_ahead

            with compile_ahead():
                chosen(eager())()  # its model is thrown away: no kernel ran
        return chosen(make_step())

    def original(compiled: bool = False) -> Callable[[], None]:
        side = Theirs(place.original, name)
        side.model.to(place.device)
        return trained(side, side.forward(problem, compiled=compiled))

    makers = {"ours": eager, "graph": graphed}
    if benchmark == "compiled":
        makers["compiled original"] = lambda: original(compiled=True)
    if benchmark == "steps":
        makers["reference"] = lambda: on("reference", eager)
    if engine is not None:
        makers[f"rows {engine}"] = lambda: on(engine, eager)
        makers[f"graph rows {engine}"] = lambda: on(engine, graphed)
    if benchmark != "compiled" and place.original and name not in NEURAL_GRAPHS:
        makers["original"] = original
    return makers


def ready(makers: Mapping[str, Callable[[], Callable]]) -> tuple[dict[str, Callable], dict[str, str]]:
    """Cases that were made and ran `WARM_UP` times, and what went wrong with the others."""
    cases, failures = {}, {}
    for name, make in makers.items():
        try:
            case = make()
            for _ in range(WARM_UP):
                case()
        except Exception as error:
            failures[name] = isolated.reason(error)
        else:
            cases[name] = case
    return cases, failures


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Highest memory during a call minus that before it."""
    if not device.startswith("cuda"):
        return isolated.peak_bytes(call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_launches(call: Callable[[], object], device: str) -> int | None:
    """Kernels, copies and fills that a call starts on a GPU, as the profiler sees them; None where it sees none."""
    if not device.startswith("cuda"):
        return None
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) or None


def measure_step(place: Place, name: str, batch: int, dtype: str, seconds: float, benchmark: str = "steps") -> dict:
    """One row: a training step of every side in turn, its memory, its launches and its floor's operations."""
    row = {"benchmark": benchmark, "config": name, "batch": batch, "dtype": dtype}
    with harness.precision(dtype):
        cases, failures = ready(step_cases(place, name, batch, dtype, benchmark))
        row["failures"] = failures
        if not cases:
            return row
        times = harness.alternate(cases, seconds=seconds, sync=harness.synchronizer(place.device))
        row["times"] = {case: harness.summary(values) for case, values in times.items()}
        row["ratios"] = {
            name: harness.ratios(times[slow], times[fast])
            for name, (slow, fast) in RATIOS.items()
            if slow in times and fast in times
        }
        if benchmark != "compiled":
            eager = [case for case in cases if "graph" not in case]  # a recording's memory is its own and stays
            row["bytes"] = {case: peak_bytes(cases[case], place.device) for case in eager}
            if benchmark == "triton" or dtype == PASSES[0][1]:
                counts = {case: kernel_launches(cases[case], place.device) for case in eager if case in FAST}
                row["launches"] = {case: count for case, count in counts.items() if count is not None}
    row["step_flops"] = step_flops(name, batch)
    return row


def step_flops(name: str, batch: int) -> int:
    """Operations of the matrix products that a step asks for; counted on ``meta``, where nothing is computed.

    Those of Neural Graphs' models, whose batches ``meta`` cannot hold: on two networks, as
    `compare_neural_graphs` does.
    """
    if name in NEURAL_GRAPHS:
        problem, make = subject(name, 2)
        return 3 * compare_neural_graphs.forward_flops(make().forward(problem)) * batch // 2
    problem, make = subject(name, batch)
    problem = problem.to("meta")
    return configs.flops(make().model.to("meta"), problem.graph(), problem.loss)


def passes(names: tuple[str, ...], sizes: tuple[tuple[str, str], ...] = PASSES) -> list[tuple[str, int, str]]:
    """(configuration, batch, type) of every row, each once, in the order in which they are measured."""
    found = ((size, dtype, name) for size, dtype in sizes for name in names)
    return list(
        dict.fromkeys(
            (name, benchmark_of(name).original.own_batch(name) if size == "own" else int(size), dtype)
            for size, dtype, name in found
        )
    )


def measure_steps(place: Place, rows: list[tuple[str, int, str]], seconds: float, benchmark: str = "steps") -> str:
    """As many of the rows as there is time for. What it says of them in a line.

    Raises:
        MeasurementError: ours failed somewhere; all that could be measured was.
    """
    failed, slowest, done = [], 0.0, 0
    for name, batch, dtype in rows:
        if place.seconds_left < 1.5 * slowest:
            break
        before = time.monotonic()
        row = measure_step(place, name, batch, dtype, seconds, benchmark)
        place.write(row)
        wrong = [case for case in FAST if case in row["failures"] and "graph" not in case]
        failed += [f"{name} at {batch}, {dtype}, {case}: {row['failures'][case]}" for case in wrong]
        harness.synchronizer(place.device)()
        slowest, done = max(slowest, time.monotonic() - before), done + 1
        print(f"{name}, {batch}, {dtype}: {row.get('ratios', {})} {row['failures']}", flush=True)
    if failed:
        raise isolated.MeasurementError(f"{len(failed)} of ours failed in {done} rows: {failed[0]}")
    left = f", no time for {len(rows) - done}" if done < len(rows) else ""
    return f"{done} rows{left}"


def measure_message(place: Place, rows: int = 1_000_000, width: int = 128, seconds: float = 1.0) -> str:
    """Rows of `bench.message`. What it says of them in a line.

    Raises:
        MeasurementError: an engine failed; all that could be measured was.
    """
    found = []
    for dtype in ("tf32", "bfloat16"):
        measured = message.measure(rows, width, dtype, place.device, seconds)
        place.write(*measured)
        found += measured
    if failed := [row for row in found if "failed" in row]:
        raise isolated.MeasurementError(f"{failed[0]['backend']}, {failed[0]['dtype']}: {failed[0]['failed']}")
    return f"{len(found)} rows"


def measure_ops(place: Place, count: int = 1_000_000, widths: tuple[int, ...] = (128, 64), seconds: float = 0.3) -> str:
    """As many rows of `bench.ops` as there is time for."""
    rates = ceilings(place.rows())
    bandwidth = rates.get("copy") or harness.copy_bandwidth(device=place.device)
    peak = rates.get("float32") or harness.gemm_peak(device=place.device)
    names = ops.BACKENDS[torch.device(place.device).type]
    done = 0
    for width in widths:
        for rows in ops.measure(count, width, place.device, names, bandwidth, peak, seconds):
            place.write(*rows)
            done += len(rows)
            if place.seconds_left < 0:
                return f"{done} rows, no time for more"
    return f"{done} rows"


def sanitize(place: Place) -> str:
    """Every compiled op, forward and backward, at sizes that fill no block or segment; run under compute-sanitizer."""
    count = 0
    with scalegmn_fast.backend("cuda" if place.device.startswith("cuda") else "cpp"):
        for rows, width in itertools.product((0, 1, 77, 1000), (1, 33, 128, 300)):
            h = torch.randn(rows, width, device=place.device, requires_grad=True)
            vector = torch.randn(width, device=place.device, requires_grad=True)
            ptr = torch.tensor([0, 0, rows // 3, rows, rows], dtype=torch.int32, device=place.device)
            for out, inputs in (
                (symmetrize(h, vector, vector, vector, activation="silu"), (h, vector)),
                (symmetrize(h, kind="normalize"), (h,)),
                (segment_reduce(h, ptr, ("sum", "mean", "min", "max", "std")), (h,)),
            ):
                torch.autograd.grad(out.sum(), inputs)
                count += 1
    return f"{count} calls, forward and backward"


def page(data: dict) -> str:
    """Everything that is known of a GPU, as Markdown: stages, ceilings, the message, steps, ops."""
    rows = data["rows"]
    rates = ceilings(rows)
    parts = []
    stages = [row for row in rows if row["benchmark"] == "stages"]
    if stages:
        body = [[row["config"], row["status"], row["detail"], f"{row['seconds']:.0f}"] for row in stages]
        parts.append(harness.table(["stage", "", "", "seconds"], body))
    if rates:
        copied = [f"copy {rates['copy'] / 1e9:.0f} GB/s"] if "copy" in rates else []
        products = [f"{dtype} {rates[dtype] / 1e12:.1f} TFLOP/s" for dtype in harness.DTYPES if dtype in rates]
        parts.append(f"Ceilings: {', '.join(copied + products)}.")
    messages = [row for row in rows if row["benchmark"] == "message"]
    if messages:
        parts.append(f"A fused message with its edge update:\n\n{message.page(messages, rates)}")
    for title, group in step_groups(rows).items():
        parts.append(f"{title}:\n\n{step_table(group, rates)}")
    measured = [row for row in rows if row["benchmark"] == "ops"]
    if measured:
        parts.append(ops.page({"rows": measured}))
    return "\n\n".join(parts)


def step_groups(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of steps by title: of benchmark, type and the table of the comparison on a CPU; in published order."""
    order = {name: place for place, name in enumerate(names())}
    found: dict[tuple[str, str, str], list[dict]] = {}
    for row in sorted((r for r in rows if r["benchmark"] in TITLES), key=lambda row: order[row["config"]]):
        for kind in benchmark_of(row["config"]).kinds(row):
            found.setdefault((TITLES[row["benchmark"]], row["dtype"], kind), []).append(row)
    return {", ".join(key): found[key] for key in sorted(found)}


def step_table(rows: list[dict], rates: Mapping[str, float]) -> str:
    """A table of steps with the geometric means of its ratios; columns that no row has are left out."""
    lines = [step_line(row, rates) for row in rows]
    means = {"configuration": "geometric mean (of)"}
    for column, values in step_ratios(rows).items():
        means[column] = f"**{statistics.geometric_mean(values):.2f}x** ({len(values)})"
    header = [column for column in COLUMNS if any(line.get(column) for line in lines)]
    return harness.table(header, [[line.get(column, "") for column in header] for line in [*lines, means]])


def step_ratios(rows: list[dict]) -> dict[str, list[float]]:
    """Ratio -> its medians over the rows that have it; memory too."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, values in row.get("ratios", {}).items():
            found.setdefault(name, []).append(values["median"])
        for name, less in memory_ratios(row).items():
            found.setdefault(name, []).append(less)
    return found


def memory_ratios(row: dict) -> dict[str, float]:
    """Peak memory of the original's step over that of each of ours."""
    peaks = row.get("bytes", {})
    found = {case: peaks.get("original", 0) / peaks[case] for case in FAST if peaks.get(case)}
    return {f"memory, original / {case}": less for case, less in found.items() if less}


def step_line(row: dict, rates: Mapping[str, float]) -> dict[str, str]:
    """The cells of a row that there are, by column."""
    line = {"configuration": row["config"], "batch": str(row["batch"])}
    for case, times in row.get("times", {}).items():
        line[f"{case} (ms)"] = f"{times['median_ms']:.2f}"
    for name, values in row.get("ratios", {}).items():
        line[name] = f"{values['median']:.2f}x"
    if row["dtype"] in rates and "step_flops" in row:
        floor = 1e3 * row["step_flops"] / rates[row["dtype"]]
        line["floor (ms)"] = f"{floor:.3f}"
        for case in set(FAST) & row.get("times", {}).keys():
            line[f"{case} / floor"] = f"{row['times'][case]['median_ms'] / floor:.1f}"
    for case, size in row.get("bytes", {}).items():
        line[f"{case} (MB)"] = f"{size / 1e6:.0f}"
    line |= {name: f"{less:.1f}x" for name, less in memory_ratios(row).items()}
    for case, count in row.get("launches", {}).items():
        line[f"{case} launches"] = str(count)
    line["failed"] = "; ".join(f"{case}: {why}" for case, why in row.get("failures", {}).items())
    return line


def headlines(rows: list[dict]) -> list[str]:
    """How near the message is to a product's rate, and the geometric means of the ratios, a line per table."""
    shares = [
        f"message {row['direction']}, {row['dtype']}, {row['backend']}: {part:.2f} of a square product's rate"
        for row in rows
        if row["benchmark"] == "message" and (part := message.share(row, ceilings(rows))) is not None
    ]
    return shares + [
        f"{title}: "
        + ", ".join(f"{name} {statistics.geometric_mean(values):.2f} ({len(values)})" for name, values in found.items())
        for title, group in step_groups(rows).items()
        if (found := step_ratios(group))
    ]
