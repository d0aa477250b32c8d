"""Every launch configuration compiled for every architecture, from scratch, without a GPU."""

import itertools
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from scalegmn_fast.kernels import compile as aot  # noqa: E402
from scalegmn_fast.kernels import row_program, segment_reduce, symmetrize  # noqa: E402

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
    sections = [aot.row_section(*case, 64, torch.bfloat16, "ieee") for case in cases]
    return [kernel for section in sections for kernel in aot.compile_section(section, 90)]


def test_row_programs_fit_into_shared_memory_and_hardly_spill(row_kernels):
    for kernel in row_kernels:
        used = aot.usage(kernel)
        assert used.spills <= 64 and used.shared <= aot.SHARED_MEMORY[90]


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
        assert "arith.trunci" not in ttir
        ranges = set(re.findall(r"(%\S+) = tt\.make_range", ttir))
        places = {name for name, of in re.findall(r"(%\S+) = tt\.expand_dims (%\S+) ", ttir) if of in ranges}
        small = re.findall(r"arith\.muli (%[^,]+), .* : tensor<[\dx]+xi32>", ttir)
        assert set(small) <= places


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
