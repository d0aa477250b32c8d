"""Every launch configuration compiled for every architecture, from scratch, without a GPU."""

import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from scalegmn_fast.kernels import compile as aot  # noqa: E402
from scalegmn_fast.kernels import row_program, segment_reduce, symmetrize  # noqa: E402

from scalegmn_fast.ops.row_program import RowProgram  # noqa: E402
from scalegmn_fast.reference.row_program import OPERATIONS, sections  # noqa: E402

# The fixture that compiles counts towards the first test that uses it.
pytestmark = pytest.mark.timeout(600)

CONFIGURATIONS = list(aot.configurations())
PAGE = Path(__file__).parents[2] / "docs" / "kernels-aot.md"


@pytest.fixture(scope="module")
def compiled():
    return aot.compile_all(CONFIGURATIONS, jobs=2)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("build", CONFIGURATIONS, ids=lambda build: build.name)
def test_fits_into_shared_memory_and_does_not_spill(build, architecture, compiled):
    used = aot.usage(compiled[build, architecture])
    assert used.spills == 0
    assert used.shared <= aot.SHARED_MEMORY[architecture]
    assert used.registers * used.warps * 32 <= 65536


def test_every_kernel_is_a_configuration():
    kernels = {
        name
        for module in (symmetrize, segment_reduce)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "params")
    }
    assert {build.kernel for build in CONFIGURATIONS} == kernels


@pytest.mark.parametrize(
    "tile,widths,kernels",
    [
        (symmetrize.row_tile, range(1, symmetrize.MAX_WIDTH + 1), r"(activation|normalize)_\w+_kernel"),
        (segment_reduce.segment_tile, range(1, 2000), r"(segments|chunks|merge|backward)_kernel"),
    ],
    ids=["rows", "segments"],
)
def test_every_tile_that_a_launcher_chooses_is_a_configuration(tile, widths, kernels):
    chosen = {frozenset(tile(width).items()) for width in widths}
    names = tile(1).keys()
    built = {}
    for build in CONFIGURATIONS:
        if re.fullmatch(kernels, build.kernel):
            constants = dict(build.constants)
            built.setdefault(build.kernel, set()).add(frozenset((name, constants[name]) for name in names))
    assert len(built) == 4
    for kernel, tiles in built.items():
        assert tiles == chosen, kernel


def test_the_page_in_docs_lists_every_build():
    """Written by `python -m scalegmn_fast.kernels.report --output docs/kernels-aot.md`."""
    listed = {tuple(cell.strip() for cell in line.split("|")[1:6]) for line in PAGE.read_text().splitlines()}
    for build in itertools.chain(CONFIGURATIONS, aot.variants()):
        kernel = build.kernel.removesuffix("_kernel")
        alignment = "aligned" if build.aligned else "unaligned"
        assert (kernel, build.variant, str(build.cols), build.dtype, alignment) in listed


@pytest.fixture(scope="module")
def row_kernels():
    """The kernels of the programs of the report at width 64 in bfloat16, forward and backward, for sm_90."""
    cases = itertools.product(aot.ROW_PROGRAMS, ("forward", "backward"))
    sections = [aot.row_section(*case, 64, torch.bfloat16, "ieee", 90) for case in cases]
    return [kernel for section in sections for kernel in aot.compile_section(section, 90)]


def test_row_programs_fit_into_shared_memory_and_hardly_spill(row_kernels):
    for kernel in row_kernels:
        used = aot.usage(kernel)
        assert used.spills <= 64 and used.shared <= aot.SHARED_MEMORY[90]


@pytest.mark.parametrize("name,slots", [("message", 1100), ("statistics", 730)])
def test_exact_derivatives_of_narrow_rows_hardly_spill(name, slots):
    """In tiles of twice the rows and warps ptxas gives up: 32 registers, more than 5 KB per thread in most kernels."""
    _, used, issued = aot.row_usage((name, "backward", 64, torch.float32, "ieee"), 90)
    assert max(kernel.spills for kernel in used) <= 32 and min(kernel.registers for kernel in used) > 32
    assert issued <= slots


