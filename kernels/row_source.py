"""Writes the Triton source of the kernels that run one section of a row program, forward and backward.

A step's rows are tiles of at most MAX_COLS columns ("parts") in registers: wider loads and concatenations are several
of them side by side. The forward kernel runs the steps in order on one tile of rows per program.

Backward is a chain of kernels ("stages") that run on the same tiles. The first keeps the results of the linear steps
that derivatives depend on (`saved`, a place per tile; in bfloat16 where results are). Then the steps come in
reverse: a stage is a linear step and what comes before it up to the next one, and gradients pass from stage to stage in
`saved`. Everything else is computed again from there where it is read. One kernel for all of it would need many times
the registers that there are. Gradients of parameters are added up in a place per tile (`slots`), which the tiles of
later launches use again.
"""

import dataclasses
import functools
import linecache
import re

import triton
import triton.language as tl

from scalegmn_fast.reference.row_program import ACTIVATIONS, Step

from . import row_reductions, row_steps
from .activations import activate, activation_derivative
from .tiles import next_power_of_2

MAX_COLS = 64
MAX_HEADS = 128
MIN_COLS = 16  # of a product's operand
MAX_WIDTH = 1024

HEADER = "@triton.jit(do_not_specialize=['begin', 'end', 'segments', 'steps', 'first_tile'])"


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of a program: its type as Triton names it, and the width of a table's rows or a parameter's shape."""

    number: int
    dtype: str
    shape: tuple


@dataclasses.dataclass(frozen=True)
class Request:
    """What the kernels of a section depend on; the numbers of steps, tensors and indices are the program's.

    written, reduced, logits: steps, -1: none; reduction: of the second; result: type of results; acc: arithmetic type;
    precision: of float32 products; wanted: tensors whose gradients the backward kernel computes.
    """

    steps: tuple[Step, ...]
    written: int
    reduced: int
    logits: int
    reduction: str
    operands: tuple[Operand, ...]
    indices: tuple[tuple[int, str], ...]
    result: str
    acc: str
    precision: str
    block: int
    wanted: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of kernels that run in turn.

    Attributes:
        arguments: (name, type) in order, of each kernel.
        parameters: (tensor, offset, size) in a program's place of `slots`, of slot_size numbers in all.
        saved_size, saved_type: of a program's place of `saved`.
        direct: (tensor, how often): tables whose gradients' rows are written by number.
        gathered: (tensor, index): tables whose gradients' rows are written in the order of the rows.
    """

    text: str
    arguments: tuple
    kernels: tuple
    parameters: tuple = ()
    slot_size: int = 0
    saved_size: int = 0
    saved_type: str = ""
    direct: tuple = ()
    gathered: tuple = ()


class UnsupportedError(ValueError):
    """A program that these kernels do not run; the message says why."""


def parts_of(width):
    """Widths of the parts of a row."""
    return tuple(min(MAX_COLS, width - first) for first in range(0, width, MAX_COLS))


def _cols(count):
    return max(MIN_COLS, next_power_of_2(count))


def columns(parts):
    """Columns of the tiles of parts."""
    return sum(map(_cols, parts))


def partitions(steps, shapes):
    """The widths of the parts of each step's rows; shapes: {tensor: width of its rows, or shape of a weight}.

    Raises `UnsupportedError` for what the kernels do not run.
    """
    found = []
    for number, step in enumerate(steps):
        if step.op == "load":
            parts = parts_of(shapes[step.t0][-1])
        elif step.op == "linear":
            parts = parts_of(shapes[step.t0][0])
        elif step.op == "concat":
            parts = found[step.a] + found[step.b]
        elif step.op == "head_dot":
            parts = (int(step.p1),)
            heads_and_width(found[step.a], parts)
        else:
            parts = found[step.a]
        if step.op in ("add", "mul", "head_dot") and found[step.a] != found[step.b]:
            raise UnsupportedError(f"step {number} joins rows of parts {found[step.a]} and {found[step.b]}")
        if sum(parts) > MAX_WIDTH:
            raise UnsupportedError(f"step {number} has rows of width {sum(parts)}, of {MAX_WIDTH} at most")
        found.append(parts)
    return found


def heads_and_width(parts, logits):
    """(heads, columns of each) of rows of some parts, with logits of others."""
    heads, width = sum(logits), sum(parts)
    if width % heads or heads > MAX_HEADS or len(logits) > 1:
        raise UnsupportedError(f"it has rows of width {width} in {heads} heads, of {MAX_HEADS} at most")
    return heads, width // heads


