"""A training step of ours against the original's, in turn in one process: same weights, same batch, same loss.

    python -m bench.compare_original --scalegmn CHECKOUT [--config NAME ...] [--batch own 16 ...] [--rounds N]
        [--seconds S] [--limit S] [--others SHARE] [--dtype float32|bfloat16]
        [--compiled] [--tuned-allocator] [--memory] [--no-eager] [--output FILE]

CHECKOUT is one of https://github.com/jkalogero/scalegmn, which is imported from there. The weights are the original's
initial ones plus normal noise of 0.1: at the initial ones some outputs do not depend on the input. Outputs are compared
first, in eval mode and float32; where they differ by more than 1e-3 of the largest nothing is timed. Batches are built
beforehand on both sides. A step is forward, loss, backward, clipping and AdamW, dropout as configured; with bfloat16
the forward of both runs under autocast. Rows of float32 time a third side, ours under autocast. Where bfloat16 dies of
SIGILL (a virtual machine that announces AMX and has none), set ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16. The floor is the
matrix products that our step asks for (recomputation is not counted) at the peak of a square float32 one of 2048 that
is measured in the same process.

Each measurement is a process of its own, and its row is written at once, in the place of the row of the same
configuration, batch, dtype and mode: configurations can be measured one at a time. A row that was timed while other
processes took more than --others of the processors is not written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import comparison, selection
from bench.checkouts import Repository
from bench.configs import flops_at
from bench.original import FILE, Original
from bench.training import Problem
from scalegmn_fast.models import from_config, published_config, published_names
from scalegmn_fast.testing import randomize_parameters

OWN = "its own batch"


class Theirs:
    """The original's model of a configuration, or of one that ``change`` changed."""

    def __init__(self, root: str, name: str, change: Callable[[dict], object] | None = None):
        self.original = Original(root)
        self.config = self.original.config(name, change)
        torch.manual_seed(0)
        self.model = self.original.model(self.config)
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        weights, biases = problem.weights, problem.biases
        batch = self.original.batch(self.config, *problem.on_host(), problem.input_value, problem.sign_mask)
        batch = batch.to(problem.device)
        called = comparison.compiled_model(self.model) if compiled else self.model
        return lambda: self.original.call(called, batch, weights, biases)


class Ours:
    """Our model of a configuration."""

    def __init__(self, name: str):
        self.model = from_config(published_config(name))
        randomize_parameters(self.model, spread=0.1, generator=torch.Generator().manual_seed(0))

    def forward(self, problem: Problem, compiled: bool = False) -> Callable[[], object]:
        graph = problem.graph()
        return lambda: self.model(graph)


def compare(root: str, name: str, batch: int, dtype: str, mode: str, rounds: int, seconds: float) -> dict:
    """What a row says of times."""
    config = published_config(name)
    limits = {"rounds": rounds, "seconds": seconds}
    row = comparison.compare(Theirs(root, name), Ours(name), Problem(config, batch), dtype, mode, **limits)
    return comparison.with_floor(row, flops_at(from_config(config), config, batch)[1])


def peak(root: str | None, name: str, batch: int, dtype: str) -> int:
    """Peak bytes of the first training step over those before it, of the original in ``root`` or of ours (None)."""
    side = Theirs(root, name) if root else Ours(name)
    return comparison.peak(side, Problem(published_config(name), batch), dtype)


def kinds(row: dict) -> set[str]:
    """The tables that a row belongs in: that of batch 16, and that of its configuration's own batch or another's."""
    own = row["batch"] == selection.own_batch(row["config"])
    return {OWN if own else f"batch {row['batch']}"} | ({"batch 16"} if row["batch"] == 16 else set())


SCALEGMN = Repository(
    option="--scalegmn",
    place="github.com/jkalogero/scalegmn",
    file=FILE,
    names=published_names(),
    own_batch=selection.own_batch,
    batch=["16"],
)
COMPARISON = comparison.Comparison(
    name="compare_original",
    summary=__doc__.splitlines()[0],
    original=SCALEGMN,
    compare=compare,
    peak=peak,
    kinds=kinds,
    first="batch 16",
)
main, page = COMPARISON.main, COMPARISON.page

if __name__ == "__main__":
    main()
