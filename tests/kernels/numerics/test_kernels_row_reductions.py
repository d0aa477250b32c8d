"""Statistics and attention in Triton's row programs, forward and backward, against the reference in float64."""

import pytest
import torch
from scalegmn_fast.kernels import row_program as kernels
from test_kernels_row_program import (
    LAYOUT,
    REFERENCE,
    TRITON,
    assert_as_reference,
    assert_model_as_reference,
    cast,
    results,
)

from scalegmn_fast import backend
from scalegmn_fast.models import from_config, neural_graphs_config
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.testing import nan_poisoned, relative_error

NODES = 7
REDUCTIONS = ("statistics", "attention")
SEGMENTS = {
    "no rows": [0, 0, 0],
    "one row": [1],
    "one huge among many tiny": [0, 3, 1, 0, 90, 2, 33, 1, 0],
    "more tiles than lanes": [550, 40],
    "ends on tiles": [32, 32, 64],
    "all of one row": [1] * 70,
}
HEADS = {1: 1, 6: 2, 32: 4, 33: 3, 130: 2}  # of 130 columns the second head lies in two tiles


def program(reduction, lengths, width, dtype, device, offset=0.0):
    """Arguments of a program of two sections, cut at a segment's end, the first of which writes rows too."""
    rows = sum(lengths)
    ptr = torch.tensor([0, *lengths], device=device).cumsum(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=torch.float64) * scale).to(device, dtype)

    e, x, bias = draw(rows, width) + offset, draw(NODES, width), draw(width)
    maps = [draw(width, width, scale=width**-0.5) for _ in range(3)]
    index = torch.randint(NODES, (rows,)).to(device)
    cut = int(ptr[len(lengths) // 2])
    run = RowProgram()
    for number, count in enumerate((cut, rows - cut)):
        s = run.section(count)
        loaded = s.load(e)
        value = s.load_add(s.linear(loaded, maps[0], bias) if number else loaded, x, index)
        if reduction == "statistics":
            s.summarize(value)
        else:
            query = s.load_mul(s.linear(loaded, maps[2]), x, index)
            s.attend(value, s.head_dot(query, s.add_vector(loaded, bias), HEADS[width], 0.7))
        if number == 0:
            s.write(s.norm_act(s.linear(loaded, maps[1], bias), None, None, "gelu", 1.0))
    return list(run.arguments(ptr))


def assert_equal_in_float64(arguments):
    with nan_poisoned():
        found = results(TRITON, arguments)
    for a, e in zip(found, results(REFERENCE, arguments), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lengths", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_reduced_segments(reduction, lengths, device):
    assert_equal_in_float64(program(reduction, lengths, 6, torch.float64, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("width", [1, 33, 130])
def test_reduced_widths(reduction, width, device):
    assert_equal_in_float64(program(reduction, [3, 0, 40], width, torch.float64, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_in_low_precision(reduction, dtype, device):
    assert_as_reference(program(reduction, [4, 0, 21, 40, 1], 32, dtype, device))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_give_twice_the_same_bits_in_several_launches(reduction, device, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 2)
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


def attention(x, logits, ptr, heads):
    """Rows x, each head weighted by its column of logits."""
    run = RowProgram()
    section = run.section(x.shape[0])
    section.attend(
        section.load(x), section.head_dot(section.load(logits), section.load(torch.ones_like(logits)), heads, 1)
    )
    return run.arguments(ptr)


def test_what_attention_keeps(device):
    """The largest logit of each head, and 1 / the sum of the exponentials of the differences to it."""
    x, logits = torch.randn(150, 6, device=device), 10 * torch.randn(150, 3, device=device)
    ptr = torch.tensor([0, 0, 3, 140, 150, 150], device=device)
    _, _, kept, extremes = kernels.row_program(*attention(x, logits, ptr, 3))
    assert kept.shape == (5, 6) and extremes.shape == (0,)
    for segment, (begin, end) in enumerate(zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True)):
        if begin == end:
            assert not kept[segment].any()
            continue
        largest, share = kept[segment].chunk(2)
        assert torch.equal(largest, logits[begin:end].amax(0))
        torch.testing.assert_close(1 / share, (logits[begin:end] - largest).exp().sum(0))


@pytest.mark.parametrize("heads", [65, 128])
def test_many_heads(heads, device):
    x, logits = torch.randn(40, 2 * heads, device=device), torch.randn(40, heads, device=device)
    arguments = attention(x.double(), logits.double(), torch.tensor([0, 3, 40], device=device), heads)
    for found, expected in zip(results(TRITON, arguments), results(REFERENCE, arguments), strict=True):
        assert relative_error(found, expected) < 1e-10


def test_more_heads_than_are_served(device):
    x = torch.randn(4, 129, device=device)
    with backend("triton"), pytest.raises(RuntimeError, match="rows of width 129 in 129 heads, of 128 at most"):
        program = RowProgram()
        section = program.section(4)
        section.attend(section.load(x), section.head_dot(section.load(x), section.load(x), 129, 1.0))
        program.run(torch.tensor([0, 4], device=device))


@pytest.mark.parametrize("scale", [1e4, 3e37])
def test_large_logits(scale, device):
    """One row takes all of the weight, wherever among the tiles it lies."""
    x, logits = torch.randn(100, 4, device=device), torch.randn(100, 2, device=device)
    arguments = attention(x, (scale * logits).contiguous(), torch.tensor([0, 3, 100], device=device), 2)
    for row, (begin, end) in enumerate(((0, 3), (3, 100))):
        chosen = begin + logits[begin:end].argmax(0)
        expected = torch.cat([x[chosen[0], :2], x[chosen[1], 2:]])
        torch.testing.assert_close(kernels.row_program(*arguments)[0][row], expected)
    assert all(gradient.isfinite().all() for gradient in results(TRITON, arguments)[2:])


def test_a_nan_stays_in_its_head_and_segment(device):
    x, logits = torch.randn(100, 4, device=device), torch.randn(100, 2, device=device)
    logits[50, 1] = float("nan")
    out = kernels.row_program(*attention(x, logits, torch.tensor([0, 35, 90, 100], device=device), 2))[0]
    assert out[1, 2:].isnan().all() and out[1, :2].isfinite().all() and out[[0, 2]].isfinite().all()


def test_heads_that_do_not_divide_a_row(device):
    run = RowProgram()
    section = run.section(4)
    x = section.load(torch.randn(4, 6, device=device))
    section.attend(x, section.head_dot(x, x, 4, 1.0))
    ptr = torch.tensor([0, 4], device=device)
    with backend("triton"), pytest.raises(RuntimeError, match="rows of width 6 in 4 heads, of 128 at most"):
        run.run(ptr)


NEURAL_GRAPHS = {
    "inr_classification/pna": {"gnn_backbone": {"num_layers": 2}},
    "inr_classification/rtransformer": {"d_node": 16, "d_edge": 8, "d_attn_hid": 16, "n_heads": 2, "n_layers": 2},
}


@pytest.mark.parametrize("name", list(NEURAL_GRAPHS))
def test_published_neural_graphs(name, device, monkeypatch):
    config, changes = neural_graphs_config(name), {"layer_layout": LAYOUT, **NEURAL_GRAPHS[name]}
    for key, value in {**changes, "graph_constructor": {"sin_emb_dim": 8}}.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    assert_model_as_reference(from_config(config).eval(), 1, device, monkeypatch)
