"""Training the Neural Graphs models: learning, exact resume, what the data determine, and refusals."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train_tiny import LAYOUT, write_tiny

from scalegmn_fast.data import CnnSet, LayerStatistics, PackedCnns, write_cnns
from scalegmn_fast.models import neural_graphs_names
from scalegmn_fast.train import Trainer, evaluate, load_checkpoint, load_config, train, validate_config
from scalegmn_fast.train.config import apply_overrides
from scalegmn_fast.train.evaluate import load_model

yaml = pytest.importorskip("yaml")
OPTIONS = {"make_plots": False, "checkpoint_seconds": None}
SMALL = ["--threads", "1", "--no-plots", "--no-progress", "--device", "cpu"]
MODELS = ("pna", "rtransformer")
WIDTHS = {
    "pna": {"d_hid": 8},
    "rtransformer": {"d_node": 8, "d_edge": 4, "d_attn_hid": 8, "d_node_hid": 8, "d_edge_hid": 8, "d_out_hid": 8,
                     "n_heads": 2, "n_layers": 2},
}  # fmt: skip


def config_of(kind, task="inr_classification", **changes):
    """A published configuration made tiny, for `write_tiny`'s networks; in ``changes``, ``a__b`` is the key a.b."""
    config = load_config(f"{task}/{kind}")
    model = config["model"]
    model.update(WIDTHS[kind])
    model["graph_constructor"].update(sin_emb_dim=8, inp_factor=0.3)
    if kind == "pna":
        model["gnn_backbone"]["num_layers"] = 2
    if task == "inr_classification":
        model.update(d_out=2, layer_layout=list(LAYOUT))
        model["graph_constructor"]["stats"] = None
    config["batch_size"] = 8
    config["train_args"].update(num_epochs=3, seed=3)
    config["optimization"]["optimizer_args"]["lr"] = 1e-2
    config["optimization"].pop("scheduler_args", None)
    for dotted, value in changes.items():
        node = config
        *sections, last = dotted.split("__")
        for name in sections:
            node = node[name]
        node[last] = value
    return config


def trainer(config, dataset, out, **options):
    return Trainer.from_config(config, dataset, out, **{**OPTIONS, **options})


def call(module, *arguments):
    parser = argparse.ArgumentParser()
    module.configure(parser)
    return module.run(parser.parse_args([str(a) for a in arguments]))


def assert_same_run(a, b):
    results = [json.loads((Path(out) / "metrics.json").read_text()) for out in (a, b)]
    for key in ("epochs", "best", "test", "steps", "stopped"):
        assert results[0][key] == results[1][key]
    states = [load_checkpoint(Path(out) / "last.pt") for out in (a, b)]
    assert all(torch.equal(value, states[1]["model"][key]) for key, value in states[0]["model"].items())


# Of each architecture: channels, kernels, activations, residuals.
CNNS = (
    ([3, 4, 6], [3, 5], ["relu", "tanh"], [-1, -1]),
    ([3, 5], [3], ["gelu"], [-1]),
    ([3, 4, 6, 4], [3, 3, 1], ["sigmoid", "leaky_relu", "none"], [-1, -1, 0]),
)


def write_cnn_set(path, *, same=False, classes=4, sizes=(24, 8, 8)):
    """Random CNNs of mixed architectures; the label says how large the biases of the last layer are."""
    generator = torch.Generator().manual_seed(0)
    networks, chosen = [], []
    for k in range(sum(sizes)):
        entry = CNNS[0 if same else k % len(CNNS)]
        channels, kernels = entry[:2]
        shapes = [(b, a, s, s) for a, b, s in zip(channels, channels[1:], kernels, strict=False)]
        shapes.append((classes, channels[-1]))
        networks.append([
            (torch.randn(shape, generator=generator) / 4, torch.randn(shape[0], generator=generator))
            for shape in shapes
        ])  # fmt: skip
        chosen.append(entry)
    labels = torch.sigmoid(torch.stack([layers[-1][1].mean() for layers in networks]))
    splits = np.repeat(np.arange(3, dtype=np.uint8), sizes)
    write_cnns(path, CnnSet(networks, [e[2] for e in chosen], [e[3] for e in chosen], labels, splits))
    return PackedCnns(path)


@pytest.fixture
def cnns(tmp_path):
    return write_cnn_set(tmp_path / "cnns.safetensors")


