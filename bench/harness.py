"""What every benchmark shares: the machine, alternating timing, ceilings, and the file its rows go to."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import scalegmn_fast
from bench.isolated import MeasurementError, reason

RESULTS = Path(__file__).parent / "results"
#: Types of products: what float32 products are told to be, and the type that autocast or a tensor has.
DTYPES = {
    "float32": ("highest", torch.float32),
    "tf32": ("high", torch.float32),
    "bfloat16": ("highest", torch.bfloat16),
    "float16": ("highest", torch.float16),
}
#: Share of the processors that other processes may take while a row is timed.
MOST_OTHERS = 0.05


def machine(device: str = "cpu") -> dict:
    """Processor, threads and versions that a row was measured with; on a GPU also its name, and CUDA's and Triton's."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    info = scalegmn_fast.build_info()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return {
        "cpu": name,
        "isa": (info.get("compiled") or {}).get("cpu_isa"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        **({"onednn_max_cpu_isa": limit} if limit else {}),
        **(gpu(device) if device.startswith("cuda") else {}),
    }


def commit() -> str:
    """The commit that is checked out; where there is no git, the variable COMMIT."""
    found = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    return found or os.environ.get("COMMIT") or "unknown"


def gpu(device: str) -> dict:
    """What `machine` says of a GPU."""
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "sm": "{}{}".format(*torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "triton": triton.__version__ if triton else None,
    }


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until a device has done its work."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


class others:
    """Context: ``share`` of the machine's processor time went to other processes within it (Linux; else None).

    Threads that wait for each other at every op are slowed many times over by one other busy process.
    """

    share: float | None = None

    def __enter__(self) -> others:
        self.before = self.seconds()
        return self

    def __exit__(self, *error: object) -> None:
        after = self.seconds()
        if self.before and after:
            total, busy, own = (b - a for a, b in zip(self.before, after, strict=True))
            self.share = round(max(0.0, busy - own) / total, 3) if total else 0.0

    @staticmethod
    def seconds() -> tuple[float, float, float] | None:
        """Processor seconds so far: all, all but idle ones, those of this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in fields]
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], time.process_time()


def alternate(
    cases: dict[str, Callable[[], object]],
    *,
    seconds: float = 10.0,
    least: int = 5,
    most: int | None = None,
    sync: Callable = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call of each case, timed in turn (A B C A B C ...) after one warm-up round.

    Rounds go on until ``seconds`` have passed or ``most`` are done, and at least ``least`` of them are.

    Raises:
        MeasurementError: a case failed in its warm-up; the message names it.
    """
    for name, case in cases.items():
        try:
            case()
        except Exception as error:
            raise MeasurementError(f"{name}: {reason(error)}") from error
    sync()
    times: dict[str, list[float]] = {name: [] for name in cases}
    started = time.perf_counter()
    done = 0
    while done != most and (done < least or time.perf_counter() - started < seconds):
        for name, case in cases.items():
            before = time.perf_counter()
            case()
            sync()
            times[name].append(time.perf_counter() - before)
        done += 1
    return times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def summary(times: list[float]) -> dict:
    """Median and 20/80 percentiles, in milliseconds."""
    names = ("median_ms", "p20_ms", "p80_ms")
    return {**{name: 1e3 * value for name, value in zip(names, percentiles(times), strict=True)}, "rounds": len(times)}


def ratios(baseline: list[float], times: list[float]) -> dict:
    """Median and 20/80 percentiles over rounds of baseline / times."""
    paired = [a / b for a, b in zip(baseline, times, strict=True)]
    return dict(zip(("median", "p20", "p80"), percentiles(paired), strict=True))


def ratio(baseline: list[float], times: list[float]) -> float:
    """Median over rounds of baseline / times: each pair was timed back to back, so a drifting machine cancels."""
    return ratios(baseline, times)["median"]


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.rand(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, seconds=1.0, sync=synchronizer(device))["copy"]
    return 2 * source.numel() * 4 / statistics.median(times)


def gemm_peak(size: int = 2048, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of a square matrix product; in float32 as precisely as PyTorch is told."""
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    times = alternate({"gemm": lambda: torch.mm(a, b, out=out)}, seconds=1.0, sync=synchronizer(device))["gemm"]
    return 2 * size**3 / statistics.median(times)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Context: float32 products are IEEE ones, or TF32 for ``tf32``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(DTYPES[dtype][0])
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def merge(path: Path, rows: list[dict], key: tuple[str, ...], device: str = "cpu") -> dict:
    """Put rows into a result file, each with the machine, in the place of those with equal values of ``key``.

    A row without one of the key's names has None there. The file is replaced as a whole or not at all, so an
    interrupted run loses nothing. Returns its new contents.
    """
    here = machine(device)
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    old = [{**row, "machine": row.get("machine") or before["machine"]} for row in before["rows"]]
    new = {tuple(row.get(name) for name in key): {**row, "machine": here} for row in rows}
    kept = [new.pop(tuple(row.get(name) for name in key), row) for row in old]
    data = {"machine": here, "rows": kept + list(new.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
    return data


def record(path: Path, row: dict, key: tuple[str, ...], most_others: float = MOST_OTHERS) -> bool:
    """`merge` one row and say so; a row that was timed beside other busy processes is not written.

    Returns whether it was.
    """
    label = ", ".join(str(row[name]) for name in key)
    share = row.get("others") or 0.0
    if share > most_others:
        print(f"{label}: not written, other processes took {share:.0%} of the processors", flush=True)
        return False
    merge(path, [row], key)
    done = f"{row['ratio']['median']:.2f}x" if "ratio" in row else "done"
    print(f"{label}: {row.get('failed', done)}", flush=True)
    return True


def machine_lines(rows: list[dict]) -> str:
    """What the rows were measured on, one line per machine and versions, with the commits."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        line = machine_line(row["machine"])
        known = commits.setdefault(line, [])
        if row["machine"]["commit"] not in known:
            known.append(row["machine"]["commit"])
    return "\n\n".join(
        f"On {line}, commit{'s' * (len(known) > 1)} {', '.join(known)}." for line, known in commits.items()
    )


def machine_line(machine: dict) -> str:
    """A machine and its versions in words, without the commit."""
    limit = machine.get("onednn_max_cpu_isa")
    if "gpu" in machine:
        return (
            f"{machine['gpu']} (sm_{machine['sm']}), torch {machine['torch']}, CUDA {machine['cuda']}, "
            f"Triton {machine['triton']}"
        )
    return (
        f"{machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}, torch {machine['torch']}"
        f"{f', oneDNN up to {limit}' if limit else ''}"
    )


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
