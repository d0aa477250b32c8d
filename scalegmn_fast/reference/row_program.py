"""`row_program` in plain PyTorch: one step after the other on all rows of a section."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalegmn_fast.reference.symmetrize import ACTIVATIONS, LAYER_NORM_EPS, symmetrize_forward

# The numbers of the operations in a program's code; csrc/cpu/row_program.h says what they compute.
OPERATIONS = (
    "load",
    "load_mul",
    "load_add",
    "scale",
    "linear",
    "add",
    "mul",
    "negate",
    "add_vector",
    "symmetrize",
    "norm_act",
    "abs",
    "normalize",
    "dropout",
    "concat",
)
LOADS = ("load", "load_mul", "load_add", "scale")
STEP_NUMBERS = 8


class Step(NamedTuple):
    """One step of a program's code; -1: absent."""

    op: str
    a: int
    b: int
    t0: int
    t1: int
    t2: int
    index: int
    activation: int
    p0: float
    p1: float


class Section(NamedTuple):
    """The program of rows [begin, end): its steps, the one added up per segment, and the one that is written."""

    begin: int
    end: int
    sums: int
    rows: int
    steps: list[Step]


def sections(bounds: Sequence[int], code: Sequence[int], constants: Sequence[float]) -> Iterator[Section]:
    """The sections that bounds, code and constants describe (csrc/ops/row_program.h)."""
    at = step_at = 0
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        count, sums, rows = code[at : at + 3]
        at += 3
        steps = []
        for _ in range(count):
            op, *numbers = code[at : at + STEP_NUMBERS]
            steps.append(Step(OPERATIONS[op], *numbers, *constants[2 * step_at : 2 * step_at + 2]))
            at += STEP_NUMBERS
            step_at += 1
        yield Section(begin, end, sums, rows, steps)


def result_dtype(tensors: Sequence[Tensor], code: Sequence[int], num_sections: int) -> torch.dtype:
    """The promoted dtype of the tables that a program loads; float32 if there are none."""
    at, result = 0, None
    for _ in range(num_sections):
        count = code[at]
        at += 3
        for _ in range(count):
            if OPERATIONS[code[at]] in LOADS:
                dtype = tensors[code[at + 3]].dtype
                result = dtype if result is None else torch.promote_types(result, dtype)
            at += STEP_NUMBERS
    return torch.float32 if result is None else result


def widths(tensors: Sequence[Tensor], section: Section) -> list[int]:
    """The width of each step's result."""
    found: list[int] = []
    for step in section.steps:
        if step.op == "load":
            found.append(tensors[step.t0].shape[1])
        elif step.op == "linear":
            found.append(tensors[step.t0].shape[0])
        elif step.op == "concat":
            found.append(found[step.a] + found[step.b])
        else:
            found.append(found[step.a])
    return found


_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser "lowbias32" by C. Wellons, on int64 tensors of 32-bit numbers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def dropout_mask(seed: Tensor, stream: int, probability: float, begin: int, rows: int, width: int) -> Tensor:
    """bool [rows, width], True where kept: a function of the seed [2], the stream, the row and the column alone."""
    low, high = seed & _MASK
    hashed = _mix((high + _mix(torch.full_like(low, stream))) & _MASK)
    hashed = _mix((low + hashed) & _MASK)
    row = torch.arange(begin, begin + rows, device=seed.device)
    column = torch.arange(width, device=seed.device)
    base = _mix((hashed + row) & _MASK)
    return _mix((base[:, None] + column) & _MASK) >= int(probability * 4294967296.0)


