"""Every kernel in every launch configuration, compiled ahead of time for named architectures. Needs no GPU.

`configurations` lists each kernel in each tile that the launchers of this package choose, `variants` the other types,
alignments and options; `compile_all` compiles them, `usage` reads what one needs out of its machine code. Kernels of
row programs are generated: `row_section` writes those of the largest sections of models, `compile_section` and
`compile_merge` compile them, and the kernels that merge what is reduced.
"""

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import re
import subprocess
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from scalegmn_fast.ops.row_program import RowProgram

from . import row_program, row_source, segment_reduce, symmetrize
from .activations import ACTIVATIONS
from .tiles import LAYER_NORM_EPS, MAX_WIDTH, MIN_COLS, row_tile

# Shared memory that one block can have, in bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = tuple(SHARED_MEMORY)

OPTIONS = ("num_warps", "enable_fp_fusion")
INTEGERS = ("rows", "width", "elements", "segments", "steps")
ALL_REDUCTIONS = "sum mean min max var std"
# The type of each pointer that does not point to the op's own type.
FIXED_TYPES = {"partial": "acc", "moments": "acc", "partial_at": "i32", "row_slots": "i64", "row_ptr": "i64"}


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel with one set of compile-time constants.

    aligned: width divisible by 16, so that rows start at 16-byte boundaries; else loads are one element wide.
    """

    kernel: str
    variant: str
    cols: int
    dtype: str
    aligned: bool
    constants: tuple
    index: str = "i32"

    @property
    def name(self):
        alignment = "aligned" if self.aligned else "unaligned"
        return f"{self.kernel}-{self.variant}-{self.cols}-{self.dtype}-{alignment}".replace("--", "-")


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a block of compiled code needs. spills: bytes of stack per thread; shared: bytes per block."""

    registers: int
    spills: int
    shared: int
    warps: int


def _build(kernel, variant, dtype, aligned, index="i32", **constants):
    cols = constants.get("BLOCK_COLS", constants.get("BLOCK"))
    return Build(kernel, variant, cols, dtype, aligned, tuple(constants.items()), index)


def _acc(dtype):
    return tl.float64 if dtype == "fp64" else tl.float32


def _activation(direction, activation, dtype, aligned, width, bias=True, norm=True):
    parts = [activation] + ["bias"] * bias + ["norm"] * norm
    return _build(
        f"activation_{direction}_kernel", "+".join(parts), dtype, aligned,
        ACTIVATION=activation, W0=30.0, EPS=LAYER_NORM_EPS, HAS_BIAS=bias, HAS_NORM=norm, ACC=_acc(dtype),
        **row_tile(width),
    )  # fmt: skip


def _normalize(direction, dtype, aligned, width):
    return _build(f"normalize_{direction}_kernel", "", dtype, aligned, EPS=1e-10, ACC=_acc(dtype), **row_tile(width))


def _segment(kernel, reduce, order, dtype, aligned, width, index="i32"):
    constants = {"REDUCE": reduce, "HAS_ORDER": order, "ACC": _acc(dtype), **segment_reduce.segment_tile(width)}
    if kernel != "chunks_kernel":
        constants["EPS"] = 1e-5
    if kernel != "backward_kernel":
        constants["CHUNK"] = segment_reduce.CHUNK
    if kernel in ("segments_kernel", "chunks_kernel"):
        constants["UNROLL"] = segment_reduce.UNROLL
    variant = ["all" if reduce == ALL_REDUCTIONS else reduce.replace(" ", "+")]
    variant += ["order"] * order + ["int64"] * (index == "i64")
    return _build(kernel, "+".join(variant), dtype, aligned, index, **constants)


def _powers(first, last):
    return [1 << k for k in range(first.bit_length() - 1, last.bit_length())]


ROW_WIDTHS = _powers(MIN_COLS, MAX_WIDTH)
SEGMENT_WIDTHS = _powers(MIN_COLS, segment_reduce.MAX_COLS)
SEGMENT_KERNELS = ("segments_kernel", "chunks_kernel", "merge_kernel", "backward_kernel")


def _flat(dtype, aligned):
    for direction in ("forward", "backward"):
        yield _build(f"abs_{direction}_kernel", "", dtype, aligned, ACC=_acc(dtype), **symmetrize.FLAT_TILE)


def _parameter_gradient(dtype, aligned):
    flags = {"HAS_BIAS": True, "HAS_NORM": True}
    return _build("parameter_gradient_kernel", "", dtype, aligned, **flags, **symmetrize.PARTIAL_TILE)


def configurations():
    """Each kernel in each of its tiles once, in float32, with everything switched on: the most registers."""
    for direction in ("forward", "backward"):
        for width in ROW_WIDTHS:
            yield _activation(direction, "silu", "fp32", True, width)
            yield _normalize(direction, "fp32", True, width)
    yield from _flat("fp32", True)
    yield _parameter_gradient("fp32", True)
    for kernel, width in itertools.product(SEGMENT_KERNELS, SEGMENT_WIDTHS):
        yield _segment(kernel, ALL_REDUCTIONS, True, "fp32", True, width)


