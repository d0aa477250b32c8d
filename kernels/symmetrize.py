"""`symmetrize` on a GPU: sign and scale canonicalisation of rows, forward and backward, bound by memory.

Kinds: act(LN(h + b)) + act(LN(-h + b)), |h|, and h / (||h||_2 + eps). A program owns a tile of rows and keeps whole
rows in registers (columns padded to a power of two and masked): h is read once and nothing but the result is written.
The backward pass recomputes what it needs from h.

Deterministic. Gradients of the parameters: each program sums its rows, a second kernel sums the programs; both orders
depend on the shape alone, not on the device.
"""

import torch
import triton
import triton.language as tl

from .activations import activate, activation_derivative
from .launching import launch
from .tiles import (
    LAYER_NORM_EPS,
    MAX_WIDTH,
    TILE,
    WARPS,
    accumulator_type,
    launch_options,
    row_tile,
    standardize,
    standardize_backward,
)

# Programs that accumulate parameter gradients: several per multiprocessor of the largest chip, few enough to sum up.
PARTIAL_ROWS = 1024
PARTIAL_TILE = {"BLOCK_ROWS": 128, "BLOCK_COLS": 16, **launch_options(WARPS)}
FLAT_TILE = {"BLOCK": TILE, **launch_options(WARPS)}


@triton.jit
def _branch(x, mask, scale, shift, width, HAS_NORM: tl.constexpr, EPS: tl.constexpr):
    """LN(x) * scale + shift of a tile, the standardised tile, and 1 / standard deviation; x, x and 1 without a norm."""
    normal = tl.where(mask, x, 0.0)
    rstd = tl.full((x.shape[0],), 1.0, x.dtype)
    pre = normal
    if HAS_NORM:
        normal, rstd = standardize(normal, mask, width, EPS)
        pre = normal * scale + shift
    return pre, normal, rstd


