"""Train a ScaleGMN or a Neural Graphs model on a packed dataset of networks."""

from __future__ import annotations

import argparse
import os
import sys

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``scalegmn-fast train``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file in the original's format, or a published name")
    parser.add_argument("--data", required=True, metavar="PACKED", help="packed dataset (.safetensors or .npz)")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory for checkpoints, metrics and plots")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a key, e.g. --set scalegmn_args.d_hid=32 (repeatable)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, help="short for --set train_args.num_epochs=N")
    parser.add_argument("--batch-size", type=int, help="short for --set batch_size=N")
    parser.add_argument("--seed", type=int, help="short for --set train_args.seed=N")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto (default): cuda where present")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--backend", help="reference, cpp, triton, cuda or auto")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out (start it where it is empty)")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    parser.add_argument("--checkpoint-steps", type=int, metavar="N", help="write last.pt every N steps inside an epoch")
    parser.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, metavar="S", help="and whenever S seconds passed (default 60)"
    )
    parser.add_argument("--tensorboard", action="store_true", help="write event files to DIR/tensorboard")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases (wandb_args of the config)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar, no line per epoch")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")


def run(args: argparse.Namespace) -> int:
    """Trains; 0 when finished, 130 when interrupted (everything saved), 1 when the loss became NaN."""
    from .config import apply_overrides, load_config, validate_config
    from .distributed import joined

    overrides = list(args.overrides)
    for key, value in (("train_args.num_epochs", args.epochs), ("batch_size", args.batch_size),
                       ("train_args.seed", args.seed)):  # fmt: skip
        if value is not None:
            overrides.append(f"{key}={value}")
    config = validate_config(apply_overrides(load_config(args.config), overrides))
    device = prepare_device(args.device, args.threads)
    dataset = open_dataset(args.data)
    with joined(device):
        return _train(args, config, dataset, device)


def _train(args: argparse.Namespace, config: dict, dataset, device) -> int:
    from .trainer import NonFiniteLossError, Trainer

    trainer = Trainer.from_config(
        config,
        dataset,
        args.out,
        device=device,
        backend=args.backend,
        resume=args.resume,
        overwrite=args.overwrite,
        checkpoint_steps=args.checkpoint_steps,
        checkpoint_seconds=args.checkpoint_seconds,
        progress=not args.no_progress,
        make_plots=not args.no_plots,
        tensorboard=args.tensorboard,
        wandb=True if args.wandb else None,
    )
    writes = trainer.processes.rank == 0
    if writes:
        describe_data(dataset, config)
        _announce(trainer, config)
    try:
        result = trainer.fit()
    except NonFiniteLossError as e:
        if writes:
            print(f"error: {e}", file=sys.stderr)
        return 1
    if writes:
        _report(result, trainer)
    return 130 if result["stopped"] == "interrupted" else 0


def prepare_device(name: str, threads: int | None):
    """The torch device of ``name`` (``auto``: CUDA where present), with the number of CPU threads set.

    Of several processes that torchrun started each gets a GPU of its own.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS's first use: deterministic GEMMs
    import torch

    from .distributed import local_device

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.cuda.is_available():
        name = local_device(name)
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"--device {name!r} is no torch device") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no CUDA device is available to this torch ({torch.__version__})")
    return device


def open_dataset(path: str):
    """Opens a packed dataset of either kind; FileNotFoundError says how to make one."""
    from scalegmn_fast.data import open_packed

    if not os.path.isfile(path):
        raise FileNotFoundError(f"--data '{path}' does not exist; make it with scalegmn-fast pack or fit-inrs")
    return open_packed(path)


def describe_data(dataset, config) -> None:
    """Warns on stderr where the data's symmetry is another than the model's (a plain permutation model is fine)."""
    data, model = dataset.metadata.get("symmetry"), config.get("scalegmn_args", {}).get("symmetry")
    if data and model and data != model and "permutation" not in (data, model) and model != "hetero":
        print(f"warning: the networks have symmetry {data}, the model is built for {model}", file=sys.stderr)


def _layout(dataset) -> str:
    return "of several layouts" if dataset.layout is None else "-".join(str(int(n)) for n in dataset.layout)


def _kind(config: dict) -> str:
    if "model" in config:
        return str(config["model"]["_target_"]).rpartition(".")[2]
    return f"symmetry {config['scalegmn_args'].get('symmetry')}"


def format_score(metrics: dict) -> str:
    """One line with the metrics of a split."""
    if "accuracy" in metrics:
        return f"accuracy {100 * metrics['accuracy']:.2f}%, loss {metrics['loss']:.4f}, {metrics['count']:,} networks"
    if "psnr" in metrics:
        return f"MSE {metrics['loss']:.6f}, PSNR {metrics['psnr']:.2f} dB, {metrics['count']:,} networks"
    return (
        f"Kendall's tau {metrics['tau']:.4f}, R2 {metrics['r2']:.4f}, MSE {metrics['mse']:.6f}, "
        f"loss {metrics['loss']:.4f}, {metrics['count']:,} networks"
    )


def _announce(trainer, config: dict) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    sizes = ", ".join(f"{len(v):,} {k}" for k, v in trainer.splits.items())
    count = trainer.processes.size
    place = f"{trainer.device.type}, {count} processes" if count > 1 else str(trainer.device)
    print(f"networks   {_layout(trainer.dataset)}: {sizes}")
    print(f"model      {parameters:,} parameters, {_kind(config)}, on {place}")
    if trainer.total_steps:
        print(f"resumed    after epoch {trainer.epoch}, step {trainer.step} of {trainer.steps_per_epoch} in the next")


def _report(result: dict, trainer) -> None:
    reasons = {"patience": "no better validation result for the configured patience", "max_epochs": "all epochs done",
               "max_steps": "max_steps reached", "interrupted": "interrupted; continue with --resume"}  # fmt: skip
    print(f"stopped    {reasons[result['stopped']]}: {trainer.epoch} epochs, {trainer.total_steps:,} steps, "
          f"{result['wall_seconds']:.0f} s")  # fmt: skip
    if result["best"]:
        print(f"validation {format_score(result['best']['val'])} (epoch {result['best']['epoch']})")
    if result["test"]:
        print(f"test       {format_score(result['test'])}")
    if result["step_seconds_median"]:
        print(f"step       {1000 * result['step_seconds_median']:.1f} ms (median)")
    print(f"files      {', '.join(sorted(os.listdir(trainer.out)))} in {trainer.out}")
