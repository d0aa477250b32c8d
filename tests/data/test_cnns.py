"""Convolutional networks: the small CNN zoo, the CNN Wild Park, and packed datasets of varying architectures."""

import argparse
import gzip
import json
import pickle
import random
import sys
import types

import numpy as np
import pytest
import torch

from scalegmn_fast import cli
from scalegmn_fast.data import (
    CnnSet,
    LayerStatistics,
    PackedCnns,
    PackedDataset,
    open_packed,
    pack,
    read_cnn_park,
    read_cnn_zoo,
    write_cnns,
    write_packed,
)
from scalegmn_fast.graph import from_cnns
from scalegmn_fast.testing import random_cnn

# A zoo's variables: name, shape in TensorFlow's order.
VARIABLES = (
    ("sequential/conv2d/bias:0", (2,)),
    ("sequential/conv2d/kernel:0", (3, 3, 1, 2)),
    ("sequential/conv2d_1/bias:0", (3,)),
    ("sequential/conv2d_1/kernel:0", (3, 3, 2, 3)),
    ("sequential/dense/bias:0", (4,)),
    ("sequential/dense/kernel:0", (3, 4)),
)


def write_zoo(folder, *, networks=20, steps=(0, 86), activations=("relu", "tanh"), accuracies=None):
    """Rows: network by network, step by step; accuracies are row numbers / 1000, or what is made of the weights."""
    folder.mkdir(exist_ok=True)
    rows, start, layout = networks * len(steps), 0, ["varname,start_idx,end_idx,shape,size"]
    for name, shape in VARIABLES:
        size = int(np.prod(shape))
        layout.append(f'{name},{start},{start + size},"{shape}",{size}')
        start += size
    (folder / "layout.csv").write_text("\n".join(layout) + "\n")
    weights = np.random.Generator(np.random.PCG64(0)).standard_normal((rows, start)).astype(np.float32)
    np.save(folder / "weights.npy", weights)
    accuracies = np.arange(rows) / 1000 if accuracies is None else accuracies(weights)
    lines = ["modeldir,step,test_accuracy,config.activation"]
    for row in range(rows):
        network = row // len(steps)
        activation = activations[network % len(activations)]
        lines.append(f"m{network},{steps[row % len(steps)]},{accuracies[row]},{activation}")
    with gzip.open(folder / "metrics.csv.gz", "wt") as handle:
        handle.write("\n".join(lines) + "\n")
    return weights


def state_of(channels, kernels, seed):
    state = random_cnn(channels, [4], kernels=kernels, generator=torch.Generator().manual_seed(seed))
    return {k: v.float() for k, v in state.items()}


# Of each network: channels, kernels, activations, residuals.
PARK = (
    ([3, 2, 5], [3, 5], ["relu", "tanh"], [-1, -1]),
    ([3, 4], [3], ["gelu"], [-1]),
    ([3, 2, 4, 3], [3, 3, 1], ["sigmoid", "leaky_relu", "none"], [-1, -1, 0]),
)


