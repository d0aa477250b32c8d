"""The ops, forward and backward apart: each fused backend against the reference, in turn, and against the floor.

    python -m bench.ops [--device cpu] [--rows 100000 ...] [--width 64 128 256]

The floor is the longer of two times: the bytes that must move (each input read once, each output written once) over the
machine's copy bandwidth, and the operations of the matrix products, those of backward twice those of forward, over the
peak of a square one; both measured first in the same run. Buffers are larger than the caches at the default sizes.
float32. The rows of a size are written together, in the place of those before. On a GPU nothing is written:
`make gpu-check` measures these rows there, with others, and keeps them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench import harness
from scalegmn_fast import backend, backends, ops

KEY = ("op", "direction", "rows", "width", "backend")
BACKENDS = {"cpu": ["reference", "cpp"], "cuda": ["reference", "triton", "cuda"]}


class Case(NamedTuple):
    """An op at one size: what calls it, inputs that need gradients, bytes that must move, operations of a forward."""

    name: str
    call: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int
    flops: int = 0


def op_cases(rows: int, width: int, device: str) -> Iterator[Case]:
    """The ops on ``rows`` rows (up to the last whole segment) in segments of 32."""
    generator = torch.Generator().manual_seed(0)
    rows -= rows % 32
    segments = rows // 32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    ptr = torch.arange(0, rows + 1, 32, dtype=torch.int32, device=device)
    h = normal(rows, width)
    bias, scale, shift = normal(width), normal(width), normal(width)
    matrix, reduced = 4 * h.numel(), 4 * segments * width
    parameters = (bias, scale, shift)
    yield Case(
        "symmetrize activation",
        lambda: ops.symmetrize(h, *parameters, activation="silu"),
        (h, *parameters),
        2 * matrix,
        3 * matrix,
    )
    yield Case("symmetrize normalize", lambda: ops.symmetrize(h, kind="normalize"), (h,), 2 * matrix, 3 * matrix)
    yield Case("segment_reduce sum", lambda: ops.segment_reduce(h, ptr, "sum"), (h,), *[matrix + reduced] * 2)
    several = ("mean", "min", "max", "std")
    yield Case(
        "segment_reduce mean, min, max, std",
        lambda: ops.segment_reduce(h, ptr, several),
        (h,),
        matrix + 6 * reduced,
        2 * matrix + 10 * reduced,
    )

    nodes = normal(segments, width)
    sender = torch.randint(segments, (rows,), generator=generator, dtype=torch.int32).to(device)
    receiver = torch.arange(segments, dtype=torch.int32).repeat_interleave(32).to(device)
    inner, outer = normal(width, width), normal(width, width)
    product = 2 * rows * width * width

    def message() -> Tensor:
        program = ops.RowProgram()
        section = program.section(rows)
        gated = section.load_mul(section.load(h), nodes, sender)
        hidden = section.symmetrize(section.linear(gated, inner), *parameters, "silu", 0.0)
        section.add_up(section.linear(hidden, outer))
        return ops.row_program(program, ptr.long())[0]

    yield Case(
        "row_program message",
        message,
        (h, nodes, inner, outer, *parameters),
        matrix + 2 * reduced,
        2 * matrix + 4 * reduced,
        2 * product,
    )

    def edge_update() -> Tensor:
        program = ops.RowProgram()
        section = program.section(rows)
        ends = section.load_add(section.load(nodes, sender), nodes, receiver)
        gate = section.linear(section.norm_act(ends, scale, shift, "silu", 0.0), outer, bias)
        section.write(section.mul(section.linear(section.load(h), inner), gate))
        return ops.row_program(program)[1]

    yield Case(
        "row_program edge update",
        edge_update,
        (h, nodes, inner, outer, *parameters),
        2 * matrix + reduced,
        3 * matrix + 2 * reduced,
        2 * product,
    )


def measure(
    rows: int, width: int, device: str, names: list[str], bandwidth: float, peak: float, seconds: float
) -> Iterator[list[dict]]:
    """The rows of one op at one size after the other, on each backend that serves it; which do not is said."""
    for case in op_cases(rows, width, device):
        reasons = {name: backends.why_not(name, case.name.split()[0], case.inputs[0]) for name in names}
        served = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                print(f"{case.name} not on {name}: {reason}", flush=True)

        def forward(chosen, case=case):
            def run():
                with backend(chosen), torch.no_grad():
                    return case.call()

            return run

        def backward(chosen, case=case):
            with backend(chosen):
                out = case.call()
            cotangent = torch.ones_like(out)

            def run():
                with backend(chosen):
                    return torch.autograd.grad(out, case.inputs, cotangent, retain_graph=True)

            return run

        if "triton" in served:
            compile_case(case)
        directions = (
            ("forward", forward, case.forward_bytes, case.flops),
            ("backward", backward, case.backward_bytes, 2 * case.flops),
        )
        found = []
        for direction, make, count, flops in directions:
            sync = harness.synchronizer(device)
            times = harness.alternate({name: make(name) for name in served}, seconds=seconds, sync=sync)
            for chosen, values in times.items():
                row = {"benchmark": "ops", "op": case.name, "direction": direction, "rows": rows, "width": width}
                row |= {"backend": chosen, **harness.summary(values), "bytes": count, "flops": flops}
                row |= {"copy_bandwidth": bandwidth, "gemm_peak": peak}
                row["floor_ms"] = 1e3 * max(count / bandwidth, flops / peak)
                row["against_reference"] = harness.ratio(times["reference"], values)
                found.append(row)
        yield found


def compile_case(case: Case) -> None:
    """Compile the Triton kernels of a case, side by side."""
    from scalegmn_fast.kernels.launching import compile_ahead

    with compile_ahead(), backend("triton"):
        torch.autograd.grad(case.call().sum(), case.inputs)


def page(data: dict) -> str:
    """The rows as a Markdown table, a line per op, direction and size."""
    lines: dict[tuple, dict[str, dict]] = {}
    for row in sorted(data["rows"], key=lambda row: (row["rows"], row["width"])):
        lines.setdefault((row["op"], row["direction"], row["rows"], row["width"]), {})[row["backend"]] = row
    fused = list(dict.fromkeys(row["backend"] for row in data["rows"] if row["backend"] != "reference"))
    header = ["op", "direction", "rows", "width", "floor (ms)", "reference (ms)"]
    header += [column for name in fused for column in (f"{name} (ms)", f"{name} / floor", f"reference / {name}")]
    body = []
    for case, found in lines.items():
        body.append([*case, f"{found['reference']['floor_ms']:.2f}", f"{found['reference']['median_ms']:.2f}"])
        for row in (found.get(name) for name in fused):
            cells = ["", "", ""]
            if row is not None:
                share = row["median_ms"] / row["floor_ms"]
                cells = [f"{row['median_ms']:.2f}", f"{share:.1f}", f"{row['against_reference']:.2f}x"]
            body[-1] += cells
    bandwidth = _span([row["copy_bandwidth"] for row in data["rows"]], ".1f")
    peak = _span([row["gemm_peak"] for row in data["rows"]], ".0f")
    return f"{harness.table(header, body)}\n\nfloat32; copy bandwidth {bandwidth} GB/s, GEMM peak {peak} GFLOP/s."


def _span(values: list[float], style: str) -> str:
    """Rates in units of 1e9, from the lowest to the highest."""
    low, high = (f"{edge / 1e9:{style}}" for edge in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=2.0, help="per op, direction and size")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    names = BACKENDS["cuda" if on_gpu else "cpu"]
    bandwidth, peak = harness.copy_bandwidth(device=args.device), harness.gemm_peak(device=args.device)
    measured = []
    for width in args.width:
        for count in args.rows:
            found = measure(count, width, args.device, names, bandwidth, peak, args.seconds)
            rows = [row for case in found for row in case]
            measured += rows
            if not on_gpu:
                harness.merge(harness.RESULTS / "ops.json", rows, KEY)
    print(page({"rows": measured}))


if __name__ == "__main__":
    main()
