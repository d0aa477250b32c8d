"""The ops, forward and backward apart: each fused backend against the reference, in turn, and against the floor.

    python -m bench.ops [--device cpu] [--rows 100000] [--width 64 128 256]

The floor is the bytes that must move (each input read once, each output written once) over the machine's copy
bandwidth, measured first in the same run. Buffers are larger than the caches at the default sizes. float32.
"""

from __future__ import annotations

import argparse

import torch

from bench import harness
from scalegmn_fast import backend, ops


def sized_inputs(rows: int, width: int, device: str):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    return normal, torch.arange(0, rows + 1, 32, dtype=torch.int32, device=device)


def op_cases(rows: int, width: int, device: str):
    """(name, function of no arguments, inputs that need gradients, bytes forward, bytes backward)."""
    normal, ptr = sized_inputs(rows - rows % 32, width, device)
    h = normal(rows - rows % 32, width)
    bias, scale, shift = normal(width), normal(width), normal(width)
    matrix = 4 * h.numel()
    segments = ptr.numel() - 1
    yield (
        "symmetrize activation",
        lambda: ops.symmetrize(h, bias, scale, shift, activation="silu"),
        (h, bias, scale, shift),
        2 * matrix,
        3 * matrix,
    )
    yield "symmetrize normalize", lambda: ops.symmetrize(h, kind="normalize"), (h,), 2 * matrix, 3 * matrix
    yield (
        "segment_reduce sum",
        lambda: ops.segment_reduce(h, ptr, "sum"),
        (h,),
        matrix + 4 * segments * width,
        matrix + 4 * segments * width,
    )
    several = ("mean", "min", "max", "std")
    yield (
        "segment_reduce mean, min, max, std",
        lambda: ops.segment_reduce(h, ptr, several),
        (h,),
        matrix + 4 * segments * width * 6,
        2 * matrix + 4 * segments * width * 10,
    )


def measure(rows: int, width: int, device: str, backends: list[str], bandwidth: float, seconds: float) -> list[dict]:
    """Rows of every op at one size."""
    found = []
    for name, call, inputs, forward_bytes, backward_bytes in op_cases(rows, width, device):

        def forward(chosen, call=call):
            def run():
                with backend(chosen), torch.no_grad():
                    return call()

            return run

        def backward(chosen, call=call, inputs=inputs):
            with backend(chosen):
                out = call()
            cotangent = torch.ones_like(out)

            def run():
                with backend(chosen):
                    return torch.autograd.grad(out, inputs, cotangent, retain_graph=True)

            return run

        for direction, make, count in (("forward", forward, forward_bytes), ("backward", backward, backward_bytes)):
            sync = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
            times = harness.alternate({b: make(b) for b in backends}, seconds=seconds, sync=sync)
            for chosen, values in times.items():
                row = {"benchmark": "ops", "op": name, "direction": direction, "rows": rows, "width": width}
                row |= {"backend": chosen, **harness.summary(values), "bytes": count}
                row["floor_ms"] = 1e3 * count / bandwidth
                row["against_reference"] = harness.ratio(times["reference"], values)
                found.append(row)
    return found


def page(data: dict) -> str:
    """The rows as a Markdown table."""
    header = [
        "op",
        "direction",
        "width",
        "backend",
        "median (ms)",
        "floor (ms)",
        "measured / floor",
        "against reference",
    ]
    body = [
        [
            row["op"],
            row["direction"],
            row["width"],
            row["backend"],
            f"{row['median_ms']:.2f}",
            f"{row['floor_ms']:.2f}",
            f"{row['median_ms'] / row['floor_ms']:.1f}",
            f"{row['against_reference']:.2f}x",
        ]
        for row in data["rows"]
    ]
    caption = f"{data['rows'][0]['rows']} rows, float32; copy bandwidth {data['copy_bandwidth'] / 1e9:.1f} GB/s."
    return f"{harness.table(header, body)}\n\n{caption}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=2.0, help="per op, direction and size")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    backends = ["reference", "triton", "cuda"] if on_gpu else ["reference", "cpp"]
    bandwidth = harness.copy_bandwidth(device=args.device)
    rows = []
    for width in args.width:
        rows += measure(args.rows, width, args.device, backends, bandwidth, args.seconds)
    name = torch.cuda.get_device_name().replace(" ", "-") if on_gpu else "ops"
    print(page(harness.save(name, rows, copy_bandwidth=bandwidth)))


if __name__ == "__main__":
    main()
