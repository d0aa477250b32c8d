"""Which operators a block of code runs, and which of them move data between host and device."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

HOST = "cpu"
#: Operators that only make a tensor or another view of one; on a GPU none of them starts a kernel.
_NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh")
#: What makes tensors of Python numbers, which have to be copied to any other device than the host.
_FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)


class _Constants(TorchFunctionMode):
    """Context: notes tensors that are made of Python numbers on a device; below autograd nothing shows them."""

    def __init__(self, crossings: list[str]):
        super().__init__()
        self.crossings = crossings

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _FROM_PYTHON and out.device.type != HOST and not isinstance(args[0], Tensor):
            self.crossings.append(f"torch.{func.__name__}")
        return out


class Dispatched(TorchDispatchMode):
    """Context: the operators that run within it, below autograd, on this thread and in backward passes.

    Run on the device ``meta``, where nothing is computed, it tells of any model what a step on a GPU asks of the host:
    what would wait for the device (``item``, ``nonzero``, an index by a mask) raises there, what copies between host
    and device is in ``crossings``. A step that does neither can be captured in a CUDA graph.

    Args:
        inside: count the operators that the reference backend runs within an op of this package, not the op itself.

    Attributes:
        counts: operator -> times it ran; views and empty tensors, which cost a GPU nothing, are left out.
        crossings: operators that read on one side what they write on the other, in order. Zero-dimensional tensors of
            the host are arguments of a kernel and not copied.
    """

    def __init__(self, inside: bool = False):
        super().__init__()
        self.inside = inside
        self.counts: Counter[str] = Counter()
        self.crossings: list[str] = []
        self._constants = _Constants(self.crossings)

    def __enter__(self) -> Dispatched:
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._constants.__exit__(*error)

    @property
    def total(self) -> int:
        """How many operators ran."""
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside and func.namespace == "scalegmn_fast":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *args)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_WORK and func.namespace != "profiler":
            self.counts[f"{func.namespace}::{name}"] += 1
        read = {x.device.type for x in _tensors((args, kwargs)) if x.dim() or x.device.type != HOST}
        written = {x.device.type for x in _tensors(out)}
        if len(read | written) > 1:
            self.crossings.append(str(func))
        return out


def _tensors(values) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
