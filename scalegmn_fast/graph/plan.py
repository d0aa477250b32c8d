"""The plan of a batch of networks: who sends to whom, in the order in which everything is computed.

Nodes are neurons, edges are weights (source neuron -> target neuron). The plan fixes one order for both:

* nodes by class (last layer, hidden, first layer), hidden nodes by their distance to the output, then by graph, then by
  neuron. Every row class is a contiguous range, and so are "all nodes within k edges of the output";
* edges by target in that order, then by source. Edges into one target are contiguous (CSR), and the edges that the
  last k rounds of a forward model need are a prefix.

A plan is built once per architecture, replicated over the batch by offsets and cached; it holds no features.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LAST, HIDDEN, FIRST = 0, 1, 2
_UNREACHABLE = 1 << 30
_MAX_ROWS = 2**31 - 1
_CACHED_PLANS = 256
_CACHED_EDGES = 1 << 22


class Block(NamedTuple):
    """A contiguous run of nodes of one class at one distance from the output, and of the edges into them."""

    node_class: int
    distance: int
    nodes: int
    edges: int


class Part(NamedTuple):
    """Consecutive graphs of one layout (None: no dense stacks of layers), and their share of the plan's blocks."""

    layout: tuple[int, ...] | None
    count: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """Index structure of a batch of directed acyclic graphs in plan order.

    Immutable: a copy (``copy``, ``deepcopy``) is the plan itself. A pickle holds nothing that is derived; that of a
    plan of dense layouts holds those layouts alone, looked up in the cache on arrival (DataLoader workers).

    Attributes:
        source, target: int32 [E], plan node of each edge's ends; ``target`` is nondecreasing.
        target_ptr: int32 [N + 1], edges ``target_ptr[i]:target_ptr[i + 1]`` end in node i.
        source_order: int32 [E], edge ids sorted by source (stable); ``source_ptr``: int32 [N + 1], its CSR offsets.
        node_graph: int32 [N], graph of each node.
        node_layer: int32 [N], depth of a node: 0 for first-layer nodes, else the longest path from a first-layer node.
        node_position: int32 [N], position of a node among those of its graph and layer (its class, for first and last).
        blocks: runs of equal (class, distance), in order.
        parts: runs of graphs of one layout, in order; what ``GraphBatch.to_weights`` returns.
        max_layer: the largest ``node_layer``.
        edges_from_first: number of edges that leave first-layer nodes: a suffix of ``source_order``.
    """

    source: Tensor
    target: Tensor
    target_ptr: Tensor
    source_order: Tensor
    source_ptr: Tensor
    node_graph: Tensor
    node_layer: Tensor
    node_position: Tensor
    num_graphs: int
    blocks: tuple[Block, ...]
    parts: tuple[Part, ...]
    max_layer: int
    edges_from_first: int
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        """Neurons of all networks, N."""
        return self.node_graph.shape[0]

    @property
    def num_edges(self) -> int:
        """Weights of all networks, E."""
        return self.source.shape[0]

    def _count(self, node_class: int) -> int:
        return sum(block.nodes for block in self.blocks if block.node_class == node_class)

    @property
    def num_last(self) -> int:
        """Output neurons: rows [0, num_last)."""
        return self._count(LAST)

    @property
    def num_hidden(self) -> int:
        """Hidden neurons: the rows after those."""
        return self._count(HIDDEN)

    @property
    def num_first(self) -> int:
        """Input neurons: the last rows."""
        return self._count(FIRST)

    @property
    def layouts(self) -> tuple[tuple[int, ...] | None, ...]:
        """Layer sizes of every graph, or None for a graph that is not a dense stack of layers."""
        return tuple(layout for layout, count, _ in self.parts for _ in range(count))

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.source.device

    # -- liveness ----------------------------------------------------------------------------------------------------

    def live_nodes(self, distance: int) -> int:
        """Length of the prefix of nodes that holds every node within ``distance`` edges of an output neuron.

        First-layer nodes stand last, so as soon as one of them is that near, the prefix is all nodes.
        """
        count = 0
        for block in self.blocks:
            if block.distance <= distance:
                if block.node_class == FIRST:
                    return self.num_nodes
                count += block.nodes
        return count

    def edges_into(self, num_nodes: int) -> int:
        """Number of edges whose target is among the first ``num_nodes`` nodes (a block boundary)."""
        nodes = edges = 0
        for block in self.blocks:
            if nodes == num_nodes:
                break
            nodes += block.nodes
            edges += block.edges
        if nodes != num_nodes:
            raise ValueError(f"num_nodes must be a block boundary of the plan, got {num_nodes}")
        return edges

    def edges_into_class(self, node_class: int) -> int:
        """Number of edges whose target is of a class."""
        return sum(block.edges for block in self.blocks if block.node_class == node_class)

    # -- types (positional encodings) --------------------------------------------------------------------------------

    def node_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        """int64 [N]: each first neuron its own type, one per hidden layer, each last neuron its own."""
        return self._cached(
            ("node_types", num_first, num_hidden_layers), self._node_types, num_first, num_hidden_layers
        )

    def _node_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        position, layer = self.index("node_position"), self.index("node_layer")
        last, hidden = self.num_last, self.num_hidden
        types = num_first + layer - 1
        types[:last] = num_first + num_hidden_layers + position[:last]
        types[last + hidden :] = position[last + hidden :]
        return types

    def edge_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        """int64 [E]: one type per input neuron, per inner layer of weights, per output neuron.

        An edge into output neuron k has k's type. With no hidden layer every edge has its source's.
        """
        return self._cached(
            ("edge_types", num_first, num_hidden_layers), self._edge_types, num_first, num_hidden_layers
        )

    def _edge_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        source, target = self.index("source"), self.index("target")
        position = self.index("node_position")
        from_first = source >= self.num_nodes - self.num_first
        into_last = target < self.num_last
        inner = num_first + self.index("node_layer")[source] - 1
        output = num_first + num_hidden_layers - 1 + position[target]
        types = torch.where(into_last, output, inner)
        return torch.where(from_first, position[source], types)

    def with_edge_types(self, num_first: int, num_hidden_layers: int, types: Tensor) -> GraphPlan:
        """The same plan with other types of the edges into output neurons.

        Args:
            num_first, num_hidden_layers: as for `edge_types`.
            types: int64 [E], the types that `edge_types` is to give.

        Raises:
            ValueError: a wrong shape; other types than this plan's on edges that do not end in output neurons.
        """
        own = self.edge_types(num_first, num_hidden_layers)
        if types.shape != own.shape:
            raise ValueError(f"types must have shape {list(own.shape)}, got {list(types.shape)}")
        into_last = self.edges_into_class(LAST)
        if not torch.equal(types[into_last:], own[into_last:]):
            raise ValueError("types must be this plan's own except on edges into output neurons, got others")
        cache = {("edge_types", num_first, num_hidden_layers): types}
        return GraphPlan(**self._fields(), _cache=cache)

    def inner_edges(self) -> tuple[tuple[int, int, int], ...]:
        """(first edge, edges, layer) of the blocks of edges that all leave the same hidden layer for another."""
        runs, start = [], 0
        for block in self.blocks:
            layers = {
                0 if part.layout is None else len(part.layout) - 2 - block.distance
                for part in self.parts
                if any(own[:2] == block[:2] for own in part.blocks)
            }
            if block.node_class == HIDDEN and len(layers) == 1 and min(layers) > 0:
                runs.append((start, block.edges, *layers))
            start += block.edges
        return tuple(runs)

    def layer_widths(self) -> tuple[tuple[int, ...], ...]:
        """Nodes of each layer of each graph; 0 for layers that a graph does not have."""
        return self._cached("layer_widths", self._layer_widths)

    def _layer_widths(self) -> tuple[tuple[int, ...], ...]:
        layers = self.max_layer + 1
        if self._is_dense():
            return tuple((*layout, *(0,) * (layers - len(layout))) for layout in self.layouts)
        key = self.index("node_graph") * layers + self.index("node_layer")
        counts = torch.bincount(key, minlength=self.num_graphs * layers).reshape(-1, layers)
        return tuple(map(tuple, counts.tolist()))

    def index(self, name: str) -> Tensor:
        """int64 copy of an index tensor, cached (PyTorch's own gathers want int64)."""
        return self._cached(("index", name), lambda: getattr(self, name).long())

    def reversed_ends(self) -> tuple[Tensor, Tensor]:
        """int64 (source, target) of the reversed edges in ``source_order``: messages that run against the weights."""
        return self._cached("reversed", self._reversed_ends)

    def _reversed_ends(self):
        order = self.index("source_order")
        return self.index("target")[order], self.index("source")[order]

    def _cached(self, key, make, *args):
        if key in self._cache:
            return self._cache[key]
        value = make(*args)
        if _is_real(value):
            self._cache[key] = value
        return value

    # -- moving and joining ------------------------------------------------------------------------------------------

    def _map(self, fn: Callable[[Tensor], Tensor]) -> GraphPlan:
        return GraphPlan(
            **{name: fn(value) if isinstance(value, Tensor) else value for name, value in self._fields().items()}
        )

    def _fields(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "_cache"}

    def _is_dense(self) -> bool:
        return all(part.layout is not None for part in self.parts)

    def to(self, device: torch.device | str) -> GraphPlan:
        """The plan on another device; copies are cached, so that moving batch after batch copies once."""
        device = torch.empty(0, device=device).device  # "cuda" is the current device, with its number
        if device == self.device:
            return self
        return self._cached(("device", str(device)), self._map, lambda t: t.to(device))

    def pin_memory(self) -> GraphPlan:
        """The plan in page-locked memory, cached.

        Raises:
            RuntimeError: this machine has no accelerator to lock pages for.
        """
        if not torch.accelerator.is_available():
            raise RuntimeError(
                "pin_memory needs an accelerator such as a CUDA GPU to lock pages for, got none on this machine"
            )
        return self._cached("pinned", self._map, lambda t: t.pin_memory())

    def __copy__(self) -> GraphPlan:
        return self

    def __deepcopy__(self, memo) -> GraphPlan:
        return self

    def __reduce__(self):
        if self._is_dense():
            return _dense_plan, (_runs(self.parts), str(self.device))
        return _restored_plan, (self._fields(),)

    @staticmethod
    def from_layout(layout: Sequence[int], num_graphs: int) -> GraphPlan:
        """Plan of ``num_graphs`` networks with dense layers of the given sizes.

        Cached: the plans used last, at most 256 of them and together at most 2^22 edges. A compiled program, and an
        exported one for any number of graphs, makes its plan anew.

        Raises:
            ValueError: a layout of fewer than two layers or with an empty layer; ``num_graphs`` below 1.
        """
        layout = tuple(int(n) for n in layout)
        if len(layout) < 2 or min(layout) < 1:
            raise ValueError(f"layout must hold at least two positive layer sizes, got {list(layout)}")
        if num_graphs < 1:
            raise ValueError(f"num_graphs must be at least 1 (an empty batch has no plan), got {num_graphs}")
        if torch.compiler.is_dynamo_compiling() or isinstance(num_graphs, torch.SymInt):
            return _plan_of_layout(layout, num_graphs)
        return _cache.get((layout, int(num_graphs)), _plan_of_layout)

    @staticmethod
    def from_edges(edge_index, num_nodes: int, graph=None) -> tuple[GraphPlan, np.ndarray, np.ndarray]:
        """Plan of any directed acyclic graph, and where its nodes and edges came from.

        Nodes without in-edges are first-layer nodes, others without out-edges last-layer nodes.

        Args:
            edge_index: int [2, E], rows source and target.
            num_nodes: number of nodes N.
            graph: int [N], graph of each node, 0..B-1; all 0 if None.

        Returns:
            (plan, node_order, edge_order): plan node k is input node ``node_order[k]``, plan edge k is input edge
            ``edge_order[k]``.

        Raises:
            TypeError: ``edge_index`` or ``graph`` of another than an integer type.
            ValueError: a wrong shape, ids out of range, an edge between two graphs, an edge that stands twice, a graph
                without edges, or edges that form a cycle (which is named).
        """
        return _plan_of_edges(np.asarray(edge_index), int(num_nodes), None if graph is None else np.asarray(graph))

    @staticmethod
    def cat(plans: Sequence[GraphPlan]) -> GraphPlan:
        """Plan of all graphs of several plans, numbered in the order given. Equal (class, distance) share a block.

        Raises:
            ValueError: no plans; plans on different devices; more than 2^31 - 1 nodes or edges.
        """
        plans = list(plans)
        if not plans:
            raise ValueError("plans must hold at least one GraphPlan, got none")
        if len(plans) == 1:
            return plans[0]
        devices = sorted({str(plan.device) for plan in plans})
        if len(devices) > 1:
            raise ValueError(f"plans must be on one device, got {devices}")
        return _joined_plan([plan._on_host() for plan in plans]).to(plans[0].device)

    def _on_host(self) -> GraphPlan:
        if self.device.type == "cpu":
            return self
        return _dense_plan(_runs(self.parts)) if self._is_dense() else self.to("cpu")