@triton.jit(do_not_specialize=["rows"])
def activation_forward_kernel(
    h, bias, norm_weight, norm_bias, out, rows, width,
    ACTIVATION: tl.constexpr, W0: tl.constexpr, EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    col_mask = col < width
    mask = (row < rows)[:, None] & col_mask[None, :]
    at = row[:, None] * width + col[None, :]

    offset = tl.zeros([1, BLOCK_COLS], ACC)
    scale = offset
    shift = offset
    if HAS_BIAS:
        offset = tl.load(bias + col, mask=col_mask, other=0.0).to(ACC)[None, :]
    if HAS_NORM:
        scale = tl.load(norm_weight + col, mask=col_mask, other=0.0).to(ACC)[None, :]
        shift = tl.load(norm_bias + col, mask=col_mask, other=0.0).to(ACC)[None, :]

    value = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    plus, _, _ = _branch(offset + value, mask, scale, shift, width, HAS_NORM, EPS)
    minus, _, _ = _branch(offset - value, mask, scale, shift, width, HAS_NORM, EPS)
    result = activate(plus, ACTIVATION, W0) + activate(minus, ACTIVATION, W0)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def activation_backward_kernel(
    grad, h, bias, norm_weight, norm_bias, grad_h, partial, rows, width,
    ACTIVATION: tl.constexpr, W0: tl.constexpr, EPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """grad_h, and partial [programs, parameters, width]: sums for bias, norm_weight, norm_bias, as far as present."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    col = tl.arange(0, BLOCK_COLS)
    col_mask = col < width

    offset = tl.zeros([1, BLOCK_COLS], ACC)
    scale = offset
    shift = offset
    if HAS_BIAS:
        offset = tl.load(bias + col, mask=col_mask, other=0.0).to(ACC)[None, :]
        bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
    if HAS_NORM:
        scale = tl.load(norm_weight + col, mask=col_mask, other=0.0).to(ACC)[None, :]
        shift = tl.load(norm_bias + col, mask=col_mask, other=0.0).to(ACC)[None, :]
        scale_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)
        shift_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLS], ACC)

    for first in range(program * BLOCK_ROWS, rows, programs * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & col_mask[None, :]
        at = row.to(tl.int64)[:, None] * width + col[None, :]
        value = tl.load(h + at, mask=mask, other=0.0).to(ACC)
        cotangent = tl.load(grad + at, mask=mask, other=0.0).to(ACC)

        pre, normal, rstd = _branch(offset + value, mask, scale, shift, width, HAS_NORM, EPS)
        plus = cotangent * activation_derivative(pre, ACTIVATION, W0)
        if HAS_NORM:
            scale_sum += plus * normal
            shift_sum += plus
            plus = standardize_backward(plus * scale, normal, rstd, width)

        pre, normal, rstd = _branch(offset - value, mask, scale, shift, width, HAS_NORM, EPS)
        minus = cotangent * activation_derivative(pre, ACTIVATION, W0)
        if HAS_NORM:
            scale_sum += minus * normal
            shift_sum += minus
            minus = standardize_backward(minus * scale, normal, rstd, width)

        if HAS_BIAS:
            bias_sum += tl.where(mask, plus + minus, 0.0)
        tl.store(grad_h + at, (plus - minus).to(grad_h.dtype.element_ty), mask=mask)

    to = partial + program * ((HAS_BIAS + 2 * HAS_NORM) * width) + col
    if HAS_BIAS:
        tl.store(to, tl.sum(bias_sum, 0), mask=col_mask)
        to += width
    if HAS_NORM:
        tl.store(to, tl.sum(scale_sum, 0), mask=col_mask)
        tl.store(to + width, tl.sum(shift_sum, 0), mask=col_mask)


@triton.jit
def _sum_rows(partial, rows, stride, col, col_mask, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Sum over the rows of partial [rows, stride] at the columns `col`, in an order fixed by `rows`."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], partial.dtype.element_ty)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & col_mask[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * stride + col[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["rows"])
def parameter_gradient_kernel(
    partial, grad_bias, grad_norm_weight, grad_norm_bias, rows, width,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Sums partial [rows, parameters, width] over its rows."""
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_mask = col < width
    stride = (HAS_BIAS + 2 * HAS_NORM) * width
    at = partial
    if HAS_BIAS:
        total = _sum_rows(at, rows, stride, col, col_mask, BLOCK_ROWS, BLOCK_COLS)
        tl.store(grad_bias + col, total.to(grad_bias.dtype.element_ty), mask=col_mask)
        at += width
    if HAS_NORM:
        total = _sum_rows(at, rows, stride, col, col_mask, BLOCK_ROWS, BLOCK_COLS)
        tl.store(grad_norm_weight + col, total.to(grad_norm_weight.dtype.element_ty), mask=col_mask)
        total = _sum_rows(at + width, rows, stride, col, col_mask, BLOCK_ROWS, BLOCK_COLS)
        tl.store(grad_norm_bias + col, total.to(grad_norm_bias.dtype.element_ty), mask=col_mask)


@triton.jit
def abs_forward_kernel(h, out, elements, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    value = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    tl.store(out + at, tl.abs(value).to(out.dtype.element_ty), mask=mask)


@triton.jit
def abs_backward_kernel(grad, h, grad_h, elements, ACC: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    value = tl.load(h + at, mask=mask, other=0.0).to(ACC)
    cotangent = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
    result = tl.where(value > 0.0, cotangent, tl.where(value < 0.0, -cotangent, cotangent * 0.0))
    tl.store(grad_h + at, result.to(grad_h.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_norm(value):
    """Rows times a power of two that keeps their squares within float32, that factor, and the norms of the result."""
    largest = tl.max(tl.abs(value), 1)
    factor = tl.where(largest > 2.0**50, 2.0**-70, tl.where(largest < 2.0**-50, 2.0**90, 1.0)).to(value.dtype)
    scaled = value * factor[:, None]
    return scaled, factor, tl.sqrt(tl.sum(scaled * scaled, 1))


@triton.jit(do_not_specialize=["rows"])
def normalize_forward_kernel(
    h, out, rows, width,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    scaled, factor, norm = _scaled_norm(tl.load(h + at, mask=mask, other=0.0).to(ACC))
    divisor = tl.where(norm == 0.0, 1.0, norm + EPS * factor)
    tl.store(out + at, (scaled / divisor[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def normalize_backward_kernel(
    grad, h, grad_h, rows, width,
    EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """(g - y (y . g) (norm + eps) / norm) / (norm + eps) with y = h / (norm + eps); rows of norm 0 get 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    at = row[:, None] * width + col[None, :]
    cotangent = tl.load(grad + at, mask=mask, other=0.0).to(ACC)
    scaled, factor, norm = _scaled_norm(tl.load(h + at, mask=mask, other=0.0).to(ACC))
    zero = norm == 0.0
    divisor = tl.where(zero, 1.0, norm + EPS * factor)
    unit = scaled / tl.where(zero, 1.0, norm)[:, None]
    along = tl.sum(cotangent * unit, 1) * tl.where(zero, 0.0, norm / divisor)
    slope = tl.where(zero, 0.0, factor / divisor)
    result = (cotangent - unit * along[:, None]) * slope[:, None]
    tl.store(grad_h + at, tl.where(zero[:, None], 0.0, result).to(grad_h.dtype.element_ty), mask=mask)


def _tile(width):
    if width > MAX_WIDTH:
        raise ValueError(
            f"h: expected at most {MAX_WIDTH} columns, the widest rows the triton backend has room for, got {width}"
        )
    return row_tile(width)


def symmetrize(h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    """Device implementation of the op `scalegmn_fast::symmetrize`.

    Args: the op's, validated: h [R, d] contiguous; bias, norm_weight, norm_bias [d] contiguous or None. Returns [R, d]
    in h's dtype. Computes in float32, in float64 for float64. Raises ValueError for d > 4096 (not for kind "abs").
    """
    out = torch.empty_like(h)
    if h.numel() == 0:
        return out
    rows, width = h.shape
    acc = accumulator_type(h.dtype)
    with torch.cuda.device_of(h):
        if kind == "abs":
            grid = (triton.cdiv(h.numel(), TILE),)
            launch(abs_forward_kernel, grid, h, out, h.numel(), ACC=acc, **FLAT_TILE)
            return out
        tile = _tile(width)
        grid = (triton.cdiv(rows, tile["BLOCK_ROWS"]),)
        if kind == "normalize":
            launch(normalize_forward_kernel, grid, h, out, rows, width, EPS=eps, ACC=acc, **tile)
        else:
            launch(
                activation_forward_kernel, grid,
                h, bias, norm_weight, norm_bias, out, rows, width,
                ACTIVATION=activation, W0=w0, EPS=LAYER_NORM_EPS,
                HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None, ACC=acc, **tile,
            )  # fmt: skip
    return out


def symmetrize_backward(grad, h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    """Device implementation of the op `scalegmn_fast::symmetrize_backward`.

    grad [R, d] contiguous, the rest as in `symmetrize`. Returns the gradients of h, bias, norm_weight and norm_bias,
    each in its own dtype; an empty tensor of shape [0] for each that is None.
    """
    grad_h = torch.empty_like(h)
    parameters = (bias, norm_weight, norm_bias)
    if h.numel() == 0:
        return grad_h, *(h.new_empty(0) if p is None else torch.zeros_like(p) for p in parameters)
    grads = tuple(h.new_empty(0) if p is None else torch.empty_like(p) for p in parameters)
    rows, width = h.shape
    acc = accumulator_type(h.dtype)
    with torch.cuda.device_of(h):
        if kind == "abs":
            grid = (triton.cdiv(h.numel(), TILE),)
            launch(abs_backward_kernel, grid, grad, h, grad_h, h.numel(), ACC=acc, **FLAT_TILE)
            return grad_h, *grads
        tile = _tile(width)
        programs = triton.cdiv(rows, tile["BLOCK_ROWS"])
        if kind == "normalize":
            launch(normalize_backward_kernel, (programs,), grad, h, grad_h, rows, width, EPS=eps, ACC=acc, **tile)
            return grad_h, *grads
        count = sum(p is not None for p in parameters)
        flags = {"HAS_BIAS": bias is not None, "HAS_NORM": norm_weight is not None}
        if count:
            programs = min(programs, PARTIAL_ROWS)
        partial = torch.empty(
            (programs if count else 0, count, width),
            dtype=torch.float64 if h.dtype == torch.float64 else torch.float32,
            device=h.device,
        )
        launch(
            activation_backward_kernel, (programs,),
            grad, h, bias, norm_weight, norm_bias, grad_h, partial, rows, width,
            ACTIVATION=activation, W0=w0, EPS=LAYER_NORM_EPS, ACC=acc, **flags, **tile,
        )  # fmt: skip
        if count:
            grid = (triton.cdiv(width, PARTIAL_TILE["BLOCK_COLS"]),)
            launch(parameter_gradient_kernel, grid, partial, *grads, programs, width, **flags, **PARTIAL_TILE)
    return grad_h, *grads
