"""The composed engine of `row_program`: products of the library and row kernels, chunk by chunk.

It serves CUDA tensors. Its driver, and the rows' arithmetic compiled for the host, run on CPU tensors here.
"""

from contextlib import contextmanager

import pytest
import test_ops_row_program as rows_cases
import test_ops_row_reductions as reduction_cases
import torch

import scalegmn_fast
from scalegmn_fast import backends
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.reference.row_program import ACTIVATIONS
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = (1, 5, 33, 123, 128, 300)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    return request.param


@contextmanager
def composed(chunk_rows=0):
    """Programs run on the composed engine, in chunks of so many rows; 0: its own choice."""
    chosen = backends.implementation
    assert backends.compiled_module()[0] is not None
    native = torch.ops.scalegmn_fast_native

    def implementation(op, direction, tensor, *limits):
        if op != "row_program":
            return chosen(op, direction, tensor, *limits)
        kernel = native.row_program_composed if direction == "forward" else native.row_program_composed_backward
        return lambda *arguments: kernel(*arguments, chunk_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "implementation", implementation)
        yield


def on(place, t, index, ptr):
    moved = [i.to(place) for i in index] if isinstance(index, list) else index.to(place)
    return {name: tensor.to(place) for name, tensor in t.items()}, moved, ptr.to(place)


