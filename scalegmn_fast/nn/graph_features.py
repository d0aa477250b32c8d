"""From the weights and biases of networks to the node and edge features of Neural Graphs.

Source: Kofinas et al., "Graph Neural Networks for Learning Equivariant Representations of Neural Networks", ICLR 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import GraphBatch
from ..graph.architecture import ACTIVATION_NAMES
from ..graph.plan import merge_slices
from . import fused_neural_graphs

STATISTICS = ("weights_mean", "weights_std", "biases_mean", "biases_std")
SIREN_FREQUENCY = 30.0


class FourierFeatures(nn.Module):
    """``[cos(2 pi b x), sin(2 pi b x)]`` for a fixed Gaussian matrix b [frequencies, width] (a buffer).

    [R, width] -> [R, 2 * frequencies].
    """

    def __init__(self, width: int, frequencies: int, sigma: float):
        super().__init__()
        self.register_buffer("b", torch.randn(frequencies, width) * sigma)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * x @ self.b.t()
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def projection(width: int, d_out: int, *, layers: int, fourier: bool, frequencies: int, sigma: float) -> nn.Sequential:
    """[Fourier features,] Linear, then ``layers - 1`` times SiLU and Linear; to ``d_out`` numbers."""
    first = [FourierFeatures(width, frequencies, sigma)] if fourier else []
    modules = [*first, nn.Linear(2 * frequencies if fourier else width, d_out)]
    for _ in range(layers - 1):
        modules += [nn.SiLU(), nn.Linear(d_out, d_out)]
    return nn.Sequential(*modules)


class LayerStatistics:
    """Mean and standard deviation of weights and biases per layer, kept in float64 whatever the model's dtype.

    Args:
        stats: mapping with any of `STATISTICS`, each None or one number (or tensor of one number per feature) per
            layer of weights.
        shift: weights of layer l are standardised by entry l - 1, those of the first not at all.

    Raises:
        ValueError: an unknown key, or something else than numbers.
    """

    def __init__(self, stats, *, shift: bool = False):
        self.values: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
        for key, entries in (stats or {}).items():
            if key not in STATISTICS:
                raise ValueError(f"stats must have keys out of {', '.join(STATISTICS)}, got {key!r}")
            self.values[key] = None if entries is None else _layers_of(f"stats.{key}", entries)
        if shift:
            for key, neutral in (("weights_mean", 0.0), ("weights_std", 1.0)):
                value = self.values[key]
                if value is not None:
                    self.values[key] = torch.cat([torch.full_like(value[:1], neutral), value[:-1]])
        self._cached: dict = {}

    def at(self, key: str, like: Tensor) -> Tensor | None:
        """[L, 1 or d] in the dtype and on the device of a tensor; None if there is no such statistic."""
        if self.values[key] is None:
            return None
        place = (key, like.device, like.dtype)
        if place not in self._cached:
            value = self.values[key].to(like.device, like.dtype)
            if type(value) is not Tensor:  # a tracer's
                return value
            self._cached[place] = value
        return self._cached[place]

    def standardized(self, kind: str, rows: Tensor, layer: Tensor) -> Tensor:
        """(rows - mean) / std of the "weights" or "biases" [R, d]; int64 [R] layer of weights of each."""
        mean, std = self.at(f"{kind}_mean", rows), self.at(f"{kind}_std", rows)
        rows = rows if mean is None else rows - mean[layer]
        return rows if std is None else rows / std[layer]

    def restored(self, kind: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """``tensor * std + mean`` for one tensor [..., d] per layer."""
        for name, of in (("std", torch.mul), ("mean", torch.add)):
            value = self.at(f"{kind}_{name}", tensors[0])
            if value is not None:
                tensors = [of(tensor, value[layer]) for layer, tensor in enumerate(tensors)]
        return list(tensors)

    def __deepcopy__(self, memo) -> LayerStatistics:
        return self


def _layers_of(name: str, entries) -> Tensor:
    try:
        rows = [torch.as_tensor(entry, dtype=torch.float64).detach().cpu().reshape(-1) for entry in entries]
        return torch.stack(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be one number per layer, got {entries!r}") from error


class ProbeFeatures(nn.Module):
    """Activations of every neuron of the networks that are read, at learnt inputs; sine networks (w0 = 30).

    Args:
        d_in: input neurons of those networks.
        num_inputs: number of probes.
        num_layers: their layers of weights.
        d_out: width of the result.

    Per layer of neurons: the activations over the probes, Linear, LayerNorm. Outputs are shifted by 0.5, as the
    published INRs are.
    """

    def __init__(self, d_in: int, num_inputs: int, num_layers: int, d_out: int):
        super().__init__()
        self.inputs = nn.Parameter(2 * torch.rand(1, num_inputs, d_in) - 1)
        self.proj = nn.ModuleList(
            nn.Sequential(nn.Linear(num_inputs, d_out), nn.LayerNorm(d_out)) for _ in range(num_layers + 1)
        )

    def forward(self, graph: GraphBatch) -> Tensor:
        """[N, d_out] in plan order.

        Raises:
            ValueError: a network of another depth or with other than one number per weight; skipping edges.
        """
        found = graph.to_weights()
        parts = [found] if isinstance(found, tuple) else found
        if len(parts) == 1:
            return self._of_part(*parts[0])
        rows = [self._of_part(weights, biases) for weights, biases in parts]
        slices = merge_slices([part.blocks for part in graph.plan.parts])[0]
        return torch.cat([rows[part][piece] for part, piece in slices])

    def _of_part(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        depth = len(self.proj) - 1
        if len(weights) != depth or weights[0].shape[3] != 1:
            raise ValueError(
                f"probe features need networks of {depth} layers of weights, one number each (as inr_model says), "
                f"got {len(weights)} layers of {weights[0].shape[3]}"
            )
        h = self.inputs.expand(weights[0].shape[0], -1, -1)
        layers = [h]
        for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = torch.baddbmm(b.squeeze(2).unsqueeze(1), h, w.squeeze(3))
            h = h + 0.5 if index == depth - 1 else torch.sin(SIREN_FREQUENCY * h)
            layers.append(h)
        rows = [proj(h.transpose(1, 2)).flatten(0, 1) for proj, h in zip(self.proj, layers, strict=True)]
        return torch.cat(rows[::-1])


class _GraphFeatures(nn.Module):
    """What fixed and varying architectures share: raw features and their projections."""

    rev_edge_features: bool
    zero_out_bias: bool
    zero_out_weights: bool
    use_pos_embed: bool
    types: tuple[int, int]

    def _node_input(self, graph: GraphBatch) -> Tensor:
        """Standardised biases [N, d_v]; 0 for input neurons, whatever the batch holds there."""
        plan, rows = graph.plan, graph.node_features
        layer = plan.index("node_layer")
        rows = self.stats.standardized("biases", rows, (layer - 1).clamp(min=0))
        return F.pad(rows[: plan.num_nodes - plan.num_first], (0, 0, 0, plan.num_first))

    def _edge_input(self, graph: GraphBatch, absent: bool) -> Tensor:
        """Standardised weights, one row per edge, with ``rev_edge_features`` one per reversed edge too.

        `absent`: and a row of zeros, the input of pairs of nodes without an edge.
        """
        plan = graph.plan
        layer = plan.index("node_layer")[plan.index("target")] - 1
        rows = self.stats.standardized("weights", graph.edge_features, layer)
        if self.rev_edge_features:
            none = torch.zeros_like(rows)
            rows = torch.cat([torch.cat([rows, none, rows], dim=1), torch.cat([none, rows, rows], dim=1)])
        return F.pad(rows, (0, 0, 0, 1)) if absent else rows

    def edges(self, graph: GraphBatch, absent: bool = False, order: Tensor | None = None) -> Tensor:
        """Edge features, a row for each of `_edge_input`'s, or for those that int64 ``order`` names."""
        if self.zero_out_weights:
            count = graph.num_edges * (1 + self.rev_edge_features) + absent if order is None else order.shape[0]
            return self.proj_edge_in.bias.expand(count, -1)
        return self._projected_edges(graph, self._edge_input(graph, absent), order)

    def _projected_edges(self, graph: GraphBatch, rows: Tensor, order: Tensor | None) -> Tensor:
        return fused_neural_graphs.chain([*self.proj_weight, self.proj_edge_in], rows, order)

    def nodes(self, graph: GraphBatch) -> Tensor:
        """Node features [N, d_node] in plan order."""
        if self.gpf is not None:
            probes = self.gpf(graph)
            rows = probes if self.zero_out_bias else self.proj_bias(self._node_input(graph)) + probes
            rows = self.proj_node_in(rows)
        elif self.zero_out_bias:
            rows = self.proj_node_in.bias.expand(graph.num_nodes, -1)
        else:
            rows = fused_neural_graphs.chain([*self.proj_bias, self.proj_node_in], self._node_input(graph))
        if self.use_pos_embed:
            rows = rows + self.pos_embed[graph.plan.node_types(*self.types)]
        return rows


