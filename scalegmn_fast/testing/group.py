"""The symmetries of a feed-forward network, acting on its weights and biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalegmn_fast.testing.tolerance import relative_error

__all__ = [
    "GroupElement",
    "act",
    "act_on_sign_mask",
    "equivariance_error",
    "flip_signs",
    "permute_hidden",
    "random_group_element",
    "scale_hidden",
]

SYMMETRIES = ("sign", "scale", "hetero", "permutation")


@dataclass(frozen=True)
class GroupElement:
    """A permutation and a rescaling of the hidden neurons of every network of a batch.

    ``permutations[l]`` int64 [B, n] and ``scales[l]`` [B, n] belong to hidden layer l (of ``len(layout) - 2``): new
    neuron k is old neuron ``permutations[l][b, k]`` multiplied by ``scales[l][b, k]``.
    """

    permutations: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]


def permute_hidden(
    weights: Sequence[Tensor], biases: Sequence[Tensor], permutations: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Reorders hidden neurons: neuron k of hidden layer l becomes what neuron ``permutations[l][b, k]`` was.

    Args:
        weights: L tensors [B, n_in, n_out] or [B, n_in, n_out, d_e].
        biases: L tensors [B, n_out] or [B, n_out, 1].
        permutations: L - 1 int64 tensors [B, n].

    Returns:
        New (weights, biases) of the same shapes. Differentiable.

    Raises:
        ValueError: the number of permutations is not the number of hidden layers.
    """
    _check_count("permutations", permutations, weights)
    weights, biases = list(weights), list(biases)
    for layer, permutation in enumerate(permutations):
        rows = torch.arange(permutation.shape[0], device=permutation.device)[:, None]
        biases[layer] = biases[layer][rows, permutation]
        weights[layer] = weights[layer].transpose(1, 2)[rows, permutation].transpose(1, 2)
        weights[layer + 1] = weights[layer + 1][rows, permutation]
    return weights, biases


