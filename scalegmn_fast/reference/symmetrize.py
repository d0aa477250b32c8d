"""`symmetrize` in plain PyTorch: the formula, and its backward formula in closed form."""

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-5
NORMALIZE_EPS = 1e-10


def _elu_derivative(y: Tensor) -> Tensor:
    return torch.where(y > 0, torch.ones_like(y), torch.exp(y.clamp(max=0)))


def _silu_derivative(y: Tensor) -> Tensor:
    s = torch.sigmoid(y)
    return s * (1 + y * (1 - s))


def _sigmoid_derivative(y: Tensor) -> Tensor:
    s = torch.sigmoid(y)
    return s * (1 - s)


# name: (act(y, w0), act'(y, w0))
ACTIVATIONS = {
    "identity": (lambda y, w0: y, lambda y, w0: torch.ones_like(y)),
    "relu": (lambda y, w0: F.relu(y), lambda y, w0: (y > 0).to(y.dtype)),
    "elu": (lambda y, w0: F.elu(y), lambda y, w0: _elu_derivative(y)),
    "silu": (lambda y, w0: F.silu(y), lambda y, w0: _silu_derivative(y)),
    "tanh": (lambda y, w0: torch.tanh(y), lambda y, w0: 1 - torch.tanh(y) ** 2),
    "sigmoid": (lambda y, w0: torch.sigmoid(y), lambda y, w0: _sigmoid_derivative(y)),
    "sine": (lambda y, w0: torch.sin(w0 * y), lambda y, w0: w0 * torch.cos(w0 * y)),
}
KINDS = ("activation", "abs", "normalize")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _row_norm(h: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of each row [..., 1] and where it is zero; a zero row gets the norm 1, so that derivatives stay finite.

    Rows are first brought by a power of two to where their squares neither overflow nor vanish in float32.
    """
    largest = h.detach().abs().amax(-1, keepdim=True)
    factor = torch.where(largest > 2.0**50, 2.0**-70, torch.where(largest < 2.0**-50, 2.0**90, 1.0)).to(h.dtype)
    square = (h * factor).square().sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, torch.ones_like(square), square).sqrt() / factor, zero


def symmetrize_forward(
    h: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str,
    activation: str,
    eps: float,
    w0: float,
) -> Tensor:
    """The formula, with the op's positional signature."""
    dtype = compute_dtype(h.dtype)
    rows = h.to(dtype)
    if kind == "abs":
        return rows.abs().to(h.dtype)
    if kind == "normalize":
        norm, zero = _row_norm(rows)
        return torch.where(zero, torch.zeros_like(rows), rows / (norm + eps)).to(h.dtype)

    bias, norm_weight, norm_bias = (_to(p, dtype) for p in (bias, norm_weight, norm_bias))
    act, _ = ACTIVATIONS[activation]

    def branch(z: Tensor) -> Tensor:
        if bias is not None:
            z = z + bias
        if norm_weight is not None:
            z = F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, LAYER_NORM_EPS)
        return act(z, w0)

    return (branch(rows) + branch(-rows)).to(h.dtype)


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
    """`scalegmn_fast.ops.symmetrize` as a formula: same arguments, h [..., d] of any strides, differentiable."""
    eps = NORMALIZE_EPS if eps is None else eps
    return symmetrize_forward(h, bias, norm_weight, norm_bias, kind, activation, eps, w0)


def symmetrize_backward(
    grad: Tensor,
    h: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: str,
    activation: str,
    eps: float,
    w0: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <grad, symmetrize(h, ...)> for h, bias, norm_weight and norm_bias (absent ones: empty, shape [0]).

    In closed form and itself differentiable, so that second derivatives are derivatives of this function.
    """
    dtype = compute_dtype(h.dtype)
    rows, g = h.to(dtype), grad.to(dtype)
    absent = [h.new_empty(0) for _ in range(3)]
    if kind == "abs":
        return (g * rows.sign()).to(h.dtype), *absent
    if kind == "normalize":
        norm, zero = _row_norm(rows)
        scale = norm + eps
        along = (g * rows).sum(-1, keepdim=True) / (norm * scale * scale)
        grad_h = torch.where(zero, torch.zeros_like(rows), g / scale - rows * along)
        return grad_h.to(h.dtype), *absent

    b, weight, shift = (_to(p, dtype) for p in (bias, norm_weight, norm_bias))
    _, derivative = ACTIVATIONS[activation]
    grad_h, grad_b, grad_weight, grad_shift = [], [], [], []
    for sign in (1, -1):
        z = sign * rows
        if b is not None:
            z = z + b
        if weight is None:
            grad_z = g * derivative(z, w0)
        else:
            centered = z - z.mean(-1, keepdim=True)
            rstd = torch.rsqrt((centered * centered).mean(-1, keepdim=True) + LAYER_NORM_EPS)
            normed = centered * rstd
            grad_y = g * derivative(normed * weight + shift, w0)
            grad_weight.append((grad_y * normed).flatten(0, -2).sum(0))
            grad_shift.append(grad_y.flatten(0, -2).sum(0))
            grad_n = grad_y * weight
            grad_z = rstd * (grad_n - grad_n.mean(-1, keepdim=True) - normed * (grad_n * normed).mean(-1, keepdim=True))
        grad_h.append(sign * grad_z)
        grad_b.append(grad_z.flatten(0, -2).sum(0))
    return (
        sum(grad_h).to(h.dtype),
        absent[0] if bias is None else sum(grad_b).to(bias.dtype),
        absent[1] if norm_weight is None else sum(grad_weight).to(norm_weight.dtype),
        absent[2] if norm_bias is None else sum(grad_shift).to(norm_bias.dtype),
    )
