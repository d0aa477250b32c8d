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


def test_a_stepper_makes_its_function_once_and_calls_it_each_time():
    with isolated.Stepper(_Countdown, 2, environment={"BENCH_TEST": "set"}) as countdown:
        countdown.step()
        countdown.step()
        with pytest.raises(isolated.MeasurementError, match="ValueError: nothing left, BENCH_TEST set"):
            countdown.step()
        with pytest.raises(isolated.MeasurementError, match="ended with exit status 0"):
            countdown.step()


def test_a_stepper_that_cannot_be_made_is_a_failure():
    with pytest.raises(isolated.MeasurementError, match="TypeError"), isolated.Stepper(_Countdown):
        pytest.fail("entered")


class _Countdown:
    """May be called so many times."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self) -> None:
        if not self.left:
            raise ValueError(f"nothing left, BENCH_TEST {os.environ['BENCH_TEST']}")
        self.left -= 1


class _Fill:
    """Allocate, write and free."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self) -> None:
        bytearray(b"x") * self.size