def _is_real(value: Any) -> bool:
    """Whether a tensor, tuple of tensors or plan may outlive this call: not if a tracer stands in for tensors."""
    if isinstance(value, GraphPlan):
        value = value.source
    items = value if isinstance(value, tuple) else (value,)
    return all(type(item) is Tensor for item in items if isinstance(item, Tensor))


class _PlanCache:
    """Plans of layouts, the least recently used ones dropped beyond a number of plans or of their edges."""

    def __init__(self, max_plans: int, max_edges: int):
        self.max_plans, self.max_edges = max_plans, max_edges
        self.plans: OrderedDict[tuple, GraphPlan] = OrderedDict()
        self.edges = 0
        self.lock = threading.Lock()

    def get(self, key: tuple[tuple[int, ...], int], make: Callable[..., GraphPlan]) -> GraphPlan:
        with self.lock:
            plan = self.plans.get(key)
            if plan is not None:
                self.plans.move_to_end(key)
                return plan
        plan = make(*key)
        if not _is_real(plan):
            return plan
        with self.lock:
            plan = self.plans.setdefault(key, plan)
            self.edges = sum(plan.num_edges for plan in self.plans.values())
            while len(self.plans) > 1 and (len(self.plans) > self.max_plans or self.edges > self.max_edges):
                self.edges -= self.plans.popitem(last=False)[1].num_edges
        return plan


