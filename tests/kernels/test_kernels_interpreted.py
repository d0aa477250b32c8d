"""Runs numerics/ under Triton's interpreter: each module in a process of its own, all at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BROKEN = triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
MODULES = (
    "test_kernels_row_program",
    "test_kernels_row_reductions",
    "test_kernels_segment_reduce",
    "test_kernels_symmetrize",
)


@pytest.fixture(scope="module")
def runs():
    """{module: its process}, started together; those still running at the end are stopped."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = {}
    for module in MODULES:
        path = Path("tests", "kernels", "numerics", f"{module}.py")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", str(path)]
        processes[module] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()
        process.stdout.close()


def test_every_module_of_numerics_is_run():
    assert {path.stem for path in (ROOT / "tests" / "kernels" / "numerics").glob("test_*.py")} == set(MODULES)


@pytest.mark.skipif(BROKEN, reason="the interpreter of Triton 3.6 does not run loops with NumPy 2.4 or later")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("module", MODULES)
def test_numerics_under_the_interpreter(module, runs):
    report = runs[module].communicate()[0]
    assert runs[module].returncode == 0, report
    assert re.search(r"\d+ passed", report) and "skipped" not in report, report
