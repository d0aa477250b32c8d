import importlib

import pytest
import torch
import triton
import triton.language as tl
from scalegmn_fast.kernels import activations, tiles
from scalegmn_fast.kernels import symmetrize as kernels

from scalegmn_fast import backend, ops, reference
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned, relative_error

# The package attribute of this name is the function.
formulas = importlib.import_module("scalegmn_fast.reference.symmetrize")

EPS = 1e-10
W0 = 3.0


def case(rows, width, dtype, device, parameters="bias norm", parameter_dtype=None):
    """h [rows, width], then bias, norm_weight, norm_bias [width] or None, and a cotangent of h's shape."""
    h, cotangent = torch.randn(2, rows, width, dtype=torch.float64, device=device).to(dtype)
    given = ("bias" in parameters, "norm" in parameters, "norm" in parameters)
    values = torch.randn(3, width, dtype=torch.float64, device=device).to(parameter_dtype or dtype)
    return [h, *(v.clone() if g else None for v, g in zip(values, given, strict=True))], cotangent


def run(tensors, cotangent, kind="activation", activation="silu", eps=EPS):
    """Output and gradients of the kernels, all memory they allocate poisoned."""
    with nan_poisoned():
        out = kernels.symmetrize(*tensors, kind, activation, eps, W0)
        grads = kernels.symmetrize_backward(cotangent, *tensors, kind, activation, eps, W0)
    for tensor, grad in zip(tensors, grads, strict=True):
        like = tensors[0].new_empty(0) if tensor is None else tensor
        assert (grad.shape, grad.dtype) == (like.shape, like.dtype)
    return [out, *(grad for tensor, grad in zip(tensors, grads, strict=True) if tensor is not None)]


def formula(tensors, cotangent, kind="activation", activation="silu", eps=EPS, dtype=None):
    """Output and gradients of the reference, differentiated by autograd, computed in `dtype` (default: as given)."""
    leaves = [None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = reference.symmetrize(*leaves, kind=kind, activation=activation, eps=eps, w0=W0)
    given = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, given, cotangent.to(out.dtype))]


def assert_as_formula(tensors, cotangent, **options):
    actual = run(tensors, cotangent, **options)
    eager = formula(tensors, cotangent, **options)
    exact = formula(tensors, cotangent, **options, dtype=torch.float64)
    names = ["out", "grad_h", *(f"gradient {k} of the parameters" for k in range(3))]
    for name, a, e, x in zip(names, actual, eager, exact, strict=False):
        assert_close_to_float64(a, e, x, name=name)


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_every_activation(activation, device):
    tensors, cotangent = case(33, 5, torch.float64, device)
    assert_as_formula(tensors, cotangent, activation=activation)
    assert_as_formula([*tensors[:2], None, None], cotangent, activation=activation)


def test_the_kernels_know_the_activations_of_the_reference():
    assert set(activations.ACTIVATIONS) == set(formulas.ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["activation", "abs", "normalize"])
def test_low_precision_is_as_near_to_float64_as_eager(kind, dtype, device):
    assert_as_formula(*case(40, 48, dtype, device, "bias norm" if kind == "activation" else ""), kind=kind)


@pytest.mark.parametrize("parameters", ["", "bias", "norm", "bias norm"])
def test_float32_parameters_of_a_bfloat16_row(parameters, device):
    tensors, cotangent = case(9, 33, torch.bfloat16, device, parameters, torch.float32)
    actual = run(tensors, cotangent)
    exact = formula(tensors, cotangent, dtype=torch.float64)
    for a, x in zip(actual, exact, strict=True):
        assert relative_error(a, x) < (1e-2 if a.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("width", [1, 5, 13, 33, 123, 128, 600, 2049])
@pytest.mark.parametrize("kind", ["activation", "abs", "normalize"])
def test_widths(kind, width, device):
    """One column leaves nothing of a LayerNorm, and only eps for the gradient of a norm to depend on."""
    parameters = "" if kind != "activation" else "bias" if width == 1 else "bias norm"
    assert_as_formula(*case(1 if width > 512 else 5, width, torch.float64, device, parameters), kind=kind, eps=0.1)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 300])
def test_rows_around_the_tile_and_several_tiles_per_program(rows, device, monkeypatch):
    monkeypatch.setattr(kernels, "PARTIAL_ROWS", 3)
    assert tiles.row_tile(30)["BLOCK_ROWS"] == 32
    assert_as_formula(*case(rows, 30, torch.float64, device))


def test_more_programs_than_the_parameter_kernel_sums_at_a_time(device, monkeypatch):
    monkeypatch.setitem(kernels.PARTIAL_TILE, "BLOCK_ROWS", 2)
    rows = 5 * tiles.row_tile(100)["BLOCK_ROWS"]
    assert_as_formula(*case(rows, 100, torch.float64, device))