def park_config(kind, **changes):
    return config_of(kind, "cnn_park", **{"model__num_classes": 4, **changes})


@pytest.mark.parametrize("kind", MODELS)
def test_it_learns_and_resumes_to_the_same_bits(dataset, tmp_path, kind):
    config = config_of(kind, train_args__num_epochs=10)
    result = trainer(config, dataset, tmp_path / "whole", make_plots=True).fit()
    assert result["epochs"][-1]["train"]["loss"] < 0.8 * result["epochs"][0]["train"]["loss"]
    assert (tmp_path / "whole" / "confusion.png").read_bytes().startswith(b"\x89PNG")

    class StopError(Exception):
        pass

    def stop(t):
        if t.total_steps == 13:
            t.save()
            raise StopError

    with pytest.raises(StopError):
        trainer(config, dataset, tmp_path / "parts", on_step=stop).fit()
    resumed = trainer(config, dataset, tmp_path / "parts", resume=True)
    assert resumed.total_steps == 13 and resumed.step == 3
    resumed.fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", MODELS)
def test_varying_architectures(cnns, tmp_path, kind):
    config = park_config(kind, train_args__num_epochs=8)
    result = trainer(config, cnns, tmp_path / "whole", make_plots=True).fit()
    assert result["task"] == "regression" and result["data"]["layout"] is None
    assert result["epochs"][-1]["train"]["mse"] < 0.9 * result["epochs"][0]["train"]["mse"]
    assert (tmp_path / "whole" / "predictions.png").read_bytes().startswith(b"\x89PNG")
    config["train_args"]["num_epochs"] = 3
    trainer(config, cnns, tmp_path / "parts").fit()
    config["train_args"]["num_epochs"] = 8
    trainer(config, cnns, tmp_path / "parts", resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", MODELS)
def test_train_then_eval_at_the_command_line(dataset, tmp_path, capsys, kind):
    out = tmp_path / "out"
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_of(kind)))
    assert call(train, config, "--data", dataset.path, "--out", out, "--epochs", 2, *SMALL) == 0
    name = {"pna": "GNNForClassification", "rtransformer": "RelationalTransformer"}[kind]
    assert f"parameters, {name}, on cpu" in capsys.readouterr().out
    call(evaluate, out / "best.pt", "--data", dataset.path, "--json", tmp_path / "e.json", "--threads", "1")
    again, result = (json.loads(p.read_text()) for p in (tmp_path / "e.json", out / "metrics.json"))
    assert {k: again[k] for k in result["test"]} == result["test"]


@pytest.mark.parametrize("same", [True, False])
def test_cnns_at_the_command_line(tmp_path, capsys, same):
    data = write_cnn_set(tmp_path / "cnns.safetensors", same=same)
    config, out = tmp_path / "config.yml", tmp_path / "out"
    config.write_text(yaml.safe_dump(park_config("pna", data__normalize=True, model__gnn_backbone__deg=None)))
    assert call(train, config, "--data", data.path, "--out", out, "--epochs", 1, *SMALL) == 0
    assert ("3-4-6-4" if same else "of several layouts") in capsys.readouterr().out
    other = write_cnn_set(tmp_path / "other.safetensors", same=not same)
    for path in (data.path, other.path):  # a model of varying architectures reads either
        assert call(evaluate, out / "best.pt", "--data", path, "--json", tmp_path / "e.json", "--threads", "1") == 0
    call(evaluate, out / "best.pt", "--data", data.path, "--json", tmp_path / "e.json", "--threads", "1")
    again, result = (json.loads(p.read_text()) for p in (tmp_path / "e.json", out / "metrics.json"))
    assert again["loss"] == result["test"]["loss"]


def test_a_published_name_with_overrides(dataset, tmp_path):
    small = ["model.d_hid=8", "model.gnn_backbone.num_layers=1", "model.d_out=2", "model.layer_layout=null",
             "train_args.num_epochs=1", "batch_size=20"]  # fmt: skip
    overrides = [a for pair in small for a in ("--set", pair)]
    assert call(train, "mnist_cls/pna", "--data", dataset.path, "--out", tmp_path / "out", *overrides, *SMALL) == 0


