"""The training loop: exact resume, early stopping, metrics, curves; usable from the command line and from code."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import platform
import random
import signal
import statistics as _statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scalegmn_fast.data.optional import require

from . import plots
from .checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint, write_json
from .config import differences, load_config, validate_config
from .cuda_graph import GraphedStep, make_capturable
from .distributed import Processes
from .loggers import TensorBoardLogger, WandbLogger
from .model import batch_statistics, build_model, fitted, layer_statistics, mixing_norm, width_key
from .optim import build_optimizer, build_scheduler
from .step import StepResult, TrainingStep
from .tasks import task_of

__all__ = ["NonFiniteLossError", "Trainer", "build_model", "deterministic", "evaluate_split", "seed_everything"]

# What a run writes into its directory; only these are ever removed by overwrite=True.
FILES = ("last.pt", "best.pt", "metrics.json", "curves.png", "confusion.png", "predictions.png")
# What may change between a run and its continuation without changing the part already done.
_MAY_CHANGE = ("train_args.num_epochs", "train_args.max_steps", "train_args.patience", "wandb", "wandb_args")


class NonFiniteLossError(ArithmeticError):
    """The training loss became NaN or infinite; the last checkpoint is from before that."""


def seed_everything(seed: int) -> None:
    """Seeds torch (all devices), NumPy's and Python's global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Selects deterministic kernels inside the block (a warning names an operation that has none), then restores.

    For cuBLAS, ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` must be set before its first use; the command line does so.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every new tensor, needed by none here
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = cudnn


def batches(indices: Tensor, size: int) -> list[Tensor]:
    """Splits indices [n] into consecutive batches of ``size`` (the last may be smaller)."""
    return list(torch.split(indices, size))


@torch.no_grad()
def evaluate_split(
    model: nn.Module,
    dataset,
    indices: Tensor,
    task,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    statistics=None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Metrics of ``model`` (in evaluation mode; its mode is restored) on the networks ``indices`` of ``dataset``.

    Of several processes each takes every so-many-th batch, and all return the metrics of the whole, those that one
    process gives.

    Returns the task's metrics and ``count``; None where ``stop()`` became true between two batches.
    """
    processes = Processes.current()
    processes.share_buffers(model)
    training = model.training
    model.eval()
    own: list[tuple[Tensor, Tensor]] | None = []
    try:
        for part in batches(indices, batch_size)[processes.rank :: processes.size]:
            if stop():
                own = None
                break
            graph, target = dataset.batch(part, statistics)
            own.append((task.output(model, graph.to(device=device)), target))
    finally:
        model.train(training)
    parts = processes.gather(own and [(output.cpu(), target.cpu()) for output, target in own])
    if None in parts:
        return None
    in_order = [pair for row in itertools.zip_longest(*parts) for pair in row if pair is not None]
    outputs, labels = (torch.cat(column) for column in zip(*in_order, strict=True))
    result = task.metrics(outputs, labels)
    result["count"] = len(indices)
    return result


class Trainer:
    """Trains ``model`` on a packed dataset and keeps everything needed to continue in ``out``.

    Args:
        model: module from a GraphBatch to [B, d_out], or to changes of the networks where the configuration's model
            edits them; None: the configuration's, made after seeding.
        dataset: a `PackedDataset`, a `PackedCnns`, or anything
            with its ``batch``, ``weights``, ``split``, ``labels``, ``layout`` and ``len``.
        config: a whole configuration (dict, YAML path or published name); see ``validate_config``.
        out: directory of the run: ``last.pt``, ``best.pt``, ``metrics.json``, PNG files.
        resume: continue the run in ``out`` (start it where ``out`` is empty). The continued run equals the
            uninterrupted one bit for bit on the CPU with the same number of threads.
        overwrite: remove the files of an earlier run in ``out``. Without either, a non-empty ``out`` is refused.
        checkpoint_steps, checkpoint_seconds: write ``last.pt`` inside an epoch after so many steps, or so much time;
            None: never. At the end of each epoch and on a signal it is always written.
        on_step: called with the trainer after every optimiser step.

    Early stopping: after ``train_args.patience`` epochs without a better validation result than the best so far.
    (The original stops only when the accuracy fell strictly in each of ``patience`` epochs, which noise prevents.)
    Best: highest validation accuracy (Kendall's tau), then lowest loss; of edits the lowest loss. Training ends at
    ``num_epochs`` or ``max_steps``, whichever is first.

    Of several processes (an initialised default process group) each makes a trainer with the same arguments, and calls
    the same methods. ``batch_size`` counts the networks of all of them together; process 0 alone writes, draws, logs
    and shows progress. See `distributed` and docs/distributed.md.

    Raises ValueError for a bad configuration, an empty train or validation split, labels that the loss or the model's
    output do not fit, or a checkpoint of another run; FileExistsError for a non-empty ``out``.
    """

    def __init__(
        self,
        model: nn.Module | None,
        dataset,
        config: Mapping[str, Any] | str | os.PathLike,
        out: str | os.PathLike,
        *,
        device: torch.device | str = "cpu",
        backend: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
        checkpoint_steps: int | None = None,
        checkpoint_seconds: float | None = 60.0,
        progress: bool = False,
        make_plots: bool = True,
        tensorboard: bool = False,
        wandb: bool | None = None,
        on_step: Callable[[Trainer], None] | None = None,
    ):
        self.config, self.dataset = fitted(validate_config(load_config(config)), dataset)
        self.device = torch.device(device)
        self.out = os.fspath(out)
        self.backend = backend
        self.processes = Processes.current()
        writes = self.processes.rank == 0
        self.progress = progress and writes
        self.make_plots = make_plots and writes
        self.checkpoint_steps = checkpoint_steps
        self.checkpoint_seconds = checkpoint_seconds
        self.on_step = on_step
        if make_plots:
            plots.require_matplotlib()
        if progress:
            require("tqdm", "the progress bar")

        self.splits = {name: _indices(dataset.split(name)) for name in ("train", "val", "test")}
        for name in ("train", "val"):
            if len(self.splits[name]) == 0:
                sizes = ", ".join(f"{k} {len(v)}" for k, v in self.splits.items())
                raise ValueError(f"the data's split '{name}' is empty (sizes: {sizes})")
        self.seed = self.config["train_args"]["seed"]
        self.statistics = layer_statistics(self.config, self.dataset, self.splits["train"])
        self._batch_statistics = batch_statistics(self.config, self.statistics)
        self.task = task_of(self.config, self.dataset, self._batch_statistics)
        if model is None:
            seed_everything(self.seed)
            model = build_model(self.config, self.dataset.layout, self.statistics)

        self.model = model.to(self.device)
        mixed = mixing_norm(self.model)
        if mixed and self.processes.size > 1 and writes:
            warnings.warn(
                f"{mixed} mixes the networks of a batch: here those of each process's part, so that the result depends "
                "on the number of processes",
                stacklevel=3,
            )
        self._parallel = self.processes.parallel(self.model, self.device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("model has no parameter that requires a gradient")
        optimization = self.config["optimization"]
        self.optimizer = build_optimizer(trainable, optimization["optimizer_name"], optimization["optimizer_args"])
        self.scheduler = build_scheduler(self.optimizer, optimization["scheduler_args"])
        max_norm = optimization["clip_grad_max_norm"] if optimization["clip_grad"] else None
        self._training_step = TrainingStep(self._parallel, self.task.loss, self.optimizer, max_norm, self.task.output)
        if self.config["train_args"]["cuda_graph"]:
            if self.device.type != "cuda":
                raise ValueError(f"train_args.cuda_graph: true needs a CUDA device, got device {self.device}")
            if self.processes.size > 1:
                raise ValueError(f"train_args.cuda_graph: true needs one process, got {self.processes.size}")
            make_capturable(self.optimizer, self.device)
            self._training_step = GraphedStep(self._training_step)
        self.data_identity = _identity(self.dataset, self.splits)

        self.epoch = 0  # epochs completed
        self.step = 0  # optimiser steps completed inside the current epoch
        self.total_steps = 0
        self.rows: list[dict] = []
        self.best: dict | None = None
        self.stale_epochs = 0
        self.test: dict | None = None
        self.stopped: str | None = None
        self.seconds = 0.0
        self.step_seconds: list[float] = []
        self._sums = self.task.new_sums(self.device)
        self._lr_first = self.learning_rate
        self._rng: dict | None = None
        self._wandb_id: str | None = None
        self._signal: int | None = None
        self._started: float | None = None

        with self._backend():
            self._check_output()
        resumed = self._open_directory(resume, overwrite)
        self._loggers: list = []
        wandb = wandb if wandb is not None else self.config.get("wandb") is True
        self._logs = bool(tensorboard or wandb)
        if tensorboard and writes:
            self._loggers.append(TensorBoardLogger(os.path.join(self.out, "tensorboard"), self.total_steps))
        if wandb and writes:
            logger = WandbLogger(self.config, self.out, self._wandb_id)
            self._wandb_id = logger.run_id
            self._loggers.append(logger)
        if not resumed:
            seed_everything(self.seed)
            self._rng = capture_rng()
            self.save()  # a run killed before its first checkpoint can be resumed too

    @classmethod
    def from_config(cls, config, dataset, out: str | os.PathLike, **options) -> Trainer:
        """A trainer of the configuration's own model, made for the dataset."""
        return cls(None, dataset, config, out, **options)

    @property
    def learning_rate(self) -> float:
        """That of the optimiser's first group, at the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return -(-len(self.splits["train"]) // self.config["batch_size"])

    def permutation(self, epoch: int) -> Tensor:
        """The order of the training networks in ``epoch`` (from 0): int64 [n], a function of seed and epoch alone."""
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        indices = self.splits["train"]
        return indices[torch.randperm(len(indices), generator=generator)]

    def fit(self) -> dict[str, Any]:
        """Trains to the end, or until SIGINT or SIGTERM; returns what ``metrics.json`` then holds.

        After a signal ``stopped`` is ``"interrupted"``, ``last.pt`` holds the step after which it came, and nothing is
        lost; a second signal ends at once. Raises NonFiniteLossError where the loss is NaN or infinite.
        """
        self._signal = None
        self._started = time.perf_counter() - self.seconds
        with self._signals(), deterministic(), self._backend():
            if self._rng is not None:
                restore_rng(self._rng)
            self.model.train()
            if self.stopped in ("interrupted", "max_epochs", "max_steps", "patience"):
                self.stopped = self._reason_to_stop()
            while self.stopped is None:
                if not (self._train_epoch() and self._end_epoch()):
                    self.stopped = "interrupted"
                    break
                self.stopped = self._reason_to_stop()
                self.save()
                self._write_metrics()
            if self.stopped != "interrupted" and self.test is None and len(self.splits["test"]):
                self._test_best()
            self.save()
        self._signal = None
        result = self._write_metrics()
        self.draw()
        for logger in self._loggers:
            logger.close()
        return result

    def save(self, path: str | os.PathLike | None = None) -> None:
        """Writes a checkpoint of the present moment (default ``last.pt``); of several processes all call this."""
        sums = self.processes.sum(self._sums)
        loss = float(sums["loss"])
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss is not finite in epoch {self.epoch + 1}, step {self.step} (learning rate "
                f"{self.learning_rate:g}); {os.path.join(self.out, 'last.pt')} is from before that"
            )
        self._rng = capture_rng()
        self._tick()
        if self.processes.rank == 0:
            save_checkpoint(path or os.path.join(self.out, "last.pt"), {**self._state(), "sums": sums})

    def evaluate(self, split: str) -> dict[str, Any] | None:
        """Metrics of the present model on a split; None where a signal came in between. All processes call this."""
        if split not in self.splits:
            raise ValueError(f"split must be train, val or test, got {split!r}")
        if len(self.splits[split]) == 0:
            raise ValueError(f"the data's split '{split}' is empty")
        with self._backend():
            return evaluate_split(
                self.model, self.dataset, self.splits[split], self.task, batch_size=self.config["batch_size"],
                device=self.device, statistics=self._batch_statistics, stop=lambda: self._signal is not None,
            )  # fmt: skip

    def draw(self) -> list[str]:
        """Draws ``curves.png`` and ``confusion.png`` (``predictions.png`` for regression); returns the paths."""
        if not self.make_plots or not self.rows:
            return []
        paths = [os.path.join(self.out, "curves.png")]
        plots.draw_curves(paths[0], self.metrics())
        shown, split = (self.test, "test") if self.test else ((self.best or {}).get("val"), "validation")
        if shown and "confusion" in shown:
            paths.append(os.path.join(self.out, "confusion.png"))
            title = f"{split.capitalize()}: {100 * shown['accuracy']:.1f}% of {shown['count']} networks"
            plots.draw_confusion(paths[-1], shown["confusion"], title)
        elif shown and "predicted" in shown:
            paths.append(os.path.join(self.out, "predictions.png"))
            title = f"{split.capitalize()}: Kendall's tau {shown['tau']:.3f}, R2 {shown['r2']:.3f}"
            plots.draw_scatter(paths[-1], shown["actual"], shown["predicted"], title)
        return paths

    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds, as plain values."""
        import scalegmn_fast

        return {
            "task": self.task.kind,
            "score": self.task.score,
            "stopped": self.stopped,
            "epochs": self.rows,
            "best": self.best,
            "test": self.test,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "steps": self.total_steps,
            "wall_seconds": self.seconds,
            "step_seconds_median": _statistics.median(self.step_seconds) if self.step_seconds else None,
            "device": str(self.device),
            "processes": self.processes.size,
            "threads": torch.get_num_threads(),
            "backend": self.backend or os.environ.get("SCALEGMN_FAST_BACKEND", "auto"),
            "data": self.data_identity,
            "config": self.config,
            "versions": {
                "scalegmn_fast": getattr(scalegmn_fast, "__version__", None),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }

    # Inside an epoch

    @torch.no_grad()
    def _check_output(self) -> None:
        """Runs one network through the model, so that what does not fit is said before anything is written."""
        self.model.eval()
        graph, _ = self.dataset.batch(self.splits["train"][:1], self._batch_statistics)
        output = self.task.output(self.model, graph.to(device=self.device))
        self.task.check_output(output, width_key(self.config))

    def _train_epoch(self) -> bool:
        """Runs the steps that are left of the current epoch; False where a signal came before its end."""
        parts = batches(self.permutation(self.epoch), self.config["batch_size"])
        max_steps = self.config["train_args"]["max_steps"]
        if max_steps is not None:
            parts = parts[: max(self.step, self.step + max_steps - self.total_steps)]
        if self.step == 0:
            self._sums = self.task.new_sums(self.device)
            self._lr_first = self.learning_rate
        last_save = window_start = time.perf_counter()
        window = 0
        cuda = self.device.type == "cuda"
        bar = self._bar(len(parts))
        try:
            while self.step < len(parts):
                if self._interrupted():
                    return False
                part = parts[self.step]
                result = self._optimise(part)
                self.step += 1
                self.total_steps += 1
                window += 1
                now = time.perf_counter()
                shown = bar is not None and bool(bar.update(len(part)))
                if shown or not cuda:  # on a GPU only a synchronised interval measures its steps
                    if shown:
                        running = self.task.running(self._sums)
                        bar.set_postfix({k: f"{v:.4f}" for k, v in running.items()}, refresh=False)
                        now = time.perf_counter()
                    self.step_seconds.append((now - window_start) / window)
                    window_start, window = now, 0
                if self._logs:
                    loss = self.processes.sum({"loss": result.loss})["loss"] / self.processes.size
                    values = {"train/step_loss": float(loss), "lr": self.learning_rate}
                    norm = {} if result.norm is None else {"train/grad_norm": float(result.norm)}
                    self._log({**values, **norm})
                if self.on_step is not None:
                    self.on_step(self)
                due = self.checkpoint_steps and self.total_steps % self.checkpoint_steps == 0
                if self.checkpoint_seconds is not None and not due:
                    [due] = self.processes.any(now - last_save >= self.checkpoint_seconds)
                if due and self.step < len(parts):
                    self.save()
                    last_save = window_start = time.perf_counter()
                    window = 0
            if cuda and window:
                torch.cuda.synchronize(self.device)
                self.step_seconds.append((time.perf_counter() - window_start) / window)
        finally:
            if bar is not None:
                bar.close()
        return not self._interrupted()

    def _interrupted(self) -> bool:
        """Whether a signal came, in any process."""
        return self.processes.any(self._signal is not None)[0]

    def _optimise(self, batch: Tensor) -> StepResult:
        """One step on the networks ``batch``.

        Of several processes each draws (dropout) by seed, step and rank; the loss is that of its part, by its weight.
        """
        part, weight = self.processes.part(batch)
        several = self.processes.size > 1
        if several:
            seed_everything(self.processes.seed(self.seed, self.total_steps))
        graph, labels = self.dataset.batch(part, self._batch_statistics)
        if self.device.type == "cuda":  # copies from other memory would wait for the step before
            graph, labels = graph.pin_memory(), labels.pin_memory()
        graph = graph.to(device=self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        result = self._training_step(graph, labels, weight) if several else self._training_step(graph, labels)
        if self.scheduler is not None and not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
        if weight > 0:
            self.task.add(self._sums, result.loss, result.output, labels)
        return result._replace(loss=result.loss * weight) if several else result

    def _end_epoch(self) -> bool:
        """Validates, records the epoch and keeps the best model; False where a signal came before the end."""
        train = self.task.running(self.processes.sum(self._sums))
        if not np.isfinite(train["loss"]):
            self.save()  # raises
        val = self.evaluate("val")
        if val is None:
            return False
        if not np.isfinite(val["loss"]):
            raise NonFiniteLossError(
                f"the validation loss is not finite after epoch {self.epoch + 1} (learning rate "
                f"{self.learning_rate:g}); {os.path.join(self.out, 'last.pt')} is from before that"
            )
        score = val[self.task.score]
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            mode = self.config["optimization"]["scheduler_args"]["scheduler_mode"]
            self.scheduler.step(val["loss"] if mode == "min" else score)
        better = self.best is None or self.task.rank(val) > self.task.rank(self.best["val"])
        self.stale_epochs = 0 if better else self.stale_epochs + 1
        self.epoch += 1
        self.step = 0
        scalars = {k: v for k, v in val.items() if isinstance(v, (int, float))}
        self.rows.append(
            {"epoch": self.epoch, "steps": self.total_steps, "lr_first": self._lr_first, "lr": self.learning_rate,
             "train": train, "val": scalars}
        )  # fmt: skip
        self._sums = self.task.new_sums(self.device)
        if better:
            self.best = {"epoch": self.epoch, "val": val}
            self.test = None
            self.save(os.path.join(self.out, "best.pt"))
        if self._logs:
            self._log({f"train/{k}": v for k, v in train.items()} | {f"val/{k}": v for k, v in scalars.items()})
        if self.progress:
            mark = "  best" if better else ""
            require("tqdm", "the progress bar").tqdm.write(
                f"epoch {self.epoch:>3}  train loss {train['loss']:.4f}  val loss {val['loss']:.4f}  "
                f"val {self.task.shown(score)}{mark}",
                file=sys.stderr,
            )
        return True

    def _test_best(self) -> None:
        """Test metrics of the best validation epoch; the present weights are put back afterwards."""
        present = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        best = self.processes.first(lambda: load_checkpoint(os.path.join(self.out, "best.pt"))["model"])
        self.model.load_state_dict(best)
        try:
            test = self.evaluate("test")
        finally:
            self.model.load_state_dict(present)
        if test is None:
            self.stopped = "interrupted"
            return
        self.test = test
        if self._logs:
            self._log({f"test/{k}": v for k, v in test.items() if isinstance(v, (int, float))})

    def _reason_to_stop(self) -> str | None:
        args = self.config["train_args"]
        if args["patience"] is not None and self.stale_epochs >= args["patience"]:
            return "patience"
        if args["max_steps"] is not None and self.total_steps >= args["max_steps"] and self.step == 0:
            return "max_steps"
        return "max_epochs" if self.epoch >= args["num_epochs"] else None

    # State

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": self._rng,
            "epoch": self.epoch,
            "step": self.step,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "lr_first": self._lr_first,
            "rows": self.rows,
            "best": self.best,
            "stale_epochs": self.stale_epochs,
            "test": self.test,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds[-10000:],
            "processes": self.processes.size,
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "backend": self.backend,
            "wandb_id": self._wandb_id,
            "config": self.config,
            "layout": self.data_identity["layout"],
            "data": self.data_identity,
            "statistics": None if self.statistics is None else self.statistics.state_dict(),
        }

    def _restore(self, path: str, state: Mapping[str, Any]) -> None:
        changed = [
            f"{key}: {old!r} in the checkpoint, {new!r} now"
            for key, old, new in differences(state["config"], self.config)
            if not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE)
        ]
        changed += [
            f"data {key}: {old!r} in the checkpoint, {new!r} now"
            for key, old, new in differences(state["data"], self.data_identity)
        ]
        if changed:
            raise ValueError(f"'{path}' belongs to another run: {'; '.join(changed)}")
        before = state["threads"], state["device"], state.get("processes", 1)
        now = torch.get_num_threads(), str(self.device), self.processes.size
        if self.processes.rank == 0 and before != now:
            warnings.warn(
                f"the run used {before[0]} threads on {before[1]}, now {now[0]} on {now[1]} (processes: {before[2]}, "
                f"now {now[2]}): the continuation is valid, but not bit for bit the uninterrupted run",
                stacklevel=4,
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config["train_args"]["cuda_graph"]:
            make_capturable(self.optimizer, self.device)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.processes.rank == 0:  # the others' sums start at zero
            self._sums = {k: v.to(self.device) for k, v in state["sums"].items()}
        self._rng = state["rng"]
        self._lr_first = state["lr_first"]
        self._wandb_id = state["wandb_id"]
        for name in ("epoch", "step", "total_steps", "rows", "best", "stale_epochs", "test", "stopped", "seconds",
                     "step_seconds"):  # fmt: skip
            setattr(self, name, state[name])

    def _open_directory(self, resume: bool, overwrite: bool) -> bool:
        """Makes ``out`` ready; True where a run in it was restored."""
        state = self.processes.first(lambda: self._prepare_directory(resume, overwrite))
        if state is None:
            return False
        self._restore(os.path.join(self.out, "last.pt"), state)
        return True

    def _prepare_directory(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Makes ``out`` ready; the checkpoint to continue from, if any."""
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise FileExistsError(f"out: '{self.out}' is a file, expected a directory")
        os.makedirs(self.out, exist_ok=True)
        present = []
        for name in sorted(os.listdir(self.out)):
            if name.startswith(".") and name.endswith(".tmp"):  # left by a write that was killed
                os.remove(os.path.join(self.out, name))
            else:
                present.append(name)
        if resume and present:
            if "last.pt" not in present:
                raise FileNotFoundError(f"nothing to resume in '{self.out}': it has no last.pt")
            return load_checkpoint(os.path.join(self.out, "last.pt"))
        if present and not overwrite:
            raise FileExistsError(f"out: '{self.out}' is not empty; continue with resume or replace it with overwrite")
        for name in FILES:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.out, name))
        for events in glob.glob(os.path.join(glob.escape(self.out), "tensorboard", "events.out.tfevents.*")):
            os.remove(events)
        return None

    def _tick(self) -> None:
        if self._started is not None:
            self.seconds = time.perf_counter() - self._started

    def _write_metrics(self) -> dict[str, Any]:
        self._tick()
        result = self.metrics()
        if self.processes.rank == 0:
            write_json(os.path.join(self.out, "metrics.json"), result)
        return result

    # Surroundings

    def _log(self, values: Mapping[str, float]) -> None:
        for logger in self._loggers:
            logger.log(values, self.total_steps)

    def _bar(self, steps: int):
        """A bar over the networks of the epoch; silent where stderr is no terminal."""
        if not self.progress:
            return None
        total = self.config["train_args"]["num_epochs"]
        count = min(len(self.splits["train"]), steps * self.config["batch_size"])
        return require("tqdm", "the progress bar").tqdm(
            total=count, initial=self.step * self.config["batch_size"], desc=f"epoch {self.epoch + 1}/{total}",
            unit=" networks", mininterval=0.25, leave=False, dynamic_ncols=True, disable=None, file=sys.stderr,
        )  # fmt: skip

    def _backend(self):
        if self.backend is None:
            return contextlib.nullcontext()
        import scalegmn_fast

        return scalegmn_fast.backend(self.backend)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns the first SIGINT or SIGTERM into a request to stop after the present step.

        A second one ends at once; not where there are several processes, which may get it from torchrun and a terminal.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {}

        def request(number, frame):
            if self._signal is not None and self.processes.size == 1:
                raise KeyboardInterrupt
            self._signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _indices(value) -> Tensor:
    return torch.as_tensor(value, dtype=torch.int64).cpu()


def _identity(dataset, splits: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells one dataset from another: counts, layout, and a digest of labels, splits and 64 networks."""
    digest = hashlib.sha256(torch.as_tensor(dataset.labels).contiguous().numpy().tobytes())
    for indices in splits.values():
        digest.update(indices.numpy().tobytes())
    picked = torch.linspace(0, len(dataset) - 1, min(64, len(dataset))).long()
    blocks = [b for group in dataset.weights(picked) for b in group]
    for block in [*blocks, dataset.targets(picked)] if getattr(dataset, "gives_targets", False) else blocks:
        digest.update(block.contiguous().numpy().tobytes())
    return {
        "networks": len(dataset),
        "layout": None if dataset.layout is None else [int(n) for n in dataset.layout],
        "splits": {k: len(v) for k, v in splits.items()},
        "sha256": digest.hexdigest(),
    }
