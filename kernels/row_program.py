"""`row_program` on a GPU: kernels generated for each section of a program (see `row_source`).

Forward: a program runs all steps on one tile of rows and reduces its rows per segment. A segment that spans tiles is
left in parts, one per tile, which a merging kernel joins in order (see `row_reductions`).

Backward: at most `ROWS_AT_A_TIME` rows at a time. Gradients of parameters are summed in a place per program, and the
places are added up; gradients of rows read through an index are written in the order of the rows, and added up per row
of the table by `segment_reduce`, through the sorted index. No float atomics: every order of summation depends on the
sizes alone.
"""

import functools
import math
import os
from typing import NamedTuple

import torch
import triton

from scalegmn_fast.reference.row_program import result_dtype, sections

from . import row_reductions, row_source, tuning
from .launching import launch
from .row_source import Operand, Request, UnsupportedError
from .segment_reduce import segment_reduce
from .sorted_index import sorted_index
from .tiles import accumulator_type, launch_options

ROWS_AT_A_TIME, MAX_PROGRAMS = 16896, 264
MERGE_LANES, MERGE_COLS, MERGE_WARPS = 16, 128, 4
# {reduction: the kernel that merges parts, its tensors}
MERGES = {
    "sum": (row_reductions.merge_sums_kernel, ("partial", "holds", "reduced")),
    "statistics": (
        row_reductions.merge_statistics_kernel,
        ("partial", "partial_rows", "holds", "reduced", "kept_stats", "extremes"),
    ),
    "attention": (
        row_reductions.merge_attention_kernel,
        ("partial", "partial_stats", "holds", "reduced", "kept_stats"),
    ),
}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
HOPPER, BLACKWELL = range(90, 100), range(100, 110)
ROWS = "SCALEGMN_FAST_TRITON_ROWS"
PRECISION = "SCALEGMN_FAST_TRITON_DOT"
PRECISIONS = ("ieee", "tf32x3", "tf32")


def dot_precision():
    """How float32 products are computed: SCALEGMN_FAST_TRITON_DOT, else by torch.get_float32_matmul_precision()."""
    chosen = os.environ.get(PRECISION) or ("ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")
    if chosen not in PRECISIONS:
        raise ValueError(f"{PRECISION}: expected one of {', '.join(PRECISIONS)}, got {chosen!r}")
    return chosen


class Tile(NamedTuple):
    """Rows of a tile and warps of a program."""

    rows: int
    warps: int


def tile_of(size, precision, backward, architecture):
    """The launch configuration of a section's kernels (docs/gpu-engine.md).

    size: the most numbers in a weight, or 64 times the columns of the widest row if that is more; precision: of its
    float32 products, "low" if all weights are of two bytes; architecture: 10 times the compute capability.
    """
    small, narrow = size <= 128 * 128, size <= 64 * 128
    if precision == "ieee":
        if narrow:
            return Tile(32, 4) if backward else Tile(64, 8)
        return Tile(32 if small else 16, 8)
    if architecture in HOPPER or architecture in BLACKWELL:
        # Four warps multiply 64 rows there: with fewer rows per warp several compute the same.
        fewer = narrow or precision == "tf32x3" or (backward and not small)
        return Tile(64, 4) if fewer else Tile(128, 8)
    if precision == "tf32x3":
        return Tile(32 if small else 16, 8)
    if narrow:
        return Tile(64, 4)
    return Tile(32, 4) if small else Tile(32 if precision == "low" else 16, 8)


