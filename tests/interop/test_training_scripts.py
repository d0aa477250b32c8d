"""Training scripts with `accelerate` as their one new line: they log what they log without it.

The originals' own scripts run where the fixtures find checkouts; a script in their manner runs everywhere.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scalegmn_fast.models import published_config
from scalegmn_fast.testing import random_network

HERE = Path(__file__).resolve().parent
LINE = "import scalegmn_fast; scalegmn_fast.accelerate({}, check=True)"
NETWORKS = 48
#: Relative, by what an entry's name holds; the rest (accuracies, ranks) jumps where two numbers change places.
TOLERANCES = {"loss": 1e-4, "Loss": 1e-4, "MSE": 1e-4, "grad_norm": 1e-2}


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.fail(f"the original needs {', '.join(missing)} beside its checkout")


def run(folder, script, after, line, *arguments, root=None):
    """(what a script logged, what it printed); it runs in ``folder``."""
    (folder / "logged.jsonl").unlink(missing_ok=True)
    command = [sys.executable, HERE / "run_script.py", script, after, line, *arguments]
    search = [
        *([root] if root else []),
        HERE,
        HERE.parents[1],
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        json.loads(entry) for entry in (folder / "logged.jsonl").read_text().splitlines()
    ], done.stdout + done.stderr


def assert_logs_the_same(folder, script, after, name, *arguments, least=20, **options):
    expected, _ = run(folder, script, after, "", *arguments, **options)
    found, said = run(folder, script, after, LINE.format(name), *arguments, **options)
    assert "checked against its original: outputs differ by" in said, said[-3000:]
    assert "runs unchanged" not in said
    assert len(found) == len(expected) >= least
    assert len({log["grad_norm"] for log in expected if "grad_norm" in log}) > 1
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            tolerance = next((bound for part, bound in TOLERANCES.items() if part in key), None)
            assert tolerance is None or ours[key] == pytest.approx(value, rel=tolerance, abs=1e-6), (step, key)


def test_a_script_in_their_manner(tmp_path):
    needs("torch_geometric")
    script = HERE / "training_script.py"
    assert_logs_the_same(tmp_path, script, "net = net.to(device)", "net", "20", least=22)


def fitted_networks(folder, dataset):
    """State dicts of random INRs at the places where the originals keep theirs, and the splits."""
    splits = {split: {"path": [], "label": []} for split in ("train", "val", "test")}
    for index in range(NETWORKS):
        weights, biases = random_network([2, 32, 32, 1], 1, generator=torch.Generator().manual_seed(index))
        path = folder / dataset / f"mnist_png_training_{index % 10}_{index}/checkpoints/model_final.pth"
        path.parent.mkdir(parents=True)
        state = {}
        for layer, (w, b, scale) in enumerate(zip(weights, biases, (0.06, 0.018, 0.1), strict=True)):
            state |= {f"seq.{layer}.weight": scale * w[0, ..., 0].T.float(), f"seq.{layer}.bias": scale * b[0, :, 0]}
        torch.save({key: value.float().contiguous() for key, value in state.items()}, path)
        split = splits["train" if index < 40 else "val" if index < 44 else "test"]
        split["path"].append(str(path.relative_to(folder)))
        split["label"].append(str(index % 10))
    return splits


#: What the command line of ScaleGMN's scripts is given: a small width, no dropout, no processes that read, and a
#: schedule that today's PyTorch knows (theirs passes an argument that is gone).
SCALEGMN_ARGUMENTS = {
    "--batch_size": 2, "--num_workers": 0, "--wandb": "true", "--gpu-ids": -1, "--scalegmn_args.d_hid": 16,
    "--scalegmn_args.gnn_args.dropout": 0.0, "--train_args.num_epochs": 1,
    "--optimization.scheduler_args.scheduler": "StepLR", "--optimization.scheduler_args.decay_steps": 5,
    "--optimization.scheduler_args.decay_rate": 0.9,
}  # fmt: skip


def scalegmn_arguments(root, name, **changes):
    given = {"--conf": root / f"configs/{name}.yml", **SCALEGMN_ARGUMENTS, **changes}
    return [str(part) for pair in given.items() for part in pair]


@pytest.mark.parametrize("name", ["mnist_cls/scalegmn", "mnist_cls/scalegmn_bidir"])
def test_scalegmns_inr_classification(name, scalegmn_root, tmp_path):
    splits = fitted_networks(tmp_path, "data/mnist-inrs")
    (tmp_path / "data/mnist-inrs/mnist_splits.json").write_text(json.dumps(splits))
    script = scalegmn_root / "inr_classification.py"
    arguments = scalegmn_arguments(scalegmn_root, name)
    assert_logs_the_same(tmp_path, script, "net = net.to(device)", "net", *arguments, root=scalegmn_root)


@pytest.mark.parametrize("name", ["mnist_editing/scalegmn", "mnist_editing/scalegmn_bidir"])
def test_scalegmns_inr_editing(name, scalegmn_root, tmp_path):
    needs("einops", "rff")
    splits = fitted_networks(tmp_path, "data/mnist-inrs")
    (tmp_path / "data/mnist-inrs/mnist_splits.json").write_text(json.dumps(splits))
    script = scalegmn_root / "inr_editing.py"
    changes = {"--optimization.optimizer_args.lr": 1e-4}
    arguments = scalegmn_arguments(scalegmn_root, name, **changes)
    assert_logs_the_same(tmp_path, script, "net = net.to(device)", "net", *arguments, root=scalegmn_root)


@pytest.mark.parametrize("name", ["cifar10/scalegmn_relu", "cifar10/scalegmn_hetero_bidir"])
def test_scalegmns_predicting_generalization(name, scalegmn_root, tmp_path):
    needs("pandas", "scipy", "sklearn")
    zoo(tmp_path / "data/cifar10", published_config(name)["data"]["layer_layout"])
    script = scalegmn_root / "predicting_generalization.py"
    arguments = scalegmn_arguments(scalegmn_root, name)
    assert_logs_the_same(tmp_path, script, "net = net.to(device)", "net", *arguments, root=scalegmn_root)


def zoo(folder, layout, count=120):
    """The files of a CNN zoo: weights as rows, where each layer's begin, and what is known of each network."""
    import pandas

    folder.mkdir(parents=True)
    rows, start = [], 0
    for layer, (n_in, n_out) in enumerate(zip(layout[:-1], layout[1:], strict=True)):
        kernel = (n_in, n_out) if layer == len(layout) - 2 else (3, 3, n_in, n_out)
        for name, shape in (("bias:0", (n_out,)), ("kernel:0", kernel)):
            end = start + int(np.prod(shape))
            rows.append({"varname": f"layer_{layer}/{name}", "start_idx": start, "end_idx": end, "shape": str(shape)})
            start = end
    random = np.random.default_rng(0)
    np.save(folder / "weights.npy", random.normal(0, 0.3, (count, start)).astype(np.float32))
    pandas.DataFrame(rows).to_csv(folder / "layout.csv")
    activations = np.where(np.arange(count) % 10 == 0, "tanh", "relu")
    known = {"step": 86, "config.activation": activations, "test_accuracy": random.uniform(0.1, 0.6, count)}
    pandas.DataFrame(known).to_csv(folder / "metrics.csv.gz", compression="gzip")
    pandas.DataFrame(np.arange(count)).to_csv(folder / "cifar10_split.csv", header=False, index=False)


