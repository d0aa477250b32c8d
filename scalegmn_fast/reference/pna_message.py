"""The aggregated messages of a principal neighbourhood aggregation round, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scalegmn_fast.reference.activations import activation
from scalegmn_fast.reference.segment_reduce import REDUCTIONS, STD_EPS, segment_reduce

SCALERS = ("identity", "amplification", "attenuation", "linear", "inverse_linear")
MODULATIONS = ("affine", "gate", "concat")

Linear = tuple[Tensor, Tensor]


def _check(x: Tensor, e: Tensor, pre: Sequence[Sequence[Linear]], names: dict[str, tuple], divide_input: bool) -> int:
    """F, the width of a tower's messages."""
    for name, (values, known) in names.items():
        for value in values:
            if value not in known:
                raise ValueError(f"{name}: expected {', '.join(known)}, got {value!r}")
    if not pre:
        raise ValueError("pre: expected the layers of at least one tower, got none")
    for name, rows in (("x", x), ("e", e)):
        if rows.dim() != 2:
            raise ValueError(f"{name}: expected rows of 2 dimensions, got shape {tuple(rows.shape)}")
    width = pre[0][0][0].shape[0]
    expected = width * len(pre) if divide_input else width
    if x.shape[1] != expected:
        raise ValueError(f"x: expected {expected} features, got {x.shape[1]}")
    return width


def _node_maps(x: Tensor, maps: Sequence[Tensor], bias: Tensor | None, divide_input: bool) -> Tensor:
    """[N, T * F]: every tower's map of its share of x (of all of x unless divided)."""
    if not divide_input:
        return F.linear(x, torch.cat(list(maps)), bias)
    shares = x.chunk(len(maps), dim=1)
    out = torch.cat([F.linear(share, weight) for share, weight in zip(shares, maps, strict=True)], dim=1)
    return out if bias is None else out + bias


def degree_scales(
    degree: Tensor, scalers: Sequence[str], avg_deg_log: Tensor, avg_deg_lin: Tensor
) -> list[Tensor | None]:
    """One factor [R] per scaler, None for the identity, from in-degrees [R] (floating) and averages [1]."""
    scales: list[Tensor | None] = []
    for name in scalers:
        if name == "identity":
            scales.append(None)
        elif name == "amplification":
            scales.append(torch.log(degree + 1) / avg_deg_log)
        elif name == "attenuation":
            scales.append(avg_deg_log / torch.log(degree.clamp(min=1) + 1))
        elif name == "linear":
            scales.append(degree / avg_deg_lin)
        else:
            scales.append(avg_deg_lin / degree.clamp(min=1))
    return scales


def aggregate_statistics(statistics: Tensor, degree: Tensor, aggregators: Sequence[str]) -> list[Tensor]:
    """The aggregators' results, [R, F] each, from mean, variance, minimum, maximum [R, 4 * F] and in-degrees [R]."""
    mean, var, least, largest = statistics.chunk(4, dim=1)
    found = []
    for name in aggregators:
        if name == "sum":
            found.append(mean * degree[:, None])
        elif name == "std":
            above = var > STD_EPS
            found.append(torch.where(above, torch.where(above, var, 1.0).sqrt(), 0.0))
        else:
            found.append({"mean": mean, "var": var, "min": least, "max": largest}[name])
    return found


