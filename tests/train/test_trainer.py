"""The trainer: learning, exact resume after SIGKILL and Ctrl-C, early stopping, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from train_tiny import tiny_config, write_tiny

from scalegmn_fast.train import (
    NonFiniteLossError,
    Trainer,
    build_model,
    load_checkpoint,
    seed_everything,
    validate_config,
)

OPTIONS = {"make_plots": False, "checkpoint_seconds": None}


def trainer(dataset, out, *, regression=False, **options):
    changes = options.pop("changes", {})
    if regression:
        changes = {"train_args__loss": "MSE", "scalegmn_args__readout_args__d_out": 1, **changes}
    return Trainer.from_config(tiny_config(**changes), dataset, out, **{**OPTIONS, **options})


def curve(out):
    """Everything a run computed: the rows of all epochs, best and test metrics, and the final weights."""
    result = json.loads((Path(out) / "metrics.json").read_text())
    state = load_checkpoint(Path(out) / "last.pt")
    return [result[k] for k in ("epochs", "best", "test", "steps", "stopped")], state["model"], state["optimizer"]


def assert_same_run(a, b):
    (rows_a, model_a, optimizer_a), (rows_b, model_b, optimizer_b) = curve(a), curve(b)
    assert rows_a == rows_b
    assert all(torch.equal(model_a[k], model_b[k]) for k in model_a) and model_a.keys() == model_b.keys()
    for key, moments in optimizer_a["state"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer_b["state"][key][name]))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer(write_tiny(directory / "tiny.safetensors"), directory / "out").fit()
    torch.set_num_threads(threads)
    return directory / "out"


@pytest.fixture
def whole(uninterrupted, tmp_path):
    """The directory of an uninterrupted run, a copy for each test."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "whole"))


