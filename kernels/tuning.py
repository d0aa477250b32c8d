"""Tiles of row programs chosen by running them, where SCALEGMN_FAST_TRITON_TUNE=1 asks for it.

A section runs alone in each of a few tiles, into outputs that are thrown away, and the fastest is kept, in memory and
in Triton's cache folder. `triton.autotune` does this for a kernel; a section's kernels are a chain over the same tiles,
which also decide how much scratch there is.
"""

import functools
import hashlib
import json
import os
import warnings

import torch
import triton
import triton.testing
from triton.runtime.cache import get_cache_manager

from .launching import compiles_only
from .tiles import next_power_of_2

TUNE = "SCALEGMN_FAST_TRITON_TUNE"
FILE = "row_program_tile.json"
MIN_ROWS, MAX_ROWS = 16, 128
MIN_WARPS, MAX_WARPS = 4, 8
MOST_SPILLS = 4096

_chosen = {}  # {(section, rows' bucket, device): the section in its fastest tile}


def asked():
    """Whether SCALEGMN_FAST_TRITON_TUNE is 1; it is 0 where it is not set."""
    chosen = os.environ.get(TUNE) or "0"
    if chosen not in ("0", "1"):
        raise ValueError(f"{TUNE}: expected 0 or 1, got {chosen!r}")
    return chosen == "1"


def candidates(tile):
    """The tile, one of twice its rows and warps, and one of half of them; 16 to 128 rows, 4 to 8 warps."""
    fewer = tile._replace(rows=max(tile.rows // 2, MIN_ROWS), warps=max(tile.warps // 2, MIN_WARPS))
    more = tile._replace(rows=min(2 * tile.rows, MAX_ROWS), warps=min(2 * tile.warps, MAX_WARPS))
    return tuple(dict.fromkeys((tile, more, fewer)))


def possible(device):
    """Whether kernels can be timed: on a GPU, while neither a CUDA graph is captured nor a program traced."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def spills(kernels):
    """The most bytes per thread that one of the launched kernels spills. Triton counts words of 4 bytes."""
    return 4 * max(kernel.n_spills for kernel in kernels)


def milliseconds(call):
    """The median time of a call on the current stream."""
    return triton.testing.do_bench(call, return_mode="median")


def fastest(tiles, run):
    """The one of the tiles in which `run(tile)`, which returns the kernels it launched, takes the least time.

    Left out are tiles that do not fit on the device, and those that spill more than MOST_SPILLS bytes per thread
    unless all do. The first if none is left.
    """
    spilled = {}
    for tile in tiles:
        try:
            spilled[tile] = spills(run(tile))
        except triton.OutOfResources:
            continue
    left = [tile for tile, most in spilled.items() if most <= MOST_SPILLS] or list(spilled) or tiles[:1]
    return left[0] if len(left) == 1 else min(left, key=lambda tile: milliseconds(lambda: run(tile)))


def _kept(cache, tiles):
    """The one of the tiles that a cache's file names; None, with a warning, if the file is not one of ours."""
    path = cache.get_file(FILE)
    if path is None:
        return None
    try:
        with open(path) as file:
            found = json.load(file)
        return tiles[tiles.index((found["rows"], found["warps"]))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} names no tile of this row program and is written again: {error!r}", stacklevel=2)
        return None


def _tile(section, bucket, device, run):
    """The fastest tile of a section: from the file, else measured and written there."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = repr((triton.__version__, gpu, bucket, section))
    cache = get_cache_manager(hashlib.sha256(name.encode()).hexdigest())
    tiles = candidates(section.tile)
    tile = _kept(cache, tiles)
    if tile is None:
        tile = fastest(tiles, run)
        cache.put(json.dumps(tile._asdict()), FILE, binary=False)
    return tile


def tuned(planned, bounds, device, plan_in, run):
    """A plan with each section in its fastest tile; as it is where that is not known and cannot be measured.

    planned: a `Section` per section, or None; bounds: of their rows; device: the current one; plan_in(tile=tile):
    the plan with all sections in a tile; run(plan): launches a plan, without sections that are None, into new outputs,
    and returns the kernels. Waits for the device when it measures. Inside `compile_ahead` all the tiles are compiled.
    """

    def alone(place, tile):
        return run([section if k == place else None for k, section in enumerate(plan_in(tile=tile))])

    found = list(planned)
    for place, section in enumerate(planned):
        rows = bounds[place + 1] - bounds[place]
        if section is None or not section.source.kernels or not rows:
            continue
        key = section, next_power_of_2(rows), device
        if compiles_only():
            for tile in candidates(section.tile):
                alone(place, tile)
        elif key not in _chosen and possible(device):
            tile = _tile(*key, functools.partial(alone, place))
            _chosen[key] = plan_in(tile=tile)[place]
        found[place] = _chosen.get(key, section)
    return tuple(found)
