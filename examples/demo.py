"""From images to a trained graph network over networks in a few minutes, on a CPU.

Fits a small coordinate network (SIREN) to every digit of scikit-learn's bundled set, several times from different
random starts; trains a ScaleGMN to tell the digit from the network's weights; shows that renaming and flipping hidden
neurons does not change its answer; times a training step on the reference and the fused backend; draws pictures.

    python examples/demo.py [--out runs/demo]
    python examples/demo.py --config examples/digits_neural_graphs.yml --out runs/demo_neural_graphs

An interrupted demo continues where it was.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch

import scalegmn_fast
from scalegmn_fast.data import FitSettings, PackedDataset, fit_inrs, load_images, reconstruct
from scalegmn_fast.data.files import atomic_write
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.testing.group import act, random_group_element
from scalegmn_fast.train import Trainer, load_config
from scalegmn_fast.train.evaluate import load_model

HERE = Path(__file__).resolve().parent
NETWORKS = FitSettings(hidden=(8, 8), w0=(5.0,), steps=200, learning_rate=5e-3, copies=4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/demo", help="where everything is written (default runs/demo)")
    parser.add_argument("--config", default=str(HERE / "digits.yml"), help="training configuration")
    parser.add_argument("--copies", type=int, default=NETWORKS.copies, help="networks per image")
    parser.add_argument("--images", type=int, help="use the first N images only")
    parser.add_argument("--epochs", type=int, help="instead of the configuration's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    started = time.perf_counter()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    title(1, "Images become networks")
    images = load_images("digits")
    if args.images is not None:
        images = images.limited(args.images)
    settings = FitSettings(**{**vars(NETWORKS), "copies": args.copies})
    dataset = fit_inrs(images, out / "inrs.safetensors", settings)
    quality = dataset.extra("psnr")
    layout = "-".join(map(str, dataset.layout))
    print(f"{len(images):,} images of 8 x 8 pixels, {args.copies} networks {layout} each: {len(dataset):,} networks")
    print(f"quality of the fit: {quality.median():.1f} dB PSNR (median), {quality.min():.1f} dB (worst)")
    print("each network has its own random start; all networks of an image are in the same split")

    config = load_config(args.config)
    name = "ScaleGMN" if "scalegmn_args" in config else "Neural Graphs model"
    symmetry = config.get("scalegmn_args", {}).get("symmetry", "permutation")
    title(2, f"A {name} learns to read them")
    if args.epochs is not None:
        config["train_args"]["num_epochs"] = args.epochs
    run = out / "run"
    trainer = Trainer.from_config(config, dataset, run, device=args.device, resume=True, progress=True)
    if trainer.stopped not in (None, "interrupted"):
        print(f"{run} holds a finished run, shown here; remove the directory to train again")
    elif trainer.total_steps:
        print(f"continuing the run in {run} after step {trainer.total_steps:,}")
    result = trainer.fit()
    if result["stopped"] == "interrupted":
        print(f"\ninterrupted after {trainer.total_steps:,} steps; nothing is lost, the same command continues")
        return 130
    test = result["test"]
    print(f"{result['parameters']:,} parameters, {len(result['epochs'])} epochs, {result['wall_seconds']:.0f} s")
    print(f"test accuracy {100 * test['accuracy']:.1f}% on {test['count']:,} networks of unseen images (chance: 10%)")

    title(3, "The same function gets the same answer")
    model, _, _ = load_model(run / "best.pt")
    change, count = symmetry_error(model, dataset, symmetry)
    flipped = ", and flipped in sign at random" if symmetry == "sign" else ""
    print(f"hidden neurons of {count} test networks shuffled{flipped}:")
    print(f"largest change of an output, relative to the largest output: {change:.1e}")

    title(4, "Step time")
    print_step_times(model, dataset, trainer.config["batch_size"], torch.device(args.device))

    title(5, "Pictures")
    draw_networks(out / "networks.png", images, dataset, model, name)
    print(f"{out / 'networks.png'}: digits, their networks, and what the model says")
    print(f"{run / 'curves.png'}: loss, accuracy and learning rate")
    print(f"{run / 'confusion.png'}: which digits are taken for which")
    print(f"\ndone in {time.perf_counter() - started:.0f} s")
    return 0


def title(number: int, text: str) -> None:
    print(f"\n{number}. {text}\n{'-' * (len(text) + 3)}", flush=True)


def symmetry_error(model, dataset: PackedDataset, symmetry: str) -> tuple[float, int]:
    """Largest relative change of the outputs under a random symmetry of each network, and of how many networks."""
    weights, biases = dataset.weights(dataset.split("test")[:100])
    generator = torch.Generator().manual_seed(0)
    element = random_group_element(
        dataset.layout, symmetry, batch=len(biases[0]), generator=generator, dtype=torch.float32
    )
    with torch.no_grad():
        before = model(GraphBatch.from_weights(weights, biases))
        after = model(GraphBatch.from_weights(*act(weights, biases, element)))
    return ((after - before).abs().max() / before.abs().max()).item(), len(before)


def print_step_times(model, dataset: PackedDataset, batch_size: int, device: torch.device, rounds: int = 20) -> None:
    """Times forward and backward of one batch on both backends, in turn, and prints the medians."""
    served = {op: by[device.type] for op, by in scalegmn_fast.build_info()["auto"].items()}
    names = ["reference"] + (["auto"] if set(served.values()) != {"reference"} else [])
    graph, labels = dataset.batch(dataset.split("train")[:batch_size])
    graph, labels, model = graph.to(device=device), labels.to(device), model.to(device).train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        torch.nn.functional.cross_entropy(model(graph), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    times: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds + 3):
        for name in names:
            with scalegmn_fast.backend(name):
                seconds = step()
            if k >= 3:
                times[name].append(seconds)
    model.cpu().eval()
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"forward and backward of {len(labels)} networks on {device}, median of {rounds}, backends in turn:")
    print(f"  reference  {1000 * medians['reference']:7.1f} ms")
    if "auto" in medians:
        fused = ", ".join(f"{op}: {name}" for op, name in served.items() if name != "reference")
        ratio = medians["reference"] / medians["auto"]
        print(f"  fused      {1000 * medians['auto']:7.1f} ms   {ratio:.2f}x   ({fused})")
    else:
        print("  fused      no compiled backend is installed here (see scalegmn-fast info)")


def draw_networks(path: Path, images, dataset: PackedDataset, model, name: str) -> None:
    """Draws, for one test image per digit: the pixels, the network at 8 x 8 and at 64 x 64, and the prediction."""
    from matplotlib.figure import Figure

    test = dataset.split("test")
    labels = dataset.labels[test]
    chosen = torch.stack([test[(labels == digit).nonzero()[0, 0]] for digit in labels.unique()])
    with torch.no_grad():
        predicted = model(dataset.batch(chosen)[0]).softmax(1).max(1)
    pixels = images.scaled(dataset.extra("image_index", chosen).numpy())
    rows = [
        ("image\n8 x 8", torch.as_tensor(pixels).reshape(len(chosen), 8, 8)),
        ("network\nat 8 x 8", reconstruct(dataset, chosen, shape=(8, 8))[..., 0]),
        ("network\nat 64 x 64", reconstruct(dataset, chosen, shape=(64, 64))[..., 0]),
    ]
    figure = Figure(figsize=(1.15 * len(chosen) + 0.9, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots(3, len(chosen), squeeze=False)
    for row, (label, pictures) in enumerate(rows):
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=10, fontsize=10)
        for column, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_color("#d0d4d9")
    for column, (share, digit) in enumerate(zip(*predicted, strict=True)):
        right = digit == dataset.labels[chosen[column]]
        axes[2, column].set_xlabel(
            f"“{digit}”  {100 * share:.0f}%", fontsize=11, color="#2a7f3f" if right else "#c0392b", labelpad=6
        )
    figure.suptitle(f"Test images, the networks fitted to them, and the digit that the {name} reads off their weights")
    with atomic_write(path) as f:
        figure.savefig(f, format="png")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is lost, the same command continues", file=sys.stderr)
        sys.exit(130)