def test_it_learns_and_writes_what_it_says(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "out", changes={"train_args__num_epochs": 12}, make_plots=True)
    result = run.fit()
    assert result["epochs"][-1]["train"]["loss"] < 0.8 * result["epochs"][0]["train"]["loss"]
    assert sorted(os.listdir(run.out)) == ["best.pt", "confusion.png", "curves.png", "last.pt", "metrics.json"]
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(result))
    assert saved["stopped"] == "max_epochs" and len(saved["epochs"]) == 12 and saved["steps"] == 60
    assert saved["test"]["count"] == 16 and saved["seed"] == 3 and saved["threads"] == 1
    assert saved["step_seconds_median"] > 0 and saved["wall_seconds"] > 0
    assert saved["versions"]["torch"] == torch.__version__ and saved["config"]["batch_size"] == 8
    for name in ("curves.png", "confusion.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    best = max(saved["epochs"], key=lambda r: (r["val"]["accuracy"], -r["val"]["loss"]))
    assert saved["best"]["epoch"] == best["epoch"]


def test_the_test_metrics_are_those_of_the_best_epoch(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "out", changes={"train_args__num_epochs": 4})
    result = run.fit()
    run.model.load_state_dict(load_checkpoint(tmp_path / "out" / "best.pt")["model"])
    assert run.evaluate("test") == result["test"] and run.evaluate("val") == result["best"]["val"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(dataset, tmp_path, whole):
    trainer(dataset, tmp_path / "again").fit()
    assert_same_run(whole, tmp_path / "again")
    trainer(dataset, tmp_path / "other", changes={"train_args__seed": 4}).fit()
    assert curve(tmp_path / "other")[0] != curve(whole)[0]


def test_every_epoch_visits_every_network_once_in_its_own_order(dataset, tmp_path):
    run = trainer(dataset, tmp_path / "out")
    orders = [run.permutation(k).tolist() for k in range(3)]
    assert all(sorted(o) == dataset.split("train").tolist() for o in orders)
    assert orders[0] != orders[1] != orders[2] and orders[1] == run.permutation(1).tolist()


def test_the_warm_up_is_the_rate_of_each_step(dataset, tmp_path):
    seen = []
    trainer(dataset, tmp_path / "out", on_step=lambda t: seen.append(t.learning_rate)).fit()
    assert seen[:8] == pytest.approx([0.01 * min(1, (s + 2) / 7) for s in range(8)])  # the rate of the step to come


KILLED = """
    import os, signal, sys
    import torch
    sys.path.insert(0, {here!r})
    torch.set_num_threads(1)
    from test_trainer import trainer
    from scalegmn_fast.data import PackedDataset

    def kill(t):
        if t.total_steps == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer(PackedDataset({data!r}), {out!r}, checkpoint_steps=3, on_step=kill).fit()
"""


@pytest.mark.parametrize("step", [1, 8])
def test_a_killed_run_continues_bit_for_bit(dataset, tmp_path, whole, step):
    out = tmp_path / "killed"
    code = KILLED.format(here=str(Path(__file__).parent), step=step, data=str(dataset.path), out=str(out))
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    state = load_checkpoint(out / "last.pt")  # 5 steps an epoch: step 6 is inside the second one
    assert (state["epoch"], state["step"]) == ((0, 0) if step == 1 else (1, 1))
    result = trainer(dataset, out, resume=True, checkpoint_steps=3).fit()
    assert result["stopped"] == "max_epochs"
    assert_same_run(whole, out)


@pytest.mark.parametrize("step", [2, 5, 8, 15])
def test_ctrl_c_saves_the_step_and_continues_bit_for_bit(dataset, tmp_path, whole, step):
    def interrupt(t):
        if t.total_steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    out = tmp_path / "interrupted"
    handler = signal.getsignal(signal.SIGINT)
    result = trainer(dataset, out, on_step=interrupt, make_plots=True).fit()
    assert result["stopped"] == "interrupted" and signal.getsignal(signal.SIGINT) is handler
    state = load_checkpoint(out / "last.pt")
    assert state["total_steps"] == step and len(result["epochs"]) == (step - 1) // 5
    assert (out / "curves.png").exists() == (step > 5)
    trainer(dataset, out, resume=True).fit()
    assert_same_run(whole, out)


def test_a_second_ctrl_c_ends_at_once(dataset, tmp_path):
    def interrupt(t):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(dataset, tmp_path / "out", on_step=interrupt).fit()
    assert load_checkpoint(tmp_path / "out" / "last.pt")["total_steps"] == 0


def test_a_finished_run_can_be_extended(dataset, tmp_path, whole):
    out = tmp_path / "out"
    trainer(dataset, out, changes={"train_args__num_epochs": 2}).fit()
    trainer(dataset, out, resume=True).fit()
    assert_same_run(whole, out)


def test_resume_of_a_finished_run_changes_nothing(dataset, tmp_path, whole):
    before = curve(whole)
    trainer(dataset, whole, resume=True).fit()
    after = curve(whole)
    assert before[0] == after[0] and all(torch.equal(before[1][k], after[1][k]) for k in before[1])


def test_resume_starts_in_an_empty_directory(dataset, tmp_path, whole):
    trainer(dataset, tmp_path / "fresh", resume=True).fit()
    assert_same_run(whole, tmp_path / "fresh")


def test_max_steps_ends_inside_an_epoch(dataset, tmp_path):
    changes = {"train_args__max_steps": 7}
    result = trainer(dataset, tmp_path / "out", changes=changes).fit()
    assert result["stopped"] == "max_steps" and [r["steps"] for r in result["epochs"]] == [5, 7]
    again = trainer(dataset, tmp_path / "out", changes=changes, resume=True).fit()
    assert again["epochs"] == result["epochs"]


def test_early_stopping_counts_epochs_without_a_better_result(dataset, tmp_path):
    changes = {"train_args__patience": 2, "optimization__optimizer_args": {"lr": 0.0}, "train_args__num_epochs": 9}
    result = trainer(dataset, tmp_path / "out", changes=changes).fit()
    assert result["stopped"] == "patience" and len(result["epochs"]) == 3 and result["best"]["epoch"] == 1


def test_plateau_is_stepped_by_validation(dataset, tmp_path):
    scheduler = {"scheduler": "ReduceLROnPlateau", "scheduler_mode": "max", "decay_rate": 0.5, "patience": 0}
    changes = {"optimization__scheduler_args": scheduler, "optimization__optimizer_args": {"lr": 1e-6}}
    result = trainer(dataset, tmp_path / "out", changes=changes).fit()
    assert [r["lr"] for r in result["epochs"]] == [1e-6, 5e-7, 2.5e-7]


def test_clipping_bounds_the_gradient(dataset, tmp_path):
    norms = []

    def record(t):
        norms.append(torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None]).norm().item())

    trainer(dataset, tmp_path / "a", changes={"optimization__clip_grad_max_norm": 1e-3}, on_step=record).fit()
    assert max(norms) <= 1.001e-3
    norms.clear()
    trainer(dataset, tmp_path / "b", changes={"optimization__clip_grad": False}, on_step=record).fit()
    assert min(norms) > 1e-3


