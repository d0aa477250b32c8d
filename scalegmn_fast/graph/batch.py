"""`GraphBatch`: a batch of feed-forward networks as node and edge features over a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .architecture import Architecture, table_row
from .plan import GraphPlan, merge_slices

SYMMETRIES = ("sign", "scale", "hetero", "permutation")
SPLITS = ("nodes", "edges", "reversed", "reversed_senders")


class RowSplit:
    """Rows of a two-way partition (sign and scale neurons of a hetero batch), as index tensors made once per batch.

    ``select(start, stop)`` gives the rows of each side within a range of plan rows, relative to its start, without
    synchronising with the device: the counts at all block boundaries are kept on the host.
    """

    def __init__(self, true_rows: Tensor, false_rows: Tensor, counts: dict[int, int]):
        self.true_rows, self.false_rows, self.counts = true_rows, false_rows, counts

    @classmethod
    def from_flags(cls, flags: Tensor, boundaries: Sequence[int]) -> RowSplit:
        """Partition of bool [R] that can be selected from at the given row numbers."""
        running = torch.cat([flags.new_zeros(1, dtype=torch.long), flags.long().cumsum(0)])
        counts = running[torch.as_tensor(list(boundaries), device=flags.device)].tolist()
        return cls(
            flags.nonzero().squeeze(1), (~flags).nonzero().squeeze(1), dict(zip(boundaries, counts, strict=True))
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> RowSplit:
        """The partition on another device."""
        return RowSplit(
            self.true_rows.to(device, non_blocking=non_blocking),
            self.false_rows.to(device, non_blocking=non_blocking),
            self.counts,
        )

    def select(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        a, b = self.counts[start], self.counts[stop]
        true_rows, false_rows = self.true_rows[a:b], self.false_rows[start - a : stop - b]
        return (true_rows - start, false_rows - start) if start else (true_rows, false_rows)


class GraphBatch:
    """A batch of networks: neurons are nodes (feature: bias), weights are edges (source neuron -> target neuron).

    Attributes:
        node_features: [N, d_v], floating point, in plan order.
        edge_features: [E, d_e], same dtype and device, in plan order.
        plan: the `GraphPlan`.
        sign_mask: bool [N] or None; for ``hetero`` models, True where a neuron has the sign symmetry, else scale.
        symmetry: the symmetry that all networks of the batch have, "sign", "scale", "hetero" or "permutation"; None if
            their activations are not known (only `from_modules` can read them).
        architectures: per graph an `Architecture` or None, for models of varying architectures; None if nothing is
            known of any.

    Gradients flow from the features back to the tensors they were built from. Pickles hold nothing that is derived. A
    pytree of its tensors over the plan: `torch.export` of a model makes a program for batches of that plan.
    """

    def __init__(
        self,
        node_features: Tensor,
        edge_features: Tensor,
        plan: GraphPlan,
        sign_mask: Tensor | None = None,
        *,
        symmetry: str | None = None,
        architectures: Sequence[Architecture | None] | None = None,
    ):
        for name, value, rows in (
            ("node_features", node_features, plan.num_nodes),
            ("edge_features", edge_features, plan.num_edges),
        ):
            if value.ndim != 2 or value.shape[0] != rows:
                raise ValueError(f"{name} must have shape [{rows}, d], got {list(value.shape)}")
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {value.dtype}")
        if edge_features.dtype != node_features.dtype:
            raise TypeError(
                f"edge_features must have node_features' dtype {node_features.dtype}, got {edge_features.dtype}"
            )
        if not node_features.device == edge_features.device == plan.device:
            raise ValueError(
                "node_features, edge_features and plan must be on one device, "
                f"got {node_features.device}, {edge_features.device}, {plan.device}"
            )
        if sign_mask is not None:
            _check_mask_type(sign_mask, plan.device)
            if sign_mask.shape != (plan.num_nodes,):
                raise ValueError(f"sign_mask must have shape [{plan.num_nodes}], got {list(sign_mask.shape)}")
        if symmetry is not None and symmetry not in SYMMETRIES:
            raise ValueError(f"symmetry must be one of {', '.join(SYMMETRIES)} or None, got {symmetry!r}")
        self.node_features, self.edge_features = node_features, edge_features
        if architectures is not None and len(architectures) != plan.num_graphs:
            raise ValueError(
                f"architectures must have one entry per graph, {plan.num_graphs}, got {len(architectures)}"
            )
        self.plan, self.sign_mask, self.symmetry = plan, sign_mask, symmetry
        self.architectures = None if architectures is None else tuple(architectures)
        self._splits: dict[str, RowSplit] = {}
        self._tables: dict[str, Tensor] = {}

    num_graphs = property(lambda self: self.plan.num_graphs)
    num_nodes = property(lambda self: self.plan.num_nodes)
    num_edges = property(lambda self: self.plan.num_edges)
    layouts = property(lambda self: self.plan.layouts)
    device = property(lambda self: self.node_features.device)
    dtype = property(lambda self: self.node_features.dtype)

    def __repr__(self) -> str:
        layouts = ", ".join(f"{part.count} x {list(part.layout) if part.layout else 'dag'}" for part in self.plan.parts)
        shapes = f"nodes {list(self.node_features.shape)}, edges {list(self.edge_features.shape)}"
        return f"GraphBatch({layouts}; {shapes}, {self.dtype}, {self.device})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_splits": {}, "_tables": {}}

    # -- building ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_weights(
        cls,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *,
        input_value: float = 1.0,
        sign_mask: Tensor | None = None,
    ) -> GraphBatch:
        """Batch of equally shaped networks from their stacked parameters.

        Args:
            weights: per layer [B, n_in, n_out, d_e] or [B, n_in, n_out] (input neuron first), floating point.
            biases: per layer [B, n_out, 1] or [B, n_out].
            input_value: node feature of first-layer neurons, which have no bias: 1 for INRs, 0 for CNNs.
            sign_mask: bool [B] (per network) or [B, neurons] (per neuron, layer by layer from the input): True where
                the sign symmetry holds, False for scale. Needed by ``hetero`` models only.

        Deterministic; differentiable in weights and biases.

        Raises:
            TypeError, ValueError: an argument of a wrong type, number, shape, dtype or device; an empty batch.
        """
        weights, biases = _check_weights(weights, biases)
        num_graphs = weights[0].shape[0]
        layout = (weights[0].shape[1], *(w.shape[2] for w in weights))
        plan = GraphPlan.from_layout(layout, num_graphs).to(weights[0].device)
        d_v = biases[0].shape[2]
        first = weights[0].new_full((num_graphs * layout[0], d_v), float(input_value))
        nodes = torch.cat([*(b.reshape(-1, d_v) for b in reversed(biases)), first])
        edges = torch.cat([w.transpose(1, 2).reshape(-1, w.shape[3]) for w in reversed(weights)])
        return cls(nodes, edges, plan, _plan_sign_mask(sign_mask, plan, layout))

    @classmethod
    def from_edges(
        cls,
        node_features: Tensor,
        edge_index: Tensor,
        edge_features: Tensor,
        *,
        graph: Tensor | None = None,
        sign_mask: Tensor | None = None,
    ) -> GraphBatch:
        """Batch from any directed acyclic graphs; rows are brought into plan order.

        Args:
            node_features: [N, d_v]; edge_features: [E, d_e].
            edge_index: integer [2, E], source and target rows. Nodes without in-edges are first-layer nodes, others
                without out-edges last-layer nodes.
            graph: integer [N], graph of each node; one graph if None.
            sign_mask: bool [N] or one per graph.

        Raises:
            TypeError, ValueError: an argument of a wrong type, shape, dtype or device, or what `GraphPlan.from_edges`
                rejects, such as a cycle among the edges.
        """
        for name, value in (
            ("node_features", node_features),
            ("edge_index", edge_index),
            ("edge_features", edge_features),
        ):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
            if value.ndim != 2:
                raise ValueError(f"{name} must have 2 dimensions, got shape {list(value.shape)}")
        if edge_features.shape[0] != edge_index.shape[1]:
            raise ValueError(
                f"edge_features must have {edge_index.shape[1]} rows, one per edge, got {edge_features.shape[0]}"
            )
        if graph is not None and not isinstance(graph, Tensor):
            raise TypeError(f"graph must be a torch.Tensor, got {type(graph).__name__}")
        plan, node_order, edge_order = GraphPlan.from_edges(
            edge_index.detach().cpu().numpy(),
            node_features.shape[0],
            None if graph is None else graph.detach().cpu().numpy(),
        )
        device = node_features.device
        node_order, edge_order = torch.from_numpy(node_order).to(device), torch.from_numpy(edge_order).to(device)
        plan = plan.to(device)
        if sign_mask is not None:
            _check_mask_type(sign_mask, device)
            if sign_mask.shape == (plan.num_graphs,):
                sign_mask = sign_mask[plan.index("node_graph")]
            elif sign_mask.shape == node_order.shape:
                sign_mask = sign_mask[node_order]
            else:
                raise ValueError(
                    f"sign_mask must have shape [{plan.num_graphs}] or [{plan.num_nodes}], got {list(sign_mask.shape)}"
                )
        return cls(node_features[node_order], edge_features[edge_order.to(edge_features.device)], plan, sign_mask)

    @classmethod
    def from_state_dicts(
        cls,
        state_dicts: Sequence[Mapping[str, Tensor]],
        *,
        input_value: float | None = None,
        sign_mask: Tensor | Sequence[Tensor | bool] | None = None,
        names: Sequence[tuple[str, str | None]] | None = None,
        kernel_size: tuple[int, int] | None = None,
        linear_tap: str = "centre",
    ) -> GraphBatch:
        """Batch of networks from one state dict each. See `builders.from_state_dicts`."""
        from . import builders

        return builders.from_state_dicts(
            state_dicts,
            input_value=input_value,
            sign_mask=sign_mask,
            names=names,
            kernel_size=kernel_size,
            linear_tap=linear_tap,
        )

    @classmethod
    def from_modules(
        cls,
        modules: Sequence[nn.Module],
        *,
        inputs: Tensor | Sequence[Tensor] | None = None,
        input_value: float | None = None,
        activation: str | None = None,
        module_symmetry: Mapping[type[nn.Module], str] | None = None,
        kernel_size: tuple[int, int] | None = None,
        linear_tap: str = "centre",
    ) -> GraphBatch:
        """Batch of live networks, with the symmetry their activations have. See `builders.from_modules`."""
        from . import builders

        return builders.from_modules(
            modules,
            inputs=inputs,
            input_value=input_value,
            activation=activation,
            module_symmetry=module_symmetry,
            kernel_size=kernel_size,
            linear_tap=linear_tap,
        )

    @classmethod
    def from_pyg(cls, batch: Any) -> GraphBatch:
        """Batch of the original implementation's PyG ``Batch`` or ``Data``. See `pyg.from_pyg`."""
        from . import pyg

        return pyg.from_pyg(batch)

    @classmethod
    def cat(cls, batches: Sequence[GraphBatch]) -> GraphBatch:
        """One batch of all networks of several, numbered in the order given; layouts may differ.

        ``symmetry`` is what they share: sign and scale make hetero; permutation, which needs no masks, and unknown take
        over.

        Raises:
            ValueError: no batches; feature widths, dtypes or devices that differ; a sign mask on some but not all.
        """
        batches = list(batches)
        if not batches:
            raise ValueError("batches must hold at least one GraphBatch, got none")
        for index, batch in enumerate(batches):
            if not isinstance(batch, GraphBatch):
                raise TypeError(f"batches[{index}] must be a GraphBatch, got {type(batch).__name__}")
        for name in ("dtype", "device"):
            found = {getattr(batch, name) for batch in batches}
            if len(found) > 1:
                raise ValueError(f"batches must share one {name}, got {sorted(map(str, found))}")
        for name in ("node_features", "edge_features"):
            found = {getattr(batch, name).shape[1] for batch in batches}
            if len(found) > 1:
                raise ValueError(f"batches must share one width of {name}, got {sorted(found)}")
        symmetry = _joint_symmetry([batch.symmetry for batch in batches])
        masked = [batch.sign_mask is not None for batch in batches]
        if any(masked) != all(masked) and symmetry != "permutation":
            raise ValueError(
                f"sign_mask must be given for all batches or none, got it for {sum(masked)} of {len(masked)}"
            )
        if len(batches) == 1:
            return batches[0]
        node_slices, edge_slices, _ = merge_slices([batch.plan.blocks for batch in batches])
        plan = GraphPlan.cat([batch.plan for batch in batches])
        nodes = torch.cat([batches[part].node_features[rows] for part, rows in node_slices])
        edges = torch.cat([batches[part].edge_features[rows] for part, rows in edge_slices])
        mask = torch.cat([batches[part].sign_mask[rows] for part, rows in node_slices]) if all(masked) else None
        return cls(nodes, edges, plan, mask, symmetry=symmetry, architectures=_joint_architectures(batches))

    # -- reading back ------------------------------------------------------------------------------------------------

    def to_weights(self) -> tuple[list[Tensor], list[Tensor]] | list[tuple[list[Tensor], list[Tensor]]]:
        """Per-layer tensors back from the features: ``(weights, biases)`` in `from_weights`' shapes.

        A batch joined by `cat` gives a list of such pairs, one per joined batch; one of mixed layouts built otherwise,
        one per run of equal layouts. Views of the features where there is one pair; differentiable.

        Raises:
            ValueError: a part is no dense stack of layers (a graph with skipping edges).
        """
        plan = self.plan
        node_slices, edge_slices, _ = merge_slices([part.blocks for part in plan.parts])
        nodes = _split(self.node_features, node_slices, len(plan.parts))
        edges = _split(self.edge_features, edge_slices, len(plan.parts))
        results = []
        for part, x, e in zip(plan.parts, nodes, edges, strict=True):
            layout, count = part.layout, part.count
            if layout is None:
                raise ValueError("to_weights needs dense stacks of layers, got a graph with skipping or missing edges")
            weights, biases, row, edge = [], [], 0, 0
            for fan_in, width in reversed(list(zip(layout[:-1], layout[1:], strict=True))):
                biases.append(x[row : row + count * width].reshape(count, width, -1))
                row += count * width
                block = e[edge : edge + count * width * fan_in]
                weights.append(block.reshape(count, width, fan_in, -1).transpose(1, 2))
                edge += count * width * fan_in
            results.append((weights[::-1], biases[::-1]))
        return results[0] if len(results) == 1 else results

    def with_features(self, node_features: Tensor, edge_features: Tensor) -> GraphBatch:
        """The same graphs with other features."""
        return GraphBatch(
            node_features,
            edge_features,
            self.plan,
            self.sign_mask,
            symmetry=self.symmetry,
            architectures=self.architectures,
        )

    # -- moving ------------------------------------------------------------------------------------------------------

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> GraphBatch:
        """The batch on a device and in a floating dtype; ``to(dtype)`` works too. A plan's copies are cached.

        A sign mask that leaves the CPU takes its partitions along, so that no step has to wait for the device.

        Raises:
            TypeError: ``dtype`` is not floating point.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype}")
        device = self.device if device is None else torch.device(device)
        moved = GraphBatch(
            self.node_features.to(device, dtype, non_blocking=non_blocking),
            self.edge_features.to(device, dtype, non_blocking=non_blocking),
            self.plan.to(device),
            None if self.sign_mask is None else self.sign_mask.to(device, non_blocking=non_blocking),
            symmetry=self.symmetry,
            architectures=self.architectures,
        )
        if self.sign_mask is not None and self.device.type == "cpu" and device.type != "cpu":
            for rows in SPLITS:
                self.sign_split(rows)
        moved._splits = {rows: split.to(device, non_blocking=non_blocking) for rows, split in self._splits.items()}
        moved._tables = {name: table.to(device, non_blocking=non_blocking) for name, table in self._tables.items()}
        return moved

    def pin_memory(self) -> GraphBatch:
        """The batch in page-locked memory, for asynchronous copies to a GPU.

        Raises:
            RuntimeError: this machine has no accelerator to lock pages for.
        """
        plan = self.plan.pin_memory()
        mask = None if self.sign_mask is None else self.sign_mask.pin_memory()
        nodes, edges = self.node_features.pin_memory(), self.edge_features.pin_memory()
        return GraphBatch(nodes, edges, plan, mask, symmetry=self.symmetry, architectures=self.architectures)

    # -- architectures -----------------------------------------------------------------------------------------------

    def architecture_table(self, name: str) -> Tensor:
        """int64 [B, L] of what `architectures` say, made once per batch; L counts the neurons' layers of the deepest.

        Args:
            name: "activations", per layer of neurons the number of its activation in `ACTIVATION_NAMES`; "linear", per
                layer of neurons 1 if the weights into it are a linear layer's; "channels", the channels that the
                neurons of a layer repeat (``repeat_nodes``). -1 where unknown or not applicable.
        """
        if name not in self._tables:
            depth = self.plan.max_layer + 1
            entries, widths = self.architectures or (None,) * self.num_graphs, self.plan.layer_widths()
            rows = [table_row(name, entry, depth, layers) for entry, layers in zip(entries, widths, strict=True)]
            self._tables[name] = torch.tensor(rows, device=self.device)
        return self._tables[name]

    # -- partition of a hetero batch ---------------------------------------------------------------------------------

    def sign_split(self, rows: str) -> RowSplit:
        """Partition by the sign mask, made once per batch.

        Args:
            rows: "nodes"; "edges", forward messages by their target; "reversed", backward messages in ``source_order``
                by the weight's source, which receives them; "reversed_senders", the same by the weight's target.

        Raises:
            ValueError: the batch has no sign mask; an unknown name.
        """
        if rows not in SPLITS:
            raise ValueError(f"rows must be one of {', '.join(SPLITS)}, got {rows!r}")
        if self.sign_mask is None:
            raise ValueError("sign_mask is needed to tell sign from scale neurons, got a batch without one")
        if rows not in self._splits:
            plan = self.plan
            if rows == "nodes":
                flags, boundaries = self.sign_mask, _running(block.nodes for block in plan.blocks)
            elif rows == "edges":
                flags, boundaries = self.sign_mask[plan.index("target")], _running(block.edges for block in plan.blocks)
            else:
                sender, receiver = plan.reversed_ends()
                flags = self.sign_mask[receiver if rows == "reversed" else sender]
                boundaries = [0, plan.num_edges - plan.edges_from_first, plan.num_edges]
            self._splits[rows] = RowSplit.from_flags(flags, sorted(set(boundaries)))
        return self._splits[rows]


def _running(sizes) -> list[int]:
    total, out = 0, [0]
    for size in sizes:
        total += size
        out.append(total)
    return out


def _joint_symmetry(found: list[str | None]) -> str | None:
    kinds = set(found)
    if len(kinds) == 1:
        return found[0]
    if None in kinds:
        return None
    return "permutation" if "permutation" in kinds else "hetero"


def _joint_architectures(batches: list[GraphBatch]) -> list[Architecture | None] | None:
    if all(batch.architectures is None for batch in batches):
        return None
    return [entry for batch in batches for entry in batch.architectures or (None,) * batch.num_graphs]


def _split(rows: Tensor, slices, parts: int) -> list[Tensor]:
    if parts == 1:
        return [rows]
    found = [[] for _ in range(parts)]
    position = 0
    for part, piece in slices:
        count = piece.stop - piece.start
        found[part].append(rows[position : position + count])
        position += count
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found]


def _check_weights(weights, biases) -> tuple[list[Tensor], list[Tensor]]:
    for name, value in (("weights", weights), ("biases", biases)):
        if not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors, one per layer, got {type(value).__name__}")
    weights, biases = list(weights), list(biases)
    if not weights:
        raise ValueError("weights must hold at least one layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases must hold one tensor per layer, {len(weights)}, got {len(biases)}")
    first = weights[0]
    for name, tensors, dims in (("weights", weights, (3, 4)), ("biases", biases, (2, 3))):
        for index, value in enumerate(tensors):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{index}] must be a torch.Tensor, got {type(value).__name__}")
            if value.ndim not in dims:
                raise ValueError(
                    f"{name}[{index}] must have {dims[0]} or {dims[1]} dimensions, got shape {list(value.shape)}"
                )
            if not value.is_floating_point() or value.dtype != first.dtype:
                raise TypeError(
                    f"{name}[{index}] must be floating point of weights[0]'s dtype {first.dtype}, got {value.dtype}"
                )
            if value.device != first.device:
                raise ValueError(f"{name}[{index}] must be on weights[0]'s device {first.device}, got {value.device}")
    weights = [w.unsqueeze(-1) if w.ndim == 3 else w for w in weights]
    biases = [b.unsqueeze(-1) if b.ndim == 2 else b for b in biases]
    num_graphs, _, _, d_e = weights[0].shape
    if num_graphs == 0:
        raise ValueError(f"weights[0] must hold at least one network (dimension 0), got shape {list(weights[0].shape)}")
    if d_e == 0:
        raise ValueError(
            f"weights[0] must hold at least one number per edge (dimension 3), got {list(weights[0].shape)}"
        )
    width, d_v = weights[0].shape[1], biases[0].shape[2]
    for index, (w, b) in enumerate(zip(weights, biases, strict=True)):
        expected = [num_graphs, width, w.shape[2], d_e]
        if list(w.shape) != expected:
            raise ValueError(f"weights[{index}] must have shape {expected}, got {list(w.shape)}")
        if list(b.shape) != [num_graphs, w.shape[2], d_v]:
            raise ValueError(f"biases[{index}] must have shape {[num_graphs, w.shape[2], d_v]}, got {list(b.shape)}")
        width = w.shape[2]
    return weights, biases


def _check_mask_type(mask, device) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"sign_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.device != device:
        raise ValueError(f"sign_mask must be on {device}, got {mask.device}")


def _plan_sign_mask(mask: Tensor | None, plan: GraphPlan, layout: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    _check_mask_type(mask, plan.device)
    count = plan.num_graphs
    if mask.shape == (count,):
        return mask[plan.index("node_graph")]
    if mask.shape == (count, sum(layout)):
        return torch.cat([piece.reshape(-1) for piece in reversed(mask.split(list(layout), dim=1))])
    raise ValueError(f"sign_mask must have shape [{count}] or [{count}, {sum(layout)}], got {list(mask.shape)}")


def _flatten(batch: GraphBatch):
    children = [batch.node_features, batch.edge_features, batch.sign_mask]
    return children, (batch.plan, batch.symmetry, batch.architectures)


def _flatten_with_keys(batch: GraphBatch):
    children, context = _flatten(batch)
    keys = (pytree.GetAttrKey(name) for name in ("node_features", "edge_features", "sign_mask"))
    return list(zip(keys, children, strict=True)), context


def _unflatten(children, context) -> GraphBatch:
    batch = object.__new__(GraphBatch)  # a pytree's leaves may be anything, so no checks
    batch.node_features, batch.edge_features, batch.sign_mask = children
    batch.plan, batch.symmetry, batch.architectures = context
    batch._splits, batch._tables = {}, {}
    return batch


pytree.register_pytree_node(
    GraphBatch,
    _flatten,
    _unflatten,
    serialized_type_name="scalegmn_fast.graph.GraphBatch",
    flatten_with_keys_fn=_flatten_with_keys,
)
