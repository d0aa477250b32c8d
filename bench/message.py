"""A fused message with its edge update, as the widest ScaleGMN has them, and how near it is to a product's rate.

    python -m bench.message [--device cpu] [--rows 100000] [--width 128] [--dtype float32 bfloat16] [--seconds 2]

Seven products of [rows, width] with [width, width] in one row program (the program `message` of docs/gpu-engine.md), on
segments of 32 rows; backward counts twice as many, without those that it computes again. The share is their operations
over the time, over the rate of a square product of the type, which is measured first. Every engine in turn; on a GPU
that of Triton also in smaller tiles than the table's. Nothing is written: `make gpu-check` measures these rows there
and keeps them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import harness, isolated
from scalegmn_fast import backend, ops

PRODUCTS, SEGMENT = 7, 32


class Way(NamedTuple):
    """A backend, and the rows of its tiles where they are not the table's."""

    backend: str
    rows: str = ""

    def __str__(self) -> str:
        return f"{self.backend}, {self.rows} rows" if self.rows else self.backend

    @contextmanager
    def chosen(self) -> Iterator[None]:
        with backend(self.backend), mock.patch.dict(os.environ, {"SCALEGMN_FAST_TRITON_ROWS": self.rows}):
            yield


WAYS = {
    "cpu": (Way("reference"), Way("cpp")),
    "cuda": (Way("reference"), Way("cuda"), Way("triton"), Way("triton", "64")),
}


class Message(NamedTuple):
    """What runs the program, and the tensors that get gradients."""

    call: Callable[[], tuple[Tensor, Tensor]]
    inputs: tuple[Tensor, ...]

    def forward(self) -> object:
        with torch.no_grad():
            return self.call()

    def backward(self, results: tuple[Tensor, Tensor]) -> object:
        return torch.autograd.grad(results, self.inputs, tuple(map(torch.ones_like, results)), retain_graph=True)


def message_of(rows: int, width: int, dtype: torch.dtype, device: str) -> Message:
    """The program on random numbers; tables and weights in ``dtype``, biases and norms in float32."""
    from scalegmn_fast.kernels.compile import ROW_PROGRAMS

    rows -= rows % SEGMENT
    segments = rows // SEGMENT
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    edges, nodes = normal(rows, width), normal(segments, width)
    maps = [normal(width, width, scale=width**-0.5) for _ in range(PRODUCTS)]
    vectors = [normal(width, dtype=torch.float32) for _ in range(10)]
    source = torch.randint(segments, (rows,), generator=generator, dtype=torch.int32).to(device)
    target = torch.arange(segments, dtype=torch.int32).repeat_interleave(SEGMENT).to(device)
    ptr = torch.arange(0, rows + 1, SEGMENT, device=device)

    def call() -> tuple[Tensor, Tensor]:
        program = ops.RowProgram()
        given = (iter((edges, nodes, nodes, nodes)), iter(maps), iter(vectors))
        makers = [lambda tensors=tensors: next(tensors) for tensors in given]
        ROW_PROGRAMS["message"](program.section(rows), *makers, source, target)
        return ops.row_program(program, ptr)

    return Message(call, (edges, nodes, *maps, *vectors))


def ready(message: Message, ways: tuple[Way, ...]) -> tuple[dict[str, tuple[Way, object]], dict[str, str]]:
    """Per engine that ran the program what it gave, and why the others did not."""
    from scalegmn_fast.kernels.launching import compile_ahead

    with compile_ahead():
        for way in ways:
            if way.backend == "triton":
                with suppress(Exception), way.chosen():  # said below
                    message.backward(message.call())
    found, failures = {}, {}
    for way in ways:
        try:
            with way.chosen():
                results = message.call()
                message.backward(results)
        except Exception as error:
            failures[str(way)] = isolated.reason(error)
        else:
            found[str(way)] = way, results
    return found, failures


def measure(rows: int, width: int, dtype: str, device: str, seconds: float) -> list[dict]:
    """A row per direction and engine; one that failed says why."""
    ways = WAYS[torch.device(device).type]
    once = 2 * PRODUCTS * (rows - rows % SEGMENT) * width**2
    flops = {"forward": once, "backward": 2 * once}
    found = []
    with harness.precision(dtype):
        message = message_of(rows, width, harness.DTYPES[dtype][1], device)
        engines, failures = ready(message, ways)

        calls = {
            "forward": {name: partial(inside, way, message.forward) for name, (way, _) in engines.items()},
            "backward": {
                name: partial(inside, way, message.backward, results) for name, (way, results) in engines.items()
            },
        }
        for direction, cases in calls.items():
            times = harness.alternate(cases, seconds=seconds, sync=harness.synchronizer(device))
            same = {"benchmark": "message", "direction": direction, "rows": rows, "width": width, "dtype": dtype}
            for name, values in times.items():
                row = {**same, "backend": name, **harness.summary(values), "flops": flops[direction]}
                if "reference" in times:
                    row["against_reference"] = harness.ratio(times["reference"], values)
                found.append(row)
            found += [{**same, "backend": name, "failed": why} for name, why in failures.items()]
    return found


def inside(way: Way, call: Callable[..., object], *arguments: object) -> object:
    with way.chosen():
        return call(*arguments)


def share(row: dict, rates: dict[str, float]) -> float | None:
    """Of the rate of a square product of the row's type; None where that, or the row, was not measured."""
    if "flops" not in row or row["dtype"] not in rates:
        return None
    return row["flops"] / (row["median_ms"] / 1e3) / rates[row["dtype"]]


def page(rows: list[dict], rates: dict[str, float]) -> str:
    """The rows as a Markdown table."""
    header = ["direction", "rows", "width", "products", "engine", "ms", "Tflop/s", "of a square product", "reference /"]
    body = []
    for row in rows:
        line = [row["direction"], row["rows"], row["width"], row["dtype"], row["backend"]]
        if "failed" in row:
            body.append([*line, row["failed"], "", "", ""])
            continue
        part, less = share(row, rates), row.get("against_reference")
        line += [f"{row['median_ms']:.3f}", f"{row['flops'] / row['median_ms'] / 1e9:.1f}"]
        body.append([*line, "" if part is None else f"{part:.0%}", "" if less is None else f"{less:.2f}x"])
    return harness.table(header, body)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.message", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", choices=harness.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="per type and direction")
    args = parser.parse_args()
    rates, rows = {}, []
    for dtype in args.dtype:
        with harness.precision(dtype):
            rates[dtype] = harness.gemm_peak(device=args.device, dtype=harness.DTYPES[dtype][1])
        rows += measure(args.rows, args.width, dtype, args.device, args.seconds)
    print(page(rows, rates))


if __name__ == "__main__":
    main()