def scale_hidden(
    weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Multiplies hidden neuron k of hidden layer l by ``scales[l][b, k]``: incoming weights and bias times it, outgoing
    weights divided by it.

    Shapes, result and errors as `permute_hidden`; ``scales`` floating [B, n], non-zero.
    """
    _check_count("scales", scales, weights)
    weights, biases = list(weights), list(biases)
    for layer, scale in enumerate(scales):
        biases[layer] = biases[layer] * _right(scale, biases[layer])
        weights[layer] = weights[layer] * _right(scale[:, None], weights[layer])
        weights[layer + 1] = weights[layer + 1] / _right(scale, weights[layer + 1])
    return weights, biases


def flip_signs(
    weights: Sequence[Tensor], biases: Sequence[Tensor], signs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """`scale_hidden` by signs; exact in every floating type.

    Raises:
        ValueError: an entry of ``signs`` is neither 1 nor -1.
    """
    for layer, sign in enumerate(signs):
        if not bool((sign.abs() == 1).all()):
            raise ValueError(f"signs[{layer}] must hold 1 and -1 only, got values in [{sign.min()}, {sign.max()}]")
    return scale_hidden(weights, biases, signs)


def random_group_element(
    layout: Sequence[int],
    symmetry: str,
    *,
    batch: int,
    sign_mask: Tensor | None = None,
    permute: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> GroupElement:
    """Draws a group element of ``symmetry``: permutations with signs ("sign"), with scales in [1/e, e] ("scale"), with
    either by ``sign_mask`` ("hetero"), or alone ("permutation").

    Args:
        layout: layer sizes, first and last included.
        sign_mask: bool [B] or [B, sum(layout)], needed for "hetero".
        permute: False leaves every neuron in its place.

    Raises:
        ValueError: unknown symmetry, or "hetero" without ``sign_mask``.
    """
    if symmetry not in SYMMETRIES:
        raise ValueError(f"symmetry must be one of {', '.join(SYMMETRIES)}, got {symmetry!r}")
    if symmetry == "hetero" and sign_mask is None:
        raise ValueError("sign_mask must be given for symmetry 'hetero', got None")
    permutations, scales = [], []
    start = layout[0]
    for size in layout[1:-1]:
        order = torch.rand(batch, size, generator=generator).argsort(1)
        order = order if permute else torch.arange(size).expand(batch, size)
        positive = torch.empty(batch, size, dtype=dtype).uniform_(-1.0, 1.0, generator=generator).exp()
        sign = 1 - 2 * torch.randint(2, (batch, size), generator=generator).to(dtype)
        if symmetry == "permutation":
            scale = torch.ones_like(positive)
        elif symmetry == "hetero":
            mask = sign_mask.cpu()
            mask = (
                mask[:, None].expand(batch, size) if mask.dim() == 1 else mask[:, start : start + size].gather(1, order)
            )
            scale = torch.where(mask, sign, positive)
        else:
            scale = sign if symmetry == "sign" else positive
        permutations.append(order)
        scales.append(scale)
        start += size
    return GroupElement(tuple(permutations), tuple(scales))


def act(
    weights: Sequence[Tensor], biases: Sequence[Tensor], element: GroupElement
) -> tuple[list[Tensor], list[Tensor]]:
    """The network after ``element``: permuted, then scaled. The function it computes is unchanged where its activations
    have the symmetry. Shapes and errors as `permute_hidden`."""
    return scale_hidden(*permute_hidden(weights, biases, element.permutations), element.scales)


def act_on_sign_mask(sign_mask: Tensor | None, element: GroupElement, layout: Sequence[int]) -> Tensor | None:
    """The sign mask after ``element``: a mask per neuron [B, sum(layout)] is permuted, one per graph [B] stays."""
    if sign_mask is None or sign_mask.dim() == 1:
        return sign_mask
    layers = list(sign_mask.split(list(layout), 1))
    for layer, permutation in enumerate(element.permutations, start=1):
        layers[layer] = layers[layer].gather(1, permutation)
    return torch.cat(layers, 1)


def equivariance_error(
    model: nn.Module | Callable[..., Tensor | tuple[Sequence[Tensor], Sequence[Tensor]]],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    element: GroupElement,
    *,
    sign_mask: Tensor | None = None,
    input_value: float = 1.0,
) -> float:
    """How far ``model`` is from moving with its input.

    Args:
        model: a module over ``GraphBatch``, or a function ``(weights, biases, sign_mask) -> output``.
        weights, biases: as `permute_hidden`.
        element: the group element to apply.
        sign_mask: bool [B] or [B, neurons]; moved along with the network.
        input_value: feature of the input neurons, for a module.

    Returns:
        The relative error between the outputs for the moved and for the given networks if the output is a tensor
        (invariance); otherwise the largest one between the output for the moved networks and the moved output
        (equivariance), over weights and biases. 0.0 means equal, bit for bit up to the sign of zero.
    """
    if isinstance(model, nn.Module):
        from scalegmn_fast.graph import GraphBatch

        module = model

        def model(w: Sequence[Tensor], b: Sequence[Tensor], mask: Tensor | None) -> Tensor | tuple:
            return module(GraphBatch.from_weights(w, b, input_value=input_value, sign_mask=mask))

    layout = [weights[0].shape[1], *(w.shape[2] for w in weights)]
    with torch.no_grad():
        output = model(weights, biases, sign_mask)
        moved = model(*act(weights, biases, element), act_on_sign_mask(sign_mask, element, layout))
        if isinstance(output, Tensor):
            return relative_error(moved, output)
        expected = act(*output, element)
    pairs = [pair for kind in (0, 1) for pair in zip(moved[kind], expected[kind], strict=True)]
    return max(relative_error(actual, wanted) for actual, wanted in pairs)


def _check_count(name: str, values: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    if len(values) != len(weights) - 1:
        raise ValueError(f"{name} must have one entry per hidden layer, {len(weights) - 1}, got {len(values)}")


def _right(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))