class _Writer:
    """Writes statements; values are lists of names, one per part."""

    def __init__(self, request):
        self.request = request
        self.steps = request.steps
        self.shapes = {operand.number: operand.shape for operand in request.operands}
        self.types = {operand.number: operand.dtype for operand in request.operands}
        self.parts = partitions(request.steps, self.shapes)
        self.lines = []
        self.names = 0
        self.used_tensors, self.used_indices = set(), set()
        self.uses_seed = False

    # -- text

    def line(self, text):
        self.lines.append(text)

    def new(self, expression, kind="x"):
        name = f"{kind}{self.names}"
        self.names += 1
        self.line(f"{name} = {expression}")
        return name

    def tensor(self, number):
        self.used_tensors.add(number)
        return f"t{number}"

    def at(self, index):
        if index < 0:
            return "row"
        self.used_indices.add(index)
        return f"at{index}"

    def layout(self, number):
        """(first column, count, columns of the tile) of each part of a step's rows."""
        first = 0
        for count in self.parts[number]:
            yield first, count, _cols(count)
            first += count

    def width(self, number):
        return sum(self.parts[number])

    # -- what steps read

    def rows_of(self, step, number):
        """The rows of a table that a step reads, in the parts of its result."""
        acc, width = self.request.acc, self.shapes[step.t0][-1]
        table, at = self.tensor(step.t0), self.at(step.index)
        if step.op == "scale":
            return [self.new(f"load_rows({table}, {at}, inside, 1, 0, 1, 1, {acc})")] * len(self.parts[number])
        return [
            self.new(f"load_rows({table}, {at}, inside, {width}, {first}, {count}, {cols}, {acc})")
            for first, count, cols in self.layout(number)
        ]

    def vector(self, tensor, number):
        """A parameter [d] in the parts of a step's rows; None if absent."""
        if tensor < 0:
            return None
        name, acc = self.tensor(tensor), self.request.acc
        return [
            self.new(f"load_vector({name}, {first}, {count}, {cols}, {acc})")
            for first, count, cols in self.layout(number)
        ]

    def total(self, names, of="{}"):
        """The sum over columns of an expression of each part."""
        return self.new(" + ".join(f"tl.sum({of.format(*pair)}, 1)" for pair in _tuples(names)))

    def each(self, template, *lists):
        """An expression of the parts of each value."""
        return [self.new(template.format(*names)) for names in zip(*lists, strict=True)]

    def kept(self, template, number, *lists):
        """As `each`, with columns beyond the width set to 0."""
        found = []
        for (_, count, cols), *names in zip(self.layout(number), *lists, strict=True):
            expression = template.format(*names)
            found.append(self.new(expression if count == cols else f"kept({expression}, {count})"))
        return found

    # -- forward steps

    def centred(self, x, number):
        """x less the mean of its row."""
        mean = self.new(f"({self.total(x)}) / {self.width(number)}")
        counts = [str(count) for count in self.parts[number]]
        return self.each("centred({}, " + mean + ", {})", x, counts)

    def norm_of_centred(self, centred, number, weight, shift):
        """As `norm`, of rows whose mean is 0."""
        rstd = self.new(f"deviation({self.total(centred, '{0} * {0}')}, {self.width(number)})")
        normal = self.each("{} * " + rstd + "[:, None]", centred)
        return self.each("{} * {} + {}", normal, self.vector(weight, number), self.vector(shift, number)), normal, rstd

    def norm(self, x, number, weight, shift):
        """(LN(x), standardised x, 1 / deviation); (x, None, None) without a norm."""
        if weight < 0:
            return x, None, None
        return self.norm_of_centred(self.centred(x, number), number, weight, shift)

    def activated(self, pre, number, step):
        name = list(ACTIVATIONS)[step.activation]
        if name == "identity":
            return pre
        template = f"activate({{}}, '{name}', {step.p0!r})"
        return self.kept(template, number, pre) if name == "sigmoid" else self.each(template, pre)

    def slope(self, pre, step):
        """The activation's derivative; None for 1."""
        name = list(ACTIVATIONS)[step.activation]
        if name == "identity":
            return None
        return self.each(f"activation_derivative({{}}, '{name}', {step.p0!r})", pre)

    def branches(self, a, number, step):
        """The two arguments of a symmetrised activation, after its norm: (LN, standardised, 1 / deviation) of each.

        The statements of one are written when it is asked for: both at once would not stay in registers.
        """
        bias, normed = self.vector(step.t0, number), step.t1 >= 0
        if normed:
            a, bias = self.centred(a, number), None if bias is None else self.centred(bias, number)
        for sign in "+-":
            if bias is None:
                x = a if sign == "+" else self.each("-{}", a)
            else:
                x = self.each("{} " + sign + " {}", bias, a)
            yield self.norm_of_centred(x, number, step.t1, step.t2) if normed else (x, None, None)

    def scaled(self, a, eps):
        """Rows in a range where their squares are finite: (factor, rows, norm, whether it is 0, norm + eps)."""
        largest = [self.new(f"tl.max(tl.abs({x}), 1)") for x in a]
        factor = self.new(f"safe_factor({functools.reduce('tl.maximum({}, {})'.format, largest)})")
        rows = self.each("{} * " + factor + "[:, None]", a)
        norm = self.new(f"tl.sqrt({self.total(rows, '{0} * {0}')})")
        zero = self.new(f"{norm} == 0.0")
        return factor, rows, norm, zero, self.new(f"tl.where({zero}, 1.0, {norm} + {eps!r} * {factor})")

    def dropout(self, x, number, step):
        self.uses_seed = True
        how = f"seed, row, {int(step.p1)}, {step.p0!r}, {int(step.p0 * 4294967296.0)}"
        return [
            self.new(f"dropped({name}, {how}, {first})")
            for name, (first, _, _) in zip(x, self.layout(number), strict=True)
        ]

    def is_exact(self, tensor):
        """Whether products with a weight are those of IEEE float32, which tensor cores do not do."""
        return self.request.precision == "ieee" and self.types[tensor] == "fp32"

    def operands(self, tensor, x, layout):
        """(rows, first column, count, columns) of what is multiplied by a weight: x, in parts as the layout says.

        Of at most 16 columns where tensor cores do not multiply: such operands would fill the registers.
        """
        cut = self.is_exact(tensor)
        for rows, (first, count, cols) in zip(x, layout, strict=True):
            if cut and cols > MIN_COLS:
                pair, half = self.new(f"halves({rows})"), cols // 2
                sides = (0, min(count, half), half), (half, count - half, half)
                for k, (at, inside, _) in enumerate(sides):
                    if inside > 0:
                        yield from self.operands(tensor, [f"{pair}[{k}]"], [(first + at, inside, half)])
            else:
                yield rows, first, count, cols

    def products(self, tensor, blocks):
        """{k: the sum of the products that go there}; blocks: (k, rows, which block of the weight `tensor`)."""
        found, weight = {}, self.tensor(tensor)
        for k, x, where in blocks:
            product = f"product({x}, {self.new(f'load_weight({weight}, {where})', 'w')}, PRECISION)"
            if k in found:
                total = f"{found[k]} + {product}"
                product = f"settled({total})" if self.is_exact(tensor) else total
            found[k] = self.new(product)
        return found

    def linear(self, a, number, step):
        inputs = self.width(step.a)
        found = self.products(step.t0, (
            (k, x, f"{inputs}, {first}, {count}, {cols}, {in_first}, {in_count}, {in_cols}, True")
            for k, (first, count, cols) in enumerate(self.layout(number))
            for x, in_first, in_count, in_cols in self.operands(step.t0, a, self.layout(step.a))
        ))  # fmt: skip
        found, bias = list(found.values()), self.vector(step.t1, number)
        return found if bias is None else self.each("{} + {}", found, bias)

    def of_heads(self, numbers, number, logits):
        """In each column of a step's rows the number that its head has, of a tile with a column per head."""
        _, head = heads_and_width(self.parts[number], self.parts[logits])
        return [
            self.new(f"of_heads({numbers}, {first}, {count}, {head}, {cols})")
            for first, count, cols in self.layout(number)
        ]

    def head_sums(self, x, number, logits):
        """The sums over the columns of each head of values in the parts of a step's rows."""
        _, head = heads_and_width(self.parts[number], self.parts[logits])
        cols = columns(self.parts[logits])
        return self.new(" + ".join(
            f"head_sums({name}, {first}, {count}, {head}, {cols})"
            for name, (first, count, _) in zip(x, self.layout(number), strict=True)
        ))  # fmt: skip

    def forward(self, number, get):
        """The statements of a step; get(k): the parts of the result of step k."""
        step = self.steps[number]
        a = get(step.a) if step.a >= 0 else None
        match step.op:
            case "load":
                return self.rows_of(step, number)
            case "load_mul" | "scale":
                return self.each("{} * {}", a, self.rows_of(step, number))
            case "load_add":
                return self.each("{} + {}", a, self.rows_of(step, number))
            case "linear":
                return self.linear(a, number, step)
            case "add" | "mul":
                return self.each("{} + {}" if step.op == "add" else "{} * {}", a, get(step.b))
            case "negate":
                return self.each("-{}", a)
            case "add_vector":
                return self.each("{} + {}", a, self.vector(step.t0, number))
            case "symmetrize":
                plus, minus = (self.activated(pre, number, step) for pre, _, _ in self.branches(a, number, step))
                return self.each("{} + {}", plus, minus)
            case "norm_act":
                return self.activated(self.norm(a, number, step.t1, step.t2)[0], number, step)
            case "abs":
                return self.each("tl.abs({})", a)
            case "normalize":
                _, rows, _, _, divisor = self.scaled(a, step.p0)
                return self.each("{} / " + divisor + "[:, None]", rows)
            case "dropout":
                return self.dropout(a, number, step)
            case "concat":
                return a + get(step.b)
            case "head_dot":
                along = self.head_sums(self.each("{} * {}", a, get(step.b)), step.a, number)
                return [self.new(f"{step.p0!r} * {along}")]
        raise UnsupportedError(f"step {number} is {step.op}")

    # -- results

    def result_pointers(self, names):
        """(name, type) of arguments of these names that hold results, their gradients, and what a reduction keeps."""
        acc, result = "*" + _short(self.request.acc), "*" + self.request.result
        types = {"holds": "*i64", "partial_rows": "*i32", "extremes": "*i32"}
        types |= dict.fromkeys(("partial", "partial_stats", "kept_stats", "along"), acc)
        return [(name, types.get(name, result)) for name in names]

    def write(self, number, x):
        """Stores rows; returns the arguments that this takes."""
        for name, (first, count, _) in zip(x, self.layout(number), strict=True):
            self.line(f"store_rows(rows_out, row, inside, {name}, {self.width(number)}, {first}, {count})")
        return self.result_pointers(["rows_out"])

    def reduce(self, number, get):
        """Reduces rows per segment of the tile; returns the arguments that this takes."""
        x, logits, more = get(number), self.request.logits, []
        self.line("rank = ranks_of(ptr, segment, row, inside)")
        where = "ptr, segment, rank, row, end"
        if self.request.reduction == "attention":
            more = ["kept_stats", "partial_stats"]
            heads = self.width(logits)
            logits_of = f"{get(logits)[0]}, {where}, {', '.join(more)}, first_tile + tile, {heads}"
            weights = self.new(f"attention_weights({logits_of})")
            x = self.each("{} * {}", x, self.of_heads(weights, number, logits))
        if self.request.reduction == "statistics":
            function, names = "summarize", ["reduced", "kept_stats", "extremes", "partial", "partial_rows"]
        else:
            function, names = "add_up", ["reduced", "partial"]
        where += f", {', '.join(names)}, first_tile + tile, {self.width(number)}"
        for name, (first, count, _) in zip(x, self.layout(number), strict=True):
            self.line(f"{function}({name}, {where}, {first}, {count})")
        self.line("note_parts(ptr, segment, row, inside, end, holds, first_tile + tile)")
        return self.result_pointers([*names, *more, "holds"])

    # -- the whole

    def loading_ahead(self, lines):
        """Statements with each block of a weight loaded before the product that comes before its own."""
        if any(step.op == "linear" and self.is_exact(step.t0) for step in self.steps):
            return lines  # arithmetic takes longer than loads there, and needs the registers
        found, last = [], None
        for line in lines:
            if "= load_weight(" in line and last is not None:
                found.insert(last, line)
                last += 1
            else:
                last = len(found) if " product(" in line else last
                found.append(line)
        return found

    def prologue(self, lines):
        """What statements on the rows of `tile` read: row numbers, rows that indices name, segments, places."""
        block = self.request.block
        names = set(re.findall(r"[a-z_]\w*", "\n".join(lines)))
        found = [f"row = (begin + tile * {block} + tl.arange(0, {block})).to(tl.int64)", "inside = row < end"]
        for index in sorted(self.used_indices):
            if f"at{index}" in names:
                found.append(f"at{index} = tl.load(i{index} + row, mask=inside, other=0).to(tl.int64)")
        if "segment" in names:
            found.append("segment = segments_of(ptr, row, end, segments, steps)")
        if "fresh" in names:
            found.append("fresh = first_tile == 0")
        if "kept_tiles" in names:
            found.append(f"kept_tiles = saved_tiles + first * {self.saved_size}")
        if "slot" in names:
            found.append(f"slot = slots + first * {self.slot_size}")
        return found

    def body(self, lines):
        """A kernel's statements."""
        return [*self.prologue(lines), *self.loading_ahead(lines)]

    def inputs(self):
        """(name, type) of the arguments that both kernels have."""
        found = [(f"t{number}", "*" + self.types[number]) for number in sorted(self.used_tensors)]
        found += [(f"i{number}", "*" + dict(self.request.indices)[number]) for number in sorted(self.used_indices)]
        if self.request.reduced >= 0:
            found.append(("ptr", "*i64"))
        if self.uses_seed:
            found.append(("seed", "*i64"))
        return found

    def scalars(self):
        return [("begin", "i64"), ("end", "i64")] + (
            [("segments", "i64"), ("steps", "i32")] if self.request.reduced >= 0 else []
        )