def write_park(folder, *, count=12, config=dict, score=None):
    """Checkpoints, and splits of two thirds, a sixth and a sixth; the score of network k is k / 100, or what is made of
    its state."""
    names, scores = [], []
    for k in range(count):
        channels, kernels, activations, residuals = PARK[k % len(PARK)]
        name = f"zoo/trial_{k}/checkpoint_000010/checkpoint.pt"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made = config(n_layers=len(kernels), channels=channels, activation=activations, residual=residuals)
        state = state_of(channels, kernels, k)
        scores.append(k / 100 if score is None else score(state))
        torch.save({"model": state, "optimizer": {"state": {}}, "config": made, "iteration": 10}, path)
        names.append(name)
    parts = {"train": range(0, count * 2 // 3), "val": range(count * 2 // 3, count * 5 // 6),
             "test": range(count * 5 // 6, count)}  # fmt: skip
    splits = {
        part: {"path": [names[k] for k in chosen], "score": [scores[k] for k in chosen], "step": [10 for _ in chosen]}
        for part, chosen in parts.items()
    }
    (folder / "splits.json").write_text(json.dumps(splits))
    return folder / "splits.json"


def run_pack(*arguments):
    parser = argparse.ArgumentParser()
    pack.configure(parser)
    return pack.run(parser.parse_args([str(a) for a in arguments]))


def run_command(command, *arguments):
    threads = () if command == "pack" else ("--threads", "1", "--device", "cpu")
    assert cli.main([command, *map(str, (*arguments, *threads))]) == 0


@pytest.fixture
def park(tmp_path):
    splits = write_park(tmp_path / "park")
    write_cnns(tmp_path / "park.safetensors", read_cnn_park(tmp_path / "park", splits))
    return PackedCnns(tmp_path / "park.safetensors")


def test_zoo_layers_are_pytorchs(tmp_path):
    rows = write_zoo(tmp_path / "zoo")
    zoo = read_cnn_zoo(tmp_path / "zoo")
    assert len(zoo.networks) == 20 and zoo.extras["row"].tolist() == list(range(1, 40, 2))
    row = torch.from_numpy(rows[1])
    (first, bias), (second, _), (dense, _) = zoo.networks[0]
    assert torch.equal(bias, row[:2])
    assert torch.equal(first, row[2:20].view(3, 3, 1, 2).permute(3, 2, 0, 1)) and second.shape == (3, 2, 3, 3)
    assert torch.equal(dense, row[-12:].view(3, 4).t())
    assert torch.equal(zoo.labels, torch.arange(1, 40, 2).float() / 1000)
    assert zoo.activations[:2] == [["relu", "relu"], ["tanh", "tanh"]]


def test_zoo_splits(tmp_path):
    write_zoo(tmp_path / "zoo")
    order = list(range(39, -1, -1))
    (tmp_path / "order.csv").write_text("\n".join(map(str, order)))
    zoo = read_cnn_zoo(tmp_path / "zoo", order=tmp_path / "order.csv")
    assert zoo.extras["row"].tolist() == list(range(39, 0, -2))
    first = list(range(10))
    random.Random(0).shuffle(first)
    expected = [0 if k in first[:8] else 1 if k in first else 2 for k in range(20)]
    assert zoo.splits.tolist() == expected
    tanh = read_cnn_zoo(tmp_path / "zoo", order=tmp_path / "order.csv", activation="tanh")
    assert set(map(tuple, tanh.activations)) == {("tanh", "tanh")} and tanh.splits.tolist() == expected[::2]


def test_zoo_through_the_command(tmp_path, capsys):
    write_zoo(tmp_path / "zoo")
    assert run_pack(tmp_path / "zoo", tmp_path / "zoo.safetensors", "--quiet") == 0
    assert "20 CNNs, 2 architectures; 8 train, 2 val, 10 test" in capsys.readouterr().out
    dataset = open_packed(tmp_path / "zoo.safetensors")
    assert dataset.layout == (1, 2, 3, 4) and dataset.metadata["symmetry"] == "hetero" and dataset.edge_dim == 9
    graph, labels = dataset.batch([0, 3])
    assert torch.equal(labels, dataset.labels[[0, 3]])
    of_node = graph.plan.index("node_graph")
    assert torch.equal(graph.sign_mask, of_node == 1)  # network 3 has tanh
    relu = ["--activation", "relu", "--metadata", "note=x"]
    run_pack(tmp_path / "zoo", tmp_path / "relu.npz", *relu)
    dataset = open_packed(tmp_path / "relu.npz")
    assert dataset.metadata["symmetry"] == "scale" and dataset.metadata["note"] == "x" and len(dataset) == 10
    assert dataset.batch([0])[0].sign_mask is None


def test_park_keeps_every_network(park):
    assert len(park) == 12 and park.layout is None and park.ends == (3, 4)
    assert park.hidden_layers == 3 and park.kernel_size == (5, 5)
    assert [len(park.split(name)) for name in ("train", "val", "test")] == [8, 2, 2]
    assert torch.equal(park.labels, torch.arange(12).float() / 100) and park.extra("step").tolist() == [10] * 12
    for k in range(12):
        channels, kernels, _, _ = PARK[k % 3]
        state = state_of(channels, kernels, k)
        layers = park.layers(k)
        assert all(torch.equal(w, state[f"{i}.weight"]) for i, (w, _) in enumerate(layers))
        assert all(torch.equal(b, state[f"{i}.bias"]) for i, (_, b) in enumerate(layers))
    park.validate()


@pytest.mark.parametrize("options", [{}, {"kernel_size": (7, 7), "linear_as_conv": False}])
def test_park_batches_are_those_of_from_cnns(park, options):
    chosen = [2, 0, 1, 5]
    graph, labels = park.as_read(**options).batch(chosen)
    states = [state_of(*PARK[k % 3][:2], k) for k in chosen]
    activations, residuals = ([PARK[k % 3][part] for k in chosen] for part in (2, 3))
    options = {"kernel_size": (5, 5), **options}
    expected = from_cnns(states, activations=activations, residual_connections=residuals, **options)
    assert torch.equal(graph.edge_features, expected.edge_features)
    assert torch.equal(graph.node_features, expected.node_features)
    assert graph.architectures == expected.architectures and torch.equal(labels, park.labels[chosen])


def test_park_survives_pickling_and_mmap_indices(park):
    again = pickle.loads(pickle.dumps(park.as_read(kernel_size=(7, 7))))
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[3, 4]] = True
    for indices in ([3, 4], slice(3, 5), mask):
        assert torch.equal(
            again.batch(indices)[0].edge_features, park.as_read(kernel_size=(7, 7)).batch([3, 4])[0].edge_features
        )
    with pytest.raises(IndexError, match="index 12 is out of range for 12 networks"):
        park.batch([12])


def test_the_same_networks_give_the_same_bytes(tmp_path, park):
    write_cnns(tmp_path / "b.safetensors", read_cnn_park(tmp_path / "park", tmp_path / "park" / "splits.json"))
    assert (tmp_path / "b.safetensors").read_bytes() == park.path.read_bytes()


def test_configuration_objects_in_a_checkpoint(tmp_path, monkeypatch):
    """As a configuration library pickles them: containers of nodes, found without that library."""
    modules = {
        name: types.ModuleType(name)
        for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.listconfig", "omegaconf.nodes")
    }
    kinds = {}
    for module, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode")):
        kinds[name] = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, kinds[name])
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)

        def made(value):
            kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
            result = kinds[kind]()
            if kind == "AnyNode":
                result.__dict__.update(_val=value, _parent=None)
            else:
                items = {k: made(v) for k, v in value.items()} if kind == "DictConfig" else [made(v) for v in value]
                result.__dict__.update(_content=items, _metadata=None)
            return result

        splits = write_park(tmp_path / "park", count=6, config=lambda **values: made(values))
    found = read_cnn_park(tmp_path / "park", splits)
    assert found.activations[2] == PARK[2][2] and found.residuals[2] == [-1, -1, 0]


