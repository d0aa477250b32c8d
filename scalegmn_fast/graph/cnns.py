"""`GraphBatch` of convolutional networks that differ in width, depth, activations and residual connections."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import Architecture, activation_number
from .batch import GraphBatch
from .builders import network_of_state
from .layers import Grid, Network, check_list, check_tensors, edge_features, grid_of, pixels_of

FLATTENING_METHODS = ("repeat_nodes", "extra_layer")


class _Cnn(NamedTuple):
    """A network whose flattening is resolved: every weight joins two neurons."""

    network: Network
    architecture: Architecture
    residuals: tuple[tuple[int, int], ...]  # (hidden layer that sends, hidden layer that receives)

    def key(self):
        return self.network.shapes(), self.residuals


def from_cnns(
    state_dicts: Sequence[Mapping[str, Tensor]],
    *,
    kernel_size: tuple[int, int] | None = None,
    linear_as_conv: bool = True,
    flattening_method: str | None = None,
    activations: Sequence[Sequence[str]] | None = None,
    residual_connections: Sequence[Sequence[int]] | None = None,
    names: Sequence[tuple[str, str | None]] | None = None,
    original_pixel_order: bool = False,
) -> GraphBatch:
    """Batch of convolutional networks for the models of varying architectures, one state dict per network.

    Kernels are padded with zeros to the largest, their centres kept; a linear weight stands on the centre tap, or with
    ``linear_as_conv=False`` on the first one. Input channels have the bias 0.

    Args:
        state_dicts, names, kernel_size: as for `builders.from_state_dicts`.
        linear_as_conv: as the model has it.
        flattening_method: how the pixels that a linear layer reads of each channel become neurons. "repeat_nodes": the
            last convolution's channels stand once per pixel (neuron pixel * channels + channel). "extra_layer": an
            identity layer of channels * pixels neurons is put between; its kernels, of the feature map's size (which
            must be square), are 1 at the neuron's pixel. None: networks that pool their feature maps.
        activations: per network one name per hidden layer, out of `ACTIVATION_NAMES`.
        residual_connections: per network one number per hidden layer i: the hidden layer e < i - 1 whose neuron k is
            added to its neuron k, or -1. Such an edge is 1 on the centre tap.
        original_pixel_order: with "repeat_nodes", join neurons to the linear layer's columns in the column order of the
            original implementation, which pairs channels with other channels' columns. Not invariant to permutations.

    Returns:
        A `GraphBatch` with `architectures`; d_v = 1, d_e = height * width of the kernels. Deterministic; differentiable
        in every tensor.

    Raises:
        TypeError, ValueError: an argument of a wrong type, length or value; what `builders.from_state_dicts` rejects;
            a flattened feature map without a flattening method; a residual connection between neighbouring layers.
    """
    check_list("state_dicts", state_dicts)
    if flattening_method is not None and flattening_method not in FLATTENING_METHODS:
        raise ValueError(
            f"flattening_method must be one of {', '.join(FLATTENING_METHODS)} or None, got {flattening_method!r}"
        )
    for name, value in (("activations", activations), ("residual_connections", residual_connections)):
        if value is not None and len(value) != len(state_dicts):
            raise ValueError(f"{name} must have one entry per network, {len(state_dicts)}, got {len(value)}")
    known: dict = {}
    cnns = []
    for index, state in enumerate(state_dicts):
        label = f"state_dicts[{index}]"
        if not isinstance(state, Mapping):
            raise TypeError(f"{label} must be a mapping of names to tensors, got {type(state).__name__}")
        network = network_of_state(label, state, names, known)
        hidden = len(network.weights) - 1
        acts = None if activations is None else _activations(f"activations[{index}]", activations[index], hidden)
        residuals = () if residual_connections is None else _residuals(index, residual_connections[index], hidden)
        cnns.append(_resolved(network, acts, residuals, flattening_method, original_pixel_order))
    networks = [cnn.network for cnn in cnns]
    check_tensors(networks)
    grid = grid_of(networks, 1, kernel_size, "centre" if linear_as_conv else "first")
    batches = [_batch(list(run), grid) for _, run in itertools.groupby(cnns, key=_Cnn.key)]
    return GraphBatch.cat(batches)


def _activations(label: str, names: Sequence[str], hidden: int) -> tuple[str, ...]:
    if isinstance(names, str) or len(names) != hidden:
        raise ValueError(f"{label} must hold one name per hidden layer, {hidden}, got {names!r}")
    for name in names:
        activation_number(name)
    return tuple(names)


def _residuals(index: int, senders: Sequence[int], hidden: int) -> tuple[tuple[int, int], ...]:
    label = f"residual_connections[{index}]"
    if len(senders) != hidden:
        raise ValueError(f"{label} must hold one number per hidden layer, {hidden}, got {list(senders)}")
    found = tuple((int(sender), layer) for layer, sender in enumerate(senders) if sender >= 0)
    for sender, layer in found:
        if sender >= layer - 1:
            raise ValueError(
                f"{label}[{layer}] must be -1 or a hidden layer before layer {layer - 1} "
                f"(neighbours are joined by weights already), got {sender}"
            )
    return found


def _resolved(network: Network, activations, residuals, method: str | None, original_order: bool) -> _Cnn:
    convolutions = [w.ndim == 4 for w in network.weights]
    pixels = pixels_of(network)
    after = next((k for k, count in enumerate(pixels) if count > 1), None)
    if method is None and after is not None:
        raise ValueError(
            f"{network.label}{network.names[after]} reads {pixels[after]} pixels of every channel: flattening_method "
            f"must be one of {', '.join(FLATTENING_METHODS)}, got None"
        )
    last = max((k for k, is_convolution in enumerate(convolutions) if is_convolution), default=-1)
    if method is None or last < 0 or last == len(convolutions) - 1:
        return _Cnn(network, Architecture(tuple(convolutions), activations), residuals)
    weights, biases, names = list(network.weights), list(network.biases), list(network.names)
    channels, count = weights[last].shape[0], pixels[last + 1]
    if method == "repeat_nodes":
        weights[last] = weights[last].repeat(count, 1, 1, 1)
        biases[last] = None if biases[last] is None else biases[last].repeat(count)
        if not original_order:
            weights[last + 1] = weights[last + 1].unflatten(1, (channels, count)).transpose(1, 2).flatten(1)
        architecture = Architecture(tuple(convolutions), activations, count)
        return _Cnn(Network(network.label, names, weights, biases), architecture, residuals)
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"{network.label}{names[last + 1]}: flattening_method 'extra_layer' needs a square feature map, "
            f"got {count} pixels"
        )
    identity = torch.eye(channels * count, dtype=weights[last].dtype, device=weights[last].device)
    identity = identity.unflatten(1, (channels, side, side))
    weights.insert(last + 1, identity)
    biases.insert(last + 1, None)
    names.insert(last + 1, " (extra layer)")
    convolutions.insert(last + 1, True)
    if activations is not None:
        activations = (*activations[: last + 1], "none", *activations[last + 1 :])
    residuals = tuple(tuple(layer + (layer > last) for layer in pair) for pair in residuals)
    return _Cnn(
        Network(network.label, names, weights, biases), Architecture(tuple(convolutions), activations), residuals
    )


def _batch(cnns: list[_Cnn], grid: Grid) -> GraphBatch:
    first = cnns[0].network
    weights, biases = [], []
    for layer, shape in enumerate(first.shapes()):
        stacked = torch.stack([cnn.network.weights[layer] for cnn in cnns])
        weights.append(edge_features(stacked, 1, grid))
        found = [cnn.network.biases[layer] for cnn in cnns]
        biases.append(torch.stack([stacked.new_zeros(shape[0]) if b is None else b for b in found]))
    batch = GraphBatch.from_weights(weights, biases, input_value=0.0)
    if cnns[0].residuals:
        batch = _with_residuals(weights, biases, cnns[0].residuals, grid)
    return GraphBatch(
        batch.node_features, batch.edge_features, batch.plan, architectures=[cnn.architecture for cnn in cnns]
    )


def _with_residuals(weights: list[Tensor], biases: list[Tensor], residuals, grid: Grid) -> GraphBatch:
    count, device = weights[0].shape[0], weights[0].device
    widths = [weights[0].shape[1], *(w.shape[2] for w in weights)]
    starts = [0, *itertools.accumulate(widths)]
    layers = [torch.arange(a, b, device=device) for a, b in itertools.pairwise(starts)]
    ends = [torch.cartesian_prod(a, b).reshape(-1, 2) for a, b in itertools.pairwise(layers)]
    features = [w.flatten(1, 2) for w in weights]
    for sender, receiver in residuals:
        joined = min(widths[sender + 1], widths[receiver + 1])
        ends.append(torch.stack([layers[sender + 1][:joined], layers[receiver + 1][:joined]], dim=1))
        one = weights[0].new_zeros(count, joined, grid.d_e)
        one[..., grid.d_e // 2] = 1
        features.append(one)
    graph = torch.arange(count, device=device)
    edge_index = torch.cat(ends).repeat(count, 1) + (graph * starts[-1]).repeat_interleave(
        sum(len(pairs) for pairs in ends)
    ).unsqueeze(1)
    nodes = torch.cat([biases[0].new_zeros(count, widths[0]), *biases], dim=1)
    return GraphBatch.from_edges(
        nodes.reshape(-1, 1),
        edge_index.t(),
        torch.cat(features, dim=1).flatten(0, 1),
        graph=graph.repeat_interleave(starts[-1]),
    )
