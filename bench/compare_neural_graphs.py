"""A training step of our Neural Graphs models against the original's, in turn in one process.

    python -m bench.compare_neural_graphs --neural-graphs CHECKOUT [--config NAME ...] [--batch 128 16 ...] [--rounds N]
        [--seconds S] [--limit S] [--others SHARE] [--dtype float32|bfloat16]
        [--compiled] [--tuned-allocator] [--memory] [--no-eager] [--output FILE]

CHECKOUT is one of https://github.com/mkofinas/neural-graphs, which is imported from there and needs einops, hydra-core,
random-fourier-features-pytorch and torch_geometric. The configurations are the published ones for INRs. Everything is
as in `bench.compare_original` but: both sides build their graphs within the step, the original from the weights and
biases that it is called with; the networks have the means and deviations by which the configuration standardises them;
the optimiser is the released one. Where the original runs out of memory the row says so: compare at a smaller batch.

The floor is three times the matrix products of a forward of ours, those that its programs run included (backward has
two for each, recomputation is not counted), at the peak of a square one of 2048 that is measured in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import comparison
from bench.checkouts import Repository
from bench.original_neural_graphs import FILE, NEEDS, OriginalNeuralGraphs
from bench.training import Problem
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config, neural_graphs_config, neural_graphs_names
from scalegmn_fast.ops.row_program import SectionWriter
from scalegmn_fast.testing import randomize_parameters

#: Batch size of the released configurations for INRs.
BATCH = 128
#: Steps of the original before its time is taken: its scripted modules are optimised in the first ones.
WARM_UP = 2


def names() -> list[str]:
    """The published configurations for networks of one layout."""
    return [name for name in neural_graphs_names() if "input_channels" not in neural_graphs_config(name)]


def is_editing(config: dict) -> bool:
    """Whether a constructor dictionary is of a model that returns networks."""
    return "out_scale" in config or "normalize" in config


def task(config: dict) -> dict:
    """What `Problem` and `Training` read: of the constructor dictionary, and of the configurations released with it."""
    edits = is_editing(config)
    return {
        "scalegmn_args": {
            "symmetry": "permutation",
            "equivariant": edits,
            "readout_args": {"d_out": config["d_out"]},
        },
        "data": {"layer_layout": config["layer_layout"], "image_size": [28, 28]},
        "train_args": {"loss": "CE"},
        "optimization": {
            "clip_grad_max_norm": 1.0 if edits else 10.0,
            "optimizer_args": {"lr": 1e-3, "weight_decay": 5e-4, "amsgrad": True},
            "scheduler_args": {"warmup_steps": 10_000 if edits else 1000},
        },
    }


def problem_of(config: dict, batch: int) -> Problem:
    """Random networks with the statistics of the configuration, per layer."""
    problem = Problem(task(config), batch)
    stats = config.get("stats") or config["graph_constructor"]["stats"]
    for kind, tensors in (("weights", problem.weights), ("biases", problem.biases)):
        for tensor, mean, std in zip(tensors, stats[f"{kind}_mean"], stats[f"{kind}_std"], strict=True):
            tensor.sub_(tensor.mean()).mul_(std / tensor.square().mean().sqrt()).add_(mean)
    return problem


class Theirs:
    """The original's model of a configuration."""

    def __init__(self, root: str, config: dict):
        torch.manual_seed(0)
        self.model = OriginalNeuralGraphs(root).model(config)
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        networks = tuple(problem.weights), tuple(problem.biases)
        called = comparison.compiled_model(self.model) if compiled else self.model
        return lambda: called(networks)


class Ours:
    """Our model of a configuration."""

    def __init__(self, config: dict):
        self.model = from_config(config)
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        return lambda: self.model(GraphBatch.from_weights(problem.weights, problem.biases))


@contextmanager
def program_products():
    """Context: a list, one entry per linear step of every row program that is written: its operations."""
    found, linear = [], SectionWriter.linear

    def counted(section, a, weight, bias=None):
        found.append(2 * section.rows * weight.numel())
        return linear(section, a, weight, bias)

    SectionWriter.linear = counted
    try:
        yield found
    finally:
        SectionWriter.linear = linear


def forward_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products of a call, inside row programs and outside."""
    with program_products() as inside, FlopCounterMode(display=False) as outside:
        call()
    return sum(inside) + outside.get_total_flops()


def compare(root: str, name: str, batch: int, dtype: str, mode: str, rounds: int, seconds: float) -> dict:
    """What a row says of times, and of the floor."""
    config = neural_graphs_config(name)
    problem, ours = problem_of(config, batch), Ours(config)
    limits = {"rounds": rounds, "seconds": seconds, "warm_up": WARM_UP}
    row = comparison.compare(Theirs(root, config), ours, problem, dtype, mode, **limits)
    return comparison.with_floor(row, 3 * forward_flops(ours.forward(problem)))


def peak(root: str | None, name: str, batch: int, dtype: str) -> int:
    """Peak bytes of the first training step over those before it, of the original in ``root`` or of ours (None)."""
    config = neural_graphs_config(name)
    return comparison.peak(Theirs(root, config) if root else Ours(config), problem_of(config, batch), dtype)


def kinds(row: dict) -> set[str]:
    """The table that a row belongs in: its model's, at its batch size."""
    model = "NG-T" if "rtransformer" in row["config"] else "NG-GNN"
    return {f"{model}, batch {row['batch']}"}


NEURAL_GRAPHS = Repository(
    option="--neural-graphs",
    place="github.com/mkofinas/neural-graphs",
    file=FILE,
    names=names(),
    own_batch=lambda name: BATCH,
    batch=["own"],
    needs=NEEDS,
)
COMPARISON = comparison.Comparison(
    name="compare_neural_graphs",
    summary=__doc__.splitlines()[0],
    original=NEURAL_GRAPHS,
    compare=compare,
    peak=peak,
    kinds=kinds,
)
main, page = COMPARISON.main, COMPARISON.page

if __name__ == "__main__":
    main()
