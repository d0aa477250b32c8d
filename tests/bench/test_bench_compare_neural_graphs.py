"""The comparison with the original Neural Graphs: problems, floors, its course against a stand-in, and tables."""

import sys
import textwrap

import pytest
import torch
from torch import nn

from bench import checkouts, compare_neural_graphs, report, selection
from bench.compare_neural_graphs import forward_flops, names, problem_of, program_products, task
from scalegmn_fast.models import neural_graphs_config
from scalegmn_fast.ops.row_program import RowProgram, SectionWriter

STAND_IN = {
    "nn/__init__.py": "raise ImportError('nothing runs this')",
    "nn/relational_transformer.py": "",
    "nn/gnn.py": """
        from scalegmn_fast.graph import GraphBatch
        from scalegmn_fast.models import GNNForClassification as Model

        class GNNForClassification(Model):
            def forward(self, networks):
                return FACTOR * super().forward(GraphBatch.from_weights(*networks))
        """,
    "nn/dense_gnn.py": """
        from scalegmn_fast.graph import GraphBatch
        from scalegmn_fast.models import GNNParams as Model

        class GNNParams(Model):
            def forward(self, networks):
                weights, biases = super().forward(GraphBatch.from_weights(*networks))
                return [FACTOR * w for w in weights], biases
        """,
}


