"""What is measured on a GPU, measured on a CPU: ceilings, steps and their page."""

import contextlib
import dataclasses
import json
import time

import pytest
import torch

import scalegmn_fast
from bench import gpu, harness, isolated, ops, report
from bench.compare_neural_graphs import forward_flops
from bench.training import Training
from scalegmn_fast.models import published_config

pytestmark = pytest.mark.filterwarnings("ignore:.*not exactly equivariant")
NAME = "mnist_cls/scalegmn"
CEILING = {"benchmark": "ceilings", "op": "gemm", "rate": 2e12}


class Recorder:
    """Records a step as what it is."""

    warm_up = staticmethod(lambda call: call())
    record = staticmethod(lambda call: call)


@pytest.fixture
def place(tmp_path, monkeypatch):
    def tiny(name):
        config = published_config(name)
        config["scalegmn_args"]["d_hid"] = 4
        config["scalegmn_args"]["mlp_args"]["d_k"] = [4]
        config["scalegmn_args"]["num_layers"] = 2
        config["data"]["layer_layout"] = [2, 3, 1]
        return config

    monkeypatch.setattr(gpu, "WARM_UP", 4)  # the fourth step is recorded
    for module in ("bench.gpu", "bench.compare_original"):
        monkeypatch.setattr(f"{module}.published_config", tiny)
    return gpu.Place("cpu", tmp_path / "cpu.json", time.monotonic() + 1000, recorder=Recorder)


def rows(place, benchmark):
    return [row for row in json.loads(place.output.read_text())["rows"] if row["benchmark"] == benchmark]


@pytest.mark.parametrize(
    ("name", "slug"),
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Tesla (T4)", "tesla-t4")],
)
def test_slug(name, slug):
    assert gpu.slug(name) == slug


def test_precision_is_put_back():
    before = torch.get_float32_matmul_precision()
    with contextlib.suppress(KeyError), harness.precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with harness.precision("float32"):
        assert torch.get_float32_matmul_precision() == "highest"


def test_ceilings_are_one_row_each(place, monkeypatch):
    alternate = harness.alternate
    monkeypatch.setattr(harness, "alternate", lambda cases, **kw: alternate(cases, **{**kw, "seconds": 0}))
    said = gpu.measure_ceilings(place, megabytes=1, size=32)
    gpu.measure_ceilings(place, megabytes=1, size=32)
    found = gpu.ceilings(rows(place, "ceilings"))
    assert set(found) == {"copy", *harness.DTYPES} and all(rate > 0 for rate in found.values())
    assert len(rows(place, "ceilings")) == 5
    assert all(name in said for name in harness.DTYPES)


def test_a_step_is_timed_on_every_side(place):
    said = gpu.measure_steps(place, [(NAME, 2, "float32"), (NAME, 2, "bfloat16")], seconds=0)
    assert said == "2 rows"
    exact, half = rows(place, "steps")
    assert exact["failures"] == half["failures"] == {}
    for row in (exact, half):
        assert set(row["times"]) == {"ours", "graph", "reference"}
        assert set(row["ratios"]) == {"reference / ours", "reference / graph"}
        assert set(row["bytes"]) == {"ours", "reference"} and row["step_flops"] > 0
        assert row["times"]["ours"]["p20_ms"] <= row["times"]["ours"]["median_ms"] <= row["times"]["ours"]["p80_ms"]
    assert exact["launches"] == {} and "launches" not in half