@pytest.mark.parametrize("eps", [0.0, 1e-10, 1e-3])
def test_normalize_of_zero_tiny_and_huge_rows(eps, device):
    h = torch.randn(6, 13, device=device)
    h[1] = 0
    h[2] *= 1e-30
    h[3] *= 1e30
    h[4, 1:] = 0
    cotangent = torch.randn_like(h)
    cotangent[2] = 0  # the gradient of a row of norm 1e-30 does not fit into float32
    tensors = [h, None, None, None]
    out, grad = run(tensors, cotangent, kind="normalize", eps=eps)
    exact, exact_grad = formula(tensors, cotangent, kind="normalize", eps=eps, dtype=torch.float64)
    for row in range(len(h)):
        assert relative_error(out[row], exact[row]) < 1e-6
        assert relative_error(grad[row], exact_grad[row]) < 1e-5
    assert (out[1] == 0).all() and (grad[1] == 0).all()


def test_abs_has_gradient_zero_at_zero(device):
    h = torch.tensor([[-2.0, -0.0, 0.0, 3.0]], device=device)
    out, grad = run([h, None, None, None], torch.full_like(h, 5.0), kind="abs")
    assert out.tolist() == [[2.0, 0.0, 0.0, 3.0]] and grad.tolist() == [[-5.0, 0.0, 0.0, 5.0]]


@pytest.mark.parametrize("kind,activation", [("normalize", "silu"), ("activation", "relu"), ("activation", "elu")])
def test_nan_stays_in_its_row(kind, activation, device):
    tensors, cotangent = case(5, 13, torch.float32, device, "norm" if kind == "activation" else "")
    tensors[0][2, 3] = float("nan")
    out, grad, *_ = run(tensors, cotangent, kind=kind, activation=activation)
    bad = torch.arange(5, device=device) == 2
    assert out[bad].isnan().all() and grad[bad].isnan().all()
    assert out[~bad].isfinite().all() and grad[~bad].isfinite().all()


@triton.jit
def apply_kernel(
    x, out, elements, ACTIVATION: tl.constexpr, W0: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < elements, other=0.0)
    if SLOPE:
        value = activations.activation_derivative(value, ACTIVATION, W0)
    else:
        value = activations.activate(value, ACTIVATION, W0)
    tl.store(out + at, value, mask=at < elements)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_activations_keep_relative_accuracy_near_zero(activation, dtype, device):
    magnitude = torch.logspace(-30, 0, 90, dtype=dtype, device=device)
    x = torch.cat([-magnitude, magnitude])
    for slope, exact in enumerate(formulas.ACTIVATIONS[activation]):
        out = torch.empty_like(x)
        apply_kernel[(1,)](x, out, x.numel(), activation, W0, bool(slope), BLOCK=256)
        rounding = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact(x.double(), W0), rtol=rounding, atol=rounding * slope)


def test_twice_the_same_bits(device):
    tensors, cotangent = case(130, 13, torch.float32, device)
    for first, second in zip(run(tensors, cotangent), run(tensors, cotangent), strict=True):
        assert torch.equal(first, second)


def test_no_rows(device):
    tensors, cotangent = case(0, 5, torch.float32, device)
    out, grad, *parameters = run(tensors, cotangent)
    assert out.shape == grad.shape == (0, 5)
    assert all((p == 0).all() for p in parameters)


def test_rows_wider_than_registers_are_refused(device):
    tensors, cotangent = case(1, tiles.MAX_WIDTH + 1, torch.float32, device, "")
    with pytest.raises(ValueError, match="h: expected at most 4096 columns.*got 4097"):
        run(tensors, cotangent)
    assert run(tensors, cotangent, kind="abs")[0].equal(tensors[0].abs())


@pytest.mark.parametrize("kind", ["activation", "abs", "normalize"])
def test_through_the_op(kind, device, monkeypatch):
    calls = []
    for name in ("symmetrize", "symmetrize_backward"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=original, n=name: calls.append(n) or f(*a))
    h = torch.randn(3, 13, 2, device=device).transpose(1, 2).requires_grad_()
    parameters = [torch.randn(13, device=device, requires_grad=r) for r in (True, False, True)]
    parameters = parameters if kind == "activation" else []
    cotangent = torch.randn(3, 2, 13, device=device)
    wanted = [t for t in (h, *parameters) if t.requires_grad]
    with backend("triton"):
        out = ops.symmetrize(h, *parameters, kind=kind)
        grads = torch.autograd.grad(out, wanted, cotangent)
    assert calls == ["symmetrize", "symmetrize_backward"]
    expected = reference.symmetrize(h, *parameters, kind=kind)
    for a, e in zip([out, *grads], [expected, *torch.autograd.grad(expected, wanted, cotangent)], strict=True):
        assert relative_error(a, e) < 1e-5
