"""`row_program`: programs of row operations, run tile by tile from gathers to what is reduced per segment.

`RowProgram` writes a program down; one call of the op runs it. Message, edge update and node update of ScaleGMN are
such programs (`scalegmn_fast.nn.fused`): whatever a configuration asks for becomes steps, and what lies between the
steps never leaves the cache.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from scalegmn_fast import backends
from scalegmn_fast.ops import library
from scalegmn_fast.reference.row_program import (
    ACTIVATIONS,
    OPERATIONS,
    REDUCTIONS,
    kept_sizes,
    result_dtype,
    sections,
    widths,
)
from scalegmn_fast.reference.row_program import row_program_backward as backward_formula

_ARGUMENTS = (
    "Tensor[] tensors, Tensor[] indices, SymInt[] bounds, int[] code, float[] constants, Tensor? ptr, Tensor? seed"
)
# Asked here: PyTorch 2.11 cannot compile the question.
_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda") if torch.amp.is_autocast_available(kind))
_CODES = {name: code for code, name in enumerate(OPERATIONS)}
_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def _given(indices: list[Tensor], bounds: list[int]) -> list[Tensor]:
    """The indices without the one of no rows that stands for none: AOTInductor cannot pass an empty list of tensors."""
    return [] if len(indices) == 1 and indices[0].shape[0] == 0 < bounds[-1] else indices


def _limits(tensors, indices, bounds, code, constants):
    """Gives why a backend cannot run a program, by the backend's name."""

    def reason(name):
        if name != "triton":
            return None
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return "it does not take torch.float64"
        kernels = importlib.import_module("scalegmn_fast.kernels.row_program")
        return kernels.why_not(tensors, indices, bounds, code, constants)

    return reason


def _forward(tensors, indices, bounds, code, constants, ptr, seed):
    limits = _limits(tensors, indices, bounds, code, constants)
    kernel = backends.implementation("row_program", "forward", tensors[0], limits)
    return kernel(tensors, _given(indices, bounds), bounds, code, constants, ptr, seed)