class GraphFeatures(_GraphFeatures):
    """Node and edge features of networks of one layout.

    Args:
        d_in, d_edge_in: numbers per bias and per weight.
        d_node, d_edge: widths of the features.
        layer_layout: layer sizes; one positional embedding per input neuron, hidden layer and output neuron.
        rev_edge_features: edges read (w, w reversed, w + w reversed), and there are reversed edges.
        zero_out_bias, zero_out_weights: leave out the biases (not the probe features) or weights.
        inp_factor: standard deviation of the Fourier matrices.
        input_layers: linear layers of each projection.
        sin_emb, sin_emb_dim: Fourier features, and how many frequencies.
        use_pos_embed: add the positional embeddings.
        num_probe_features, inr_model: see `ProbeFeatures`; ``inr_model["n_layers"]`` is their depth.
        stats: see `LayerStatistics`.
    """

    def __init__(
        self,
        d_in: int,
        d_edge_in: int,
        d_node: int,
        d_edge: int,
        layer_layout: Sequence[int],
        rev_edge_features: bool = False,
        zero_out_bias: bool = False,
        zero_out_weights: bool = False,
        inp_factor: float = 1,
        input_layers: int = 1,
        sin_emb: bool = False,
        sin_emb_dim: int = 128,
        use_pos_embed: bool = True,
        num_probe_features: int = 0,
        inr_model: dict | None = None,
        stats=None,
    ):
        super().__init__()
        self.rev_edge_features, self.use_pos_embed = rev_edge_features, use_pos_embed
        self.zero_out_bias, self.zero_out_weights = zero_out_bias, zero_out_weights
        self.types = (layer_layout[0], len(layer_layout) - 2)
        self.stats = LayerStatistics(stats)
        embeddings = layer_layout[0] + len(layer_layout) - 2 + layer_layout[-1]
        self.pos_embed = nn.Parameter(torch.randn(embeddings, d_node))
        args = {"layers": input_layers, "fourier": sin_emb, "frequencies": sin_emb_dim, "sigma": inp_factor}
        if not zero_out_weights:
            self.proj_weight = projection((3 if rev_edge_features else 1) * d_edge_in, d_edge, **args)
        if not zero_out_bias:
            self.proj_bias = projection(d_in, d_node, **args)
        self.proj_node_in = nn.Linear(d_node, d_node)
        self.proj_edge_in = nn.Linear(d_edge, d_edge)
        self.gpf = None
        if num_probe_features > 0:
            self.gpf = ProbeFeatures(layer_layout[0], num_probe_features, inr_model["n_layers"], d_node)


