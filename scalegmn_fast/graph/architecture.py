"""What a graph of neurons and weights does not say about a network: its kinds of layers and its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Architecture(NamedTuple):
    """Layers of one network, for models of varying architectures.

    Attributes:
        convolutions: per layer of weights, whether it is a convolution.
        activations: name of each hidden layer's activation, None if unknown.
        pixels: how many neurons each channel of the last convolution became (``repeat_nodes``), else 1.
    """

    convolutions: tuple[bool, ...]
    activations: tuple[str, ...] | None = None
    pixels: int = 1

    @property
    def last_convolution(self) -> int:
        """Number of the last convolution among the layers of weights, -1 without one."""
        return max((k for k, is_convolution in enumerate(self.convolutions) if is_convolution), default=-1)


#: Activations that have an embedding, in the order of its rows.
ACTIVATION_NAMES = ("none", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu")


def table_row(name: str, entry: Architecture | None, depth: int, widths: Sequence[int]) -> list[int]:
    """A row of `GraphBatch.architecture_table`.

    Raises:
        ValueError: an activation without a number; activations or layers that do not match the network's.
    """
    row = [-1] * depth
    if entry is None:
        return row
    layers = sum(width > 0 for width in widths)
    if len(entry.convolutions) != layers - 1:
        raise ValueError(
            f"architectures must name {layers - 1} layers of weights, got {len(entry.convolutions)} convolutions"
        )
    if name == "activations" and entry.activations is not None:
        if len(entry.activations) != layers - 2:
            raise ValueError(
                f"activations must hold one name per hidden layer, {layers - 2}, got {list(entry.activations)}"
            )
        row[1 : layers - 1] = [activation_number(value) for value in entry.activations]
    elif name == "linear":
        row[1:layers] = [int(not is_convolution) for is_convolution in entry.convolutions]
    elif name == "channels" and entry.last_convolution >= 0:
        layer = entry.last_convolution + 1
        if widths[layer] % entry.pixels:
            raise ValueError(f"pixels must divide the {widths[layer]} neurons of layer {layer}, got {entry.pixels}")
        row[layer] = widths[layer] // entry.pixels
    return row


def activation_number(name: str) -> int:
    """Row of an activation's embedding.

    Raises:
        ValueError: a name that is not in `ACTIVATION_NAMES`.
    """
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"activations must be out of {', '.join(ACTIVATION_NAMES)}, got {name!r}")
    return ACTIVATION_NAMES.index(name)
