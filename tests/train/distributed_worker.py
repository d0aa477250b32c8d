"""What test_distributed.py runs in each of two processes: ``torchrun ... distributed_worker.py DIRECTORY``.

The directory holds packed datasets and a run to continue; each process writes there what it saw, ``seen.RANK.json``.
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from test_train_editing import config_of as editing_config
from test_train_neural_graphs import config_of
from train_tiny import tiny_config

from scalegmn_fast.data import PackedDataset
from scalegmn_fast.train import NonFiniteLossError, Trainer, build_model, seed_everything, validate_config
from scalegmn_fast.train.distributed import joined

OPTIONS = {"make_plots": False, "checkpoint_seconds": None}
BATCH_NORM = {"scalegmn_args__mlp_args__batch_norm": True}


class Double:
    """A dataset whose batches are float64; ``visited`` has the networks of every training batch."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.visited = []

    def __len__(self):
        return len(self.dataset)

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def batch(self, indices, statistics=None):
        graph, labels = self.dataset.batch(indices, statistics)
        if torch.is_grad_enabled():
            self.visited.append(indices.tolist())
        return graph.to(dtype=torch.float64), labels


def plain(**changes):
    """A configuration without random draws."""
    return tiny_config(scalegmn_args__gnn_args__dropout=0.0, **changes)


def fit(config, dataset, out, **options):
    return Trainer.from_config(config, dataset, out, **{**OPTIONS, **options}).fit()


def fit_double(dataset, out):
    """41 training networks in batches of 5: of two processes one has more than the other, and once all."""
    config = plain(batch_size=5)
    seed_everything(3)
    model = build_model(validate_config(config), dataset.layout).double()
    data = Double(dataset)
    Trainer(model, data, config, out, **OPTIONS).fit()
    return data.visited


def fit_neural_graphs(dataset, out):
    changes = {"pna": {"model__gnn_backbone__norm_scope": "graph"}, "rtransformer": {}}
    for kind, change in changes.items():
        fit(config_of(kind, train_args__num_epochs=2, **change), dataset, Path(out) / kind)


def fit_editing(dataset, out, epochs=2, **options):
    """INRs whose images are to be dilated; the last of the 5 batches of an epoch is smaller."""
    changes = {"train_args__num_epochs": epochs, "optimization__optimizer_args__lr": 1e-3, "batch_size": 9}
    changes["scalegmn_args__gnn_args__dropout"] = 0.0
    fit(editing_config("mnist_editing/scalegmn", **changes), dataset, out, **options)


def interrupt_at(step, rank=0):
    def on_step(trainer):
        if trainer.total_steps == step and trainer.processes.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def outcome(call):
    try:
        call()
    except (FileExistsError, NonFiniteLossError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def poison(trainer):
    if trainer.total_steps == 2 and trainer.processes.rank == 1:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(float("nan"))


def every_case(folder, rank):
    dataset, uneven = PackedDataset(folder / "tiny.safetensors"), PackedDataset(folder / "uneven.safetensors")
    seen = {}
    fit(plain(), dataset, folder / "two")
    seen["visited"] = fit_double(uneven, folder / "two_double")
    fit_neural_graphs(dataset, folder / "two_ng")
    editing = PackedDataset(folder / "editing.safetensors")
    fit_editing(editing, folder / "two_editing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(plain(), dataset, folder / "one_then_two", resume=True)
        fit_editing(editing, folder / "one_then_two_editing", resume=True)
        fit(config_of("pna", train_args__num_epochs=1), dataset, folder / "mixing")
    seen["warnings"] = [str(w.message) for w in caught]
    fit(plain(), dataset, folder / "two_then_one", on_step=interrupt_at(8, rank=1))
    seen["seeds"] = []
    note = lambda trainer: seen["seeds"].append(torch.initial_seed())  # noqa: E731
    fit(tiny_config(), dataset, folder / "dropout", on_step=note)
    fit(tiny_config(), dataset, folder / "dropout_resumed", on_step=interrupt_at(7))
    fit(tiny_config(), dataset, folder / "dropout_resumed", resume=True)
    fit(plain(train_args__num_epochs=1, **BATCH_NORM), dataset, folder / "batch_norm")
    seen["refused"] = outcome(lambda: fit(plain(), dataset, folder / "two"))
    seen["poisoned"] = outcome(lambda: fit(plain(), dataset, folder / "poisoned", on_step=poison))
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    with joined(torch.device("cpu")):
        every_case(directory, torch.distributed.get_rank())