def _run(section: Section, tensors: Sequence[Tensor], indices: Sequence[Tensor], seed: Tensor | None) -> list[Tensor]:
    """The results of all steps."""
    values: list[Tensor] = []
    names = list(ACTIVATIONS)

    def optional(number: int) -> Tensor | None:
        return None if number < 0 else tensors[number]

    for step in section.steps:
        a = values[step.a] if step.a >= 0 else None
        match step.op:
            case "load" | "load_mul" | "load_add" | "scale":
                table = tensors[step.t0]
                if step.index < 0:
                    rows = table[section.begin : section.end]
                else:
                    rows = table[indices[step.index][section.begin : section.end].long()]
                out = rows if a is None else a + rows if step.op == "load_add" else a * rows
            case "linear":
                out = F.linear(a, tensors[step.t0], optional(step.t1))
            case "add":
                out = a + values[step.b]
            case "mul":
                out = a * values[step.b]
            case "negate":
                out = -a
            case "add_vector":
                out = a + tensors[step.t0]
            case "symmetrize":
                parameters = (optional(step.t0), optional(step.t1), optional(step.t2))
                out = symmetrize_forward(a, *parameters, "activation", names[step.activation], 0.0, step.p0)
            case "norm_act":
                if step.t1 >= 0:
                    a = F.layer_norm(a, a.shape[-1:], tensors[step.t1], tensors[step.t2], LAYER_NORM_EPS)
                out = ACTIVATIONS[names[step.activation]][0](a, step.p0)
            case "abs":
                out = a.abs()
            case "normalize":
                out = symmetrize_forward(a, None, None, None, "normalize", "identity", step.p0, 0.0)
            case "dropout":
                kept = dropout_mask(seed, int(step.p1), step.p0, section.begin, *a.shape)
                out = torch.where(kept, a / (1 - step.p0), torch.zeros_like(a))
            case "concat":
                out = torch.cat([a, values[step.b]], dim=1)
        values.append(out)
    return values


def row_program_forward(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    bounds: Sequence[int],
    code: Sequence[int],
    constants: Sequence[float],
    ptr: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Sums [S, d] and rows [R', d'], with the op's positional signature; differentiable in the tensors."""
    dtype = result_dtype(tensors, code, len(bounds) - 1)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    tensors = [t.to(wide) for t in tensors]
    empty = torch.empty(0, 0, dtype=wide, device=tensors[0].device)
    summed, written, adds_up = [], [], False
    for section in sections(bounds, code, constants):
        values = _run(section, tensors, indices, seed)
        if section.sums >= 0:
            adds_up = True
            summed.append((section, values[section.sums]))
        if section.rows >= 0:
            written.append(values[section.rows])
    sums = empty
    if adds_up:
        sums = empty.new_zeros(ptr.shape[0] - 1, summed[0][1].shape[1])
        for section, values in summed:
            rows = torch.arange(section.begin, section.end, device=ptr.device)
            sums = sums.index_add(0, torch.searchsorted(ptr, rows, right=True) - 1, values)
    rows = torch.cat(written) if written else empty
    return sums.to(dtype, copy=True), rows.to(dtype, copy=True)


def row_program(program, ptr: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`scalegmn_fast.ops.row_program` as a formula, with the same arguments."""
    return row_program_forward(*program.arguments(ptr))


def _autograd() -> torch._C._ForceDispatchKeyGuard:
    """Lets autograd record inside an op's implementation, which PyTorch calls with autograd switched off."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        keys = keys.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys)


def row_program_backward(
    grad_sums: Tensor,
    grad_rows: Tensor,
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    bounds: Sequence[int],
    code: Sequence[int],
    constants: Sequence[float],
    ptr: Tensor | None,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of <grad_sums, sums> + <grad_rows, rows> for the wanted tensors, empty tensors [0] for the others.

    Autograd through the formula; differentiable again where grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _autograd():
        inputs = [
            (t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()) if want else t.detach()
            for t, want in zip(tensors, wanted, strict=True)
        ]
        outputs = row_program_forward(inputs, indices, bounds, code, constants, ptr, seed)
        pairs = [(out, g) for out, g in zip(outputs, (grad_sums, grad_rows), strict=True) if out.requires_grad]
        leaves = [t for t, want in zip(inputs, wanted, strict=True) if want]
        if pairs:
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                leaves,
                [g.to(out.dtype) for out, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        else:
            found = [torch.zeros_like(t) for t in leaves]
    grads = iter(found)
    return [next(grads).clone() if want else t.new_empty(0) for t, want in zip(tensors, wanted, strict=True)]
