"""Training to edit INRs, with ScaleGMN and both Neural Graphs networks: from images to an evaluated checkpoint."""

import argparse
import json

import numpy as np
import pytest
import torch
from train_tiny import write_tiny

from scalegmn_fast import cli, testing
from scalegmn_fast.data import LayerStatistics, PackedDataset, evaluate_inrs
from scalegmn_fast.data.inr import coordinates
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config
from scalegmn_fast.train import Trainer, load_checkpoint, load_config
from scalegmn_fast.train.evaluate import load_model
from scalegmn_fast.train.tasks import Editing

pytest.importorskip("yaml")

MODELS = {
    "mnist_editing/scalegmn": {
        "scalegmn_args.d_hid": 8, "scalegmn_args.num_layers": 2, "scalegmn_args.out_scale": 0.1,
        "data.layer_layout": None,
    },
    "style_editing/pna": {
        "model.d_hid": 8, "model.gnn_backbone.num_layers": 2, "model.graph_constructor.inp_factor": 0.3,
        "model.out_scale": 0.1, "model.layer_layout": None, "data.normalize": True, "model.exact_bias_readout": True,
    },
    "style_editing/rtransformer": {
        "model.d_node": 8, "model.d_edge": 4, "model.d_attn_hid": 8, "model.d_node_hid": 8, "model.d_edge_hid": 8,
        "model.n_layers": 2, "model.n_heads": 2, "model.graph_constructor.sin_emb_dim": 8,
        "model.graph_constructor.inp_factor": 0.3, "model.out_scale": 0.1, "model.layer_layout": None,
        "data.normalize": True,
    },
}  # fmt: skip
COMMON = {"train_args.num_epochs": 4, "train_args.seed": 3, "batch_size": 8, "optimization.optimizer_args.lr": 1e-2,
          "optimization.scheduler_args.warmup_steps": 1}  # fmt: skip
SMALL = ["--threads", "1", "--no-progress", "--device", "cpu"]


def overrides(name, **changes):
    changed = {**COMMON, **MODELS[name], **{key.replace("__", "."): value for key, value in changes.items()}}
    return [a for key, value in changed.items() for a in ("--set", f"{key}={json.dumps(value)}")]


