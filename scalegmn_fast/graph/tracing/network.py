"""`TracedNetwork`: a network as neurons and the maps between them, its symmetry group, and the proof of that group."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..architecture import ACTIVATION_NAMES, Architecture
from ..batch import GraphBatch
from ..layers import Grid, check_list, edge_features
from ..plan import FIRST, HIDDEN, LAST, GraphPlan
from .wires import BOTH, SCALE, SIGN, Element, NeuronClass, random_element

TOLERANCE = 1e-8
_KINDS = {"sign": SIGN, "scale": SCALE, "sign and scale": BOTH, "permutation": 0, "fixed": 0}


class SymmetryError(ValueError):
    """A symmetry that was claimed of a network changes its function."""


@dataclass(frozen=True, eq=False)
class Part:
    """Elements of a parameter or buffer: all of them, or those of an index into the flattened one."""

    name: str
    shape: tuple[int, ...]
    index: Tensor | None = None
    is_buffer: bool = False

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The elements, in this part's shape."""
        tensor = tensors[self.name]
        return tensor.reshape(self.shape) if self.index is None else tensor.reshape(-1)[self.index]

    def elements(self) -> Tensor:
        """int64 of this part's shape: places in the flattened tensor."""
        if self.index is not None:
            return self.index
        return torch.arange(int(np.prod(self.shape))).reshape(self.shape)

    def reshaped(self, *shape: int) -> Part:
        """The same elements in another shape."""
        return replace(self, shape=shape, index=None if self.index is None else self.index.reshape(shape))

    def view(self, fn: Callable[[Tensor], Tensor]) -> Part:
        """The part after an operation that moves elements."""
        index = fn(self.elements())
        return replace(self, shape=tuple(index.shape), index=index)


@dataclass(eq=False)
class Edges:
    """Edges of one operation, from wire ``source[k]`` to wire ``target[k]``, each of ``numbers`` numbers.

    ``kind``: "convolution", "linear", "scale" (one edge per neuron), "identity" (a value that is carried on), or
    "structure" (the target depends on the source in another way than by a weight). ``kernel`` is the shape of the
    numbers if they are a kernel. ``features(tensors)`` gives [edges, numbers]; None for ones. ``bias(tensors)`` gives
    the biases of ``receivers``.
    """

    kind: str
    source: np.ndarray
    target: np.ndarray
    features: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    numbers: int = 1
    kernel: tuple[int, int] | None = (1, 1)
    receivers: np.ndarray | None = None
    bias: Callable[[Mapping[str, Tensor]], Tensor] | None = None


class Action(NamedTuple):
    """How a part [rows, columns, rest] moves with the neurons.

    Row k belongs to wire ``rows[k]`` and is multiplied by the scales of ``factors`` to their powers; column k belongs
    to wire ``columns[k]`` and is divided by its scale.
    """

    part: Part
    rows: np.ndarray
    factors: tuple[tuple[np.ndarray, int], ...]
    columns: np.ndarray | None = None

    def apply(self, tensor: Tensor, element: Element) -> None:
        """Move the elements within a parameter, in place."""
        values = self.part.read({self.part.name: tensor})
        moved = values[_moved(self.rows, element)]
        for wires, power in self.factors:
            moved = moved * element.scale[torch.from_numpy(wires)].reshape(-1, 1, 1) ** power
        if self.columns is not None:
            moved = moved[:, _moved(self.columns, element)]
            moved = moved / element.scale[torch.from_numpy(self.columns)].reshape(1, -1, 1)
        tensor.view(-1)[self.part.elements().reshape(-1)] = moved.reshape(-1).to(tensor.dtype)


def _moved(wires: np.ndarray, element: Element) -> Tensor:
    """Where the entries of each wire come from: the n-th of a wire from the n-th of the one that takes its place."""
    old = element.moved.numpy()[wires]
    order, by_old = np.argsort(old, kind="stable"), np.argsort(wires, kind="stable")
    if not np.array_equal(old[order], wires[by_old]):
        raise SymmetryError("neurons that change places must be read by the same operations")
    result = np.empty(len(wires), dtype=np.int64)
    result[order] = by_old
    return torch.from_numpy(result)


