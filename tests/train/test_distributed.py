"""Training by two processes (gloo on the CPU): the single process's curve, resume with another number, failures."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_worker import OPTIONS, fit, fit_double, fit_neural_graphs, plain
from test_trainer import assert_same_run, curve
from train_tiny import write_tiny

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


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes' runs and the single process's, side by side in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    dataset = write_tiny(folder / "tiny.safetensors")
    uneven = write_tiny(folder / "uneven.safetensors", sizes=(41, 16, 16))
    fit(plain(train_args__num_epochs=1), dataset, folder / "one_then_two")
    process = torchrun(HERE / "distributed_worker.py", folder)
    fit(plain(), dataset, folder / "one")
    (folder / "visited.json").write_text(json.dumps(fit_double(uneven, folder / "one_double")))
    fit_neural_graphs(dataset, folder / "one_ng")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    return folder


def seen(runs, rank):
    return json.loads((runs / f"seen.{rank}.json").read_text())


def test_the_curve_is_the_single_process_s(runs):
    one, two = curve(runs / "one")[0], curve(runs / "two")[0]
    print(one, two)
    assert close(two, one, 1e-4)
