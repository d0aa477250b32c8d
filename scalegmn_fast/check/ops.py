"""Every op, in every kind and reduction, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import scalegmn_fast

from .. import backends, ops, reference
from ..reference.scalegmn import ACTIVATIONS
from ..testing import relative_error
from .rows import DTYPES, Row, error_units, guarded, worst

# A bound is a factor times the error of plain PyTorch, in units of rounding, and never less than the second number:
# plain PyTorch may by luck be exact. Half types are computed in float32 and rounded once.
FACTOR, UNITS, UNITS_HALF = 4.0, 16.0, 2.0


@dataclass(frozen=True)
class OpCase:
    """``function(module, *leaves)`` calls the op of `ops` or of `reference`; leaves are float64 tensors on the CPU."""

    op: str
    case: str
    leaves: tuple[Tensor, ...]
    function: Callable[..., Tensor]

    def served_by(self, backend: str) -> bool:
        return backend in ("reference", *backends.OPS[self.op])


def op_cases(seed: int = 0) -> Iterator[OpCase]:
    """Every kind, activation and reduction, at a production and at an odd width, with the named edge cases."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for rows, d in ((64, 128), (37, 33)):
        h = randn(rows, d)
        h[0] = 0.0
        vectors = (randn(d), 1 + 0.3 * randn(d), randn(d))
        for activation in ACTIVATIONS:
            # Without any parameter act(h) + act(-h) is a constant where act is odd up to one.
            without = () if activation in ("identity", "tanh", "sigmoid", "sine") else (0,)
            for given in (*without, 1, 3):
                with_what = {0: "", 1: " +bias", 3: " +bias +norm"}[given]

                def activated(module, h, *parameters, activation=activation):
                    return module.symmetrize(h, *parameters, kind="activation", activation=activation, w0=3.0)

                yield OpCase("symmetrize", f"{activation}{with_what} d={d}", (h, *vectors[:given]), activated)
        for kind in ("abs", "normalize"):

            def canonical(module, h, kind=kind):
                return module.symmetrize(h, kind=kind)

            yield OpCase("symmetrize", f"{kind} d={d}", (h,), canonical)

    # One huge segment among tiny and empty ones.
    lengths = torch.tensor([3, 0, 200, 1, 1, 0, 5, 2, 0])
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    order = torch.randperm(int(ptr[-1]), generator=generator)
    names = ("sum", "mean", "min", "max", "var", "std")
    # Neighbouring slots lie apart, so that no small segment's deviation is a difference of nearly equal numbers.
    alternating = 2.0 - 4.0 * (torch.arange(int(ptr[-1])) % 2)
    for d in (128, 33):
        slots = alternating[:, None] + 0.5 * randn(int(ptr[-1]), d).tanh()
        # Moments also of rows far from 0, about which the mean is rounded by more than the deviations are.
        for reduce, distance in (*((reduce, 0.0) for reduce in (*names, names)), ("var", 2000.0), ("std", 2000.0)):
            for how in (None, order):
                x = slots + distance
                x = x if how is None else torch.empty_like(x).index_copy(0, order, x)

                def reduced(module, x, reduce=reduce, how=how):
                    index = None if how is None else how.to(x.device)
                    return module.segment_reduce(x, ptr.to(x.device), reduce, order=index)

                label = reduce if isinstance(reduce, str) else "all six at once"
                label += f"{' far from 0' if distance else ''}{'' if how is None else ' +order'}"
                yield OpCase("segment_reduce", f"{label} d={d}", (x,), reduced)

    yield from _row_program_cases(randn, generator)


