"""`segment_reduce` in plain PyTorch: the formula, and its backward formula in closed form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from scalegmn_fast.reference.symmetrize import compute_dtype

REDUCTIONS = ("sum", "mean", "min", "max", "var", "std")
STD_EPS = 1e-5


class _Segments:
    """The slots of the segments: which row of x [R, d] and which segment each one belongs to, and sums over them."""

    def __init__(self, x: Tensor, ptr: Tensor, order: Tensor | None):
        self.num_segments, self.width = ptr.numel() - 1, x.shape[1]
        self.num_slots = int(ptr[-1]) if order is None else order.numel()
        self.order = None if order is None else order.long()
        self.length = (ptr[1:] - ptr[:-1]).long()
        self.empty = (self.length == 0)[:, None]
        self.count = self.length.clamp(min=1).to(compute_dtype(x.dtype))[:, None]
        self.segment = torch.repeat_interleave(self.length, output_size=self.num_slots)
        self.index = self.segment[:, None].expand(-1, self.width)
        self.rows = (x[: self.num_slots] if order is None else x[self.order]).to(compute_dtype(x.dtype))

    def sum(self, values: Tensor) -> Tensor:
        """[num_slots, d] -> [S, d]"""
        return values.new_zeros(self.num_segments, self.width).scatter_add(0, self.index, values)

    def first(self, reduce: str) -> Tensor:
        """The first slot [S, d] that holds the segment's min or max (or its first NaN); num_slots where it is empty."""
        rows = self.rows.detach()
        best = rows.new_zeros(self.num_segments, self.width)
        best = best.scatter_reduce(0, self.index, rows, "a" + reduce, include_self=False)
        slots = torch.arange(self.num_slots, device=rows.device)[:, None]
        holds = (rows == best[self.segment]) | rows.isnan()
        candidates = torch.where(holds, slots, self.num_slots)
        none = torch.full_like(best, self.num_slots, dtype=torch.long)
        return none.scatter_reduce(0, self.index, candidates, "amin")

    def deviations(self) -> Tensor:
        """x minus its segment's mean, for every slot."""
        return self.rows - (self.sum(self.rows) / self.count)[self.segment]


def _masked_std(var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(var) where var > eps or NaN, else 1 (so that derivatives stay finite), and where that is."""
    above = ~(var <= eps)
    return torch.sqrt(torch.where(above, var, torch.ones_like(var))), above


def segment_reduce_forward(
    x: Tensor, ptr: Tensor, order: Tensor | None, reduce: Sequence[str], eps: float
) -> tuple[Tensor, Tensor]:
    """Out [S, K, d] and arg [S, A, d] (rows of x, in ptr's dtype, -1 for empty segments); see `ops.segment_reduce`."""
    segments = _Segments(x, ptr, order)
    shape = (segments.num_segments, segments.width)
    zero = segments.rows.new_zeros(shape)
    total = segments.sum(segments.rows)
    var = None
    outs, args = [], []
    for name in reduce:
        if name in ("var", "std") and var is None:
            deviations = segments.deviations()
            var = segments.sum(deviations * deviations) / segments.count
        if name == "sum":
            outs.append(total)
        elif name == "mean":
            outs.append(total / segments.count)
        elif name == "var":
            outs.append(var)
        elif name == "std":
            std, above = _masked_std(var, eps)
            outs.append(torch.where(above, std, zero))
        else:
            slot = segments.first(name).clamp(max=max(segments.num_slots - 1, 0))
            if segments.num_slots == 0:
                value, row = total, slot
            else:
                value = segments.rows.gather(0, slot)
                row = slot if segments.order is None else segments.order[slot]
            outs.append(torch.where(segments.empty, zero, value))
            args.append(torch.where(segments.empty, torch.full_like(row, -1), row))
    arg = torch.stack(args, 1) if args else ptr.new_empty(shape[0], 0, shape[1])
    return torch.stack(outs, 1).to(x.dtype), arg.to(ptr.dtype)


def segment_reduce(
    x: Tensor,
    ptr: Tensor,
    reduce: str | Sequence[str] = "sum",
    *,
    order: Tensor | None = None,
    eps: float = STD_EPS,
) -> Tensor:
    """The formula of `scalegmn_fast.ops.segment_reduce`, with the same arguments."""
    names = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    out, _ = segment_reduce_forward(x, ptr, order, names, eps)
    return out[:, 0] if isinstance(reduce, str) else out


def segment_reduce_backward(
    grad: Tensor,
    x: Tensor,
    ptr: Tensor,
    order: Tensor | None,
    arg: Tensor,
    out: Tensor,
    reduce: Sequence[str],
    eps: float,
) -> Tensor:
    """Gradient of <grad, out> for x [R, d]; rows in no slot get 0, rows in several slots the sum.

    In closed form and differentiable in grad and x: mean and deviation are computed from x, so `out` is not needed.
    """
    segments = _Segments(x, ptr, order)
    g = grad.to(segments.rows.dtype)
    constant = torch.zeros_like(g[:, 0])  # d out / d x_k = constant + slope * (x_k - mean)
    slope = None
    grad_x = segments.rows.new_zeros(x.shape)
    num_arg = 0
    for k, name in enumerate(reduce):
        if name == "sum":
            constant = constant + g[:, k]
        elif name == "mean":
            constant = constant + g[:, k] / segments.count
        elif name in ("min", "max"):
            row = arg[:, num_arg].long()
            num_arg += 1
            grad_x = grad_x.scatter_add(0, row.clamp(min=0), g[:, k].masked_fill(row < 0, 0)) if len(x) else grad_x
        elif name == "var":
            slope = (0 if slope is None else slope) + 2 * g[:, k] / segments.count
        else:
            deviations = segments.deviations()
            std, above = _masked_std(segments.sum(deviations * deviations) / segments.count, eps)
            scaled = torch.where(above, g[:, k] / (segments.count * std), torch.zeros_like(std))
            slope = (0 if slope is None else slope) + scaled
    slots = constant[segments.segment]
    if slope is not None:
        slots = slots + slope[segments.segment] * segments.deviations()
    if segments.order is None:
        index = torch.arange(segments.num_slots, device=x.device)
    else:
        index = segments.order
    return grad_x.scatter_add(0, index[:, None].expand(-1, segments.width), slots).to(x.dtype)
