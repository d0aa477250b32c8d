"""The plan of a batch of networks: who sends to whom, in the order in which everything is computed.

Nodes are neurons, edges are weights (source neuron -> target neuron). The plan fixes one order for both:

* nodes by class (last layer, hidden, first layer), hidden nodes by their distance to the output, then by graph, then by
  neuron. Every row class is a contiguous range, and so are "all nodes within k edges of the output";
* edges by target in that order, then by source. Edges into one target are contiguous (CSR), and the edges that the
  last k rounds of a forward model need are a prefix.

A plan is built once per architecture, replicated over the batch by offsets and cached; it holds no features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LAST, HIDDEN, FIRST = 0, 1, 2
_UNREACHABLE = 1 << 30


class Block(NamedTuple):
    """A contiguous run of nodes of one class at one distance from the output, and of the edges into them."""

    node_class: int
    distance: int
    nodes: int
    edges: int


@dataclass(frozen=True)
class GraphPlan:
    """Index structure of a batch of directed acyclic graphs in plan order.

    Attributes:
        source, target: int32 [E], plan node of each edge's ends; ``target`` is nondecreasing.
        target_ptr: int32 [N + 1], edges ``target_ptr[i]:target_ptr[i + 1]`` end in node i.
        source_order: int32 [E], edge ids sorted by source (stable); ``source_ptr``: int32 [N + 1], its CSR offsets.
        node_graph: int32 [N], graph of each node.
        node_layer: int32 [N], depth of a node: 0 for first-layer nodes, else the longest path from a first-layer node.
        node_position: int32 [N], position of a node among those of its graph and layer (its class, for first and last).
        blocks: runs of equal (class, distance), in order.
        layouts: layer sizes of every graph, or None for a graph that is not a dense stack of layers.
        parts: how many graphs share one layout, in order; what ``GraphBatch.to_weights`` returns.
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
    parts: tuple[tuple[tuple[int, ...] | None, int, tuple[Block, ...]], ...]
    max_layer: int
    _cache: dict = field(default_factory=dict, repr=False, compare=False)

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def num_nodes(self) -> int:
        return self.node_graph.shape[0]

    @property
    def num_edges(self) -> int:
        return self.source.shape[0]

    def _count(self, node_class: int) -> int:
        return sum(block.nodes for block in self.blocks if block.node_class == node_class)

    @property
    def num_last(self) -> int:
        return self._count(LAST)

    @property
    def num_hidden(self) -> int:
        return self._count(HIDDEN)

    @property
    def num_first(self) -> int:
        return self._count(FIRST)

    @property
    def layouts(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(layout for layout, count, _ in self.parts for _ in range(count))

    @property
    def device(self) -> torch.device:
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

    @functools.cached_property
    def edges_from_first(self) -> int:
        """Number of edges that leave first-layer nodes: a suffix of ``source_order``."""
        first = self.num_nodes - self.num_first
        return int(self.num_edges - self.source_ptr[first]) if first < self.num_nodes else 0

    # -- types (positional encodings) --------------------------------------------------------------------------------

    def node_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        """int64 [N]: each first neuron its own type, one per hidden layer, each last neuron its own (spec, *Before and after*)."""
        return self._cached(("node_types", num_first, num_hidden_layers), self._node_types, num_first, num_hidden_layers)

    def _node_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        position, layer = self.node_position.long(), self.node_layer.long()
        last, hidden = self.num_last, self.num_hidden
        types = num_first + layer - 1
        types[:last] = num_first + num_hidden_layers + position[:last]
        types[last + hidden :] = position[last + hidden :]
        return types

    def edge_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        """int64 [E]: one type per input neuron, per inner layer of weights, per output neuron.

        An edge into output neuron k has k's type (spec, departure 2). With no hidden layer every edge has its source's.
        """
        return self._cached(("edge_types", num_first, num_hidden_layers), self._edge_types, num_first, num_hidden_layers)

    def _edge_types(self, num_first: int, num_hidden_layers: int) -> Tensor:
        source, target = self.source.long(), self.target.long()
        from_first = source >= self.num_nodes - self.num_first
        into_last = target < self.num_last
        inner = num_first + self.node_layer.long()[source] - 1
        output = num_first + num_hidden_layers - 1 + self.node_position.long()[target]
        types = torch.where(into_last, output, inner)
        return torch.where(from_first, self.node_position.long()[source], types)

    def factor_pairs(self, num_first: int, num_hidden_layers: int, typed: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Distinct (source, edge type) pairs: (source int64 [P], type int64 [P] or None, pair of each edge int64 [E]).

        A first-round message with one number per edge is that number times a vector of its pair. Untyped edges pair with
        their source alone.
        """
        return self._cached(("pairs", num_first, num_hidden_layers, typed), self._factor_pairs, num_first, num_hidden_layers, typed)

    def _factor_pairs(self, num_first: int, num_hidden_layers: int, typed: bool):
        source = self.source.long()
        if not typed:
            return torch.arange(self.num_nodes, device=self.device), None, source
        types = self.edge_types(num_first, num_hidden_layers)
        width = int(types.max()) + 1 if types.numel() else 1
        pairs, index = torch.unique(source * width + types, return_inverse=True)
        return pairs // width, pairs % width, index

    def index(self, name: str) -> Tensor:
        """int64 copy of an index tensor, cached (PyTorch's own gathers want int64)."""
        return self._cached(("index", name), lambda: getattr(self, name).long())

    def reversed_ends(self) -> tuple[Tensor, Tensor]:
        """int64 (source, target) of the reversed edges in ``source_order``: messages that run against the weights."""
        return self._cached("reversed", self._reversed_ends)

    def _reversed_ends(self):
        order = self.source_order.long()
        return self.target.long()[order], self.source.long()[order]

    def _cached(self, key, make, *args):
        if key not in self._cache:
            self._cache[key] = make(*args)
        return self._cache[key]

    # -- moving and joining ------------------------------------------------------------------------------------------

    def _map(self, fn) -> GraphPlan:
        names = ("source", "target", "target_ptr", "source_order", "source_ptr", "node_graph", "node_layer", "node_position")
        edges_from_first = self.edges_from_first
        moved = GraphPlan(
            **{name: fn(getattr(self, name)) for name in names},
            num_graphs=self.num_graphs, blocks=self.blocks, parts=self.parts, max_layer=self.max_layer,
        )  # fmt: skip
        moved.__dict__["edges_from_first"] = edges_from_first
        return moved

    def to(self, device: torch.device | str) -> GraphPlan:
        """The plan on another device; copies are cached, so that moving batch after batch copies once."""
        device = torch.device(device)
        if device == self.device:
            return self
        return self._cached(("device", str(device)), self._map, lambda t: t.to(device))

    def pin_memory(self) -> GraphPlan:
        """The plan in page-locked memory."""
        return self._cached("pinned", self._map, lambda t: t.pin_memory())

    @staticmethod
    def from_layout(layout: tuple[int, ...], num_graphs: int) -> GraphPlan:
        """Plan of ``num_graphs`` networks with dense layers of the given sizes. Cached.

        Raises:
            ValueError: a layout of fewer than two layers or with an empty layer; ``num_graphs`` below 1.
        """
        layout = tuple(int(n) for n in layout)
        if len(layout) < 2 or min(layout) < 1:
            raise ValueError(f"layout must hold at least two positive layer sizes, got {list(layout)}")
        if num_graphs < 1:
            raise ValueError(f"num_graphs must be at least 1 (an empty batch has no plan), got {num_graphs}")
        return _plan_of_layout(layout, num_graphs)

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
            ValueError: ids out of range, an edge between two graphs, an edge that stands twice, an isolated graph without
                edges, or edges that form a cycle.
        """
        return _plan_of_edges(np.asarray(edge_index), int(num_nodes), None if graph is None else np.asarray(graph))

    @staticmethod
    def cat(plans: list[GraphPlan]) -> GraphPlan:
        """Plan of all graphs of several plans. Blocks of equal class and distance are joined in the order given."""
        if len(plans) == 1:
            return plans[0]
        if len({str(plan.device) for plan in plans}) > 1:
            raise ValueError(f"plans must be on one device, got {sorted({str(plan.device) for plan in plans})}")
        node_slices, edge_slices, blocks = merge_slices([plan.blocks for plan in plans])
        graph_offset = np.cumsum([0] + [plan.num_graphs for plan in plans])
        node_map = []
        for plan in plans:
            node_map.append(torch.empty(plan.num_nodes, dtype=torch.long, device=plan.device))
        position = 0
        for part, rows in node_slices:
            count = rows.stop - rows.start
            node_map[part][rows] = torch.arange(position, position + count, device=plans[part].device)
            position += count

        def nodes(get):
            return torch.cat([get(part)[rows] for part, rows in node_slices])

        def edges(get):
            return torch.cat([get(part)[rows] for part, rows in edge_slices])

        mapped_source = [node_map[k][plan.source.long()] for k, plan in enumerate(plans)]
        mapped_target = [node_map[k][plan.target.long()] for k, plan in enumerate(plans)]
        graphs = [plan.node_graph + int(graph_offset[k]) for k, plan in enumerate(plans)]
        return _finish(
            source=edges(lambda k: mapped_source[k]),
            target=edges(lambda k: mapped_target[k]),
            node_graph=nodes(lambda k: graphs[k]),
            node_layer=nodes(lambda k: plans[k].node_layer),
            node_position=nodes(lambda k: plans[k].node_position),
            num_graphs=int(graph_offset[-1]),
            blocks=blocks,
            parts=tuple(part for plan in plans for part in plan.parts),
        )


def merge_slices(blocks_of: list[tuple[Block, ...]]):
    """Interleave the blocks of several plans: ([(part, node slice)], [(part, edge slice)], merged blocks)."""
    runs = []
    for part, blocks in enumerate(blocks_of):
        node = edge = 0
        for block in blocks:
            key = (block.node_class, 0 if block.node_class == FIRST else block.distance)
            runs.append((key, part, block, slice(node, node + block.nodes), slice(edge, edge + block.edges)))
            node += block.nodes
            edge += block.edges
    runs.sort(key=lambda run: run[:2])
    merged: list[Block] = []
    keys: list[tuple[int, int]] = []
    for key, _, block, _, _ in runs:
        if keys and keys[-1] == key:
            previous = merged[-1]
            distance = min(previous.distance, block.distance)
            merged[-1] = Block(block.node_class, distance, previous.nodes + block.nodes, previous.edges + block.edges)
        else:
            keys.append(key)
            merged.append(block)
    return [(run[1], run[3]) for run in runs], [(run[1], run[4]) for run in runs], tuple(merged)


def _csr(index: Tensor, size: int) -> Tensor:
    counts = torch.bincount(index.long(), minlength=size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def _finish(*, source, target, node_graph, node_layer, node_position, num_graphs, blocks, parts) -> GraphPlan:
    num_nodes = node_graph.shape[0]
    if max(num_nodes, source.shape[0]) > torch.iinfo(torch.int32).max:
        raise ValueError(f"a batch may have at most 2^31 - 1 nodes and edges, got {num_nodes} and {source.shape[0]}")
    order = torch.sort(source.long(), stable=True).indices
    return GraphPlan(
        source=source.to(torch.int32), target=target.to(torch.int32), target_ptr=_csr(target, num_nodes),
        source_order=order.to(torch.int32), source_ptr=_csr(source, num_nodes),
        node_graph=node_graph.to(torch.int32), node_layer=node_layer.to(torch.int32),
        node_position=node_position.to(torch.int32), num_graphs=num_graphs, blocks=blocks, parts=parts,
        max_layer=int(node_layer.max()),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _plan_of_layout(layout: tuple[int, ...], num_graphs: int) -> GraphPlan:
    depth = len(layout) - 1
    blocks, node_graph, node_layer, node_position, source, target = [], [], [], [], [], []
    offsets = {}
    position = 0
    for layer in range(depth, -1, -1):
        offsets[layer] = position
        position += num_graphs * layout[layer]
    graphs = torch.arange(num_graphs)
    for layer in range(depth, -1, -1):
        width = layout[layer]
        node_class = LAST if layer == depth else FIRST if layer == 0 else HIDDEN
        fan_in = layout[layer - 1] if layer else 0
        blocks.append(Block(node_class, depth - layer, num_graphs * width, num_graphs * width * fan_in))
        node_graph.append(graphs.repeat_interleave(width))
        node_layer.append(torch.full((num_graphs * width,), layer))
        node_position.append(torch.arange(width).repeat(num_graphs))
        if layer:
            shape = (num_graphs, width, fan_in)
            t = offsets[layer] + torch.arange(num_graphs * width).view(num_graphs, width, 1)
            s = offsets[layer - 1] + torch.arange(num_graphs * fan_in).view(num_graphs, 1, fan_in)
            target.append(t.expand(shape).reshape(-1))
            source.append(s.expand(shape).reshape(-1))
    blocks = tuple(blocks)
    return _finish(
        source=torch.cat(source), target=torch.cat(target), node_graph=torch.cat(node_graph),
        node_layer=torch.cat(node_layer), node_position=torch.cat(node_position), num_graphs=num_graphs, blocks=blocks,
        parts=((layout, num_graphs, blocks),),
    )  # fmt: skip


def _longest_path(source: np.ndarray, target: np.ndarray, num_nodes: int) -> np.ndarray:
    """Longest path to each node; raises on a cycle. Relaxes frontier by frontier (Kahn's order)."""
    layer = np.zeros(num_nodes, dtype=np.int64)
    waiting = np.bincount(target, minlength=num_nodes)
    order = np.argsort(source, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(source, minlength=num_nodes))])
    frontier = np.flatnonzero(waiting == 0)
    seen = 0
    depth = 0
    while frontier.size:
        seen += frontier.size
        layer[frontier] = depth
        counts = starts[frontier + 1] - starts[frontier]
        inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = target[order[np.repeat(starts[frontier], counts) + inside]]
        np.subtract.at(waiting, ends, 1)
        ends = np.unique(ends)
        frontier = ends[waiting[ends] == 0]
        depth += 1
    if seen < num_nodes:
        stuck = np.flatnonzero(waiting > 0)
        raise ValueError(
            f"edge_index must be acyclic (a feed-forward network), got a cycle through {stuck.size} nodes, e.g. node {stuck[0]}"
        )
    return layer


def _distance_to_last(source: np.ndarray, target: np.ndarray, is_last: np.ndarray) -> np.ndarray:
    distance = np.where(is_last, 0, _UNREACHABLE)
    step = 0
    while True:
        reached = source[(distance[target] == step) & (distance[source] == _UNREACHABLE)]
        if reached.size == 0:
            return distance
        step += 1
        distance[reached] = step


def _plan_of_edges(edge_index: np.ndarray, num_nodes: int, graph: np.ndarray | None):
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {list(edge_index.shape)}")
    if edge_index.dtype.kind not in "iu":
        raise ValueError(f"edge_index must be of an integer type, got {edge_index.dtype}")
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be at least 1 (an empty batch has no plan), got {num_nodes}")
    source, target = edge_index.astype(np.int64)
    if source.size and (edge_index.min() < 0 or edge_index.max() >= num_nodes):
        raise ValueError(f"edge_index must hold nodes 0 to {num_nodes - 1}, got {edge_index.min()} to {edge_index.max()}")
    graph = np.zeros(num_nodes, dtype=np.int64) if graph is None else graph.astype(np.int64)
    if graph.shape != (num_nodes,):
        raise ValueError(f"graph must have shape [{num_nodes}], got {list(graph.shape)}")
    if (graph[source] != graph[target]).any():
        edge = int(np.flatnonzero(graph[source] != graph[target])[0])
        raise ValueError(f"edge_index must join nodes of one graph, got edge {edge} from graph {graph[source[edge]]} to {graph[target[edge]]}")
    if np.unique(source * num_nodes + target).size != source.size:
        raise ValueError("edge_index must hold each edge once, got a repeated edge")
    num_graphs = int(graph.max()) + 1
    if np.setdiff1d(np.arange(num_graphs), graph[source]).size:
        raise ValueError(f"every graph needs an edge, got none in graph {np.setdiff1d(np.arange(num_graphs), graph[source])[0]}")

    layer = _longest_path(source, target, num_nodes)
    has_in = np.bincount(target, minlength=num_nodes) > 0
    has_out = np.bincount(source, minlength=num_nodes) > 0
    node_class = np.where(~has_in, FIRST, np.where(has_out, HIDDEN, LAST))
    distance = _distance_to_last(source, target, node_class == LAST)
    key_distance = np.where(node_class == FIRST, 0, distance)
    node_order = np.lexsort((np.arange(num_nodes), graph, key_distance, node_class))
    rank = np.empty(num_nodes, dtype=np.int64)
    rank[node_order] = np.arange(num_nodes)
    edge_order = np.lexsort((source, rank[target]))

    # position of a node among those of its graph and class (its layer, for hidden ones), in input order
    group = np.lexsort((np.arange(num_nodes), np.where(node_class == HIDDEN, layer, 0), node_class, graph))
    same = np.ones(num_nodes, dtype=bool)
    keys = np.stack([graph, node_class, np.where(node_class == HIDDEN, layer, 0)])[:, group]
    same[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
    starts = np.maximum.accumulate(np.where(same, np.arange(num_nodes), 0))
    position = np.empty(num_nodes, dtype=np.int64)
    position[group] = np.arange(num_nodes) - starts

    indegree = np.bincount(target, minlength=num_nodes)
    blocks = []
    ordered = np.stack([node_class[node_order], key_distance[node_order]])
    bounds = np.flatnonzero(np.r_[True, (ordered[:, 1:] != ordered[:, :-1]).any(0), True])
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        rows = node_order[start:stop]
        blocks.append(Block(int(node_class[rows[0]]), int(distance[rows].min()), int(stop - start), int(indegree[rows].sum())))
    blocks = tuple(blocks)
    layouts = _layouts(graph, layer, node_class, rank, source, target, num_graphs)
    parts = ((layouts, num_graphs, blocks),)
    plan = _finish(
        source=torch.from_numpy(rank[source[edge_order]]), target=torch.from_numpy(rank[target[edge_order]]),
        node_graph=torch.from_numpy(graph[node_order]), node_layer=torch.from_numpy(layer[node_order]),
        node_position=torch.from_numpy(position[node_order]), num_graphs=num_graphs, blocks=blocks, parts=parts,
    )  # fmt: skip
    return plan, node_order, edge_order


def _layouts(graph, layer, node_class, rank, source, target, num_graphs) -> tuple[int, ...] | None:
    """The layer sizes that all graphs share, or None where they differ or a graph is no dense stack of layers."""
    depth = int(layer.max())
    sizes = np.zeros((num_graphs, depth + 1), dtype=np.int64)
    np.add.at(sizes, (graph, layer), 1)
    if (sizes != sizes[0]).any() or (layer[target] != layer[source] + 1).any():
        return None
    if ((node_class == LAST) != (layer == depth)).any() or ((node_class == FIRST) != (layer == 0)).any():
        return None
    dense = int((sizes[0, :-1] * sizes[0, 1:]).sum()) * num_graphs
    return tuple(int(n) for n in sizes[0]) if source.size == dense else None
