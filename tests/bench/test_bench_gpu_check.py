"""The course of `make gpu-check` on stages of its own: limits, failures, what is left out, and the summary."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_check
from bench.gpu_check import Result, Stage

ROOT = Path(__file__).parents[2]


def stage(name, code, seconds=30.0, **options):
    return Stage(name, [sys.executable, "-c", code], seconds, **options)


def test_stages_end_each_in_its_own_way_and_all_are_saved(tmp_path):
    saved = []
    stages = [
        stage("good", "print('first'); print('42 rows')"),
        stage("bad", "print('about to fail'); raise RuntimeError('no such kernel')"),
        stage("absent", f"print('no tool here'); raise SystemExit({gpu_check.LEFT_OUT})"),
        stage("killed", "import os; os.kill(os.getpid(), 9)"),
        stage("after", "print('still run')"),
    ]
    results = gpu_check.run_stages(stages, 60, tmp_path, saved.append)
    assert saved == results
    assert [(result.stage, result.status, result.detail) for result in results] == [
        ("good", "passed", "42 rows"),
        ("bad", "failed", "RuntimeError: no such kernel"),
        ("absent", "left out", "no tool here"),
        ("killed", "failed", "printed nothing"),
        ("after", "passed", "still run"),
    ]
    assert "first" in (tmp_path / "good.log").read_text()


def test_a_stage_over_its_limit_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    started = time.monotonic()
    (result,) = gpu_check.run_stages([stage("slow", code + "; p.wait()", 3.0)], 60, tmp_path)
    assert time.monotonic() - started < 20
    assert result.status == "failed" and result.detail.startswith("stopped after 3 s: ")
    pid = int(result.detail.split()[-1])
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"the child {pid} of a killed stage lives on")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_whole_has_a_limit_too(tmp_path):
    say = f"import os; print(os.environ[{gpu_check.SECONDS!r}])"
    results = gpu_check.run_stages([stage("a", "import time; time.sleep(60)", 2.0), stage("b", say)], 4, tmp_path)
    assert 0 < float(results[1].detail) < 2.1
    assert gpu_check.run_stages([stage("c", say)], 0.5, tmp_path)[0].detail == "no time left"


def test_compilers_keep_their_files_in_the_tree_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("CUDA_CACHE_PATH", "/elsewhere")
    say = "import os; print(os.environ['CUDA_CACHE_PATH'], os.environ['TRITON_CACHE_DIR'])"
    (result,) = gpu_check.run_stages([stage("a", say)], 60, tmp_path)
    assert result.detail == f"/elsewhere {ROOT}/build/caches/triton_cache_dir"


def test_results_that_cannot_be_saved_stop_nothing(tmp_path):
    def full(result):
        raise OSError("no space left")

    assert [r.status for r in gpu_check.run_stages([stage("a", ""), stage("b", "")], 60, tmp_path, full)] == [
        "passed",
        "passed",
    ]


def test_the_summary_has_a_line_a_stage_the_ratios_and_the_verdict():
    results = [Result("build", "passed", "sm_90", 61.2), Result("tests", "failed", "3 failed, 601 passed", 80.0)]
    lines = gpu_check.summarise(results, ["float32, batch 16: original / ours 21.00 (20)"], Path("logs")).splitlines()
    assert lines[1:] == [
        "build        passed       61 s  sm_90",
        "tests        failed       80 s  3 failed, 601 passed",
        "float32, batch 16: original / ours 21.00 (20)",
        "failed: tests (logs in logs)",
    ]
    assert gpu_check.summarise(results[:1], [], Path("logs")).splitlines()[-1] == "nothing failed"


@pytest.mark.parametrize(
    "text",
    [
        "left out: tests/a.py needs yaml\na::b PASSED   [ 50%]\na::c FAILED  [ 75%]\na::d PASSED [100%]\n"
        "FAILED a::c - assert 0\n=== 1 failed, 2 passed in 3s ===\n",
        "left out: tests/a.py needs yaml\n[gw0] [ 50%] PASSED a::b \n[gw1] [ 75%] FAILED a::c \n"
        "[gw1] [100%] PASSED a::d \nFAILED a::c - assert 0\n",
    ],
)
def test_tests_are_counted_once_also_where_they_did_not_end(text):
    assert gpu_check.count_tests(text) == "1 failed, 2 passed; left out: tests/a.py needs yaml"


def test_tests_that_never_began_say_why():
    assert gpu_check.count_tests("usage: pytest\nERROR: no such option\n") == "ERROR: no such option"


def test_what_needs_missing_packages_is_found(tmp_path):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "test_a.py").write_text("import os\nimport helper\nfrom torch import nn\n")
    (tmp_path / "test_b.py").write_text("from hypothesis.strategies import text\nimport yaml, bench.gpu\n")
    (tmp_path / "test_c.py").write_text("def test():\n    import absent\n")
    found = gpu_check.without_packages(tmp_path.glob("test_*.py"), lambda name: name not in ("hypothesis", "yaml"))
    assert found == {tmp_path / "test_b.py": ["hypothesis", "yaml"]}


def test_the_selection_runs_without_the_plugins_and_packages_of_ours(tmp_path):
    """As on a machine that has pytest alone: the options in pyproject.toml ask for more."""
    absent = ("hypothesis", "pytest_timeout", "xdist")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    selection = ("-k", "flops_of_a_linear_layer", "tests/bench", "tests/graph")
    done = subprocess.run(
        [sys.executable, "-c", f"from bench import gpu_check; gpu_check.tests(None, *{selection!r})"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert gpu_check.count_tests(done.stdout) == "1 passed; left out: tests/graph/test_plan.py needs hypothesis"


def test_stages_are_commands_that_run_alone(tmp_path):
    args = gpu_check.arguments(["--device", "cpu", "--output", str(tmp_path / "cpu.json"), "--only", "compiled"])
    results = gpu_check.run_stages(gpu_check.stages_of(args), 60, tmp_path)
    assert [(result.status, result.detail) for result in results] == [
        ("left out", "no checkout of the original was given (ORIGINAL=...)")
    ]


def test_main_saves_results_prints_the_summary_last_and_fails_where_a_stage_did(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "stages_of", lambda args: [stage("a", "print('fine')"), stage("b", "1 / 0")])
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    output = tmp_path / "cpu.json"
    assert gpu_check.main(["--device", "cpu", "--output", str(output)]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert [(row["config"], row["status"]) for row in rows] == [("a", "passed"), ("b", "failed")]
    assert capsys.readouterr().out.splitlines()[-1] == f"failed: b (logs in {tmp_path})"
    assert "| b | failed | ZeroDivisionError: division by zero |" in gpu.page({"rows": rows})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--original", "/nowhere"], "argument --original: '/nowhere' is no checkout"),
    ],
)
def test_a_wrong_command_line_is_refused(given, said, capsys):
    with pytest.raises(SystemExit):
        gpu_check.arguments(["--device", "cpu", *given])
    assert said in capsys.readouterr().err


def test_the_sanitizer_is_left_out_where_it_is_not(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    with pytest.raises(gpu_check.LeftOutError, match="compute-sanitizer is not installed"):
        gpu_check.sanitize(gpu.Place("cpu", None, 0.0))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('shift 4; exec "$@"', "48 calls, forward and backward"),
        ("echo Device not supported; exit 1", gpu_check.LeftOutError),
        ("echo ERROR SUMMARY: 1 error; exit 1", RuntimeError),
    ],
)
def test_the_sanitizer_runs_the_ops_and_its_findings_fail(body, expected, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: str(tool))
    place = gpu.Place("cpu", None, 0.0)
    if isinstance(expected, str):
        assert gpu_check.sanitize(place) == expected
    else:
        with pytest.raises(expected):
            gpu_check.sanitize(place)
