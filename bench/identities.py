"""What each exact identity of the plan of work gains: a training step with it, against the step without.

    python -m bench.identities [--batch 16] [--config NAME ...]

Per configuration these are timed in turn: none of the identities and all of them on the reference backend, all of them
on the default one, and there all but one. The gain of an identity is (all but it) / (all): without row programs,
but for ``across``, which is taken from a plan that runs them. Forward + backward, float32.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import fields, replace

import torch

from bench import harness
from scalegmn_fast import backend
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config, published_config
from scalegmn_fast.nn import WorkPlan, set_work_plan
from scalegmn_fast.testing import random_network

CONFIGS = ("mnist_cls/scalegmn", "mnist_cls/scalegmn_bidir", "cifar10/scalegmn_relu", "cifar10/scalegmn_hetero")


def training_step(model, batch: int):
    """A closure that runs forward and backward on one fixed random batch."""
    options = model.options
    generator = torch.Generator().manual_seed(0)
    weights, biases = random_network(
        options.layout, batch, d_e=options.d_in_e, generator=generator, dtype=torch.float32
    )
    mask = torch.arange(batch) % 2 == 0 if options.symmetry == "hetero" else None
    graph = GraphBatch.from_weights(weights, biases, sign_mask=mask)

    def step():
        model.zero_grad()
        out = model(graph)
        values = [out] if torch.is_tensor(out) else [*out[0], *out[1]]
        sum(value.square().mean() for value in values).backward()

    return step


def measure(name: str, batch: int, seconds: float) -> dict:
    """One row: medians of every plan, and gains."""
    model = from_config(published_config(name)).eval()
    step = training_step(model, batch)

    def with_plan(work: WorkPlan, chosen: str):
        def run():
            set_work_plan(model, work)
            with backend(chosen):
                step()

        return run

    cases = {
        "none, reference": with_plan(WorkPlan.none(), "reference"),
        "all, reference": with_plan(WorkPlan(), "reference"),
        "all, fused ops": with_plan(WorkPlan(), "auto"),
    }
    # Row programs need all identities but `across`: each of these is taken away from the plan without programs.
    unfused = replace(WorkPlan(), fuse=False)
    names = [item.name for item in fields(WorkPlan) if item.name not in ("across", "fuse")]
    cases |= {without: with_plan(replace(unfused, **{without: False}), "auto") for without in names}
    cases |= {"across": with_plan(WorkPlan(across=False), "auto"), "fuse": with_plan(unfused, "auto")}
    with harness.others() as others:
        times = harness.alternate(cases, seconds=seconds, least=3)
    return {
        "benchmark": "identities",
        "config": name,
        "batch": batch,
        "times": {case: harness.summary(values) for case, values in times.items()},
        "all_against_none": harness.ratio(times["none, reference"], times["all, reference"]),
        "fused_against_none": harness.ratio(times["none, reference"], times["all, fused ops"]),
        "others": others.share,
        "gain": {
            **{without: harness.ratio(times[without], times["fuse"]) for without in names},
            **{without: harness.ratio(times[without], times["all, fused ops"]) for without in ("across", "fuse")},
        },
    }


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    names = [item.name for item in fields(WorkPlan) if any(item.name in row["gain"] for row in data["rows"])]
    header = ["configuration", "batch", "none (ms)", "all (ms)", "none / all", "none / fused", *names]
    body = [
        [
            row["config"],
            row["batch"],
            f"{row['times']['none, reference']['median_ms']:.0f}",
            f"{row['times']['all, reference']['median_ms']:.0f}",
            f"{row['all_against_none']:.2f}x",
            f"{row['fused_against_none']:.2f}x",
            *(f"{row['gain'][name]:.2f}x" if name in row["gain"] else "" for name in names),
        ]
        for row in data["rows"]
    ]
    return harness.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--config", action="append", help="a published name; repeatable")
    parser.add_argument("--seconds", type=float, default=20.0, help="per configuration")
    parser.add_argument(
        "--others",
        type=float,
        default=harness.MOST_OTHERS,
        help="a row is dropped if others take more of the processors",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in args.config or CONFIGS:
        row = measure(name, args.batch, args.seconds)
        if harness.record(harness.RESULTS / "identities.json", row, ("config", "batch"), args.others):
            rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
