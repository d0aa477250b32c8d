"""`segment_reduce` in plain PyTorch: the formula, and its backward formula in closed form."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scalegmn_fast.reference.symmetrize import compute_dtype

REDUCTIONS = ("sum", "mean", "min", "max", "var", "std")
STD_EPS = 1e-5


class _Segments:
    """The slots of the segments: which row of x [R, d] and which segment each one belongs to, and sums over them.

    Without order every row is a slot. Those from ptr[-1] on are in a segment of their own, number S, which is dropped
    at the end: so no shape depends on what ptr holds.
    """

    def __init__(self, x: Tensor, ptr: Tensor, order: Tensor | None):
        dtype = compute_dtype(x.dtype)
        ptr = ptr.long()
        self.num_segments, self.width = ptr.shape[0] - 1, x.shape[1]
        self.order = None if order is None else order.long()
        self.rows = (x if order is None else x[self.order]).to(dtype)
        self.num_slots = self.rows.shape[0]
        self.slots = torch.arange(self.num_slots, device=x.device)
        self.segment = torch.searchsorted(ptr, self.slots, right=True) - 1
        self.index = self.segment[:, None].expand(-1, self.width)
        length = torch.cat([ptr[1:] - ptr[:-1], self.num_slots - ptr[-1:]])[:, None]
        self.empty, self.count = length == 0, length.clamp(min=1).to(dtype)

    def sum(self, values: Tensor) -> Tensor:
        """[num_slots, d] -> [S + 1, d]"""
        return values.new_zeros(self.num_segments + 1, self.width).scatter_add(0, self.index, values)

    def first(self, reduce: str) -> Tensor:
        """The first slot [S + 1, d] that holds the segment's min or max, or its first NaN; num_slots where empty."""
        rows = self.rows.detach()
        best = rows.new_zeros(self.num_segments + 1, self.width)
        best = best.scatter_reduce(0, self.index, rows, "a" + reduce, include_self=False)
        holds = (rows == best[self.segment]) | rows.isnan()
        candidates = torch.where(holds, self.slots[:, None], self.num_slots)
        none = torch.full_like(best, self.num_slots, dtype=torch.long)
        return none.scatter_reduce(0, self.index, candidates, "amin")

    def deviations(self) -> Tensor:
        """x minus its segment's mean, for every slot.

        Twice: what the mean lost in rounding, which far from 0 is large against the deviations, goes the second time.
        """
        deviations = self.rows
        for _ in range(2):
            deviations = deviations - (self.sum(deviations) / self.count)[self.segment]
        return deviations

    def var(self) -> Tensor:
        """[S + 1, d]"""
        deviations = self.deviations()
        return self.sum(deviations * deviations) / self.count


def _masked_std(var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """sqrt(var) where var > eps or NaN, else 1 (so that derivatives stay finite), and where that is."""
    above = ~(var <= eps)
    return torch.sqrt(torch.where(above, var, torch.ones_like(var))), above


def segment_reduce_forward(
    x: Tensor, ptr: Tensor, order: Tensor | None, reduce: Sequence[str], eps: float
) -> tuple[Tensor, Tensor]:
    """Out [S, K, d] and arg [S, A, d] (rows of x, in ptr's dtype, -1 for empty segments); see `ops.segment_reduce`."""
    segments = _Segments(x, ptr, order)
    total = segments.sum(segments.rows)
    zero = torch.zeros_like(total)
    var = segments.var() if "var" in reduce or "std" in reduce else None
    outs, args = [], []
    for name in reduce:
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
            if segments.num_slots == 0:
                value, row = total, torch.zeros_like(total, dtype=torch.long)
            else:
                slot = segments.first(name).clamp(max=segments.num_slots - 1)
                value = segments.rows.gather(0, slot)
                row = slot if segments.order is None else segments.order[slot]
            outs.append(torch.where(segments.empty, zero, value))
            args.append(torch.where(segments.empty, torch.full_like(row, -1), row))
    out = torch.stack(outs, 1)[:-1]
    arg = torch.stack(args, 1)[:-1] if args else ptr.new_empty(segments.num_segments, 0, segments.width)
    return out.to(x.dtype, memory_format=torch.contiguous_format, copy=True), arg.to(ptr.dtype, copy=True)


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
    g = F.pad(grad.to(segments.rows.dtype), (0, 0, 0, 0, 0, 1))  # nothing comes back from the dropped segment
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
            if x.shape[0] > 0:
                grad_x = grad_x.scatter_add(0, row.clamp(min=0), grad[:, k].to(grad_x.dtype).masked_fill(row < 0, 0))
        elif name == "var":
            slope = (0 if slope is None else slope) + 2 * g[:, k] / segments.count
        else:
            std, above = _masked_std(segments.var(), eps)
            scaled = torch.where(above, g[:, k] / (segments.count * std), torch.zeros_like(std))
            slope = (0 if slope is None else slope) + scaled
    slots = constant[segments.segment]
    if slope is not None:
        slots = slots + slope[segments.segment] * segments.deviations()
    slots = slots.masked_fill((segments.segment == segments.num_segments)[:, None], 0)
    index = (segments.slots if order is None else segments.order)[:, None].expand(-1, segments.width)
    return grad_x.scatter_add(0, index, slots).to(x.dtype)
