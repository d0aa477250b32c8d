"""Activation functions and their derivatives on tiles in float32 or float64.

The interpreter runs the same formulas as a GPU; there float32 exponentials and reciprocals are single instructions.
NaN propagates through every one of them.
"""

import triton
import triton.language as tl

from .tiles import INTERPRETED

ACTIVATIONS = ("identity", "relu", "elu", "silu", "tanh", "sigmoid", "sine")


@triton.jit
def exp(x):
    """e^x. In float32 on a GPU a product and one instruction, whose results below 2^-126 are 0, instead of five."""
    if x.dtype == tl.float32 and not INTERPRETED:
        found = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        found = tl.exp(x)
    return found


@triton.jit
def reciprocal(x):
    """1 / x. In float32 on a GPU one instruction, whose results below 2^-126 are 0, instead of six."""
    if x.dtype == tl.float32 and not INTERPRETED:
        found = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        found = 1.0 / x
    return found


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: Taylor's polynomial below 0.35, to the rounding of x's type."""
    near = tl.where(tl.abs(x) < 0.35, x, 0.0)
    series = near * 0.0 + 1.0
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    for term in tl.static_range(TERMS, 1, -1):
        series = 1.0 + near * series * (1.0 / term)
    return tl.where(tl.abs(x) < 0.35, near * series, exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + exp(-x))


@triton.jit
def tanh(x):
    decay = expm1(-2.0 * tl.abs(x))
    magnitude = -decay * reciprocal(decay + 2.0)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, W0: tl.constexpr):
    """act(x). ``sine`` is sin(W0 x); ``elu`` has alpha = 1; ``gelu`` (row programs alone) is the exact one."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "elu":
        return tl.where(x > 0.0, x, expm1(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    elif ACTIVATION == "sigmoid":
        return sigmoid(x)
    elif ACTIVATION == "sine":
        return tl.sin(W0 * x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr, W0: tl.constexpr):
    """act'(x); 0 at the kink of ``relu``."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, x * 0.0)
    elif ACTIVATION == "elu":
        return tl.where(x > 0.0, 1.0, exp(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    elif ACTIVATION == "silu":
        gate = sigmoid(x)
        return gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "tanh":
        value = tanh(x)
        return 1.0 - value * value
    elif ACTIVATION == "sigmoid":
        gate = sigmoid(x)
        return gate * (1.0 - gate)
    elif ACTIVATION == "sine":
        return W0 * tl.cos(W0 * x)
    elif ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + 0.3989422804014327 * x * exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return x * 0.0 + 1.0