@dataclass(eq=False)
class TracedNetwork:
    """What `trace` understood of a module.

    Attributes:
        classes: the symmetry group that was kept, as classes of interchangeable neurons.
        notes: (place, what) of everything that is in the module and not, or not as it is, in graph and group.
        edges: the operations' edges, in the order of execution.
    """

    classes: list[NeuronClass]
    notes: list[tuple[str, str]]
    edges: list[Edges]
    actions: list[Action]
    scale_sets: tuple[np.ndarray, np.ndarray]
    node_of: np.ndarray  # wire -> the wire whose node it shares
    activations: dict[int, str]
    inputs: tuple[Tensor, ...]
    kernel_size: tuple[int, int] | None
    input_value: float
    shapes: dict[str, tuple[int, ...]]  # of the parameters and buffers that are read

    # -- the graph ---------------------------------------------------------------------------------------------------

    def batch(self, networks: Sequence[nn.Module | Mapping[str, Tensor]]) -> GraphBatch:
        """Graphs of networks of this architecture.

        Args:
            networks: modules, or state dicts, with the traced module's parameters and buffers.

        Returns:
            A `GraphBatch` with ``symmetry``, ``sign_mask`` and ``architectures``; d_v = 1 (biases), d_e the numbers of
            the largest kernel. Deterministic; differentiable in the parameters.

        Raises:
            TypeError, ValueError: an empty list; an entry that is no module or mapping.
            KeyError: a parameter that is missing; ValueError: one of another shape.
        """
        check_list("networks", networks)
        graph = self._graph
        nodes, edges = [], []
        for index, network in enumerate(networks):
            tensors = _tensors(f"networks[{index}]", network)
            self._check_shapes(f"networks[{index}]", tensors)
            nodes.append(self._node_features(tensors)[graph.node_order])
            edges.append(self._edge_features(tensors)[graph.edge_order])
        symmetry, mask = self._symmetry()
        parts = [
            GraphBatch(
                x.unsqueeze(1),
                e,
                graph.plan.to(x.device),
                None if mask is None else mask[graph.node_order].to(x.device),
            )
            for x, e in zip(nodes, edges, strict=True)
        ]
        batch = GraphBatch.cat(parts)
        batch.symmetry, batch.architectures = symmetry, (self._architecture(),) * len(parts)
        return batch

    @property
    def layout(self) -> tuple[int, ...]:
        """Neurons per layer, where a layer is all neurons at one longest distance from the inputs, first and last ones
        apart: the ``layer_layout`` that a model's configuration needs."""
        plan = self._graph.plan
        widths = plan.layer_widths()[0]
        return (plan.num_first, *widths[1:-1], plan.num_last)

    @property
    def num_edges(self) -> int:
        """Edges of the network's graph."""
        return self._graph.plan.num_edges

    def _grid(self) -> Grid:
        kernels = [edges.kernel for edges in self.edges if edges.kernel is not None] + [(1, 1)]
        height, width = (max(kernel[axis] for kernel in kernels) for axis in (0, 1))
        most = max((edges.numbers for edges in self.edges if edges.kernel is None), default=1)
        if self.kernel_size is not None:
            (height, width), most = self.kernel_size, 1
        return Grid(height, width, max(height * width, most), (height - 1) // 2 * width + (width - 1) // 2)

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph.of(self, self._grid())

    def _edge_features(self, tensors: Mapping[str, Tensor]) -> Tensor:
        grid, like = self._grid(), next(iter(tensors.values()))
        found = []
        for edges in self.edges:
            count = len(edges.source)
            values = like.new_ones(count, 1) if edges.features is None else edges.features(tensors)
            pieces, copies = _pieces(edges, grid)
            if copies:
                found.append(_widened(like.new_ones(copies, 1), (1, 1), grid))
                values = torch.nn.functional.pad(values, (0, pieces * grid.d_e - edges.numbers))
                found += [values[:, k * grid.d_e : (k + 1) * grid.d_e] for k in range(pieces)]
            else:
                found.append(_widened(values, edges.kernel, grid))
        return torch.cat(found)

    def _node_features(self, tensors: Mapping[str, Tensor]) -> Tensor:
        graph = self._graph
        bias = next(iter(tensors.values())).new_zeros(graph.num_nodes)
        for edges in self.edges:
            if edges.bias is not None:
                nodes = torch.from_numpy(graph.node[self.node_of[edges.receivers]]).to(bias.device)
                bias = bias.index_add(0, nodes, edges.bias(tensors))
        first = torch.from_numpy(graph.node_class == FIRST).to(bias.device)
        return torch.where(first, self.input_value, bias)

    def _check_shapes(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        for name, shape in self.shapes.items():
            if name not in tensors:
                raise KeyError(f"{label} must hold {name!r}")
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{label}[{name!r}] must have shape {list(shape)}, got {list(tensors[name].shape)}")

    def _symmetry(self) -> tuple[str, Tensor | None]:
        """(symmetry that all hidden nodes have, bool per node: True for sign)."""
        graph = self._graph
        kinds = np.full(graph.num_nodes, BOTH)
        wire_kinds = np.zeros(len(self.node_of), dtype=np.int64)
        for neurons in self.classes:
            for column, symmetry in enumerate(neurons.symmetry):
                wire_kinds[neurons.members[:, column]] = _KINDS[symmetry]
        for edges in self.edges:
            if edges.kind == "structure":  # 1, whatever its ends are multiplied by
                wire_kinds[edges.source] = wire_kinds[edges.target] = 0
        used = graph.node[self.node_of]
        np.bitwise_and.at(kinds, used[used >= 0], wire_kinds[used >= 0])
        kinds[graph.copied] = np.where(graph.node_class[graph.copy_of] == FIRST, BOTH, kinds[graph.copy_of])
        hidden = set(kinds[graph.node_class == HIDDEN].tolist())
        if 0 in hidden:
            return "permutation", None
        linear_is_sign = SIGN in hidden and SCALE not in hidden
        signs = (kinds == SIGN) | ((kinds != SCALE) & linear_is_sign)
        values = set(signs[graph.node_class == HIDDEN].tolist()) or {linear_is_sign}
        name = "hetero" if len(values) == 2 else "sign" if True in values else "scale"
        return name, torch.from_numpy(signs)

    def _architecture(self) -> Architecture:
        graph = self._graph
        layer = np.empty(graph.num_nodes, dtype=np.int64)
        layer[graph.node_order.numpy()] = graph.plan.node_layer.numpy()
        convolutions = np.zeros(graph.plan.max_layer + 1, dtype=bool)
        names: list[set[str]] = [set() for _ in convolutions]
        for edges in self.edges:
            if edges.kind == "convolution":
                convolutions[layer[graph.node[self.node_of[edges.target]]]] = True
        acts = {graph.node[self.node_of[wire]]: name for wire, name in self.activations.items()}
        for node in np.flatnonzero(graph.node_class == HIDDEN):
            names[layer[node]].add(acts.get(node, "none"))
        hidden = [next(iter(found)) if len(found) == 1 else "" for found in names[1:-1]]
        known = all(name in ACTIVATION_NAMES for name in hidden)
        return Architecture(tuple(convolutions[1:].tolist()), tuple(hidden) if known else None)

    # -- the group ---------------------------------------------------------------------------------------------------

    def random_element(self, generator: torch.Generator | None = None) -> Element:
        """Any permutation within each class, signs, and scales between 1/2 and 2."""
        return random_element(self.classes, *self.scale_sets, generator)

    def transform(self, module: nn.Module, element: Element) -> None:
        """Apply a group element to a module's parameters and buffers, in place.

        Raises:
            SymmetryError: the element changes places of neurons that are read by different operations.
        """
        tensors = dict(_tensors("module", module))
        with torch.no_grad():
            for action in self.actions:
                action.apply(tensors[action.part.name], element)

    def verify(
        self,
        module: nn.Module,
        *inputs: Tensor,
        draws: int = 2,
        perturb: float = 0.1,
        tolerance: float = TOLERANCE,
        generator: torch.Generator | None = None,
    ) -> float:
        """Numeric proof of the group: random elements of it, applied to a module's weights, do not change its function.

        Args:
            module: the traced module or one of its architecture; a float64 copy in evaluation mode is used.
            inputs: what ``forward`` takes; random numbers of the traced inputs' shapes if none are given.
            draws: how many group elements are tried.
            perturb: parameters are multiplied by up to ``1 +- perturb``, and as much is added, first: a fresh module's
                zeros and ones have more symmetries than its architecture.
            tolerance: bound on the relative error of the outputs.

        Returns:
            The largest relative error seen. Deterministic for a seeded ``generator``.

        Raises:
            SymmetryError: the function changed; the message names the classes of neurons whose symmetry does not hold.
        """
        network = copy.deepcopy(module).double().eval()
        inputs = self._random_inputs(generator) if not inputs else inputs
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        with torch.no_grad():
            for tensor in dict(_tensors("module", network)).values():
                if tensor.is_floating_point():
                    noise = torch.rand(2, *tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
                    positive = (tensor >= 0).all() & (tensor > 0).any()  # variances stay positive
                    shift = noise[1].abs() if positive else noise[1]
                    tensor.mul_(1 + perturb * noise[0]).add_(perturb * shift)
        worst = 0.0
        for _ in range(draws):
            element = self.random_element(generator)
            error = self._error(network, inputs, element)
            worst = max(worst, error)
            if not error <= tolerance:
                raise SymmetryError(
                    f"module must not change under the group that was kept: relative error {error:.1e} > "
                    f"{tolerance:.0e}; by themselves these classes of neurons change it: "
                    f"{self._culprits(network, inputs, element, tolerance)}"
                )
        return worst

    def _random_inputs(self, generator) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(x.shape, generator=generator, dtype=torch.float64) if x.is_floating_point() else x
            for x in self.inputs
        )

    def _error(self, network: nn.Module, inputs, element: Element) -> float:
        other = copy.deepcopy(network)
        try:
            self.transform(other, element)
        except SymmetryError:
            return float("inf")
        with torch.no_grad(), plain_attention():
            before, after = (torch.utils._pytree.tree_leaves(net(*inputs)) for net in (network, other))
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)]
        return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)

    def _culprits(self, network: nn.Module, inputs, element: Element, tolerance: float) -> str:
        scale_set, found = self.scale_sets[0], []
        for neurons in self.classes:
            wires = np.flatnonzero(np.isin(scale_set, scale_set[neurons.members]))
            moved, scale = torch.arange(len(element.moved)), torch.ones_like(element.scale)
            moved[neurons.members] = element.moved[neurons.members]
            scale[wires] = element.scale[wires]
            if not self._error(network, inputs, Element(moved, scale)) <= tolerance:
                found.append(_class_name(neurons))
        return "; ".join(found) or "none, only together"

    # -- the report --------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """The group that was kept, the graph, and what was not understood, as text."""
        graph = self._graph
        plan = graph.plan
        lines = [
            f"graph: {plan.num_nodes} neurons, {plan.num_edges} edges of {self._grid().d_e} numbers, "
            f"{plan.max_layer + 1} layers, symmetry {self._symmetry()[0]}",
            "group:",
            *(f"  {_class_name(neurons)}" for neurons in self.classes),
            "not in graph or group:" if self.notes else "everything is in graph and group",
            *(f"  {place}: {what}" for place, what in self.notes),
        ]
        return "\n".join(lines)

    __str__ = report


