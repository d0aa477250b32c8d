"""What sections of row programs reduce their rows to, per segment: in a tile, from tile to tile, and the derivatives.

A tile reduces its rows of each segment. If those are all of the segment's, the result is written. If not they are a
part: place 0 of the tile is the part of the segment that began before it, place 1 that of the segment which begins in
it and ends in a later one. `holds` [tiles, 2, 2] has the segment of each place, -1 where there is none, and how many
rows of the tile are its. A merging kernel then has a program per tile, which joins the parts of the segment that its
tile's place 1 holds, in an order that the number of parts decides.
"""

import triton
import triton.language as tl

from .segment_reduce import exceeds, find_segment, fold_best, fold_moments

# Fields of a part's statistics: first row; the mean of the others' differences to it; squared deviations; -min; max.
STATISTICS_FIELDS = tl.constexpr(5)


@triton.jit
def segments_of(ptr, row, end, segments, steps):
    """The segment of each row, int64; of rows from `end` on that of the row before it."""
    return find_segment(ptr, tl.minimum(row, end - 1), segments, steps)


@triton.jit
def ranks_of(ptr, segment, row, inside):
    """The place of each row's segment among those of the tile; -1 for rows that are not `inside`."""
    first = (tl.load(ptr + segment) == row) | (row == tl.min(row))
    return tl.where(inside, tl.cumsum(first.to(tl.int32), 0) - 1, -1)


@triton.jit
def _run_of(ptr, segment, row, mine, end):
    """Of a segment whose rows in the tile are `mine`: its number, whether it begins there, and also ends there."""
    at = tl.max(tl.where(mine, segment, -1))
    tile_begin = tl.min(row)
    begins = tl.load(ptr + at) >= tile_begin
    return at, begins, begins & (tl.load(ptr + at + 1) <= tl.minimum(tile_begin + row.shape[0], end))


@triton.jit
def note_parts(ptr, segment, row, inside, end, holds, tile):
    """Writes the tile's entries of `holds`."""
    first, last = tl.min(segment), tl.max(segment)
    mine = inside & (segment == first)
    _, begins, _ = _run_of(ptr, segment, row, mine, end)
    tl.store(holds + 4 * tile, tl.where(begins, -1, first))
    tl.store(holds + 4 * tile + 1, tl.sum(mine.to(tl.int64)))
    mine = inside & (segment == last)
    _, begins, whole = _run_of(ptr, segment, row, mine, end)
    tl.store(holds + 4 * tile + 2, tl.where(begins & ~whole, last, -1))
    tl.store(holds + 4 * tile + 3, tl.sum(mine.to(tl.int64)))


@triton.jit
def _last_tile(holds, tile, segment, tiles, BLOCK_LANES: tl.constexpr):
    """The last tile with a part of the segment of which `tile` has the first."""
    last = tile
    more = segment >= 0
    while more:
        later = last + 1 + tl.arange(0, BLOCK_LANES)
        found = tl.sum((tl.load(holds + 4 * later, mask=later < tiles, other=-1) == segment).to(tl.int32))
        last += found
        more = found == BLOCK_LANES
    return last


# -- sums --------------------------------------------------------------------------------------------------------------


