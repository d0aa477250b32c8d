"""Timing in turn, result files and tables."""

import json

import pytest

from bench import harness
from bench.isolated import MeasurementError


def row(config, batch, value):
    return {"config": config, "batch": batch, "value": value}


def values(data):
    return {(found["config"], found["batch"]): found["value"] for found in data["rows"]}


def test_merge_replaces_equal_keys_in_place_and_keeps_the_rest(tmp_path):
    path = tmp_path / "new" / "results.json"
    harness.merge(path, [row("a", 1, "old"), row("b", 1, "kept")], ("config", "batch"))
    data = harness.merge(path, [row("c", 1, "added"), row("a", 1, "new"), row("a", 2, "added")], ("config", "batch"))
    assert json.loads(path.read_text()) == data
    assert list(values(data).items()) == [
        (("a", 1), "new"),
        (("b", 1), "kept"),
        (("c", 1), "added"),
        (("a", 2), "added"),
    ]
    assert all(found["machine"] == data["machine"] for found in data["rows"])
    assert [found.name for found in path.parent.iterdir()] == ["results.json"]


def test_merge_keeps_the_machine_of_older_rows(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {"cpu": "older"}, "rows": [row("a", 1, "old")]}))
    a, b = harness.merge(path, [row("b", 1, "new")], ("config",))["rows"]
    assert a["machine"] == {"cpu": "older"} and b["machine"] == harness.machine()


def test_merge_interrupted_while_writing_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    before = harness.merge(path, [row("a", 1, "old")], ("config",))
    with pytest.raises(TypeError):
        harness.merge(path, [row("a", 1, object())], ("config",))
    assert json.loads(path.read_text()) == before


@pytest.mark.parametrize(("limits", "rounds"), [({"least": 3}, 3), ({"least": 1, "most": 2}, 2)])
def test_alternate_takes_turns_between_its_bounds(limits, rounds):
    calls = []
    seconds = 0.0 if "most" not in limits else 60.0
    times = harness.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=seconds, **limits
    )
    assert calls == ["a", "b"] * (rounds + 1)
    assert {name: len(found) for name, found in times.items()} == {"a": rounds, "b": rounds}


def test_alternate_names_the_case_that_fails():
    def fails():
        raise RuntimeError("no such thing")

    with pytest.raises(MeasurementError, match="^b: RuntimeError: no such thing$"):
        harness.alternate({"a": int, "b": fails})


def test_ratios_are_of_neighbouring_rounds():
    found = harness.ratios([2.0, 40.0, 6.0, 8.0, 10.0], [1.0, 10.0, 1.0, 1.0, 1.0])
    assert found == {"median": 6.0, "p20": 4.0, "p80": 8.0}
    assert harness.summary([0.003, 0.001, 0.002]) == {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "rounds": 3}


def test_table_is_markdown():
    found = harness.table(["a", "b"], [[1, "x"], [2, ""], [3, "y | z"]])
    assert found == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 |  |\n| 3 | y \\| z |"


def test_machine_lines_join_the_commits_of_one_machine():
    here = {"cpu": "C", "threads": 2, "isa": "avx2", "torch": "2", "commit": "a"}
    rows = [{"machine": here | {"commit": commit}} for commit in "aba"] + [{"machine": here | {"threads": 4}}]
    two, four = harness.machine_lines(rows).split("\n\n")
    assert two == "On C, 2 threads, kernels for avx2, torch 2, commits a, b."
    assert four == "On C, 4 threads, kernels for avx2, torch 2, commit a."


def test_others_measures_a_share():
    with harness.others() as others:
        sum(range(10**6))
    assert others.share is None or 0 <= others.share <= 1


def test_a_row_measured_beside_others_is_not_written(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert harness.record(path, row("a", 1, "old") | {"others": 0.01}, ("config", "batch"))
    assert not harness.record(path, row("a", 1, "new") | {"others": 0.5}, ("config", "batch"))
    assert harness.record(path, row("b", 1, "new") | {"failed": "out of memory"}, ("config", "batch"))
    assert values(json.loads(path.read_text())) == {("a", 1): "old", ("b", 1): "new"}
    assert capsys.readouterr().out.splitlines() == [
        "a, 1: done",
        "a, 1: not written, other processes took 50% of the processors",
        "b, 1: out of memory",
    ]
