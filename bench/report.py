"""Writes docs/benchmarks.md from the rows in bench/results; no number on that page is typed by hand.

python -m bench.report
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import harness, identities, ops

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Written by `python -m bench.report` from `bench/results`. Everything on one line was timed in one run, in turn; a
ratio is the median over rounds of two neighbouring measurements. GPU: {gpu}.
"""

SECTIONS = (
    (
        "ops",
        ops.page,
        "The ops",
        "`python -m bench.ops`. The floor is the bytes that must move over the copy bandwidth measured first in "
        "the same run. Backward is compared with the reference backend's closed form, not with PyTorch's own autograd.",
    ),
    (
        "identities",
        identities.page,
        "The exact identities",
        "`python -m bench.identities`. A training step (forward and backward, float32): on the reference backend with "
        "none and with all of the identities of the plan of work, and with all of them and the fused ops (none / "
        "fused). The last columns are what that last step costs without one identity, over the step with all.",
    ),
)


def machine_line(machine: dict) -> str:
    """One line about what the rows were measured on."""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, kernels for {machine['isa']}, torch {machine['torch']}, "
        f"commit {machine['commit']}."
    )


def main() -> None:
    known = {name for name, *_ in SECTIONS}
    gpus = sorted(path.stem for path in harness.RESULTS.glob("*.json") if path.stem not in known)
    parts = [INTRODUCTION.format(gpu=", ".join(gpus) or "not measured")]
    for name, page, title, text in SECTIONS:
        data = json.loads((harness.RESULTS / f"{name}.json").read_text())
        parts.append(f"## {title}\n\n{text}\n\n{page(data)}\n\nOn {machine_line(data['machine'])}\n")
    for name in gpus:
        data = json.loads((harness.RESULTS / f"{name}.json").read_text())
        parts.append(f"## The ops on {name}\n\n{ops.page(data)}\n\nCommit {data['machine']['commit']}.\n")
    PAGE.write_text("\n".join(parts))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