def test_park_through_the_command(tmp_path, capsys):
    splits = write_park(tmp_path / "park")
    assert run_pack(tmp_path / "park", tmp_path / "p.safetensors", "--splits", splits, "--quiet") == 0
    assert "12 CNNs, 3 architectures; 8 train, 2 val, 2 test" in capsys.readouterr().out


# Published models made small; ``model.`` before each key.
SMALL_MODELS = {
    "pna": {"d_hid": 16, "gnn_backbone.num_layers": 2},
    "rtransformer": {"d_node": 16, "d_edge": 4, "d_attn_hid": 16, "d_node_hid": 16, "d_edge_hid": 8, "d_out_hid": 16,
                     "n_heads": 2, "n_layers": 2, "dropout": 0.0},
}  # fmt: skip


def mean_bias(values):
    return float(1 / (1 + np.exp(-values.mean())))


@pytest.mark.parametrize("kind", SMALL_MODELS)
@pytest.mark.parametrize("source", ["zoo", "park"])
def test_from_a_zoo_to_an_evaluated_checkpoint(source, kind, tmp_path, capsys):
    """At the command line: pack, train a model of varying architectures, evaluate. Accuracy is a function of the last
    biases, so that it can be learnt."""
    folder, data, out = tmp_path / source, tmp_path / "packed.safetensors", tmp_path / "out"
    if source == "zoo":
        # Of the variables, those of the dense layer's biases.
        place = slice(-16, -12)
        write_zoo(folder, networks=60, steps=(86,), accuracies=lambda w: [mean_bias(row[place]) for row in w])
        arguments = []
    else:
        arguments = ["--splits", write_park(folder, count=36, score=lambda s: mean_bias([*s.values()][-1].numpy()))]
    run_command("pack", folder, data, "--quiet", *arguments)
    changes = {**SMALL_MODELS[kind], "num_classes": 4, "graph_constructor.inp_factor": 0.3,
               "graph_constructor.sin_emb_dim": 8, **({"gnn_backbone.deg": None} if kind == "pna" else {})}  # fmt: skip
    overrides = [a for key, value in changes.items() for a in ("--set", f"model.{key}={json.dumps(value)}")]
    overrides += ["--set", "optimization.optimizer_args.lr=1e-2", "--epochs", "20", "--batch-size", "8"]
    run_command(
        "train", f"cnn_{source}/{kind}", "--data", data, "--out", out, *overrides, "--no-progress", "--no-plots"
    )
    result = json.loads((out / "metrics.json").read_text())
    errors = [row["train"]["mse"] for row in result["epochs"]]
    assert min(errors) < 0.8 * errors[0], errors
    run_command("eval", out / "best.pt", "--data", data, "--json", tmp_path / "e.json")
    assert "Kendall's tau" in capsys.readouterr().out
    again = json.loads((tmp_path / "e.json").read_text())
    assert {name: again[name] for name in result["test"]} == result["test"]