class _Graph(NamedTuple):
    """Plan of one network. ``node`` is the node of each wire, -1 for those without; ``copied`` nodes repeat others."""

    plan: GraphPlan
    node: np.ndarray
    num_nodes: int
    node_order: Tensor
    edge_order: Tensor
    node_class: np.ndarray
    copied: np.ndarray
    copy_of: np.ndarray

    @classmethod
    def of(cls, network: TracedNetwork, grid: Grid) -> _Graph:
        ends = [network.node_of[np.stack([edges.source, edges.target])] for edges in network.edges]
        wires = np.unique(np.concatenate([pair.reshape(-1) for pair in ends]))
        node = np.full(len(network.node_of), -1, dtype=np.int64)
        node[wires] = np.arange(len(wires))
        count, found, copies = len(wires), [], [np.zeros(0, dtype=np.int64)]
        for edges, pair in zip(network.edges, ends, strict=True):
            source, target = node[pair]
            pieces, repeated = _pieces(edges, grid)
            if not repeated:
                found.append(np.stack([source, target]))
                continue
            senders, place = np.unique(source, return_inverse=True)
            new = count + np.arange(repeated).reshape(pieces, -1)
            found.append(np.stack([np.tile(senders, pieces), new.reshape(-1)]))
            found += [np.stack([row[place.reshape(-1)], target]) for row in new]
            copies.append(np.tile(senders, pieces))
            count += repeated
        plan, node_order, edge_order = GraphPlan.from_edges(np.concatenate(found, axis=1), count)
        node_class = np.empty(count, dtype=np.int64)
        sizes = (plan.num_last, plan.num_hidden, plan.num_first)
        node_class[node_order] = np.repeat((LAST, HIDDEN, FIRST), sizes)
        copy_of = np.concatenate(copies)
        copied = np.arange(len(wires), count)
        return cls(
            plan, node, count, torch.from_numpy(node_order), torch.from_numpy(edge_order), node_class, copied, copy_of
        )


