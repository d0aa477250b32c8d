"""Check this installation: every op and every published model against float64, and equivariance.

`rows` has the table and how its errors are bounded, `ops` and `models` (`scalegmn`, `neural_graphs`) what is compared.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

import scalegmn_fast

from .. import backends
from ..models import neural_graphs_names, published_names
from .models import QUICK_WIDTH, ModelCase
from .neural_graphs import NeuralGraphsCase
from .ops import check_ops
from .rows import DTYPES, Row, guarded, header, line
from .scalegmn import ScaleGMNCase

__all__ = ["Row", "check_models", "check_ops", "configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``scalegmn-fast check``."""
    parser.add_argument(
        "--quick", action="store_true", help=f"models with width {QUICK_WIDTH} instead of the published one"
    )
    parser.add_argument(
        "--backend", action="append", choices=backends.BACKENDS, help="only this backend (may be repeated)"
    )
    parser.add_argument("--device", help="cpu or cuda; default: both where there is a GPU")
    parser.add_argument("--model", action="append", metavar="NAME", help="only this published model (may be repeated)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints the table; 0 if all pass, 1 if any fails.

    Raises:
        ValueError: a backend or device asked for by name is not available here, or an unknown model name.
    """
    start = time.perf_counter()
    devices = [args.device] if args.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    asked = [(backend, device) for device in devices for backend in args.backend or backends.BACKENDS]
    missing = {place: reason for place in asked if (reason := why_unavailable(*place)) is not None}
    places = [place for place in asked if place not in missing]
    unserved = {backend for backend, _ in asked} - {backend for backend, _ in places} if args.backend else set()
    if not places or unserved:
        reasons = [f"{name} on {device}: {why}" for (name, device), why in missing.items()]
        raise ValueError(f"nothing to check with: {'; '.join(reasons)}")
    known = (*published_names(), *neural_graphs_names())
    names = args.model or known
    for name in names:
        if name not in known:
            raise ValueError(f"--model must be one of {', '.join(known)}, got {name!r}")

    rows = []
    print(header())
    for row in chain(check_ops(places, seed=args.seed), check_models(names, places, quick=args.quick, seed=args.seed)):
        print(line(row), flush=True)
        rows.append(row)
    for (backend, device), reason in missing.items():
        print(f"not checked: {backend} on {device}: {reason}")
    failed = [row for row in rows if not row.ok]
    seconds = time.perf_counter() - start
    print(f"{len(rows) - len(failed)} of {len(rows)} checks pass ({seconds:.0f} s)")
    if args.json is not None:
        _write_json(args.json, rows, missing)
    return 1 if failed else 0


def why_unavailable(backend: str, device: str) -> str | None:
    """None if the backend serves tensors of this device here, else the reason it gives."""
    try:
        sample = torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0]
    reasons = (backends.why_not(backend, op, sample) for op in backends.OPS)
    return next((reason for reason in reasons if reason is not None), None)


def check_models(
    names: Sequence[str], places: Sequence[tuple[str, str]], *, quick: bool = False, seed: int = 0
) -> Iterator[Row]:
    """Every published model on every (backend, device), in float32 and, where served, float64: result and gradients
    against the oracle, and equivariance of the model's exact variant."""
    cases: dict[str, ModelCase] = {}

    def compute(name: str, backend: str, device: str, label: str) -> dict[str, tuple[float, float]]:
        if name not in cases:
            cases.clear()
            make = NeuralGraphsCase if name in neural_graphs_names() else ScaleGMNCase
            cases[name] = make(name, quick, seed)
        return cases[name].check(backend, device, DTYPES[label])

    for name in names:
        for backend, device in places:
            for label in ("float64", "float32"):
                if DTYPES[label] in backends.DTYPES[backend]:
                    this = partial(compute, name, backend, device, label)
                    yield guarded("model", name, backend, device, label, this)


def _write_json(path: Path, rows: Sequence[Row], missing: Mapping[tuple[str, str], str]) -> None:
    content = {
        "build": scalegmn_fast.build_info(),
        "not_checked": [{"backend": name, "device": device, "reason": why} for (name, device), why in missing.items()],
        "rows": [
            {
                "part": row.part,
                "case": row.case,
                "backend": row.backend,
                "device": row.device,
                "dtype": row.dtype,
                "ok": row.ok,
                "note": row.note,
                **{name: {"error": error, "bound": bound} for name, (error, bound) in row.quantities.items()},
            }
            for row in rows
        ],
    }
    path.write_text(json.dumps(content, indent=1))