_cache = _PlanCache(_CACHED_PLANS, _CACHED_EDGES)


def _runs(parts: tuple[Part, ...]) -> tuple[tuple[tuple[int, ...] | None, int], ...]:
    return tuple((part.layout, part.count) for part in parts)


def _dense_plan(runs: tuple[tuple[tuple[int, ...], int], ...], device: str = "cpu") -> GraphPlan:
    return GraphPlan.cat([GraphPlan.from_layout(layout, count) for layout, count in runs]).to(device)


def _restored_plan(values: dict[str, Any]) -> GraphPlan:
    return GraphPlan(**values)


def _order_key(block: Block) -> tuple[int, int]:
    return block.node_class, 0 if block.node_class == FIRST else block.distance


def merge_slices(blocks_of: Sequence[tuple[Block, ...]]):
    """Interleave the blocks of several plans: ([(part, node slice)], [(part, edge slice)], merged blocks)."""
    runs = []
    for part, blocks in enumerate(blocks_of):
        node = edge = 0
        for block in blocks:
            runs.append(
                (_order_key(block), part, block, slice(node, node + block.nodes), slice(edge, edge + block.edges))
            )
            node += block.nodes
            edge += block.edges
    runs.sort(key=lambda run: run[:2])
    merged: list[Block] = []
    for key, _, block, _, _ in runs:
        if merged and _order_key(merged[-1]) == key:
            previous = merged[-1]
            distance = min(previous.distance, block.distance)
            merged[-1] = Block(block.node_class, distance, previous.nodes + block.nodes, previous.edges + block.edges)
        else:
            merged.append(block)
    return [(run[1], run[3]) for run in runs], [(run[1], run[4]) for run in runs], tuple(merged)