@pytest.mark.parametrize("loss", ["MSE", "BCE"])
def test_regression(tmp_path, loss):
    dataset = write_tiny(tmp_path / "r.safetensors", regression=True)
    changes = {"train_args__loss": loss, "train_args__num_epochs": 5}
    run = trainer(dataset, tmp_path / "out", regression=True, changes=changes, make_plots=True)
    result = run.fit()
    assert result["task"] == "regression" and result["test"]["tau"] > 0.2
    assert {"mse", "r2", "tau"} <= set(result["test"])
    assert (tmp_path / "out" / "predictions.png").read_bytes().startswith(b"\x89PNG")


def test_normalisation_statistics_are_those_of_the_training_split(dataset, tmp_path):
    assert trainer(dataset, tmp_path / "a").statistics is None
    run = trainer(dataset, tmp_path / "b", changes={"scalegmn_args__symmetry": "permutation"})
    assert run.statistics is not None  # the default of a permutation model
    sign = trainer(dataset, tmp_path / "c", changes={"data__normalize": True}).statistics
    assert all((mean == 0).all() for mean in (*sign.weight_mean, *sign.bias_mean))  # keeps the sign symmetry
    weights, biases = run.statistics.normalize(*dataset.weights(dataset.split("train")))
    for block in (*weights, *biases):
        assert block.mean().abs() < 1e-5 and abs(block.std().item() - 1) < 0.02
    run.fit()
    saved = load_checkpoint(tmp_path / "b" / "last.pt")["statistics"]
    assert saved.keys() == run.statistics.state_dict().keys()


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(dataset, tmp_path):
    def poison(t):
        if t.total_steps == 7:
            with torch.no_grad():
                next(t.model.parameters()).fill_(float("nan"))

    with pytest.raises(NonFiniteLossError, match="loss is not finite in epoch 2"):
        trainer(dataset, tmp_path / "out", on_step=poison).fit()
    state = load_checkpoint(tmp_path / "out" / "last.pt")
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_global_switches_are_put_back(dataset, tmp_path):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    inside = []
    trainer(
        dataset, tmp_path / "out", on_step=lambda t: inside.append(torch.are_deterministic_algorithms_enabled())
    ).fit()
    assert all(inside) and before == (
        torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
    )  # fmt: skip


