"""Random networks and random model configurations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "random_biases",
    "random_cnn",
    "random_config",
    "random_layout",
    "random_network",
    "random_sign_mask",
    "random_weights",
    "randomize_parameters",
]

SYMMETRIES = ("sign", "scale", "hetero", "permutation")


def random_layout(rng: random.Random, *, max_width: int = 6, max_layers: int = 3) -> list[int]:
    """Layer sizes of 1 to ``max_width``; 1 (seldom, then nothing is hidden) to ``max_layers`` layers of weights."""
    layers = 1 if rng.random() < 0.1 else rng.randint(2, max_layers)
    return [rng.randint(1, max_width) for _ in range(layers + 1)]


def random_weights(
    layout: Sequence[int],
    batch: int = 2,
    *,
    d_e: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Normal weights [batch, n_in, n_out, d_e], scaled by 1 / sqrt(n_in), drawn on the CPU."""
    return [
        (torch.randn(batch, n_in, n_out, d_e, generator=generator, dtype=torch.float64) / n_in**0.5).to(device, dtype)
        for n_in, n_out in pairwise(layout)
    ]


def random_biases(
    layout: Sequence[int],
    batch: int = 2,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Normal biases [batch, n_out, 1], drawn on the CPU."""
    return [
        torch.randn(batch, n_out, 1, generator=generator, dtype=torch.float64).to(device, dtype) for n_out in layout[1:]
    ]


def random_network(
    layout: Sequence[int],
    batch: int = 2,
    *,
    d_e: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, biases) of ``batch`` networks: `random_weights`, then `random_biases`."""
    options = {"generator": generator, "dtype": dtype, "device": device}
    return random_weights(layout, batch, d_e=d_e, **options), random_biases(layout, batch, **options)


def random_cnn(
    channels: Sequence[int],
    linear: Sequence[int],
    *,
    kernels: Sequence[int] | None = None,
    pixels: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """State dict of a convolutional network: convolutions from ``channels[0]`` on, then linear layers.

    Args:
        channels: input channels, then those after each convolution.
        linear: neurons after each linear layer.
        kernels: sides of the kernels; 3 if None.
        pixels: how many pixels of each channel the first linear layer reads.
    """
    state, layer = {}, 0

    def add(*shape: int) -> None:
        nonlocal layer
        fan_in = 1
        for size in shape[1:]:
            fan_in *= size
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5
        state[f"{layer}.weight"] = weight.to(dtype)
        state[f"{layer}.bias"] = torch.randn(shape[0], generator=generator, dtype=torch.float64).to(dtype)
        layer += 1

    sides = kernels or [3] * (len(channels) - 1)
    for (n_in, n_out), side in zip(pairwise(channels), sides, strict=True):
        add(n_out, n_in, side, side)
    for n_in, n_out in pairwise([channels[-1] * pixels, *linear]):
        add(n_out, n_in)
    return state


def random_sign_mask(
    layout: Sequence[int], batch: int = 2, *, per_neuron: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """bool [batch], or [batch, sum(layout)]; with two graphs or more, both kinds occur."""
    shape = (batch, sum(layout)) if per_neuron else (batch,)
    mask = torch.randint(2, shape, generator=generator).bool()
    if batch > 1:
        mask[0], mask[1] = True, False
    return mask


def randomize_parameters(module: nn.Module, *, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
    """Moves every parameter and every running statistic off its initial value, in place.

    Normalisations start at scale 1 and shift 0, output scales at one constant: a mistake in their use shows only away
    from there. Adds normal noise of standard deviation ``spread``; variances are multiplied by exp of it.
    """
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = spread * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            if name.endswith("running_var"):
                tensor.mul_(noise.exp())
            else:
                tensor.add_(noise)


def random_config(
    rng: random.Random,
    *,
    symmetry: str | None = None,
    direction: str | None = None,
    equivariant: bool | None = None,
    layout: Sequence[int] | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """A random valid model configuration (``scalegmn_args`` with ``layer_layout``), small.

    Every option but the activation "sine" inside an mlp: a chain of sin(30 x) multiplies rounding errors by 30 per
    layer, so that two correct float64 implementations differ.

    Args:
        rng: source of the draws.
        symmetry, direction, equivariant, layout: fixed where given, drawn otherwise.
        exact: only options under which the model is exactly invariant or equivariant to its symmetry; then
            ``canonical_eps`` is 0 and bidirectional ``scale`` and ``hetero`` take "reciprocal" or "carried".

    Raises:
        ValueError: unknown ``symmetry`` or ``direction``.
    """
    symmetry = rng.choice(SYMMETRIES) if symmetry is None else symmetry
    direction = rng.choice(("forward", "bidirectional")) if direction is None else direction
    equivariant = rng.random() < 0.5 if equivariant is None else equivariant
    layout = random_layout(rng) if layout is None else list(layout)
    if symmetry not in SYMMETRIES:
        raise ValueError(f"symmetry must be one of {', '.join(SYMMETRIES)}, got {symmetry!r}")
    if direction not in ("forward", "bidirectional"):
        raise ValueError(f"direction must be 'forward' or 'bidirectional', got {direction!r}")

    def coin(p: float = 0.5) -> bool:
        return rng.random() < p

    d = rng.choice((3, 4, 5))
    bidirectional = direction == "bidirectional"
    sign_symmetrization = coin()
    # A skip inside an mlp needs equal widths throughout, which only a few models have.
    skip = not equivariant and symmetry in ("sign", "scale") and not sign_symmetrization and coin(0.3)

    def non_hidden_rows() -> dict[str, Any]:
        layer = coin(0.3)
        on_hidden = coin(0.7)
        plain_layer = on_hidden and not layer and not mlp_on_io
        return {
            "equiv_on_hidden": on_hidden,
            "layer": layer,
            "num_mlps": rng.choice((2, 3) if plain_layer else (1, 2, 3)),
        }

    mlp_on_io = coin(0.3)
    message, update, position = non_hidden_rows(), non_hidden_rows(), non_hidden_rows()
    aggregators = ["add", "mean", "max"]
    if exact and symmetry in ("sign", "hetero"):
        aggregators.remove("max")
    odd_enough = symmetry == "sign" or (symmetry != "permutation" and not exact)
    update_as_act = not bidirectional and odd_enough and coin(0.2)

    config: dict[str, Any] = {
        "d_in_v": 1,
        "d_in_e": 1,
        "d_hid": d,
        "num_layers": rng.randint(1, 3),
        "direction": direction,
        "equivariant": equivariant,
        "symmetry": symmetry,
        "gnn_skip_connections": coin(),
        "concat_mlp_directions": not skip and coin(0.3),
        "reciprocal": True,
        "node_pos_embed": coin(0.8),
        "edge_pos_embed": coin(),
        "graph_init": {
            "d_in_v": 1,
            "d_in_e": 1,
            "project_node_feats": True,
            "project_edge_feats": True,
            "d_node": d,
            "d_edge": d,
        },
        "positional_encodings": {
            "final_linear_pos_embed": coin(0.3),
            "sum_pos_enc": not exact and coin(0.2),
            "po_as_different_linear": coin(0.3),
            "equiv_net": coin(0.3),
            "sum_on_io": coin(0.7),
            "equiv_on_hidden": position["equiv_on_hidden"],
            "num_mlps": position["num_mlps"],
            "layer_equiv_on_hidden": position["layer"],
        },
        "gnn_args": {
            "d_hid": d,
            "message_fn_layers": rng.randint(1, 2),
            "message_fn_skip_connections": coin(),
            "update_node_feats_fn_layers": rng.randint(1, 2),
            "update_node_feats_fn_skip_connections": coin(),
            "update_edge_attr": equivariant or coin(0.8),
            "dropout": 0.0,
            "dropout_all": False,
            "update_as_act": update_as_act,
            "update_as_act_arg": rng.choice(("cat", "sum")),
            "mlp_on_io": mlp_on_io,
            "msg_equiv_on_hidden": message["equiv_on_hidden"],
            "upd_equiv_on_hidden": update["equiv_on_hidden"],
            "layer_msg_equiv_on_hidden": message["layer"],
            "layer_upd_equiv_on_hidden": update["layer"],
            "msg_num_mlps": message["num_mlps"],
            "upd_num_mlps": update["num_mlps"],
            "pos_embed_msg": coin(0.3),
            "pos_embed_upd": coin(0.3),
            "layer_norm": False,
            "aggregator": rng.choice(aggregators),
            "sign_symmetrization": sign_symmetrization,
        },
        "mlp_args": {
            "d_k": [d] * rng.randint(1, 2),
            "activation": rng.choice(("identity", "elu", "relu", "silu", "tanh", "sigmoid")),
            "dropout": 0.0,
            "final_activation": rng.choice(("identity", "identity", "tanh")),
            "batch_norm": coin(0.2),
            "layer_norm": coin(0.7),
            "bias": coin(0.8),
            "skip": skip,
        },
        "layer_layout": layout,
    }
    if not config["node_pos_embed"]:
        config["gnn_args"]["pos_embed_msg"] = config["gnn_args"]["pos_embed_upd"] = False
    if equivariant:
        config["out_scale"] = 0.1
    else:
        config["readout_range"] = rng.choice(("last_layer", "full_graph"))
        config["readout_args"] = {"d_out": d if skip else rng.randint(1, 4), "d_rho": d}
    if coin(0.3):
        config["_max_kernel_height"], config["_max_kernel_width"] = 2, 3
    config["exact_edge_encoding"] = exact or coin()
    if exact:
        config["canonical_eps"] = 0.0
    if bidirectional:
        kinds = ["original", "reciprocal", "carried"]
        if exact and symmetry in ("scale", "hetero"):
            kinds.remove("original")
        if symmetry == "permutation":
            kinds.remove("carried")
        config["bidirectional_edges"] = rng.choice(kinds)
    return config
