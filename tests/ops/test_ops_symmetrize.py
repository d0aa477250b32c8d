"""The op `symmetrize` on every backend."""

import itertools

import pytest
import torch

from scalegmn_fast import ops, reference
from scalegmn_fast.reference.symmetrize import ACTIVATIONS
from scalegmn_fast.testing import assert_close_to_float64, nan_poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 5, 13, 33, 123, 128)
KINDS = [("activation", name) for name in ACTIVATIONS] + [("abs", "identity"), ("normalize", "identity")]


def draw(rows, width, parameters, dtype, device, seed=0):
    """h and the first `parameters` of bias, norm_weight and norm_bias, with values that `dtype` represents."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return [randn(rows, width), *[randn(width) for _ in range(parameters)]]


def results(function, tensors, grad, **options):
    """Output and gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out))]


def with_parameters(kind, width):
    return (0, 1, 3) if kind == "activation" and width > 1 else (0, 1) if kind == "activation" else (0,)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "activation"), KINDS)
def test_result_and_gradients_against_float64(device, kind, activation, dtype, request):
    if dtype == torch.float64 and "triton" in request.node.name:
        pytest.skip("the triton backend refuses float64: test_backends.py")
    for width in (*WIDTHS, 600):
        rows = 70 if width < 600 else 3
        for parameters in with_parameters(kind, width):
            tensors = draw(rows, width, parameters, dtype, device)
            grad = torch.randn(rows, width, dtype=torch.float64).to(dtype)
            # at width 1 and without eps, h / ||h|| has no gradient to compare
            options = {"kind": kind, "activation": activation, "w0": 3.0, "eps": 0.5 if kind == "normalize" else None}
            # float64 itself is measured against float64 with another way of summing
            lower = torch.float32 if dtype == torch.float64 else dtype
            exact = results(reference.symmetrize, [t.double().cpu() for t in tensors], grad.double(), **options)
            eager = results(reference.symmetrize, [t.to(lower) for t in tensors], grad.to(lower), **options)
            actual = results(ops.symmetrize, tensors, grad, **options)
            names = ("result", "grad h", "grad bias", "grad norm_weight", "grad norm_bias")
            for name, a, e, x in zip(names, actual, eager, exact, strict=False):
                e = x.to(dtype) if dtype == torch.float64 else e
                # a sum over the rows rounds in its own order: more units than a single row's result; float64 has no
                # eager error to be measured by
                scale = 16 if name == "result" and dtype != torch.float64 else 64
                if kind == "activation" and x.abs().max() < 1e-12:  # odd functions cancel
                    assert a.double().abs().max() < 64 * torch.finfo(dtype).eps, name
                    continue
                message = f"{name} at width {width}, {parameters} parameters"
                assert_close_to_float64(a, e, x, ulps=scale, name=message)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parameters", [0, 1, 3])
def test_first_and_second_derivatives_by_finite_differences(float64_device, activation, parameters):
    # rows a little apart from 0, where relu and elu are not smooth
    h, *rest = draw(3, 4, parameters, torch.float64, float64_device)
    h = h + 0.1 * h.sign()
    tensors = [t.requires_grad_() for t in (h, *rest)]

    def function(*tensors):
        return ops.symmetrize(*tensors, activation=activation, w0=2.0)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize(("kind", "eps"), [("abs", None), ("normalize", 0.0), ("normalize", 0.3)])
def test_derivatives_of_the_other_kinds_by_finite_differences(float64_device, kind, eps):
    (h,) = draw(3, 4, 0, torch.float64, float64_device)
    h.requires_grad_()

    def function(h):
        return ops.symmetrize(h, kind=kind, eps=eps)

    assert torch.autograd.gradcheck(function, h)
    assert torch.autograd.gradgradcheck(function, h)


@pytest.mark.parametrize("width", [123, 128])
def test_gradient_by_finite_differences_at_production_widths(float64_device, width):
    tensors = [t.requires_grad_() for t in draw(2, width, 3, torch.float64, float64_device)]
    assert torch.autograd.gradcheck(lambda *t: ops.symmetrize(*t), tensors, fast_mode=True)


