"""One command for a machine with a GPU: builds, measures ceilings, tests, benchmarks, within nine minutes.

    make gpu-check [GPU_PYTHON=python3] [ORIGINAL=CHECKOUT]
    python -m bench.gpu_check [--original CHECKOUT] [--minutes 9] [--only STAGE ...] [--output FILE]

Needs CUDA, torch and pytest, and for the build nvcc, cmake, ninja and pybind11; no network, nothing is installed.
CHECKOUT is one of https://github.com/jkalogero/scalegmn. Each stage is a process of its own with a limit of time, in
the order of importance; one that fails or runs out of time loses nothing of the others. What it printed is in
build/gpu-check. Rows go to bench/results/<GPU>.json as they are measured, from which `python -m bench.report` makes a
page. The summary comes last; the exit status is 1 if a stage failed. Where there is no git, COMMIT says which it is.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu-check"
#: Variable that tells a stage how long it may take.
SECONDS = "GPU_CHECK_SECONDS"
#: Where Triton, PyTorch's compiler and CUDA keep what they compiled; the stages share it.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
#: Exit status of a stage that has nothing to run here; its last line says why.
LEFT_OUT = 77
PASSED, FAILED, SKIPPED = "passed", "failed", "left out"


class LeftOutError(Exception):
    """A stage has nothing to run on this machine; the message says why."""


@dataclass(frozen=True)
class Stage:
    """A command and its limit in seconds; ``detail`` makes a line of what it printed, by default the last one."""

    name: str
    command: Sequence[str]
    seconds: float
    detail: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: str
    status: str
    detail: str
    seconds: float

    def row(self) -> dict:
        return {
            "benchmark": "stages",
            "config": self.stage,
            "status": self.status,
            "detail": self.detail,
            "seconds": round(self.seconds, 1),
        }


def last_line(text: str) -> str:
    """The last line with something on it, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "printed nothing"


def count_tests(text: str) -> str:
    """What ``pytest -v`` had to say of its tests, finished or not, with what was left out of them and why."""
    outcome = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    found = re.findall(rf"{outcome} +\[ *\d+%\]|\[ *\d+%\] {outcome} ", text)  # of one process; of several
    outcomes = Counter(alone or shared for alone, shared in found)
    said = [f"{count} {outcome.lower()}" for outcome, count in sorted(outcomes.items())]
    left = re.findall(r"^left out: .*$", text, re.M)
    return "; ".join([", ".join(said) or last_line(text), *left])


def run_stage(stage: Stage, seconds: float, logs: Path) -> Result:
    """Run a stage for at most so many seconds; at their end it is killed with all that it started."""
    logs.mkdir(parents=True, exist_ok=True)
    log, started = logs / f"{stage.name}.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment() | {SECONDS: str(seconds)},
            start_new_session=True,
        )
        try:
            status, ending = process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            status, ending = FAILED, f"stopped after {seconds:.0f} s: "
        finally:
            kill_group(process)
    text = log.read_text(errors="replace")
    outcome = {0: PASSED, LEFT_OUT: SKIPPED}.get(status, FAILED)
    detail = ending + (stage.detail or last_line)(text)
    return Result(stage.name, outcome, detail, time.monotonic() - started)