def test_statistics_are_per_layer_over_kernels_without_padding(park):
    found = LayerStatistics.from_dataset(park)
    train = [park.layers(k) for k in park.split("train").tolist()]
    for layer in range(4):
        for part, mean, std in ((0, found.weight_mean, found.weight_std), (1, found.bias_mean, found.bias_std)):
            values = torch.cat([layers[layer][part].flatten().double() for layers in train if len(layers) > layer])
            assert mean[layer].item() == pytest.approx(values.mean().item(), abs=1e-6)
            assert std[layer].item() == pytest.approx(values.std(correction=0).item(), rel=1e-6)
    only_short = LayerStatistics.from_dataset(park, [1, 4])
    assert only_short.weight_mean[3].item() == 0 and only_short.weight_std[3].item() == 1
    graph, _ = park.batch([1], found)
    weights = (park.layers(1)[0][0] - found.weight_mean[0].item()) / found.weight_std[0].item()
    assert torch.allclose(graph.to_weights()[0][0][0].reshape(3, 4, 5, 5)[:, :, 1:4, 1:4], weights.transpose(0, 1))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    splits = write_park(tmp_path / "park", count=6)
    path = tmp_path / "park" / "zoo/trial_0/checkpoint_000010/checkpoint.pt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"model": {}, "config": Evil()}, path)
    with pytest.raises(ValueError, match="trial_0.*not a checkpoint of tensors and plain values"):
        read_cnn_park(tmp_path / "park", splits)
    assert not (tmp_path / "written").exists()


def park_with(tmp_path, change):
    splits = write_park(tmp_path / "park", count=6)
    path = tmp_path / "park" / "zoo/trial_0/checkpoint_000010/checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return read_cnn_park(tmp_path / "park", splits)


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("model"), "expected a dict with a state dict under 'model'"),
    (lambda c: c.pop("config"), "expected the architecture as a mapping under 'config', got NoneType"),
    (lambda c: c["config"].pop("residual"), r"config.residual must have one int for each of 2 hidden layers, got None"),
    (lambda c: c["config"]["activation"].pop(), r"config.activation must have one str for each of 2 hidden layers"),
    (lambda c: c["model"].pop("0.bias"), "0.weight must be a tensor with a bias beside it"),
    (lambda c: c["model"].update({"0.bias": torch.zeros(7)}), r"shapes \[2, 3, 3, 3\] and \[7\]"),
    (lambda c: c["model"].update({"1.weight": torch.zeros(5, 3, 3, 3)}), r"layer 1 has a weight \[5, 3, 3, 3\] after"),
    (lambda c: c["model"].update({"running": torch.zeros(3)}), "expected weights and their biases alone"),
])  # fmt: skip
def test_bad_checkpoints_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"trial_0.*{message}"):
        park_with(tmp_path, change)


