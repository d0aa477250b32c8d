"""The benchmark of `accelerate`: its rows against stand-ins of the original's objects, its table and command line."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import accelerate, checkouts, compare_neural_graphs, compare_original, harness, report, selection
from scalegmn_fast.models import published_config
from scalegmn_fast.testing import randomize_parameters

sys.path.append(str(Path(__file__).resolve().parents[1] / "interop"))
import standins  # noqa: E402
from test_accelerate import neural_graphs_small, scalegmn_config  # noqa: E402

NAME = "mnist_cls/scalegmn"
pytestmark = pytest.mark.filterwarnings("ignore:d_hid and dropout_all")


def small(name):
    config = published_config(name)
    config["scalegmn_args"] = scalegmn_config(name)
    config["data"]["layer_layout"] = config["scalegmn_args"]["layer_layout"]
    return config


def randomised(model):
    randomize_parameters(model, spread=0.1, generator=torch.Generator().manual_seed(0))
    return model


class ScaleGmnStandIn:
    """The original's model of a small configuration; ``factor`` times its outputs."""

    factor = 1.0

    def __init__(self, root, name):
        torch.manual_seed(0)
        self.args = scalegmn_config(name)
        self.model = randomised(standins.scalegmn_model(self.args))

    def forward(self, problem):
        batch = standins.scalegmn_batch(self.args, count=problem.batch, dtype=torch.float32)
        batch.x = torch.cat([torch.ones_like(problem.weights[0][:, :, :1, 0]), *problem.biases], 1).flatten(0, 1)
        batch.edge_attr = torch.cat([w.flatten(1, 2) for w in problem.weights], 1).flatten(0, 1)
        return lambda: self.factor * self.model(batch)


class NeuralGraphsStandIn:
    def __init__(self, root, config):
        torch.manual_seed(0)
        self.model = randomised(standins.neural_graphs_model(config))

    def forward(self, problem):
        return lambda: self.model((problem.weights, problem.biases))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(compare_original, "Theirs", ScaleGmnStandIn)
    monkeypatch.setattr(compare_neural_graphs, "Theirs", NeuralGraphsStandIn)
    monkeypatch.setattr(accelerate, "published_config", small)
    monkeypatch.setattr(compare_original, "published_config", small)
    monkeypatch.setattr(accelerate, "neural_graphs_config", neural_graphs_small)
    return ScaleGmnStandIn


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("scalegmn", NAME),
        ("neural_graphs", "mnist_cls/pna"),
        ("neural_graphs", "mnist_cls/rtransformer"),
        ("neural_graphs", "style_editing/pna"),
    ],
)
def test_a_row_has_both_times_and_their_ratio(family, name, stand_in):
    row = accelerate.measure(family, "", name, 2, rounds=2, seconds=0.1)
    assert row["native"]["rounds"] == row["accelerated"]["rounds"] == 2
    assert row["ratio"]["median"] > 0 and row["difference"] <= 1e-5
    text = accelerate.page({"rows": [{"config": name, "batch": 2, **row}]})
    assert f"| {name} | 2 | {row['native']['median_ms']:.1f} |" in text and "geometric mean (of 1)" in text


def test_nothing_is_timed_where_outputs_differ_or_nothing_is_accelerated(stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "factor", 1.1)
    found = accelerate.measure("scalegmn", "", NAME, 2, rounds=1, seconds=0.1)
    assert "outputs differ by" in found["failed"] and "native" not in found
    monkeypatch.setattr(accelerate.scalegmn_fast, "accelerate", lambda model: model)
    found = accelerate.measure("scalegmn", "", NAME, 2, rounds=1, seconds=0.1)
    assert "accelerate has not been called" in found["failed"]


def test_each_original_has_its_configurations_and_its_batch(tmp_path, monkeypatch):
    for file in (compare_original.FILE, compare_neural_graphs.FILE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    root = str(tmp_path)
    monkeypatch.setattr(checkouts.importlib.util, "find_spec", lambda name: name)
    _, found = accelerate.arguments(["--neural-graphs", root])
    assert found == [("neural_graphs", root, name, 128) for name in compare_neural_graphs.names()]
    both = ["--scalegmn", root, "--neural-graphs", root]
    assert len(accelerate.arguments(both)[1]) == len(accelerate.NAMES) == len(set(accelerate.NAMES))
    _, found = accelerate.arguments([*both, "--config", "mnist_cls/pna", NAME, "--batch", "4"])
    assert found == [("scalegmn", root, NAME, 4), ("neural_graphs", root, "mnist_cls/pna", 4)]


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
        ([], "expected a checkout for --scalegmn or --neural-graphs"),
        (
            ["--scalegmn", "nowhere"],
            "--scalegmn: expected a checkout of github.com/jkalogero/scalegmn, got 'nowhere'",
        ),
        (
            ["--neural-graphs", "nowhere"],
            "--neural-graphs: expected a checkout of github.com/mkofinas/neural-graphs",
        ),
        (["--rounds", "0"], "argument --rounds: expected at least 1, got 0"),
        (["--config", "mnist"], "argument --config: 'mnist' is no published configuration"),
        (["--scalegmn", "HERE", "--config", "mnist_cls/pna"], "'mnist_cls/pna' is of an original whose checkout is"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    (tmp_path / compare_original.FILE).parent.mkdir(parents=True)
    (tmp_path / compare_original.FILE).touch()
    with pytest.raises(SystemExit):
        accelerate.main([str(tmp_path) if value == "HERE" else value for value in arguments])
    assert message in capsys.readouterr().err
