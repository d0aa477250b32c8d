"""The op `segment_reduce` on every backend."""

import pytest
import torch

from scalegmn_fast import ops, reference
from scalegmn_fast.reference.segment_reduce import REDUCTIONS
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 5, 13, 33, 123, 128)
# The kernels treat segments of more than 512 slots in pieces that end at multiples of 512.
LENGTHS = {
    "empty ones": (0, 3, 0, 0, 2, 0),
    "one huge, many tiny": (1, 2, 0, 1500, 1, 1, 2),
    "at the border": (512, 513, 1, 511, 0, 1024, 1025),
    "one": (7,),
    "only huge": (1100, 2000),
}


def pointers(lengths, device="cpu", dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def draw(lengths, width, dtype, device, how="rows", seed=0):
    """x, ptr and order: as rows stand, permuted with rows left out, or with rows that repeat."""
    generator = torch.Generator().manual_seed(seed)
    slots = sum(lengths)
    # neighbours lie apart: no deviation is a difference of nearly equal numbers
    x = torch.randn(slots + 4, width, generator=generator, dtype=torch.float64).tanh() * 0.5
    x = (x + 2.0 - 4.0 * (torch.arange(slots + 4) % 2)[:, None]).to(device, dtype)
    if how == "rows":
        order = None
    elif how == "permuted":
        order = torch.randperm(slots + 4, generator=generator)[:slots].to(device)
    else:
        order = torch.randint(0, max(slots // 3, 1), (slots,), generator=generator).to(device)
    return x, pointers(lengths, device), order


def results(function, x, ptr, order, reduce, grad=None, **options):
    """Output and gradient for x."""
    x = x.detach().requires_grad_()
    out = function(x, ptr, reduce, order=order, **options)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).cos().view(out.shape) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, x, grad.to(out))]


