"""Tuned tiles of row programs: which are tried, what is left out, what is kept. Launches and times are stand-ins."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from scalegmn_fast.kernels import row_program, tuning  # noqa: E402
from scalegmn_fast.kernels.launching import compile_ahead  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from triton.runtime.jit import KernelInterface  # noqa: E402

from scalegmn_fast import backend  # noqa: E402
from scalegmn_fast.ops.row_program import RowProgram  # noqa: E402
from scalegmn_fast.reference import row_program as reference  # noqa: E402
from scalegmn_fast.testing import assert_close_to_float64  # noqa: E402

Tile = row_program.Tile
OPERATIONS = torch.ops.scalegmn_fast.row_program, torch.ops.scalegmn_fast.row_program_backward
SECTIONS = (1000, 300)
WIDTH = 16


def program(device, rows=SECTIONS):
    """A program of two sections, of which only the second has a norm."""
    weight, vector = torch.randn(WIDTH, WIDTH, device=device), torch.randn(WIDTH, device=device)
    table = torch.randn(sum(rows), WIDTH, device=device)
    run = RowProgram()
    for norm, count in enumerate(rows):
        section = run.section(count)
        value = section.linear(section.load(table), weight, vector)
        section.add_up(section.norm_act(value, *((vector, vector) if norm else (None, None)), "silu", 1.0))
        section.write(value)
    return run.arguments(torch.tensor([0, 5, sum(rows)], device=device))


def step(arguments, forward=row_program.row_program, backward=row_program.row_program_backward):
    """Results and gradients."""
    reduced, rows, *kept = forward(*arguments)
    grads = torch.ones_like(reduced), torch.ones_like(rows)
    found = backward(*grads, reduced, *kept, *arguments, [True] * len(arguments[0]))
    return [reduced, rows, *found]


class Machine:
    """Stands for a GPU. A launch is (kernel's name, blocks, warps); `time` says how long so many blocks take."""

    def __init__(self):
        self.launched, self.timed = [], 0

    def launcher(self, kernel, grid):
        def launch(*arguments, num_warps, **options):
            self.launched.append((kernel.fn.__name__, grid[0], num_warps))
            return SimpleNamespace(n_spills=0)

        return launch

    def time(self, blocks):
        return blocks

    def milliseconds(self, call):
        self.timed += 1
        self.launched.clear()
        call()
        _, blocks, _ = self.launched[0]
        return self.time(blocks)

    def blocks(self, name, arguments):
        """Those of a kernel in each section of a step."""
        self.launched.clear()
        shapes = [result.shape for result in step(arguments)]
        assert shapes == [(2, WIDTH), (sum(SECTIONS), WIDTH), *(tensor.shape for tensor in arguments[0])]
        return [(blocks, warps) for kernel, blocks, warps in self.launched if kernel == name]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    found = Machine()
    monkeypatch.setenv(tuning.TUNE, "1")
    monkeypatch.setenv(row_program.PRECISION, "tf32")  # the table's tile is 64 x 4 in both directions
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: found.launcher(kernel, grid))
    monkeypatch.setattr(tuning, "milliseconds", found.milliseconds)
    monkeypatch.setattr(tuning, "possible", lambda device: True)
    monkeypatch.setattr(tuning, "_chosen", {})
    return found


def files(folder):
    return sorted(folder.rglob(tuning.FILE))


@pytest.mark.parametrize(
    ("tile", "others"),
    [
        ((64, 8), [(128, 8), (32, 4)]),
        ((64, 4), [(128, 8), (32, 4)]),
        ((16, 8), [(32, 8), (16, 4)]),
        ((128, 8), [(64, 4)]),
    ],
)
def test_tiles_of_twice_and_half_the_rows_are_tried(tile, others):
    assert tuning.candidates(Tile(*tile)) == (tile, *others)