def _row_program_cases(randn: Callable[..., Tensor], generator: torch.Generator) -> Iterator[OpCase]:
    """A message with its edge update, for every activation, with and without norms; statistics and attention."""
    rows, nodes = 300, 40
    ends = [torch.randint(nodes, (rows,), generator=generator) for _ in range(2)]
    ends[1] = ends[1].sort().values
    ptr = torch.searchsorted(ends[1], torch.arange(nodes + 1))
    for d in (128, 33):
        tables = (randn(rows, d), randn(nodes, d), randn(nodes, d))
        maps = [randn(d, d) / math.sqrt(d) for _ in range(4)]
        vectors = (randn(d), 1 + 0.1 * randn(d), 0.1 * randn(d), randn(d))
        for activation, norm in product(ACTIVATIONS, (True, False)):

            def message(module, e, x, u, w_e, w, w_1, w_2, b_1, weight, shift, b_2, activation=activation, norm=norm):
                device = e.device
                source, target = (end.to(device) for end in ends)
                norms = (weight, shift) if norm else (None, None)
                program = ops.RowProgram()
                section = program.section(rows)
                state = section.load(e)
                m = section.load_mul(section.linear(state, w_e), x, source)
                even = section.symmetrize(section.linear(m, w_1), b_1, *norms, activation, 1.5)
                gate = section.load_add(section.linear(even, w_2, b_2), u, target)
                section.add_up(section.mul(section.linear(m, w), gate))
                section.write(section.mul(state, section.norm_act(gate, *norms, activation, 1.5)))
                return torch.cat([out.flatten() for out in module.row_program(program, ptr.to(device))])

            label = f"{activation}{' normed' if norm else ''} d={d}"
            yield OpCase("row_program", label, (*tables, *maps, *vectors), message)

        for reduction, heads in (("statistics", 1), ("attention", 8 if d == 128 else 3)):

            def reduced(module, e, x, u, w_q, w, b, reduction=reduction, heads=heads):
                source, target = (end.to(e.device) for end in ends)
                program = ops.RowProgram()
                section = program.section(rows)
                state = section.load(e)
                value = section.load_mul(section.linear(state, w, b), x, source)
                if reduction == "statistics":
                    section.summarize(value)
                else:
                    query = section.load_add(section.linear(state, w_q), u, target)
                    section.attend(value, section.head_dot(query, state, heads, (e.shape[1] / heads) ** -0.5))
                section.write(section.norm_act(value, None, None, "gelu", 1.0))
                return torch.cat([out.flatten() for out in module.row_program(program, ptr.to(e.device))])

            yield OpCase("row_program", f"{reduction} d={d}", (*tables, *maps[:2], vectors[0]), reduced)


def check_ops(places: Sequence[tuple[str, str]], *, seed: int = 0) -> Iterator[Row]:
    """Every op case on every (backend, device) in every dtype it serves: result, and gradients of all inputs."""
    for case in op_cases(seed):
        for backend, device in places:
            if not case.served_by(backend):
                continue
            for label, dtype in DTYPES.items():
                if dtype in backends.DTYPES[backend]:
                    compute = partial(_check_op, case, backend, device, dtype)
                    yield guarded(case.op, case.case, backend, device, label, compute)


def _check_op(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    rounded = [leaf.to(dtype) for leaf in case.leaves]
    exact = _op_results(case, reference, [leaf.double() for leaf in rounded])
    lower = torch.float32 if dtype == torch.float64 else dtype
    eager = _op_results(case, reference, [leaf.to(device, lower) for leaf in rounded])
    exact_lower = exact
    if lower != dtype:
        exact_lower = _op_results(case, reference, [leaf.to(lower).double() for leaf in rounded])
    with scalegmn_fast.backend(backend):
        actual = _op_results(case, ops, [leaf.to(device) for leaf in rounded])
    checks = []
    for got, plain, plain_exact, wanted in zip(actual, eager, exact_lower, exact, strict=True):
        units = max(FACTOR * error_units(plain, plain_exact), UNITS_HALF if dtype.itemsize == 2 else UNITS)
        checks.append((relative_error(got, wanted), units * torch.finfo(dtype).eps))
    return {"output": checks[0], "gradients": worst(checks[1:])}


def _op_results(case: OpCase, module: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = case.function(module, *leaves)
    cotangent = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).cos().reshape(out.shape)
    grads = torch.autograd.grad(out, leaves, cotangent.to(out), allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]