def pna_message(
    x: Tensor,
    e: Tensor,
    source: Tensor,
    target: Tensor,
    ptr: Tensor,
    *,
    pre: Sequence[Sequence[Linear]],
    encoder: Linear,
    modulation: str,
    aggregators: Sequence[str],
    scalers: Sequence[str],
    avg_deg_log: Tensor,
    avg_deg_lin: Tensor,
    act: str = "relu",
    divide_input: bool = False,
    reduce: Callable[[Tensor, Tensor, list[str]], Tensor] = segment_reduce,
) -> Tensor:
    """Messages ``pre([x_target, x_source])``, modulated by edges, aggregated per target and scaled by its degree.

    The first linear map of ``pre`` is split over [x_target, x_source] and runs on nodes; edges gather and add.

    Args:
        x: node features [N, F], or [N, T * F] with `divide_input` (tower t reads its F features). Floating point.
        e: edge features [E, d_e].
        source, target: int64 [E], rows of x; `target` is nondecreasing and less than R.
        ptr: int32 or int64 [R + 1], edges ptr[i] to ptr[i + 1] - 1 end in row i, for the first R <= N rows of x.
        pre: per tower the (weight, bias) of its linear maps, `act` between them. Weights [F, F], but the first
            [F, 2 F], or [F, 3 F] for the modulation "concat".
        encoder: (weight, bias) of the map of e, to 2 F numbers, or F for "concat".
        modulation: "affine": scale * pre + shift with (scale, shift) = encoder(e), shared by the towers; "gate":
            sigmoid(scale) * pre, where the half of the encoder that gives the shift is not read; "concat":
            pre([x_target, x_source, encoder(e)]).
        aggregators: K names of `segment_reduce`; var is the mean of squared deviations, std is 0 where var <= 1e-5,
            ties of min and max give the gradient to the first.
        scalers: S names out of identity, amplification (log(deg + 1) / avg_log), attenuation (its inverse), linear
            (deg / avg_lin) and inverse_linear; degrees in denominators are at least 1.
        avg_deg_log, avg_deg_lin: [1].
        act: see `activations.activation`.
        divide_input: whether towers share x between them.
        reduce: `segment_reduce`, here or as an op.

    Returns:
        [R, T, S * K * F], scaler by scaler, in each aggregator by aggregator. Rows without edges are 0.

    Raises:
        ValueError: an unknown name, no tower, or shapes of x or e that do not fit.

    Linear maps run in the dtype of their inputs, reductions in float32 at least. Differentiable any number of times in
    all tensors. Deterministic. Source: Corso et al., "Principal Neighbourhood Aggregation for Graph Nets", NeurIPS
    2020; edge modulation: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural
    Networks", ICLR 2024.
    """
    names = {
        "modulation": ((modulation,), MODULATIONS),
        "aggregators": (aggregators, REDUCTIONS),
        "scalers": (scalers, SCALERS),
    }
    width = _check(x, e, pre, names, divide_input)
    towers, rows = len(pre), ptr.shape[0] - 1
    firsts = [layers[0][0] for layers in pre]
    bias = torch.cat([layers[0][1] for layers in pre])
    to_target = _node_maps(x[:rows], [weight[:, :width] for weight in firsts], bias, divide_input)
    to_source = _node_maps(x, [weight[:, width : 2 * width] for weight in firsts], None, divide_input)
    h = to_target[target] + to_source[source]
    encoder_weight, encoder_bias = encoder
    if modulation == "concat":
        maps = torch.cat([weight[:, 2 * width :] for weight in firsts])
        h = h + F.linear(e, maps @ encoder_weight, F.linear(encoder_bias, maps))
    h = h.unflatten(1, (towers, width))
    if len(pre[0]) > 1:
        h = torch.stack([_after_first(h[:, tower], layers, act) for tower, layers in enumerate(pre)], dim=1)
    if modulation == "affine":
        scale, shift = F.linear(e, encoder_weight, encoder_bias).unsqueeze(1).chunk(2, dim=-1)
        h = scale * h + shift
    elif modulation == "gate":
        h = torch.sigmoid(F.linear(e, encoder_weight[:width], encoder_bias[:width])).unsqueeze(1) * h
    reduced = reduce(h.flatten(1), ptr, list(aggregators))
    reduced = reduced.unflatten(2, (towers, width)).transpose(1, 2).flatten(2)
    degree = ptr.diff().to(reduced.dtype)
    scales = degree_scales(degree, scalers, avg_deg_log.to(reduced.dtype), avg_deg_lin.to(reduced.dtype))
    return torch.cat([reduced if scale is None else reduced * scale[:, None, None] for scale in scales], dim=2)


def _after_first(h: Tensor, layers: Sequence[Linear], act: str) -> Tensor:
    for weight, bias in layers[1:]:
        h = F.linear(activation(h, act), weight, bias)
    return h