def _check_size(num_nodes: int, num_edges: int) -> None:
    if max(num_nodes, num_edges) > _MAX_ROWS:
        raise ValueError(
            f"a batch may have at most 2^31 - 1 nodes and edges, got {num_nodes} nodes and {num_edges} edges"
        )


def _offsets(counts: np.ndarray) -> np.ndarray:
    out = np.zeros(counts.size + 1, dtype=np.int32)
    np.cumsum(counts, out=out[1:])
    return out


def _tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)) for name, array in arrays.items()}


def _plan_of_layout(layout: tuple[int, ...], num_graphs: int) -> GraphPlan:
    """In PyTorch's operators, so that compiled and exported programs build plans of any number of graphs."""
    depth = len(layout) - 1
    _check_size(num_graphs * sum(layout), num_graphs * sum(a * b for a, b in zip(layout[:-1], layout[1:], strict=True)))
    count = partial(torch.arange, dtype=torch.int32, device="cpu")
    blocks, graph, layers, position, indegree, outdegree = [], [], [], [], [], []
    source, target, source_order = [], [], []
    node = edge = 0
    for layer in range(depth, -1, -1):
        width = layout[layer]
        fan_in, fan_out = layout[layer - 1] if layer else 0, layout[layer + 1] if layer < depth else 0
        rows, edges = num_graphs * width, num_graphs * width * fan_in
        blocks.append(Block(LAST if layer == depth else HIDDEN if layer else FIRST, depth - layer, rows, edges))
        graph.append(count(num_graphs).unsqueeze(1).expand(num_graphs, width).reshape(-1))
        layers.append(count(1).add(layer).expand(rows))
        position.append(count(width).repeat(num_graphs))
        indegree.append(count(1).add(fan_in).expand(rows))
        outdegree.append(count(1).add(fan_out).expand(rows))
        if layer:
            shape = (num_graphs, width, fan_in)
            target.append(count(node, node + rows).unsqueeze(1).expand(rows, fan_in).reshape(-1))
            senders = count(node + rows, node + rows + num_graphs * fan_in)
            source.append(senders.reshape(num_graphs, 1, fan_in).expand(shape).reshape(-1))
            source_order.append(count(edge, edge + edges).reshape(shape).transpose(1, 2).reshape(-1))
        node += rows
        edge += edges
    blocks = tuple(blocks)
    start = count(1)
    return GraphPlan(
        source=torch.cat(source), target=torch.cat(target), source_order=torch.cat(source_order),
        target_ptr=torch.cat([start, *indegree]).cumsum(0, dtype=torch.int32),
        source_ptr=torch.cat([start, *outdegree]).cumsum(0, dtype=torch.int32),
        node_graph=torch.cat(graph), node_layer=torch.cat(layers), node_position=torch.cat(position),
        num_graphs=num_graphs, blocks=blocks, parts=(Part(layout, num_graphs, blocks),), max_layer=depth,
        edges_from_first=num_graphs * layout[0] * layout[1],
    )  # fmt: skip