@pytest.mark.parametrize(
    "direction,dtype,precision,architecture,spills,slots",
    [
        ("forward", torch.bfloat16, "ieee", 80, 64, 145),
        ("backward", torch.bfloat16, "ieee", 80, 64, 700),
        ("forward", torch.float32, "tf32", 80, 1024, 200),
        ("backward", torch.float32, "tf32", 80, 1088, 860),
        ("forward", torch.float32, "ieee", 80, 256, 1400),
        ("forward", torch.bfloat16, "ieee", 90, 32, 105),
        ("backward", torch.bfloat16, "ieee", 90, 1024, 480),
        ("forward", torch.float32, "tf32", 90, 512, 130),
        ("backward", torch.float32, "tf32", 90, 1024, 580),
        ("forward", torch.bfloat16, "ieee", 100, 32, 130),
        ("forward", torch.float32, "tf32", 100, 512, 150),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_the_widest_published_message_takes_few_instructions(direction, dtype, precision, architecture, spills, slots):
    """On Hopper its forward took 207 (bfloat16) and 287 (TF32) cycles per row for them in eight warps of fewer rows."""
    _, used, issued = aot.row_usage(("message", direction, 128, dtype, precision), architecture)
    assert max(kernel.spills for kernel in used) <= spills
    assert max(kernel.shared for kernel in used) <= aot.SHARED_MEMORY[architecture]
    assert issued <= slots


@pytest.mark.parametrize("dtype,architecture", [(torch.float32, 80), (torch.float32, 90), (torch.bfloat16, 90)])
def test_rows_of_256_columns_compile_to_code_that_uses_all_registers(dtype, architecture):
    """ptxas gives up on some tiles: then everything is in local memory."""
    _, (used,), _ = aot.row_usage(("message", "forward", 256, dtype, "tf32"), architecture)
    assert used.registers > 128 and used.shared <= aot.SHARED_MEMORY[architecture]


def test_rows_of_a_tile_can_be_pinned(monkeypatch):
    monkeypatch.setenv(row_program.ROWS, "128")
    assert aot.row_section("message", "forward", 32, torch.float32, "tf32", 90).tile.rows == 128
    monkeypatch.setenv(row_program.ROWS, "48")
    with pytest.raises(ValueError, match=f"{row_program.ROWS}: expected 16, 32, 64 or 128, got '48'"):
        row_program.pinned_tile()


def every_operation(width, dtype):
    """Arguments of a program with every operation."""
    table, index = torch.empty(3, width, dtype=dtype), torch.empty(3, dtype=torch.int64)
    weight, vector, factors = torch.empty(width, width, dtype=dtype), torch.empty(width), torch.empty(3, 1)
    program = RowProgram()
    s = program.section(3)
    x = s.add_vector(s.load_mul(s.load(table), table, index), vector)
    x = s.scale(s.normalize(s.negate(x), 1e-10), factors, index.int())
    x = s.mul(s.abs(x), s.symmetrize(x, vector, vector, vector, "sine", 30.0))
    x = s.norm_act(s.linear(x, weight), vector, vector, "gelu", 1.0)
    x = s.dropout(s.load_add(x, table, index), 0.25)
    joined = s.concat(s.linear(x, weight, vector), x)
    x = s.add(s.linear(joined, torch.empty(width, 2 * width, dtype=dtype)), x)
    s.write(x)
    s.attend(x, s.head_dot(x, x, 1, 0.5))
    return program.arguments(torch.tensor([0, 3]))


@pytest.mark.parametrize(
    "width,dtype,architecture,backward",
    [(33, torch.float32, 80, True), (130, torch.float16, 90, False), (16, torch.bfloat16, 100, True)],
)
def test_every_operation_compiles(width, dtype, architecture, backward):
    """Triton's interpreter accepts more than its compiler does: types, shapes of products, what is known when."""
    tensors, indices, bounds, code, constants, *_ = every_operation(width, dtype)
    assert {step.op for section in sections(bounds, code, constants) for step in section.steps} == set(OPERATIONS)
    for wanted in (None, [True] * len(tensors)) if backward else (None,):
        (section,) = row_program.plan_of(tensors, indices, bounds, code, constants, wanted, "tf32x3", architecture)
        for kernel in aot.compile_section(section, architecture):
            assert aot.usage(kernel).shared <= aot.SHARED_MEMORY[architecture]


@pytest.mark.parametrize("reduction", list(row_program.MERGES))
def test_kernels_that_merge_parts_do_not_spill(reduction):
    for architecture in aot.ARCHITECTURES:
        used = aot.usage(aot.compile_merge(reduction, architecture))
        assert used.spills == 0 and used.shared <= aot.SHARED_MEMORY[architecture]


def test_row_offsets_of_row_programs_are_64_bit(row_kernels):
    """Rows' numbers are multiplied by a width as 64-bit numbers; 32-bit products are of places in a tile or weight."""
    assert any(re.search(r"arith\.muli .* : tensor<\d+x1xi64>", kernel.asm["ttir"]) for kernel in row_kernels)
    for kernel in row_kernels:
        ttir = kernel.asm["ttir"]
        for name in re.findall(r"(%\S+) = arith\.trunci", ttir):  # the rows of extremes are kept in 32 bits
            assert not re.search(rf"(?:addptr|muli|addi) [^:]*{name}\b", ttir)
        ranges = set(re.findall(r"(%\S+) = tt\.make_range", ttir))
        places = {name for name, of in re.findall(r"(%\S+) = tt\.expand_dims (%\S+) ", ttir) if of in ranges}
        small = re.findall(r"arith\.muli (%[^,]+), .* : tensor<[\dx]+xi32>", ttir)
        assert set(small) <= places


def read_after_written(ttir):
    """Pointers that a kernel reads after it wrote there, with no barrier between: another thread may have written."""
    written, found = set(), []
    for line in ttir.splitlines():
        if "barrier" in line.split("loc(")[0]:
            written.clear()
        elif stored := re.search(r"tt\.store (%\w+)", line):
            written.add(stored[1])
        elif (loaded := re.search(r"tt\.load (%\w+)", line)) and loaded[1] in written:
            found.append(loaded[1])
    return found


def test_what_a_row_program_reads_again_is_behind_a_barrier(row_kernels):
    """Triton's interpreter runs one thread. Gradients of a norm that is read twice are added up in one kernel."""
    again = 0
    for kernel in row_kernels:
        assert read_after_written(kernel.asm["ttir"]) == []
        again += len(read_after_written(kernel.asm["ttir"].replace("barrier", "")))
    assert again > 0


ROW_KERNELS = [b for b in CONFIGURATIONS if b.cols == 128 and b.kernel != "merge_kernel"]


@pytest.mark.parametrize("build", ROW_KERNELS, ids=lambda build: build.name)
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(build, compiled):
    for architecture in aot.ARCHITECTURES:
        ptx = compiled[build, architecture].asm["ptx"]
        assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)
        # Parts of long segments are one row wide: too few elements for every thread to write 16 bytes.
        assert re.search(r"st\.global[.\w]*\.v4\.b32", ptx) or build.kernel == "chunks_kernel"


@pytest.mark.parametrize("build", ROW_KERNELS, ids=lambda build: build.name)
def test_row_offsets_are_64_bit(build, compiled):
    """Rows' numbers, tiles [n, 1], are multiplied by the width and added to pointers as 64-bit numbers only."""
    ttir = compiled[build, 90].asm["ttir"]
    products = re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", ttir)
    offsets = re.findall(r"tt\.addptr .*, tensor<\d+x1x(i\d+)>", ttir)
    assert products and set(products) == {"i64"}
    assert set(offsets) <= {"i64"}
