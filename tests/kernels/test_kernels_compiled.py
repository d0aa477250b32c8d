"""Every launch configuration compiled for every architecture, from scratch, without a GPU."""

import itertools
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from scalegmn_fast.kernels import compile as aot  # noqa: E402
from scalegmn_fast.kernels import report, symmetrize  # noqa: E402
from scalegmn_fast.kernels import segment_reduce as segments  # noqa: E402

# The fixture that compiles counts towards the first test that uses it.
pytestmark = pytest.mark.timeout(600)

CONFIGURATIONS = list(aot.configurations())
PAGE = Path(__file__).parents[2] / "docs" / "kernels-aot.md"


@pytest.fixture(scope="module")
def usages():
    return report.compile_all(CONFIGURATIONS, jobs=2)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
@pytest.mark.parametrize("build", CONFIGURATIONS, ids=lambda build: build.name)
def test_fits_into_shared_memory_and_does_not_spill(build, architecture, usages):
    used = usages[build, architecture]
    assert used.spills == 0
    assert used.shared <= aot.SHARED_MEMORY[architecture]
    assert used.registers * used.warps * 32 <= 65536


def kernels_of(module):
    return {name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "params")}


def test_every_kernel_and_every_tile_of_the_launchers_is_a_configuration():
    assert {build.kernel for build in CONFIGURATIONS} == kernels_of(symmetrize) | kernels_of(segments)
    for tile, widths, kernels in (
        (symmetrize.row_tile, range(1, symmetrize.MAX_WIDTH + 1), ("activation", "normalize")),
        (segments.segment_tile, range(1, 2000), ("segments", "chunks", "merge", "backward")),
    ):
        tiles = {tuple(sorted(tile(width).items())) for width in widths}
        for kernel in kernels:
            names = next(iter(tiles))
            for direction in {b.kernel for b in CONFIGURATIONS if b.kernel.startswith(f"{kernel}_")}:
                built = [dict(b.constants) for b in CONFIGURATIONS if b.kernel == direction]
                assert {tuple((name, b[name]) for name, _ in names) for b in built} == tiles, direction


def test_the_page_in_docs_lists_every_build():
    rows = [line.split(" | ")[:5] for line in PAGE.read_text().splitlines() if re.match(r"\| \w", line)]
    listed = {tuple(cell.strip("| ") for cell in row) for row in rows}
    for build in itertools.chain(CONFIGURATIONS, aot.variants()):
        kernel = build.kernel.removesuffix("_kernel")
        alignment = "aligned" if build.aligned else "unaligned"
        assert (kernel, build.variant, str(build.cols), build.dtype, alignment) in listed, build.name


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """One build of each kernel that reads rows, at 128 columns, for sm_90."""
    with aot.triton.knobs.cache.scope():
        aot.triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        builds = [b for b in CONFIGURATIONS if b.cols == 128 and b.kernel != "merge_kernel"]
        return {build.kernel: aot.compile_build(build, 90) for build in builds}


WIDE = sorted({b.kernel for b in CONFIGURATIONS if b.cols == 128 and b.kernel != "merge_kernel"})


@pytest.mark.parametrize("kernel", WIDE)
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(kernel, wide):
    ptx = wide[kernel].asm["ptx"]
    assert re.search(r"ld\.global[.\w]*\.v4\.b32", ptx)
    assert re.search(r"st\.global[.\w]*\.v4\.b32", ptx) or kernel == "chunks_kernel"


@pytest.mark.parametrize("kernel", WIDE)
def test_row_offsets_are_64_bit(kernel, wide):
    """Offsets of rows, tiles [n, 1], are never 32-bit numbers, which a large tensor overflows."""
    ttir = wide[kernel].asm["ttir"]
    offsets = re.findall(r"tt\.addptr .*tensor<(\d+)x(\d+)x!tt\.ptr<\w+>>, tensor<\1x\2x(i\d+)>", ttir)
    rows = [bits for _, cols, bits in offsets if cols == "1"]
    multiplied = re.findall(r"arith\.muli .* : tensor<\d+x1x(i\d+)>", ttir)
    assert offsets and set(rows) <= {"i64"}
    assert multiplied and set(multiplied) == {"i64"}
