"""``scalegmn-fast train`` and ``eval`` end to end, and what they refuse."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_tiny import tiny_config, write_tiny

from scalegmn_fast.train import evaluate, load_checkpoint, train

yaml = pytest.importorskip("yaml")
SMALL = ["--threads", "1", "--no-plots", "--no-progress", "--device", "cpu"]


def call(module, *arguments):
    parser = argparse.ArgumentParser()
    module.configure(parser)
    return module.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(tiny_config()))
    return path


def test_train_then_eval(config, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(train, config, "--data", dataset.path, "--out", out, "--epochs", 2, "--seed", 9, *SMALL) == 0
    text = capsys.readouterr().out
    result = json.loads((out / "metrics.json").read_text())
    assert f"accuracy {100 * result['test']['accuracy']:.2f}%" in text and "2-4-1: 40 train, 16 val, 16 test" in text
    assert len(result["epochs"]) == 2 and result["seed"] == 9

    picture, numbers = tmp_path / "confusion.png", tmp_path / "eval.json"
    options = ["--split", "test", "--json", numbers, "--plot", picture, "--threads", "1", "--device", "cpu"]
    assert call(evaluate, out / "best.pt", "--data", dataset.path, *options) == 0
    again = json.loads(numbers.read_text())
    assert {k: again[k] for k in result["test"]} == result["test"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"test: accuracy {100 * again['accuracy']:.2f}%" in capsys.readouterr().out


def test_eval_uses_the_statistics_of_the_run(config, dataset, tmp_path):
    out = tmp_path / "out"
    normal = ["--set", "scalegmn_args.symmetry=permutation", "--epochs", 1]
    assert call(train, config, "--data", dataset.path, "--out", out, *normal, *SMALL) == 0
    call(evaluate, out / "best.pt", "--data", dataset.path, "--json", tmp_path / "e.json", "--threads", "1")
    again, result = (json.loads(p.read_text()) for p in (tmp_path / "e.json", out / "metrics.json"))
    assert again["loss"] == result["test"]["loss"]


def test_a_published_name_with_overrides(dataset, tmp_path):
    small = ["scalegmn_args.d_hid=8", "scalegmn_args.num_layers=1", "scalegmn_args.readout_args.d_out=2",
             "data.layer_layout=null", "train_args.num_epochs=1", "batch_size=20"]  # fmt: skip
    overrides = [a for pair in small for a in ("--set", pair)]
    with pytest.warns(UserWarning, match="d_hid"):  # the model says what d_hid overrides
        arguments = ["--data", dataset.path, "--out", tmp_path / "out", *overrides, *SMALL]
        assert call(train, "mnist_cls/scalegmn", *arguments) == 0


def test_ctrl_c_at_the_command_line(config, dataset, tmp_path):
    out = tmp_path / "out"
    code = "import sys; from scalegmn_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["train", config, "--data", dataset.path, "--out", out, "--epochs", 500, *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = out / "metrics.json", time.monotonic() + 90
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; continue with --resume" in text and "Traceback" not in errors
    state = load_checkpoint(out / "last.pt")
    result = json.loads(metrics.read_text())
    assert result["stopped"] == "interrupted" and result["steps"] == state["total_steps"] >= 5
    epochs = state["epoch"] + 1
    assert call(train, config, "--data", dataset.path, "--out", out, "--epochs", epochs, "--resume", *SMALL) == 0
    assert json.loads(metrics.read_text())["steps"] == 5 * epochs


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (["--set", "train_args.num_epoch=3"], ValueError, "nearest valid key is 'train_args.num_epochs'"),
    (["--set", "scalegmn_args.symetry=sign"], ValueError, "symmetry"),
    (["--set", "scalegmn_args.equivariant=true"], ValueError, "has no target images"),
    (["--set", "data.layer_layout=[2, 8, 1]"], ValueError, r"data.layer_layout is \[2, 8, 1\] .* layout \[2, 4, 1\]"),
    (["--set", "scalegmn_args.layer_layout=[2, 8, 1]"], ValueError, r"scalegmn_args.layer_layout is \[2, 8, 1\]"),
    (["--set", "optimization.optimizer_name=AdamV"], ValueError, "not in torch.optim"),
    (["--set", "train_args.loss=MSE"], ValueError, "use CrossEntropyLoss"),
    (["--epochs", "0"], ValueError, "train_args.num_epochs must be an integer of at least 1"),
    (["--device", "gpu"], ValueError, "'gpu' is no torch device"),
    (["--threads", "0"], ValueError, "--threads must be at least 1"),
    (["--backend", "fortran"], ValueError, "fortran"),
])  # fmt: skip
def test_refusals_leave_no_directory(config, dataset, tmp_path, arguments, error, message):
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        call(train, config, "--data", dataset.path, "--out", out, "--no-plots", "--no-progress", *arguments)
    assert not out.exists()


def test_cuda_where_there_is_none(config, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is available"):
        call(train, config, "--data", dataset.path, "--out", tmp_path / "out", "--device", "cuda")


def test_data_that_is_not_there_or_not_packed(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors' does not exist; make it with scalegmn-fast pack"):
        call(train, config, "--data", tmp_path / "none.safetensors", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="config.yml"):
        call(train, config, "--data", config, "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="neither a file nor a published name"):
        call(train, tmp_path / "none.yml", "--data", config, "--out", tmp_path / "out")


def test_eval_refusals(config, dataset, tmp_path):
    out = tmp_path / "out"
    call(train, config, "--data", dataset.path, "--out", out, "--epochs", 1, *SMALL)
    with pytest.raises(FileNotFoundError, match="none.pt' does not exist"):
        call(evaluate, tmp_path / "none.pt", "--data", dataset.path)
    other = write_tiny(tmp_path / "other.safetensors", layout=(2, 5, 1))
    with pytest.raises(ValueError, match=r"layout \[2, 4, 1\].*holds \[2, 5, 1\]"):
        call(evaluate, out / "best.pt", "--data", other.path)
    empty = write_tiny(tmp_path / "empty.safetensors", sizes=(8, 8, 0))
    with pytest.raises(ValueError, match="--split test: it is empty"):
        call(evaluate, out / "best.pt", "--data", empty.path)
    numbers = write_tiny(tmp_path / "numbers.safetensors", regression=True)
    with pytest.raises(ValueError, match="use MSE or BCE"):
        call(evaluate, out / "best.pt", "--data", numbers.path)
    (out / "best.pt").write_bytes((out / "best.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated"):
        call(evaluate, out / "best.pt", "--data", dataset.path)
    assert sorted(os.listdir(out)) == ["best.pt", "last.pt", "metrics.json"]


def test_a_warning_where_the_symmetries_differ(config, dataset, tmp_path, capsys):
    arguments = ["--data", dataset.path, "--out", tmp_path / "out", "--epochs", 1, *SMALL]
    call(train, config, *arguments, "--set", "scalegmn_args.symmetry=scale")
    assert "the networks have symmetry sign, the model is built for scale" in capsys.readouterr().err
    assert Path(tmp_path / "out" / "best.pt").exists()
