"""Training by two processes (gloo on the CPU): the single process's curve, resume with another number, failures."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from distributed_worker import BATCH_NORM, OPTIONS, fit, fit_double, fit_editing, fit_neural_graphs, plain
from test_trainer import assert_same_run, curve
from train_tiny import write_tiny

from scalegmn_fast.data import add_targets, write_packed
from scalegmn_fast.train import Trainer, load_checkpoint
from scalegmn_fast.train.distributed import Processes, joined, local_device, started

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def close(a, b, tolerance):
    """Whether two JSON values are equal but for a relative difference of the floats."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, rel=tolerance) if isinstance(a, float) else a == b


def write_editing(dataset, path):
    """The networks with weights small enough for smooth images, and those images dilated."""
    weights, biases = ([0.03 * t for t in layers] for layers in dataset.weights(slice(None)))
    small = path.with_name("small.safetensors")
    write_packed(small, weights, biases, dataset.labels, dataset.splits, dataset.metadata)
    return add_targets(small, path, "dilate", shape=(5, 5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes' runs and the single process's, side by side in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    dataset = write_tiny(folder / "tiny.safetensors")
    uneven = write_tiny(folder / "uneven.safetensors", sizes=(41, 16, 16))
    editing = write_editing(dataset, folder / "editing.safetensors")
    fit(plain(train_args__num_epochs=1), dataset, folder / "one_then_two")
    fit_editing(editing, folder / "one_then_two_editing", epochs=1)
    process = torchrun(HERE / "distributed_worker.py", folder)
    fit(plain(), dataset, folder / "one")
    (folder / "visited.json").write_text(json.dumps(fit_double(uneven, folder / "one_double")))
    fit_neural_graphs(dataset, folder / "one_ng")
    fit_editing(editing, folder / "one_editing")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return folder


def seen(runs, rank):
    return json.loads((runs / f"seen.{rank}.json").read_text())


def assert_close(a, b, tolerance):
    """Curves, metrics, weights."""
    (rows_a, model_a, _), (rows_b, model_b, _) = curve(a), curve(b)
    assert close(rows_a, rows_b, tolerance)
    assert all(torch.allclose(model_a[k], model_b[k], rtol=tolerance, atol=tolerance) for k in model_a)


def test_the_curve_is_that_of_one_process(runs):
    assert_close(runs / "two", runs / "one", 1e-5)


def test_in_float64_with_uneven_parts_it_is_so_much_more_closely(runs):
    assert_close(runs / "two_double", runs / "one_double", 1e-12)


@pytest.mark.parametrize("kind", ["pna", "rtransformer"])
def test_neural_graphs_too(runs, kind):
    assert_close(runs / "two_ng" / kind, runs / "one_ng" / kind, 1e-4)


@pytest.mark.parametrize("run", ["two_editing", "one_then_two_editing"])
def test_editing_too(runs, run):
    """From the first step, and continued by two processes after an epoch of one."""
    assert_close(runs / run, runs / "one_editing", 1e-4)
    losses = [row["train"]["loss"] for row in json.loads((runs / run / "metrics.json").read_text())["epochs"]]
    assert len(losses) == 2 and losses[1] != losses[0]


def test_the_processes_share_the_order_of_one(runs):
    whole = json.loads((runs / "visited.json").read_text())
    first, second = (seen(runs, rank)["visited"] for rank in (0, 1))
    assert len(whole) == len(first) == len(second) == 27 and [len(part) for part in whole[:9]] == [5] * 8 + [1]
    for batch, a, b in zip(whole, first, second, strict=True):
        assert a + b == batch if len(batch) > 1 else a == b == batch  # the second's of one counts nothing


def test_evaluation_in_parts_gives_the_numbers_of_one_process(runs):
    run = Trainer.from_config(plain(), write_tiny(runs / "again.safetensors"), runs / "evaluated", **OPTIONS)
    run.model.load_state_dict(load_checkpoint(runs / "two" / "best.pt")["model"])
    result = json.loads((runs / "two" / "metrics.json").read_text())
    assert run.evaluate("val") == result["best"]["val"] and run.evaluate("test") == result["test"]


def test_running_statistics_are_those_of_the_checkpoint(runs):
    """Each process has its own part's after the last step; validation and checkpoint take the first's."""
    state = load_checkpoint(runs / "batch_norm" / "last.pt")
    config, dataset = plain(**BATCH_NORM), write_tiny(runs / "fourth.safetensors")
    run = Trainer.from_config(config, dataset, runs / "batch_norm_evaluated", **OPTIONS)
    run.model.load_state_dict(state["model"])
    assert {"loss": state["rows"][0]["val"]["loss"]}.items() <= run.evaluate("val").items()


def test_one_log_and_one_checkpoint(runs):
    assert sorted(os.listdir(runs / "two")) == ["best.pt", "last.pt", "metrics.json"]
    assert json.loads((runs / "two" / "metrics.json").read_text())["processes"] == 2
    keys = [load_checkpoint(runs / name / "last.pt")["model"].keys() for name in ("one", "two")]
    assert keys[0] == keys[1]


def test_two_processes_continue_the_run_of_one(runs):
    assert_close(runs / "one_then_two", runs / "one", 1e-5)
    assert any("processes: 1, now 2" in text for text in seen(runs, 0)["warnings"])
    assert not any("processes: 1" in text for text in seen(runs, 1)["warnings"])


def test_one_process_continues_inside_an_epoch_of_two(runs):
    """The signal came to the second process alone; the running sums of the epoch are those of both."""
    state = load_checkpoint(runs / "two_then_one" / "last.pt")
    assert (state["epoch"], state["step"], state["processes"], state["stopped"]) == (1, 3, 2, "interrupted")
    assert int(state["sums"]["count"]) == 3 * 8
    with pytest.warns(UserWarning, match="processes: 2, now 1"):
        fit(plain(), write_tiny(runs / "third.safetensors"), runs / "two_then_one", resume=True)
    assert_close(runs / "two_then_one", runs / "one", 1e-5)


def test_two_processes_continue_their_own_run_bit_for_bit(runs):
    """With dropout: its draws depend on seed, step and rank alone."""
    assert_same_run(runs / "dropout_resumed", runs / "dropout")
    assert len({*seen(runs, 0)["seeds"], *seen(runs, 1)["seeds"]}) == 30
    assert curve(runs / "dropout")[0] != curve(runs / "two")[0]


def test_what_one_process_refuses_ends_both(runs):
    for rank in (0, 1):
        assert "FileExistsError" in seen(runs, rank)["refused"] and "is not empty" in seen(runs, rank)["refused"]


def test_a_loss_that_is_not_finite_in_one_process_ends_both(runs):
    for rank in (0, 1):
        assert "NonFiniteLossError: the training loss is not finite in epoch 1" in seen(runs, rank)["poisoned"]
    assert load_checkpoint(runs / "poisoned" / "last.pt")["total_steps"] == 0


def test_a_norm_over_the_batch_is_warned_of_once(runs):
    found = [[t for t in seen(runs, rank)["warnings"] if "norm_scope 'batch'" in t] for rank in (0, 1)]
    assert len(found[0]) == 1 and not found[1]


FAILING = """
    import sys
    from pathlib import Path
    import torch
    from distributed_worker import fit, plain
    from scalegmn_fast.data import PackedDataset
    from scalegmn_fast.train.distributed import joined

    def fail(trainer):
        if trainer.total_steps == 2 and trainer.processes.rank == 1:
            raise RuntimeError("the second process fails")

    with joined(torch.device("cpu")):
        fit(plain(), PackedDataset(sys.argv[1]), sys.argv[2], on_step=fail)
"""


def test_a_process_that_fails_ends_all(tmp_path):
    write_tiny(tmp_path / "tiny.safetensors")
    (tmp_path / "failing.py").write_text(textwrap.dedent(FAILING))
    process = torchrun(tmp_path / "failing.py", tmp_path / "tiny.safetensors", tmp_path / "out")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "RuntimeError: the second process fails" in errors
    assert load_checkpoint(tmp_path / "out" / "last.pt")["total_steps"] == 0


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(tmp_path):
    """From the command line: `torchrun -m scalegmn_fast train`."""
    yaml = pytest.importorskip("yaml")
    dataset, out = write_tiny(tmp_path / "tiny.safetensors"), tmp_path / "out"
    (tmp_path / "config.yml").write_text(yaml.safe_dump(plain(train_args__num_epochs=500)))
    options = ["--out", out, "--threads", "1", "--no-plots", "--device", "cpu"]
    process = torchrun("-m", "scalegmn_fast", "train", tmp_path / "config.yml", "--data", dataset.path, *options)
    metrics, deadline = out / "metrics.json", time.monotonic() + 90
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    text, errors = process.communicate(timeout=60)
    assert text.count("networks   2-4-1: 40 train") == 1 and "on cpu, 2 processes" in text, errors
    assert text.count("interrupted; continue with --resume") == 1 and errors.count("epoch   1  train loss") == 1
    state = load_checkpoint(out / "last.pt")
    assert state["stopped"] == "interrupted" and state["total_steps"] >= 5
    epochs = state["epoch"] + 1
    with pytest.warns(UserWarning, match="processes: 2, now 1"):
        result = fit(plain(train_args__num_epochs=epochs), dataset, out, resume=True)
    assert result["stopped"] == "max_epochs" and result["steps"] == 5 * epochs


# One process, and what the environment says


def test_one_process_is_the_plain_thing():
    alone, batch = Processes.current(), torch.arange(3)
    assert alone == Processes(0, 1) and alone.part(batch) == (batch, 1.0) and alone.any(False, True) == [False, True]
    assert alone.gather(5) == [5] and alone.first(lambda: 6) == 6
    model = torch.nn.Linear(2, 2)
    assert alone.parallel(model, torch.device("cpu")) is model


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_parts_make_up_the_batch_and_weights_its_mean(size, length):
    batch = torch.arange(length)
    parts = [Processes(rank, size).part(batch) for rank in range(size)]
    assert torch.cat([part for part, weight in parts if weight]).tolist() == batch.tolist()
    assert sum(weight * part.double().mean() for part, weight in parts).item() / size == pytest.approx(
        batch.double().mean().item()
    )


def test_each_process_draws_its_own_numbers():
    seeds = {Processes(rank, 2).seed(seed, step) for rank in (0, 1) for seed in (3, 4) for step in (0, 1)}
    assert len(seeds) == 8


def test_devices_of_several_processes(monkeypatch):
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert local_device("cpu") == "cpu" and started() == (1, 2)
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU, there are 1"):
        local_device("cuda")
    with pytest.raises(ValueError, match="--device cuda:0: expected cuda"):
        local_device("cuda:0")
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert local_device("cuda") == "cuda:1" and chosen == [1]
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK must be a number from 0 below WORLD_SIZE"):
        started()


def test_joining_alone_makes_no_group():
    with joined(torch.device("cpu")):
        assert not torch.distributed.is_initialized()