def cpu(*tensors):
    return [None if t is None else t.cpu() for t in tensors]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["rows", "permuted", "repeated"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_result_and_gradient_against_float64(device, lengths, how, dtype, request):
    if dtype == torch.float64 and "triton" in request.node.name:
        pytest.skip("the triton backend refuses float64: test_backends.py")
    for width in WIDTHS if lengths == (7,) else (5, 128):
        x, ptr, order = draw(lengths, width, dtype, device, how)
        # one by one they give the same bits: test_one_pass_gives_what_single_reductions_give
        for reduce in (REDUCTIONS, ("max", "mean")):
            lower = torch.float32 if dtype == torch.float64 else dtype
            exact = results(reference.segment_reduce, *cpu(x.double(), ptr, order), reduce)
            eager = results(reference.segment_reduce, x.to(lower), ptr, order, reduce)
            actual = results(ops.segment_reduce, x, ptr, order, reduce)
            for name, a, e, r in zip(("result", "gradient"), actual, eager, exact, strict=True):
                e = r.to(dtype) if dtype == torch.float64 else e
                assert_close_to_float64(a, e, r, ulps=32, name=f"{name} of {reduce} at width {width}")


@pytest.mark.parametrize("how", ["rows", "permuted", "repeated"])
@pytest.mark.parametrize("reduce", [*REDUCTIONS, REDUCTIONS])
def test_derivatives_by_finite_differences(float64_device, reduce, how):
    x, ptr, order = draw((0, 3, 1, 0, 2), 2, torch.float64, float64_device, how)
    x.requires_grad_()

    def function(x):
        return ops.segment_reduce(x, ptr, reduce, order=order)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("width", [123, 128])
def test_gradient_by_finite_differences_at_production_widths(float64_device, width):
    x, ptr, order = draw((3, 0, 2), width, torch.float64, float64_device, "permuted")
    x.requires_grad_()
    function = lambda x: ops.segment_reduce(x, ptr, REDUCTIONS, order=order)  # noqa: E731
    assert torch.autograd.gradcheck(function, x, fast_mode=True)


def test_second_derivative_across_a_long_segment(float64_device):
    x, ptr, order = draw((600, 2), 1, torch.float64, float64_device, "permuted")
    x.requires_grad_()

    def second(function):
        out = function(x, ptr, ("var", "std"), order=order)
        (first,) = torch.autograd.grad((out**2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    torch.testing.assert_close(second(ops.segment_reduce), second(reference.segment_reduce), rtol=1e-10, atol=1e-14)


def test_registration_is_consistent(float64_device):
    x, ptr, order = draw((2, 0, 3), 4, torch.float64, float64_device, "permuted")
    x.requires_grad_()
    for index, names in ((order, list(REDUCTIONS)), (None, ["sum"]), (order, ["max", "var"])):
        torch.library.opcheck(torch.ops.scalegmn_fast.segment_reduce, (x, ptr, index, names, 1e-5))
        out, arg = torch.ops.scalegmn_fast.segment_reduce(x.detach(), ptr, index, names, 1e-5)
        grad = torch.randn_like(out).requires_grad_()
        arguments = (grad, x, ptr, index, arg, out, names, 1e-5)
        torch.library.opcheck(torch.ops.scalegmn_fast.segment_reduce_backward, arguments)


def test_compiles_into_one_graph_for_all_sizes(device):
    def function(x, ptr, reduce, order=None):
        return ops.segment_reduce(x * 2, ptr, reduce, order=order) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 2, 4), (1, 0, 5, 2), (6, 3)):
        x, ptr, order = draw(lengths, 6, torch.float32, device, "permuted")
        compiled_results = results(compiled, x, ptr, order, ("mean", "max"))
        for actual, expected in zip(compiled_results, results(function, x, ptr, order, ("mean", "max")), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_both_index_types_and_a_mix_of_them_agree(device, index):
    x, ptr, order = draw((3, 0, 700, 2), 5, torch.float32, device, "permuted")
    expected = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
    for p, o in ((ptr.to(index), order.to(index)), (ptr.to(index), order)):
        for actual, wanted in zip(results(ops.segment_reduce, x, p, o, REDUCTIONS), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    _, arg = torch.ops.scalegmn_fast.segment_reduce(x, ptr.to(index), order.to(index), ["max"], 0.0)
    assert arg.dtype == index


def test_one_pass_gives_what_single_reductions_give(device):
    x, ptr, order = draw((3, 0, 700, 2), 5, torch.float32, device, "permuted")
    together = ops.segment_reduce(x, ptr, REDUCTIONS, order=order)
    assert together.shape == (4, 6, 5)
    for k, name in enumerate(REDUCTIONS):
        out, grad = results(ops.segment_reduce, x, ptr, order, name, torch.ones(4, 5))
        torch.testing.assert_close(together[:, k], out, rtol=0, atol=0)
        only = torch.zeros(4, 6, 5).index_fill(1, torch.tensor(k), 1)
        torch.testing.assert_close(results(ops.segment_reduce, x, ptr, order, REDUCTIONS, only)[1], grad)


def test_empty_segments_give_zero_and_no_row(device):
    x, ptr, _ = draw((0, 2, 0), 3, torch.float32, device)
    out, arg = torch.ops.scalegmn_fast.segment_reduce(x, ptr, None, list(REDUCTIONS), 1e-5)
    assert (out[[0, 2]] == 0).all() and (arg[[0, 2]] == -1).all() and (arg[1] >= 0).all()


def test_no_rows_no_slots_no_segments(device):
    for rows, ptr in ((0, [0]), (0, [0, 0, 0]), (3, [0, 0]), (3, [0])):
        x = torch.randn(rows, 4, device=device)
        p = torch.tensor(ptr, device=device)
        for order in (None, torch.zeros(0, dtype=torch.long, device=device)):
            out, grad = results(ops.segment_reduce, x, p, order, REDUCTIONS)
            assert out.shape == (len(ptr) - 1, 6, 4) and (out == 0).all()
            assert grad.shape == (rows, 4) and (grad == 0).all()


def test_ties_and_nan_belong_to_the_first_slot(device):
    nan = float("nan")
    x = torch.tensor([[1.0], [3.0], [3.0], [1.0], [nan], [5.0], [nan]], device=device)
    order = torch.tensor([3, 2, 1, 0, 5, 6, 4], device=device)
    ptr = torch.tensor([0, 4, 7], device=device)
    for index, expected in ((None, ([0, 1], [4, 4])), (order, ([3, 2], [6, 6]))):
        out, arg = torch.ops.scalegmn_fast.segment_reduce(x, ptr, index, ["min", "max"], 0.0)
        assert out[0, :, 0].tolist() == [1, 3] and out[1].isnan().all()
        assert arg[:, :, 0].tolist() == [expected[0], expected[1]]
        gradient = results(ops.segment_reduce, x, ptr, index, "max", grad=torch.ones(2, 1))[1]
        wanted = torch.zeros(7, 1)
        wanted[[expected[0][1], expected[1][1]]] = 1
        torch.testing.assert_close(gradient.cpu(), wanted, rtol=0, atol=0)


def test_ties_across_pieces_belong_to_the_first_slot(device):
    x = torch.zeros(2000, 1, device=device)
    x[[700, 1300, 1999]] = 1
    _, arg = torch.ops.scalegmn_fast.segment_reduce(x, pointers((3, 1997), device), None, ["min", "max"], 0.0)
    assert arg[:, :, 0].tolist() == [[0, 0], [3, 700]]


def test_nan_and_infinity_propagate(device):
    x = torch.ones(6, 1, device=device)
    x[1], x[4] = float("nan"), float("inf")
    out = ops.segment_reduce(x, torch.tensor([0, 3, 6], device=device), REDUCTIONS)[:, :, 0]
    assert out[0].isnan().all()
    assert out[1, :4].tolist() == [float("inf"), float("inf"), 1.0, float("inf")] and out[1, 4:].isnan().all()


def test_a_repeated_row_gets_the_extremum_once(device):
    x = torch.tensor([[1.0], [2.0]], device=device)
    order = torch.tensor([1, 1, 0, 1], device=device)
    _, grad = results(ops.segment_reduce, x, torch.tensor([0, 3, 4], device=device), order, "max", torch.ones(2, 1))
    assert grad.tolist() == [[0.0], [2.0]]


def test_variance_does_not_cancel(device):
    x, ptr, _ = draw((40, 900), 3, torch.float32, device)
    near, far = (ops.segment_reduce(x + shift, ptr, "var") for shift in (0.0, 1024.0))
    torch.testing.assert_close(far, near, rtol=1e-3, atol=0)


@pytest.mark.parametrize("how", ["rows", "permuted", "repeated"])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.01, 0.001])
def test_moments_far_from_zero(device, spread, how):
    """Mean 1 and deviation `spread`, short and long segments: as accurate as autograd through the formula."""
    for lengths in LENGTHS.values():
        x, ptr, order = draw(lengths, 33, torch.float64, device, how)
        x = (1 + spread * x).float()
        exact = results(reference.segment_reduce, *cpu(x.double(), ptr, order), ("var", "std"), eps=0.0)
        eager = results(reference.segment_reduce, x, ptr, order, ("var", "std"), eps=0.0)
        actual = results(ops.segment_reduce, x, ptr, order, ("var", "std"), eps=0.0)
        for name, a, e, r in zip(("result", "gradient"), actual, eager, exact, strict=True):
            assert_close_to_float64(a, e, r, ulps=32, name=f"{name} at spread {spread}")


def test_std_is_zero_with_zero_gradient_up_to_eps(device):
    x = torch.tensor([[1.0], [1.001], [0.0], [2.0], [4.0]], device=device)
    out, grad = results(ops.segment_reduce, x, pointers((2, 2, 1), device), None, "std", torch.ones(3, 1), eps=1e-5)
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0], [1.0], [0.0]]))
    torch.testing.assert_close(grad.cpu(), torch.tensor([[0.0], [0.0], [-0.5], [0.5], [0.0]]))
    assert ops.segment_reduce(x, pointers((2, 2, 1), device), "std", eps=0.0)[0] > 0