def test_rounds_as_row_programs_are_timed_too_and_compiled_ahead_with_a_model_of_its_own(place, monkeypatch):
    """Here on the engine of CPUs, by the name of Triton's."""
    pytest.importorskip("triton")
    chosen, ahead = scalegmn_fast.backend, []

    @contextlib.contextmanager
    def compile_ahead():
        ahead.append(True)
        yield
        ahead.append(False)

    monkeypatch.setitem(gpu.ENGINES, "cpu", {"triton": "triton"})
    monkeypatch.setattr("scalegmn_fast.kernels.launching.compile_ahead", compile_ahead)
    monkeypatch.setattr(scalegmn_fast, "backend", lambda name: chosen("cpp" if name == "triton" else name))
    trained = []
    step = Training.step
    monkeypatch.setattr(
        Training,
        "step",
        lambda self, *args: (trained.append((self, ahead.count(True) - ahead.count(False))), step(self, *args)),
    )
    gpu.measure_steps(place, [(NAME, 2, "float32")], seconds=0, benchmark="triton")
    (row,) = rows(place, "triton")
    assert row["failures"] == {} and set(row["times"]) == {"ours", "graph", "rows triton", "graph rows triton"}
    assert set(row["bytes"]) == {"ours", "rows triton"}
    inside = {training for training, compiling in trained if compiling}
    assert len(inside) == 2 and not inside & {training for training, compiling in trained if not compiling}


@pytest.mark.parametrize("name", ["mnist_cls/pna", "mnist_cls/rtransformer"])
def test_a_step_of_neural_graphs_is_timed_without_their_original(name, place):
    row = gpu.measure_step(dataclasses.replace(place, original="a checkout of ScaleGMN"), name, 1, "float32", seconds=0)
    assert row["failures"] == {} and set(row["times"]) == {"ours", "graph", "reference"}
    problem, make = gpu.subject(name, 4)
    assert row["step_flops"] == pytest.approx(3 / 4 * forward_flops(make().forward(problem)), rel=0.02)


def test_a_side_that_fails_is_named_and_the_others_are_timed(place, monkeypatch):
    def refuses(*args):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(Recorder, "record", staticmethod(refuses))
    gpu.measure_steps(place, [(NAME, 2, "float32")], seconds=0)
    (row,) = rows(place, "steps")
    assert row["failures"] == {"graph": "RuntimeError: no graphs here"}
    assert set(row["times"]) == {"ours", "reference"}


def test_steps_of_hetero_are_not_recorded(place):
    row = gpu.measure_step(place, "cifar10/scalegmn_hetero", 2, "float32", seconds=0)
    assert row["failures"] == {"graph": "batches with a sign mask are not recorded"}


def test_where_ours_fails_the_stage_fails_after_all_rows(place, monkeypatch):
    monkeypatch.setattr("bench.gpu.Ours.forward", lambda *_: 1 / 0)
    with pytest.raises(isolated.MeasurementError, match="2 of ours failed in 2 rows: .*ZeroDivisionError"):
        gpu.measure_steps(place, [(NAME, 1, "float32"), (NAME, 2, "float32")], seconds=0)
    assert len(rows(place, "steps")) == 2


def test_rows_stop_where_the_time_ends(place):
    late = gpu.Place(place.device, place.output, time.monotonic() - 1, recorder=Recorder)
    assert gpu.measure_steps(late, [(NAME, 2, "float32")], seconds=0) == "0 rows, no time for 1"


def test_every_configuration_is_measured_before_the_next_size_and_type():
    found, count = gpu.passes(gpu.names()), len(gpu.names())
    assert found[:count] == [(name, 16, "float32") for name in gpu.names()]
    assert len(found) == len(set(found))
    assert all(row[1] == published_config(row[0])["batch_size"] for row in found[count : count + 20])
    assert all(row[1] == 128 for row in found[count + 20 : 2 * count])


