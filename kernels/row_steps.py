"""What the kernels that `row_source` writes call: tiles of rows, products, norms, dropout.

Tiles are [BLOCK, COLS] in the arithmetic type, of which COUNT columns hold numbers; the others are 0, in values and in
gradients alike. Rows outside of a program's section hold whatever comes of 0; they are never stored or added up, and
their gradients are 0.
"""

import triton
import triton.language as tl

from .tiles import INTERPRETED, LAYER_NORM_EPS

EPS = tl.constexpr(LAYER_NORM_EPS)


@triton.jit
def kept(x, COUNT: tl.constexpr):
    """x with columns from COUNT on set to 0."""
    if COUNT < x.shape[1]:
        x = tl.where((tl.arange(0, x.shape[1]) < COUNT)[None, :], x, 0.0)
    return x


@triton.jit
def _columns(inside, COUNT: tl.constexpr, COLS: tl.constexpr):
    mask = inside[:, None]
    if COUNT < COLS:
        mask = mask & (tl.arange(0, COLS) < COUNT)[None, :]
    return mask


@triton.jit
def load_rows(
    table, at, inside, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to FIRST + COUNT of the rows `at` (int64) of table [*, WIDTH]."""
    to = table + at[:, None] * WIDTH + (FIRST + tl.arange(0, COLS))[None, :]
    return tl.load(to, mask=_columns(inside, COUNT, COLS), other=0.0).to(ACC)


@triton.jit
def store_rows(table, at, inside, value, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    COLS: tl.constexpr = value.shape[1]
    to = table + at[:, None] * WIDTH + (FIRST + tl.arange(0, COLS))[None, :]
    tl.store(to, value.to(table.dtype.element_ty), mask=_columns(inside, COUNT, COLS))


@triton.jit
def load_vector(vector, FIRST: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr):
    """Numbers FIRST to FIRST + COUNT of a vector as [1, COLS]."""
    col = tl.arange(0, COLS)
    return tl.load(vector + FIRST + col, mask=col < COUNT, other=0.0).to(ACC)[None, :]


@triton.jit
def load_weight(
    weight, INPUTS: tl.constexpr, FIRST_OUT: tl.constexpr, OUTS: tl.constexpr, OUT_COLS: tl.constexpr,
    FIRST_IN: tl.constexpr, INS: tl.constexpr, IN_COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A block of weight [*, INPUTS]: [OUT_COLS, IN_COLS], or its transpose; 0 beyond OUTS and INS."""
    out, column = tl.arange(0, OUT_COLS), tl.arange(0, IN_COLS)
    if TRANSPOSED:
        at = (FIRST_OUT + out)[None, :] * INPUTS + (FIRST_IN + column)[:, None]
        mask = (out < OUTS)[None, :] & (column < INS)[:, None]
    else:
        at = (FIRST_OUT + out)[:, None] * INPUTS + (FIRST_IN + column)[None, :]
        mask = (out < OUTS)[:, None] & (column < INS)[None, :]
    if OUTS < OUT_COLS or INS < IN_COLS:
        return tl.load(weight + at, mask=mask, other=0.0)
    return tl.load(weight + at)


@triton.jit
def settled(x):
    """x, computed by here, not later from what would be kept until then; what is made of it is not what was made of x
    before, and kept since. Float32; x itself in the interpreter.
    """
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)
    return x