def config_of(name, **changes):
    from scalegmn_fast.train.config import apply_overrides

    return apply_overrides(load_config(name), overrides(name, **changes)[1::2])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """INRs fitted to small squares and their dilated images, made by the command line."""
    folder = tmp_path_factory.mktemp("editing")
    images = np.zeros((40, 6, 6), np.uint8)
    for k in range(40):
        images[k, k % 5 : k % 5 + 2, k // 8 : k // 8 + 2] = 255
    np.savez(folder / "images.npz", images=images, labels=np.arange(40) % 2)
    fit = ["fit-inrs", folder / "images.npz", folder / "inrs.safetensors", "--hidden", "8", "--steps", "300", "--lr",
           "1e-2", "--quiet", "--threads", "1"]  # fmt: skip
    assert cli.main([str(a) for a in fit]) == 0
    add = ["targets", folder / "inrs.safetensors", folder / "data.safetensors", "--images", folder / "images.npz"]
    assert cli.main([str(a) for a in add]) == 0
    return PackedDataset(folder / "data.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_from_images_to_an_evaluated_checkpoint(name, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", name, "--data", data.path, "--out", out, *overrides(name), *SMALL]
    assert cli.main([str(a) for a in command]) == 0
    assert "test       MSE " in capsys.readouterr().out
    result = json.loads((out / "metrics.json").read_text())
    assert (result["task"], result["score"]) == ("editing", "psnr")
    losses = [row["train"]["loss"] for row in result["epochs"]]
    assert losses[-1] < 0.9 * losses[0]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")

    command = ["eval", out / "best.pt", "--data", data.path, "--json", tmp_path / "e.json", "--plot",
               tmp_path / "e.png", "--threads", "1"]  # fmt: skip
    assert cli.main([str(a) for a in command]) == 0
    again = json.loads((tmp_path / "e.json").read_text())
    assert {k: again[k] for k in result["test"]} == result["test"]
    assert again["loss"] < again["unedited"]["loss"]
    assert "the networks as they are: MSE" in capsys.readouterr().out
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_evaluated_are_the_edited_networks(name, data, tmp_path):
    """The definition, written out; and the edited image is the same for every ordering of the neurons."""
    run = Trainer.from_config(config_of(name), data, tmp_path / "out", make_plots=False)
    model = run.model.double().eval()
    weights, biases = ([t.double() for t in layers] for layers in data.weights(slice(0, 3)))
    graph = GraphBatch.from_weights(weights, biases)
    changes = model(graph)
    new = ([a + b for a, b in zip(*pair, strict=True)] for pair in zip((weights, biases), changes, strict=True))
    expected = evaluate_inrs(*new, coordinates(6, 6), w0=30.0, output_offset=0.5).view(3, 6, 6, 1)
    assert testing.relative_error(run.task.output(model, graph), expected) < 1e-12
    assert testing.relative_error(run.task.unedited(graph), expected) > 1e-6

    symmetry = "sign" if "scalegmn" in name else "permutation"
    element = testing.random_group_element([2, 8, 1], symmetry, batch=3, generator=torch.Generator().manual_seed(0))
    moved = GraphBatch.from_weights(*testing.act(weights, biases, element))
    assert testing.relative_error(run.task.output(model, moved), expected) < 1e-9


def test_changes_are_in_the_units_of_normalised_networks(data):
    statistics = LayerStatistics.from_dataset(data)
    task = Editing(data.with_targets(), {"loss": "MSE"}, statistics)
    graph = data.batch([0, 1], statistics)[0]
    plain = Editing(data.with_targets(), {"loss": "MSE"})
    torch.testing.assert_close(task.unedited(graph), plain.unedited(data.batch([0, 1])[0]), rtol=1e-4, atol=1e-4)
    ones = lambda graph: tuple([torch.ones_like(t) for t in part] for part in graph.to_weights())  # noqa: E731
    weights, biases = data.weights([0, 1])
    moved = (
        [value + std for value, std in zip(values, stds, strict=True)]
        for values, stds in ((weights, statistics.weight_std), (biases, statistics.bias_std))
    )
    expected = plain.unedited(GraphBatch.from_weights(*moved))
    torch.testing.assert_close(task.output(ones, graph), expected, rtol=1e-3, atol=1e-3)


def test_an_interrupted_run_continues_to_the_same_bits(data, tmp_path):
    name, options = "style_editing/pna", {"make_plots": False, "checkpoint_seconds": None}
    Trainer.from_config(config_of(name), data, tmp_path / "whole", **options).fit()

    class StopError(Exception):
        pass

    def stop(run):
        if run.total_steps == 6:
            run.save()
            raise StopError

    with pytest.raises(StopError):
        Trainer.from_config(config_of(name), data, tmp_path / "parts", on_step=stop, **options).fit()
    Trainer.from_config(config_of(name), data, tmp_path / "parts", resume=True, **options).fit()
    first, second = (load_checkpoint(tmp_path / part / "last.pt") for part in ("whole", "parts"))
    assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
    assert first["best"] == second["best"]


def test_checkpoints_have_the_models_parameter_names(data, tmp_path):
    run = Trainer.from_config(config_of("mnist_editing/scalegmn"), data, tmp_path / "out", make_plots=False)
    args = {**run.config["scalegmn_args"], "layer_layout": [2, 8, 1]}
    from_config(args).load_state_dict(load_checkpoint(tmp_path / "out" / "last.pt")["model"], strict=True)
    model, statistics, _ = load_model(tmp_path / "out" / "last.pt")
    assert statistics is None and not model.training


def test_targets_do_not_disturb_classification(data, tmp_path):
    command = ["train", "mnist_cls/pna", "--data", data.path, "--out", tmp_path / "out", "--set", "model.d_hid=8",
               "--set", "model.d_out=2", "--set", "model.layer_layout=null", "--epochs", "1", "--no-plots",
               *SMALL]  # fmt: skip
    assert cli.main([str(a) for a in command]) == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["task"] == "classification"


@pytest.mark.parametrize(("changes", "message"), [
    ({"train_args__loss": "BCE"}, "train_args.loss must be MSE for a model that edits networks, got BCE"),
    ({"data__style_function": "erode"}, "data.style_function is 'erode' but the targets in .* are of style 'dilate'"),
    ({"data__layer_layout": [2, 9, 1]}, r"data.layer_layout is \[2, 9, 1\] but the networks"),
])  # fmt: skip
def test_bad_editing_configurations(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        Trainer.from_config(config_of("mnist_editing/scalegmn", **changes), data, tmp_path / "out", make_plots=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", MODELS)
def test_without_targets(name, tmp_path):
    dataset = write_tiny(tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="tiny.safetensors has no target images; scalegmn-fast targets adds them"):
        Trainer.from_config(config_of(name), dataset, tmp_path / "out", make_plots=False)


def test_data_that_are_no_inrs_of_the_targets(data, tmp_path):
    from test_train_neural_graphs import write_cnn_set

    from scalegmn_fast.data import write_packed

    cnns = write_cnn_set(tmp_path / "cnns.safetensors", same=True)
    with pytest.raises(ValueError, match="is trained on target images of INRs, got a dataset of CNNs"):
        Trainer.from_config(config_of("mnist_editing/scalegmn"), cnns, tmp_path / "out", make_plots=False)
    weights, biases = data.weights(slice(None))
    colour = data.targets().expand(-1, -1, -1, 3)
    path = tmp_path / "colour.npz"
    write_packed(path, weights, biases, data.labels, data.splits, data.metadata, extras={"target": colour})
    with pytest.raises(ValueError, match=r"need INRs with 2 inputs, 3 outputs .* got layout \[2, 8, 1\] with 1"):
        Trainer.from_config(config_of("mnist_editing/scalegmn"), PackedDataset(path), tmp_path / "out")


def test_editors_embed_nothing(data, tmp_path):
    from scalegmn_fast.train import embed

    Trainer.from_config(config_of("mnist_editing/scalegmn"), data, tmp_path / "out", make_plots=False)
    parser = argparse.ArgumentParser()
    embed.configure(parser)
    arguments = [str(tmp_path / "out" / "last.pt"), str(data.path), "--out", str(tmp_path / "vectors")]
    with pytest.raises(ValueError, match="edits networks: it has no vector per network"):
        embed.run(parser.parse_args(arguments))