def _joined_plan(plans: list[GraphPlan]) -> GraphPlan:
    node_slices, edge_slices, blocks = merge_slices([plan.blocks for plan in plans])
    num_nodes, num_edges = sum(plan.num_nodes for plan in plans), sum(plan.num_edges for plan in plans)
    _check_size(num_nodes, num_edges)
    graph_offset = np.cumsum([0] + [plan.num_graphs for plan in plans])
    names = (
        "source",
        "target",
        "source_order",
        "source_ptr",
        "target_ptr",
        "node_graph",
        "node_layer",
        "node_position",
    )
    arrays = [{name: getattr(plan, name).numpy() for name in names} for plan in plans]
    # Within one plan both orders survive: new ids grow with the old ones, so neither CSR needs a sort.
    node_map = [np.empty(plan.num_nodes, dtype=np.int32) for plan in plans]
    edge_map = [np.empty(plan.num_edges, dtype=np.int32) for plan in plans]
    for maps, slices in ((node_map, node_slices), (edge_map, edge_slices)):
        position = 0
        for part, rows in slices:
            count = rows.stop - rows.start
            maps[part][rows] = np.arange(position, position + count, dtype=np.int32)
            position += count
    ends = [
        (mapping[part["source"]], mapping[part["target"]], edges[part["source_order"]])
        for mapping, edges, part in zip(node_map, edge_map, arrays, strict=True)
    ]
    by_source = [(part, slice(*arrays[part]["source_ptr"][[rows.start, rows.stop]])) for part, rows in node_slices]
    graphs = [part["node_graph"] + offset for part, offset in zip(arrays, graph_offset[:-1], strict=True)]
    degrees = [(np.diff(part["target_ptr"]), np.diff(part["source_ptr"])) for part in arrays]
    return GraphPlan(
        **_tensors(
            source=np.concatenate([ends[part][0][rows] for part, rows in edge_slices]),
            target=np.concatenate([ends[part][1][rows] for part, rows in edge_slices]),
            source_order=np.concatenate([ends[part][2][rows] for part, rows in by_source]),
            target_ptr=_offsets(np.concatenate([degrees[part][0][rows] for part, rows in node_slices])),
            source_ptr=_offsets(np.concatenate([degrees[part][1][rows] for part, rows in node_slices])),
            node_graph=np.concatenate([graphs[part][rows] for part, rows in node_slices]),
            node_layer=np.concatenate([arrays[part]["node_layer"][rows] for part, rows in node_slices]),
            node_position=np.concatenate([arrays[part]["node_position"][rows] for part, rows in node_slices]),
        ),
        num_graphs=int(graph_offset[-1]), blocks=blocks, parts=tuple(part for plan in plans for part in plan.parts),
        max_layer=max(plan.max_layer for plan in plans), edges_from_first=sum(plan.edges_from_first for plan in plans),
    )  # fmt: skip


