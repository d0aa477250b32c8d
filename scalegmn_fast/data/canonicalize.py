"""Rewrite every network of a packed dataset into the canonical one of its symmetry class.

A hidden neuron with incoming weights w, bias b and outgoing weights v may be replaced, without changing the function,
by

- sine, sin(w0 (x w + b)): (w, b + 2 pi / w0, v), (-w, pi / w0 - b, v), (-w, -b, -v);
- tanh: (-w, -b, -v);
- relu: (q w, q b, v / q), q > 0.

Canonical representatives:

- sine: w0 b in [0, pi / 2]. At the two ends two of them remain: (w, 0, v) and (-w, 0, -v); (w, pi / 2 / w0, v) and
  (-w, pi / 2 / w0, v). There the entry of w of the largest magnitude, the first of equals, is made positive. A phase
  within 64 roundings (eps times its size, at least eps) of an end counts as the end, so that a network and its shifted
  version, whose biases differ by rounding, do not land on opposite sides.
- tanh: b > 0; with b = 0 the same rule for w.
- relu, if asked for: the vector (w, b) has norm 1.
- A neuron with w = 0 and b = 0 is constantly 0, whatever its outgoing weights are: they become 0.

Limit: a phase that is neither at an end nor clearly away from it, about those 64 roundings off, can count as the end in
one version and not in a shifted one, whose bias is rounded more coarsely; the two then differ by a sign. The function
is unchanged either way.

Layers are taken from the input to the output, so that a layer is canonical before the next one reads its signs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from .inr import ACTIVATIONS, layer_w0
from .optional import progress
from .packed import PackedDataset, write_packed

__all__ = ["canonicalize"]

# A phase within this many roundings of the end of its range counts as the end; so does a norm that close to 1.
_ROUNDINGS = 64.0
_CHUNK = 4096


def _leading_sign(rows: torch.Tensor) -> torch.Tensor:
    """±1 [B, n]: the sign of the entry of largest magnitude of rows [B, n, k], the first of equals; 1 for zero rows."""
    leading = rows.gather(2, rows.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    return torch.where(leading < 0, -1.0, 1.0).to(rows)


def _sine_factors(
    incoming: torch.Tensor, bias: torch.Tensor, w0: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of the incoming and of the outgoing weights, and the new biases: [B, n] each."""
    phase = w0 * bias
    half_turns = torch.round(phase / math.pi)
    rest = phase - half_turns * math.pi
    # (w, b + k pi / w0, v) is (w, b, (-1)^k v); a negative b is then turned by the sign symmetry.
    parity = 1.0 - 2.0 * torch.remainder(half_turns, 2.0)
    flip = torch.where(rest < 0, -1.0, 1.0).to(rest)
    reduced = torch.where(half_turns == 0, bias.abs(), rest.abs() / w0)
    # Judged by what will be stored, so that a second pass comes to the same conclusion.
    stored = w0 * reduced.to(dtype).double()
    tolerance = _ROUNDINGS * torch.finfo(dtype).eps * phase.abs().clamp_min(1.0)
    at_zero = stored <= tolerance
    at_end = math.pi / 2 - stored <= tolerance
    new_bias = torch.where(at_zero, 0.0, torch.where(at_end, math.pi / 2 / w0, reduced))
    tie = _leading_sign(incoming)
    factor_in = torch.where(at_zero | at_end, tie, flip)
    factor_out = parity * torch.where(at_zero, tie, flip)
    return factor_in, factor_out, new_bias


