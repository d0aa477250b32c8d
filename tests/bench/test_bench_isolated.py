"""Functions in processes of their own: results, and what is said of failures."""

import operator
import os
import time

import pytest

from bench import isolated


def test_result_and_environment():
    assert isolated.run(operator.add, 2, 3) == 5
    assert isolated.run(os.getenv, "BENCH_TEST", environment={"BENCH_TEST": "set"}) == "set"
    assert "BENCH_TEST" not in os.environ


@pytest.mark.parametrize(
    ("function", "argument", "limit", "expected"),
    [
        (operator.neg, "x", None, "TypeError: bad operand"),
        (bytearray, 10**15, None, isolated.OUT_OF_MEMORY),
        (time.sleep, 60, 1.0, "gave up after 1 s"),
        (os._exit, 3, None, "ended with exit status 3"),
    ],
)
def test_failure_is_a_field(function, argument, limit, expected):
    found = isolated.attempt(function, argument, seconds=limit)
    assert list(found) == ["failed"]
    assert found["failed"].startswith(expected)


def test_a_signal_is_named():
    with pytest.raises(isolated.MeasurementError, match="died of SIGABRT"):
        isolated.run(os.abort)


def test_peak_counts_what_is_freed_again():
    size = 200 * 2**20
    found = isolated.run(isolated.peak_bytes, _Fill(size))
    assert 0.95 * size < found < 1.5 * size


class _Fill:
    """Allocate, write and free."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        bytearray(b"x") * self.size