def _longest_path(source: np.ndarray, target: np.ndarray, num_nodes: int) -> np.ndarray:
    """Longest path to each node; raises on a cycle. Frontier by frontier (Kahn's order)."""
    layer = np.zeros(num_nodes, dtype=np.int64)
    waiting = np.bincount(target, minlength=num_nodes)
    ends_by_source = target[np.argsort(source, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=num_nodes))])
    frontier = np.flatnonzero(waiting == 0)
    depth = 0
    while frontier.size:
        layer[frontier] = depth
        counts = starts[frontier + 1] - starts[frontier]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends, times = np.unique(ends_by_source[np.repeat(starts[frontier], counts) + inside], return_counts=True)
        waiting[ends] -= times
        frontier = ends[waiting[ends] == 0]
        depth += 1
    if waiting.any():
        cycle = _find_cycle(source, target, waiting > 0)
        shown = " -> ".join(map(str, cycle if len(cycle) <= 8 else [*cycle[:6], "...", cycle[-1]]))
        raise ValueError(f"edge_index must be acyclic (a feed-forward network), got the cycle {shown}")
    return layer


def _find_cycle(source: np.ndarray, target: np.ndarray, stuck: np.ndarray) -> list[int]:
    """A cycle among nodes each of which has a predecessor among them, as node ids, first and last equal."""
    inside = stuck[source] & stuck[target]
    predecessor = dict(zip(target[inside].tolist(), source[inside].tolist(), strict=True))
    node = int(np.flatnonzero(stuck)[0])
    seen: dict[int, int] = {}
    path = []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = predecessor[node]
    return [node, *reversed(path[seen[node] :])]


