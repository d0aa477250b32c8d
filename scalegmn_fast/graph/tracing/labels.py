"""Values of a network while it is traced: tensors of the wires that carry their entries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .network import Edges


@dataclass(eq=False)
class Value:
    """A tensor of the network as whose numbers its entries are.

    ``factors``: int64 tensors of the value's dimensions, of size 1 along those where the wire is the same. With several
    factors an entry belongs to one wire of each and scales with all of them (hidden units of a token mixer, for every
    channel). ``edges``: what computes exactly this value, read by nothing else.
    """

    shape: tuple[int, ...]
    factors: list[Tensor]
    edges: tuple[Edges, ...] = ()


def varying(factor: Tensor) -> set[int]:
    """Dimensions along which the wire changes."""
    return {dim for dim, size in enumerate(factor.shape) if size > 1}


def distinct(labels: Tensor) -> np.ndarray:
    """The wires among labels, sorted."""
    return np.unique(labels.numpy())


def pairs(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of entries of two tensors of one shape, sorted."""
    base = int(b.max()) + 1
    keys = np.unique((a * base + b).numpy())
    return keys // base, keys % base


def padded(tensor: Tensor, ndim: int) -> Tensor:
    """With dimensions of size 1 in front, as broadcasting has it."""
    return tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))


def compressed(labels: Tensor) -> Tensor:
    """Size 1 along dimensions where nothing changes."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and (labels.stride(dim) == 0 or torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))):
            labels = labels.narrow(dim, 0, 1)
    return labels.contiguous()


def meet(f: Tensor, g: Tensor) -> bool:
    """Whether two factors of one value's entries vary along a common dimension, or one of them not at all."""
    return f.numel() == 1 or g.numel() == 1 or any(a > 1 and b > 1 for a, b in zip(f.shape, g.shape, strict=True))
