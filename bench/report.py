"""Writes docs/benchmarks.md from the rows in bench/results; no number on that page is typed by hand.

python -m bench.report
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import (
    accelerate,
    compare_neural_graphs,
    compare_original,
    configs,
    engine,
    gpu,
    harness,
    identities,
    large_networks,
    launches,
    ops,
    plots,
    scaling,
)

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"

INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from `bench/results`. Everything on one line was timed in one run, in turn; a
ratio is the median over rounds of two neighbouring measurements. GPU: {gpu}.
"""

#: (result file, its rows as text, what draws its figure, title, text)
SECTIONS = (
    (
        "compare_original",
        compare_original.page,
        plots.speed_ups,
        "Against the original",
        "`python -m bench.compare_original --scalegmn CHECKOUT`. A training step (forward, loss, backward, clipping, "
        "AdamW; dropout as configured) of the original and of ours, in turn in one process, with the same weights, "
        "random networks and loss; batches are built beforehand. Outputs are compared first, in eval mode: the last "
        "column is the largest difference over the largest value. *Compiled*: the original under `torch.compile`. "
        "*Tuned allocator*: both with a glibc that keeps its pages, so that no step pays for fresh ones. *Floor*: the "
        "matrix products that our step asks for (recomputation is not counted) at the peak of a square float32 product "
        "of 2048, measured in the same process; *original / floor* (in the figure a diamond) is the ratio at that "
        "rate. *Memory*: the highest resident set during a step minus that before it, each side in a process of its "
        "own.",
    ),
    (
        "compare_neural_graphs",
        compare_neural_graphs.page,
        None,
        "Neural Graphs against the original",
        "`python -m bench.compare_neural_graphs --neural-graphs CHECKOUT`. As above, for the two networks of Neural "
        "Graphs; here both sides build their graphs within the step. *Floor*: three times the matrix products of a "
        "forward of ours (recomputation is not counted) at the peak of a square float32 product of 2048, measured in "
        "the same process. The original gets two steps more before it is timed: its modules are scripted.",
    ),
    (
        "accelerate",
        accelerate.page,
        None,
        "The original's objects, accelerated",
        "`python -m bench.accelerate --scalegmn CHECKOUT --neural-graphs CHECKOUT`. A training step of the original's "
        "model after `scalegmn_fast.accelerate`, from what it takes (ScaleGMN its PyG batches, Neural Graphs the "
        "weights and biases), over that of our own model from a `GraphBatch` built "
        "beforehand: what recognising the model, following its parameters and converting the batch cost.",
    ),
    (
        "configs",
        configs.page,
        None,
        "All configurations",
        "`python -m bench.configs`. Ours alone, float32: forward (without gradients) and training step, with p20 to "
        "p80. The operations are those of the matrix products that the model asks for, backward included and "
        "recomputation not; their share is over the peak of a square float32 product of 2048, measured beside it, and "
        "over the median. Memory is the highest resident set during one call minus that before it.",
    ),
    (
        "scaling",
        scaling.page,
        plots.scaling,
        "Large networks",
        "`python -m bench.scaling [--scalegmn CHECKOUT]`. One network of growing width, read by `mnist_cls/scalegmn` "
        "at 64 hidden features, float32; the original's memory up to the size at which it fails. A size that fails is "
        "named with the reason.",
    ),
    (
        "large_networks",
        large_networks.page,
        None,
        "ResNet-18, VGG-19 and ViT-tiny",
        "`python -m bench.large_networks`. Networks with random weights as graphs, from 3 x 224 x 224 images, kernels "
        "as 3 x 3 numbers, read by a model of 4 rounds and 64 features along the weights (`svhn/scalegmn_relu`, the "
        "whole graph read), float32, edge features not kept. The first three columns after the sizes are of tracing "
        "and of making a graph. Memory is the highest resident set during a call minus that before it.",
    ),
    (
        "ops",
        ops.page,
        None,
        "The ops",
        "`python -m bench.ops`. The floor is the longer of two times: the bytes that must move over the copy "
        "bandwidth, and the operations of the matrix products (backward: twice those of forward) over the peak of a "
        "square float32 product of 2048, both measured first in the same run. *row_program message*: edge features "
        "times gathered rows, linear map, symmetrised layer norm and activation, linear map, sum per segment; *edge "
        "update*: a linear map of edge features, gated by an mlp over both ends. Backward runs the programs' forward "
        "again, which the floor does not count. Of `symmetrize` and `segment_reduce` backward is compared with the "
        "reference backend's closed form, not with PyTorch's own autograd.",
    ),
    (
        "identities",
        identities.page,
        None,
        "The exact identities",
        "`python -m bench.identities`. A training step (forward and backward, float32): on the reference backend with "
        "none and with all of the identities of the plan of work, and with all of them and the fused ops (none / "
        "fused). *fuse* is what row programs give over the same identities run as PyTorch operators; the columns "
        "before it are what that unfused step costs without one identity, over the unfused step with all. *across* is "
        "the step as row programs without it, over the same with it.",
    ),
    (
        "engine",
        engine.page,
        None,
        "Parts of the CPU engine",
        "`python -m bench.engine`. A training step with a part of the engine changed over one with nothing changed, "
        "two processes in turn: above 1 the part as it comes pays. p20 to p80 of the rounds in brackets.",
    ),
    (
        "launches",
        launches.page,
        None,
        "Operators of a training step",
        "`python -m bench.launches`. Forward, loss and backward, counted below autograd without computing anything; "
        "views and empty tensors are left out. On a GPU each is one kernel or a few. *plain*: the formulas as PyTorch "
        "operators; *reference*: with the identities; *kernels*: `symmetrize` and `segment_reduce` as one operator "
        "each; *row programs*: rounds as row programs, one operator each. The kernels that a GPU really starts are "
        "counted by `make gpu-check`.",
    ),
)