def test_scalegmn_reads_cnns_of_one_layout(tmp_path):
    from train_tiny import tiny_config

    data = write_cnn_set(tmp_path / "cnns.safetensors", same=True)
    config = tiny_config(
        train_args__loss="MSE", train_args__num_epochs=1, scalegmn_args__readout_args__d_out=1,
        scalegmn_args__symmetry="permutation", scalegmn_args__edge_pos_embed=False,
        scalegmn_args___max_kernel_height=5, scalegmn_args___max_kernel_width=5,
    )  # fmt: skip
    assert trainer(config, data, tmp_path / "out").fit()["test"]["count"] == 8
    mixed = write_cnn_set(tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match="scalegmn_args reads networks of one layout, the data hold several"):
        trainer(config, mixed, tmp_path / "no")
    with pytest.raises(ValueError, match="model._target_ .* reads networks of one layout, the data hold several"):
        trainer(config_of("pna"), mixed, tmp_path / "no")


def test_every_published_name_is_a_valid_configuration():
    for name in neural_graphs_names():
        config = validate_config(load_config(name))
        assert config["model"] == validate_config({"model": name})["model"]
        classifies = name.startswith(("inr_classification", "mnist_cls", "fmnist_cls"))
        assert (config["train_args"]["loss"] == "CrossEntropyLoss") == classifies
    assert load_config("cnn_park/pna")["train_args"]["num_epochs"] == 20


# What the data determine


def test_statistics_of_the_training_split_go_into_the_model(dataset, tmp_path):
    run = trainer(config_of("pna"), dataset, tmp_path / "a")
    expected = LayerStatistics.from_dataset(dataset)
    found = run.model.construct_graph.stats.values
    for key, values in (("weights_mean", expected.weight_mean), ("weights_std", expected.weight_std),
                        ("biases_mean", expected.bias_mean), ("biases_std", expected.bias_std)):  # fmt: skip
        assert found[key].flatten().tolist() == [v.item() for v in values]
    graph, _ = dataset.batch([0])
    raw = run.dataset.batch([0], run._batch_statistics)[0]
    assert torch.equal(raw.edge_features, graph.edge_features)  # standardised once, in the model
    run.fit()
    model, statistics, _ = load_model(tmp_path / "a" / "best.pt")
    assert statistics is None and model.construct_graph.stats.values["weights_std"].equal(found["weights_std"])


@pytest.mark.parametrize(("normalize", "given", "expected"), [
    ("auto", [2.0, 3.0], [2.0, 3.0]), (False, [2.0, 3.0], None), (True, [2.0, 3.0], "data"), ("auto", "nulls", None),
])  # fmt: skip
def test_which_statistics_a_model_gets(dataset, tmp_path, normalize, given, expected):
    stats = {"weights_std": None if given == "nulls" else given}
    config = config_of("pna", data__normalize=normalize, model__graph_constructor__stats=stats)
    value = trainer(config, dataset, tmp_path / "a").model.construct_graph.stats.values["weights_std"]
    if expected == "data":
        expected = [v.item() for v in LayerStatistics.from_dataset(dataset).weight_std]
    assert (None if value is None else value.flatten().tolist()) == expected


@pytest.mark.parametrize("both_ways", [False, True])
def test_degrees_of_the_training_split(cnns, tmp_path, both_ways):
    config = park_config("pna", model__gnn_backbone__deg=None, model__rev_edge_features=both_ways)
    run = trainer(config, cnns, tmp_path / "a")
    expected = {}
    for k in cnns.split("train").tolist():
        plan = cnns.batch([k])[0].plan
        for node in range(plan.num_nodes):
            degree = int((plan.index("target") == node).sum())
            degree += int((plan.index("source") == node).sum()) if both_ways else 0
            expected[degree] = expected.get(degree, 0) + 1
    found = run.config["model"]["gnn_backbone"]["deg"]
    assert {k: n for k, n in enumerate(found) if n} == expected
    run.fit()
    assert load_checkpoint(tmp_path / "a" / "best.pt")["config"]["model"]["gnn_backbone"]["deg"] == found


