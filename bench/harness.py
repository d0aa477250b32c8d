"""What every benchmark shares: the machine, alternating timing, ceilings, and the file its rows go to."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import scalegmn_fast

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """Processor, threads and versions that a row was measured with."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True
    ).stdout.strip()
    info = scalegmn_fast.build_info()
    return {
        "cpu": name,
        "isa": (info.get("compiled") or {}).get("cpu_isa"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def alternate(
    cases: dict[str, Callable[[], object]], *, seconds: float = 10.0, least: int = 5, sync: Callable = lambda: None
) -> dict[str, list[float]]:
    """Seconds per call of each case, timed in turn (A B C A B C ...) after one warm-up round.

    Rounds go on until ``seconds`` have passed, and at least ``least`` of them.
    """
    for case in cases.values():
        case()
    sync()
    times: dict[str, list[float]] = {name: [] for name in cases}
    started = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - started < seconds:
        for name, case in cases.items():
            before = time.perf_counter()
            case()
            sync()
            times[name].append(time.perf_counter() - before)
    return times


def summary(times: list[float]) -> dict:
    """Median and 20/80 percentiles, in milliseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p20_ms": 1e3 * ordered[round(0.2 * last)],
        "p80_ms": 1e3 * ordered[round(0.8 * last)],
        "rounds": len(ordered),
    }


def ratio(baseline: list[float], times: list[float]) -> float:
    """Median over rounds of baseline / times: each pair was timed back to back, so a drifting machine cancels."""
    return statistics.median(a / b for a, b in zip(baseline, times, strict=True))


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.rand(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = alternate({"copy": lambda: target.copy_(source)}, seconds=1.0, sync=sync)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times)


def save(name: str, rows: list[dict], **ceilings: float) -> dict:
    """Write a benchmark's rows, with the machine and its ceilings, to ``bench/results/<name>.json``; returns it all."""
    RESULTS.mkdir(exist_ok=True)
    data = {"machine": machine(), **ceilings, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    return data


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