GPU = """## On {name}

`make gpu-check`. A training step of each side in turn, at the same batch and loss; products in float32, in TF32, or
under autocast to bfloat16. *ours*: as PyTorch operators over fused ops; *rows*: rounds as row programs, of the engine
that is named; *graph*: the whole step captured in a CUDA graph and replayed; *reference*: ours on the reference
backend; *original*, and compiled. The floor is the products that a step asks for at the rate of a large square one of
the type. Memory is the highest allocated during a step minus that before. *launches*: kernels, copies and fills. The
fused message is that of `python -m bench.message`.

{page}

{machines}
"""


def section(name: str, page, draw, title: str, text: str) -> str:
    """A part of the page, its figure drawn; empty if there is no result file."""
    path = harness.RESULTS / f"{name}.json"
    if not path.exists():
        return ""
    data = json.loads(path.read_text())
    rows = [{"machine": data["machine"], **row} for row in data["rows"]]
    image = IMAGES / f"{name}.png"
    figure = f"![{title}](images/{image.name})\n\n" if draw is not None and draw(rows, image) else ""
    return f"## {title}\n\n{text}\n\n{figure}{page(data)}\n\n{harness.machine_lines(rows)}\n"


def gpu_names() -> list[str]:
    """The result files that `make gpu-check` wrote."""
    known = {name for name, *_ in SECTIONS}
    return sorted(path.stem for path in harness.RESULTS.glob("*.json") if path.stem not in known)


def gpu_section(name: str) -> str:
    """A GPU's part of the page."""
    data = json.loads((harness.RESULTS / f"{name}.json").read_text())
    return GPU.format(name=name, page=gpu.page(data), machines=harness.machine_lines(data["rows"]))


def main() -> None:
    gpus = gpu_names()
    parts = [INTRODUCTION.format(gpu=", ".join(gpus) or "not measured")]
    parts += [part for item in SECTIONS if (part := section(*item))]
    parts += map(gpu_section, gpus)
    PAGE.write_text("\n".join(parts))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0]).parse_args()
    main()
