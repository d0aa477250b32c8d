"""What every kernel needs on every architecture: registers, spills, shared memory. Needs no GPU.

`python -m scalegmn_fast.kernels.report` prints the tables; `--output FILE` writes them to a file instead, as the page
docs/kernels-aot.md was; `--jobs N` compiles N at a time. `--row-programs` prints the table of row programs
in docs/gpu-engine.md.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch
import triton

from .compile import (
    ARCHITECTURES,
    SHARED_MEMORY,
    compile_all,
    configurations,
    row_usage,
    usage,
    variants,
)

# (program, width, dtype, precision)
ROW_CASES = (
    ("message", 128, torch.bfloat16, "ieee"),
    ("message", 128, torch.float32, "tf32"),
    ("message", 128, torch.float32, "ieee"),
    ("message", 64, torch.bfloat16, "ieee"),
    ("message", 64, torch.float32, "tf32"),
    ("message", 64, torch.float32, "ieee"),
    ("attention", 64, torch.bfloat16, "ieee"),
    ("attention", 64, torch.float32, "tf32"),
    ("statistics", 128, torch.bfloat16, "ieee"),
    ("statistics", 128, torch.float32, "tf32"),
    ("statistics", 64, torch.bfloat16, "ieee"),
    ("statistics", 64, torch.float32, "tf32"),
)

INTRODUCTION = """# Triton kernels, compiled ahead of time

Written by `python -m scalegmn_fast.kernels.report --output docs/kernels-aot.md` with Triton {version}, without a GPU.
Per thread: registers, then after a `+` the bytes of stack that spills take, if any. Per block: bytes of shared memory,
of which a block may have {limits}. One program is one block of `warps` x 32 threads.
*aligned*: the width is divisible by 16, so that loads are 16 bytes wide; *unaligned*: any other width, loads are one
element wide.

## Every kernel in every tile

Float32, aligned, with everything switched on (bias, norm; all six reductions through an order): the most registers.
None of these spills; a test asserts it, and that each fits into the shared memory of each architecture.

{configurations}
## Other types, alignments and options

{spilling} of {total} variants x architectures spill, {worst} bytes per thread at most.

{variants}"""


def table(builds, usages):
    """A Markdown table: a row per build; registers (+ spills) and shared memory per architecture."""
    columns = [f"sm_{a} {what}" for a in ARCHITECTURES for what in ("registers", "shared")]
    lines = ["| kernel | variant | columns | type | width | warps | " + " | ".join(columns) + " |"]
    lines.append("| --- " * (6 + len(columns)) + "|")
    for build in builds:
        row = [usages[build, a] for a in ARCHITECTURES]
        cells = [build.kernel.removesuffix("_kernel"), build.variant, str(build.cols), build.dtype]
        cells += ["aligned" if build.aligned else "unaligned", str(row[0].warps)]
        for used in row:
            cells += [f"{used.registers}" + (f" + {used.spills}" if used.spills else ""), str(used.shared)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(jobs):
    """The whole report as Markdown."""
    main, others = list(configurations()), list(variants())
    usages = {pair: usage(compiled) for pair, compiled in compile_all(main + others, jobs).items()}
    spills = [usages[pair].spills for pair in itertools.product(others, ARCHITECTURES)]
    return INTRODUCTION.format(
        version=triton.__version__,
        limits=", ".join(f"{limit // 1024} KB on sm_{a}" for a, limit in SHARED_MEMORY.items()),
        configurations=table(main, usages),
        spilling=sum(spill > 0 for spill in spills),
        total=len(spills),
        worst=max(spills),
        variants=table(others, usages),
    )


def row_table(jobs):
    """A Markdown table of the kernels of row programs: the most that one of a section's needs, and all issue slots."""
    cases = [(name, direction, *case) for name, *case in ROW_CASES for direction in ("forward", "backward")]
    usages = compile_all(cases, jobs, row_usage)
    lines = ["| program | kernels | products | width | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |"]
    lines.append("| --- " * (4 + len(ARCHITECTURES)) + "|")
    for case in cases:
        name, direction, width, dtype, precision = case
        cells = [name, f"{direction}, {len(usages[case, ARCHITECTURES[0]][1])}"]
        cells += ["bf16" if dtype == torch.bfloat16 else precision, str(width)]
        for architecture in ARCHITECTURES:
            tile, used, slots = usages[case, architecture]
            shared, spills = max(u.shared for u in used), [u.spills for u in used]
            spilled = f"{max(spills)} B in {sum(spill > 0 for spill in spills)}" if any(spills) else "no spills"
            cells.append(f"{tile.rows} x {tile.warps}, {shared // 1024} KB, {spilled}, {slots:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m scalegmn_fast.kernels.report", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the page to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="builds at a time (default: all cores)")
    parser.add_argument("--row-programs", action="store_true", help="the table of row programs instead")
    arguments = parser.parse_args()
    text = row_table(arguments.jobs) if arguments.row_programs else page(arguments.jobs)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
