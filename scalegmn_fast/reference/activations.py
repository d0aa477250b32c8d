"""Activations by name, as the Neural Graphs configurations name them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_ALIASES = {"swish": "silu", "none": "identity"}


def activation_name(name: str) -> str:
    """The name in `ACTIVATIONS` that ``name`` means; case, underscores, hyphens and spaces do not matter.

    Raises:
        ValueError: not the name of a supported activation.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c not in "_- ")

    known = {plain(key): key for key in ACTIVATIONS} | _ALIASES
    if not isinstance(name, str) or plain(name) not in known:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return known[plain(name)]


def activation(x: Tensor, name: str) -> Tensor:
    """The named activation of x, elementwise; GELU is the exact one.

    Raises:
        ValueError: an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"act: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](x)
