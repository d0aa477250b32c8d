"""Arguments that benchmarks of models share: configurations, batch sizes, limits and the result file."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import harness
from scalegmn_fast.models import published_config, published_names


def add_output(parser: argparse.ArgumentParser, name: str, limited: str) -> None:
    """``--limit`` of what takes too long, ``--others`` and ``--output``."""
    parser.add_argument("--limit", type=float, default=1800.0, help=f"seconds after which {limited} is given up")
    parser.add_argument(
        "--others",
        type=float,
        default=harness.MOST_OTHERS,
        help="a row is dropped if others take more of the processors",
    )
    parser.add_argument("--output", type=Path, default=harness.RESULTS / f"{name}.json")


def add_arguments(parser: argparse.ArgumentParser, batch: list[str], names: Sequence[str] = published_names()) -> None:
    """``--config`` (all of ``names`` by default) and ``--batch`` (``batch`` by default)."""
    parser.add_argument("--config", nargs="+", default=names, metavar="NAME", help="published names")
    parser.add_argument("--batch", nargs="+", default=batch, metavar="N", help="sizes; own: the configuration's")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str] = published_names()) -> None:
    """End with a message that names the argument where one is wrong."""
    for name in args.config:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            parser.error(f"argument --config: {name!r} is no published configuration; the nearest is {near!r}")
    for batch in args.batch:
        if batch != "own" and not (batch.isdecimal() and int(batch) > 0):
            parser.error(f"argument --batch: expected 'own' or a positive number, got {batch!r}")


def own_batch(name: str) -> int:
    """The batch size that a configuration is published with."""
    return published_config(name)["batch_size"]


def cases(args: argparse.Namespace, own_batch: Callable[[str], int] = own_batch) -> list[tuple[str, int]]:
    """(configuration, batch size) pairs, each once."""
    return [
        (name, batch)
        for name in args.config
        for batch in dict.fromkeys(own_batch(name) if size == "own" else int(size) for size in args.batch)
    ]