def kill_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment() -> dict[str, str]:
    """Variables of a stage: the repository is importable in whatever it starts, output comes at once.

    What compilers keep lies here, unless a variable says otherwise: a home may not be written to.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    caches = {name: str(ROOT / "build" / "caches" / name.lower()) for name in CACHES}
    return {**caches, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_stages(
    stages: Iterable[Stage], seconds: float, logs: Path, save: Callable[[Result], object] = lambda result: None
) -> list[Result]:
    """Run stages in turn within a time, and save the result of each as it comes."""
    end, results = time.monotonic() + seconds, []
    for stage in stages:
        left = min(stage.seconds, end - time.monotonic())
        if left < 1:
            result = Result(stage.name, SKIPPED, "no time left", 0.0)
        else:
            print(f"{stage.name} ...", flush=True)
            result = run_stage(stage, left, logs)
        print(line_of(result), flush=True)
        results.append(result)
        try:
            save(result)
        except Exception as error:
            print(f"not written: {error}", flush=True)
    return results


def line_of(result: Result) -> str:
    return f"{result.stage:<12} {result.status:<9} {result.seconds:5.0f} s  {result.detail}"


def summarise(results: Sequence[Result], headlines: Sequence[str], logs: Path) -> str:
    """A line a stage, then the ratios that matter, then the verdict."""
    failed = [result.stage for result in results if result.status == FAILED]
    verdict = f"failed: {', '.join(failed)} (logs in {logs})" if failed else "nothing failed"
    return "\n".join(["", *map(line_of, results), *headlines, verdict])


# Stages


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def imported_modules(source: str) -> set[str]:
    """Top-level packages that a file imports as it is imported."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def without_packages(paths: Iterable[Path], available: Callable[[str], bool] = importable) -> dict[Path, list[str]]:
    """Test files that cannot be imported -> the packages that are missing. Modules of the tests count as there."""
    found = {}
    for path in sorted(paths):
        beside = {other.stem for other in (*path.parent.iterdir(), *path.parent.parent.glob("*/*.py"))}
        missing = sorted(
            name for name in imported_modules(path.read_text()) - beside - {"bench"} if not available(name)
        )
        if missing:
            found[path] = missing
    return found


