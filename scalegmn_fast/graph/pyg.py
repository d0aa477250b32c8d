"""`GraphBatch` from PyG batches as the original implementation makes them; their structure is computed once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import GraphBatch
from .plan import GraphPlan

#: What says how a batch is built, beside the number of nodes: batches that agree in these have one structure.
STRUCTURE = (
    "edge_index", "batch", "ptr", "bw_edge_index", "mask_hidden", "mask_first_layer", "node2type", "edge2type",
)  # fmt: skip
_CACHED_BATCHES = 8
_CACHED_EDGES = 1 << 22


def from_pyg(batch: Any, *, type_sizes: tuple[int, int] | None = None) -> GraphBatch:
    """Batch of the original implementation's PyG ``Batch`` or single ``Data``, or any object with their attributes.

    Read are ``x`` [N, d_v], ``edge_index`` [2, E], ``edge_attr`` [E, d_e], and where present ``batch`` [N] or ``ptr``
    [B + 1] (graph of each node) and ``sign_mask`` (bool per graph or node). Where present, ``mask_hidden``,
    ``mask_first_layer`` (bool [N] or [N, 1]) and ``bw_edge_index`` must agree with the graph's structure. The rest is
    not read: types of nodes and edges and reciprocal features of backward edges are the model's.

    The plan, the order of the rows and these checks are kept for the last few structures: a batch whose index tensors
    equal those of an earlier one costs their comparison and two gathers.

    Args:
        batch: the PyG batch; it is not modified.
        type_sizes: (first-layer neurons, hidden layers), to take the types of edges from ``edge2type`` where the batch
            has it. The original numbers edges into output neurons in another order than it stores them; types of other
            edges, and those of nodes (``node2type``), must be the model's.

    Returns:
        A `GraphBatch`; graphs keep their numbers, rows are brought into plan order. Deterministic; differentiable in
        ``x`` and ``edge_attr``.

    Raises:
        TypeError, ValueError: an attribute that is missing, of a wrong type or shape, or at odds with the structure;
            what `GraphPlan.from_edges` rejects, such as a cycle.
    """
    found = {name: getattr(batch, name, None) for name in ("x", "edge_index", "edge_attr")}
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim != 2:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"batch.{name} must be a tensor of 2 dimensions, got {got}")
    x, edge_index, edge_attr = found.values()
    if edge_attr.shape[0] != edge_index.shape[1]:
        raise ValueError(f"batch.edge_attr must have {edge_index.shape[1]} rows, one per edge, got {len(edge_attr)}")
    structure = _structures.get(batch, len(x), type_sizes, lambda: _structure(batch, len(x), edge_index, type_sizes))
    plan = structure.plan
    mask = getattr(batch, "sign_mask", None)
    if mask is not None:
        mask = torch.as_tensor(mask, device=x.device).reshape(-1)
        if len(mask) not in (plan.num_graphs, len(x)):
            raise ValueError(
                f"batch.sign_mask must have shape [{plan.num_graphs}] or [{len(x)}], got {list(mask.shape)}"
            )
        mask = mask[plan.index("node_graph") if len(mask) == plan.num_graphs else structure.node_order]
    return GraphBatch(_rows(x, structure.node_order), _rows(edge_attr, structure.edge_order), plan, mask)


def _rows(table: Tensor, order: Tensor) -> Tensor:
    """``table[order]``, by the operator that copies rows of this width fastest."""
    if table.shape[1] == 1:
        return table.squeeze(1).index_select(0, order).unsqueeze(1)
    return table.index_select(0, order)


class _Structure(NamedTuple):
    """A batch's plan, and where its rows came from."""

    plan: GraphPlan
    node_order: Tensor
    edge_order: Tensor


class _Structures:
    """The structures of the last few batches, found by comparing index tensors."""

    def __init__(self):
        self._entries: list[tuple[tuple, list[Tensor | None], _Structure]] = []
        self._lock = threading.Lock()

    def get(self, batch: Any, num_nodes: int, type_sizes, make: Callable[[], _Structure]) -> _Structure:
        tensors = [getattr(batch, name, None) for name in STRUCTURE]
        key = (num_nodes, type_sizes, *(_kind(tensor) for tensor in tensors))
        entries = self._entries
        for entry in entries:
            if entry[0] == key and all(map(_equal, entry[1], tensors)):
                self._put(entry)
                return entry[2]
        structure = make()
        self._put((key, [t.detach().clone() if isinstance(t, Tensor) else None for t in tensors], structure))
        return structure

    def _put(self, entry) -> None:
        """Makes an entry the first; the last ones go where there are too many."""
        with self._lock:
            entries = [entry, *(other for other in self._entries if other is not entry)][:_CACHED_BATCHES]
            while len(entries) > 1 and sum(other[2].plan.num_edges for other in entries) > _CACHED_EDGES:
                entries.pop()
            self._entries = entries