def assert_close(found, t, case, cases, *arguments, **options):
    """Results and gradients are as near to float64 as the reference in the dtype of t."""
    exact = cases.results("reference", {k: v.double() for k, v in t.items()}, *case, *arguments, **options)
    eager = cases.results("reference", t, *case, *arguments, **options)
    for name, a, e, r in zip(("reduced", "rows", *t), found, eager, exact, strict=True):
        assert_close_to_float64(a, e, r, ulps=64, name=f"{name} of {next(iter(t.values())).dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_composed_result_and_gradients_against_float64(place, width, dtype):
    rows, chunk = (200, 24) if width % 2 else (70, 0)
    t, *case = rows_cases.inputs(rows, 40, width, dtype)
    options = {"norm": width > 1}  # what a norm of one number gives is rounding alone
    moved = on(place, t, *case)
    with composed(chunk):
        found = rows_cases.results("auto", *moved, rows, **options)
    assert_close(found, t, case, rows_cases, rows, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", list(reduction_cases.HEADS))
@pytest.mark.parametrize("reduction", reduction_cases.REDUCTIONS)
def test_composed_reductions_against_float64(place, reduction, width, dtype):
    t, *case = reduction_cases.inputs(reduction_cases.LENGTHS, width, dtype)
    with composed(100):
        found = reduction_cases.results("auto", *on(place, t, *case), reduction)
    assert_close(found, t, case, reduction_cases, reduction)


def sorts(run):
    """How often PyTorch sorts while `run` does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::sort")


def test_composed_sorts_an_index_once(place):
    """For as long as it lives and stays what it was, per way of cutting it into chunks."""
    t, index, ptr = on(place, *rows_cases.inputs(200, 40, 5, torch.float64))

    def found(chunk=24):
        with composed(chunk):
            return rows_cases.results("auto", t, index, ptr, 200)

    first = found()
    index = [i.clone() for i in index]
    assert sorts(found) == 2 and sorts(found) == 0
    assert sorts(lambda: found(chunk=50)) == 2 and sorts(found) == 0
    assert all(torch.equal(a, b) for a, b in zip(found(), first, strict=True))
    index[0].copy_(39 - index[0])
    assert sorts(found) == 1
    for a, b in zip(found(), rows_cases.results("reference", t, index, ptr, 200), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    index = [index[1], index[0]]  # another place in the program, the same numbers
    assert sorts(found) == 0
    parts = torch.stack(index)
    index = [parts[0], parts[1]]
    assert sorts(found) == 2 and sorts(found) == 0


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_composed_activations(place, activation, norm):
    t, *case = rows_cases.inputs(100, 9, 33, torch.float32)
    options = {"activation": activation, "norm": norm}
    moved = on(place, t, *case)
    with composed(30):
        found = rows_cases.results("auto", *moved, 100, **options)
    assert_close(found, t, case, rows_cases, 100, **options)


SEGMENTS = {
    "empty": [0, 0, 0, 300, 300],
    "one": [0, 300],
    "tiny": list(range(301)),
    "huge and tiny": [0, 1, 1, 2, 290, 291, 300],
}


@pytest.mark.parametrize("segments", list(SEGMENTS))
@pytest.mark.parametrize("chunk", [1, 31, 32, 100, 299, 10**6])
def test_composed_at_the_edges_of_chunks_and_segments(place, chunk, segments):
    t, index, _ = rows_cases.inputs(300, 7, 5, torch.float64)
    ptr = torch.tensor(SEGMENTS[segments])
    moved = on(place, t, index, ptr)
    with composed(chunk):
        found = rows_cases.results("auto", *moved, 300)
    for a, b in zip(found, rows_cases.results("reference", t, index, ptr, 300), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[0, 0], [1], [900], [1] * 300], ids=["no rows", "one row", "one", "many"])
@pytest.mark.parametrize("reduction", reduction_cases.REDUCTIONS)
def test_composed_named_segments(place, reduction, lengths):
    t, *case = reduction_cases.inputs(lengths, 6, torch.float64)
    with composed(64):
        found = reduction_cases.results("auto", *on(place, t, *case), reduction)
    for a, b in zip(found, reduction_cases.results("reference", t, *case, reduction), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


def test_composed_statistics_far_from_zero_and_ties(place):
    """Spread 1 around 1000: variance and its gradient keep the deviations' precision. Ties go to the first row."""
    t, *case = reduction_cases.inputs(reduction_cases.LENGTHS, 32, torch.float32, offset=1000.0)
    exact = reduction_cases.results("reference", {k: v.double() for k, v in t.items()}, *case, "statistics")
    with composed(50):
        found = reduction_cases.results("auto", *on(place, t, *case), "statistics")
        e = torch.tensor([[2.0], [1.0], [2.0], [1.0]], device=place, requires_grad=True)
        run = RowProgram()
        section = run.section(4)
        section.summarize(section.load(e))
        out = run.run(torch.tensor([0, 4], device=place))[0]
        (grad,) = torch.autograd.grad(out[0, 2:].sum(), e)
    variance = slice(32, 64)
    torch.testing.assert_close(found[0].cpu()[:, variance].double(), exact[0][:, variance], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[3].cpu().double(), exact[3], rtol=1e-3, atol=1e-3)
    assert out.flatten().tolist() == [1.5, 0.25, 1.0, 2.0]
    assert grad.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_composed_logits_that_are_large(place):
    t, *case = reduction_cases.inputs([40, 3], 32, torch.float32)
    t["w_q"] = t["w_q"] * 1e3
    exact = reduction_cases.results("reference", {k: v.double() for k, v in t.items()}, *case, "attention")
    with composed(16):
        found = reduction_cases.results("auto", *on(place, t, *case), "attention")
    assert all(torch.isfinite(value).all() for value in found)
    torch.testing.assert_close(found[0].cpu().double(), exact[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_composed_few_rows(place, rows):
    t, *case = rows_cases.inputs(rows, 3, 8, torch.float64)
    with composed():
        found = rows_cases.results("auto", *on(place, t, *case), rows)
    for a, b in zip(found, rows_cases.results("reference", t, *case, rows), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)


def test_composed_chunks_of_its_own_choice(place):
    """More rows than a chunk of this width has, most of which read one row of a table."""
    rows = 4096 * 3 + 900  # three sections
    t, index, ptr = rows_cases.inputs(rows, 300, 128, torch.float32)
    index[0] = index[0].clamp(max=3)
    moved = on(place, t, index, ptr)
    exact = rows_cases.results("cpp", {k: v.double() for k, v in t.items()}, index, ptr, rows)
    with composed():
        found = rows_cases.results("auto", *moved, rows)
    for name, a, r in zip(("sums", "rows", *t), found, exact, strict=True):
        assert_close_to_float64(a, r.float(), r, ulps=64, name=name)


def test_composed_derivatives_by_finite_differences(place):
    t, *case = on(place, *rows_cases.inputs(9, 4, 3, torch.float64))
    leaves = [tensor.requires_grad_() for tensor in t.values()]

    def function(*leaves):
        torch.manual_seed(1)
        return rows_cases.program(dict(zip(t, leaves, strict=True)), *case, 9, dropout=0.4)

    with composed(4):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_composed_dropout_is_the_reference_mask(place):
    def run():
        torch.manual_seed(2)
        program = RowProgram()
        section = program.section(500)
        section.write(section.dropout(section.load(torch.ones(500, 37, device=place)), 0.3))
        return program.run()[1]

    with scalegmn_fast.backend("reference"):
        expected = run()
    with composed(64):
        torch.testing.assert_close(run(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sum", *reduction_cases.REDUCTIONS])
def test_composed_writes_every_output_and_the_same_bits_every_time(place, reduction):
    if reduction == "sum":
        arguments = (*on(place, *rows_cases.inputs(1000, 50, 64, torch.float32)), 1000)
        cases, options = rows_cases, {"dropout": 0.2}
    else:
        arguments = (*on(place, *reduction_cases.inputs(reduction_cases.LENGTHS, 32, torch.float32)), reduction)
        cases, options = reduction_cases, {}
    with composed(100):
        plain = cases.results("auto", *arguments, **options)
        with nan_poisoned():
            poisoned = cases.results("auto", *arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_composed_gradients_of_some_tensors_alone(place, seed):
    t, *case = on(place, *rows_cases.inputs(60, 7, 12, torch.float64))
    generator = torch.Generator().manual_seed(seed)
    chosen = [name for name in t if torch.rand((), generator=generator) < 0.35]
    with composed(25):
        everything = rows_cases.results("auto", t, *case, 60)[2:]
        leaves = {name: tensor.clone().requires_grad_(name in chosen) for name, tensor in t.items()}
        torch.manual_seed(3)
        out = rows_cases.program(leaves, *case, 60)
        weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in out]
        found = torch.autograd.grad(out, [leaves[name] for name in chosen], weights)
    expected = dict(zip(t, everything, strict=True))
    assert chosen
    assert all(torch.equal(expected[name], grad) for name, grad in zip(chosen, found, strict=True))


def test_composed_strided_tables_and_mixed_types(place):
    """Tables that are parts of wider ones, or one row for all; a bfloat16 table and weight among float32 ones."""
    t, index, ptr = rows_cases.inputs(90, 7, 12, torch.float32)
    wide = torch.randn(7, 40)
    t["x"], t["u"] = wide[:, 3:15], wide[:1, 8:20].expand(7, 12)
    t["e"], t["w_1"] = t["e"].bfloat16(), t["w_1"].bfloat16()
    t["w_2"] = t["w_2"].t()
    expected = rows_cases.results("reference", t, index, ptr, 90)
    with composed(25):
        found = rows_cases.results("auto", *on(place, t, index, ptr), 90)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < (2**-7 if b.dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("norm", [True, False])
def test_composed_bfloat16_products_at_a_kink(place, norm):
    """Rows are rounded to bfloat16 as the reference rounds them, so the same sums move across ReLU's kink."""
    t, *case = rows_cases.inputs(300, 40, 128, torch.bfloat16)
    options = {"activation": "relu", "norm": norm}
    expected = rows_cases.results("reference", t, *case, 300, **options)
    with composed(128):
        found = rows_cases.results("auto", *on(place, t, *case), 300, **options)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 4 * 2**-8


@pytest.mark.parametrize(
    ("build", "message"), [bad for bad in rows_cases.BAD if "rows in" not in bad[1]], ids=lambda value: str(value)[:30]
)
def test_composed_bad_programs(place, build, message):
    """What shapes tell; entries of indices are not looked at."""
    t, index, _ = on(place, *rows_cases.inputs(9, 4, 3, torch.float32))
    run = RowProgram()
    section = run.section(9)
    section.write(build(section, t, index))
    with composed(), pytest.raises(ValueError, match=message):
        run.run()


def test_composed_bad_segments_and_sizes(place):
    t, index, ptr = on(place, *rows_cases.inputs(9, 4, 3, torch.float32))
    for wrong, message in ((None, "got none"), (ptr.int(), "expected int64"), (ptr[::2], "expected int64")):
        with composed(), pytest.raises(ValueError, match=f"ptr: .*{message}"):
            rows_cases.program(t, index, wrong, 9)
    with composed(-1), pytest.raises(ValueError, match="chunk_rows: expected at least 0, got -1"):
        rows_cases.program(t, index, ptr, 9)
    with composed(), pytest.raises(TypeError, match="indices: expected int32 or int64, got Short"):
        rows_cases.program(t, [index[0].short(), index[1]], ptr, 9)


@pytest.mark.gpu
def test_composed_in_a_cuda_graph():
    """A captured step, forward and backward, on other numbers than it was captured with."""
    t, index, ptr = on("cuda", *rows_cases.inputs(700, 40, 33, torch.float32))
    other, _, _ = on("cuda", *rows_cases.inputs(700, 40, 33, torch.float32, seed=1))
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}

    def step():
        out = rows_cases.program(leaves, index, ptr, 700)
        return [*out, *torch.autograd.grad(out[0].sum() + out[1].square().sum(), list(leaves.values()))]

    with composed(100):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for name, tensor in leaves.items():
                tensor.copy_(other[name])
        graph.replay()
        expected = step()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b)
