"""The benchmark of `accelerate`: its rows against stand-ins of the original's objects, its table and command line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import accelerate, harness, report, selection
from scalegmn_fast.models import published_config
from scalegmn_fast.testing import randomize_parameters

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
import standins  # noqa: E402
from test_accelerate import scalegmn_config  # noqa: E402

NAME = "mnist_cls/scalegmn"
pytestmark = pytest.mark.filterwarnings("ignore:d_hid and dropout_all")


def small(name):
    config = published_config(name)
    config["scalegmn_args"] = scalegmn_config(name)
    config["data"]["layer_layout"] = config["scalegmn_args"]["layer_layout"]
    return config


class StandIn:
    """The original's model of a small configuration; ``factor`` times its outputs."""

    factor = 1.0

    def __init__(self, root, name):
        torch.manual_seed(0)
        args = scalegmn_config(name)
        self.model = standins.scalegmn_model(args)
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))
        self.args = args

    def forward(self, problem):
        batch = standins.scalegmn_batch(self.args, count=problem.batch, dtype=torch.float32)
        batch.x = torch.cat([torch.ones_like(problem.weights[0][:, :, :1, 0]), *problem.biases], 1).flatten(0, 1)
        batch.edge_attr = torch.cat([w.flatten(1, 2) for w in problem.weights], 1).flatten(0, 1)
        return lambda: self.factor * self.model(batch)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(accelerate, "Theirs", StandIn)
    monkeypatch.setattr(accelerate, "published_config", small)
    monkeypatch.setattr("bench.compare_original.published_config", small)
    return StandIn


def test_a_row_has_both_times_and_their_ratio(stand_in):
    row = accelerate.measure("", NAME, 2, rounds=2, seconds=0.1)
    assert row["native"]["rounds"] == row["accelerated"]["rounds"] == 2
    assert row["ratio"]["median"] > 0 and row["difference"] <= 1e-5
    text = accelerate.page({"rows": [{"config": NAME, "batch": 2, **row}]})
    assert f"| {NAME} | 2 | {row['native']['median_ms']:.1f} |" in text and "geometric mean (of 1)" in text


def test_nothing_is_timed_where_outputs_differ_or_nothing_is_accelerated(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "factor", 1.1)
    assert "outputs differ by" in accelerate.measure("", NAME, 2, rounds=1, seconds=0.1)["failed"]
    monkeypatch.setattr(accelerate.scalegmn_fast, "accelerate", lambda model: model)
    assert "accelerate has not been called" in accelerate.measure("", NAME, 2, rounds=1, seconds=0.1)["failed"]


def test_the_command_writes_rows_and_the_report_draws_them(monkeypatch, tmp_path, capsys):
    (tmp_path / "src/scalegmn").mkdir(parents=True)
    (tmp_path / "src/scalegmn/models.py").touch()
    side = {"median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 3.0, "rounds": 5}
    ratio = {"median": 1.04, "p20": 1.03, "p80": 1.06}
    row = {"native": side, "accelerated": side, "ratio": ratio, "others": 0.0}
    monkeypatch.setattr(accelerate.isolated, "attempt", lambda *args, **options: row)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    given = ["--scalegmn", str(tmp_path), "--config", NAME, "--batch", "own", "2"]
    accelerate.main([*given, "--output", str(tmp_path / "accelerate.json")])
    written = json.loads((tmp_path / "accelerate.json").read_text())["rows"]
    assert [entry["batch"] for entry in written] == [selection.own_batch(NAME), 2]
    assert "| 1.040 | 1.030 to 1.060 |" in capsys.readouterr().out
    section = next(item for item in report.SECTIONS if item[0] == "accelerate")
    assert "**1.040**" in report.section(*section)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "argument --scalegmn: expected a checkout that has src/scalegmn/models.py"),
        (["--rounds", "0"], "argument --rounds: expected at least 1, got 0"),
        (["--config", "mnist"], "argument --config: 'mnist' is no published configuration"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        accelerate.main(["--scalegmn", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