@triton.jit
def add_up(
    value, ptr, segment, rank, row, end, reduced, partial, tile,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Sums per segment of the tile, to reduced [S, WIDTH] or partial [tiles, 2, WIDTH]."""
    col = FIRST + tl.arange(0, value.shape[1])
    mask = tl.arange(0, value.shape[1]) < COUNT
    for k in range(0, tl.max(rank) + 1):
        mine = rank == k
        at, begins, whole = _run_of(ptr, segment, row, mine, end)
        total = tl.sum(tl.where(mine[:, None], value, 0.0), 0)
        if whole:
            tl.store(reduced + at * WIDTH + col, total.to(reduced.dtype.element_ty), mask=mask)
        else:
            tl.store(partial + (2 * tile + begins) * WIDTH + col, total, mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def merge_sums_kernel(
    partial, holds, reduced, tiles,
    WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The parts of `add_up`."""
    tile = tl.program_id(0).to(tl.int64)
    segment = tl.load(holds + 4 * tile + 2)
    if segment >= 0:
        col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        total = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        last = _last_tile(holds, tile, segment, tiles, BLOCK_LANES)
        for first in range(tile, last + 1, BLOCK_LANES):
            part = first + tl.arange(0, BLOCK_LANES)[:, None]
            to = partial + (2 * part + (part == tile)) * WIDTH + col
            total += tl.load(to, mask=(part <= last) & (col < WIDTH), other=0.0)
        total = tl.sum(total, 0, keep_dims=True)
        tl.store(reduced + segment * WIDTH + col, total.to(reduced.dtype.element_ty), mask=col < WIDTH)


# -- statistics --------------------------------------------------------------------------------------------------------


@triton.jit
def _store_statistics(
    reduced, kept_stats, extremes, segment, col, mask, rows, pivot, offset, squares, low, low_row, high, high_row,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What a whole segment's fields [1, columns] give."""
    to = reduced + segment * (4 * WIDTH) + col
    dtype: tl.constexpr = reduced.dtype.element_ty
    tl.store(to, (pivot + offset).to(dtype), mask=mask)
    tl.store(to + WIDTH, (squares / rows).to(dtype), mask=mask)
    tl.store(to + 2 * WIDTH, (-low).to(dtype), mask=mask)
    tl.store(to + 3 * WIDTH, high.to(dtype), mask=mask)
    to = kept_stats + segment * (2 * WIDTH) + col
    tl.store(to, pivot, mask=mask)
    tl.store(to + WIDTH, offset, mask=mask)
    to = extremes + segment * (2 * WIDTH) + col
    tl.store(to, low_row, mask=mask)
    tl.store(to + WIDTH, high_row, mask=mask)


@triton.jit
def summarize(
    value, ptr, segment, rank, row, end, reduced, kept_stats, extremes, partial, partial_rows, tile,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Mean, variance, minimum and maximum per segment of the tile, to reduced [S, 4, WIDTH], and what derivatives read.

    kept_stats [S, 2, WIDTH]: the segment's first row, and the mean of all rows' differences to it; extremes
    [S, 2, WIDTH]: rows of the minimum and maximum, the first where several have it or are NaN. Of a part: partial
    [tiles, 2, STATISTICS_FIELDS, WIDTH] and partial_rows [tiles, 2, 2, WIDTH].
    """
    col = (FIRST + tl.arange(0, value.shape[1]))[None, :]
    mask = (tl.arange(0, value.shape[1]) < COUNT)[None, :]
    tile_begin, place = tl.min(row), tl.arange(0, value.shape[0])
    for k in range(0, tl.max(rank) + 1):
        mine = rank == k
        at, begins, whole = _run_of(ptr, segment, row, mine, end)
        rows = tl.sum(mine.to(value.dtype))
        first = tl.min(tl.where(mine, place, value.shape[0]))
        pivot = tl.sum(tl.where((place == first)[:, None], value, 0.0), 0, keep_dims=True)
        shifted = tl.where(mine[:, None], value - pivot, 0.0)
        offset = tl.sum(shifted, 0, keep_dims=True) / rows
        deviation = tl.where(mine[:, None], shifted - offset, 0.0)
        squares = tl.sum(deviation * deviation, 0, keep_dims=True)
        places = tl.broadcast_to(tl.where(mine, place, -1)[:, None], value.shape)
        low, low_at = fold_best(-value, places)
        high, high_at = fold_best(value, places)
        low_row, high_row = (tile_begin + low_at).to(tl.int32), (tile_begin + high_at).to(tl.int32)
        if whole:
            _store_statistics(
                reduced, kept_stats, extremes, at, col, mask, rows, pivot, offset, squares, low, low_row, high,
                high_row, WIDTH,
            )  # fmt: skip
        else:
            part = 2 * tile + begins
            to = partial + part * (STATISTICS_FIELDS * WIDTH) + col
            tl.store(to, pivot, mask=mask)
            tl.store(to + WIDTH, offset, mask=mask)
            tl.store(to + 2 * WIDTH, squares, mask=mask)
            tl.store(to + 3 * WIDTH, low, mask=mask)
            tl.store(to + 4 * WIDTH, high, mask=mask)
            to = partial_rows + part * (2 * WIDTH) + col
            tl.store(to, low_row, mask=mask)
            tl.store(to + WIDTH, high_row, mask=mask)


@triton.jit(do_not_specialize=["tiles"])
def merge_statistics_kernel(
    partial, partial_rows, holds, reduced, kept_stats, extremes, tiles,
    WIDTH: tl.constexpr, ACC: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The parts of `summarize`."""
    tile = tl.program_id(0).to(tl.int64)
    segment = tl.load(holds + 4 * tile + 2)
    if segment >= 0:
        col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        col_mask = col < WIDTH
        pivot = tl.load(partial + (2 * tile + 1) * (STATISTICS_FIELDS * WIDTH) + col, mask=col_mask, other=0.0)
        rows = tl.zeros([BLOCK_LANES, 1], ACC)
        offset = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        squares = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        low = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        low_row = tl.full([BLOCK_LANES, BLOCK_COLS], -1, tl.int32)
        high = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        high_row = tl.full([BLOCK_LANES, BLOCK_COLS], -1, tl.int32)
        last = _last_tile(holds, tile, segment, tiles, BLOCK_LANES)
        for first in range(tile, last + 1, BLOCK_LANES):
            tile_of = first + tl.arange(0, BLOCK_LANES)[:, None]
            valid = tile_of <= last
            mask = valid & col_mask
            part = 2 * tile_of + (tile_of == tile)
            added = tl.load(holds + 2 * part + 1, mask=valid, other=0).to(ACC)
            share = added / tl.maximum(rows + added, 1.0)
            to = partial + part * (STATISTICS_FIELDS * WIDTH) + col
            mean = (tl.load(to, mask=mask, other=0.0) - pivot) + tl.load(to + WIDTH, mask=mask, other=0.0)
            delta = tl.where(mask, mean - offset, 0.0)
            squares += tl.load(to + 2 * WIDTH, mask=mask, other=0.0) + delta * delta * rows * share
            offset += delta * share
            rows += added
            other, other_row = tl.load(to + 3 * WIDTH, mask=mask, other=0.0), partial_rows + part * (2 * WIDTH) + col
            better = mask & exceeds(other, low, low_row)
            low = tl.where(better, other, low)
            low_row = tl.where(better, tl.load(other_row, mask=mask, other=-1), low_row)
            other = tl.load(to + 4 * WIDTH, mask=mask, other=0.0)
            better = mask & exceeds(other, high, high_row)
            high = tl.where(better, other, high)
            high_row = tl.where(better, tl.load(other_row + WIDTH, mask=mask, other=-1), high_row)
        offset, squares = fold_moments(rows, offset, squares)
        low, low_row = fold_best(low, low_row)
        high, high_row = fold_best(high, high_row)
        _store_statistics(
            reduced, kept_stats, extremes, segment, col, col_mask, tl.sum(rows), pivot, offset, squares, low, low_row,
            high, high_row, WIDTH,
        )  # fmt: skip


@triton.jit
def statistics_backward(
    x, grad_reduced, kept_stats, extremes, ptr, segment, row, inside,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The gradient of rows x for the statistics, from grad_reduced [S, 4, WIDTH] and what `summarize` kept."""
    col = (FIRST + tl.arange(0, x.shape[1]))[None, :]
    mask = inside[:, None] & (tl.arange(0, x.shape[1]) < COUNT)[None, :]
    grad = grad_reduced + segment[:, None] * (4 * WIDTH) + col
    known = kept_stats + segment[:, None] * (2 * WIDTH) + col
    chosen = extremes + segment[:, None] * (2 * WIDTH) + col
    rows = (tl.load(ptr + segment + 1) - tl.load(ptr + segment)).to(x.dtype)
    centred = (x - tl.load(known, mask=mask, other=0.0)) - tl.load(known + WIDTH, mask=mask, other=0.0)
    mean = tl.load(grad, mask=mask, other=0.0).to(x.dtype)
    variance = tl.load(grad + WIDTH, mask=mask, other=0.0).to(x.dtype)
    found = tl.where(mask, (mean + 2.0 * variance * centred) / rows[:, None], 0.0)
    here = mask & (tl.load(chosen, mask=mask, other=-1) == row[:, None])
    found += tl.load(grad + 2 * WIDTH, mask=here, other=0.0).to(x.dtype)
    here = mask & (tl.load(chosen + WIDTH, mask=mask, other=-1) == row[:, None])
    return found + tl.load(grad + 3 * WIDTH, mask=here, other=0.0).to(x.dtype)


# -- attention ---------------------------------------------------------------------------------------------------------


@triton.jit
def attention_weights(logits, ptr, segment, rank, row, end, kept_stats, partial_stats, tile, HEADS: tl.constexpr):
    """Softmax of logits [BLOCK, COLS] over the rows that each segment has in the tile, per head.

    Its largest logits and 1 / the sums of exp(logit - largest) go to kept_stats [S, 2, HEADS]; those of a part, and the
    sums themselves, to partial_stats [tiles, 2, 2, HEADS].
    """
    head = tl.arange(0, logits.shape[1])[None, :]
    mask = head < HEADS
    weights = tl.zeros(logits.shape, logits.dtype)
    for k in range(0, tl.max(rank) + 1):
        mine = rank == k
        at, begins, whole = _run_of(ptr, segment, row, mine, end)
        largest = tl.max(tl.where(mine[:, None], logits, float("-inf")), 0, keep_dims=True)
        found = tl.exp(tl.where(mine[:, None], logits - largest, float("-inf")))
        total = tl.sum(found, 0, keep_dims=True)
        weights = tl.where(mine[:, None], found / total, weights)
        if whole:
            tl.store(kept_stats + at * (2 * HEADS) + head, largest, mask=mask)
            tl.store(kept_stats + at * (2 * HEADS) + HEADS + head, 1.0 / total, mask=mask)
        else:
            to = partial_stats + (2 * tile + begins) * (2 * HEADS) + head
            tl.store(to, largest, mask=mask)
            tl.store(to + HEADS, total, mask=mask)
    return weights


@triton.jit(do_not_specialize=["tiles"])
def merge_attention_kernel(
    partial, partial_stats, holds, reduced, kept_stats, tiles,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, BLOCK_LANES: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The parts of `attention_weights`, and of `add_up` of the rows that these weigh."""
    tile = tl.program_id(0).to(tl.int64)
    segment = tl.load(holds + 4 * tile + 2)
    if segment >= 0:
        col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        col_mask = col < WIDTH
        head = col // (WIDTH // HEADS)
        largest = tl.full([BLOCK_LANES, BLOCK_COLS], float("-inf"), ACC)
        total = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        result = tl.zeros([BLOCK_LANES, BLOCK_COLS], ACC)
        last = _last_tile(holds, tile, segment, tiles, BLOCK_LANES)
        for first in range(tile, last + 1, BLOCK_LANES):
            tile_of = first + tl.arange(0, BLOCK_LANES)[:, None]
            mask = (tile_of <= last) & col_mask
            at = partial_stats + (2 * tile_of + (tile_of == tile)) * (2 * HEADS) + head
            largest = tl.maximum(largest, tl.load(at, mask=mask, other=float("-inf")))
        largest = tl.where(col_mask, tl.max(largest, 0, keep_dims=True), 0.0)
        for first in range(tile, last + 1, BLOCK_LANES):
            tile_of = first + tl.arange(0, BLOCK_LANES)[:, None]
            mask = (tile_of <= last) & col_mask
            part = 2 * tile_of + (tile_of == tile)
            at = partial_stats + part * (2 * HEADS) + head
            weight = tl.load(at + HEADS, mask=mask, other=0.0)
            weight *= tl.exp(tl.load(at, mask=mask, other=float("-inf")) - largest)
            total += weight
            result += weight * tl.load(partial + part * WIDTH + col, mask=mask, other=0.0)
        total = tl.where(col_mask, tl.sum(total, 0, keep_dims=True), 1.0)
        result = tl.sum(result, 0, keep_dims=True) / total
        tl.store(reduced + segment * WIDTH + col, result.to(reduced.dtype.element_ty), mask=col_mask)
        mask = col_mask & (col % (WIDTH // HEADS) == 0)
        to = kept_stats + segment * (2 * HEADS) + head
        tl.store(to, largest, mask=mask)
        tl.store(to + HEADS, 1.0 / total, mask=mask)


@triton.jit
def attention_weights_again(logits, kept_stats, segment, inside, HEADS: tl.constexpr):
    """Softmax of logits over the rows of each segment, from what the forward pass kept; 0 for rows not `inside`."""
    head = tl.arange(0, logits.shape[1])[None, :]
    mask = inside[:, None] & (head < HEADS)
    known = kept_stats + segment[:, None] * (2 * HEADS) + head
    weights = tl.exp(logits - tl.load(known, mask=mask, other=0.0)) * tl.load(known + HEADS, mask=mask, other=0.0)
    return tl.where(mask, weights, 0.0)
