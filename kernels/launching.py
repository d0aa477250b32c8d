"""Launches of kernels, and `compile_ahead`, which compiles what a piece of code would launch, several at a time."""

import contextlib
import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

_only_compile = False


def launch(kernel, grid, *arguments, **options):
    """Launches a kernel on the current stream; inside `compile_ahead` it is compiled instead, sooner or later.

    Returns the compiled kernel, or what stands for it; None under the interpreter.
    """
    if _only_compile:
        return kernel.warmup(*arguments, grid=grid, **options)
    return kernel[grid](*arguments, **options)


def compiles_only():
    """Whether launches compile and do not run."""
    return _only_compile


@contextlib.contextmanager
def compile_ahead(workers: int | None = None) -> Iterator[None]:
    """Context: Triton kernels that ops would launch are compiled, several at a time, and none of them runs.

    The first training step of a model compiles some 50 to 100 kernels, one after the other, each where it is launched.
    Here they are compiled side by side, for the very tensors that ops are called with, and are there for the calls
    that follow; on disk, too, where Triton keeps them (``TRITON_CACHE_DIR``).

        with scalegmn_fast.backend("triton"), compile_ahead():
            loss_fn(copy.deepcopy(model)(batch), target).backward()

    What ops return inside is uninitialised memory, and so is what becomes of it: gradients, running statistics of
    norms. Hence the copy. Random numbers are drawn as in any step.

    All threads of the process compile only, backward passes run on the calling thread, and Python's garbage collector
    rests until the end. Where ``SCALEGMN_FAST_TRITON_TUNE=1`` is set all the tiles that would be tried are compiled.
    A kernel that does not compile raises nothing here but where it is launched. Under the interpreter kernels neither
    compile nor run inside; those of other backends run.

    Args:
        workers: kernels compiled at once, by default as many as this process has processors.
    Raises:
        ValueError: workers below 1.
        RuntimeError: inside of another such context.
    """
    global _only_compile
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if _only_compile:
        raise RuntimeError("compile_ahead is active already")
    collecting = gc.isenabled()
    # CPython 3.11's parser, which Triton calls, counts its recursion for all threads together: a collection in the
    # midst of it, which lets another thread run, fails it.
    gc.disable()
    _only_compile = True
    try:
        with (
            ThreadPoolExecutor(workers) as pool,
            torch.autograd.set_multithreading_enabled(False),
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        _only_compile = False
        if collecting:
            gc.enable()
