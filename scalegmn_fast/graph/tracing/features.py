"""Edge features and biases out of a network's parameters: functions of all tensors by name, bound by `partial`."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import Part


def elements(part: Part, tensors, shape=(-1,)) -> Tensor:
    """A part in another shape."""
    return part.read(tensors).reshape(shape)


def ordered(part: Part, order: Tensor, shape, tensors) -> Tensor:
    """A part's elements in another order and shape."""
    return part.read(tensors).reshape(-1)[order].reshape(shape)


def total(first, second, tensors) -> Tensor:
    """Sum of two of these functions, the first of which may be None."""
    return second(tensors) if first is None else first(tensors) + second(tensors)


def gathered_columns(weight: Part, slots: list[Tensor], sizes: list[int], most: int, tensors) -> Tensor:
    """[edges, most * taps]: columns of one wire side by side, 0 where a wire has fewer."""
    blocks = []
    for block, slot, size in zip(weight.read(tensors).chunk(len(slots)), slots, sizes, strict=True):
        wide = block.new_zeros(block.shape[0], size, block.shape[2]).index_copy(1, slot.to(block.device), block)
        blocks.append(wide.reshape(-1, most * block.shape[2]))
    return torch.cat(blocks)


def batch_norm(weight, bias, mean, var, eps: float, tensors) -> tuple[Tensor, Tensor]:
    """(gain, shift) of a batch norm in evaluation mode."""
    gain = (var.read(tensors) + eps).rsqrt()
    gain = gain if weight is None else gain * weight.read(tensors)
    shift = -mean.read(tensors) * gain
    return gain, shift if bias is None else shift + bias.read(tensors)


def norm_gain(norm, tensors) -> Tensor:
    return norm(tensors)[0].unsqueeze(1)


def norm_shift(norm, tensors) -> Tensor:
    return norm(tensors)[1]


def folded(features, norm, target: Tensor, tensors) -> Tensor:
    return features(tensors) * norm(tensors)[0][target].unsqueeze(1)


def folded_bias(bias, norm, tensors) -> Tensor:
    gain, shift = norm(tensors)
    return shift if bias is None else bias(tensors) * gain + shift
