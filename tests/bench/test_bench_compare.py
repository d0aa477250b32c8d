"""The comparison with the original: its command line, its tables, and its course against a stand-in."""

import json
import sys
import textwrap

import pytest
import torch

from bench import compare_original, comparison, configs, report, scaling
from bench.original import UNUSED_BY_MODELS
from scalegmn_fast.models import published_config

STAND_IN = {
    "src/scalegmn/__init__.py": "",
    "src/scalegmn/models.py": """
        from scalegmn_fast.graph import GraphBatch
        from scalegmn_fast.models import ScaleGMN as Model

        class ScaleGMN(Model):
            def forward(self, batch, weights, biases):
                x = batch.x
                batch.x = None  # the original overwrites its batch too
                return FACTOR * super().forward(GraphBatch.from_edges(x, batch.edge_index, batch.edge_attr,
                                                                      graph=batch.batch))
        """,
    "src/scalegmn/graph_init.py": """
        def batch_to_graphs(weights, biases, input_emb):
            w, b = weights[0], biases[0]
            x = w.new_full((len(w), 2, 1), input_emb)
            x[:, 1:] = b
            edges = w.new_zeros(len(w), 2, 2, w.shape[-1])
            edges[:, :1, 1:] = w
            return x, edges
        """,
    "src/data/data_utils.py": """
        import torch
        from torch_geometric.data import Data

        def get_node_types(layout):
            return torch.arange(2)

        def get_edge_types(layout):
            return torch.zeros(1)

        def nn_to_edge_index(layout, device):
            return torch.tensor([[0], [1]])

        def to_pyg_batch(x, edges, edge_index, **options):
            return Data(x=x, edge_index=edge_index, edge_attr=edges[edge_index[0], edge_index[1]]), None
        """,
    "src/utils/helpers.py": """
        def update_common_args(config):
            return config

        def mask_hidden(config):
            return True

        mask_input = mask_hidden
        """,
}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes a stand-in for the original that gives our outputs times a factor, on networks of one weight."""

    def small(name):
        config = published_config(name)
        config["data"]["layer_layout"] = [1, 1]
        config["scalegmn_args"] |= {"d_hid": 4, "num_layers": 1, "layer_layout": [1, 1]}
        config["scalegmn_args"]["mlp_args"]["d_k"] = [4]
        return config

    monkeypatch.setattr(compare_original, "published_config", small)

    def write(factor):
        for name, text in STAND_IN.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).replace("FACTOR", str(factor)))
        path = tmp_path / "configs" / "mnist_cls" / "scalegmn.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(small("mnist_cls/scalegmn")))
        return str(tmp_path)

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("src", *UNUSED_BY_MODELS):
            del sys.modules[name]


def test_equal_outputs_are_timed_in_turn(stand_in):
    row = compare_original.compare(stand_in(1.0), "mnist_cls/scalegmn", 2, "float32", "eager", rounds=2, seconds=60.0)
    assert row["difference"] < 1e-5
    assert row["original"]["rounds"] == row["ours"]["rounds"] == 2
    assert row["ratio"]["p20"] <= row["ratio"]["median"] <= row["ratio"]["p80"]
    floor = row["step_flops"] / row["gemm_peak"]
    assert row["floor_ratio"]["median"] == pytest.approx(row["original"]["median_ms"] / 1e3 / floor)


def test_other_outputs_are_not_timed(stand_in):
    row = compare_original.compare(stand_in(2.0), "mnist_cls/scalegmn", 2, "float32", "eager", rounds=2, seconds=60.0)
    assert row["failed"] == "outputs differ by 5.0e-01"
    assert "ratio" not in row


def test_memory_of_the_original_beside_ours_as_networks_grow(stand_in, tmp_path):
    found = scaling.original_peak(stand_in(1.0), [1, 1])
    assert found["original_bytes"] > 0
    side = {"forward": {"median_ms": 1.0}, "forward_bytes": 8, "step": {"median_ms": 3.0}, "step_bytes": 16}
    sizes = [(4, {"original_bytes": 400}), (8, {"failed": "out of memory"}), (16, None)]
    rows = [{"edges": n, "layout": [2, n, 1], **side, **({"original": of} if of else {})} for n, of in sizes]
    last = [line.split("|")[-3:-1] for line in scaling.page({"rows": rows}).splitlines()[2:]]
    assert [[cell.strip() for cell in cells] for cells in last] == [["0", "100"], ["out of memory", ""], ["", ""]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            ["--scalegmn", "HERE"],
            "argument --scalegmn: expected a checkout of github.com/jkalogero/scalegmn, got 'HERE'",
        ),
        (["--scalegmn", "HERE", "--config", "mnist_cls/scalegnm"], "argument --config: 'mnist_cls/scalegnm' is no"),
        (["--scalegmn", "HERE", "--batch", "0"], "argument --batch: expected 'own' or a positive number, got '0'"),
        (["--scalegmn", "HERE", "--rounds", "0"], "argument --rounds: expected at least 1, got 0"),
        ([], "arguments are required: --scalegmn"),
    ],
)
def test_wrong_arguments_are_named(given, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        compare_original.main([str(tmp_path) if word == "HERE" else word for word in given])
    assert end.value.code == 2
    assert expected.replace("HERE", str(tmp_path)) in capsys.readouterr().err


def test_difference_is_relative_to_the_largest_value_of_each_tensor():
    a, b = torch.tensor([1.0, 4.0]), torch.tensor([100.0])
    assert comparison.difference(a, a + torch.tensor([0.5, 0.0])) == 0.125
    assert comparison.difference(([a], [b]), ([a], [b + 1])) == pytest.approx(0.01)
    assert not comparison.difference(a, a * float("nan")) <= comparison.LIMIT


def rows():
    def row(config, batch, mode, **fields):
        return {"config": config, "batch": batch, "dtype": "float32", "mode": mode, **fields}

    def timed(ratio):
        times = {"median_ms": 8.0, "rounds": 3}
        return {
            "original": times,
            "ours": times,
            "ratio": {"median": ratio, "p20": ratio / 2, "p80": ratio * 2},
            "difference": 1e-6,
            "step_flops": 4e8,
            "gemm_peak": 2e11,
            "floor_ratio": {"median": 4 * ratio},
        }

    return [
        row("mnist_cls/scalegmn", 128, "eager", **timed(5.0)),
        row("svhn/scalegmn_relu", 16, "eager", **timed(4.0)),  # its own batch size is 16
        row("mnist_cls/scalegmn", 16, "eager", **timed(9.0)),
        row("mnist_cls/scalegmn", 16, "compiled", failed="gave up after 5 s"),
        row("mnist_cls/scalegmn", 16, "memory", original=4e6, ours=1e6, ratio={"median": 4.0}),
    ]


def test_tables_by_batch_size_with_geometric_means():
    page = compare_original.page({"rows": rows()})
    sixteen, own = page.split("float32, its own batch:")
    assert "**6.00x** (2)" in sixteen and "**4.47x** (2)" in own
    assert "gave up after 5 s" in sixteen and "compiled" not in own
    assert "| 4 | 1 | 4.00x |" in sixteen
    assert "| 2 | 4.0 | 36.00x |" in sixteen and "**24.00x** (2)" in sixteen
    assert sixteen.count("svhn/scalegmn_relu") == own.count("svhn/scalegmn_relu") == 1


def test_page_is_written_from_what_there_is(tmp_path, monkeypatch):
    machine = {"cpu": "C", "threads": 2, "isa": "avx2", "torch": "2", "commit": "a"}
    times = {"median_ms": 8.0, "p20_ms": 7.0, "p80_ms": 9.0}
    config = {"config": "mnist_cls/scalegmn", "batch": 1, "forward": times, "step": times, "gemm_peak": 1e12}
    config |= {f"{what}_{unit}": 4e9 for what in ("forward", "step") for unit in ("bytes", "flops")}
    for name, found in {"compare_original": rows(), "configs": [config]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": found}))
    monkeypatch.setattr(report.harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    report.main()
    page = (tmp_path / "page.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Against the original",
        "## All configurations",
    ]
    assert "| 8.0 | 7.0 to 9.0 | 4.00 | 50% | 4000 |" in page
    assert configs.page({"rows": [config]}) in page
    assert page.count("On C, 2 threads, kernels for avx2, torch 2, commit a.") == 2
    assert (tmp_path / "images" / "compare_original.png").read_bytes().startswith(b"\x89PNG")
