import importlib

import pytest
import torch
from scalegmn_fast.kernels import segment_reduce as kernels

from scalegmn_fast import backend, ops, reference
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned, relative_error

# The package attribute of this name is the function.
formulas = importlib.import_module("scalegmn_fast.reference.segment_reduce")

ALL = ("sum", "mean", "min", "max", "var", "std")
EPS = 1e-5
SMALL_CHUNK = 8

LAYOUTS = {
    "no segments": [],
    "no edges": [0, 0, 0],
    "one row": [1],
    "isolated first, middle and last": [0, 2, 0, 3, 0],
    "one huge among many tiny": [1, 0, 2, 50, 1, 3, 0, 1],
    "ends on a chunk": [8, 16, 8],
    "a chunk and one": [9, 17],
    "long ones in one chunk": [3, 10, 2, 17, 11],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Long segments without long loops."""
    monkeypatch.setattr(kernels, "CHUNK", SMALL_CHUNK)


def pointers(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(dtype)


def run(x, ptr, order, reduce, cotangent, eps=EPS):
    """Out, arg and grad_x of the kernels, all memory they allocate poisoned."""
    with nan_poisoned():
        out, arg = kernels.segment_reduce(x, ptr, order, list(reduce), eps)
        return out, arg, kernels.segment_reduce_backward(cotangent, x, ptr, order, arg, out, list(reduce), eps)


def assert_as_formula(x, ptr, order=None, reduce=ALL, eps=EPS):
    cotangent = torch.randn(ptr.numel() - 1, len(reduce), x.shape[1], dtype=torch.float64, device=x.device).to(x.dtype)
    out, arg, grad = run(x, ptr, order, reduce, cotangent, eps)
    results = []
    for dtype in (x.dtype, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        expected = reference.segment_reduce(leaf, ptr, reduce, order=order, eps=eps)
        results.append((expected.detach(), *torch.autograd.grad(expected, leaf, cotangent.to(dtype))))
    for k, name in enumerate(reduce):
        assert_close_to_float64(out[:, k], results[0][0][:, k], results[1][0][:, k], name=name)
    assert_close_to_float64(grad, results[0][1], results[1][1], name="grad_x")
    exact_arg = formulas.segment_reduce_forward(x, ptr, order, reduce, eps)[1]
    assert arg.dtype == ptr.dtype and torch.equal(arg, exact_arg)


@pytest.mark.parametrize("lengths", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(lengths, device):
    ptr = pointers(lengths, device)
    assert_as_formula(torch.randn(sum(lengths) + 2, 5, dtype=torch.float64, device=device), ptr)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [2, 21, 9]], ids=["short", "long"])
@pytest.mark.parametrize("repeats", [False, True], ids=["permuted", "repeated"])
def test_order(repeats, lengths, index, device):
    rows, slots = sum(lengths) + 4, sum(lengths)
    order = torch.randint(rows // 2, (slots,)) if repeats else torch.randperm(rows)[:slots]
    x = torch.randn(rows, 5, dtype=torch.float64, device=device)
    assert_as_formula(x, pointers(lengths, device, index), order.to(device, index))


@pytest.mark.parametrize("reduce", [(name,) for name in ALL] + [("std", "min"), ("max", "mean", "var")], ids="+".join)
def test_any_subset(reduce, device):
    lengths = [2, 0, 19, 1]
    assert_as_formula(
        torch.randn(sum(lengths), 5, dtype=torch.float64, device=device), pointers(lengths, device), None, reduce
    )


@pytest.mark.parametrize("width", [1, 13, 33, 123, 128, 130])
def test_widths(width, device):
    x = torch.randn(12, width, dtype=torch.float64, device=device)
    assert_as_formula(x, pointers([3, 9], device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_float64_as_eager(dtype, device):
    lengths = [4, 0, 1, 18]
    order = torch.randperm(sum(lengths)).to(device)
    x = torch.randn(sum(lengths), 16, device=device).to(dtype)
    assert_as_formula(x, pointers(lengths, device, torch.int64), order)


def test_segments_around_the_real_chunk(device, monkeypatch):
    monkeypatch.undo()
    assert kernels.CHUNK == 256
    lengths = [256, 257, 3]
    x = torch.randn(sum(lengths), 3, dtype=torch.float64, device=device)
    assert_as_formula(x, pointers(lengths, device), None, ("mean", "max"))


@pytest.mark.parametrize("lengths", [[5, 3], [4, 21, 4]], ids=["short", "long"])
def test_ties_go_to_the_first_slot(lengths, device):
    x = torch.randint(0, 2, (sum(lengths), 5), device=device).double()
    order = torch.arange(sum(lengths) - 1, -1, -1, device=device)
    for o in (None, order):
        assert_as_formula(x, pointers(lengths, device, torch.int64), o, ("min", "max"))
    constant = torch.ones_like(x)
    ptr = pointers(lengths, device)
    _, arg, grad = run(constant, ptr, None, ("max",), torch.ones(len(lengths), 1, 5, device=device).double())
    assert torch.equal(arg[:, 0, 0], ptr[:-1])
    assert torch.equal(grad.sum(1).nonzero().flatten(), ptr[:-1].long())


@pytest.mark.parametrize("lengths", [[5, 3], [4, 21, 4]], ids=["short", "long"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values(value, lengths, device):
    x = torch.randn(sum(lengths), 5, dtype=torch.float64, device=device)
    x[2, 1] = x[lengths[0] + 1, 2] = x[lengths[0] + 2, 2] = value
    x[: lengths[0], 3] = value
    ptr = pointers(lengths, device)
    out, arg, _ = run(x, ptr, None, ALL, torch.zeros(len(lengths), 6, 5, device=device).double())
    exact, exact_arg = formulas.segment_reduce_forward(x, ptr, None, ALL, EPS)
    assert torch.equal(arg, exact_arg)
    for k, name in enumerate(ALL):
        assert relative_error(out[:, k], exact[:, k]) < 1e-12, name


def test_variance_does_not_cancel(device):
    lengths = [6, 40]
    noise = torch.randn(sum(lengths), 5, dtype=torch.float64, device=device)
    x = (noise + 1e4).float()
    ptr = pointers(lengths, device)
    out, *_ = run(x, ptr, None, ("var", "std"), torch.zeros(2, 2, 5, device=device))
    exact, _ = formulas.segment_reduce_forward(x.double(), ptr, None, ("var", "std"), EPS)
    assert relative_error(out, exact) < 1e-3


def test_std_below_eps_is_zero_with_zero_gradient(device):
    x = torch.tensor([[1.0, 1.0], [1.0, 2.0]], device=device)
    ones = torch.ones(1, 1, 2, device=device)
    out, _, grad = run(x, pointers([2], device), None, ("std",), ones, eps=1e-5)
    assert out[0, 0].tolist() == [0.0, 0.5] and grad[:, 0].tolist() == [0.0, 0.0] and (grad[:, 1] != 0).all()
    out, _, grad = run(x, pointers([2], device), None, ("std",), ones, eps=0.25)
    assert (out == 0).all() and (grad == 0).all()


def test_rows_of_no_segment_get_no_gradient(device):
    x = torch.randn(7, 5, device=device)
    ptr = pointers([2, 1], device)
    for order in (None, torch.tensor([6, 1, 3], dtype=torch.int32, device=device)):
        *_, grad = run(x, ptr, order, ("sum",), torch.ones(2, 1, 5, device=device))
        used = torch.arange(3, device=device) if order is None else order.long()
        assert (grad[used] == 1).all() and int((grad != 0).sum()) == 15


def test_twice_the_same_bits(device):
    lengths = [3, 20, 2]
    x, ptr = torch.randn(25, 13, device=device), pointers(lengths, device)
    order = torch.randint(25, (25,), dtype=torch.int32).to(device)
    cotangent = torch.randn(3, 6, 13, device=device)
    for first, second in zip(run(x, ptr, order, ALL, cotangent), run(x, ptr, order, ALL, cotangent), strict=True):
        assert torch.equal(first, second)


def test_no_columns_and_no_rows(device):
    for shape, lengths in (((4, 0), [4]), ((0, 5), [0, 0]), ((0, 5), [])):
        ptr = pointers(lengths, device)
        x = torch.zeros(shape, device=device)
        out, arg, grad = run(x, ptr, None, ("sum", "max"), torch.zeros(len(lengths), 2, shape[1], device=device))
        assert out.shape == (len(lengths), 2, shape[1]) and arg.shape == (len(lengths), 1, shape[1])
        assert grad.shape == shape and (out == 0).all() and (arg == -1).all()


@pytest.mark.parametrize("reduce", ["mean", ("max", "std", "sum")])
def test_through_the_op(reduce, device, monkeypatch):
    calls = []
    for name in ("segment_reduce", "segment_reduce_backward"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=original, n=name: calls.append(n) or f(*a))
    ptr = pointers([3, 0, 12], device)
    order = torch.randperm(15).to(device)
    x = torch.randn(13, 15, device=device).T.requires_grad_()
    with backend("triton"):
        out = ops.segment_reduce(x, ptr, reduce, order=order)
        cotangent = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, x, cotangent)
    assert calls == ["segment_reduce", "segment_reduce_backward"]
    expected = reference.segment_reduce(x, ptr, reduce, order=order)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(grad, *torch.autograd.grad(expected, x, cotangent)) < 1e-5