def _pieces(edges: Edges, grid: Grid) -> tuple[int, int]:
    """(pieces that an edge's numbers are cut into, nodes that repeat its sources to carry them; 0 if one will do)."""
    pieces = -(-edges.numbers // grid.d_e)
    return pieces, pieces * len(np.unique(edges.source)) if pieces > 1 else 0


def _widened(values: Tensor, kernel: tuple[int, int] | None, grid: Grid) -> Tensor:
    """[edges, numbers] -> [edges, d_e]: kernels on the grid's centre, other numbers and long kernels from the start."""
    if kernel is None or kernel[0] > grid.height or kernel[1] > grid.width:
        return edge_features(values.unsqueeze(0), values.shape[1], grid)[0, 0]
    return edge_features(values.unflatten(1, kernel)[None, :, None], 1, grid)[0, 0]


def _tensors(label: str, network: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(network, nn.Module):
        return dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    if not isinstance(network, Mapping):
        raise TypeError(f"{label} must be a torch.nn.Module or a state dict, got {type(network).__name__}")
    return network


def _class_name(neurons: NeuronClass) -> str:
    names = zip(neurons.places, neurons.symmetry, strict=True)
    shown = [f"{place or 'input'} ({symmetry})" for place, symmetry in names]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"{len(neurons.members)} x {', '.join(shown[:4])}{more}"


@contextmanager
def plain_attention():
    """Attention as the operations it consists of: the fast path of nn.MultiheadAttention is one operator."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