def programs_at_a_time(tile):
    """How many tiles go through the backward kernels in one launch: each has a place in scratch."""
    return min(MAX_PROGRAMS, ROWS_AT_A_TIME // tile.rows)


def pinned_tile():
    """The tile of every section with as many rows as SCALEGMN_FAST_TRITON_ROWS says; None if it is not set."""
    chosen = os.environ.get(ROWS)
    if chosen and chosen not in ("16", "32", "64", "128"):
        raise ValueError(f"{ROWS}: expected 16, 32, 64 or 128, got {chosen!r}")
    return Tile(int(chosen), 8 if chosen == "128" else 4) if chosen else None


def architecture_of(device):
    """10 times the compute capability of a GPU; of other devices, where nothing is launched, Hopper's."""
    if device.type != "cuda":
        return HOPPER[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def merge_constants(width, heads, acc):
    """Constants and options of a merging kernel's launch; heads: 0 without attention."""
    constants = {"WIDTH": width, "ACC": acc, "BLOCK_LANES": MERGE_LANES, "BLOCK_COLS": MERGE_COLS}
    return constants | ({"HEADS": heads} if heads else {}) | launch_options(MERGE_WARPS)


class Section(NamedTuple):
    """A section's `Request` and `Source` in one direction, and its kernel's tile."""

    request: Request
    source: row_source.Source
    tile: Tile
    reduced_width: int
    written_width: int
    heads: int


class Reduction:
    """What the sections of a program reduce to: results, what derivatives read, and the parts that tiles leave.

    kind, width, heads: of the reduction, the step's rows, its logits; tiles: those that reduce; names: {name of a
    kernel's argument: tensor}.
    """

    def __init__(self, planned, counts, like, ptr, dtype, wide):
        reducing = [section for section in planned if section and section.reduced_width]
        self.kind = reducing[0].request.reduction if reducing else "none"
        self.width, self.heads = (reducing[0].reduced_width, reducing[0].heads) if reducing else (0, 0)
        self.tiles, self.wide = sum(counts) if reducing else 0, wide
        segments, width, tiles = ptr.numel() - 1 if reducing else 0, self.width, self.tiles
        statistics, attention = self.kind == "statistics", self.kind == "attention"
        kept = (segments, 2 * (self.heads if attention else width)) if statistics or attention else (0,)
        fields = row_reductions.STATISTICS_FIELDS.value if statistics else 1
        # Segments without rows are 0.
        self.names = {
            "reduced": like.new_zeros((segments, 4 * width if statistics else width), dtype=dtype),
            "kept_stats": like.new_zeros(kept, dtype=wide),
            "extremes": like.new_zeros(kept if statistics else 0, dtype=torch.int32),
            "partial": like.new_empty((tiles, 2, fields, width), dtype=wide),
            "partial_stats": like.new_empty((tiles, 2, 2, self.heads), dtype=wide),
            "partial_rows": like.new_empty((tiles if statistics else 0, 2, 2, width), dtype=torch.int32),
            "holds": like.new_empty((tiles, 2, 2), dtype=torch.int64),
        }

    def merge(self):
        """Joins the parts of segments that span tiles."""
        if self.tiles < 2:
            return
        kernel, names = MERGES[self.kind]
        constants = merge_constants(self.width, self.heads, accumulator_type(self.wide))
        grid = self.tiles, triton.cdiv(self.width, MERGE_COLS)
        launch(kernel, grid, *(self.names[name] for name in names), self.tiles, **constants)

    def results(self):
        """(what is reduced, what is kept, rows of the extremes)"""
        return self.names["reduced"], self.names["kept_stats"], self.names["extremes"]


def _used(steps, outputs):
    """Which steps an output depends on."""
    used = {number for number in outputs if number >= 0}
    for number in reversed(range(len(steps))):
        if number in used:
            used |= {k for k in (steps[number].a, steps[number].b) if k >= 0}
    return used


def _without_unused(section):
    """(steps, written, reduced, logits) of a section, less the steps that no output depends on."""
    used = sorted(_used(section.steps, (section.rows, section.reduced, section.logits)))
    place = {-1: -1} | {number: k for k, number in enumerate(used)}
    steps = tuple(section.steps[k]._replace(a=place[section.steps[k].a], b=place[section.steps[k].b]) for k in used)
    return steps, place[section.rows], place[section.reduced], place[section.logits]


@functools.lru_cache(maxsize=1024)
def _weights(code, count):
    """The tensors that are weights of linear steps: all of their shape is part of a kernel."""
    steps = (step for section in sections([0] * (count + 1), code, (0.0,) * len(code)) for step in section.steps)
    return frozenset(step.t0 for step in steps if step.op == "linear")


@functools.lru_cache(maxsize=1024)
def plan(code, constants, count, operands, indices, wanted, precision, architecture, pinned):
    """A `Section` per section of a program of `count` sections, None for one without outputs.

    operands: (dtype, shape) per tensor, the rows of tables None; indices: dtypes; wanted: whether each tensor's
    gradient is, or None for the forward kernels; architecture: as for `tile_of`; pinned: the tile of all
    sections, or None. Raises `UnsupportedError`.
    """
    acc = "tl.float64" if any(dtype == torch.float64 for dtype, _ in operands) else "tl.float32"
    result = TYPES[result_dtype([torch.empty(0, dtype=dtype) for dtype, _ in operands], code, count)]
    shapes = dict(enumerate(shape for _, shape in operands))
    found = []
    for section in sections([0] * (count + 1), code, constants):
        steps, written, reduced, logits = _without_unused(section)
        if not steps:
            found.append(None)
            continue
        numbers = sorted({t for step in steps for t in (step.t0, step.t1, step.t2) if t >= 0})
        used = sorted({step.index for step in steps if step.index >= 0})
        parts = row_source.partitions(steps, shapes)
        if logits >= 0:
            row_source.heads_and_width(parts[reduced], parts[logits])
        weights = [operands[step.t0] for step in steps if step.op == "linear"]
        how = "low" if all(dtype.itemsize == 2 for dtype, _ in weights) else precision
        size = max(64 * max(map(row_source.columns, parts)), *(math.prod(shape) for _, shape in weights), 0)
        tile = pinned or tile_of(size, how, wanted is not None, architecture)
        request = Request(
            steps, written, reduced, logits, section.reduction,
            tuple(Operand(t, TYPES[operands[t][0]], shapes[t]) for t in numbers),
            tuple((k, TYPES[indices[k]]) for k in used),
            result, acc, precision, tile.rows,
            () if wanted is None else tuple(t for t in numbers if wanted[t]),
        )  # fmt: skip
        source = (row_source.forward_source if wanted is None else row_source.backward_source)(request)
        widths = [sum(parts[k]) if k >= 0 else 0 for k in (reduced, written, logits)]
        found.append(Section(request, source, tile, *widths))
    if len({section.reduced >= 0 for section in map(_request, found) if section}) > 1:
        raise UnsupportedError("some of its sections reduce and others do not")
    return tuple(found)


def _request(section):
    return None if section is None else section.request


def plan_of(tensors, indices, bounds, code, constants, wanted=None, precision=None, architecture=None, tile=None):
    """`plan` for the op's arguments.

    precision, architecture, tile: `dot_precision`, the tensors' device's and `pinned_tile` if None.
    """
    code, count = tuple(code), len(bounds) - 1
    weights = _weights(code, count)
    operands = tuple(
        (t.dtype, (None, *t.shape[1:]) if t.dim() == 2 and k not in weights else tuple(t.shape))
        for k, t in enumerate(tensors)
    )
    dtypes = tuple(index.dtype for index in indices)
    wanted = None if wanted is None else tuple(wanted)
    architecture = architecture or architecture_of(tensors[0].device)
    settings = precision or dot_precision(), architecture, tile or pinned_tile()
    return plan(code, tuple(constants), count, operands, dtypes, wanted, *settings)


def why_not(tensors, indices, bounds, code, constants):
    """Why these kernels do not run a program; None if they do."""
    try:
        plan_of(tensors, indices, bounds, code, constants)
    except UnsupportedError as error:
        return str(error)
    return None


def options(section):
    """The compiler's options of a section's kernels. One stage: more would not fit into shared memory."""
    return {**launch_options(section.tile.warps), "num_stages": 1}


def _launch(section, programs, named):
    """The kernels of a section, launched in turn."""
    arguments = [named[name] for name, _ in section.source.arguments]
    kernels = row_source.compiled(section.source)
    return [launch(kernel, (programs,), *arguments, **options(section)) for kernel in kernels]


def _run(run, planned, arguments, wanted=None):
    """The first of what `run(plan)` gives, the other being the kernels it launched; in tuned tiles where asked for.

    planned: `plan_of(*arguments, wanted)`.
    """
    (like, *_), _, bounds, *_ = arguments
    with torch.cuda.device_of(like):
        if tuning.asked() and not pinned_tile():
            plan_in = functools.partial(plan_of, *arguments, wanted)
            planned = tuning.tuned(planned, bounds, like.device, plan_in, lambda planned: run(planned)[1])
        return run(planned)[0]


def _named(tensors, indices, ptr, seed):
    """The inputs of kernels by name."""
    named = {f"t{k}": t for k, t in enumerate(tensors)} | {f"i{k}": t for k, t in enumerate(indices)}
    named |= {"ptr": None if ptr is None else ptr.contiguous(), "seed": seed}
    if ptr is not None:
        named |= {"segments": ptr.numel() - 1, "steps": (ptr.numel() - 1).bit_length()}
    return named


def _contiguous(tensors):
    return [t.contiguous() for t in tensors]


def _wide(tensors):
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_program(tensors, indices, bounds, code, constants, ptr, seed):
    """Device implementation of the op `scalegmn_fast::row_program`.

    Args: the op's. Returns what is reduced [S, d], rows [R', d'], and the two tensors that backward reads. Computes in
    float32, in float64 if a tensor is; products in the type of their weight, added up in that. Raises
    `UnsupportedError`. Does not wait for the device, and does not look at indices and segments, which have to be in
    range.
    """
    arguments = tensors, indices, bounds, code, constants
    planned = plan_of(*arguments)
    named = _named(_contiguous(tensors), _contiguous(indices), ptr, seed)
    dtype, wide = result_dtype(tensors, code, len(bounds) - 1), _wide(tensors)
    run = functools.partial(_forward, bounds=bounds, like=tensors[0], named=named, dtype=dtype, wide=wide)
    return _run(run, planned, arguments)


def _forward(planned, bounds, like, named, dtype, wide):
    """(what the op returns, the kernels launched) for a plan; named: the kernels' arguments but for outputs."""
    written_width = max((section.written_width for section in planned if section), default=0)
    ends = zip(planned, bounds[1:], strict=True)
    rows = max((end for section, end in ends if section and section.written_width), default=0)
    counts = [
        triton.cdiv(end - begin, section.tile.rows) if section else 0
        for section, begin, end in zip(planned, bounds[:-1], bounds[1:], strict=True)
    ]
    reduction = Reduction(planned, counts, like, named["ptr"], dtype, wide)
    written = like.new_empty((rows, written_width), dtype=dtype)
    named = named | {"rows_out": written} | reduction.names
    kernels, first = [], 0
    for section, count, begin, end in zip(planned, counts, bounds[:-1], bounds[1:], strict=True):
        if count:
            kernels += _launch(section, count, named | {"begin": begin, "end": end, "first_tile": first})
        first += count
    reduction.merge()
    reduced, kept, extremes = reduction.results()
    return (reduced, written, kept, extremes), kernels


class _Gradients:
    """The gradients of a program's tensors in parts: of parameters, of tables' rows by number and through an index."""

    def __init__(self, tensors, indices, bounds, planned, wide):
        self.tensors, self.indices, self.bounds, self.planned, self.wide = tensors, indices, bounds, planned, wide
        self.parts = {}
        self.direct = self._direct()
        self.gathered = self._gathered()

    def _present(self):
        for section, begin, end in zip(self.planned, self.bounds[:-1], self.bounds[1:], strict=True):
            if section is not None and begin < end:
                yield section, begin, end

    def _direct(self):
        """{tensor: rows of its gradient}: in its own type where each has one contribution, 0 where there is none."""
        uses = {}
        for section, begin, end in self._present():
            for tensor, count in section.source.direct:
                rows, once = uses.get(tensor, (0, True))
                uses[tensor] = rows + end - begin, once and count == 1
        elsewhere = {tensor for section, *_ in self._present() for tensor, _ in section.source.gathered}
        elsewhere |= {tensor for section, *_ in self._present() for tensor, *_ in section.source.parameters}
        found = {}
        for tensor, (rows, once) in uses.items():
            like = self.tensors[tensor]
            dtype = like.dtype if once and tensor not in elsewhere else self.wide
            found[tensor] = (torch.empty_like if rows == like.shape[0] else torch.zeros_like)(like, dtype=dtype)
        return found

    def _gathered(self):
        """{(tensor, index): (first row, gradients of the rows that the index reads)}."""
        spans = {}
        for section, begin, end in self._present():
            for key in section.source.gathered:
                low, high, rows = spans.get(key, (begin, end, 0))
                spans[key] = min(low, begin), max(high, end), rows + end - begin
        found = {}
        for (tensor, index), (low, high, rows) in spans.items():
            like = self.tensors[tensor]
            make = like.new_empty if rows == high - low else like.new_zeros
            found[tensor, index] = low, make((high - low, like.shape[1]), dtype=self.wide)
        return found

    def named(self, section, begin):
        found = {f"d{tensor}": self.direct[tensor] for tensor, _ in section.source.direct}
        for tensor, index in section.source.gathered:
            low, rows = self.gathered[tensor, index]
            found[f"s{tensor}_{index}"] = rows[begin - low :]
        return found

    def add(self, tensor, part):
        self.parts.setdefault(tensor, []).append(part)

    def add_parameters(self, section, slots):
        """slots [programs, numbers]: a section's sums per program."""
        total = slots[0] if slots.shape[0] == 1 else slots.sum(0)
        for tensor, at, size in section.source.parameters:
            self.add(tensor, total[at : at + size].view(self.tensors[tensor].shape))

    def result(self, wanted):
        for tensor, rows in self.direct.items():
            self.add(tensor, rows)
        for (tensor, index), (low, rows) in self.gathered.items():
            table = self.tensors[tensor]
            ptr, places = sorted_index(self.indices[index], low, low + rows.shape[0], table.shape[0])
            self.add(tensor, segment_reduce(rows, ptr, places, ["sum"], 0.0)[0].view(table.shape))
        found = []
        for number, (tensor, want) in enumerate(zip(self.tensors, wanted, strict=True)):
            if not want:
                found.append(tensor.new_empty(0))
            elif number not in self.parts:
                found.append(torch.zeros_like(tensor))
            else:
                found.append(functools.reduce(torch.add, self.parts[number]).to(tensor.dtype))
        return found


def row_program_backward(
    grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds, code, constants, ptr, seed, wanted
):
    """Device implementation of the op `scalegmn_fast::row_program_backward`.

    Args: the op's; kept and extremes as the forward pass gave them. Returns the gradients of the wanted tensors, each
    in its own dtype, and empty tensors of shape [0] for the others. As `row_program` otherwise.
    """
    arguments = tensors, indices, bounds, code, constants
    planned = plan_of(*arguments, wanted)
    tensors, indices = _contiguous(tensors), _contiguous(indices)
    wide, dtype = _wide(tensors), result_dtype(tensors, code, len(bounds) - 1)
    named = _named(tensors, indices, ptr, seed)
    heads = max((section.heads for section in planned if section), default=0)
    if heads:
        along = grad_reduced.to(wide) * reduced.to(wide)
        named["along"] = along.view(along.shape[0], heads, -1).sum(2)
    named |= {"kept_stats": kept.contiguous(), "extremes": extremes.contiguous()}
    named |= {"grad_rows": grad_rows.to(dtype).contiguous(), "grad_reduced": grad_reduced.to(dtype).contiguous()}
    run = functools.partial(_backward, bounds=bounds, tensors=tensors, indices=indices, named=named, wide=wide)
    gradients = _run(run, planned, arguments, wanted)
    with torch.cuda.device_of(tensors[0]):
        return gradients.result(wanted)


def _backward(planned, bounds, tensors, indices, named, wide):
    """(`_Gradients`, the kernels launched) for a plan; named: the kernels' arguments but for outputs."""
    gradients, kernels, like = _Gradients(tensors, indices, bounds, planned, wide), [], tensors[0]
    for section, begin, end in zip(planned, bounds[:-1], bounds[1:], strict=True):
        if section is None or begin == end or not section.request.wanted:
            continue
        source = section.source
        tiles = triton.cdiv(end - begin, section.tile.rows)
        most = programs_at_a_time(section.tile)
        programs = min(most, tiles)
        slots = like.new_empty((programs, source.slot_size), dtype=wide)
        kept_in = torch.bfloat16 if source.saved_type == "bf16" else wide
        saved = like.new_empty((programs, source.saved_size), dtype=kept_in)
        here = named | gradients.named(section, begin) | {"begin": begin, "end": end}
        here |= {"slots": slots, "saved_tiles": saved}
        for first in range(0, tiles, most):
            kernels += _launch(section, min(most, tiles - first), here | {"first_tile": first})
        if source.slot_size:
            gradients.add_parameters(section, slots)
    return gradients, kernels
