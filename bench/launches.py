"""How many operators a training step runs: on a GPU each is a kernel or a few, and at small batches they set the time.

    python -m bench.launches [--config NAME ...] [--batch 16] [--output FILE]

Forward, loss and backward; clipping and AdamW come to a few operators over all parameters at once. Counted below
autograd on the device `meta`, where nothing is computed; views and empty tensors are left out. *plain*: the formulas
as PyTorch operators (no identity of the plan of work); *reference*: with the identities; *kernels*: `symmetrize` and
`segment_reduce` as one operator each; *row programs*: rounds as row programs, one operator each. One operator of
PyTorch can be several kernels (a sorted `index_put`), and so can one of ours.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from bench import harness, selection
from bench.training import Problem
from scalegmn_fast import backend
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.nn import WorkPlan, set_work_plan
from scalegmn_fast.testing import Dispatched

KEY = ("config", "batch")
#: path -> (plan of work, whether ops of this package are counted by what their reference runs)
PATHS = {
    "plain": (WorkPlan.none(), True),
    "reference": (replace(WorkPlan(), fuse=False), True),
    "kernels": (replace(WorkPlan(), fuse=False), False),
    "row programs": (WorkPlan(), False),
}


def forward_backward(name: str, batch: int, path: str) -> Dispatched:
    """What forward, loss and backward of a published configuration run on ``meta``, after a first forward."""
    work, inside = PATHS[path]
    config = published_config(name)
    problem, model = Problem(config, batch).to("meta"), from_config(config).to("meta").train()
    set_work_plan(model, work)
    graph = problem.graph()
    # on `meta` no engine has to be there for row programs to be written
    with backend("reference"), mock.patch("scalegmn_fast.backends.fuses", lambda *_: True):
        with torch.no_grad():
            model(graph)  # what the graph's plan keeps is made
        with Dispatched(inside) as found:
            problem.loss(model(graph)).backward()
    return found


def measure(name: str, batch: int) -> dict:
    """One row: operators per path."""
    counts = {path: forward_backward(name, batch, path).total for path in PATHS}
    return {"benchmark": "launches", "config": name, "batch": batch, "operators": counts}


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["configuration", "batch", *PATHS]
    body = [[row["config"], row["batch"], *(row["operators"][path] for path in PATHS)] for row in data["rows"]]
    return harness.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    selection.add_arguments(parser, batch=["16"])
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "launches.json")
    args = parser.parse_args()
    selection.check(parser, args)
    warnings.simplefilter("ignore")
    rows = [measure(name, batch) for name, batch in selection.cases(args)]
    print(page(harness.merge(args.output, rows, KEY)))


if __name__ == "__main__":
    main()