def test_third_derivative_is_the_derivative_of_the_second(float64_device):
    tensors = [t.requires_grad_() for t in draw(2, 3, 1, torch.float64, float64_device)]

    def third(function):
        out = function(*tensors, activation="sine", w0=2.0)
        first = torch.autograd.grad((out**2).sum(), tensors[0], create_graph=True)
        second = torch.autograd.grad((first[0] ** 2).sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(second[0].sum(), tensors)

    for actual, expected in zip(third(ops.symmetrize), third(reference.symmetrize), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_registration_is_consistent(float64_device):
    h, *parameters = (t.requires_grad_() for t in draw(4, 5, 3, torch.float64, float64_device))
    for given in (parameters, [parameters[0], None, None], [None, None, None]):
        options = ("activation", "silu", 1e-5, 30.0)
        torch.library.opcheck(torch.ops.scalegmn_fast.symmetrize, (h, *given, *options))
        grad = torch.randn_like(h).requires_grad_()
        torch.library.opcheck(torch.ops.scalegmn_fast.symmetrize_backward, (grad, h, *given, *options))


def test_compiles_into_one_graph_for_all_sizes(device):
    def function(h, bias, weight, shift):
        return ops.symmetrize(h * 2, bias, weight, shift, activation="tanh") + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 9, 1):
        tensors = draw(rows, 8, 3, torch.float32, device)
        grad = torch.randn(rows, 8)
        for actual, expected in zip(results(compiled, tensors, grad), results(function, tensors, grad), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sign_flip_changes_no_bit(native_device, activation, dtype):
    for width in (13, 128):
        h, *parameters = draw(40, width, 3, dtype, native_device)
        grad = torch.randn(40, width)
        for count in (0, 1, 3):
            plus = results(ops.symmetrize, [h, *parameters[:count]], grad, activation=activation)
            minus = results(ops.symmetrize, [-h, *parameters[:count]], grad, activation=activation)
            torch.testing.assert_close(minus[0], plus[0], rtol=0, atol=0)
            torch.testing.assert_close(minus[1], -plus[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalize_ignores_powers_of_two_and_zero_rows_have_no_gradient(device, dtype):
    (h,) = draw(6, 33, 0, dtype, device)
    h[2] = 0
    grad = torch.randn(6, 33)
    scaled, plain = (results(ops.symmetrize, [x], grad, kind="normalize", eps=0.0)[0] for x in (4 * h, h))
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0)
    for eps in (0.0, 1e-10):
        out, grad_h = results(ops.symmetrize, [h], grad, kind="normalize", eps=eps)
        assert (out[2] == 0).all() and (grad_h[2] == 0).all()
        assert out.isfinite().all() and grad_h.isfinite().all()


def test_normalize_reaches_the_ends_of_float32(device):
    (h,) = draw(1, 16, 0, torch.float32, device)
    for factor in (1e-35, 1e-25, 1e25, 1e37):
        out = ops.symmetrize(h * factor, kind="normalize", eps=0.0)
        torch.testing.assert_close(out.norm(), torch.ones((), device=device))


def test_abs_has_gradient_zero_at_zero(device):
    h = torch.tensor([[-2.0, -0.0, 0.0, 3.0]], device=device)
    out, grad = results(ops.symmetrize, [h], torch.ones(1, 4), kind="abs")
    assert out.tolist() == [[2, 0, 0, 3]] and grad.tolist() == [[-1, 0, 0, 1]]


@pytest.mark.parametrize("activation", ["silu", "sine", "elu", "tanh", "relu", "sigmoid", "identity"])
def test_nan_stays_in_its_row(device, activation):
    h, *parameters = draw(5, 13, 3, torch.float32, device)
    h[3, 4] = float("nan")
    out = ops.symmetrize(h, *parameters, activation=activation)
    assert out[3].isnan().all() and out[[0, 1, 2, 4]].isfinite().all()
    assert ops.symmetrize(h, activation=activation)[3].isnan().sum() == 1
    assert ops.symmetrize(h, kind="abs")[3].isnan().sum() == 1
    assert ops.symmetrize(h, kind="normalize")[3].isnan().any()


def test_large_arguments_of_sine_keep_their_phase(native_device):
    h = torch.linspace(-3e4, 3e4, 999, device=native_device)[:, None].requires_grad_()
    bias = torch.full((1,), 0.7, device=native_device)
    out = ops.symmetrize(h, bias, activation="sine", w0=30.0)
    # the product is rounded to float32 once, its sine is not
    exact = sum(torch.sin((30.0 * (s * h + bias)).double()) for s in (1, -1))
    assert (out - exact).abs().max() < 4e-7


@pytest.mark.parametrize("width", [1, 33, 128, 2100])
def test_every_element_is_written(device, width):
    for kind, count in (("activation", 3), ("activation", 0), ("abs", 0), ("normalize", 0)):
        tensors = draw(37, width, count, torch.float32, device)
        with nan_poisoned():
            for result in results(ops.symmetrize, tensors, torch.ones(37, width), kind=kind):
                assert result.isfinite().all()


def test_same_bits_every_time_and_for_any_number_of_threads(native_device):
    tensors = draw(5000, 33, 3, torch.float32, native_device)
    grad = torch.randn(5000, 33)
    threads = torch.get_num_threads()
    first = results(ops.symmetrize, tensors, grad)
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for again, expected in zip(results(ops.symmetrize, tensors, grad), first, strict=True):
                torch.testing.assert_close(again, expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_no_rows(device):
    tensors = draw(0, 7, 3, torch.float32, device)
    out, grad_h, *rest = results(ops.symmetrize, tensors, torch.ones(0, 7))
    assert out.shape == grad_h.shape == (0, 7)
    for grad in rest:
        assert grad.tolist() == [0.0] * 7


def test_any_leading_shape_and_any_strides(device):
    base = torch.randn(4, 6, 10, device=device)
    weights = torch.randn(3, 6, device=device)
    for h in (
        base[..., :6],
        base.transpose(1, 2),
        base[:, ::2, 1:7],
        torch.randn(6, device=device),
        torch.randn(1, 6, device=device).expand(5, 6),
        torch.randn(6, 1, device=device).expand(6, 6),
    ):
        expected = ops.symmetrize(h.clone(memory_format=torch.contiguous_format), *weights)
        actual = ops.symmetrize(h, *weights)
        assert actual.shape == h.shape and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_any_strides_of_the_gradient(device):
    tensors = draw(5, 6, 3, torch.float32, device)
    dense = torch.randn(6, 5, device=device).t()
    for grad in (dense, dense[:1].expand(5, 6), dense[0, 0].expand(5, 6)):
        strided = results(ops.symmetrize, tensors, grad)
        contiguous = results(ops.symmetrize, tensors, grad.contiguous())
        for actual, expected in zip(strided, contiguous, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_gradients_only_where_they_are_wanted(device):
    tensors = draw(5, 6, 3, torch.float32, device)
    full = results(ops.symmetrize, tensors, torch.ones(5, 6))[1:]
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        ops.symmetrize(*leaves).sum().backward()
        for leaf, expected, w in zip(leaves, full, wanted, strict=True):
            if w:
                torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_rows_dtype_and_the_parameters_precision(device, dtype):
    h, *parameters = draw(9, 16, 3, torch.float32, device)
    plain = results(ops.symmetrize, [h.to(dtype), *parameters], torch.ones(9, 16))
    with torch.autocast(device, dtype=dtype):
        inside = results(ops.symmetrize, [h.to(dtype), *parameters], torch.ones(9, 16))
        wide = ops.symmetrize(h, *parameters)
    assert [t.dtype for t in inside] == [dtype, dtype, torch.float32, torch.float32, torch.float32]
    assert wide.dtype == torch.float32
    for actual, expected in zip(inside, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


H = torch.zeros(3, 4)
D = torch.zeros(4)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "h: expected a tensor, got list", ([1.0],), {}),
        (TypeError, "h: expected float32, .* got torch.int64", (H.long(),), {}),
        (ValueError, r"h: expected shape \[..., d\] with d >= 1, got \(\)", (torch.zeros(()),), {}),
        (ValueError, r"h: .* got \(3, 0\)", (torch.zeros(3, 0),), {}),
        (ValueError, r"bias: expected shape \(4,\), got \(3,\)", (H, D[:3]), {}),
        (ValueError, r"norm_weight: expected shape \(4,\), got \(1, 4\)", (H, None, D[None], D), {}),
        (TypeError, "norm_bias: expected float32, .* got torch.int32", (H, None, D, D.int()), {}),
        (TypeError, "bias: expected a tensor, got float", (H, 1.0), {}),
        (ValueError, "bias: expected device cpu .*, got meta", (H, D.to("meta")), {}),
        (ValueError, "norm_bias: expected a tensor because norm_weight is given", (H, None, D, None), {}),
        (ValueError, "norm_weight: expected a tensor because norm_bias is given", (H, None, None, D), {}),
        (ValueError, "kind: expected one of activation, abs, normalize, got 'sign'", (H,), {"kind": "sign"}),
        (ValueError, "activation: expected one of .*, got 'gelu'", (H,), {"activation": "gelu"}),
        (ValueError, "bias: only kind 'activation' takes it", (H, D), {"kind": "abs"}),
        (ValueError, "eps: .* got -1.0", (H,), {"kind": "normalize", "eps": -1.0}),
        (ValueError, "eps: .* only for kind 'normalize', got 0.1 for kind 'activation'", (H,), {"eps": 0.1}),
    ],
)
def test_wrong_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        ops.symmetrize(*arguments, **options)