@triton.jit
def _once():
    """1, which the compiler does not know. A loop of so many turns is a block of its own: compilers take a time that
    grows with the square of a block's instructions.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, 1;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    if INTERPRETED:  # it multiplies no bfloat16: wider, the same products
        return tl.dot(a.to(ACC), b.to(ACC), input_precision=PRECISION, out_dtype=ACC)
    if a.dtype == tl.float32 and PRECISION != "tf32":  # operands in registers: not those of several products at once
        total = tl.zeros([a.shape[0], b.shape[1]], ACC)
        for _ in range(_once()):
            total = settled(tl.dot(settled(a), settled(b), input_precision=PRECISION, out_dtype=ACC))
        return total
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def halves(x):
    """The left and the right half of x's columns."""
    return tl.split(tl.permute(tl.reshape(settled(x), [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def product(x, block, PRECISION: tl.constexpr):
    """x [BLOCK, k] times block [k, n] of a weight, in the weight's type, added up in x's."""
    return _dot(x.to(block.dtype), block, PRECISION, x.dtype)


@triton.jit
def add_weight_gradient(
    to, fresh, grad, x, weight, INPUTS: tl.constexpr, FIRST_OUT: tl.constexpr, OUTS: tl.constexpr,
    FIRST_IN: tl.constexpr, INS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds grad^T x to a block of to [*, INPUTS], or writes it there if `fresh`."""
    dtype: tl.constexpr = weight.dtype.element_ty
    out, column = tl.arange(0, grad.shape[1]), tl.arange(0, x.shape[1])
    at = to + (FIRST_OUT + out)[:, None] * INPUTS + (FIRST_IN + column)[None, :]
    mask = (out < OUTS)[:, None] & (column < INS)[None, :]
    before = _read_sum(at, mask, fresh)
    _write_sum(at, before + _dot(tl.trans(grad).to(dtype), x.to(dtype), PRECISION, x.dtype), mask)


@triton.jit
def add_vector_gradient(to, fresh, grad, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Adds grad's column sums to numbers FIRST to FIRST + COUNT of a vector, or writes them there if `fresh`."""
    col = tl.arange(0, grad.shape[1])
    before = _read_sum(to + FIRST + col, col < COUNT, fresh)
    _write_sum(to + FIRST + col, before + tl.sum(grad, 0), col < COUNT)


@triton.jit
def _read_sum(at, mask, fresh):
    """Sums that this program alone writes. fresh: there are none yet; None: this tile has written them."""
    if fresh is None:
        tl.debug_barrier()
        before = tl.load(at, mask=mask, other=0.0)
    else:
        before = tl.where(fresh, 0.0, tl.load(at, mask=mask, other=0.0))
    return before


@triton.jit
def _write_sum(at, value, mask):
    # Several threads may hold the same number: all have read it before one writes.
    tl.debug_barrier()
    tl.store(at, value, mask=mask)


@triton.jit
def add_rows(table, at, inside, value, WIDTH: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Adds to rows of a table that this program alone writes, and wrote before."""
    tl.debug_barrier()
    before = load_rows(table, at, inside, WIDTH, FIRST, COUNT, value.shape[1], value.dtype)
    tl.debug_barrier()
    store_rows(table, at, inside, before + value, WIDTH, FIRST, COUNT)


@triton.jit
def _place(tile, COLS: tl.constexpr, ROWS: tl.constexpr):
    return tile + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def save(to, value):
    """Keeps a tile, rounded to the type of `to`, for `saved`, which any thread may call after a barrier."""
    tl.store(_place(to, value.shape[1], value.shape[0]), value.to(to.dtype.element_ty))


@triton.jit
def saved(tile, COLS: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    return tl.load(_place(tile, COLS, ROWS)).to(ACC)


@triton.jit
def centred(x, mean, COUNT: tl.constexpr):
    return kept(x - mean[:, None], COUNT)


@triton.jit
def deviation(squares, WIDTH: tl.constexpr):
    """1 / standard deviation, from the sum of WIDTH squares."""
    return 1.0 / tl.sqrt(squares / WIDTH + EPS)


@triton.jit
def norm_backward(grad, normal, rstd, total, along, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Gradient of x for normal = (x - mean) rstd; total and along: row sums of grad and of grad * normal."""
    return kept((grad - (total / WIDTH)[:, None] - normal * (along / WIDTH)[:, None]) * rstd[:, None], COUNT)


@triton.jit
def safe_factor(largest):
    """A power of two that keeps the squares of rows with this largest magnitude within float32."""
    return tl.where(largest > 2.0**50, 2.0**-70, tl.where(largest < 2.0**-50, 2.0**90, 1.0)).to(largest.dtype)


@triton.jit
def abs_backward(grad, x):
    return tl.where(x > 0.0, grad, tl.where(x < 0.0, -grad, grad * x))


@triton.jit
def head_sums(x, FIRST: tl.constexpr, COUNT: tl.constexpr, HEAD: tl.constexpr, COLS: tl.constexpr):
    """[BLOCK, COLS]: sums over the columns of each head, of which x has FIRST to FIRST + COUNT; a head has HEAD."""
    head_of, place = (FIRST + tl.arange(0, x.shape[1])) // HEAD, tl.arange(0, COLS)
    found = tl.zeros([x.shape[0], COLS], x.dtype)
    for head in range(FIRST // HEAD, (FIRST + COUNT - 1) // HEAD + 1):
        total = tl.sum(tl.where((head_of == head)[None, :], x, 0.0), 1)
        found = tl.where((place == head)[None, :], total[:, None], found)
    return found


@triton.jit
def of_heads(numbers, FIRST: tl.constexpr, COUNT: tl.constexpr, HEAD: tl.constexpr, COLS: tl.constexpr):
    """[BLOCK, COLS]: in each of the columns FIRST to FIRST + COUNT the number of its head."""
    head_of, place = (FIRST + tl.arange(0, COLS)) // HEAD, tl.arange(0, numbers.shape[1])
    found = tl.zeros([numbers.shape[0], COLS], numbers.dtype)
    for head in range(FIRST // HEAD, (FIRST + COUNT - 1) // HEAD + 1):
        number = tl.sum(tl.where((place == head)[None, :], numbers, 0.0), 1)
        found = tl.where((head_of == head)[None, :], number[:, None], found)
    return found


@triton.jit
def _mix(x):
    """32-bit finaliser "lowbias32" by C. Wellons."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropped(x, seed, row, STREAM: tl.constexpr, P: tl.constexpr, THRESHOLD: tl.constexpr, FIRST: tl.constexpr):
    """x / (1 - P) where the row and column are kept, else 0: the reference's `dropout_mask`."""
    zero = (row * 0).to(tl.uint32)
    low, high = tl.load(seed).to(tl.uint32) + zero, tl.load(seed + 1).to(tl.uint32) + zero
    hashed = _mix(low + _mix(high + _mix(zero + STREAM)))
    column = (FIRST + tl.arange(0, x.shape[1])).to(tl.uint32)
    hashed = _mix(_mix(hashed + row.to(tl.uint32))[:, None] + column[None, :])
    return tl.where(hashed >= THRESHOLD, x / (1 - P), 0.0)