@pytest.mark.parametrize(
    ("spilled", "expected", "timed"),
    [
        ([0, 0, 0], 2, 3),
        ([0, 0, 4100], 1, 2),
        ([0, 4100, 4096], 2, 2),
        ([4100, 5000, 6000], 2, 3),
        ([0, None, None], 0, 0),
        ([None, 4100, None], 1, 0),
        ([None, None, None], 0, 0),
    ],
)
def test_tiles_that_do_not_fit_or_spill_are_left_out(spilled, expected, timed, monkeypatch):
    """The later tiles are the faster ones. None: more shared memory than the device has."""
    calls = []

    def run(tile):
        if spilled[tile] is None:
            raise triton.OutOfResources(1, 0, "shared memory")
        calls.append(tile)
        return [SimpleNamespace(n_spills=0), SimpleNamespace(n_spills=spilled[tile] // 4)]

    def milliseconds(call):
        calls.clear()
        call()
        times.append(-calls[0])
        return times[-1]

    times = []
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    assert tuning.fastest((0, 1, 2), run) == expected
    assert len(times) == timed


@pytest.mark.parametrize(("sign", "expected"), [(1, [(8, 8), (3, 8)]), (-1, [(32, 4), (10, 4)])])
@pytest.mark.parametrize("kernel", ["forward_kernel", "stage0_kernel"])
def test_sections_run_in_their_fastest_tile(kernel, sign, expected, machine):
    """128 rows or 32, where the table says 64. Measured in the first call alone."""
    machine.time = lambda blocks: sign * blocks
    step(program("meta"))
    assert machine.timed == 2 * 2 * 3
    assert machine.blocks(kernel, program("meta")) == expected
    assert machine.timed == 2 * 2 * 3


def test_every_tile_that_would_be_tried_is_compiled_ahead(machine, monkeypatch):
    """Those of 64, 128 and 32 rows, of 1000 rows and of 300."""
    compiled = []

    def warmup(kernel, *arguments, grid, num_warps, **options):
        compiled.append((kernel.fn.__name__, grid[0], num_warps))

    monkeypatch.setattr(KernelInterface, "warmup", warmup)
    with compile_ahead(1):
        step(program("meta"))
    assert machine.timed == 0 and machine.launched == [] and tuning._chosen == {}
    forward = {(blocks, warps) for kernel, blocks, warps in compiled if kernel == "forward_kernel"}
    assert forward == {(16, 4), (8, 8), (32, 4), (5, 4), (3, 8), (10, 4)}
    step(program("meta"))
    assert machine.timed == 12 and set(machine.launched) <= set(compiled)


def test_a_tuned_call_launches_what_it_needs(machine):
    """Nothing is run twice once the tiles are known: not in a call of other rows in the same bucket either."""
    step(program("meta"))
    machine.launched.clear()
    step(program("meta", (999, 290)))
    tuned = list(machine.launched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(row_program.ROWS, "128")
        machine.launched.clear()
        step(program("meta", (999, 290)))
    assert tuned == machine.launched
    assert machine.timed == 12
    step(program("meta", (2000, 290)))
    assert machine.timed == 12 + 6


def test_a_choice_is_a_file_in_triton_s_cache(machine, tmp_path):
    step(program("meta"))
    assert len(files(tmp_path)) == 4
    assert all('"rows": 128, "warps": 8' in path.read_text() for path in files(tmp_path))
    files(tmp_path)[0].write_text('{"rows": 32, "warps": 4}')  # what another run could have chosen
    tuning._chosen.clear()
    step(program("meta"))
    assert machine.timed == 12
    assert sorted(section.tile.rows for section in tuning._chosen.values()) == [32, 128, 128, 128]


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "{}", '{"rows": 48, "warps": 8}', '{"rows": 64, "warps": "8"}', "\xff"]
)
def test_a_file_that_is_not_ours_is_written_again(text, machine, tmp_path):
    step(program("meta"))
    path = files(tmp_path)[0]
    path.write_bytes(text.encode("latin-1"))
    tuning._chosen.clear()
    with pytest.warns(UserWarning, match="names no tile of this row program"):
        step(program("meta"))
    assert machine.timed == 12 + 3
    assert path.read_text() == '{"rows": 128, "warps": 8}'


def test_the_table_s_tiles_while_nothing_can_be_timed(machine, tmp_path, monkeypatch):
    """And they are not kept: a call that can be timed is; a later one that cannot takes what that chose."""
    arguments = program("meta")
    monkeypatch.setattr(tuning, "possible", lambda device: False)
    assert machine.blocks("forward_kernel", arguments) == [(16, 4), (5, 4)]
    assert machine.timed == 0 and files(tmp_path) == []
    monkeypatch.setattr(tuning, "possible", lambda device: True)
    step(arguments)
    monkeypatch.setattr(tuning, "possible", lambda device: False)
    assert machine.blocks("forward_kernel", arguments) == [(8, 8), (3, 8)]


@pytest.mark.parametrize(
    ("capturing", "compiling", "device", "expected"),
    [(0, 0, "cuda", True), (1, 0, "cuda", False), (0, 1, "cuda", False), (0, 0, "cpu", False), (0, 0, "meta", False)],
)
def test_when_kernels_can_be_timed(capturing, compiling, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: bool(compiling))
    assert tuning.possible(torch.device(device)) == expected


def test_fake_tensors_are_not_timed(machine):
    with FakeTensorMode(), backend("triton"):
        assert [result.shape for result in step(program("cuda"), *OPERATIONS)[:2]] == [(2, WIDTH), (1300, WIDTH)]
    assert machine.launched == []


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (tuning.TUNE, "0", [(16, 4), (5, 4)]),
        (tuning.TUNE, "", [(16, 4), (5, 4)]),
        (row_program.ROWS, "64", [(16, 4), (5, 4)]),
        (row_program.ROWS, "128", [(8, 8), (3, 8)]),
    ],
)
def test_nothing_is_timed_unless_asked_for_or_where_rows_are_pinned(
    name, value, expected, machine, tmp_path, monkeypatch
):
    monkeypatch.setenv(name, value)
    assert machine.blocks("forward_kernel", program("meta")) == expected
    assert machine.timed == 0 and files(tmp_path) == []


def test_a_setting_that_is_neither(monkeypatch):
    monkeypatch.setenv(tuning.TUNE, "yes")
    with pytest.raises(ValueError, match=f"{tuning.TUNE}: expected 0 or 1, got 'yes'"):
        tuning.asked()


@pytest.mark.gpu
def test_tuned_on_a_gpu(monkeypatch, tmp_path):
    """As near to float64 as untuned, with the same bits in every call once a tile is chosen."""
    arguments = program("cuda", (20000, 3000))
    plain = step(arguments)
    exact = [[tensor.double() for tensor in arguments[0]], *arguments[1:]]
    exact = step(exact, reference.row_program_forward, reference.row_program_backward)
    monkeypatch.setenv(tuning.TUNE, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    first = step(arguments)
    assert len(files(tmp_path)) == 4
    tuning._chosen.clear()
    again = step(arguments)
    for a, b, p, e in zip(first, again, plain, exact, strict=True):
        assert torch.equal(a, b)
        assert_close_to_float64(a, p, e, factor=8, ulps=256)
