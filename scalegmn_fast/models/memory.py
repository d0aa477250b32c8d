"""How much memory is left, and what to keep in it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

#: What ``edge_memory`` may be.
EDGE_MEMORY = ("auto", "store", "recompute")


def available_memory() -> float:
    """Bytes that a process can take without swapping; infinity where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return float("inf")


def keeps_edges(edge_memory: str, needed: int, device: torch.device) -> bool:
    """Whether updated edge features are written out: "store", or "auto" where that takes at most half of what is left.

    Args:
        edge_memory: "store", "recompute" or "auto".
        needed: bytes of all edge features that a step would keep; device: where.
    """
    if edge_memory != "auto":
        return edge_memory == "store"
    if torch.compiler.is_compiling() or device.type != "cpu":
        return True
    return needed <= available_memory() / 2
