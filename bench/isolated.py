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


class Stepper:
    """Context: a process of its own that makes a function once, ``make(*args)``, and calls it whenever `step` asks.

    Args:
        make, args: picklable.
        seconds: limit of time for each answer.
        environment: variables that the process has besides this one's.

    Raises:
        MeasurementError: on entering or from `step`; it raised, ran out of memory or time, or was killed.
    """

    def __init__(
        self, make: Callable, *args: Any, seconds: float | None = None, environment: Mapping[str, str] | None = None
    ):
        context = multiprocessing.get_context("spawn")
        self.seconds, self.environment = seconds, environment or {}
        self.pipe, self.other = context.Pipe()
        self.process = context.Process(target=_steps, args=(self.other, make, args), daemon=True)

    def __enter__(self) -> Stepper:
        with _variables(self.environment):
            self.process.start()
        self.other.close()
        try:
            self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def step(self) -> None:
        """One call of the function, waited for."""
        with suppress(BrokenPipeError):  # the reason is in the answer
            self.pipe.send(None)
        self._answer()

    def _answer(self) -> None:
        if not self.pipe.poll(self.seconds):
            raise MeasurementError(f"gave up after {self.seconds:g} s")
        try:
            failure = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise MeasurementError(_death(self.process.exitcode)) from None
        if failure is not None:
            raise MeasurementError(failure)


def attempt(function: Callable, *args: Any, **limits: Any) -> dict:
    """`run` of a function that returns the fields of a row, or the field ``failed`` with the reason."""
    try:
        return run(function, *args, **limits)
    except MeasurementError as error:
        return {"failed": str(error)}


def _prepare() -> None:
    """No warnings, a limit of memory, and an end with the parent, for the process that this one is."""
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with suppress(FileNotFoundError):  # another system than Linux
        limit = int(0.9 * _memory("/proc/meminfo", "MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def _steps(pipe, make: Callable, args: tuple) -> None:
    _prepare()
    try:
        step = make(*args)
        while True:
            pipe.send(None)
            pipe.recv()
            step()
    except Exception as error:
        pipe.send(reason(error))


def _child(sender, function: Callable, args: tuple) -> None:
    _prepare()
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