def _distance_to_last(source: np.ndarray, target: np.ndarray, is_last: np.ndarray) -> np.ndarray:
    """Fewest edges from each node to a last-layer node; `_UNREACHABLE` for isolated nodes."""
    distance = np.where(is_last, 0, _UNREACHABLE)
    step = 0
    while source.size:
        reached = distance[target] == step
        senders = source[reached]
        step += 1
        distance[senders[distance[senders] == _UNREACHABLE]] = step
        source, target = source[~reached], target[~reached]
    return distance


def _plan_of_edges(edge_index: np.ndarray, num_nodes: int, graph: np.ndarray | None):
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
    if edge_index.dtype.kind not in "iu":
        raise TypeError(f"edge_index must be of an integer type, got {edge_index.dtype}")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1 (an empty batch has no plan), got {num_nodes}")
    _check_size(num_nodes, edge_index.shape[1])
    if edge_index.size and (edge_index.min() < 0 or edge_index.max() >= num_nodes):
        raise ValueError(
            f"edge_index must hold nodes 0 to {num_nodes - 1}, got {edge_index.min()} to {edge_index.max()}"
        )
    source, target = edge_index.astype(np.int64)
    if graph is None:
        graph = np.zeros(num_nodes, dtype=np.int64)
    if graph.shape != (num_nodes,):
        raise ValueError(f"graph must have shape [{num_nodes}], got {list(graph.shape)}")
    if graph.dtype.kind not in "iu":
        raise TypeError(f"graph must be of an integer type, got {graph.dtype}")
    if graph.min() < 0:
        raise ValueError(f"graph must hold graph numbers from 0, got {graph.min()}")
    graph = graph.astype(np.int64)
    if (graph[source] != graph[target]).any():
        edge = int(np.flatnonzero(graph[source] != graph[target])[0])
        raise ValueError(
            f"edge_index must join nodes of one graph, got edge {edge} "
            f"from graph {graph[source[edge]]} to graph {graph[target[edge]]}"
        )
    num_graphs = int(graph.max()) + 1
    if num_graphs > num_nodes:
        raise ValueError(
            f"graph must number the graphs 0, 1, ... without gaps, got {num_graphs - 1} with {num_nodes} nodes"
        )
    edges_of = np.bincount(graph[source], minlength=num_graphs)
    if not edges_of.all():
        raise ValueError(f"every graph needs an edge, got none in graph {int(np.flatnonzero(edges_of == 0)[0])}")

    layer = _longest_path(source, target, num_nodes)
    indegree, outdegree = np.bincount(target, minlength=num_nodes), np.bincount(source, minlength=num_nodes)
    node_class = np.where(indegree == 0, FIRST, np.where(outdegree > 0, HIDDEN, LAST))
    distance = _distance_to_last(source, target, node_class == LAST)
    key_distance = np.where(node_class == FIRST, 0, distance)
    node_order = np.lexsort((graph, key_distance, node_class))
    rank = np.empty(num_nodes, dtype=np.int64)
    rank[node_order] = np.arange(num_nodes)
    edge_key = rank[target] * num_nodes + rank[source]
    edge_order = np.argsort(edge_key)
    repeated = np.flatnonzero(np.diff(edge_key[edge_order]) == 0)
    if repeated.size:
        edge = edge_order[repeated[0]]
        raise ValueError(f"edge_index must hold each edge once, got {source[edge]} -> {target[edge]} more than once")

    parts = _parts(graph, layer, node_class, key_distance, distance, indegree, source, target, num_graphs)
    if all(part.layout is not None for part in parts):
        return _dense_plan(_runs(parts)), node_order, edge_order
    plan_source, plan_target = rank[source[edge_order]], rank[target[edge_order]]
    plan = GraphPlan(
        **_tensors(
            source=plan_source, target=plan_target, target_ptr=_offsets(indegree[node_order]),
            source_order=np.argsort(plan_source * num_nodes + plan_target), source_ptr=_offsets(outdegree[node_order]),
            node_graph=graph[node_order], node_layer=layer[node_order],
            node_position=_positions(graph, layer, node_class)[node_order],
        ),
        num_graphs=num_graphs, blocks=merge_slices([part.blocks for part in parts])[2], parts=parts,
        max_layer=int(layer.max()), edges_from_first=int(outdegree[node_class == FIRST].sum()),
    )  # fmt: skip
    return plan, node_order, edge_order


