"""`segment_reduce`: reductions over CSR segments of rows, several in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalegmn_fast import backends
from scalegmn_fast.ops import library
from scalegmn_fast.reference.segment_reduce import REDUCTIONS, STD_EPS
from scalegmn_fast.reference.segment_reduce import segment_reduce_backward as backward_formula

EXTREMA = ("min", "max")
MOMENTS = ("var", "std")


def _check_values(x: Tensor, ptr: Tensor, order: Tensor | None) -> None:
    """The values of ptr and order on the CPU, where looking at them costs no synchronisation."""
    first, last, slots = int(ptr[0]), int(ptr[-1]), x.shape[0] if order is None else order.numel()
    if first != 0 or bool((ptr[1:] < ptr[:-1]).any()):
        raise ValueError(f"ptr: expected a nondecreasing sequence from 0, got one from {first} to {last}")
    if last > slots or (order is not None and last != slots):
        expected = f"at most {slots}, the rows of x" if order is None else f"{slots}, the length of order"
        raise ValueError(f"ptr: expected its last entry to be {expected}, got {last}")
    if order is not None and slots:
        low, high = (int(v) for v in order.aminmax())
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"order: expected rows of x in [0, {x.shape[0]}), got values from {low} to {high}")


def _forward(x, ptr, order, reduce, eps):
    if x.device.type == "cpu" and backends.resolve("segment_reduce", x) != "cpp":  # which looks for itself
        _check_values(x, ptr, order)
    kernel = backends.implementation("segment_reduce", "forward", x)
    return kernel(x.contiguous(), ptr.contiguous(), None if order is None else order.contiguous(), reduce, eps)


def _forward_fake(x, ptr, order, reduce, eps):
    torch._check(x.dim() == 2, lambda: f"x: expected rows [R, d], got {tuple(x.shape)}")
    segments, width = ptr.shape[0] - 1, x.shape[1]
    arg = ptr.new_empty(segments, sum(name in EXTREMA for name in reduce), width)
    return x.new_empty(segments, len(reduce), width), arg


def _reads_rows(reduce: Sequence[str]) -> bool:
    """Whether backward needs the values of x, and not only its shape, dtype and device."""
    return any(name in MOMENTS for name in reduce)


def _backward(grad, x, ptr, order, arg, out, reduce, eps):
    kernel = backends.implementation("segment_reduce", "backward", x)
    x = x.contiguous() if _reads_rows(reduce) else x
    order = None if order is None else order.contiguous()
    return kernel(grad.contiguous(), x, ptr.contiguous(), order, arg.contiguous(), out.contiguous(), reduce, eps)


def _backward_fake(grad, x, ptr, order, arg, out, reduce, eps):
    torch._check(grad.shape == out.shape, lambda: f"grad: expected {tuple(out.shape)}, got {tuple(grad.shape)}")
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward_op = library.define(
    "segment_reduce",
    "(Tensor x, Tensor ptr, Tensor? order, str[] reduce, float eps) -> (Tensor out, Tensor arg)",
    _forward,
    _forward_fake,
)
_backward_op = library.define(
    "segment_reduce_backward",
    "(Tensor grad, Tensor x, Tensor ptr, Tensor? order, Tensor arg, Tensor out, str[] reduce, float eps) -> Tensor",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    x, ptr, order, ctx.reduce, ctx.eps = inputs
    out, arg = output
    ctx.mark_non_differentiable(arg)
    if not _reads_rows(ctx.reduce):
        x = x.new_zeros(1, 1).expand(x.shape)  # one element instead of R x d
    ctx.save_for_backward(x, ptr, order, arg, out)


def _first_order(ctx, grad, _):
    x, ptr, order, arg, out = ctx.saved_tensors
    return _backward_op(grad, x, ptr, order, arg, out, ctx.reduce, ctx.eps), None, None, None, None


def _save_backward(ctx, inputs, output):
    *tensors, ctx.reduce, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _second_order(ctx, cotangent):
    grad, x, *rest = ctx.saved_tensors

    def formula(grad, x):
        return backward_formula(grad, x, *rest, ctx.reduce, ctx.eps)

    grads = library.gradients_through(formula, (grad, x), ctx.needs_input_grad[:2], (cotangent,))
    return (*grads, None, None, None, None, None, None)


library.register_autograd("segment_reduce", _first_order, _save)
library.register_autograd("segment_reduce_backward", _second_order, _save_backward)


def _check(x, ptr, names, order, eps):
    if not names:
        raise ValueError("reduce: expected at least one name, got none")
    for name in names:
        if name not in REDUCTIONS:
            raise ValueError(f"reduce: expected names out of {', '.join(REDUCTIONS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"reduce: expected each name once, got {', '.join(names)}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected rows [R, d] with d >= 1, got shape {tuple(x.shape)}")
    if x.dtype not in backends.DTYPES["reference"]:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    for name, index in (("ptr", ptr), ("order", order)):
        if name == "order" and index is None:
            continue
        if not isinstance(index, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(index).__name__}")
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {tuple(index.shape)}")
        if index.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} (x's), got {index.device}")
    if ptr.shape[0] == 0:
        raise ValueError("ptr: expected shape [S + 1] with at least the entry 0, got shape (0,)")
    if eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")


def segment_reduce(
    x: Tensor,
    ptr: Tensor,
    reduce: str | Sequence[str] = "sum",
    *,
    order: Tensor | None = None,
    eps: float = STD_EPS,
) -> Tensor:
    """Reduces the rows of each segment: segment s has the slots ptr[s] to ptr[s + 1] - 1, slot k reads row order[k].

    Args:
        x: [R, d], float32, bfloat16, float16 or float64, any strides.
        ptr: [S + 1], int32 or int64, nondecreasing from 0 to the number of slots. Without `order` rows of x from
            ptr[-1] on belong to no segment.
        reduce: "sum", "mean", "min", "max", "var" or "std", or a sequence of different ones, computed in one pass. var
            divides by the length n, without cancellation; std is sqrt(var) where var > eps, else 0 with zero gradient.
        order: the row of each slot, [ptr[-1]], int32 or int64; None for slot k = row k. Rows may be left out or repeat.
        eps: for "std".
    Returns:
        [S, d] for a name, [S, K, d] for K names, in x's dtype, contiguous. Empty segments give 0 for every reduction;
        NaN propagates, also through min and max. Accumulated in float32 (float64 for float64) and cast once, also
        under autocast.
    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Values of ptr and order are checked for
            CPU tensors; on a GPU, where looking would wait for the device, the caller answers for them.
        scalegmn_fast.backends.BackendError: the backend chosen explicitly cannot serve the call.

    Backward keeps x for "var" and "std" alone. Gradients: rows in no slot get 0, rows in several slots the sum in slot
    order; that of min and max goes to the first of equal slots. Deterministic: every sum has an order that the
    arguments alone decide. Second derivatives differentiate the reference's formula.
    Source: the multi-aggregation of Corso et al., "Principal Neighbourhood Aggregation for Graph Nets", NeurIPS
    2020, on segments.
    """
    names = [reduce] if isinstance(reduce, str) else list(reduce)
    _check(x, ptr, names, order, eps)
    if order is not None and order.dtype != ptr.dtype:
        ptr, order = ptr.long(), order.long()
    out, _ = torch.ops.scalegmn_fast.segment_reduce(x, ptr, order, names, float(eps))
    return out.squeeze(1) if isinstance(reduce, str) else out
