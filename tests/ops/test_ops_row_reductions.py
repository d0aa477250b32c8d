"""Statistics and attention, the reductions of `row_program` over whole segments."""

import pytest
import torch

import scalegmn_fast
from scalegmn_fast.ops.row_program import RowProgram
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned

REDUCTIONS = ("statistics", "attention")
HEADS = {1: 1, 6: 2, 32: 4, 66: 3, 128: 8}


def inputs(lengths, width, dtype, offset=0.0, seed=0):
    """Tensors, an index and segments of the given lengths; values of the rows lie around ``offset``."""
    generator = torch.Generator().manual_seed(seed)
    rows, nodes = sum(lengths), len(lengths) + 3

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    tensors = {
        "e": draw(rows, width) + offset,
        "x": draw(nodes, width),
        "w": draw(width, width, scale=width**-0.5),
        "w_q": draw(width, width, scale=width**-0.5),
        "b": draw(width),
    }
    index = torch.randint(nodes, (rows,), generator=generator)
    return tensors, index, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


def program(t, index, ptr, reduction, cut=None):
    """Two sections, cut at a segment's end, the first of which writes rows too."""
    width, rows = t["e"].shape[1], int(ptr[-1])
    cut = int(ptr[len(ptr) // 2]) if cut is None else cut
    run = RowProgram()
    for number, count in enumerate((cut, rows - cut)):
        s = run.section(count)
        e = s.load(t["e"])
        value = s.load_add(s.linear(e, t["w"], t["b"]) if reduction == "attention" or number else e, t["x"], index)
        if reduction == "statistics":
            s.summarize(value)
        else:
            query = s.load_mul(s.linear(e, t["w_q"]), t["x"], index)
            s.attend(value, s.head_dot(query, s.add_vector(e, t["b"]), HEADS[width], (width / HEADS[width]) ** -0.5))
        if number == 0:
            s.write(s.norm_act(s.linear(e, t["w_q"], t["b"]), None, None, "gelu", 1.0))
    return run.run(ptr)


def results(backend, t, index, ptr, reduction):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in t.items()}
    with scalegmn_fast.backend(backend):
        out = program(leaves, index, ptr, reduction)
        cotangents = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o) for o in out]
        grads = torch.autograd.grad(out, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True)
        return [*out, *grads]


LENGTHS = [0, 3, 1, 0, 17, 500, 2, 67, 67, 67, 67, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("width", list(HEADS))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_result_and_gradients_against_float64(reduction, width, dtype):
    t, index, ptr = inputs(LENGTHS, width, dtype)
    exact = results("reference", {k: v.double() for k, v in t.items()}, index, ptr, reduction)
    lower = torch.float32 if dtype == torch.float64 else dtype
    eager = results("reference", {k: v.to(lower) for k, v in t.items()}, index, ptr, reduction)
    for name, a, e, r in zip(
        ("reduced", "rows", *t), results("cpp", t, index, ptr, reduction), eager, exact, strict=True
    ):
        e = r if dtype == torch.float64 else e
        assert_close_to_float64(a, e, r, ulps=64, name=f"{name} at width {width}")


def test_statistics_far_from_zero():
    """Spread 1 around 1000: variance and its gradient keep the precision of the deviations."""
    t, index, ptr = inputs(LENGTHS, 32, torch.float32, offset=1000.0)
    exact = results("reference", {k: v.double() for k, v in t.items()}, index, ptr, "statistics")
    found = results("cpp", t, index, ptr, "statistics")
    variance = slice(32, 64)
    torch.testing.assert_close(found[0][:, variance].double(), exact[0][:, variance], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[3].double(), exact[3], rtol=1e-3, atol=1e-3)


def test_extremes_and_their_ties():
    e = torch.tensor([[2.0], [1.0], [2.0], [1.0], [float("nan")], [3.0]], requires_grad=True)
    run = RowProgram()
    section = run.section(6)
    section.summarize(section.load(e))
    out = run.run(torch.tensor([0, 4, 6]))[0]
    assert out[0].tolist() == [1.5, 0.25, 1.0, 2.0]
    assert torch.isnan(out[1]).all()
    (grad,) = torch.autograd.grad(out[0, 2:].sum(), e)
    assert grad[:4].flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_large_logits_do_not_overflow():
    t, index, ptr = inputs([40, 3], 32, torch.float32)
    t["w_q"] = t["w_q"] * 1e3
    exact = results("reference", {k: v.double() for k, v in t.items()}, index, ptr, "attention")
    found = results("cpp", t, index, ptr, "attention")
    assert all(torch.isfinite(value).all() for value in found)
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_by_finite_differences(reduction):
    t, index, ptr = inputs([3, 0, 4, 2], 6, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    function = lambda *leaves: program(dict(zip(t, leaves, strict=True)), index, ptr, reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_for_any_number_of_threads_and_every_time(reduction):
    t, index, ptr = inputs([67] * 100 + [300, 0, 5], 32, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            found.append(results("cpp", t, index, ptr, reduction))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("lengths", [[0, 0], [1], [9000], [1] * 3000], ids=["no rows", "one row", "one", "many"])
def test_named_segments(reduction, lengths):
    t, index, ptr = inputs(lengths, 6, torch.float64)
    found, expected = (results(backend, t, index, ptr, reduction) for backend in ("cpp", "reference"))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_output_is_written(reduction):
    t, index, ptr = inputs(LENGTHS, 32, torch.float32)
    plain = results("cpp", t, index, ptr, reduction)
    with nan_poisoned():
        poisoned = results("cpp", t, index, ptr, reduction)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_registration_and_compilation(reduction, monkeypatch):
    t, index, ptr = inputs([3, 0, 4, 2], 6, torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in t.items()}
    compiled = torch.compile(lambda t: program(t, index, ptr, reduction, 3), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(leaves), program(leaves, index, ptr, reduction), strict=True):
        torch.testing.assert_close(a, b)
    calls, op = [], torch.ops.scalegmn_fast.row_program
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.scalegmn_fast, "row_program", lambda *args: calls.append(args) or op(*args))
        program(leaves, index, ptr, reduction)
    torch.library.opcheck(op, calls[0])


def test_bad_programs():
    t, index, ptr = inputs([3, 4], 6, torch.float32)

    def run(build, ptr=ptr):
        program = RowProgram()
        build(program)
        return program.run(ptr)

    def cut(program):
        for count in (2, 5):
            section = program.section(count)
            section.summarize(section.load(t["e"]))

    def mixed(program):
        section = program.section(3)
        section.summarize(section.load(t["e"]))
        section = program.section(4)
        section.add_up(section.load(t["e"]))

    def heads(program):
        section = program.section(7)
        e = section.load(t["e"])
        section.attend(e, section.head_dot(e, e, 4, 1.0))

    def shared(program):
        section = program.section(7)
        e = section.load(t["e"])
        logits = section.head_dot(e, e, 2, 1.0)
        section.write(section.negate(logits))
        section.attend(e, logits)

    for build, message in (
        (cut, "expected whole segments, got a section that begins or ends at row 2"),
        (mixed, "sections differ in the reduction"),
        (heads, "4 heads for rows of width 6"),
        (shared, "logits are read by another step"),
    ):
        with pytest.raises(ValueError, match=message):
            run(build)
