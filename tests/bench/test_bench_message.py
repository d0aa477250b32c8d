"""The fused message of the benchmark: its engines, its operations, its rows on the page of a GPU."""

import itertools
import json
import time

import pytest

pytest.importorskip("triton")

from scalegmn_fast.kernels import row_program  # noqa: E402

from bench import gpu, isolated, message  # noqa: E402
from scalegmn_fast import backends  # noqa: E402


@pytest.fixture
def place(tmp_path):
    return gpu.Place("cpu", tmp_path / "cpu.json", time.monotonic() + 1000)


def rows(place):
    return json.loads(place.output.read_text())["rows"]


def test_the_message_is_measured_per_engine_direction_and_type(place):
    said = gpu.measure_message(place, rows=70, width=8, seconds=0)
    found = rows(place)
    assert said == "8 rows" and len(found) == 8
    assert {(row["direction"], row["dtype"], row["backend"]) for row in found} == set(
        itertools.product(("forward", "backward"), ("tf32", "bfloat16"), ("reference", "cpp"))
    )
    assert {row["direction"]: row["flops"] for row in found} == {"forward": 14 * 64 * 64, "backward": 28 * 64 * 64}
    rates = {"tf32": 1e9}
    shares = {row["dtype"]: message.share(row, rates) for row in found}
    assert shares["bfloat16"] is None and shares["tf32"] > 0


def test_an_engine_that_fails_is_named_and_the_others_are_measured(place, monkeypatch):
    monkeypatch.setitem(message.WAYS, "cpu", (message.Way("cuda"), message.Way("triton"), message.Way("cpp")))
    with pytest.raises(isolated.MeasurementError, match="cuda, tf32: BackendError"):
        gpu.measure_message(place, rows=70, width=8, seconds=0)
    assert {row["backend"]: "failed" in row for row in rows(place)} == {
        "cuda": True,
        "triton": True,
        "cpp": False,
    }


def test_tiles_of_a_way_are_pinned_within_it(monkeypatch):
    monkeypatch.delenv(row_program.ROWS, raising=False)
    with message.Way("triton", "64").chosen():
        assert row_program.pinned_tile().rows == 64 and backends.active() == "triton"
    assert row_program.pinned_tile() is None and str(message.Way("triton", "64")) == "triton, 64 rows"
