"""A function in a fresh process, under a limit of time and memory, so that its failure is a result and not an end.

Imports no torch: a process is as light as the function's own module.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

OUT_OF_MEMORY = "out of memory"


class MeasurementError(Exception):
    """What went wrong in a measurement, in a few words."""


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return OUT_OF_MEMORY
    return text[:200] if isinstance(error, MeasurementError) else f"{type(error).__name__}: {text}"[:200]


def run(
    function: Callable, *args: Any, seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> Any:
    """``function(*args)`` in a new process that may take nine tenths of the memory which is free now.

    Args:
        function, args: picklable; so must the result be.
        seconds: limit of time.
        environment: variables that the process has besides this one's.

    Raises:
        MeasurementError: it raised, ran out of memory or time, or was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, args), daemon=True)
    with _variables(environment or {}):
        process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise MeasurementError(f"gave up after {seconds:g} s")
        try:
            succeeded, result = receiver.recv()
        except EOFError:
            process.join()
            raise MeasurementError(_death(process.exitcode)) from None
        process.join(10)
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not succeeded:
        raise MeasurementError(result)
    return result


def attempt(function: Callable, *args: Any, **limits: Any) -> dict:
    """`run` of a function that returns the fields of a row, or the field ``failed`` with the reason."""
    try:
        return run(function, *args, **limits)
    except MeasurementError as error:
        return {"failed": str(error)}


def _child(sender, function: Callable, args: tuple) -> None:
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with suppress(FileNotFoundError):  # another system than Linux
        limit = int(0.9 * _memory("/proc/meminfo", "MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        answer = True, function(*args)
    except Exception as error:
        answer = False, reason(error)
    sender.send(answer)


def _end_with(parent) -> None:
    """A parent that is killed leaves nothing running."""
    parent.join()
    os._exit(1)


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return f"killed, as if {OUT_OF_MEMORY}"
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit status {code}"


@contextmanager
def _variables(values: Mapping[str, str]):
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _memory(file: str, field: str) -> int:
    """Bytes that a field of a Linux status file gives."""
    line = next(line for line in Path(file).read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def peak_bytes(function: Callable[[], object]) -> int:
    """Highest resident set of this process during the call, minus that before it. Linux."""
    gc.collect()
    with suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    before = _memory("/proc/self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    function()
    return _memory("/proc/self/status", "VmHWM") - before