@pytest.mark.parametrize(("splits", "message"), [
    ("{", "truncated, or not a JSON file"),
    ('{"dev": {"path": [], "score": []}}', "expected an object with train, val, test, got 'dev'"),
    ('{"train": {"path": ["a"], "score": []}}', "split 'train' has 1 paths; 'score' must be as many numbers"),
    ('{"train": {"score": []}}', "split 'train' must have a list of paths"),
    ('{"train": {"path": [], "score": []}}', "it lists no networks"),
])  # fmt: skip
def test_bad_park_splits_are_named(tmp_path, splits, message):
    (tmp_path / "splits.json").write_text(splits)
    with pytest.raises(ValueError, match=f"splits.json: {message}"):
        read_cnn_park(tmp_path, tmp_path / "splits.json")


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("layout.csv", "shape,size", "form,size", "layout.csv: no column 'shape'; it has varname"),
    ("layout.csv", "dense/kernel:0", "dense/gamma:0", "gamma:0' of shape .* is neither a kernel:0"),
    ("layout.csv", '"(3, 4)"', '"(3, 5)"', r"kernel:0' of shape \(3, 5\) does not fit numbers"),
    ("layout.csv", '"(3, 4)"', "x()", "no start_idx, end_idx and shape"),
    ("metrics.csv.gz", "0.001", "good", "'test_accuracy' holds something else than numbers"),
    ("metrics.csv.gz", "m0,0,0.0,relu\n", "", r"must hold floats \[39, numbers\], a row per row of metrics.csv.gz"),
])  # fmt: skip
def test_bad_zoos_are_named(tmp_path, file, old, new, message):
    write_zoo(tmp_path / "zoo")
    path = tmp_path / "zoo" / file
    opened = gzip.open if file.endswith("gz") else open
    with opened(path, "rt") as handle:
        text = handle.read()
    assert old in text
    with opened(path, "wt") as handle:
        handle.write(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_cnn_zoo(tmp_path / "zoo")


def test_zoo_arguments_and_files_are_named(tmp_path):
    rows = write_zoo(tmp_path / "zoo")
    with pytest.raises(ValueError, match=r"step must be one of those in .* \(0, 86\), got 7"):
        read_cnn_zoo(tmp_path / "zoo", step=7)
    with pytest.raises(ValueError, match=r"activation must be one of those in .* \(relu, tanh\), got 'gelu'"):
        read_cnn_zoo(tmp_path / "zoo", activation="gelu")
    (tmp_path / "order.csv").write_text("0\n0\n")
    with pytest.raises(ValueError, match="order.csv: expected every row number from 0 to 39 once, got 2"):
        read_cnn_zoo(tmp_path / "zoo", order=tmp_path / "order.csv")
    with pytest.raises(ValueError, match="--order belongs to the folder of a small CNN zoo"):
        run_pack(tmp_path, tmp_path / "out", "--order", tmp_path / "order.csv")
    rows[3, 5] = np.nan
    np.save(tmp_path / "zoo" / "weights.npy", rows)
    with pytest.raises(ValueError, match="weights.npy: row 3 holds NaN or Inf"):
        read_cnn_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "metrics.csv.gz").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="metrics.csv.gz: truncated, or not a table"):
        read_cnn_zoo(tmp_path / "zoo")
    (tmp_path / "zoo" / "layout.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no file at .*layout.csv"):
        read_cnn_zoo(tmp_path / "zoo")


def one_network(**changes):
    layers = [(torch.zeros(2, 1, 3, 3), torch.zeros(2)), (torch.zeros(4, 2), torch.zeros(4))]
    values = {"networks": [layers], "activations": [["relu"]], "residuals": [None], "labels": torch.zeros(1),
              "splits": np.zeros(1, np.uint8)}  # fmt: skip
    return CnnSet(**{**values, **changes})


@pytest.mark.parametrize(("changes", "message"), [
    ({"networks": []}, "no networks"),
    ({"labels": torch.zeros(2)}, "labels: expected 1 entries, one per network, got 2"),
    ({"labels": torch.tensor([float("nan")])}, "network 0 has a label that is not finite"),
    ({"splits": np.array([3], np.uint8)}, "splits: split must be 0"),
    ({"activations": [["relu", "relu"]]}, "network 0: activations must have one entry per hidden layer, 1, got 2"),
    ({"residuals": [[]]}, "network 0: residuals must have one entry per hidden layer, 1, got 0"),
    ({"networks": [[(torch.zeros(2, 1, 3, 3), torch.zeros(3))]]}, "network 0, layer 0: expected a weight"),
    ({"networks": [[(torch.full((2, 1), float("inf")), torch.zeros(2)), (torch.zeros(4, 2), torch.zeros(4))]]},
     "network 0 holds Inf in the weight of layer 0"),
])  # fmt: skip
def test_nothing_bad_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_cnns(tmp_path / "out.safetensors", one_network(**changes))
    assert not list(tmp_path.iterdir())


def test_foreign_and_damaged_files(tmp_path, park):
    write_packed(tmp_path / "plain.npz", [torch.zeros(1, 2, 3)], [torch.zeros(1, 3)], [0], [0], {})
    assert isinstance(open_packed(tmp_path / "plain.npz"), PackedDataset)
    with pytest.raises(ValueError, match="expected format 'scalegmn_fast.packed_cnns' 1"):
        PackedCnns(tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="its format is 'scalegmn_fast.packed_cnns'"):
        PackedDataset(park.path)
    park.path.write_bytes(park.path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated"):
        open_packed(park.path)
    with pytest.raises(FileNotFoundError, match="no packed dataset at"):
        open_packed(tmp_path / "none")