class ActivationEmbedding(nn.Module):
    """A learnt vector per activation function, for the neurons that have it; parameter ``embedding.weight``."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(len(ACTIVATION_NAMES), width)

    def forward(self, graph: GraphBatch) -> Tensor:
        """[N, width]; 0 for first- and last-layer nodes and where no activation is known."""
        plan = graph.plan
        number = graph.architecture_table("activations")[plan.index("node_graph"), plan.index("node_layer")]
        return _rows_or_zero(self.embedding.weight, number)


def _rows_or_zero(table: Tensor, number: Tensor) -> Tensor:
    """Rows of a table, 0 for negative numbers."""
    return F.pad(table, (0, 0, 0, 1))[torch.where(number < 0, table.shape[0], number)]


class VaryingGraphFeatures(_GraphFeatures):
    """Node and edge features of networks whose depths, widths and activations vary.

    Args: those of `GraphFeatures`, and
        max_num_hidden_layers, input_channels, num_classes: sizes of the positional embedding, one row per input neuron,
            hidden layer and output neuron.
        flattening_method: how the batch was made; "repeat_nodes" adds a spatial embedding per pixel to the neurons that
            a channel became.
        max_spatial_resolution: pixels that have a spatial embedding.
        linear_as_conv: linear layers are 1 x 1 kernels; else their weight is the first of d_e numbers and has a
            projection of its own (which, as in the original, their reversed edges do not use).
        use_act_embed: embed activations where the batch knows them.
        shift_weight_stats: see `LayerStatistics`; True is the original's behaviour.
    """

    def __init__(
        self,
        d_in: int,
        d_edge_in: int,
        d_node: int,
        d_edge: int,
        max_num_hidden_layers: int,
        rev_edge_features: bool = False,
        zero_out_bias: bool = False,
        zero_out_weights: bool = False,
        inp_factor: float = 1,
        input_layers: int = 1,
        sin_emb: bool = False,
        sin_emb_dim: int = 128,
        use_pos_embed: bool = True,
        stats=None,
        input_channels: int = 3,
        linear_as_conv: bool = True,
        flattening_method: str | None = "repeat_nodes",
        max_spatial_resolution: int = 64,
        num_classes: int = 10,
        use_act_embed: bool = True,
        shift_weight_stats: bool = True,
    ):
        super().__init__()
        self.rev_edge_features, self.use_pos_embed = rev_edge_features, use_pos_embed
        self.zero_out_bias, self.zero_out_weights = zero_out_bias, zero_out_weights
        self.linear_as_conv, self.gpf = linear_as_conv, None
        self.types = (input_channels, max_num_hidden_layers)
        self.stats = LayerStatistics(stats, shift=shift_weight_stats)
        self.pos_embed = nn.Parameter(torch.randn(max_num_hidden_layers + input_channels + num_classes, d_node))
        if flattening_method == "repeat_nodes":
            self.spatial_embed = nn.Parameter(torch.randn(max_spatial_resolution, d_node))
        args = {"layers": input_layers, "fourier": sin_emb, "frequencies": sin_emb_dim, "sigma": inp_factor}
        inputs = 3 if rev_edge_features else 1
        self.proj_weight = projection(inputs * d_edge_in, d_edge, **args)
        self.proj_bias = projection(d_in, d_node, **args)
        self.proj_node_in = nn.Linear(d_node, d_node)
        self.proj_edge_in = nn.Linear(d_edge, d_edge)
        if not linear_as_conv:
            self.proj_mlp_weight = projection(inputs * d_in, d_edge, **args)
            self.proj_mlp_edge_in = nn.Linear(d_edge, d_edge).requires_grad_(False)
        if use_act_embed:
            self.act_emb = ActivationEmbedding(d_node)

    def _projected_edges(self, graph: GraphBatch, rows: Tensor, order: Tensor | None) -> Tensor:
        if self.linear_as_conv:
            return super()._projected_edges(graph, rows, order)
        linear = self._linear_edges(graph)
        width = graph.edge_features.shape[1]
        single = self.proj_mlp_weight(rows[: graph.num_edges, ::width])
        kernels = self.proj_weight(rows)
        chosen = torch.where(linear.unsqueeze(1), single, kernels[: graph.num_edges])
        projected = self.proj_edge_in(torch.cat([chosen, kernels[graph.num_edges :]]))
        return projected if order is None else projected[order]

    def _linear_edges(self, graph: GraphBatch) -> Tensor:
        """bool [E]: weights of linear layers (of every layer where kernels have one number)."""
        plan = graph.plan
        source, target = plan.index("source"), plan.index("target")
        layer = plan.index("node_layer")
        consecutive = layer[target] == layer[source] + 1
        if graph.edge_features.shape[1] == 1:
            return consecutive
        return consecutive & (graph.architecture_table("linear")[plan.index("node_graph")[target], layer[target]] == 1)

    def nodes(self, graph: GraphBatch) -> Tensor:
        rows = super().nodes(graph)
        if hasattr(self, "spatial_embed"):
            rows = rows + self._spatial(graph)
        if hasattr(self, "act_emb") and any(a is not None and a.activations for a in graph.architectures or ()):
            rows = rows + self.act_emb(graph)
        return rows

    def _spatial(self, graph: GraphBatch) -> Tensor:
        plan = graph.plan
        channels = graph.architecture_table("channels")[plan.index("node_graph"), plan.index("node_layer")]
        pixel = plan.index("node_position") // channels
        return _rows_or_zero(self.spatial_embed, torch.where(channels < 0, -1, pixel))

    def check(self, graph: GraphBatch) -> None:
        """Raises ValueError for a batch that does not say what the options need."""
        needs = {"linear_as_conv=False": not self.linear_as_conv, "repeat_nodes": hasattr(self, "spatial_embed")}
        unknown = graph.architectures is None or any(entry is None for entry in graph.architectures)
        for option, is_set in needs.items():
            if is_set and unknown:
                raise ValueError(
                    f"architectures are needed by {option} (graph.from_cnns knows them), got a batch without"
                )
        if hasattr(self, "spatial_embed"):
            pixels = max(entry.pixels for entry in graph.architectures)
            if pixels > self.spatial_embed.shape[0]:
                raise ValueError(
                    f"feature maps must have at most max_spatial_resolution = {self.spatial_embed.shape[0]} pixels, "
                    f"got {pixels}"
                )
