"""`scalegmn-fast check` passes on a good installation, and notices a bad one."""

from __future__ import annotations

import argparse
import json
from itertools import islice

import pytest
import torch

from scalegmn_fast import backends, check
from scalegmn_fast.check import ops as op_checks
from scalegmn_fast.models import neural_graphs_names, published_names

MODEL = "mnist_cls/scalegmn"
NEURAL_GRAPHS = ("inr_classification/pna", "inr_classification/rtransformer", "style_editing/pna", "cnn_park/pna")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    check.configure(parser)
    return check.run(parser.parse_args(["--device", "cpu", "--backend", "reference", *arguments]))


def few_op_cases(monkeypatch) -> None:
    cases = op_checks.op_cases
    monkeypatch.setattr(op_checks, "op_cases", lambda seed: islice(cases(seed), 0, None, 9))


@pytest.mark.timeout(400)
def test_every_op_and_every_published_model_pass(capsys, tmp_path):
    file = tmp_path / "rows.json"
    code = run("--quick", "--json", str(file))
    printed = capsys.readouterr().out
    assert code == 0, printed
    written = json.loads(file.read_text())
    models = {row["case"] for row in written["rows"] if row["part"] == "model"}
    assert models == {*published_names(), *neural_graphs_names()}
    assert {row["part"] for row in written["rows"]} == {"model", *backends.OPS}
    assert all(row["ok"] for row in written["rows"])
    for row in written["rows"]:
        is_oracle = row["case"] in neural_graphs_names() and row["dtype"] == "float64"
        quantities = ["output", "gradients"] * (not is_oracle) + ["equivariance"] * (row["part"] == "model")
        assert len(quantities) == sum(name in row for name in ("output", "gradients", "equivariance"))
        assert all(0 <= row[name]["error"] <= row[name]["bound"] < 1 for name in quantities), row
        assert sum(row["case"] in line and row["dtype"] in line for line in printed.splitlines()) >= 1


def test_every_available_backend_passes_on_a_model(monkeypatch):
    few_op_cases(monkeypatch)
    parser = argparse.ArgumentParser()
    check.configure(parser)
    assert check.run(parser.parse_args(["--device", "cpu", "--quick", "--model", MODEL])) == 0


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", sorted(backends.OPS))
def test_a_wrong_backend_is_caught(op, direction, monkeypatch, capsys):
    """One element of one op's result is off by two hundredths."""
    right = backends.implementation

    def planted(name, way, tensor, *limits):
        function = right(name, way, tensor, *limits)
        if (name, way) != (op, direction):
            return function

        def wrong(*args):
            result = function(*args)
            first = (result if isinstance(result, torch.Tensor) else result[0]).clone()
            first.view(-1)[-1] += 0.02
            return first if isinstance(result, torch.Tensor) else (first, *result[1:])

        return wrong

    monkeypatch.setattr(backends, "implementation", planted)
    few_op_cases(monkeypatch)
    assert run("--quick", "--model", MODEL) == 1
    failing = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert any(line.startswith(op) for line in failing)
    others = set(backends.OPS) - {op}
    assert not any(line.startswith(tuple(others)) for line in failing)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NEURAL_GRAPHS)
def test_a_wrong_engine_is_caught_by_neural_graphs(name, direction, monkeypatch, capsys):
    """The last number of what the CPU engine's programs give is off by a twentieth of the largest one."""
    right = backends.implementation

    def planted(op, way, tensor, *limits):
        function = right(op, way, tensor, *limits)
        if (op, way) != ("row_program", direction) or backends.active() != "cpp":
            return function

        def wrong(*args):
            results = list(function(*args))
            place = next(k for k, tensor in enumerate(results) if tensor is not None and tensor.numel())
            results[place] = results[place].clone()
            results[place].view(-1)[-1] += 0.05 * results[place].abs().max()
            return results if direction == "backward" else tuple(results)

        return wrong

    monkeypatch.setattr(op_checks, "op_cases", lambda seed: iter(()))
    arguments = ["--backend", "cpp", "--quick", "--model", name]
    assert run(*arguments) == 0
    monkeypatch.setattr(backends, "implementation", planted)
    assert run(*arguments) == 1
    failing = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert {line.split()[4] for line in failing} == {"float32", "float64"}
    assert not any("Error" in line for line in failing)


@pytest.mark.parametrize("reduction", ["statistics", "attention"])
def test_row_programs_are_checked_in_every_reduction(reduction):
    cases = [case for case in op_checks.op_cases() if case.case.startswith(reduction)]
    assert len(cases) == 2 and all(case.op == "row_program" and case.served_by("cpp") for case in cases)


def test_a_crash_is_a_failed_row(monkeypatch, capsys):
    def broken(name, way, tensor):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(backends, "implementation", broken)
    few_op_cases(monkeypatch)
    assert run("--quick", "--model", MODEL) == 1
    assert "no kernel image is available" in capsys.readouterr().out


def test_what_cannot_be_checked_is_named():
    parser = argparse.ArgumentParser()
    check.configure(parser)
    with pytest.raises(ValueError, match="nothing to check with: cuda on cpu"):
        check.run(parser.parse_args(["--device", "cpu", "--backend", "cuda"]))
    with pytest.raises(ValueError, match="nothing to check with: cuda on cpu"):
        run("--backend", "cuda")
    with pytest.raises(ValueError, match="reference on nowhere"):
        check.run(parser.parse_args(["--device", "nowhere", "--backend", "reference"]))
    with pytest.raises(ValueError, match="--model must be one of"):
        run("--model", "mnist_cls/unknown")
