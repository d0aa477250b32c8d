"""`row_program` in plain PyTorch: one step after the other on all rows of a section."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scalegmn_fast.reference.segment_reduce import segment_reduce
from scalegmn_fast.reference.symmetrize import ACTIVATIONS as SYMMETRIC_ACTIVATIONS
from scalegmn_fast.reference.symmetrize import LAYER_NORM_EPS, symmetrize_forward

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
    "head_dot",
)
REDUCTIONS = ("none", "sum", "statistics", "attention")
LOADS = ("load", "load_mul", "load_add", "scale")
SECTION_NUMBERS, STEP_NUMBERS = 5, 8
# name: act(y, w0)
ACTIVATIONS = {name: pair[0] for name, pair in SYMMETRIC_ACTIVATIONS.items()} | {"gelu": lambda y, w0: F.gelu(y)}


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
    """The program of rows [begin, end): its steps, the one that is written, the one that is reduced, and its logits."""

    begin: int
    end: int
    rows: int
    reduction: str
    reduced: int
    logits: int
    steps: list[Step]


def sections(bounds: Sequence[int], code: Sequence[int], constants: Sequence[float]) -> Iterator[Section]:
    """The sections that bounds, code and constants describe (csrc/ops/row_program.h)."""
    at = step_at = 0
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        count, rows, reduction, reduced, logits = code[at : at + SECTION_NUMBERS]
        at += SECTION_NUMBERS
        steps = []
        for _ in range(count):
            op, *numbers = code[at : at + STEP_NUMBERS]
            steps.append(Step(OPERATIONS[op], *numbers, *constants[2 * step_at : 2 * step_at + 2]))
            at += STEP_NUMBERS
            step_at += 1
        yield Section(begin, end, rows, REDUCTIONS[reduction], reduced, logits, steps)


def result_dtype(tensors: Sequence[Tensor], code: Sequence[int], num_sections: int) -> torch.dtype:
    """The promoted dtype of the tables that a program loads; float32 if there are none."""
    at, result = 0, None
    for _ in range(num_sections):
        count = code[at]
        at += SECTION_NUMBERS
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
        elif step.op == "head_dot":
            found.append(int(step.p1))
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


def _run(
    section: Section, tensors: Sequence[Tensor], indices: Sequence[Tensor], seed: Tensor | None, narrow: set[int]
) -> list[Tensor]:
    """The results of all steps. narrow: weights whose products take bfloat16 rows."""
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
                rows = a.to(torch.bfloat16).to(a.dtype) if step.t0 in narrow else a
                out = F.linear(rows, tensors[step.t0], optional(step.t1))
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
                out = ACTIVATIONS[names[step.activation]](a, step.p0)
            case "abs":
                out = a.abs()
            case "normalize":
                out = symmetrize_forward(a, None, None, None, "normalize", "identity", step.p0, 0.0)
            case "dropout":
                kept = dropout_mask(seed, int(step.p1), step.p0, section.begin, *a.shape)
                out = torch.where(kept, a / (1 - step.p0), torch.zeros_like(a))
            case "concat":
                out = torch.cat([a, values[step.b]], dim=1)
            case "head_dot":
                out = step.p0 * (a * values[step.b]).unflatten(1, (int(step.p1), -1)).sum(2)
        values.append(out)
    return values


def _segment_softmax(logits: Tensor, segment: Tensor, count: int) -> Tensor:
    """Softmax of logits [R, H] over the rows of each segment; segment int64 [R], their numbers."""
    index = segment[:, None].expand_as(logits)
    largest = logits.new_full((count, logits.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, index, logits.detach(), "amax")
    weights = torch.exp(logits - largest[segment])
    total = weights.new_zeros(count, logits.shape[1]).index_add(0, segment, weights)
    return weights / total[segment]


def _reduce(reduction: str, values: Tensor, logits: Tensor | None, ptr: Tensor, begin: int) -> Tensor:
    """[S, width]: rows begin, begin + 1, ... reduced per segment; 0 for segments without rows here."""
    count, rows = ptr.shape[0] - 1, torch.arange(begin, begin + values.shape[0], device=ptr.device)
    if reduction == "statistics":
        moved = (ptr - begin).clamp(0, values.shape[0])
        return segment_reduce(values, moved, ["mean", "var", "min", "max"]).flatten(1)
    segment = torch.searchsorted(ptr, rows, right=True) - 1
    if reduction == "attention":
        weights = _segment_softmax(logits, segment, count)
        values = (weights.unsqueeze(2) * values.unflatten(1, (logits.shape[1], -1))).flatten(1)
    return values.new_zeros(count, values.shape[1]).index_add(0, segment, values)


def row_program_formula(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    bounds: Sequence[int],
    code: Sequence[int],
    constants: Sequence[float],
    ptr: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What is reduced [S, width] and rows [R', d'], differentiable in the tensors.

    In float32, in float64 if a tensor is; products with a bfloat16 weight are of bfloat16 rows, as `F.linear` in that
    dtype has them, and added up in float32.
    """
    dtype = result_dtype(tensors, code, len(bounds) - 1)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    narrow = {k for k, t in enumerate(tensors) if t.dtype == torch.bfloat16 and wide == torch.float32}
    tensors = [t.to(wide) for t in tensors]
    empty = torch.empty(0, 0, dtype=wide, device=tensors[0].device)
    reduced, written = [], []
    for section in sections(bounds, code, constants):
        values = _run(section, tensors, indices, seed, narrow)
        if section.reduced >= 0:
            logits = values[section.logits] if section.logits >= 0 else None
            reduced.append(_reduce(section.reduction, values[section.reduced], logits, ptr, section.begin))
        if section.rows >= 0:
            written.append(values[section.rows])
    found = sum(reduced[1:], reduced[0]) if reduced else empty
    rows = torch.cat(written) if written else empty
    return found.to(dtype, copy=True), rows.to(dtype, copy=True)