def _tuples(names):
    return [(name,) if isinstance(name, str) else name for name in names]


def _precision(request):
    return f"PRECISION = tl.constexpr({request.precision!r})\n\n"


@functools.lru_cache(maxsize=1024)
def forward_source(request):
    """`Source` of a section's forward kernel: one tile of request.block rows per program.

    Arguments after the inputs: rows_out [*, d'], reduced [S, d] with what else the reduction writes (`row_reductions`),
    as far as the section has them; begin, end; segments, steps (`find_segment`'s) and first_tile, the number of its
    first tile.
    """
    writer = _Writer(request)
    values = {}

    def get(number):
        if number not in values:
            values[number] = writer.forward(number, get)
        return values[number]

    outputs = []
    written, reduced = request.written, request.reduced
    # In the order of the steps, so that a result is stored before the next branch begins.
    for number in sorted({number for number in (written, reduced) if number >= 0}):
        if number == written:
            outputs += writer.write(number, get(number))
        if number == reduced:
            outputs += writer.reduce(number, get)
    scalars = writer.scalars() + ([("first_tile", "i64")] if reduced >= 0 else [])
    arguments = (*writer.inputs(), *outputs, *scalars)
    names = ", ".join(name for name, _ in arguments)
    lines = ["tile = tl.program_id(0).to(tl.int64)", *writer.body(writer.lines)]
    text = [_precision(request), HEADER, f"def forward_kernel({names}):", *("    " + line for line in lines)]
    return Source("\n".join(text) + "\n", arguments, ("forward_kernel",))


