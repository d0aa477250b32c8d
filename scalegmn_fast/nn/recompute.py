"""Node rows that backward makes again instead of keeping them: in training, on the CPU, outside of compiled programs.

Made again they cost little beside the messages; kept they would be most of what a step needs per node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


def serves(x: Tensor) -> bool:
    """Whether tables like x are made again: `torch.func` transforms, for one, allow no such thing."""
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


class _Recipe(NamedTuple):
    """A table's function, its arguments and the versions that they had: what autograd keeps in place of the table."""

    function: Callable[..., Tensor]
    arguments: tuple[Tensor | None, ...]
    versions: tuple[int | None, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, table: Tensor, function: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> _Recipe:
        detached = tuple(None if tensor is None else tensor.detach() for tensor in arguments)
        return cls(function, detached, _versions(detached), table.dtype)

    @torch.no_grad()
    def again(self) -> Tensor:
        if _versions(self.arguments) != self.versions:
            raise RuntimeError("node features or weights needed for gradient computation were modified in place")
        return self.function(*(None if tensor is None else tensor.to(self.dtype) for tensor in self.arguments))


def _versions(tensors: tuple[Tensor | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors)


class Tables:
    """Node rows that programs read and that follow from other tensors; each is made once."""

    def __init__(self):
        self._made: list[tuple[Callable[..., Tensor], tuple[Tensor | None, ...], Tensor]] = []

    def made(self, function: Callable[..., Tensor], *arguments: Tensor | None) -> Tensor:
        """``function(*arguments)``."""
        for made, given, table in self._made:
            if made is function and len(given) == len(arguments) and all(map(operator.is_, given, arguments)):
                return table
        self._made.append((function, arguments, function(*arguments)))
        return self._made[-1][2]

    def forgotten(self) -> AbstractContextManager:
        """Context: ops that read the tables do not keep them for backward."""
        if not self._made or not serves(self._made[0][2]):
            return nullcontext()
        recipes = {
            (table.data_ptr(), table.shape): _Recipe.of(table, function, arguments)
            for function, arguments, table in self._made
            if table.numel()
        }

        def keep(tensor: Tensor) -> Tensor | _Recipe:
            return recipes.get((tensor.data_ptr(), tensor.shape), tensor)

        def give(kept: Tensor | _Recipe) -> Tensor:
            return kept.again() if isinstance(kept, _Recipe) else kept

        return torch.autograd.graph.saved_tensors_hooks(keep, give)