def test_tensorboard_events(dataset, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = trainer(dataset, tmp_path / "out", tensorboard=True).fit()
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/step_loss")) == 15
    assert [e.value for e in events.Scalars("val/accuracy")] == [r["val"]["accuracy"] for r in result["epochs"]]


def test_wandb_gets_the_arguments_of_the_configuration(dataset, tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finish")

    class Module:
        @staticmethod
        def init(**arguments):
            calls.append(arguments)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Module)
    changes = {"wandb_args": {"project": "p", "entity": None}, "train_args__num_epochs": 1}
    trainer(dataset, tmp_path / "out", changes=changes, wandb=True).fit()
    assert calls[0]["project"] == "p" and "entity" not in calls[0] and calls[0]["config"]["batch_size"] == 8
    assert calls[-1] == "finish" and any("val/accuracy" in c[1] for c in calls[1:-1])
    trainer(dataset, tmp_path / "out", changes={**changes, "train_args__num_epochs": 2}, wandb=True, resume=True).fit()
    assert next(c for c in calls[1:] if isinstance(c, dict))["id"] == "abc"


# Refusals


def test_a_directory_with_something_in_it_is_refused(dataset, tmp_path, whole):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(FileExistsError, match="is not empty; continue with resume or replace it with overwrite"):
        trainer(dataset, whole)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        trainer(dataset, tmp_path / "file")
    with pytest.raises(ValueError, match="exclude each other"):
        trainer(dataset, whole, resume=True, overwrite=True)


def test_overwrite_removes_a_run_and_nothing_else(dataset, tmp_path, whole):
    (whole / "notes.txt").write_text("mine")
    run = trainer(dataset, whole, overwrite=True)
    assert sorted(os.listdir(whole)) == ["last.pt", "notes.txt"] and run.total_steps == 0


def test_resume_without_a_checkpoint(dataset, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="has no last.pt"):
        trainer(dataset, tmp_path / "out", resume=True)
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


def test_resume_from_a_truncated_checkpoint_touches_nothing(dataset, whole):
    content = (whole / "last.pt").read_bytes()
    (whole / "last.pt").write_bytes(content[: len(content) // 2])
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    with pytest.raises(ValueError, match="truncated"):
        trainer(dataset, whole, resume=True)
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == before


def test_resume_with_another_configuration_or_dataset(dataset, tmp_path, whole):
    with pytest.raises(ValueError, match="belongs to another run: batch_size: 8 in the checkpoint, 4 now"):
        trainer(dataset, whole, resume=True, changes={"batch_size": 4})
    other = write_tiny(tmp_path / "other.safetensors", sizes=(41, 16, 16))
    with pytest.raises(ValueError, match="data networks: 72 in the checkpoint, 73 now"):
        trainer(other, whole, resume=True)


def test_resume_with_another_number_of_threads_warns(dataset, whole):
    torch.set_num_threads(2)
    with pytest.warns(UserWarning, match="used 1 threads on cpu, now 2"):
        trainer(dataset, whole, resume=True)


@pytest.mark.parametrize(("sizes", "name"), [((0, 4, 4), "train"), ((4, 0, 4), "val")])
def test_empty_splits(tmp_path, sizes, name):
    dataset = write_tiny(tmp_path / "e.safetensors", sizes=sizes)
    with pytest.raises(ValueError, match=f"split '{name}' is empty"):
        trainer(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_test_split_gives_no_test_metrics(tmp_path):
    run = trainer(write_tiny(tmp_path / "e.safetensors", sizes=(8, 8, 0)), tmp_path / "out")
    assert run.fit()["test"] is None
    with pytest.raises(ValueError, match="split 'test' is empty"):
        run.evaluate("test")
    with pytest.raises(ValueError, match="train, val or test, got 'dev'"):
        run.evaluate("dev")


def test_more_classes_than_outputs(tmp_path):
    dataset = write_tiny(tmp_path / "c.safetensors", classes=5)
    with pytest.raises(ValueError, match="5 classes but the model's output has shape"):
        trainer(dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_parameters_to_train(dataset, tmp_path):
    model = build_model(validate_config(tiny_config()), dataset.layout).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Trainer(model, dataset, tiny_config(), tmp_path / "out", **OPTIONS)


def test_numpy_and_python_generators_are_seeded():
    import random

    seed_everything(5)
    first = torch.rand(1).item(), np.random.rand(), random.random()
    seed_everything(5)
    assert first == (torch.rand(1).item(), np.random.rand(), random.random())