def _relu_factors(
    incoming: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_sine_factors`."""
    norm = torch.cat([incoming, bias.unsqueeze(2)], dim=2).norm(dim=2)
    # A norm that is 1 to rounding is left alone, so that a second pass changes no bit.
    norm = torch.where(((norm - 1.0).abs() <= _ROUNDINGS * torch.finfo(dtype).eps) | (norm == 0), 1.0, norm)
    return 1.0 / norm, norm, bias / norm


def canonicalize(
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    activation: str = "sine",
    w0: float | Sequence[float] = 30.0,
    normalize_scale: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Canonical representatives of B networks; the functions they compute do not change, beyond rounding.

    ``weights[l]`` [B, n_in, n_out(, d_e)] and ``biases[l]`` [B, n_out(, 1)], float32 or float64; new tensors of the
    same shapes and dtypes. ``activation`` of the hidden layers: sine (``sin(w0 (x W + b))``, ``w0`` one value or one
    per hidden layer), tanh, or relu with ``normalize_scale=True``. The rules are in this module's docstring. Computed
    in float64; signs are applied exactly, so sine changes nothing but signs and biases. Applying it again changes no
    bit. Networks that differ by shifts, reflections, signs (relu: scales) become equal up to the rounding of their
    parameters. Permutations are left as they are. The last layer's biases stay; its weights, and those of every layer,
    take up the signs of the layer before.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation == "relu" and not normalize_scale:
        raise ValueError("activation: relu networks have neither phase nor sign symmetry; ask for normalize_scale")
    if activation != "relu" and normalize_scale:
        raise ValueError(f"normalize_scale: {activation} networks have no scale symmetry")
    if not weights or len(weights) != len(biases):
        raise ValueError(f"expected as many weights as biases and at least one, got {len(weights)} and {len(biases)}")
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim not in (3, 4) or bias.ndim not in (2, 3):
            shapes = f"{list(weight.shape)} and {list(bias.shape)}"
            raise ValueError(
                f"layer {layer}: expected weights [B, n_in, n_out(, d_e)] and biases [B, n_out(, 1)], got {shapes}"
            )
        if tuple(bias.shape) not in ((len(weight), weight.shape[2]), (len(weight), weight.shape[2], 1)):
            raise ValueError(f"biases[{layer}]: shape {list(bias.shape)} does not fit weights {list(weight.shape)}")
        if layer and weight.shape[:2] != (weights[0].shape[0], weights[layer - 1].shape[2]):
            raise ValueError(
                f"weights[{layer}]: shape {list(weight.shape)} does not follow {list(weights[layer - 1].shape)}"
            )
        for name, value in (("weights", weight), ("biases", bias)):
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"{name}[{layer}] must be float32 or float64, got {value.dtype}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}[{layer}] holds NaN or Inf")
    hidden = len(weights) - 1
    scales = layer_w0(w0, hidden) if activation == "sine" and hidden else [1.0] * hidden
    new_weights = [w.double().unsqueeze(-1) if w.ndim == 3 else w.double() for w in weights]
    new_biases = [b.double().squeeze(-1) if b.ndim == 3 else b.double() for b in biases]
    for layer in range(hidden):
        bias, dtype = new_biases[layer], biases[layer].dtype
        incoming = new_weights[layer].transpose(1, 2).flatten(2)
        if activation == "sine":
            factor_in, factor_out, bias = _sine_factors(incoming, bias, scales[layer], dtype)
        elif activation == "relu":
            factor_in, factor_out, bias = _relu_factors(incoming, bias, dtype)
        else:
            factor_in = factor_out = torch.where(bias == 0, _leading_sign(incoming), bias.sign())
            bias = bias.abs()
        factor_out = torch.where((incoming == 0).all(2) & (bias == 0), 0.0, factor_out)
        # Adding 0 turns -0 into 0: equal networks get equal bits.
        new_biases[layer] = bias + 0.0
        new_weights[layer] = new_weights[layer] * factor_in[:, None, :, None] + 0.0
        new_weights[layer + 1] = new_weights[layer + 1] * factor_out[:, :, None, None]
    new_weights[-1] = new_weights[-1] + 0.0
    return (
        [new.reshape(old.shape).to(old.dtype) for new, old in zip(new_weights, weights, strict=True)],
        [new.reshape(old.shape).to(old.dtype) for new, old in zip(new_biases, biases, strict=True)],
    )


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="packed dataset to read")
    parser.add_argument("output", help="packed dataset to write")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="default: what the input's metadata say")
    parser.add_argument(
        "--w0", type=float, nargs="+", help="one value, or one per hidden layer; default: the metadata's"
    )
    parser.add_argument("--normalize-scale", action="store_true", help="relu: give every hidden neuron unit norm")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    dataset = PackedDataset(args.input)
    activation = args.activation or dataset.metadata.get("activation")
    if activation is None:
        raise ValueError(f"{args.input} does not say its activation: give --activation")
    w0 = args.w0 or dataset.metadata.get("w0")
    if w0 is None:
        if activation == "sine":
            raise ValueError(f"{args.input} does not say its w0: give --w0")
        w0 = 1.0
    parts = []
    changed = total = 0
    starts = range(0, len(dataset), _CHUNK)
    for start in progress(starts, desc="canonicalize", unit="chunk", disable=args.quiet):
        before = dataset.weights(slice(start, start + _CHUNK))
        after = canonicalize(*before, activation=activation, w0=w0, normalize_scale=args.normalize_scale)
        differs = [(a != b).flatten(2).any(2) for a, b in zip(after[1][:-1], before[1][:-1], strict=True)]
        differs = [d | (a != b).any(3).any(1) for d, a, b in zip(differs, after[0][:-1], before[0][:-1], strict=True)]
        changed += sum(int(d.sum()) for d in differs)
        total += sum(d.numel() for d in differs)
        parts.append(after)
    metadata = {**dataset.metadata, "activation": activation, "canonical": "scale" if activation == "relu" else "sign"}
    if activation == "sine":
        metadata |= {"w0": w0, "canonical": "phase and sign"}
    write_packed(
        args.output,
        [torch.cat(layer) for layer in zip(*(p[0] for p in parts), strict=True)],
        [torch.cat(layer) for layer in zip(*(p[1] for p in parts), strict=True)],
        dataset.labels,
        dataset.splits,
        metadata,
        dataset.sign_mask(),
        extras={name: dataset.extra(name) for name in dataset.extras},
    )
    print(PackedDataset(args.output))
    print(f"{changed} of {total} hidden neurons rewritten")
    return 0
