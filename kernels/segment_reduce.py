"""`segment_reduce` on a GPU: sum, mean, min, max, var and std of the rows of CSR segments in one pass over the rows.

Forward: a lane of a program owns a segment and walks its slots in order, so nothing is exchanged between threads. A
segment of more than CHUNK slots would occupy its program for too long: two more kernels cut the slots into chunks of
CHUNK, reduce each long segment's part of each chunk, and merge the parts of a segment in an order fixed by its length
and place. Which segments are long is decided on the device, from ptr, so nothing waits for the host.

Backward: a lane owns a row of x, finds the segments of the row's slots by bisection in ptr, and adds their
contributions in slot order; the work per row is the same however long the segments are.

Deterministic: no atomics, and every order of summation depends on ptr alone. Variances use Welford's update within a
lane and the merge of (count, mean, sum of squared deviations) between lanes and chunks, so nothing cancels. They are
taken of x minus the segment's first row (the pivot): that mean has the size of the deviations, so gradients of var and
std are as accurate far from 0 as near it. The mean of x minus the pivot is the reduction "offset", internal here.
"""

import torch
import triton
import triton.language as tl

from .launching import launch
from .sorted_index import sorted_index
from .tiles import MIN_COLS, TILE, WARPS, accumulator_type, launch_options, next_power_of_2

CHUNK = 256
UNROLL = 2
MAX_COLS = 128


@triton.constexpr_function
def position(name, reduce):
    """Place of `name` among the names in `reduce`."""
    return reduce.split(" ").index(name)


@triton.constexpr_function
def how_many(names, reduce):
    """How many of `names` are in `reduce`."""
    return sum(name in names.split(" ") for name in reduce.split(" "))


@triton.constexpr_function
def has(names, reduce):
    """Whether any of `names` is in `reduce`."""
    return any(name in names.split(" ") for name in reduce.split(" "))


@triton.constexpr_function
def arg_position(name, reduce):
    """Place of `name` among the min and max in `reduce`."""
    return [other for other in reduce.split(" ") if other in ("min", "max")].index(name)


@triton.constexpr_function
def partial_fields(reduce):
    """Numbers per column that describe a part of a segment: sum; mean, sum of squared deviations; -min; max."""
    names = set(reduce.split(" "))
    return bool(names & {"sum", "mean"}) + 2 * bool(names & {"var", "std", "offset"}) + len(names & {"min", "max"})


@triton.jit
def find_segment(ptr, slot, segments, steps):
    """The segment s with ptr[s] <= slot < ptr[s + 1], by `steps` halvings, for slots below ptr[segments]."""
    low = slot * 0
    high = low + segments
    for _ in range(steps):
        middle = low + (high - low) // 2
        below = tl.load(ptr + middle) <= slot
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def exceeds(value, best, best_at):
    """Whether `value` replaces `best`: it is larger, the first NaN, or the first value at all (best_at < 0)."""
    return (value > best) | ((value != value) & (best == best)) | (best_at < 0)