def variants():
    """The other types, alignments, activations and options, of every tile where they can change what it needs."""
    for direction, width in itertools.product(("forward", "backward"), ROW_WIDTHS):
        for dtype, aligned in (("fp32", False), ("bf16", True)):
            yield _activation(direction, "silu", dtype, aligned, width)
            yield _normalize(direction, dtype, aligned, width)
    for direction in ("forward", "backward"):
        for activation in ACTIVATIONS:
            if activation != "silu":
                yield _activation(direction, activation, "fp32", True, 128)
        for bias, norm in ((False, False), (True, False), (False, True)):
            yield _activation(direction, "silu", "fp32", True, 128, bias, norm)
        for dtype in ("fp16", "fp64"):
            yield _activation(direction, "silu", dtype, True, 128)
            yield _normalize(direction, dtype, True, 128)
    for dtype in ("bf16", "fp16", "fp64"):
        yield from _flat(dtype, True)
        yield _parameter_gradient(dtype, True)
    for kernel, width in itertools.product(SEGMENT_KERNELS, SEGMENT_WIDTHS):
        for dtype, aligned in (("fp32", False), ("bf16", True)):
            yield _segment(kernel, ALL_REDUCTIONS, True, dtype, aligned, width)
        yield _segment(kernel, "sum", True, "fp32", True, width, "i64")  # as row programs add up gradients of tables
    for kernel in SEGMENT_KERNELS:
        for reduce, order in (("sum", False), ("mean", False), ("sum", True), ("max", False), ("mean var", False)):
            yield _segment(kernel, reduce, order, "fp32", True, 128)
        for dtype in ("fp16", "fp64"):
            yield _segment(kernel, ALL_REDUCTIONS, True, dtype, True, 128)


