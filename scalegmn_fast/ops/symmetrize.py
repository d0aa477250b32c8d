"""`symmetrize`: the canonicalisations of rows under sign flips and positive scalings."""

import torch
from torch import Tensor

from scalegmn_fast import backends
from scalegmn_fast.ops import library
from scalegmn_fast.reference.symmetrize import ACTIVATIONS, KINDS, LAYER_NORM_EPS, NORMALIZE_EPS
from scalegmn_fast.reference.symmetrize import symmetrize_backward as backward_formula

_ARGUMENTS = (
    "Tensor h, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, str kind, str activation, float eps, float w0"
)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    kernel = backends.implementation("symmetrize", "forward", h)
    return kernel(*_contiguous(h, bias, norm_weight, norm_bias), kind, activation, eps, w0)


def _forward_fake(h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    torch._check(h.dim() == 2, lambda: f"h: expected rows [R, d], got {tuple(h.shape)}")
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _backward(grad, h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    kernel = backends.implementation("symmetrize", "backward", h)
    return kernel(*_contiguous(grad, h, bias, norm_weight, norm_bias), kind, activation, eps, w0)


def _backward_fake(grad, h, bias, norm_weight, norm_bias, kind, activation, eps, w0):
    torch._check(grad.shape == h.shape, lambda: f"grad: expected h's shape {tuple(h.shape)}, got {tuple(grad.shape)}")
    parameters = (h.new_empty(0) if p is None else torch.empty_like(p) for p in (bias, norm_weight, norm_bias))
    return torch.empty_like(h, memory_format=torch.contiguous_format), *parameters


_forward_op = library.define("symmetrize", f"({_ARGUMENTS}) -> Tensor", _forward, _forward_fake)
_backward_op = library.define(
    "symmetrize_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    *tensors, ctx.kind, ctx.activation, ctx.eps, ctx.w0 = inputs
    ctx.save_for_backward(*tensors)


def _first_order(ctx, grad):
    grads = _backward_op(grad, *ctx.saved_tensors, ctx.kind, ctx.activation, ctx.eps, ctx.w0)
    needed = ctx.needs_input_grad[:4]
    return (*(g if need else None for g, need in zip(grads, needed, strict=True)), None, None, None, None)


def _second_order(ctx, *cotangents):
    def formula(*tensors):
        return backward_formula(*tensors, ctx.kind, ctx.activation, ctx.eps, ctx.w0)

    grads = library.gradients_through(formula, ctx.saved_tensors, ctx.needs_input_grad[:5], cotangents)
    return (*grads, None, None, None, None)


library.register_autograd("symmetrize", _first_order, _save)
library.register_autograd("symmetrize_backward", _second_order, _save)


def _check(h, bias, norm_weight, norm_bias, kind, activation, eps):
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(h, Tensor):
        raise TypeError(f"h: expected a tensor, got {type(h).__name__}")
    if h.dim() == 0 or h.shape[-1] == 0:
        raise ValueError(f"h: expected shape [..., d] with d >= 1, got {tuple(h.shape)}")
    if h.dtype not in backends.DTYPES["reference"]:
        raise TypeError(f"h: expected float32, bfloat16, float16 or float64, got {h.dtype}")
    if eps is not None and (kind != "normalize" or eps < 0):
        raise ValueError(f"eps: expected a number >= 0, and only for kind 'normalize', got {eps} for kind {kind!r}")
    for name, parameter in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if parameter is None:
            continue
        if kind != "activation":
            raise ValueError(f"{name}: only kind 'activation' takes it, got it with kind {kind!r}")
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(parameter).__name__}")
        if parameter.shape != h.shape[-1:]:
            raise ValueError(f"{name}: expected shape {tuple(h.shape[-1:])}, got {tuple(parameter.shape)}")
        if parameter.dtype not in backends.DTYPES["reference"]:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {parameter.dtype}")
        if parameter.device != h.device:
            raise ValueError(f"{name}: expected device {h.device} (h's), got {parameter.device}")
    if (norm_weight is None) != (norm_bias is None):
        given, missing = ("norm_weight", "norm_bias") if norm_bias is None else ("norm_bias", "norm_weight")
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")


def symmetrize(
    h: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kind: str = "activation",
    activation: str = "silu",
    eps: float | None = None,
    w0: float = 30.0,
) -> Tensor:
    """Maps every row h to something that does not change under h -> -h, or under h -> q h with q > 0.

    kind "activation": act(LN(h + bias)) + act(LN(-h + bias)), the hidden layer of rho(x) + rho(-x) with h = W x;
        LN is layer normalisation over d (eps 1e-5) and present if norm_weight and norm_bias are.
    kind "abs": |h|; gradient 0 at 0.
    kind "normalize": h / (||h||_2 + eps); rows of norm 0 give 0 with zero gradient, for eps = 0 as well.

    Args:
        h: [..., d], float32, bfloat16, float16 or float64, any strides.
        bias, norm_weight, norm_bias: [d] on h's device, for kind "activation"; norm_weight and norm_bias together or
            not at all. They may have another floating dtype than h (float32 parameters under autocast) and are used,
            and get their gradients, in their own.
        activation: identity, relu, elu, silu, tanh, sigmoid, or sine, sin(w0 x).
        eps: for kind "normalize", 1e-10 if None.
    Returns:
        Shape and dtype of h, contiguous. Computed in float32 (float64 for float64) and cast once, also under autocast.
    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        scalegmn_fast.backends.BackendError: the backend chosen explicitly cannot serve the call.

    Backward recomputes from h: only the arguments are saved. Deterministic: gradients of the parameters are summed in
    an order that depends on the number of rows alone. Second derivatives differentiate the reference's formula.
    Source: Kalogeropoulos et al., "Scale Equivariant Graph Metanetworks", NeurIPS 2024, section 5.
    """
    _check(h, bias, norm_weight, norm_bias, kind, activation, eps)
    if eps is None:
        eps = NORMALIZE_EPS if kind == "normalize" else LAYER_NORM_EPS
    rows = h.reshape(-1, h.shape[-1])
    out = torch.ops.scalegmn_fast.symmetrize(
        rows, bias, norm_weight, norm_bias, kind, activation, float(eps), float(w0)
    )
    return out.view(h.shape)