@pytest.mark.parametrize(("reduce", "keeps"), [(("sum", "mean", "min", "max"), False), ("var", True), ("std", True)])
def test_backward_keeps_the_rows_only_if_it_reads_them(device, reduce, keeps):
    x, ptr, order = draw((3, 700), 33, torch.float32, device, "permuted")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.segment_reduce(x.requires_grad_(), ptr, reduce, order=order)
    largest = max(t.untyped_storage().nbytes() for t in saved if t.is_floating_point())
    assert (largest >= x.nbytes) == keeps


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_every_element_is_written(device, lengths):
    x, ptr, order = draw(lengths, 33, torch.float32, device, "permuted")
    with nan_poisoned():
        out, grad = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
    assert out.isfinite().all() and grad.isfinite().all()
    unused = torch.ones(len(x), dtype=torch.bool)
    unused[order.cpu()] = False
    assert (grad.cpu()[unused] == 0).all()


@pytest.mark.parametrize("how", ["rows", "permuted", "repeated"])
def test_same_bits_every_time_and_for_any_number_of_threads(native_device, how):
    x, ptr, order = draw((1500, *[7] * 300), 33, torch.float32, native_device, how)
    threads = torch.get_num_threads()
    first = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            again = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
            for actual, expected in zip(again, first, strict=True):
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_any_strides(device):
    dense, ptr, order = draw((3, 0, 700), 6, torch.float32, device, "permuted")
    wide = torch.randn(len(dense), 12, device=device)
    index = torch.stack([order, order], 1)[:, 0]
    for x in (wide[:, ::2], dense.t().contiguous().t(), dense[:1].expand(len(dense), 6), wide[:, 3:9]):
        strided = results(ops.segment_reduce, x, ptr, index, REDUCTIONS)
        contiguous = results(ops.segment_reduce, x.contiguous(), ptr, order, REDUCTIONS)
        for actual, expected in zip(strided, contiguous, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grad = torch.randn(6, 3, device=device).t()
    strided = results(ops.segment_reduce, dense, ptr, order, "std", grad)
    torch.testing.assert_close(
        strided, results(ops.segment_reduce, dense, ptr, order, "std", grad.contiguous()), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    for x_dtype in (torch.float32, dtype):
        x, ptr, order = draw((3, 0, 4), 5, x_dtype, device, "permuted")
        plain = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
        with torch.autocast(device, dtype=dtype):
            inside = results(ops.segment_reduce, x, ptr, order, REDUCTIONS)
        for actual, expected in zip(inside, plain, strict=True):
            assert actual.dtype == x_dtype
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


X = torch.zeros(3, 4)
P = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "x: expected a tensor, got list", ([1.0], P), {}),
        (TypeError, "x: expected float32, .* got torch.int64", (X.long(), P), {}),
        (ValueError, r"x: expected rows \[R, d\] with d >= 1, got shape \(3,\)", (X[:, 0], P), {}),
        (ValueError, r"x: .* got shape \(3, 0\)", (X[:, :0], P), {}),
        (TypeError, "ptr: expected a tensor, got list", (X, [0, 3]), {}),
        (TypeError, "ptr: expected int32 or int64, got torch.float32", (X, P.float()), {}),
        (ValueError, r"ptr: expected one dimension, got shape \(1, 3\)", (X, P[None]), {}),
        (ValueError, r"ptr: expected shape \[S \+ 1\]", (X, P[:0]), {}),
        (ValueError, "ptr: expected device cpu .*, got meta", (X, P.to("meta")), {}),
        (ValueError, "ptr: .*from 0", (X, P + 1), {}),
        (ValueError, "ptr: .*nondecreasing", (X, torch.tensor([0, 2, 1])), {}),
        (ValueError, "ptr: expected its last entry to be at most 3, .* got 4", (X, torch.tensor([0, 4])), {}),
        (ValueError, "ptr: expected its last entry to be .*2.* got 3", (X, P), {"order": torch.tensor([0, 1])}),
        (ValueError, r"order: expected rows of x in \[0, 3\), got", (X, P), {"order": torch.tensor([0, 1, 3])}),
        (ValueError, r"order: expected rows of x in \[0, 3\), got", (X, P), {"order": torch.tensor([0, -1, 1])}),
        (TypeError, "order: expected int32 or int64, got torch.bool", (X, P), {"order": torch.ones(3).bool()}),
        (ValueError, r"order: expected one dimension, got shape \(3, 1\)", (X, P), {"order": P[:, None]}),
        (ValueError, "reduce: expected names out of .*, got 'median'", (X, P, "median"), {}),
        (ValueError, "reduce: expected names out of .*, got 'prod'", (X, P, ("sum", "prod")), {}),
        (ValueError, "reduce: expected at least one name", (X, P, ()), {}),
        (ValueError, "reduce: expected each name once, got sum, sum", (X, P, ("sum", "sum")), {}),
        (ValueError, "eps: expected a number >= 0, got -1", (X, P), {"eps": -1}),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_wrong_arguments_are_named(backend, error, message, arguments, options):
    import scalegmn_fast

    with scalegmn_fast.backend(backend), pytest.raises(error, match=message):
        ops.segment_reduce(*arguments, **options)