def _source(build):
    module = symmetrize if hasattr(symmetrize, build.kernel) else segment_reduce
    kernel = getattr(module, build.kernel)
    constants = {name: value for name, value in build.constants if name not in OPTIONS}
    signature, attributes = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        if name in INTEGERS:
            signature[name] = "i32"
            divisible = build.aligned and name in ("width", "elements")
        else:
            pointee = FIXED_TYPES.get(name, build.dtype)
            if name in ("ptr", "order", "arg"):
                pointee = build.index
            elif pointee == "acc":
                pointee = "fp64" if build.dtype == "fp64" else "fp32"
            signature[name] = "*" + pointee
            divisible = True
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Compiled code by stage ("ttir", "ptx", "cubin", ...), and what its launch needs."""

    asm: dict
    shared: int
    warps: int


def compile_build(build, architecture):
    """The `Compiled` form of a build for compute capability `architecture`: 80, 90 or 100."""
    options = {name: value for name, value in build.constants if name in OPTIONS}
    kernel = triton.compile(_source(build), target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(dict(kernel.asm), kernel.metadata.shared, kernel.metadata.num_warps)


def _message(section, table, maps, vectors, source, target):
    """A message with its edge update, as `mnist_cls/scalegmn` has them."""
    e = section.load(table())
    m = section.load_mul(section.linear(e, maps()), table(), source)
    h = section.symmetrize(section.linear(m, maps()), vectors(), vectors(), vectors(), "silu", 1.0)
    h = section.norm_act(section.linear(h, maps(), vectors()), vectors(), vectors(), "silu", 1.0)
    section.add_up(section.mul(section.linear(m, maps()), section.linear(h, maps(), vectors())))
    ends = section.load_add(section.load(table(), source), table(), target)
    gate = section.linear(section.norm_act(ends, vectors(), vectors(), "silu", 1.0), maps(), vectors())
    section.write(section.mul(section.linear(e, maps()), gate))


def _attention(section, table, maps, vectors, source, target):
    """An edge update and the attention that reads it, of 8 heads, as NG-T has them."""

    def normed(x, y):
        return section.norm_act(section.add(x, y), vectors(), vectors(), "identity", 1.0)

    e = section.load(table())
    h = section.linear(section.concat(e, section.load(table(), target)), torch.cat([maps(), maps()], dim=1), vectors())
    h = section.load_add(section.load_add(h, table(), source), table(), target)
    e = normed(section.linear(section.norm_act(h, None, None, "gelu", 1.0), maps(), vectors()), e)
    h = section.linear(section.norm_act(section.linear(e, maps()), None, None, "gelu", 1.0), maps(), vectors())
    e = normed(e, h)
    section.write(e)
    query, key, shift, scale = (section.linear(e, maps()) for _ in range(4))
    value = section.add(section.load_mul(scale, table(), target), shift)
    query, key = section.load_add(query, table(), source), section.load_add(key, table(), target)
    section.attend(value, section.head_dot(query, key, 8, 0.25))


def _statistics(section, table, maps, vectors, source, target):
    """An edge update and the statistics of messages that its edges modulate, as NG-GNN has them."""
    e = section.load(table())
    h = section.load_add(section.load_add(section.linear(e, maps(), vectors()), table(), source), table(), target)
    e = section.linear(section.norm_act(h, None, None, "silu", 1.0), maps(), vectors())
    section.write(e)
    h = section.load_add(section.load(table(), target), table(), source)
    h = section.linear(section.norm_act(h, None, None, "relu", 1.0), maps(), vectors())
    scale, shift = section.linear(e, maps(), vectors()), section.linear(e, maps(), vectors())
    section.summarize(section.add(section.mul(scale, h), shift))


ROW_PROGRAMS = {"message": _message, "attention": _attention, "statistics": _statistics}


def row_section(name, direction, width, dtype, precision, architecture):
    """The `row_program.Section` of one of `ROW_PROGRAMS`, as it runs on an architecture.

    direction: "forward" or "backward"; dtype: torch.float32 or torch.bfloat16, of tables and weights; precision: of
    float32 products.
    """
    matrix = torch.empty(width, width, dtype=dtype)
    vector = torch.empty(width)
    source, target = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    table, maps, vectors = (lambda: matrix[:1].clone()), (lambda: matrix.clone()), (lambda: vector.clone())
    program = RowProgram()
    ROW_PROGRAMS[name](program.section(1), table, maps, vectors, source, target)
    tensors, indices, bounds, code, constants, *_ = program.arguments(torch.tensor([0, 1]))
    wanted = None if direction == "forward" else [True] * len(tensors)
    return row_program.plan_of(tensors, indices, bounds, code, constants, wanted, precision, architecture)[0]


def compile_section(section, architecture):
    """The `Compiled` forms of a section's kernels, in the order in which they run."""
    signature = dict(section.source.arguments)
    pointers = [k for k, (_, dtype) in enumerate(section.source.arguments) if dtype.startswith("*")]
    attributes = {(k,): [["tt.divisibility", 16]] for k in pointers}
    options = row_program.options(section)
    found = []
    for function in row_source.compiled(section.source):
        source = ASTSource(function, signature, {}, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        found.append(Compiled(dict(kernel.asm), kernel.metadata.shared, kernel.metadata.num_warps))
    return found


def compile_merge(reduction, architecture):
    """The `Compiled` form of the kernel that merges parts of a reduction, at width 128, of 8 heads."""
    kernel, names = row_program.MERGES[reduction]
    constants = row_program.merge_constants(128, 8 if reduction == "attention" else 0, tl.float32)
    options = {name: constants.pop(name) for name in OPTIONS}
    types = {"holds": "*i64", "partial_rows": "*i32", "extremes": "*i32"}
    signature = {name: types.get(name, "*fp32") for name in names}
    attributes = {(k,): [["tt.divisibility", 16]] for k in range(len(names))}
    signature |= {"tiles": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return Compiled(dict(kernel.asm), kernel.metadata.shared, kernel.metadata.num_warps)


def row_usage(case, architecture):
    """Of `row_section(*case, architecture)`: its tile, the `Usage` of each of its kernels, the sum of `issue_slots`."""
    section = row_section(*case, architecture)
    kernels = compile_section(section, architecture)
    slots = sum(issue_slots(kernel, section.tile.rows) for kernel in kernels)
    return section.tile, [usage(kernel) for kernel in kernels], slots


def _from_scratch(folder):
    """What a compiling process starts with: a cache of its own, and no line numbers in the code."""
    triton.knobs.cache.dir = folder
    triton.knobs.compilation.disable_line_info = True


def compile_all(builds, jobs, function=compile_build):
    """{(build, architecture): function(build, architecture)} for all architectures, from scratch, in `jobs` processes.

    Not in threads: Triton parses source text, and CPython 3.11's parser counts its recursion for all threads together.
    """
    pairs = list(itertools.product(builds, ARCHITECTURES))
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(jobs, spawn, _from_scratch, (folder,)) as pool,
    ):
        chunk = 4 if function is compile_build else 1
        return dict(zip(pairs, pool.map(function, *zip(*pairs, strict=True), chunksize=chunk), strict=True))


def _tool(path, option, compiled):
    """What a program that comes with Triton says of a compiled kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], check=True, capture_output=True, text=True).stdout


def usage(compiled):
    """The `Usage` of a compiled kernel, read from its machine code."""
    listing = _tool(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", compiled)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], compiled.shared, compiled.warps)


def issue_slots(compiled, rows):
    """Cycles per row in which the four schedulers of a multiprocessor do nothing but issue a kernel's instructions.

    rows: of a program. Of loops, which are those over the segments of a tile, one turn is counted.
    """
    listing = _tool(triton.knobs.nvidia.nvdisasm.path, "--print-code", compiled)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", listing, re.MULTILINE)
    return len(instructions) * compiled.warps / 4 / rows