# Refusals


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__layer_layout": [2, 8, 1]}, r"model.layer_layout is \[2, 8, 1\] but the networks in the data have layout"),
    ({"data__layer_layout": [2, 8, 1]}, r"data.layer_layout is \[2, 8, 1\] but the networks"),
    ({"model__d_out": 1}, r"labels have 2 classes .* shape \[1, 1\]: expected \[batch, 2 or more\] \(model.d_out\)"),
    ({"model__graph_constructor__d_edge_in": 9}, "graph_constructor.d_edge_in must be 1, the numbers per weight .* 9"),
    ({"model__graph_constructor": None}, "model.graph_constructor must be a mapping, got None"),
    ({"model__d_hidd": 3}, "d_hidd"),
    ({"model__gnn_backbone__edge_dim": 3}, "gnn_backbone.edge_dim must equal d_hid, 8, got 3"),
    ({"model__graph_constructor__stats": {"weights_men": [1.0]}}, "stats must have keys out of .* 'weights_men'"),
    ({"train_args__loss": "MSE"}, "use CrossEntropyLoss"),
])  # fmt: skip
def test_what_does_not_fit_is_named(dataset, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(config_of("pna", **changes), dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__input_channels": 1}, "model.input_channels is 1 but the networks in the data have 3 input neurons"),
    ({"model__num_classes": 10}, "model.num_classes is 10 but the networks in the data have 4 output neurons"),
    ({"model__graph_constructor__max_num_hidden_layers": 2}, "max_num_hidden_layers is 2 but networks .* have 3"),
    ({"model__graph_constructor__d_edge_in": 9}, "d_edge_in must be the numbers of a square kernel .* 5 x 5, got 9"),
    ({"model__graph_constructor__d_edge_in": 30}, "d_edge_in must be the numbers of a square kernel .* 5 x 5, got 30"),
    ({"model__graph_constructor__flattening_method": "pool"}, "flattening_method"),
    ({"model__d_out": 2}, r"expected \[batch, 1\] \(model.d_out: 1\)"),
    ({"train_args__loss": "CrossEntropyLoss"}, "use MSE or BCE"),
    ({"model__graph_constructor__flattening_method": "extra_layer", "data__normalize": True},
     "data.normalize must be false with model.graph_constructor.flattening_method 'extra_layer'"),
])  # fmt: skip
def test_what_does_not_fit_cnns_is_named(cnns, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(park_config("pna", **changes), cnns, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("config", "message"), [
    ({}, "one of the sections 'scalegmn_args' and 'model' must describe the model, got neither"),
    ({"scalegmn_args": {}, "model": "mnist_cls/pna"}, "must describe the model, got both"),
    ({"model": "mnist_cls/pnq"}, r"model must be a mapping or one of .* got 'mnist_cls/pnq'.*'mnist_cls/pna'"),
    ({"model": [1]}, "'model' must be a section"),
    ({"model": {"d_hid": 3}}, "model._target_ is missing"),
])  # fmt: skip
def test_bad_model_sections(config, message):
    with pytest.raises(ValueError, match=message):
        validate_config(config)


def test_names_are_hinted_at_and_models_can_be_set():
    with pytest.raises(FileNotFoundError, match="the nearest published name is 'cnn_zoo/pna'"):
        load_config("cnn_zoo/pnaa")
    config = apply_overrides({"scalegmn_args": None, "batch_size": 4}, ["model=mnist_cls/rtransformer"])
    assert validate_config(config)["model"]["dropout"] == 0.2


def test_resume_refuses_another_model(dataset, tmp_path):
    trainer(config_of("pna", train_args__num_epochs=1), dataset, tmp_path / "out").fit()
    with pytest.raises(ValueError, match="belongs to another run: .*model.d_hid: 8 in the checkpoint, 4 now"):
        trainer(config_of("pna", model__d_hid=4), dataset, tmp_path / "out", resume=True)


def test_eval_refuses_another_layout(dataset, tmp_path):
    trainer(config_of("pna", train_args__num_epochs=1), dataset, tmp_path / "out").fit()
    other = write_tiny(tmp_path / "other.safetensors", layout=(2, 5, 1))
    with pytest.raises(ValueError, match=r"layout \[2, 4, 1\].*holds \[2, 5, 1\]"):
        call(evaluate, tmp_path / "out" / "best.pt", "--data", other.path)
    mixed = write_cnn_set(tmp_path / "mixed.safetensors")
    with pytest.raises(ValueError, match=r"layout \[2, 4, 1\].*holds several"):
        call(evaluate, tmp_path / "out" / "best.pt", "--data", mixed.path)


def test_the_package_trains_without_what_it_does_not_need(dataset, tmp_path, monkeypatch):
    for name in ("matplotlib", "tqdm", "omegaconf", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    trainer(config_of("pna", train_args__num_epochs=1), dataset, tmp_path / "out").fit()
