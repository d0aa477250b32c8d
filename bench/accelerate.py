"""What `accelerate` costs: a training step of a live original run by it over the same step of our own model, in turn.

    python -m bench.accelerate --scalegmn CHECKOUT [--config NAME ...] [--batch own 16 ...] [--rounds N] [--seconds S]
        [--limit S] [--others SHARE] [--output FILE]

CHECKOUT is one of https://github.com/jkalogero/scalegmn, which is imported from there. Both sides have the same
weights, networks and loss; a step is forward, loss, backward, clipping and AdamW, float32, dropout as configured.
*native*: `models.ScaleGMN` called with a `GraphBatch` built beforehand. *accelerated*: the original's object after
`scalegmn_fast.accelerate`, called with the original's PyG batch, which becomes a `GraphBatch` at every call, as in a
script. Outputs are compared first, in eval mode. Each row is measured in a process of its own and written at once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import scalegmn_fast
from bench import harness, isolated, selection
from bench.compare_original import Ours, Theirs
from bench.comparison import LIMIT, difference
from bench.original import FILE
from bench.training import Problem, Training
from scalegmn_fast.models import published_config, published_names

KEY = ("config", "batch")


def measure(root: str, name: str, batch: int, rounds: int, seconds: float) -> dict:
    """What a row says: times, accelerated over native, and the difference of outputs."""
    problem, ours, theirs = Problem(published_config(name), batch), Ours(name), Theirs(root, name)
    ours.model.load_state_dict(theirs.model.state_dict(), strict=True)
    scalegmn_fast.accelerate(theirs.model)
    report = scalegmn_fast.report(theirs.model)
    if not report.fused:
        return {"failed": str(report)}
    with torch.no_grad():
        error = difference(*(side.forward(problem)() for side in (_evaluated(ours), _evaluated(theirs))))
    if not error <= LIMIT:
        return {"difference": error, "failed": f"outputs differ by {error:.1e}"}
    cases = {name: _step(side, problem) for name, side in (("native", ours), ("accelerated", theirs))}
    with harness.others() as others:
        times = harness.alternate(cases, seconds=seconds, least=min(5, rounds), most=rounds)
    row = {side: harness.summary(values) for side, values in times.items()}
    return row | {
        "difference": error,
        "ratio": harness.ratios(times["accelerated"], times["native"]),
        "others": others.share,
    }


def _evaluated(side):
    side.model.eval()
    return side


def _step(side, problem: Problem) -> Callable[[], None]:
    return partial(Training(side.model, problem.config).step, side.forward(problem), problem)


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = ["configuration", "batch", "native (ms)", "accelerated (ms)", "accelerated / native", "p20 to p80"]
    body, found = [], []
    order = {name: place for place, name in enumerate(published_names())}
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


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accelerate", description=__doc__.splitlines()[0])
    parser.add_argument("--scalegmn", required=True, metavar="CHECKOUT", help="of github.com/jkalogero/scalegmn")
    selection.add_arguments(parser, batch=["16"])
    parser.add_argument("--rounds", type=int, default=60, help="at most, per row")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="per row, after which no round begins past the fifth"
    )
    selection.add_output(parser, "accelerate", "a row")
    args = parser.parse_args(given)
    selection.check(parser, args)
    if args.rounds < 1:
        parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
    if not (Path(args.scalegmn) / FILE).is_file():
        parser.error(f"argument --scalegmn: expected a checkout that has {FILE}, got {args.scalegmn!r}")
    rows = []
    for name, batch in selection.cases(args):
        row = {"benchmark": "accelerate", "config": name, "batch": batch}
        row |= isolated.attempt(measure, args.scalegmn, name, batch, args.rounds, args.seconds, seconds=args.limit)
        if harness.record(args.output, row, KEY, args.others):
            rows.append(row)
    print(page({"rows": rows}))


if __name__ == "__main__":
    main()