def _short(acc):
    return {"tl.float32": "fp32", "tl.float64": "fp64"}[acc]


class _Backward(_Writer):
    def __init__(self, request):
        super().__init__(request)
        self.wanted = set(request.wanted)
        self.wants = []
        for step in self.steps:
            read = [self.wants[k] for k in (step.a, step.b) if k >= 0]
            self.wants.append(any(read) or bool(self.wanted & {step.t0, step.t1, step.t2}))
        self.grads, self.carried = {}, {}
        self.saved, self.saved_size = {}, 0
        # Half the memory traffic, no less exact than results in bfloat16. float16's range would not do for gradients.
        self.saved_type = "bf16" if request.result == "bf16" else _short(request.acc)
        self.idle, self.leaving = {}, []  # places of `saved`, {columns: offsets} and (columns, offset)
        self.parameters, self.slot_size = {}, 0
        self.direct, self.gathered = {}, {}

    def recomputed(self, number, known):
        """The parts of a step's result where derivatives read it."""
        if number not in known:
            if self.steps[number].op == "linear":
                known[number] = self.read(self.place(number), number)
            else:
                known[number] = self.forward(number, lambda k: self.recomputed(k, known))
        return known[number]

    def place(self, number):
        """Offsets of a linear step's parts in a program's place of `saved`."""
        if number not in self.saved:
            self.saved[number] = self.room(number)
        return self.saved[number]

    def room(self, number):
        """Places for a step's parts in a program's place of `saved`."""
        found = []
        for _, _, cols in self.layout(number):
            found.append(self.saved_size)
            self.saved_size += cols * self.request.block
        return found

    def free(self, number, places):
        """Gradients of later stages may go to these places of a step's parts."""
        self.leaving += [(cols, at) for at, (_, _, cols) in zip(places, self.layout(number), strict=True)]

    def read(self, places, number):
        """Tiles that were kept."""
        return [
            self.new(f"saved(kept_tiles + {at}, {cols}, {self.request.block}, {self.request.acc})")
            for at, (_, _, cols) in zip(places, self.layout(number), strict=True)
        ]

    def grad(self, number):
        """The gradient of a step so far, None if there is none; an earlier stage's from where that left it."""
        if number in self.grads:
            return self.grads.pop(number)
        if number not in self.carried:
            return None
        places = self.carried.pop(number)
        self.free(number, places)
        return self.read(places, number)

    def carry(self):
        """Leaves the gradients that are still to be used to later stages."""
        for number, names in self.grads.items():
            widths = [cols for _, _, cols in self.layout(number)]
            if all(widths.count(cols) <= len(self.idle.get(cols, ())) for cols in widths):
                places = [self.idle[cols].pop() for cols in widths]
            else:
                places = self.room(number)
            self.carried[number] = places
            for name, at in zip(names, places, strict=True):
                self.line(f"save(kept_tiles + {at}, {name})")
        self.grads.clear()
        # What this stage reads may be overwritten by the next one.
        for cols, at in self.leaving:
            self.idle.setdefault(cols, []).append(at)
        self.leaving.clear()

    def give(self, number, names):
        """A contribution to the gradient of a step."""
        if not self.wants[number]:
            return
        known = self.grad(number)
        self.grads[number] = names if known is None else self.each("{} + {}", known, names)

    def parameter(self, tensor, size):
        """(place of the gradient of a parameter, `_add`'s fresh: None after the first contribution in a tile)."""
        first = tensor not in self.parameters
        if first:
            self.parameters[tensor] = (self.slot_size, size)
            self.slot_size += size
        return f"slot + {self.parameters[tensor][0]}", "fresh" if first else "None"

    def give_vector(self, tensor, number, grads):
        if tensor not in self.wanted:
            return
        to, fresh = self.parameter(tensor, self.width(number))
        for name, (first, count, _) in zip(grads, self.layout(number), strict=True):
            self.line(f"add_vector_gradient({to}, {fresh}, {name}, {first}, {count})")

    def give_rows(self, step, number, grads):
        """The gradient of the rows that a step reads from a table."""
        if step.t0 not in self.wanted:
            return
        if step.index < 0:
            known, key, name, at = self.direct, step.t0, f"d{step.t0}", "row"
        else:
            known, key = self.gathered, (step.t0, step.index)
            name, at = f"s{step.t0}_{step.index}", "row - begin"
        first_time = key not in known
        known[key] = known.get(key, 0) + 1
        width = self.shapes[step.t0][-1]
        layout = [(0, 1, 1)] if step.op == "scale" else self.layout(number)
        for grad, (first, count, _) in zip(grads, layout, strict=True):
            how = "store_rows" if first_time else "add_rows"
            self.line(f"{how}({name}, {at}, inside, {grad}, {width}, {first}, {count})")

    def norm_backward(self, grad, number, step, normal, rstd):
        """The gradient of a norm's argument, from that of its result; gives those of its parameters."""
        if normal is None:
            return grad
        self.give_vector(step.t2, number, grad)
        if step.t1 in self.wanted:
            self.give_vector(step.t1, number, self.each("{} * {}", grad, normal))
        grad = self.each("{} * {}", grad, self.vector(step.t1, number))
        total = self.total(grad)
        along = self.total(list(zip(grad, normal, strict=True)), "{0} * {1}")
        width = self.width(number)
        counts = [str(count) for count in self.parts[number]]
        template = f"norm_backward({{}}, {{}}, {rstd}, {total}, {along}, {width}, {{}})"
        return self.each(template, grad, normal, counts)

    def backward(self, number):
        """The statements that give the gradients of what a step reads, from that of its result."""
        step, known = self.steps[number], {}
        a = step.a

        def value(k):
            return self.recomputed(k, known)

        if step.op == "linear":
            # Before the gradient is read: what computes it needs the registers.
            x = value(a) if step.t0 in self.wanted else None
            self.linear_backward(number, step, self.grad(number), x)
            return
        grad = self.grad(number)
        match step.op:
            case "load":
                self.give_rows(step, number, grad)
            case "load_add":
                self.give_rows(step, number, grad)
                self.give(a, grad)
            case "load_mul":
                if step.t0 in self.wanted:
                    self.give_rows(step, number, self.each("{} * {}", grad, value(a)))
                if self.wants[a]:
                    self.give(a, self.each("{} * {}", grad, self.rows_of(step, number)))
            case "scale":
                if step.t0 in self.wanted:
                    along = self.total(list(zip(grad, value(a), strict=True)), "{0} * {1}")
                    self.give_rows(step, number, [self.new(f"{along}[:, None]")])
                if self.wants[a]:
                    self.give(a, self.each("{} * {}", grad, self.rows_of(step, number)))
            case "add":
                self.give(a, grad)
                self.give(step.b, grad)
            case "mul":
                if self.wants[a]:
                    self.give(a, self.each("{} * {}", grad, value(step.b)))
                if self.wants[step.b]:
                    self.give(step.b, self.each("{} * {}", grad, value(a)))
            case "negate":
                self.give(a, self.each("-{}", grad))
            case "add_vector":
                self.give_vector(step.t0, number, grad)
                self.give(a, grad)
            case "symmetrize":
                self.symmetrize_backward(number, step, grad, value(a))
            case "norm_act":
                pre, normal, rstd = self.norm(value(a), number, step.t1, step.t2)
                slope = self.slope(pre, step)
                grad = grad if slope is None else self.each("{} * {}", grad, slope)
                self.give(a, self.norm_backward(grad, number, step, normal, rstd))
            case "abs":
                if self.wants[a]:
                    self.give(a, self.each("abs_backward({}, {})", grad, value(a)))
            case "normalize":
                if self.wants[a]:
                    self.normalize_backward(step, grad, value(a))
            case "dropout":
                if self.wants[a]:
                    self.give(a, self.dropout(grad, number, step))
            case "concat":
                split = len(self.parts[a])
                self.give(a, grad[:split])
                self.give(step.b, grad[split:])
            case "head_dot":
                (along,) = self.each(f"{step.p0!r} * {{}}", grad)
                along = self.of_heads(along, a, number)
                for to, other in ((a, step.b), (step.b, a)):
                    if self.wants[to]:
                        self.give(to, self.each("{} * {}", along, value(other)))

    def linear_backward(self, number, step, grad, x):
        """x: the rows that the step reads, if the gradient of its weight is wanted."""
        self.give_vector(step.t1, number, grad)
        inputs, outputs, layout = self.width(step.a), self.width(number), list(self.layout(step.a))
        if x is not None:
            weight = self.tensor(step.t0)
            to, fresh = self.parameter(step.t0, outputs * inputs)
            for out, (first, count, _) in zip(grad, self.layout(number), strict=True):
                for rows, (in_first, in_count, _) in zip(x, layout, strict=True):
                    where = f"{inputs}, {first}, {count}, {in_first}, {in_count}, PRECISION"
                    self.line(f"add_weight_gradient({to}, {fresh}, {out}, {rows}, {weight}, {where})")
        if self.wants[step.a]:
            found = self.products(step.t0, (
                (k, out, f"{inputs}, {first}, {count}, {cols}, {in_first}, {in_count}, {in_cols}, False")
                for out, first, count, cols in self.operands(step.t0, grad, self.layout(number))
                for k, (in_first, in_count, in_cols) in enumerate(layout)
            ))  # fmt: skip
            self.give(step.a, list(found.values()))

    def symmetrize_backward(self, number, step, grad, a):
        sides = []
        for pre, normal, rstd in self.branches(a, number, step):
            slope = self.slope(pre, step)
            side = grad if slope is None else self.each("{} * {}", grad, slope)
            sides.append(self.norm_backward(side, number, step, normal, rstd))
        if step.t0 in self.wanted:
            self.give_vector(step.t0, number, self.each("{} + {}", *sides))
        if self.wants[step.a]:
            self.give(step.a, self.each("{} - {}", *sides))

    def normalize_backward(self, step, grad, a):
        """(g - y (y . g) (norm + eps) / norm) / (norm + eps) with y = a / (norm + eps); rows of norm 0 get 0."""
        factor, rows, norm, zero, divisor = self.scaled(a, step.p0)
        unit = self.each(f"{{}} / tl.where({zero}, 1.0, {norm})[:, None]", rows)
        along = self.total(list(zip(grad, unit, strict=True)), "{0} * {1}")
        along = self.new(f"{along} * tl.where({zero}, 0.0, {norm} / {divisor})")
        slope = self.new(f"tl.where({zero}, 0.0, {factor} / {divisor})")
        self.give(step.a, self.each(f"({{}} - {{}} * {along}[:, None]) * {slope}[:, None]", grad, unit))

    def output_grads(self):
        """Reads the gradients of the results; returns the arguments that this takes."""
        written, reduced = self.request.written, self.request.reduced
        names = []
        if written >= 0 and self.wants[written]:
            names.append("grad_rows")
            self.give(written, self.rows_at("grad_rows", "row", written))
        reducing = [number for number in (reduced, self.request.logits) if number >= 0 and self.wants[number]]
        if not reducing:
            return self.result_pointers(names)
        names.append("grad_reduced")
        if self.request.reduction == "statistics":
            names += ["kept_stats", "extremes"]
            where = f"grad_reduced, kept_stats, extremes, ptr, segment, row, inside, {self.width(reduced)}"
            found = []
            for x, (first, count, _) in zip(self.recomputed(reduced, {}), self.layout(reduced), strict=True):
                if found:
                    self.line("tl.debug_barrier()  # not all parts' addresses in registers at once")
                found.append(self.new(f"statistics_backward({x}, {where}, {first}, {count})", "g"))
            self.give(reduced, found)
        elif self.request.reduction == "attention":
            names += ["kept_stats"] + ["along"] * self.attention_grads()
        else:
            self.give(reduced, self.rows_at("grad_reduced", "segment", reduced))
        return self.result_pointers(names)

    def attention_grads(self):
        """Gives the gradients of rows attended to and of their logits; returns whether it does the latter."""
        number, logits, known = self.request.reduced, self.request.logits, {}
        heads, acc = self.width(logits), self.request.acc
        known_logits = self.recomputed(logits, known)[0]
        weights = self.new(f"attention_weights_again({known_logits}, kept_stats, segment, inside, {heads})")
        grad = self.rows_at("grad_reduced", "segment", number)
        if self.wants[logits]:
            product = self.head_sums(self.each("{} * {}", grad, self.recomputed(number, known)), number, logits)
            cols = columns(self.parts[logits])
            along = self.new(f"load_rows(along, segment, inside, {heads}, 0, {heads}, {cols}, {acc})")
            self.give(logits, [self.new(f"{weights} * ({product} - {along})", "g")])
        self.give(number, self.each("{} * {}", grad, self.of_heads(weights, number, logits)))
        return self.wants[logits]

    def rows_at(self, table, at, number):
        """The rows `at` of a table in the parts of a step's rows."""
        acc, width = self.request.acc, self.width(number)
        return [
            self.new(f"load_rows({table}, {at}, inside, {width}, {first}, {count}, {cols}, {acc})", "g")
            for first, count, cols in self.layout(number)
        ]

    def keep(self):
        """The forward statements that compute and keep what `recomputed` reads."""
        values = {}

        def get(number):
            if number not in values:
                values[number] = self.forward(number, get)
            return values[number]

        for number in sorted(self.saved):
            names = get(number)
            for name, at in zip(names, self.saved[number], strict=True):
                self.line(f"save(kept_tiles + {at}, {name})")


