"""The table that a check prints: its rows, their errors and bounds.

Errors are relative to the largest magnitude of the float64 result. Bounds are not constants: each is a small multiple
of the error that the plain PyTorch version makes in the same dtype on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..testing import relative_error

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, and (error, bound) of each quantity."""

    part: str
    case: str
    backend: str
    device: str
    dtype: str
    quantities: Mapping[str, tuple[float, float]]
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether every quantity is within its bound and nothing went wrong."""
        return not self.note and all(error <= bound < math.inf for error, bound in self.quantities.values())


def error_units(value: Tensor, exact: Tensor) -> float:
    """Relative error in units of rounding of the value's dtype."""
    return relative_error(value, exact) / torch.finfo(value.dtype).eps


def worst(checks: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The (error, bound) pair of the largest share of its bound."""
    return max(checks, key=lambda check: check[0] / check[1] if check[1] < math.inf else math.inf)


def guarded(
    part: str, case: str, backend: str, device: str, dtype: str, compute: Callable[[], dict[str, tuple[float, float]]]
) -> Row:
    """The row that ``compute`` gives; a crash is a failed row."""
    try:
        return Row(part, case, backend, device, dtype, compute())
    except Exception as error:
        return Row(part, case, backend, device, dtype, {}, note=f"{type(error).__name__}: {error}".splitlines()[0])


COLUMNS = (("op or model", 15), ("case", 33), ("backend", 9), ("device", 6), ("dtype", 8))
QUANTITIES = ("output", "gradients", "equivariance")


def header() -> str:
    """The titles of the table's columns."""
    names = [name.ljust(width) for name, width in COLUMNS]
    return "  ".join([*names, *(f"{name} (bound)".ljust(17) for name in QUANTITIES), "result"])


def line(row: Row) -> str:
    """A row of the table."""
    values = (row.part, row.case, row.backend, row.device, row.dtype)
    cells = [value.ljust(width) for value, (_, width) in zip(values, COLUMNS, strict=True)]
    for name in QUANTITIES:
        error, bound = row.quantities.get(name, (None, None))
        cells.append(("" if error is None else f"{error:.1e} ({bound:.1e})").ljust(17))
    return "  ".join([*cells, "ok" if row.ok else f"FAIL {row.note}".rstrip()])
