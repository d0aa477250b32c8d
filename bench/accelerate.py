"""What `accelerate` costs: a training step of a live original run by it over the same step of our own model, in turn.

    python -m bench.accelerate [--scalegmn CHECKOUT] [--neural-graphs CHECKOUT] [--config NAME ...] [--batch own 16 ...]
        [--rounds N] [--seconds S] [--limit S] [--others SHARE] [--output FILE]

CHECKOUT is one of https://github.com/jkalogero/scalegmn or https://github.com/mkofinas/neural-graphs, which is imported
from there; one of them at least. All of their configurations by default (of Neural Graphs: those for INRs), ScaleGMN's
at batch 16, Neural Graphs' at the released 128. Both sides have the same weights, networks and loss; a step is forward,
loss, backward, clipping and AdamW, float32, dropout as configured. *native*: our model called with a `GraphBatch` built
beforehand. *accelerated*: the original's object after `scalegmn_fast.accelerate`, called with what the original takes,
a PyG batch or weights and biases, which becomes a `GraphBatch` at every call, as in a script. Outputs are compared
first, in eval mode. Each row is measured in a process of its own and written at once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import scalegmn_fast
from bench import compare_neural_graphs, compare_original, harness, isolated, selection
from bench.checkouts import Repository
from bench.comparison import LIMIT, Side, difference
from bench.training import Problem, Training
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import neural_graphs_config, published_config

KEY = ("config", "batch")


def scalegmn_sides(root: str, name: str, batch: int) -> tuple[Problem, Side, Side]:
    """The problem, our model and ScaleGMN's of a configuration."""
    problem = Problem(published_config(name), batch)
    return problem, compare_original.Ours(name), compare_original.Theirs(root, name)


def neural_graphs_sides(root: str, name: str, batch: int) -> tuple[Problem, Side, Side]:
    """The problem, our model and Neural Graphs' of a configuration."""
    config = neural_graphs_config(name)
    sides = compare_neural_graphs.Ours(config), compare_neural_graphs.Theirs(root, config)
    return compare_neural_graphs.problem_of(config, batch), *sides


@dataclass(frozen=True)
class Family:
    """An original and how its models are called.

    Attributes:
        original: its checkout and configurations.
        sides: (checkout, configuration, batch) -> the problem, our side, the original's side.
        graph: problem -> what our model is called with.
    """

    original: Repository
    sides: Callable[[str, str, int], tuple[Problem, Side, Side]]
    graph: Callable[[Problem], GraphBatch]


FAMILIES = {
    "scalegmn": Family(compare_original.SCALEGMN, scalegmn_sides, Problem.graph),
    "neural_graphs": Family(
        compare_neural_graphs.NEURAL_GRAPHS,
        neural_graphs_sides,
        lambda problem: GraphBatch.from_weights(problem.weights, problem.biases),
    ),
}
NAMES = [name for family in FAMILIES.values() for name in family.original.names]


def measure(family: str, root: str, name: str, batch: int, rounds: int, seconds: float) -> dict:
    """What a row says: times, accelerated over native, and the difference of outputs."""
    problem, ours, theirs = FAMILIES[family].sides(root, name, batch)
    ours.model.load_state_dict(theirs.model.state_dict(), strict=True)
    scalegmn_fast.accelerate(theirs.model)
    report = scalegmn_fast.report(theirs.model)
    if not report.fused:
        return {"failed": str(report)}
    calls = {"native": partial(ours.model, FAMILIES[family].graph(problem)), "accelerated": theirs.forward(problem)}
    ours.model.eval(), theirs.model.eval()
    with torch.no_grad():
        error = difference(*(call() for call in calls.values()))
    if not error <= LIMIT:
        return {"difference": error, "failed": f"outputs differ by {error:.1e}"}
    models = {"native": ours.model, "accelerated": theirs.model}
    cases = {
        side: partial(Training(model, problem.config).step, calls[side], problem) for side, model in models.items()
    }
    with harness.others() as others:
        times = harness.alternate(cases, seconds=seconds, least=min(5, rounds), most=rounds)
    row = {side: harness.summary(values) for side, values in times.items()}
    return row | {
        "difference": error,
        "ratio": harness.ratios(times["accelerated"], times["native"]),
        "others": others.share,
    }


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["configuration", "batch", "native (ms)", "accelerated (ms)", "accelerated / native", "p20 to p80"]
    body, found = [], []
    order = {name: place for place, name in enumerate(NAMES)}
    for row in sorted(data["rows"], key=lambda row: (order[row["config"]], row["batch"])):
        line = [row["config"], row["batch"]]
        if "failed" in row:
            body.append([*line, row["failed"], "", "", ""])
            continue
        found.append(row["ratio"]["median"])
        line += [f"{row[side]['median_ms']:.1f}" for side in ("native", "accelerated")]
        body.append([*line, f"{found[-1]:.3f}", f"{row['ratio']['p20']:.3f} to {row['ratio']['p80']:.3f}"])
    if found:
        body.append(
            [f"geometric mean (of {len(found)})", "", "", "", f"**{statistics.geometric_mean(found):.3f}**", ""]
        )
    return harness.table(header, body)


def arguments(given: list[str] | None = None) -> tuple[argparse.Namespace, list[tuple[str, str, str, int]]]:
    """The command line, checked, and its cases: (family, checkout, configuration, batch)."""
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=__doc__.splitlines()[0])
    for key, family in FAMILIES.items():
        family.original.add_option(parser, key, required=False)
    selection.add_arguments(parser, batch=[], names=[])
    parser.add_argument("--rounds", type=int, default=60, help="at most, per row")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="per row, after which no round begins past the fifth"
    )
    selection.add_output(parser, "accelerate", "a row")
    args = parser.parse_args(given)
    selection.check(parser, args, names=NAMES)
    if args.rounds < 1:
        parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
    roots = {key: root for key in FAMILIES if (root := getattr(args, key)) is not None}
    if not roots:
        parser.error(f"expected a checkout for {' or '.join(family.original.option for family in FAMILIES.values())}")
    found = []
    for key, root in roots.items():
        original = FAMILIES[key].original
        original.check(parser, root)
        names = [name for name in args.config or original.names if name in original.names]
        chosen = argparse.Namespace(config=names, batch=args.batch or original.batch)
        found += [(key, root, *case) for case in selection.cases(chosen, own_batch=original.own_batch)]
    without = sorted({*args.config} - {name for _, _, name, _ in found})
    if without:
        parser.error(f"argument --config: {without[0]!r} is of an original whose checkout is not given")
    return args, found


def main(given: list[str] | None = None) -> None:
    args, cases = arguments(given)
    rows = []
    for family, root, name, batch in cases:
        row = {"benchmark": "accelerate", "config": name, "batch": batch}
        row |= isolated.attempt(measure, family, root, name, batch, args.rounds, args.seconds, seconds=args.limit)
        if harness.record(args.output, row, KEY, args.others):
            rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