@triton.jit
def _pivot(x, order, slot, mask, some, col, width, HAS_ORDER: tl.constexpr, ACC: tl.constexpr):
    """The rows [lanes, columns] of the slots [lanes]; 0 where not `some`."""
    row = slot
    if HAS_ORDER:
        row = tl.load(order + slot, mask=some, other=0).to(tl.int64)
    return tl.load(x + row[:, None] * width + col[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _scan(
    x, order, start_of, first, length, col, width, STRIDE: tl.constexpr,
    REDUCE: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Lane i reduces the slots first[i] + k STRIDE, 0 <= k < length[i], of the segment whose first slot is start_of[i].

    Returns tiles [lanes, columns]: sum; mean of x - pivot and sum of squared deviations; -min and the k it was first
    seen at; max and its k. The k are -1 for empty lanes; what REDUCE does not need is left at its initial value.
    """
    LANES: tl.constexpr = first.shape[0]
    COLS: tl.constexpr = col.shape[0]
    SUM: tl.constexpr = has("sum mean", REDUCE)
    MOMENTS: tl.constexpr = has("var std offset", REDUCE)
    MIN: tl.constexpr = has("min", REDUCE)
    MAX: tl.constexpr = has("max", REDUCE)
    total = tl.zeros([LANES, COLS], ACC)
    mean = tl.zeros([LANES, COLS], ACC)
    squares = tl.zeros([LANES, COLS], ACC)
    low = tl.zeros([LANES, COLS], ACC)
    low_at = tl.full([LANES, COLS], -1, tl.int32)
    high = tl.zeros([LANES, COLS], ACC)
    high_at = tl.full([LANES, COLS], -1, tl.int32)
    col_mask = (col < width)[None, :]
    if MOMENTS:
        some = length > 0
        pivot = _pivot(x, order, start_of, some[:, None] & col_mask, some, col, width, HAS_ORDER, ACC)
    for start in range(0, tl.max(length), UNROLL):
        for step in tl.static_range(UNROLL):
            k = start + step
            valid = (k < length)[:, None]
            row = (first + k * STRIDE)[:, None]
            if HAS_ORDER:
                row = tl.load(order + row, mask=valid, other=0).to(tl.int64)
            value = tl.load(x + row * width + col[None, :], mask=valid & col_mask, other=0.0).to(ACC)
            if SUM:
                total += value
            if MOMENTS:
                shifted = value - pivot
                delta = shifted - mean
                mean += tl.where(valid, delta / (k + 1), 0.0)
                squares += tl.where(valid, delta * (shifted - mean), 0.0)
            if MIN:
                better = valid & exceeds(-value, low, low_at)
                low = tl.where(better, -value, low)
                low_at = tl.where(better, k, low_at)
            if MAX:
                better = valid & exceeds(value, high, high_at)
                high = tl.where(better, value, high)
                high_at = tl.where(better, k, high_at)
    return total, mean, squares, low, low_at, high, high_at


@triton.jit
def fold_moments(length, mean, squares):
    """Merges the lanes' means and sums of squared deviations [lanes, columns] into [1, columns]; length [lanes, 1]."""
    n = tl.maximum(tl.sum(length, 0, keep_dims=True), 1.0)
    merged = tl.sum(length * mean, 0, keep_dims=True) / n
    delta = mean - merged
    return merged, tl.sum(squares + length * delta * delta, 0, keep_dims=True)


@triton.jit
def fold_best(best, at):
    """Merges the lanes' largest values and where they were first seen into [1, columns]; the first place wins ties."""
    LARGEST: tl.constexpr = 2**62 if at.dtype == tl.int64 else 2**31 - 1
    some = at >= 0
    nan = some & (best != best)
    number = some & (best == best)
    any_nan = tl.max(nan.to(tl.int32), 0, keep_dims=True) > 0
    top = tl.max(tl.where(number, best, float("-inf")), 0, keep_dims=True)
    holds = tl.where(any_nan, nan, number & (best == top))
    first = tl.min(tl.where(holds, at, LARGEST), 0, keep_dims=True)
    return tl.where(any_nan, float("nan"), top), tl.where(first == LARGEST, -1, first)


@triton.jit
def _store_best(to, arg_to, order, value, slot, mask, HAS_ORDER: tl.constexpr):
    tl.store(to, tl.where(slot < 0, 0.0, value).to(to.dtype.element_ty), mask=mask)
    if HAS_ORDER:
        slot = tl.load(order + slot, mask=mask & (slot >= 0), other=-1)
    tl.store(arg_to, slot.to(arg_to.dtype.element_ty), mask=mask)


@triton.jit
def _store_segments(
    out, arg, order, segment, length, mask, col, width, total, mean, squares, low, low_slot, high, high_slot,
    REDUCE: tl.constexpr, EPS: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Writes out [S, K, d] and arg [S, A, d] of the segments [lanes] from the reduced tiles [lanes, columns]."""
    K: tl.constexpr = how_many("sum mean min max var std offset", REDUCE)
    A: tl.constexpr = how_many("min max", REDUCE)
    to = out + segment[:, None] * (K * width) + col[None, :]
    arg_to = arg + segment[:, None] * (A * width) + col[None, :]
    n = tl.maximum(length, 1).to(total.dtype)[:, None]
    if has("sum", REDUCE):
        tl.store(to + position("sum", REDUCE) * width, total.to(out.dtype.element_ty), mask=mask)
    if has("mean", REDUCE):
        tl.store(to + position("mean", REDUCE) * width, (total / n).to(out.dtype.element_ty), mask=mask)
    if has("offset", REDUCE):
        tl.store(to + position("offset", REDUCE) * width, mean.to(out.dtype.element_ty), mask=mask)
    var = squares / n
    if has("var", REDUCE):
        tl.store(to + position("var", REDUCE) * width, var.to(out.dtype.element_ty), mask=mask)
    if has("std", REDUCE):
        std = tl.where(var <= EPS, 0.0, tl.sqrt(var))
        tl.store(to + position("std", REDUCE) * width, std.to(out.dtype.element_ty), mask=mask)
    if has("min", REDUCE):
        at = arg_position("min", REDUCE) * width
        _store_best(to + position("min", REDUCE) * width, arg_to + at, order, -low, low_slot, mask, HAS_ORDER)
    if has("max", REDUCE):
        at = arg_position("max", REDUCE) * width
        _store_best(to + position("max", REDUCE) * width, arg_to + at, order, high, high_slot, mask, HAS_ORDER)


@triton.jit(do_not_specialize=["segments"])
def segments_kernel(
    x, ptr, order, out, arg, segments, width,
    REDUCE: tl.constexpr, EPS: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Every segment of at most CHUNK slots, a lane each."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = segment < segments
    begin = tl.load(ptr + segment, mask=inside, other=0).to(tl.int64)
    length = tl.load(ptr + segment + 1, mask=inside, other=0).to(tl.int64) - begin
    mine = inside & (length <= CHUNK)
    length = tl.where(mine, length, 0).to(tl.int32)
    total, mean, squares, low, low_at, high, high_at = _scan(
        x, order, begin, begin, length, col, width, 1, REDUCE, HAS_ORDER, ACC, UNROLL
    )
    low_slot = tl.where(low_at < 0, -1, begin[:, None] + low_at)
    high_slot = tl.where(high_at < 0, -1, begin[:, None] + high_at)
    mask = mine[:, None] & (col < width)[None, :]
    _store_segments(
        out, arg, order, segment, length, mask, col, width, total, mean, squares, low, low_slot, high, high_slot,
        REDUCE, EPS, HAS_ORDER,
    )  # fmt: skip


@triton.jit(do_not_specialize=["segments", "steps"])
def chunks_kernel(
    x, ptr, order, partial, partial_at, segments, steps, width,
    REDUCE: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The part of a long segment that lies in one chunk of slots.

    A chunk meets at most two segments longer than itself: one that holds its first slot (part 0), one that starts
    behind that slot and holds the chunk's last one (part 1). Part p of chunk c goes to partial [2 c + p, fields, d]
    (see `partial_fields`) and partial_at [2 c + p, A, d] (slot within the part; min before max).
    """
    part = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = (col < width)[None, :]
    chunk_begin = part // 2 * CHUNK
    chunk_end = tl.minimum(chunk_begin + CHUNK, tl.load(ptr + segments).to(tl.int64))
    if chunk_begin < chunk_end:
        segment = find_segment(ptr, tl.where(part % 2 == 0, chunk_begin, chunk_end - 1), segments, steps)
        begin = tl.load(ptr + segment).to(tl.int64)
        end = tl.load(ptr + segment + 1).to(tl.int64)
        if (end - begin > CHUNK) & ((part % 2 == 0) | (begin > chunk_begin)):
            lane = tl.arange(0, BLOCK_LANES)
            start_of = begin + lane * 0
            begin = tl.maximum(begin, chunk_begin)
            end = tl.minimum(end, chunk_end)
            length = tl.maximum((end - begin).to(tl.int32) - lane + (BLOCK_LANES - 1), 0) // BLOCK_LANES
            total, mean, squares, low, low_at, high, high_at = _scan(
                x, order, start_of, begin + lane, length, col, width, BLOCK_LANES, REDUCE, HAS_ORDER, ACC, UNROLL
            )
            FIELDS: tl.constexpr = partial_fields(REDUCE)
            to = partial + part * (FIELDS * width) + col[None, :]
            at_to = partial_at + part * (how_many("min max", REDUCE) * width) + col[None, :]
            if has("sum mean", REDUCE):
                tl.store(to, tl.sum(total, 0, keep_dims=True), mask=col_mask)
                to += width
            if has("var std offset", REDUCE):
                mean, squares = fold_moments(length.to(ACC)[:, None], mean, squares)
                tl.store(to, mean, mask=col_mask)
                tl.store(to + width, squares, mask=col_mask)
                to += 2 * width
            if has("min", REDUCE):
                low, low_at = fold_best(low, tl.where(low_at < 0, -1, low_at * BLOCK_LANES + lane[:, None]))
                tl.store(to, low, mask=col_mask)
                tl.store(at_to, low_at, mask=col_mask)
                to += width
                at_to += width
            if has("max", REDUCE):
                high, high_at = fold_best(high, tl.where(high_at < 0, -1, high_at * BLOCK_LANES + lane[:, None]))
                tl.store(to, high, mask=col_mask)
                tl.store(at_to, high_at, mask=col_mask)


@triton.jit(do_not_specialize=["segments", "steps"])
def merge_kernel(
    ptr, order, partial, partial_at, out, arg, segments, steps, width,
    REDUCE: tl.constexpr, EPS: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The long segment that starts in this program's chunk of slots, if one does, from its parts (see `chunks_kernel`).

    At most one does: it reaches beyond the chunk, so it holds the chunk's last slot.
    """
    chunk = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = (col < width)[None, :]
    chunk_end = tl.minimum((chunk + 1) * CHUNK, tl.load(ptr + segments).to(tl.int64))
    if chunk * CHUNK < chunk_end:
        segment = find_segment(ptr, chunk_end - 1, segments, steps)
        begin = tl.load(ptr + segment).to(tl.int64)
        end = tl.load(ptr + segment + 1).to(tl.int64)
        if (end - begin > CHUNK) & (begin >= chunk * CHUNK):
            FIELDS: tl.constexpr = partial_fields(REDUCE)
            n = tl.zeros([BLOCK_LANES, 1], ACC)
            total = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
            mean = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
            squares = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
            low = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
            low_slot = tl.full([BLOCK_LANES, BLOCK_COLS], -1, tl.int64)
            high = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
            high_slot = tl.full([BLOCK_LANES, BLOCK_COLS], -1, tl.int64)
            last = (end - 1) // CHUNK
            for first in range(chunk, last + 1, BLOCK_LANES):
                piece = first + tl.arange(0, BLOCK_LANES)
                valid = (piece <= last)[:, None]
                mask = valid & col_mask
                piece_begin = tl.maximum(piece * CHUNK, begin)
                part = piece * 2 + (begin > piece * CHUNK)
                at = partial + part[:, None] * (FIELDS * width) + col[None, :]
                at_at = partial_at + part[:, None] * (how_many("min max", REDUCE) * width) + col[None, :]
                if has("sum mean", REDUCE):
                    total += tl.load(at, mask=mask, other=0.0)
                    at += width
                if has("var std offset", REDUCE):
                    length = tl.minimum((piece + 1) * CHUNK, end) - piece_begin
                    added = tl.where(valid, length[:, None], 0).to(ACC)
                    share = added / tl.maximum(n + added, 1.0)
                    delta = tl.load(at, mask=mask, other=0.0) - mean
                    mean += tl.where(valid, delta * share, 0.0)
                    squares += tl.load(at + width, mask=mask, other=0.0)
                    squares += tl.where(valid, delta * delta * n * share, 0.0)
                    n += added
                    at += 2 * width
                if has("min", REDUCE):
                    value = tl.load(at, mask=mask, other=0.0)
                    slot = piece_begin[:, None] + tl.load(at_at, mask=mask, other=0)
                    better = valid & exceeds(value, low, low_slot)
                    low = tl.where(better, value, low)
                    low_slot = tl.where(better, slot, low_slot)
                    at += width
                    at_at += width
                if has("max", REDUCE):
                    value = tl.load(at, mask=mask, other=0.0)
                    slot = piece_begin[:, None] + tl.load(at_at, mask=mask, other=0)
                    better = valid & exceeds(value, high, high_slot)
                    high = tl.where(better, value, high)
                    high_slot = tl.where(better, slot, high_slot)
            total = tl.sum(total, 0, keep_dims=True)
            if has("var std offset", REDUCE):
                mean, squares = fold_moments(n, mean, squares)
            if has("min", REDUCE):
                low, low_slot = fold_best(low, low_slot)
            if has("max", REDUCE):
                high, high_slot = fold_best(high, high_slot)
            own = segment + tl.zeros([1], tl.int64)
            _store_segments(
                out, arg, order, own, end - begin + tl.zeros([1], tl.int64), col_mask, col, width,
                total, mean, squares, low, low_slot, high, high_slot, REDUCE, EPS, HAS_ORDER,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "segments", "steps"])
def backward_kernel(
    grad, x, ptr, order, row_slots, row_ptr, arg, moments, grad_x, rows, segments, steps, width,
    REDUCE: tl.constexpr, EPS: tl.constexpr, HAS_ORDER: tl.constexpr, ACC: tl.constexpr,
    BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """grad_x [rows, d]: a lane per row. moments [S, 2, d]: offset and var.

    With an order, row_slots [row_ptr[r] : row_ptr[r + 1]] are the slots of row r, ascending; without, slot r is row r.
    """
    K: tl.constexpr = how_many("sum mean min max var std", REDUCE)
    A: tl.constexpr = how_many("min max", REDUCE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inside = row < rows
    mask = inside[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    if HAS_ORDER:
        begin = tl.load(row_ptr + row, mask=inside, other=0)
        uses = (tl.load(row_ptr + row + 1, mask=inside, other=0) - begin).to(tl.int32)
    else:
        begin = row
        uses = (row < tl.load(ptr + segments)).to(tl.int32)
    value = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
    if has("var std", REDUCE):
        value = tl.load(x + at, mask=mask, other=0.0).to(ACC)
    result = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
    previous = tl.full([BLOCK_LANES], -1, tl.int64)
    for k in range(0, tl.max(uses)):
        used = k < uses
        slot = begin + k
        if HAS_ORDER:
            slot = tl.load(row_slots + slot, mask=used, other=0)
        segment = find_segment(ptr, slot, segments, steps)
        length = tl.load(ptr + segment + 1) - tl.load(ptr + segment)
        n = tl.maximum(length, 1).to(ACC)[:, None]
        here = used[:, None] & mask
        from_grad = grad + segment[:, None] * (K * width) + col[None, :]
        if has("sum", REDUCE):
            result += tl.load(from_grad + position("sum", REDUCE) * width, mask=here, other=0.0).to(ACC)
        if has("mean", REDUCE):
            result += tl.load(from_grad + position("mean", REDUCE) * width, mask=here, other=0.0).to(ACC) / n
        if A > 0:
            # A row that stands in a segment twice receives the gradient of its min and max once.
            once = here & (segment != previous)[:, None]
            from_arg = arg + segment[:, None] * (A * width) + col[None, :]
            if has("min", REDUCE):
                chosen = tl.load(from_arg + arg_position("min", REDUCE) * width, mask=once, other=-1) == row[:, None]
                result += tl.load(from_grad + position("min", REDUCE) * width, mask=chosen & once, other=0.0).to(ACC)
            if has("max", REDUCE):
                chosen = tl.load(from_arg + arg_position("max", REDUCE) * width, mask=once, other=-1) == row[:, None]
                result += tl.load(from_grad + position("max", REDUCE) * width, mask=chosen & once, other=0.0).to(ACC)
            previous = segment
        if has("var std", REDUCE):
            from_moments = moments + segment[:, None] * (2 * width) + col[None, :]
            first = tl.load(ptr + segment).to(tl.int64)
            pivot = _pivot(x, order, first, here, used, col, width, HAS_ORDER, ACC)
            centred = ((value - pivot) - tl.load(from_moments, mask=here, other=0.0)) / n
            if has("var", REDUCE):
                cotangent = tl.load(from_grad + position("var", REDUCE) * width, mask=here, other=0.0).to(ACC)
                result += tl.where(here, 2.0 * cotangent * centred, 0.0)
            if has("std", REDUCE):
                cotangent = tl.load(from_grad + position("std", REDUCE) * width, mask=here, other=0.0).to(ACC)
                var = tl.load(from_moments + width, mask=here, other=0.0)
                flat = var <= EPS
                slope = cotangent / tl.sqrt(tl.where(flat, 1.0, var))
                result += tl.where(here & ~flat, slope * centred, 0.0)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=mask)


def segment_tile(width):
    """Launch configuration for `width` columns: up to 128 of them per program, 1024 elements in 4 warps."""
    cols = min(MAX_COLS, max(MIN_COLS, next_power_of_2(width)))
    return {"BLOCK_LANES": TILE // cols, "BLOCK_COLS": cols, **launch_options(WARPS)}


def _reduce(x, ptr, order, reduce, eps, dtype):
    """Out [S, K, d] in `dtype`, arg [S, A, d] in ptr's dtype."""
    segments, width = ptr.numel() - 1, x.shape[1]
    args = sum(name in ("min", "max") for name in reduce)
    out = torch.empty((segments, len(reduce), width), dtype=dtype, device=x.device)
    arg = torch.empty((segments, args, width), dtype=ptr.dtype, device=x.device)
    if segments == 0 or width == 0:
        return out, arg
    tile = segment_tile(width)
    cols = triton.cdiv(width, tile["BLOCK_COLS"])
    flags = {
        "REDUCE": " ".join(reduce),
        "HAS_ORDER": order is not None,
        "ACC": accumulator_type(x.dtype),
        "CHUNK": CHUNK,
        **tile,
    }
    with torch.cuda.device_of(x):
        grid = triton.cdiv(segments, tile["BLOCK_LANES"]), cols
        launch(segments_kernel, grid, x, ptr, order, out, arg, segments, width, EPS=eps, UNROLL=UNROLL, **flags)
        slots = x.shape[0] if order is None else order.numel()
        if slots > CHUNK:
            chunks = triton.cdiv(slots, CHUNK)
            fields = partial_fields(" ".join(reduce))
            acc = torch.float64 if x.dtype == torch.float64 else torch.float32
            partial = torch.empty((2 * chunks, fields, width), dtype=acc, device=x.device)
            partial_at = torch.empty((2 * chunks, args, width), dtype=torch.int32, device=x.device)
            steps = segments.bit_length()
            launch(
                chunks_kernel, (2 * chunks, cols),
                x, ptr, order, partial, partial_at, segments, steps, width, UNROLL=UNROLL, **flags,
            )  # fmt: skip
            launch(
                merge_kernel, (chunks, cols),
                ptr, order, partial, partial_at, out, arg, segments, steps, width, EPS=eps, **flags,
            )  # fmt: skip
    return out, arg


def segment_reduce(x, ptr, order, reduce, eps):
    """Device implementation of the op `scalegmn_fast::segment_reduce`.

    Args: the op's, validated: x [R, d], ptr [S + 1], order [ptr[-1]] or None, all contiguous; distinct names in reduce.
    Returns out [S, K, d] in x's dtype and arg [S, A, d] in ptr's dtype: rows of x, -1 for empty segments. Computes in
    float32, in float64 for float64. Empty segments give 0; NaN propagates; ties go to the first slot. Does not wait
    for the device.
    """
    return _reduce(x, ptr, order, tuple(reduce), eps, x.dtype)


def segment_reduce_backward(grad, x, ptr, order, arg, out, reduce, eps):
    """Device implementation of the op `scalegmn_fast::segment_reduce_backward`.

    Args: as in `segment_reduce`; grad [S, K, d] contiguous. Returns the gradient of x [R, d] in x's dtype: 0 for rows
    in no slot, the sum over its slots, in their order, for a row that `order` repeats (one lane adds them up: a row
    repeated very often is slow). `out` is not read: the moments are computed again, unrounded. Does not wait for
    the device.
    """
    reduce = tuple(reduce)
    grad_x = torch.empty_like(x)
    segments, (rows, width) = ptr.numel() - 1, x.shape
    if grad_x.numel() == 0 or segments == 0:
        return grad_x.zero_()
    moments = row_slots = row_ptr = None
    if {"var", "std"} & set(reduce):
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        moments, _ = _reduce(x, ptr, order, ("offset", "var"), eps, acc)
    if order is not None:
        row_ptr, row_slots = sorted_index(order, 0, order.numel(), rows)
    tile = segment_tile(width)
    grid = (triton.cdiv(rows, tile["BLOCK_LANES"]), triton.cdiv(width, tile["BLOCK_COLS"]))
    with torch.cuda.device_of(x):
        launch(
            backward_kernel, grid,
            grad, x, ptr, order, row_slots, row_ptr, arg, moments, grad_x, rows, segments, segments.bit_length(), width,
            REDUCE=" ".join(reduce), EPS=eps, HAS_ORDER=order is not None, ACC=accumulator_type(x.dtype), **tile,
        )  # fmt: skip
    return grad_x