def _positions(graph: np.ndarray, layer: np.ndarray, node_class: np.ndarray) -> np.ndarray:
    """Place of each node, in input order, among those of its graph and class, and for hidden ones of its layer."""
    keys = np.stack([graph, node_class, np.where(node_class == HIDDEN, layer, 0)])
    order = np.lexsort(keys[::-1])
    new = np.r_[True, (np.diff(keys[:, order]) != 0).any(0)]
    place = np.arange(order.size)
    position = np.empty(order.size, dtype=np.int64)
    position[order] = place - np.maximum.accumulate(np.where(new, place, 0))
    return position


def _parts(graph, layer, node_class, key_distance, distance, indegree, source, target, num_graphs) -> tuple[Part, ...]:
    """Runs of graphs of one layout, with each run's blocks."""
    depth = int(layer.max()) + 1
    sizes = np.bincount(graph * depth + layer, minlength=num_graphs * depth).reshape(num_graphs, depth)
    layers = (sizes > 0).sum(1)
    irregular = np.bincount(graph[source], layer[target] != layer[source] + 1, minlength=num_graphs)
    irregular += np.bincount(graph, (node_class == LAST) != (layer == layers[graph] - 1), minlength=num_graphs)
    edges = np.bincount(graph[source], minlength=num_graphs)
    dense = (irregular == 0) & (edges == (sizes[:, :-1] * sizes[:, 1:]).sum(1))
    layouts = [
        tuple(row[:n]) if is_dense else None
        for row, n, is_dense in zip(sizes.tolist(), layers.tolist(), dense.tolist(), strict=True)
    ]
    starts = [k for k in range(num_graphs) if k == 0 or layouts[k] != layouts[k - 1]]
    run = np.zeros(num_graphs, dtype=np.int64)
    run[starts[1:]] = 1
    run = np.cumsum(run)[graph]

    order = np.lexsort((key_distance, node_class, run))
    keys = np.stack([run, node_class, key_distance])[:, order]
    bounds = np.flatnonzero(np.r_[True, (np.diff(keys) != 0).any(0)])
    counts = np.diff(np.r_[bounds, order.size])
    block_edges = np.add.reduceat(indegree[order], bounds)
    nearest = np.minimum.reduceat(distance[order], bounds)
    blocks: list[list[Block]] = [[] for _ in starts]
    for k, bound in enumerate(bounds):
        block = Block(int(keys[1, bound]), int(nearest[k]), int(counts[k]), int(block_edges[k]))
        blocks[keys[0, bound]].append(block)
    stops = [*starts[1:], num_graphs]
    return tuple(
        Part(layouts[start], stop - start, tuple(blocks[k]))
        for k, (start, stop) in enumerate(zip(starts, stops, strict=True))
    )
