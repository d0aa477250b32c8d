"""The published Neural Graphs models against themselves in plain PyTorch in float64 (the backend "reference").

The tests hold that computation to the original's outputs and gradients; on its own place, the reference backend on the
CPU in float64, there is nothing to compare it with but its own equivariance.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import scalegmn_fast

from .. import testing
from ..graph import GraphBatch, from_cnns
from ..models import from_config, neural_graphs_config
from .models import BATCH, FACTOR, QUICK_WIDTH, UNITS, ModelCase, in_layers, is_output, numbered, trainable

# The gradient of a minimum or maximum goes to one row; where two rows are equal but for rounding it may go to the
# other, and float32 is then far from float64 whoever computes it. Networks for which a float32 gradient of the
# oracle has an error above this, in units of rounding, are drawn anew, DRAWS times in all.
TIED = 4096.0
DRAWS = 8

TRANSFORMER_WIDTHS = ("d_node", "d_edge", "d_attn_hid", "d_node_hid", "d_edge_hid", "d_out_hid")


class NeuralGraphsCase(ModelCase):
    """A published Neural Graphs configuration."""

    def __init__(self, name: str, quick: bool, seed: int):
        config = model_arguments(name, QUICK_WIDTH if quick else None)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = from_config(config).eval()
        testing.randomize_parameters(self.model, generator=generator, spread=0.02)
        self.exact_model = self.model
        if config["_target_"].endswith("GNNParams"):
            self.exact_model = from_config({**config, "exact_bias_readout": True}).eval()
            self.exact_model.load_state_dict(self.model.state_dict())
        varying = "max_num_hidden_layers" in config["graph_constructor"]
        for _ in range(DRAWS):
            self.inputs = (_Cnns if varying else _Inrs)(config, generator)
            self.networks = self.inputs.networks
            self.solve()
            if max(units for key, units in self.error_units.items() if not is_output(key)) <= TIED:
                break

    def graph(self, networks: Mapping[str, Tensor]) -> GraphBatch:
        return self.inputs.graph(networks)

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        model, networks = deepcopy(self.model).to(dtype), self.placed("cpu", dtype)
        with scalegmn_fast.backend("reference"):
            return self.results(model(self.graph(networks)), {**networks, **trainable(model)})

    def check(self, backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
        if (backend, device, dtype) == ("reference", "cpu", torch.float64):
            return {"equivariance": self.equivariance(backend, device, dtype)}
        return super().check(backend, device, dtype)

    def equivariance(self, backend: str, device: str, dtype: torch.dtype) -> tuple[float, float]:
        """Error of the exact variant under permutations, and twice the bound of an output."""
        model, networks = deepcopy(self.exact_model).to(device, dtype), self.placed(device, dtype)
        with torch.no_grad(), scalegmn_fast.backend(backend):
            error = self.inputs.equivariance(model, networks)
        own = max(units for key, units in self.error_units.items() if key.startswith("output"))
        return error, 2 * max(FACTOR * own, UNITS) * torch.finfo(dtype).eps


class _Inrs:
    """Networks of the model's layout, as far from 0 as its statistics say."""

    def __init__(self, config: Mapping[str, Any], generator: torch.Generator):
        layout = config["layer_layout"]
        weights, biases = testing.random_network(layout, BATCH, generator=generator, dtype=torch.float32)
        stats = config.get("stats") or config["graph_constructor"]["stats"]
        scaled = (
            [value * std for value, std in zip(values, stats[key], strict=True)]
            for values, key in ((weights, "weights_std"), (biases, "biases_std"))
        )
        self.networks = numbered(*scaled)
        self.element = testing.random_group_element(layout, "permutation", batch=BATCH, generator=generator)

    def graph(self, networks: Mapping[str, Tensor]) -> GraphBatch:
        return GraphBatch.from_weights(*in_layers(networks))

    def equivariance(self, model: nn.Module, networks: Mapping[str, Tensor]) -> float:
        weights, biases = in_layers(networks)
        element = testing.GroupElement(
            tuple(p.to(weights[0].device) for p in self.element.permutations),
            tuple(s.to(weights[0]) for s in self.element.scales),
        )
        return testing.equivariance_error(model, weights, biases, element)


class _Cnns:
    """Convolutional networks that differ in depth, widths, kernels and activations, one with a residual connection
    where the model reads networks that deep."""

    def __init__(self, config: Mapping[str, Any], generator: torch.Generator):
        constructor, ends = config["graph_constructor"], (config["input_channels"], config["num_classes"])
        side = round(constructor["d_edge_in"] ** 0.5)
        self.options = {"kernel_size": (side, side), "linear_as_conv": constructor["linear_as_conv"]}
        hidden, activations = [[16, 16, 16], [12, 8]], [["relu"] * 3, ["tanh", "gelu"]]
        residuals = [[-1, -1, 0 if constructor["max_num_hidden_layers"] > 3 else -1], [-1, -1]]
        self.options |= {"activations": activations, "residual_connections": residuals}
        self.states = [
            testing.random_cnn(
                [ends[0], *channels],
                [ends[1]],
                kernels=[side, *[3] * (len(channels) - 1)],
                generator=generator,
                dtype=torch.float32,
            )
            for channels in hidden
        ]
        # Channels that a residual connection adds to each other stay so under one permutation of both layers.
        drawn = [[torch.randperm(width, generator=generator) for width in channels] for channels in hidden]
        drawn[0][2] = drawn[0][0]
        self.permutations = drawn
        self.networks = {f"{k}.{name}": t for k, state in enumerate(self.states) for name, t in state.items()}

    def graph(self, networks: Mapping[str, Tensor]) -> GraphBatch:
        states = [{name: networks[f"{k}.{name}"] for name in state} for k, state in enumerate(self.states)]
        return from_cnns(states, **self.options)

    def equivariance(self, model: nn.Module, networks: Mapping[str, Tensor]) -> float:
        moved = dict(networks)
        for k, permutations in enumerate(self.permutations):
            for layer, permutation in enumerate(permutations):
                order = permutation.to(next(iter(networks.values())).device)
                for name in (f"{k}.{layer}.weight", f"{k}.{layer}.bias"):
                    moved[name] = moved[name][order]
                following = f"{k}.{layer + 1}.weight"
                moved[following] = moved[following][:, order]
        return testing.relative_error(model(self.graph(moved)), model(self.graph(networks)))


def model_arguments(name: str, width: int | None = None) -> dict[str, Any]:
    """The constructor dictionary of a published model, at other hidden widths where one is given."""
    config = neural_graphs_config(name)
    if width is None:
        return config
    if "gnn_backbone" in config:
        config["d_hid"] = width
        config["gnn_backbone"] |= dict.fromkeys(("in_channels", "hidden_channels", "out_channels", "edge_dim"), width)
    else:
        config |= dict.fromkeys(TRANSFORMER_WIDTHS, width)
    return config
