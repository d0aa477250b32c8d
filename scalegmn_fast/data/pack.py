"""Pack a data set of networks in one of the field's formats into one memory-mapped file."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cnn_formats import is_cnn_park, is_cnn_zoo, read_cnn_park, read_cnn_zoo
from .cnns import CnnSet, open_packed, write_cnns
from .formats import NetworkSet, read_dws, read_nfn, read_stacked_npz
from .packed import write_packed
from .splits import draw_splits


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="folder of state dicts (DWS with --splits, else NFN naming), a stacked .npz, folder of a small CNN zoo "
        "(weights.npy, metrics.csv.gz, layout.csv), or of the CNN Wild Park (with --splits)",
    )
    parser.add_argument("output", help="packed file to write: .safetensors, or .npz")
    parser.add_argument("--splits", help="DWS, CNN Wild Park: JSON file that lists the networks of train, val and test")
    parser.add_argument(
        "--split-points",
        type=int,
        nargs=2,
        metavar=("VAL", "TEST"),
        default=(45_000, 50_000),
        help="NFN: first index of the validation and of the test networks (default: 45000 50000)",
    )
    parser.add_argument(
        "--prefix", default="randinit_smaller", help="NFN: what folder names start with (default: %(default)s)"
    )
    parser.add_argument(
        "--augmented", type=int, default=0, metavar="N", help="NFN: how many augmented sets to add for training"
    )
    parser.add_argument("--order", metavar="FILE", help="CNN zoo: row numbers, in the order in which rows are split")
    parser.add_argument("--step", type=int, default=86, help="CNN zoo: training step of the networks (default: 86)")
    parser.add_argument("--activation", help="CNN zoo: networks with this activation alone (relu, tanh)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="part of the training networks to hold out where the source has no validation part (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: %(default)s)")
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a metadata entry, VALUE as JSON or text; repeatable (w0=30, activation=tanh, image_shape=[28,28,1])",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def parse_metadata(entries: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` strings as a dict; a VALUE that is not JSON is text."""
    result: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            raise ValueError(f"--metadata: expected KEY=VALUE, got {entry!r}")
        try:
            result[key] = json.loads(text)
        except ValueError:
            result[key] = text
    return result


def _read(args: argparse.Namespace) -> NetworkSet | CnnSet:
    source = Path(args.source)
    if source.is_dir() and args.splits is None and is_cnn_zoo(source):
        return read_cnn_zoo(source, order=args.order, step=args.step, activation=args.activation)
    for name in ("order", "activation"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to the folder of a small CNN zoo, but {source} is none")
    if source.is_dir() and args.splits is not None and is_cnn_park(args.splits):
        return read_cnn_park(source, args.splits, show_progress=not args.quiet)
    if source.is_dir() and args.splits is not None:
        return read_dws(source, args.splits, show_progress=not args.quiet)
    if args.splits is not None:
        raise ValueError(f"--splits belongs to a folder of state dicts, but {source} is not a folder")
    if source.is_dir():
        return read_nfn(
            source,
            split_points=tuple(args.split_points),
            prefix=args.prefix,
            augmented=args.augmented,
            show_progress=not args.quiet,
        )
    return read_stacked_npz(source)


def run(args: argparse.Namespace) -> int:
    metadata = parse_metadata(args.metadata)
    networks = _read(args)
    splits = draw_splits(len(networks.splits), given=networks.splits, val_fraction=args.val_fraction, seed=args.seed)
    metadata = {**networks.metadata, "source": Path(args.source).name, **metadata}
    if isinstance(networks, CnnSet):
        write_cnns(args.output, replace(networks, splits=splits, metadata=metadata))
    else:
        write_packed(
            args.output, networks.weights, networks.biases, networks.labels, splits, metadata, extras=networks.extras
        )
    print(open_packed(args.output), file=sys.stdout)
    return 0
