"""Statistics in Triton's row programs, forward and backward, against the reference in float64."""

import pytest
import torch
from scalegmn_fast.kernels import row_program as kernels
from test_kernels_row_program import REFERENCE, TRITON, assert_as_reference, cast, results

from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.testing import relative_error

NODES = 7
REDUCTIONS = ("statistics",)
SEGMENTS = {
    "no rows": [0, 0, 0],
    "one row": [1],
    "one huge among many tiny": [0, 3, 1, 0, 90, 2, 33, 1, 0],
    "more tiles than lanes": [550, 40],
    "ends on tiles": [32, 32, 64],
    "all of one row": [1] * 70,
}
WIDTHS = (1, 33, 130)


def program(reduction, lengths, width, dtype, device, offset=0.0):
    """Arguments of a program of two sections, cut at a segment's end, the first of which writes rows too."""
    rows = sum(lengths)
    ptr = torch.tensor([0, *lengths], device=device).cumsum(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)

    e, x, bias = draw(rows, width) + offset, draw(NODES, width), draw(width)
    maps = [draw(width, width, scale=width**-0.5) for _ in range(2)]
    index = torch.randint(NODES, (rows,)).to(device)
    cut = int(ptr[len(lengths) // 2])
    run = RowProgram()
    for number, count in enumerate((cut, rows - cut)):
        s = run.section(count)
        loaded = s.load(e)
        s.summarize(s.load_add(s.linear(loaded, maps[0], bias) if number else loaded, x, index))
        if number == 0:
            s.write(s.norm_act(s.linear(loaded, maps[1], bias), None, None, "gelu", 1.0))
    return list(run.arguments(ptr))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_reduced_segments(reduction, lengths, device):
    assert_as_reference(program(reduction, lengths, 6, torch.float64, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_reduced_widths(reduction, width, device):
    assert_as_reference(program(reduction, [3, 0, 40], width, torch.float64, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_in_low_precision(reduction, dtype, device):
    assert_as_reference(program(reduction, [4, 0, 21, 40, 1], 32, dtype, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_give_twice_the_same_bits_in_several_launches(reduction, device, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    arguments = program(reduction, [3, 100, 3], 6, torch.float32, device)
    for first, second in zip(results(TRITON, arguments), results(TRITON, arguments), strict=True):
        assert torch.equal(first, second)


def statistics(x, ptr):
    run = RowProgram()
    section = run.section(x.shape[0])
    section.summarize(section.load(x))
    return run.arguments(ptr)


def test_what_statistics_keep(device):
    """The first row of a segment, the mean of the differences to it, and the rows of the extremes."""
    x, ptr = torch.randn(150, 5, device=device), torch.tensor([0, 0, 3, 140, 150, 150], device=device)
    _, _, kept, extremes = kernels.row_program(*statistics(x, ptr))
    assert kept.shape == extremes.shape == (5, 10) and extremes.dtype == torch.int32
    for segment, (begin, end) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        first, offset = kept[segment].chunk(2)
        rows = extremes[segment].chunk(2)
        if begin == end:
            assert not kept[segment].any() and not extremes[segment].any()
            continue
        assert torch.equal(first, x[begin])
        torch.testing.assert_close(offset, (x[begin:end] - first).mean(0))
        for found, expected in zip(rows, (x[begin:end].argmin(0), x[begin:end].argmax(0)), strict=True):
            assert torch.equal(found.long(), begin + expected)


def test_statistics_far_from_zero(device):
    """Spread 1 around 1000: variance and its gradient keep the precision of the deviations."""
    arguments = program("statistics", [3, 70], 5, torch.float32, device, offset=1000.0)
    found, expected = results(TRITON, arguments), results(REFERENCE, cast(arguments, torch.float64))
    assert relative_error(found[0][:, 5:10], expected[0][:, 5:10]) < 1e-3
    assert relative_error(found[2], expected[2]) < 1e-3


def test_ties_and_nans_of_extremes(device):
    """The gradient goes to the first row that has the extreme, in the first tile that has it; NaN is both extremes."""
    x = torch.tensor([2.0, 1.0] * 40 + [3.0] * 40, device=device)[:, None].repeat(1, 2)
    x[90, 1] = float("nan")
    arguments = statistics(x, torch.tensor([0, 80, 120], device=device))
    reduced, rows, kept, extremes = kernels.row_program(*arguments)
    assert reduced[0, ::2].tolist() == [1.5, 0.25, 1.0, 2.0] and reduced[1, ::2].tolist() == [3.0, 0.0, 3.0, 3.0]
    assert reduced[1, 1::2].isnan().all() and extremes.tolist() == [[1, 1, 0, 0], [80, 90, 80, 90]]
    cotangent = torch.zeros_like(reduced)
    cotangent[0, 4:] = cotangent[1, [4, 6]] = 1.0
    (grad,) = kernels.row_program_backward(cotangent, rows, reduced, kept, extremes, *arguments, [True])
    assert grad[:, 0].nonzero().flatten().tolist() == [0, 1, 80] and grad[[0, 1, 80], 0].tolist() == [1.0, 1.0, 2.0]