def small(name):
    config = neural_graphs_config(name)
    config |= {"d_hid": 4, "layer_layout": [2, 3, 3, 1]}
    config["graph_constructor"]["sin_emb_dim"] = 4
    config["gnn_backbone"] |= dict.fromkeys(("in_channels", "hidden_channels", "out_channels", "edge_dim"), 4)
    return config


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a stand-in for the original that gives our outputs times a factor, on small networks."""
    monkeypatch.setattr(compare_neural_graphs, "neural_graphs_config", small)

    def write(factor):
        for name, text in STAND_IN.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).replace("FACTOR", str(factor)))
        return str(tmp_path)

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "nn":
            del sys.modules[name]


@pytest.mark.parametrize("name", ["mnist_cls/pna", "mnist_dilation/pna"])
def test_equal_outputs_are_timed_in_turn_and_have_a_floor(name, stand_in):
    row = compare_neural_graphs.compare(stand_in(1.0), name, 2, "float32", "eager", rounds=2, seconds=60.0)
    assert row["difference"] < 1e-5
    assert [row[side]["rounds"] for side in ("original", "ours", "ours_bfloat16")] == [2, 2, 2]
    floor = row["step_flops"] / row["gemm_peak"]
    assert row["floor_ratio"]["median"] == pytest.approx(row["original"]["median_ms"] / 1e3 / floor)


@pytest.mark.parametrize("name", ["mnist_cls/pna", "mnist_dilation/pna"])
def test_other_outputs_are_not_timed(name, stand_in):
    row = compare_neural_graphs.compare(stand_in(2.0), name, 2, "float32", "eager", rounds=2, seconds=60.0)
    assert row["failed"].startswith("outputs differ by 5.0e-01")
    assert "ratio" not in row


def test_memory_of_both_sides(stand_in):
    root = stand_in(1.0)
    assert compare_neural_graphs.peak(root, "mnist_cls/pna", 2, "float32") >= 0
    assert compare_neural_graphs.peak(None, "mnist_dilation/pna", 2, "float32") >= 0


def test_configurations_are_those_of_one_layout():
    assert {name.split("/")[0] for name in names()} == {
        "inr_classification",
        "style_editing",
        "mnist_cls",
        "fmnist_cls",
        "mnist_dilation",
    }


@pytest.mark.parametrize("name", names())
def test_networks_have_the_statistics_of_the_configuration(name):
    config = neural_graphs_config(name)
    problem = problem_of(config, 4)
    stats = config.get("stats") or config["graph_constructor"]["stats"]
    for tensor, mean, std in zip(problem.biases, stats["biases_mean"], stats["biases_std"], strict=True):
        assert tensor.mean().item() == pytest.approx(mean, abs=1e-3 * std)
        assert (tensor - mean).square().mean().sqrt().item() == pytest.approx(std, rel=1e-3)
    edits = name.startswith(("style_editing", "mnist_dilation"))
    assert task(config)["scalegmn_args"]["equivariant"] == edits
    assert problem.target.is_floating_point() == edits


def test_operations_outside_and_inside_of_row_programs():
    layer, rows = nn.Linear(3, 5), torch.ones(7, 3)
    assert forward_flops(lambda: layer(rows)) == 2 * 7 * 3 * 5
    before = SectionWriter.linear
    with program_products() as found:
        section = RowProgram().section(7)
        section.linear(section.load(rows), layer.weight, layer.bias)
    assert found == [2 * 7 * 3 * 5]
    assert SectionWriter.linear is before


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--neural-graphs", "HERE"], "expected a checkout of github.com/mkofinas/neural-graphs, got 'HERE'"),
        (["--neural-graphs", "HERE", "--config", "cnn_zoo/pna"], "argument --config: 'cnn_zoo/pna' is no published"),
        ([], "arguments are required: --neural-graphs"),
    ],
)
def test_wrong_arguments_are_named(given, expected, tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_neural_graphs.main([str(tmp_path) if word == "HERE" else word for word in given])
    assert expected.replace("HERE", str(tmp_path)) in capsys.readouterr().err


def test_missing_packages_are_named(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(checkouts.importlib.util, "find_spec", lambda module: None if module == "rff" else module)
    with pytest.raises(SystemExit):
        compare_neural_graphs.main(["--neural-graphs", stand_in(1.0)])
    error = capsys.readouterr().err
    assert "the original needs random-fourier-features-pytorch, which cannot be imported" in error


def test_default_is_a_step_at_the_published_batch(stand_in, monkeypatch):
    monkeypatch.setattr(checkouts.importlib.util, "find_spec", lambda module: module)
    args = compare_neural_graphs.COMPARISON.arguments(["--neural-graphs", stand_in(1.0), "--memory"])
    cases = selection.cases(args, compare_neural_graphs.NEURAL_GRAPHS.own_batch)
    assert cases == [(name, 128) for name in compare_neural_graphs.NEURAL_GRAPHS.names]
    assert args.modes == ["eager", "memory"]
    assert args.output.name == "compare_neural_graphs.json"


def test_tables_by_model_and_batch_size(tmp_path, monkeypatch):
    times = {"median_ms": 40.0, "rounds": 3}
    timed = {
        "original": times | {"median_ms": 480.0},
        "ours": times,
        "ratio": {"median": 12.0, "p20": 11.0, "p80": 13.0},
        "difference": 1e-6,
        "step_flops": 4e9,
        "gemm_peak": 2e11,
        "floor_ratio": {"median": 24.0},
    }

    def row(config, batch, mode, **fields):
        return {"config": config, "batch": batch, "dtype": "float32", "mode": mode, **fields}

    rows = [
        row("mnist_cls/rtransformer", 128, "eager", failed="original: out of memory"),
        row("mnist_cls/rtransformer", 16, "eager", **timed),
        row("mnist_cls/pna", 128, "eager", **timed),
        row("mnist_cls/pna", 128, "memory", original=3e8, ours=2e7, ratio={"median": 15.0}),
    ]
    page = compare_neural_graphs.page({"rows": rows})
    assert [line for line in page.splitlines() if line.endswith(":")] == [
        "float32, NG-GNN, batch 128:",
        "float32, NG-T, batch 128:",
        "float32, NG-T, batch 16:",
    ]
    line = "| 128 | 480 | 40 | 12.00x | 11.00 to 13.00 | 3 | 20 | 2.0 | 24.00x | 300 | 20 | 15.00x | 1e-06"
    assert f"| mnist_cls/pna {line} |" in page
    assert "| mnist_cls/rtransformer | 128 | original: out of memory |" in page
    assert any(name == "compare_neural_graphs" for name, *_ in report.SECTIONS)