def test_ops_are_measured_on_what_serves_them_and_the_rest_is_said(place, monkeypatch, capsys):
    monkeypatch.setitem(ops.BACKENDS, "cpu", ["reference", "cpp", "triton"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    place.write({"benchmark": "ceilings", "op": "copy", "rate": 1e9}, {**CEILING, "dtype": "float32"})
    said = gpu.measure_ops(place, count=64, widths=(8,), seconds=0)
    found = rows(place, "ops")
    assert said == f"{len(found)} rows" and {row["backend"] for row in found} == {"reference", "cpp"}
    assert "symmetrize normalize not on triton: it serves CUDA tensors" in capsys.readouterr().out


def test_ops_stop_where_the_time_ends(place):
    late = gpu.Place(place.device, place.output, time.monotonic() - 1)
    assert gpu.measure_ops(late, count=64, widths=(8,), seconds=0) == "4 rows, no time for more"
    assert len(rows(place, "ops")) == 4


def test_what_the_sanitizer_runs(place):
    assert gpu.sanitize(place) == "48 calls, forward and backward"


def sample(place, dtype="float32", batch=16):
    times = {case: harness.summary([value / 1e3]) for case, value in
             {"original": 40.0, "reference": 8.0, "ours": 4.0, "graph": 1.0}.items()}  # fmt: skip
    ratio = {name: {"median": value, "p20": value, "p80": value} for name, value in
             {"original / ours": 10.0, "original / graph": 40.0}.items()}  # fmt: skip
    place.write(
        {"benchmark": "ceilings", "op": "copy", "rate": 4e12},
        {**CEILING, "dtype": dtype},
        {"benchmark": "steps", "config": NAME, "batch": batch, "dtype": dtype, "times": times, "ratios": ratio,
         "failures": {}, "bytes": {"original": 3_000_000, "ours": 200_000}, "step_flops": 10**9,
         "launches": {"ours": 321}},
        {"benchmark": "steps", "config": "cifar10/scalegmn_hetero", "batch": batch, "dtype": dtype,
         "failures": {"ours": "out of memory"}},
        {"benchmark": "message", "direction": "forward", "rows": 96, "width": 8, "dtype": dtype, "backend": "triton",
         **harness.summary([2e-3]), "flops": 10**9, "against_reference": 12.0},
        {"benchmark": "message", "direction": "forward", "rows": 96, "width": 8, "dtype": dtype, "backend": "cuda",
         "failed": "out of memory"},
        {"benchmark": "stages", "config": "tests", "status": "passed", "detail": "604 passed", "seconds": 81.0},
    )  # fmt: skip


def test_the_page_of_a_gpu(place, monkeypatch, tmp_path):
    sample(place)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    report.main()
    page = (tmp_path / "page.md").read_text()
    assert "GPU: cpu." in page and "## On cpu" in page
    assert "| tests | passed | 604 passed | 81 |" in page
    assert "Ceilings: copy 4000 GB/s, float32 2.0 TFLOP/s." in page
    assert "| forward | 96 | 8 | float32 | triton | 2.000 | 0.5 | 25% | 12.00x |" in page
    assert "| forward | 96 | 8 | float32 | cuda | out of memory |" in page
    assert "Training step, float32, batch 16:" in page
    line = next(line for line in page.splitlines() if line.startswith(f"| {NAME}"))
    cells = dict(zip(header(page), (cell.strip() for cell in line.strip("|").split("|")), strict=True))
    assert cells["ours (ms)"] == "4.00" and cells["original / graph"] == "40.00x"
    assert cells["floor (ms)"] == "0.500" and cells["graph / floor"] == "2.0" and cells["ours / floor"] == "8.0"
    assert cells["memory, original / ours"] == "15.0x" and cells["ours launches"] == "321"
    assert "ours: out of memory" in page and "**40.00x** (1)" in page
    assert gpu.headlines(place.rows()) == [
        "message forward, float32, triton: 0.25 of a square product's rate",
        "Training step, float32, batch 16: original / ours 10.00 (1), original / graph 40.00 (1), "
        "memory, original / ours 15.00 (1)",
    ]


def header(page):
    line = next(line for line in page.splitlines() if line.startswith("| configuration"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_file_the_gpu_is_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    report.main()
    assert "GPU: not measured." in (tmp_path / "page.md").read_text()


@pytest.mark.gpu
def test_kernels_of_a_call_are_counted():
    x = torch.ones(100, device="cuda")
    assert gpu.kernel_launches(lambda: (x + 1) * 2, "cuda") == 2
    assert gpu.peak_bytes(lambda: x + 1, "cuda") >= 400