def kept_sizes(tensors: Sequence[Tensor], bounds, code, constants, ptr: Tensor | None) -> tuple[tuple, tuple]:
    """Shapes of the two tensors that an engine keeps for its backward (csrc/cpu/row_program.h)."""
    for section in sections(bounds, code, constants):
        if section.reduction == "statistics":
            sizes = (ptr.shape[0] - 1, 2 * widths(tensors, section)[section.reduced])
            return sizes, sizes
        if section.reduction == "attention":
            return (ptr.shape[0] - 1, 2 * widths(tensors, section)[section.logits]), (0,)
    return (0,), (0,)


def row_program_forward(
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    bounds: Sequence[int],
    code: Sequence[int],
    constants: Sequence[float],
    ptr: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's results, with its positional signature; the last two, which only engines read, are 0."""
    reduced, rows = row_program_formula(tensors, indices, bounds, code, constants, ptr, seed)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    kept, extremes = kept_sizes(tensors, bounds, code, constants, ptr)
    return reduced, rows, reduced.new_zeros(kept, dtype=wide), reduced.new_zeros(extremes, dtype=torch.int32)


def row_program(program, ptr: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`scalegmn_fast.ops.row_program` as a formula, with the same arguments."""
    return row_program_formula(*program.arguments(ptr))


def _autograd() -> torch._C._ForceDispatchKeyGuard:
    """Lets autograd record inside an op's implementation, which PyTorch calls with autograd switched off."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        keys = keys.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys)


def row_program_backward(
    grad_reduced: Tensor,
    grad_rows: Tensor,
    reduced: Tensor,
    kept: Tensor,
    extremes: Tensor,
    tensors: Sequence[Tensor],
    indices: Sequence[Tensor],
    bounds: Sequence[int],
    code: Sequence[int],
    constants: Sequence[float],
    ptr: Tensor | None,
    seed: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of <grad_reduced, reduced> + <grad_rows, rows> for the wanted tensors, [0] for the others.

    What the forward kept is not read. Autograd through the formula; differentiable again where grad mode is on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _autograd():
        inputs = [
            (t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()) if want else t.detach()
            for t, want in zip(tensors, wanted, strict=True)
        ]
        outputs = row_program_formula(inputs, indices, bounds, code, constants, ptr, seed)
        pairs = [(out, g) for out, g in zip(outputs, (grad_reduced, grad_rows), strict=True) if out.requires_grad]
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
