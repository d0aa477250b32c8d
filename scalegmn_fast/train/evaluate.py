"""Evaluate a checkpoint on a split of a packed dataset."""

from __future__ import annotations

import argparse
import contextlib
import os

__all__ = ["configure", "fitting", "load_model", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``scalegmn-fast eval``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument("--data", required=True, metavar="PACKED", help="packed dataset (.safetensors or .npz)")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--batch-size", type=int, help="default: the run's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto (default): cuda where present")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--backend", help="reference, cpp, triton, cuda or auto")
    parser.add_argument("--json", metavar="FILE", help="write the metrics here")
    parser.add_argument("--plot", metavar="FILE", help="draw the confusion matrix (predictions, edits) here, as PNG")


def load_model(path: str | os.PathLike):
    """Rebuilds ``(model, statistics, checkpoint)`` from a checkpoint; the model is on the CPU, in evaluation mode.

    ``statistics`` is what ``PackedDataset.batch`` takes, or None. Raises as ``load_checkpoint`` and ``build_model``.
    """
    from scalegmn_fast.data import LayerStatistics

    from .checkpoint import load_checkpoint
    from .model import batch_statistics, build_model

    state = load_checkpoint(path)
    saved = state.get("statistics")
    statistics = None if saved is None else LayerStatistics.from_state_dict(saved)
    model = build_model(state["config"], state["layout"], statistics)
    model.load_state_dict(state["model"])
    return model.eval(), batch_statistics(state["config"], statistics), state


def fitting(dataset, state, checkpoint: str | os.PathLike):
    """``dataset`` as the model of a checkpoint's ``state`` reads it; ValueError where its networks do not fit."""
    from .model import fitted, varies

    layout = None if dataset.layout is None else [int(n) for n in dataset.layout]
    if layout != state["layout"] and not varies(state["config"]):
        raise ValueError(
            f"checkpoint '{checkpoint}' is for networks of layout {state['layout']}, '{dataset.path}' holds "
            f"{layout or 'several'}"
        )
    return fitted(state["config"], dataset)[1]


def backend_of(name: str | None):
    """The block in which the backend of a name serves; of None the one chosen before."""
    import scalegmn_fast

    return contextlib.nullcontext() if name is None else scalegmn_fast.backend(name)


def _unedited(dataset, indices, task, statistics, size: int = 256) -> dict[str, float]:
    """The task's metrics of the networks as they are."""
    import torch

    parts = [dataset.batch(part, statistics) for part in indices.split(size)]
    images = torch.cat([task.unedited(graph) for graph, _ in parts])
    return task.metrics(images, torch.cat([targets for _, targets in parts]))


def run(args: argparse.Namespace) -> int:
    """Prints the metrics; 0 when done."""
    import torch

    from .checkpoint import write_json
    from .distributed import joined, started
    from .plots import draw_confusion, draw_edits, draw_scatter, require_matplotlib
    from .tasks import task_of
    from .train import format_score, open_dataset, prepare_device
    from .trainer import deterministic, evaluate_split

    device = prepare_device(args.device, args.threads)
    if args.plot:
        require_matplotlib()
    model, statistics, state = load_model(args.checkpoint)
    dataset = fitting(open_dataset(args.data), state, args.checkpoint)
    indices = torch.as_tensor(dataset.split(args.split), dtype=torch.int64)
    if len(indices) == 0:
        raise ValueError(f"--split {args.split}: it is empty in '{args.data}'")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    task = task_of(state["config"], dataset, statistics)
    with joined(device), deterministic(), backend_of(args.backend):
        metrics = evaluate_split(
            model.to(device), dataset, indices, task, batch_size=args.batch_size or state["config"]["batch_size"],
            device=device, statistics=statistics,
        )  # fmt: skip
        if task.kind == "editing":
            metrics["unedited"] = _unedited(dataset, indices, task, statistics)
    if started()[0] > 0:
        return 0
    print(f"{args.split}: {format_score(metrics)} (epoch {state['epoch']})")
    if task.kind == "editing":
        print(f"the networks as they are: MSE {metrics['unedited']['loss']:.6f}")
    if "confusion" in metrics:
        counts = torch.tensor(metrics["confusion"])
        share = counts.diagonal() / counts.sum(1).clamp(min=1)
        print("per class: " + "  ".join(f"{k}: {100 * v:.1f}%" for k, v in enumerate(share.tolist())))
    if args.json:
        write_json(args.json, {"checkpoint": os.fspath(args.checkpoint), "split": args.split, **metrics})
    if args.plot and "confusion" in metrics:
        title = f"{args.split.capitalize()}: {100 * metrics['accuracy']:.1f}% of {metrics['count']} networks"
        draw_confusion(args.plot, metrics["confusion"], title)
    elif args.plot and task.kind == "editing":
        shown = indices[:10]
        graph, targets = dataset.batch(shown, statistics)
        with torch.no_grad(), backend_of(args.backend):
            edited = task.output(model, graph.to(device=device)).cpu()
        title = f"{args.split.capitalize()}: PSNR {metrics['psnr']:.1f} dB of {metrics['count']} networks"
        draw_edits(args.plot, {"network": task.unedited(graph), "edited": edited, "target": targets}, title)
    elif args.plot:
        draw_scatter(args.plot, metrics["actual"], metrics["predicted"], f"{args.split.capitalize()}: predictions")
    return 0