_structures = _Structures()


def _kind(value: Any):
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


def _equal(kept: Tensor | None, given: Any) -> bool:
    return kept is None or torch.equal(kept, given)


def _structure(batch: Any, num_nodes: int, edge_index: Tensor, type_sizes: tuple[int, int] | None) -> _Structure:
    graph = _graphs(batch, num_nodes)
    backward = getattr(batch, "bw_edge_index", None)
    if backward is not None and not torch.equal(backward, edge_index.flip(0)):
        raise ValueError("batch.bw_edge_index must be edge_index with its rows swapped, got other edges")
    plan, *orders = GraphPlan.from_edges(
        edge_index.cpu().numpy(), num_nodes, None if graph is None else graph.cpu().numpy()
    )
    node_order, edge_order = (torch.from_numpy(order).to(edge_index.device) for order in orders)
    plan = plan.to(edge_index.device)
    has_in, has_out = (torch.bincount(ends, minlength=num_nodes) > 0 for ends in (edge_index[1], edge_index[0]))
    for name, marked, meaning in (
        ("mask_hidden", has_in & has_out, "both incoming and outgoing edges"),
        ("mask_first_layer", ~has_in, "no incoming edges"),
    ):
        value = getattr(batch, name, None)
        if value is None:
            continue
        if (
            not isinstance(value, Tensor)
            or value.dtype != torch.bool
            or value.shape not in ((num_nodes,), (num_nodes, 1))
        ):
            raise ValueError(f"batch.{name} must be bool [{num_nodes}] or [{num_nodes}, 1], got {_described(value)}")
        wrong = (value.reshape(-1) != marked).nonzero()
        if wrong.numel():
            node = int(wrong[0])
            got = bool(value.reshape(-1)[node])
            raise ValueError(f"batch.{name} must mark the nodes with {meaning}, got {got} for node {node}")
    if type_sizes is not None:
        plan = _with_types(batch, plan, node_order, edge_order, type_sizes)
    return _Structure(plan, node_order, edge_order)


def _graphs(batch: Any, num_nodes: int) -> Tensor | None:
    graph, ptr = getattr(batch, "batch", None), getattr(batch, "ptr", None)
    if graph is not None and not isinstance(graph, Tensor):
        raise TypeError(f"batch.batch must be a torch.Tensor, got {type(graph).__name__}")
    if ptr is None:
        return graph
    counts = ptr.diff()
    if int(ptr[0]) != 0 or int(ptr[-1]) != num_nodes or int(counts.min()) < 1:
        raise ValueError(f"batch.ptr must rise from 0 to the number of nodes, {num_nodes}, got {ptr.tolist()}")
    expected = torch.repeat_interleave(torch.arange(counts.numel(), device=ptr.device), counts)
    if graph is not None and not torch.equal(graph, expected):
        raise ValueError("batch.batch must number the nodes as batch.ptr does, got other graphs")
    return expected


def _with_types(
    batch: Any, plan: GraphPlan, node_order: Tensor, edge_order: Tensor, sizes: tuple[int, int]
) -> GraphPlan:
    """The plan with the batch's own types of edges; its types of nodes must be the plan's."""
    node_types, edge_types = getattr(batch, "node2type", None), getattr(batch, "edge2type", None)
    if node_types is not None and not torch.equal(node_types[node_order], plan.node_types(*sizes)):
        raise ValueError("batch.node2type must number input neurons, hidden layers and output neurons, got other types")
    if edge_types is None or torch.equal(edge_types[edge_order], plan.edge_types(*sizes)):
        return plan
    try:
        return plan.with_edge_types(*sizes, edge_types[edge_order])
    except ValueError as error:
        raise ValueError(f"batch.edge2type: {error}") from None


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
