"""Networks of millions of edges, read by one model: seconds and memory of tracing, forward and training step.

    python -m bench.large_networks [--network NAME ...] [--config NAME] [--output FILE]

ResNet-18 and VGG-19's convolutions with random weights, traced from 3 x 224 x 224 images, kernels as 3 x 3 numbers
(larger ones spread over several nodes), read by ``svhn/scalegmn_relu``: 4 rounds of 64 features along the weights, the
whole graph read, so that every edge counts in every round. ViT-tiny, which has no scale symmetry, is traced alone.
float32; edge features are not kept (``edge_memory: recompute``); peak memory is the highest resident set during the
call, minus that before it. Each part runs in a process of its own that may take nine tenths of the free memory, and
fails as a result of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bench import harness, isolated, selection
from scalegmn_fast.graph import TracedNetwork, trace
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.testing.networks import VisionTransformer, resnet18, vgg19_convolutions

KEY = ("network", "config")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "vgg19_convolutions": vgg19_convolutions,
    "vit_tiny": VisionTransformer,
}
TRACED_ALONE = ("vit_tiny",)


def config_of(name: str, traced: TracedNetwork) -> dict:
    """A published configuration of ``d_e = 9`` for the layers of a traced network, its edges not kept."""
    config = published_config(name)
    config["data"]["layer_layout"] = list(traced.layout)
    config["scalegmn_args"]["edge_memory"] = "recompute"
    return config


def traced_network(name: str) -> tuple[nn.Module, TracedNetwork]:
    """A network and what is understood of it."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    return module, trace(module, torch.zeros(1, 3, 224, 224), kernel_size=(3, 3))


def tracing(name: str) -> dict:
    """Seconds and memory of tracing and of one graph, and their sizes."""
    spent: dict = {}

    def run() -> None:
        start = time.perf_counter()
        module, traced = traced_network(name)
        spent["trace_s"] = time.perf_counter() - start
        start = time.perf_counter()
        batch = traced.batch([module])
        spent["batch_s"] = time.perf_counter() - start
        spent.update(nodes=batch.num_nodes, edges=batch.num_edges, layers=len(traced.layout), symmetry=batch.symmetry)

    return {"trace_bytes": isolated.peak_bytes(run), **spent}


def reading(name: str, config: str, what: str) -> dict:
    """Seconds and peak memory of one forward (without gradients) or of forward and backward, after none before."""
    module, traced = traced_network(name)
    with torch.no_grad():
        batch = traced.batch([module])
    settings = config_of(config, traced)
    del module, traced
    model = from_config(settings)
    spent: dict = {}

    def run() -> None:
        start = time.perf_counter()
        if what == "forward":
            with torch.no_grad():
                out = model.eval()(batch)
        else:
            out = model(batch)
            out.square().sum().backward()
        spent[f"{what}_s"] = time.perf_counter() - start
        if not bool(torch.isfinite(out).all()):
            raise isolated.MeasurementError(f"{what}: output is not finite")

    with harness.others() as others:
        spent[f"{what}_bytes"] = isolated.peak_bytes(run)
    return spent | {"others": others.share}


def measure(name: str, config: str, limit: float) -> dict:
    """All parts of a row."""
    row = isolated.attempt(tracing, name, seconds=limit)
    if name in TRACED_ALONE or "failed" in row:
        return row
    most = 0.0
    for what in ("forward", "step"):
        part = isolated.attempt(partial(reading, name, config), what, seconds=limit)
        most = max(most, part.get("others") or 0.0)
        row |= {f"{what}_failed": part["failed"]} if "failed" in part else part
    return row | {"others": most}


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["network", "neurons", "edges", "trace (s)", "graph (s)", "MB"]
    header += ["forward (s)", "GB", "forward and backward (s)", "GB"]
    body = []
    for row in data["rows"]:
        line = [row["network"]]
        if "failed" in row:
            body.append([*line, row["failed"]] + [""] * (len(header) - 2))
            continue
        line += [row["nodes"], row["edges"], f"{row['trace_s']:.1f}", f"{row['batch_s']:.1f}"]
        line.append(f"{row['trace_bytes'] / 1e6:.0f}")
        for what in ("forward", "step"):
            if f"{what}_s" in row:
                line += [f"{row[f'{what}_s']:.1f}", f"{row[f'{what}_bytes'] / 1e9:.2f}"]
            else:
                line += [row.get(f"{what}_failed", "not run"), ""]
        body.append(line)
    return harness.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--config", default="svhn/scalegmn_relu", help="a published configuration of 3x3 kernels")
    selection.add_output(parser, "large_networks", "a part of a row")
    args = parser.parse_args()
    rows = []
    for name in args.network:
        row = {"benchmark": "large_networks", "network": name, "config": args.config}
        row |= measure(name, args.config, args.limit)
        if harness.record(args.output, row, KEY, args.others):
            rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