def tests(place, *selection: str) -> str:
    """Run pytest here with ``selection``; what needs a package that is missing is left out and named."""
    if not importable("pytest"):
        raise RuntimeError("pytest is not installed: no test ran")
    given = [ROOT / path for path in selection if (ROOT / path).exists()]
    files = [file for path in given for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
    left = without_packages(files)
    for path, missing in left.items():
        print(f"left out: {path.relative_to(ROOT)} needs {', '.join(missing)}", flush=True)
    # pyproject's options name plugins that may not be there; the limit of a test is not for those that compile kernels
    command = [sys.executable, "-m", "pytest", "-v", "--strict-markers", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=", "-o", "timeout=0"]
    command += ["-n", "auto"] if importable("xdist") else []
    command += [f"--ignore={path}" for path in left] + list(selection)
    os.execve(sys.executable, command, environment())


def build(place) -> str:
    """Compile the module in the tree for this GPU alone, and link the kernels to where they are installed."""
    import torch

    cuda = place.device.startswith("cuda")
    architecture = "{}{}-real".format(*torch.cuda.get_device_capability()) if cuda else ""
    variables = {"SCALEGMN_FAST_CUDA_ARCHS": architecture, "SCALEGMN_FAST_CUDA": "1"} if cuda else {}
    link = ROOT / "scalegmn_fast" / "kernels"
    if not link.exists():
        link.symlink_to(Path("..", "kernels"))
    # from another folder: pyproject.toml there would be read, and older setuptools refuse it
    LOGS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-lib", str(ROOT)]
    subprocess.run(command, cwd=LOGS, env=environment() | variables, check=True)
    say = "import scalegmn_fast; print(scalegmn_fast.build_info()['compiled'])"
    return subprocess.run(
        [sys.executable, "-c", say], cwd=ROOT, env=environment(), check=True, capture_output=True, text=True
    ).stdout


def sanitize(place) -> str:
    """`gpu.sanitize` under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        raise LeftOutError("compute-sanitizer is not installed")
    code = f"from bench import gpu; print(gpu.sanitize(gpu.Place({place.device!r}, None, 0.0)))"
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-c", code],
        env=environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if "Device not supported" in done.stdout:
        raise LeftOutError("compute-sanitizer does not support this device")
    if done.returncode:
        raise RuntimeError(f"compute-sanitizer: {last_line(done.stdout)}")
    return last_line(done.stdout)


def ceilings(place) -> str:
    from bench import gpu

    return gpu.measure_ceilings(place)


def steps(place) -> str:
    from bench import gpu

    return gpu.measure_steps(place, gpu.passes(gpu.names()), seconds=0.4)


def message(place) -> str:
    from bench import gpu

    return gpu.measure_message(place)


def triton(place) -> str:
    from bench import gpu

    return gpu.measure_steps(place, gpu.passes(gpu.TRITON, gpu.TRITON_PASSES), seconds=0.4, benchmark="triton")


def compiled(place) -> str:
    from bench import gpu

    if place.original is None:
        raise LeftOutError("no checkout of the original was given (ORIGINAL=...)")
    rows = [(name, 16, "float32") for name in gpu.COMPILED]
    return gpu.measure_steps(place, rows, seconds=0.4, benchmark="compiled")


def operators(place) -> str:
    from bench import gpu

    return gpu.measure_ops(place)


def check(place, *backends: str, models: Sequence[str] = ()) -> None:
    """`scalegmn-fast check` on the device, of some backends; of all models, or of some."""
    command = [sys.executable, "-m", "scalegmn_fast.cli", "check", "--quick", "--device", place.device]
    command += [word for name in backends for word in ("--backend", name)]
    command += [word for name in models for word in ("--model", name)]
    os.execve(sys.executable, command, environment())


def check_triton(place) -> None:
    """Of those models whose steps are measured: every kernel has to be compiled."""
    from bench import gpu

    check(place, "triton", models=gpu.TRITON)


#: Stage -> (what it runs, its limit in seconds), in the order of importance.
STAGES = {
    "build": (build, 150),
    "ceilings": (ceilings, 40),
    "tests": (lambda place: tests(place, "-m", "gpu", "tests"), 150),
    "kernels": (lambda place: tests(place, "tests/kernels/numerics"), 150),
    "message": (message, 60),
    "steps": (steps, 150),
    "triton": (triton, 120),
    "check": (lambda place: check(place, "reference", "cuda"), 60),
    "ops": (operators, 40),
    "sanitizer": (sanitize, 60),
    "check-triton": (check_triton, 90),
    "compiled": (compiled, 100),
}


def stages_of(args: argparse.Namespace) -> list[Stage]:
    """The stages that a command line asks for, as commands."""
    again = [sys.executable, "-m", "bench.gpu_check", "--device", args.device, "--output", str(args.output)]
    again += ["--original", args.original] if args.original else []
    return [
        Stage(
            name,
            [*again, "--stage", name],
            limit,
            count_tests if name in ("tests", "kernels") else None,
        )
        for name, (_, limit) in STAGES.items()
        if name in args.only
    ]


def run_here(args: argparse.Namespace) -> int:
    """Run one stage in this process; its exit status."""
    from bench import gpu

    seconds = float(os.environ.get(SECONDS, STAGES[args.stage][1]))
    place = gpu.Place(args.device, args.output, time.monotonic() + seconds - 5, args.original)
    try:
        print(STAGES[args.stage][0](place), flush=True)
    except LeftOutError as reason:
        print(reason)
        return LEFT_OUT
    return 0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--original", metavar="CHECKOUT", help="of github.com/jkalogero/scalegmn")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="default: bench/results/<GPU>.json")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.original and not (Path(args.original) / "src/scalegmn/models.py").is_file():
        parser.error(f"argument --original: {args.original!r} is no checkout of github.com/jkalogero/scalegmn")
    import torch

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} sees no CUDA device")
    if args.output is None:
        from bench import gpu, harness

        name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        args.output = harness.RESULTS / f"{gpu.slug(name)}.json"
    return args


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    if args.stage:
        return run_here(args)
    from bench import gpu

    place = gpu.Place(args.device, args.output, 0.0)
    results = run_stages(stages_of(args), 60 * args.minutes - 15, LOGS, lambda result: place.write(result.row()))
    print(summarise(results, gpu.headlines(place.rows()), LOGS))
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