#: One process, and no schedule: theirs, too, passes an argument that is gone.
NEURAL_GRAPHS_ARGUMENTS = [
    "distributed=null", "num_workers=0", "batch_size=2", "n_epochs=1", "eval_every=15", "hydra.run.dir=.", "~scheduler",
]  # fmt: skip


def assert_neural_graphs_logs_the_same(experiment, root, folder, *arguments):
    needs("hydra", "einops", "rff")
    splits = fitted_networks(folder, "dataset")
    (folder / "dataset/mnist_splits.json").write_text(json.dumps(splits).replace("dataset/", ""))
    script = root / f"experiments/{experiment}/main.py"
    after = "model = hydra.utils.instantiate(cfg.model"
    assert_logs_the_same(folder, script, after, "model", *arguments, *NEURAL_GRAPHS_ARGUMENTS, root=root)


@pytest.mark.parametrize("model", ["pna", "rtransformer"])
def test_neural_graphs_inr_classification(model, neural_graphs_root, tmp_path):
    """Without augmentation, whose random numbers follow those of the model: its dropout of rate 0 draws some."""
    arguments = [f"model={model}", "optim.lr=1e-4", "data.train.augmentation=False"]
    assert_neural_graphs_logs_the_same("inr_classification", neural_graphs_root, tmp_path, *arguments)


@pytest.mark.parametrize("model", ["pna", "rtransformer"])
def test_neural_graphs_style_editing(model, neural_graphs_root, tmp_path):
    arguments = [f"model={model}", "out_of_domain_data=mnist", "optim.lr=1e-5"]
    assert_neural_graphs_logs_the_same("style_editing", neural_graphs_root, tmp_path, *arguments)
