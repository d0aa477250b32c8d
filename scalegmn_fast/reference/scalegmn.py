"""ScaleGMN written out naively: the oracle that the models are tested against.

One pure function, `scalegmn`, over a state dict. Every row takes every branch and masks choose; nothing is
hoisted, shared, partitioned or fused, so that each line can be read against the definition of the method.

Source: Kalogeropoulos, Bouritsas, Panagakis, "Scale Equivariant Graph Metanetworks", NeurIPS 2024 (arXiv 2406.10685).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["scalegmn"]

Config = Mapping[str, Any]

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, w0: x,
    "elu": lambda x, w0: F.elu(x),
    "relu": lambda x, w0: F.relu(x),
    "silu": lambda x, w0: F.silu(x),
    "tanh": lambda x, w0: torch.tanh(x),
    "sigmoid": lambda x, w0: torch.sigmoid(x),
    "sine": lambda x, w0: torch.sin(w0 * x),
}

AGGREGATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda messages: messages.sum(1),
    "mean": lambda messages: messages.mean(1),
    "max": lambda messages: messages.amax(1),
}


def scalegmn(
    config: Config,
    state: Mapping[str, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    input_value: float = 1.0,
    sign_mask: Tensor | None = None,
) -> Tensor | tuple[list[Tensor], list[Tensor]]:
    """ScaleGMN of a batch of feed-forward networks, in evaluation mode.

    Args:
        config: the model's arguments (``scalegmn_args`` with ``layer_layout``), in the original's keys, and optionally
            ``bidirectional_edges`` (default "original"), ``canonical_eps`` (default 1e-10) and ``exact_edge_encoding``
            (default False).
        state: tensors by the original's parameter names, floating tensors of one dtype.
        weights: L tensors [B, n_in, n_out, d_e] or [B, n_in, n_out].
        biases: L tensors [B, n_out, 1] or [B, n_out].
        input_value: the feature of every input neuron.
        sign_mask: bool [B] or [B, num_neurons] (in layer order, first layer first); True where the symmetry is sign,
            False where it is scale. Used by, and required for, ``symmetry: hetero``.

    Returns:
        [B, d_out] for an invariant head; for an equivariant one new (weights, biases), lists of [B, n_in, n_out, d_e]
        and [B, n_out, 1].

    Raises:
        ValueError: an unknown or contradictory option, inputs that do not match ``layer_layout``, or a missing
            ``sign_mask``.
        KeyError: ``state`` lacks a parameter that the configuration asks for.

    Any device and dtype, float64 included; differentiable any number of times in ``state``, ``weights`` and ``biases``.
    Dropout is off and batch normalisation uses its running statistics. Deterministic on a CPU.
    """
    return _Model(config, state).run(weights, biases, input_value, sign_mask)


@dataclass
class _Rows:
    """What a block has to know about its rows (nodes or edges) beside their features."""

    hidden: Tensor  # bool [rows, 1]
    first: Tensor  # bool [rows, 1]
    sign: Tensor | None  # bool [B, rows, 1], hetero only

    def at(self, index: Tensor) -> _Rows:
        return _Rows(self.hidden[index], self.first[index], None if self.sign is None else self.sign[:, index])


@dataclass
class _Block:
    """Options of an EquivariantNet."""

    layers: int
    equiv_on_hidden: bool
    layer_equiv_on_hidden: bool
    mlp_on_io: bool
    num_mlps: int
    skip_connections: bool


class _Graph:
    """Neurons and weights of one layout, in layer order; edges layer by layer, by source, then by target."""

    def __init__(self, layout: Sequence[int]):
        self.layout = list(layout)
        starts = [sum(layout[:layer]) for layer in range(len(layout) + 1)]
        self.layers = [range(starts[layer], starts[layer + 1]) for layer in range(len(layout))]
        self.num_nodes = starts[-1]
        pairs = [(source, target) for before, after in pairwise(self.layers) for source in before for target in after]
        self.source = torch.tensor([pair[0] for pair in pairs])
        self.target = torch.tensor([pair[1] for pair in pairs])
        layer_of = torch.tensor([layer for layer, nodes in enumerate(self.layers) for _ in nodes])
        last = len(layout) - 1
        self.first = (layer_of == 0)[:, None]
        self.last = (layer_of == last)[:, None]
        self.hidden = ~self.first & ~self.last

        # One type per neuron of the first and of the last layer, one per hidden layer.
        self.node_type = torch.tensor(
            [node for node in self.layers[0]]
            + [layout[0] + layer - 1 for layer in range(1, last) for _ in self.layers[layer]]
            + [layout[0] + last - 1 + k for k in range(layout[last])]
        )
        # One type per input neuron, one per inner layer of weights, one per output neuron.
        types = []
        for source, target in pairs:
            layer = int(layer_of[source])
            if layer == 0:
                types.append(source)
            elif layer < last - 1:
                types.append(layout[0] + layer - 1)
            else:
                types.append(layout[0] + last - 2 + target - self.layers[last][0])
        self.edge_type = torch.tensor(types)


class _Model:
    def __init__(self, config: Config, state: Mapping[str, Tensor]):
        self.config = config
        self.state = state
        self.gnn = config["gnn_args"]
        self.mlp_args = config["mlp_args"]
        self.symmetry = _one_of(config, "symmetry", ("sign", "scale", "hetero", "permutation"))
        self.bidirectional = _one_of(config, "direction", ("forward", "bidirectional")) == "bidirectional"
        self.equivariant = bool(config["equivariant"])
        self.aggregator = _one_of(self.gnn, "aggregator", tuple(AGGREGATORS))
        self.eps = float(config.get("canonical_eps", 1e-10))
        self.bidirectional_edges = config.get("bidirectional_edges", "original")
        kinds = ("original", "reciprocal", "carried")
        if self.bidirectional_edges not in kinds:
            raise ValueError(f"bidirectional_edges must be one of {', '.join(kinds)}, got {self.bidirectional_edges!r}")
        self.graph = _Graph(config["layer_layout"])

    # Blocks. `name` is the prefix of the block's parameters in the state dict.

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def mlp(self, name: str, x: Tensor) -> Tensor:
        args = self.mlp_args
        w0 = float(args.get("w0", 30.0))
        last = len(args["d_k"])
        for i in range(last + 1):
            y = self.linear(f"{name}.fc.{i}", x)
            if i < last:
                if args["layer_norm"]:
                    y = F.layer_norm(
                        y, y.shape[-1:], self.state[f"{name}.ln.{i}.weight"], self.state[f"{name}.ln.{i}.bias"]
                    )
                if args["batch_norm"]:
                    mean, variance, scale, shift = (
                        self.state[f"{name}.bn.{i}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
                    )
                    y = (y - mean) / (variance + 1e-5).sqrt() * scale + shift
                y = ACTIVATIONS[args["activation"]](y, w0)
            if args["skip"] and i > 0:
                y = y + x
            x = y
        return ACTIVATIONS[args["final_activation"]](x, w0)

    def canonicalize(self, name: str, x: Tensor, symmetry: str) -> Tensor:
        if symmetry == "sign":
            if self.gnn["sign_symmetrization"]:
                return self.mlp(f"{name}.rho", x) + self.mlp(f"{name}.rho", -x)
            return x.abs()
        if symmetry == "permutation":
            return x
        # A zero row has direction 0 and no gradient; the inner `where` keeps NaN out of its derivatives.
        zero = (x == 0).all(-1, keepdim=True)
        norm = torch.where(zero, torch.ones_like(x), x).square().sum(-1, keepdim=True).sqrt()
        return torch.where(zero, torch.zeros_like(x), x / (norm + self.eps))

    def invariant(self, name: str, x: Tensor, rows: _Rows, extra: Tensor | None = None, phi: bool = True) -> Tensor:
        """InvariantLayer: phi([c(x), extra]), c(x) without phi; hetero chooses between two of them by the row."""

        def layer(prefix: str, symmetry: str) -> Tensor:
            canonical = _cat(self.canonicalize(prefix, x, symmetry), extra)
            return self.mlp(f"{prefix}.phi", canonical) if phi else canonical

        if self.symmetry != "hetero":
            return layer(f"{name}.g1", self.symmetry)
        return torch.where(rows.sign, layer(f"{name}.g_sign", "sign"), layer(f"{name}.g_scale", "scale"))

    def equivariant_layer(
        self, name: str, x: Tensor, rows: _Rows, extra: Tensor | None, io_mlps: int | None = None
    ) -> Tensor:
        """(W x) * g(x); `io_mlps` is the number of functions that replace g off the hidden rows, None for none."""
        gate = self.invariant(f"{name}.g", x, rows, extra)
        if io_mlps is not None:
            plain = _cat(x, extra)
            other = self.mlp(f"{name}.g.phi_in", plain)
            if io_mlps == 3:
                other = torch.where(rows.first, other, self.mlp(f"{name}.g.phi_last", plain))
            gate = torch.where(rows.hidden, gate, other)
        return self.linear(f"{name}.W", x) * gate

    def equivariant_net(self, name: str, x: Tensor, rows: _Rows, extra: Tensor | None, block: _Block) -> Tensor:
        separate = block.layer_equiv_on_hidden or block.mlp_on_io
        io_mlps = block.num_mlps if block.equiv_on_hidden and not separate else None
        if io_mlps is not None and io_mlps not in (2, 3):
            raise ValueError(f"num_mlps must be 2 or 3 with equiv_on_hidden, got {io_mlps}")

        def other_layer(prefix: str) -> Tensor:
            if block.mlp_on_io:
                return self.mlp(f"{prefix}.rho", _cat(x, extra))
            return self.equivariant_layer(prefix, x, rows, extra)

        for i in range(block.layers):
            y = self.equivariant_layer(f"{name}.eq_layers.{i}", x, rows, extra, io_mlps)
            if separate and block.num_mlps in (2, 3):
                other = other_layer(f"{name}.eq_layers_in.{i}")
                if block.num_mlps == 3:
                    other = torch.where(rows.first, other, other_layer(f"{name}.eq_layers_last.{i}"))
                y = torch.where(rows.hidden, y, other)
            x = self.linear(f"{name}.skip_layers.{i}", x) + y if block.skip_connections else y
        return x

    def block(self, kind: str) -> _Block:
        """Options of the message ("msg") or node update ("upd") function."""
        long = {"msg": "message_fn", "upd": "update_node_feats_fn"}[kind]
        return _Block(
            layers=self.gnn[f"{long}_layers"],
            equiv_on_hidden=self.gnn[f"{kind}_equiv_on_hidden"],
            layer_equiv_on_hidden=self.gnn[f"layer_{kind}_equiv_on_hidden"],
            mlp_on_io=self.gnn["mlp_on_io"],
            num_mlps=self.gnn[f"{kind}_num_mlps"],
            skip_connections=self.gnn[f"{long}_skip_connections"],
        )

    # Positional encodings.

    def positional(self, name: str, x: Tensor, types: Tensor, rows: _Rows, on_nodes: bool) -> tuple[Tensor, Tensor]:
        options = self.config["positional_encodings"]
        p = self.state[f"{name}.pos_embed"][types]
        if self.symmetry == "permutation":
            return x + p, p
        sum_on_io = options["sum_on_io"] and on_nodes
        if options["equiv_net"]:
            block = _Block(
                layers=self.gnn["message_fn_layers"],
                equiv_on_hidden=options["equiv_on_hidden"],
                layer_equiv_on_hidden=options["layer_equiv_on_hidden"],
                mlp_on_io=self.gnn["mlp_on_io"],
                num_mlps=options["num_mlps"],
                skip_connections=False,
            )
            y = self.equivariant_net(f"{name}.init_fn", x, rows, p.expand(x.shape[0], -1, -1), block)
            y = torch.where(rows.hidden, y, x + p) if sum_on_io else y
        else:
            if options["sum_pos_enc"]:
                y = x + p
            elif sum_on_io:
                y = torch.where(rows.hidden, x * p, x + p)
            else:
                y = x * p
            if options["final_linear_pos_embed"]:
                y = self.linear(f"{name}.final_linear", y)
        if options["po_as_different_linear"]:
            y = torch.einsum("bri,roi->bro", y, self.state[f"{name}.linears"][types])
        return y, p

    # Message passing.

    def aggregate(self, messages: Tensor, receiver: Tensor) -> Tensor:
        """[B, edges, d] -> [B, nodes, d]; a node without edges gets 0."""
        by_receiver = messages.index_select(1, receiver.argsort(stable=True))
        counts = torch.bincount(receiver, minlength=self.graph.num_nodes).tolist()
        reduce = AGGREGATORS[self.aggregator]
        nothing = messages.new_zeros(messages.shape[0], messages.shape[2])
        return torch.stack([reduce(own) if own.shape[1] else nothing for own in by_receiver.split(counts, 1)], 1)

    def message_pass(
        self, name: str, x: Tensor, e: Tensor, source: Tensor, target: Tensor, rows: _Rows, p: Tensor | None
    ) -> Tensor:
        if self.symmetry == "permutation":
            messages = self.mlp(f"{name}.message_fn.rho", torch.cat([e, x.index_select(1, source)], -1))
        else:
            product = self.linear(f"{name}.w_e", e) * self.linear(f"{name}.w_v", x.index_select(1, source))
            messages = self.equivariant_net(f"{name}.message_fn", product, rows.at(target), p, self.block("msg"))
        return self.aggregate(messages, target)

    def carried_message_pass(
        self, name: str, x: Tensor, e: Tensor, source: Tensor, target: Tensor, rows: _Rows, p: Tensor | None
    ) -> Tensor:
        """Messages from the targets back to the sources of edges: (W x_source) * g([x_target, m], p).

        m = (w_e e) * (w_v x_source) scales like x_target, so the pair has the target's symmetry and g is invariant.
        """
        product = self.linear(f"{name}.w_e", e) * self.linear(f"{name}.w_v", x.index_select(1, source))
        gate = self.invariant(name, torch.cat([x.index_select(1, target), product], -1), rows.at(target), p)
        return self.aggregate(self.linear(f"{name}.W", x.index_select(1, source)) * gate, source)

    def node_update(self, name: str, x: Tensor, aggregated: list[Tensor], rows: _Rows, p: Tensor | None) -> Tensor:
        inputs = torch.cat([x, *aggregated], -1)
        if self.symmetry == "permutation":
            return self.mlp(f"{name}.rho", inputs)
        return self.equivariant_net(name, inputs, rows, p, self.block("upd"))

    def sine_update(self, name: str, x: Tensor, aggregated: Tensor) -> Tensor:
        if _one_of(self.gnn, "update_as_act_arg", ("cat", "sum")) == "cat":
            inputs = torch.cat([x, aggregated], -1)
        else:
            inputs = self.linear(f"{name}.w_h", x) + self.linear(f"{name}.w_msg", aggregated)
        return torch.sin(30.0 * self.linear(f"{name}.update_node_feats_fn.W", inputs))

    def edge_update(self, name: str, x: Tensor, e: Tensor, source: Tensor, target: Tensor, rows: _Rows) -> Tensor:
        if self.symmetry == "permutation":
            return self.mlp(f"{name}.phi", torch.cat([e, x.index_select(1, source), x.index_select(1, target)], -1))
        ends = [self.invariant(name, x.index_select(1, end), rows.at(end), phi=False) for end in (source, target)]
        return self.linear(f"{name}.W", e) * self.mlp(f"{name}.phi", torch.cat(ends, -1))

    def rounds(self, x: Tensor, e: Tensor, e_back: Tensor, rows: _Rows, p: Tensor | None) -> tuple[Tensor, Tensor]:
        """All rounds of message passing: node features and (forward) edge features after the last."""
        source, target = self.graph.source, self.graph.target
        last = self.config["num_layers"] - 1
        carried = self.bidirectional_edges == "carried"

        def shown(option: str, index: Tensor | None = None) -> Tensor | None:
            if not self.gnn[option] or p is None:
                return None
            chosen = p if index is None else p[index]
            return chosen.expand(x.shape[0], -1, -1)

        for i in range(last + 1):
            update_edges = self.gnn["update_edge_attr"] and (i < last or self.equivariant)
            forward, backward = f"gnn.fw_layers.{i}", f"gnn.bw_layers.{i}"
            if self.bidirectional:
                aggregated = [self.message_pass(forward, x, e, source, target, rows, shown("pos_embed_msg", source))]
                p_back = shown("pos_embed_msg", target)
                if carried:
                    aggregated.append(self.carried_message_pass(backward, x, e, source, target, rows, p_back))
                else:
                    aggregated.append(self.message_pass(backward, x, e_back, target, source, rows, p_back))
                updated = self.node_update(f"gnn.update_node_feats_fn.{i}", x, aggregated, rows, shown("pos_embed_upd"))
                if update_edges:
                    e = self.edge_update(f"gnn.fw_update_edge_attr_fn.{i}", x, e, source, target, rows)
                    if self.symmetry == "scale" and not carried:
                        e_back = self.edge_update(f"gnn.bw_update_edge_attr_fn.{i}", x, e_back, target, source, rows)
            else:
                received = self.message_pass(forward, x, e, source, target, rows, shown("pos_embed_msg", target))
                if self.gnn["update_as_act"] and self.symmetry != "permutation":
                    updated = self.sine_update(forward, x, received)
                else:
                    name = f"{forward}.update_node_feats_fn"
                    updated = self.node_update(name, x, [received], rows, shown("pos_embed_upd"))
                if update_edges:
                    e = self.edge_update(f"{forward}.update_edge_attr_fn", x, e, source, target, rows)
            if self.config["gnn_skip_connections"] and (i < last or not self.equivariant):
                updated = self.linear(f"gnn.skip_layers.{i}", x) + updated
            x = updated
        return x, e

    # Heads.

    def invariant_head(self, x: Tensor, rows: _Rows) -> Tensor:
        graph = self.graph
        first, last = (x[:, list(graph.layers[layer])].flatten(1) for layer in (0, -1))
        if _one_of(self.config, "readout_range", ("last_layer", "full_graph")) == "last_layer":
            if self.bidirectional:
                project = self.mlp if self.config.get("concat_mlp_directions", False) else self.linear
                ends = [project("gnn.project_last", last), project("gnn.project_first", first)]
                return self.mlp("gnn.readout.rho", torch.cat(ends, -1))
            return self.mlp("gnn.readout.rho", last)
        if self.symmetry == "permutation":
            return self.mlp("gnn.readout.global_mlp", self.mlp("gnn.readout.local_mlp", x).sum(1))
        hidden = torch.where(rows.hidden, self.invariant("gnn.readout", x, rows), x.new_zeros(())).sum(1)
        return self.mlp("gnn.readout.global_mlp", torch.cat([hidden, first, last], -1))

    def equivariant_head(self, x: Tensor, e: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        layout = self.graph.layout
        weights, biases = [], []
        edge = 0
        for layer, (n_in, n_out) in enumerate(pairwise(layout)):
            block = e[:, edge : edge + n_in * n_out].unflatten(1, (n_in, n_out))
            edge += n_in * n_out
            weights.append(block * self.state[f"weight_scale.{layer}"])
            biases.append(x[:, list(self.graph.layers[layer + 1])] * self.state[f"bias_scale.{layer}"])
        return weights, biases

    def run(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], input_value: float, sign_mask: Tensor | None
    ) -> Tensor | tuple[list[Tensor], list[Tensor]]:
        graph = self.graph
        weights = [w if w.dim() == 4 else w[..., None] for w in weights]
        biases = [b if b.dim() == 3 else b[..., None] for b in biases]
        layout = [weights[0].shape[1], *(w.shape[2] for w in weights)]
        if layout != graph.layout or [b.shape[1] for b in biases] != layout[1:]:
            raise ValueError(f"weights and biases must have layer_layout {graph.layout}, got layers {layout}")
        batch = weights[0].shape[0]
        device = weights[0].device
        for name in ("source", "target", "first", "last", "hidden", "node_type", "edge_type"):
            setattr(graph, name, getattr(graph, name).to(device))

        sign = None
        if self.symmetry == "hetero":
            if sign_mask is None:
                raise ValueError("sign_mask must be given for symmetry 'hetero', got None")
            per_graph = sign_mask if sign_mask.dim() == 2 else sign_mask[:, None]
            sign = per_graph.expand(batch, graph.num_nodes)[..., None].to(device)
        rows = _Rows(graph.hidden, graph.first, sign)

        x = torch.cat([biases[0].new_full((batch, layout[0], 1), input_value), *biases], 1)
        e = torch.cat([w.flatten(1, 2) for w in weights], 1)
        e_back = e
        if self.bidirectional_edges == "reciprocal":
            square = e.square().sum(-1, keepdim=True)
            zero = square == 0
            e_back = torch.where(zero, torch.zeros_like(e), e / torch.where(zero, torch.ones_like(square), square))

        init = self.config["graph_init"]
        if init["project_node_feats"]:
            x = self.linear("construct_graph.proj_bias", x)
        if init["project_edge_feats"]:
            e, e_back = (self.linear("construct_graph.proj_weight", features) for features in (e, e_back))
        p = None
        if self.config["node_pos_embed"]:
            x, p = self.positional("positional_embeddings", x, graph.node_type, rows, on_nodes=True)
        if self.config["edge_pos_embed"]:
            edge_rows = rows.at(graph.target)
            if self.config.get("exact_edge_encoding", False):
                edge_rows.hidden = graph.hidden[graph.source] | graph.hidden[graph.target]
            name = "positional_embeddings_edge"
            e, e_back = (
                self.positional(name, features, graph.edge_type, edge_rows, on_nodes=False)[0]
                for features in (e, e_back)
            )

        x, e = self.rounds(x, e, e_back, rows, p)
        return self.equivariant_head(x, e) if self.equivariant else self.invariant_head(x, rows)


def _cat(x: Tensor, extra: Tensor | None) -> Tensor:
    return x if extra is None else torch.cat([x, extra], -1)


def _one_of(options: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = options[key]
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}")
    return value