@functools.lru_cache(maxsize=1024)
def backward_source(request):
    """`Source` of a section's backward kernels.

    Arguments after the inputs: grad_rows and grad_reduced, as far as they matter; d<tensor>: rows of the gradient of a
    table, by number; s<tensor>_<index>: rows [end - begin, d] of the gradient of what an index reads; saved_tiles and
    slots, a place per program; begin, end; segments, steps; first_tile, program 0's tile: 0 in the first launch.
    """
    writer = _Backward(request)
    stages = []

    def end_stage():
        if writer.lines:
            writer.carry()
            stages.append(writer.lines)
            writer.lines = []

    outputs = writer.output_grads()
    for number in reversed(range(len(request.steps))):
        if request.steps[number].op == "linear":
            end_stage()
        if number in writer.grads or number in writer.carried:
            writer.backward(number)
        if number in writer.saved:
            writer.free(number, writer.saved[number])
    end_stage()
    writer.keep()
    stages = [writer.lines] * bool(writer.lines) + stages
    acc = _short(request.acc)
    outputs += [(f"d{tensor}", "*" + writer.types[tensor]) for tensor in writer.direct]
    outputs += [(f"s{tensor}_{index}", "*" + acc) for tensor, index in writer.gathered]
    if writer.saved_size:
        outputs.append(("saved_tiles", "*" + writer.saved_type))
    if writer.parameters:
        outputs.append(("slots", "*" + acc))
    arguments = (*writer.inputs(), *outputs, *writer.scalars())
    arguments += (("first_tile", "i64"),)
    names = ", ".join(name for name, _ in arguments)
    text = [_precision(request)]
    for k, lines in enumerate(stages):
        text += ["\n" + HEADER, f"def stage{k}_kernel({names}):", "    first = tl.program_id(0).to(tl.int64)"]
        text += ["    tile = first_tile + first"]
        text += ["    " + line for line in writer.body(lines)]
    return Source(
        "\n".join(text) + "\n",
        arguments,
        tuple(f"stage{k}_kernel" for k in range(len(stages))),
        tuple((tensor, *place) for tensor, place in writer.parameters.items()),
        writer.slot_size,
        writer.saved_size,
        writer.saved_type,
        tuple(writer.direct.items()),
        tuple(writer.gathered),
    )


@functools.lru_cache(maxsize=1024)
def compiled(source):
    """The kernels of a `Source`, as `triton.jit` gives them."""
    file = f"<row program {len(linecache.cache)}>"
    # Where Triton, which parses the text of functions, looks for it.
    linecache.cache[file] = (len(source.text), None, source.text.splitlines(True), file)
    namespace = {"triton": triton, "tl": tl, "activate": activate, "activation_derivative": activation_derivative}
    for module in (row_steps, row_reductions):
        namespace |= {key: value for key, value in vars(module).items() if isinstance(value, type(activate))}
    namespace["__name__"] = "scalegmn_fast.kernels.row_program_generated"
    exec(compile(source.text, file, "exec"), namespace)
    return tuple(namespace[name] for name in source.kernels)