def _forward_fake(tensors, indices, bounds, code, constants, ptr, seed):
    dtype = result_dtype(tensors, code, len(bounds) - 1)
    reduced, rows = (0, 0), (0, 0)
    for section in sections(bounds, code, constants):
        found = widths(tensors, section)
        if section.reduced >= 0:
            reduced = (ptr.shape[0] - 1, found[section.reduced] * (4 if section.reduction == "statistics" else 1))
        if section.rows >= 0:
            rows = (section.end, found[section.rows])
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    kept, extremes = kept_sizes(tensors, bounds, code, constants, ptr)
    like = tensors[0]
    return (
        like.new_empty(reduced, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(kept, dtype=wide),
        like.new_empty(extremes, dtype=torch.int32),
    )


def _backward(
    grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds, code, constants, ptr, seed, wanted
):
    limits = _limits(tensors, indices, bounds, code, constants)
    kernel = backends.implementation("row_program", "backward", tensors[0], limits)
    given = _given(indices, bounds)
    return kernel(
        grad_reduced, grad_rows, reduced, kept, extremes, tensors, given, bounds, code, constants, ptr, seed, wanted
    )


def _backward_fake(
    grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, bounds, code, constants, ptr, seed, wanted
):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


_forward_op = library.define(
    "row_program", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_op = library.define(
    "row_program_backward",
    "(Tensor grad_reduced, Tensor grad_rows, Tensor reduced, Tensor kept, Tensor extremes, "
    f"{_ARGUMENTS}, bool[] wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    tensors, indices, ctx.bounds, ctx.code, ctx.constants, ptr, seed = inputs
    reduced, rows, kept, extremes = output
    ctx.set_materialize_grads(False)
    ctx.results = [(result.shape, result.dtype) for result in (reduced, rows)]
    if kept.dim() == 1 or extremes.dim() == 2:
        reduced = reduced.new_empty(0)  # the backward of attention alone reads what was reduced
    ctx.counts = len(tensors), len(indices)
    ctx.mark_non_differentiable(kept, extremes)
    ctx.save_for_backward(*tensors, *indices, ptr, seed, reduced, kept, extremes)


def _saved(ctx):
    num_tensors, num_indices = ctx.counts
    saved = ctx.saved_tensors
    split = num_tensors + num_indices
    return list(saved[:num_tensors]), list(saved[num_tensors:split]), *saved[split:]


def _first_order(ctx, wanted, grad_reduced, grad_rows, grad_kept, grad_extremes):
    tensors, indices, ptr, seed, reduced, kept, extremes = _saved(ctx)
    grad_reduced, grad_rows = (
        reduced.new_zeros(shape, dtype=dtype) if grad is None else grad
        for grad, (shape, dtype) in zip((grad_reduced, grad_rows), ctx.results, strict=True)
    )
    program = (tensors, indices, ctx.bounds, ctx.code, ctx.constants, ptr, seed)
    grads = _backward_op(grad_reduced, grad_rows, reduced, kept, extremes, *program, wanted)
    return [grad if want else None for grad, want in zip(grads, wanted, strict=True)]


def _save_backward(ctx, inputs, output):
    grad_reduced, grad_rows, reduced, kept, extremes, tensors, indices, *rest = inputs
    ctx.bounds, ctx.code, ctx.constants, ptr, seed, ctx.wanted = rest
    ctx.counts = len(tensors), len(indices)
    ctx.save_for_backward(*tensors, *indices, ptr, seed, reduced, kept, extremes, grad_reduced, grad_rows)


def _second_order(ctx, cotangents):
    tensors, indices, ptr, seed, reduced, kept, extremes, grad_reduced, grad_rows = _saved(ctx)

    def formula(grad_reduced, grad_rows, *tensors):
        program = (tensors, indices, ctx.bounds, ctx.code, ctx.constants, ptr, seed)
        return tuple(backward_formula(grad_reduced, grad_rows, reduced, kept, extremes, *program, ctx.wanted))

    needed = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5]]
    grads = library.gradients_through(formula, (grad_reduced, grad_rows, *tensors), needed, cotangents)
    return *grads[:2], None, None, None, grads[2:], [None] * len(indices), *[None] * 6


library.register_list_autograd("row_program", _first_order, _save)
library.register_autograd("row_program_backward", _second_order, _save_backward)


class Operands:
    """Tensors and indices of a program, by number. What writes a program holds these and not the program: a cycle of
    references would keep them beyond the backward pass, until Python looks for cycles.
    """

    def __init__(self):
        self.tensors: list[Tensor] = []
        self.indices: list[Tensor] = []
        self.masks = 0
        self.casts: list[tuple[Tensor, Tensor]] = []

    def tensor(self, tensor: Tensor) -> int:
        """The number of a tensor among the op's."""
        return _place(self.tensors, tensor)

    def cast(self, tensor: Tensor) -> Tensor:
        """A table or weight as autocast has it: float32 becomes its lower precision."""
        device = tensor.device.type
        if tensor.dtype != torch.float32 or device not in _AUTOCAST or not torch.is_autocast_enabled(device):
            return tensor
        for given, cast in self.casts:
            if given is tensor:
                return cast
        self.casts.append((tensor, tensor.to(torch.get_autocast_dtype(device))))
        return self.casts[-1][1]

    def index(self, index: Tensor) -> int:
        """The number of an index among the op's."""
        return _place(self.indices, index)

    def next_mask(self) -> int:
        self.masks += 1
        return self.masks - 1


class Value:
    """The result of a step: rows of a section."""

    def __init__(self, section: SectionWriter, number: int, width: int):
        self.section, self.number, self.width = section, number, width


class SectionWriter:
    """The program of a range of rows. Each method adds a step and returns its `Value`; -1 and None: absent."""

    def __init__(self, operands: Operands, rows: int):
        self.operands, self.rows = operands, rows
        self.code: list[int] = []
        self.constants: list[float] = []
        self.count = 0
        self.loaded: dict[tuple[int, int], int] = {}
        self.reduction, self.reduced, self.logits, self.written = "none", -1, -1, -1

    def _step(self, op, width, a=None, b=None, tensors=(), index=None, activation="identity", p0=0.0, p1=0.0) -> Value:
        numbers = [-1 if t is None else self.operands.tensor(t) for t in tensors]
        numbers += [-1] * (3 - len(numbers))
        operands = [-1 if value is None else value.number for value in (a, b)]
        place = -1 if index is None else self.operands.index(index)
        self.code += [_CODES[op], *operands, *numbers, place, _ACTIVATION_CODES[activation]]
        self.constants += [float(p0), float(p1)]
        self.count += 1
        return Value(self, self.count - 1, width)

    def load(self, table: Tensor, index: Tensor | None = None) -> Value:
        """Rows of a table [*, d], by their numbers in the program or by index [R]."""
        table = self.operands.cast(table)
        key = self.operands.tensor(table), -1 if index is None else self.operands.index(index)
        if key not in self.loaded:
            self.loaded[key] = self._step("load", table.shape[1], tensors=(table,), index=index).number
        return Value(self, self.loaded[key], table.shape[1])

    def load_mul(self, a: Value, table: Tensor, index: Tensor | None = None) -> Value:
        """a times rows of a table."""
        return self._step("load_mul", a.width, a, tensors=(self.operands.cast(table),), index=index)

    def load_add(self, a: Value, table: Tensor, index: Tensor | None = None) -> Value:
        """a plus rows of a table."""
        return self._step("load_add", a.width, a, tensors=(self.operands.cast(table),), index=index)

    def scale(self, a: Value, factors: Tensor, index: Tensor | None = None) -> Value:
        """a times a number per row, factors [*, 1]."""
        return self._step("scale", a.width, a, tensors=(self.operands.cast(factors),), index=index)

    def linear(self, a: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
        """``a @ weight.T + bias``."""
        return self._step("linear", weight.shape[0], a, tensors=(self.operands.cast(weight), bias))

    def add(self, a: Value, b: Value) -> Value:
        return self._step("add", a.width, a, b)

    def mul(self, a: Value, b: Value) -> Value:
        return self._step("mul", a.width, a, b)

    def negate(self, a: Value) -> Value:
        return self._step("negate", a.width, a)

    def add_vector(self, a: Value, vector: Tensor) -> Value:
        """a plus a vector [d]."""
        return self._step("add_vector", a.width, a, tensors=(vector,))

    def symmetrize(self, a: Value, bias, weight, shift, activation: str, w0: float) -> Value:
        """``act(LN(a + bias)) + act(LN(-a + bias))``; weight and shift are the layer norm's."""
        return self._step("symmetrize", a.width, a, tensors=(bias, weight, shift), activation=activation, p0=w0)

    def norm_act(self, a: Value, weight, shift, activation: str, w0: float) -> Value:
        """``act(LN(a))``."""
        return self._step("norm_act", a.width, a, tensors=(None, weight, shift), activation=activation, p0=w0)

    def abs(self, a: Value) -> Value:
        return self._step("abs", a.width, a)

    def normalize(self, a: Value, eps: float) -> Value:
        """``a / (||a|| + eps)``."""
        return self._step("normalize", a.width, a, p0=eps)

    def dropout(self, a: Value, probability: float) -> Value:
        return self._step("dropout", a.width, a, p0=probability, p1=self.operands.next_mask())

    def concat(self, a: Value, b: Value) -> Value:
        return self._step("concat", a.width + b.width, a, b)

    def head_dot(self, a: Value, b: Value, heads: int, scale: float) -> Value:
        """``scale * <a, b>`` per head, [*, heads]."""
        return self._step("head_dot", heads, a, b, p0=scale, p1=heads)

    def add_up(self, value: Value) -> None:
        """This value is added up per segment."""
        self.reduction, self.reduced = "sum", value.number

    def summarize(self, value: Value) -> None:
        """Of this value each segment gets mean, variance, minimum and maximum, side by side; 0 without rows.

        Ties of the extremes give the gradient to the first row.
        """
        self.reduction, self.reduced = "statistics", value.number

    def attend(self, value: Value, logits: Value) -> None:
        """This value is added up per segment, each head weighted by the segment's softmax of its logit."""
        self.reduction, self.reduced, self.logits = "attention", value.number, logits.number

    def write(self, value: Value) -> None:
        """This value's rows are written."""
        self.written = value.number


class RowProgram:
    """A program over rows in consecutive sections; `run` gives what is reduced per segment, and rows.

    Sections that write rows have to come first. A dropout draws its seed from PyTorch's generator when the program
    runs.
    """

    def __init__(self):
        self.sections: list[SectionWriter] = []
        self.operands = Operands()

    def section(self, rows: int) -> SectionWriter:
        """A new section of the next ``rows`` rows."""
        self.sections.append(SectionWriter(self.operands, rows))
        return self.sections[-1]

    def run(self, ptr: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(what is reduced [S, d], rows [R', d']); of no size where no section has them. ptr: int64 [S + 1]."""
        return torch.ops.scalegmn_fast.row_program(*self.arguments(ptr))[:2]

    def arguments(self, ptr: Tensor | None = None) -> tuple:
        """The arguments of the op."""
        bounds = [0]
        code: list[int] = []
        constants: list[float] = []
        for section in self.sections:
            bounds.append(bounds[-1] + section.rows)
            code += [section.count, section.written, REDUCTIONS.index(section.reduction)]
            code += [section.reduced, section.logits, *section.code]
            constants += section.constants
        tensors, masks = self.operands.tensors, self.operands.masks
        device = tensors[0].device
        seed = torch.randint(0, 2**32, (2,), device=device) if masks else None
        indices = self.operands.indices or [torch.empty(0, dtype=torch.long, device=device)]
        return tensors, indices, bounds, code, constants, ptr, seed


def row_program(program: RowProgram, ptr: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Runs a program: one result reduced per segment, [S, d], and rows [R', d'] of another.

    Args:
        program: what to compute; its tensors are float32, bfloat16, float16 or float64 on one device.
        ptr: int64 [S + 1], nondecreasing from 0 to the number of rows: the rows of each segment; None if nothing is
            reduced. Sections with statistics or attention consist of whole segments.
    Returns:
        The results, of no size where no section has them, in the promoted dtype of the tables that are loaded. Computed
        in float32, in float64 if a tensor is float64; products with a bfloat16 weight are of bfloat16 rows, added up in
        float32 (the CPU engine takes float32 rows where the processor does not multiply those faster). Under autocast
        tables and weights of linear steps are cast as it has it.
    Raises:
        ValueError, TypeError: tables, indices, parameters or segments that do not fit (CPU engine).
        scalegmn_fast.backends.BackendError: the backend chosen explicitly cannot serve the call.

    Deterministic, for any number of threads. Backward runs the program again and keeps nothing of a row's size but the
    inputs. Second derivatives differentiate the reference.
    """
    return program.run(ptr)


def _place(known: list[Tensor], tensor: Tensor) -> int:
    for number, other in enumerate(known):
        if other is tensor:
            return number
    known.append(tensor)
    return len(known) - 1
