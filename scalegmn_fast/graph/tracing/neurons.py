"""What operations do to wires: layers make them, sums tie them, normalisations join them, reductions end them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from .features import elements, gathered_columns, ordered, total
from .labels import Value, compressed, distinct, meet, padded, pairs, varying
from .network import Action, Edges, Part
from .wires import BOTH, Wires


class Neurons:
    """The wires, edges and actions of a network so far, and the steps that operations consist of."""

    in_tables: tuple[str, ...] = ()  # operations that have no method of their own

    def __init__(self, program: torch.export.ExportedProgram, fold: bool, fixes_unknown: bool):
        self.program, self.fold, self.fixes_unknown = program, fold, fixes_unknown
        self.wires = Wires()
        self.edges: list[Edges] = []
        self.actions: list[Action] = []
        self.notes: list[tuple[str, str]] = []
        self.shared: list[tuple[np.ndarray, np.ndarray]] = []  # wires that share the nodes of other wires
        self.activations: dict[int, str] = {}
        self.used: dict[str, tuple[np.ndarray | None, str]] = {}
        self.seen: set[str] = set()
        self.node: torch.fx.Node | None = None
        self._one: np.ndarray | None = None

    @property
    def place(self) -> str:
        """Path of the module that the running operation is in."""
        stack = list((self.node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        return stack[-1][0] or "forward"

    @property
    def _what(self) -> str:
        """Name of neurons that no parameter names."""
        return f"{self.place} [{operation(self.node)}]"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the running operation's result."""
        value = self.node.meta["val"]
        return tuple((value if isinstance(value, Tensor) else value[0]).shape)

    def unsupported(self, problem: str) -> ValueError:
        """An error that names the running operation, its place and what is supported."""
        own = (name.removeprefix("op_") for name in dir(self) if name.startswith("op_"))
        supported = ", ".join(sorted({*own, *self.in_tables}))
        return ValueError(f"{operation(self.node)} in {self.place} {problem}; supported are {supported}")

    def note(self, what: str) -> None:
        """Something of the running operation is not in graph or group."""
        self.notes.append((self.place, what))

    # -- wires and edges ---------------------------------------------------------------------------------------------

    def act(self, part: Part, rows, factors, columns=None) -> None:
        """Note how a part [rows, columns, rest] moves; a part is read once."""
        places = part.elements().reshape(-1).numpy() if part.index is not None or part.name in self.used else None
        if part.name in self.used:
            before, place = self.used[part.name]
            if before is None or np.intersect1d(before, places).size:
                raise self.unsupported(f"reads {part.name} a second time, after {place}: weights must be used once")
            places = np.union1d(before, places)
        self.used[part.name] = (places, self.place)
        self.actions.append(Action(part, rows, factors, columns))

    def connect(self, kind: str, source, target, **values) -> Edges:
        """Add edges; see `Edges` for the rest of the values."""
        edges = Edges(kind, np.asarray(source), np.asarray(target), **values)
        self.edges.append(edges)
        return edges

    def one(self) -> np.ndarray:
        """The input neuron that is 1: what parameters that nothing is multiplied with hang on."""
        if self._one is None:
            self._one = self.wires.new(1, "constant", fixed=True)
        return self._one

    def collapsed(self, factor: Tensor, dims: Sequence[int]) -> Tensor:
        """The factor made to vary along ``dims`` alone: wires along others become tied, each set a new neuron."""
        keep = sorted(set(dims))
        others = [dim for dim in range(factor.ndim) if dim not in keep]
        if all(factor.shape[dim] == 1 for dim in others):
            return factor
        rows = factor.permute(*keep, *others).reshape(prod(factor.shape[dim] for dim in keep), -1)
        places = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
        place, wire = pairs(places, rows)
        self.wires.tell_apart(wire, 0)
        new = self.wires.new(len(rows), self._what)
        self.wires.tie(new[place], wire, 1)
        self.connect("identity", wire, new[place])
        return torch.from_numpy(new).reshape([factor.shape[dim] if dim in keep else 1 for dim in range(factor.ndim)])

    def contracted(self, factor: Tensor, dims: Sequence[int], *, fix: bool) -> Tensor:
        """A fixed neuron for all wires along ``dims``, of which it is a function; they may not scale (nor move)."""
        self.wires.restrict(distinct(factor), 0)
        if fix:
            self.wires.fix(distinct(factor))
        return self.hubs([factor], dims)

    def hubs(self, factors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
        """Fixed neurons that are functions of all wires along ``dims``, one for each different set of them."""
        joint = torch.stack(torch.broadcast_tensors(*factors), -1)
        kept = [dim for dim in range(joint.ndim - 1) if dim not in dims]
        rows = joint.permute(*kept, *dims, -1).reshape(prod(joint.shape[dim] for dim in kept), -1)
        sets = torch.unique(rows, dim=0, return_inverse=True)[1]
        new = torch.from_numpy(self.wires.new(int(sets.max()) + 1, self._what, fixed=True))
        hubs = new[sets].reshape([joint.shape[dim] if dim in kept else 1 for dim in range(joint.ndim - 1)])
        for factor in factors:
            wire, hub = pairs(*torch.broadcast_tensors(factor, hubs))
            self.connect("structure", wire, hub)
            self.wires.tell_apart(wire, hub)
        return hubs

    def read(self, value: Value, dim: int) -> tuple[np.ndarray, list[Tensor]]:
        """(the wire of each entry along a dimension, the factors that do not vary along it)."""
        dim %= len(value.shape)
        found = [f for f in value.factors if f.shape[dim] > 1 or f.numel() == 1]
        carried = [f for f in value.factors if not any(f is other for other in found)]
        if len(found) == 1:
            factor = self.collapsed(found[0], [dim])
            columns = factor.reshape(-1).expand(value.shape[dim]).numpy()
        else:
            columns = self.wires.new(value.shape[dim], self._what, fixed=True)
            for factor in [*found, *carried]:
                hub = self.contracted(factor, range(factor.ndim), fix=any(factor is f for f in found))
                self.connect("structure", np.repeat(distinct(hub), len(columns)), columns)
        self.wires.tell_apart(*np.unique(columns, return_counts=True))
        return columns, carried

    def layer(self, value: Value, dim: int, weight: Part, bias: Part | None, *, groups: int = 1, kernel=None) -> Value:
        """New wires along a dimension for a weight [out, in / groups, *kernel]."""
        dim %= len(value.shape)
        columns, carried = self.read(value, dim)
        outputs, inputs = weight.shape[:2]
        new = self.wires.new(outputs, weight.name.removesuffix(".weight"))
        for factor in carried:
            self.wires.tell_apart(distinct(factor), 0)
            if bias is not None:
                self.wires.restrict(distinct(factor), 0)
        flat = weight.reshaped(outputs, inputs, prod(weight.shape[2:]))
        if groups > 1 and inputs == 1:
            source = columns.repeat(outputs // groups)
            self.wires.tie(new, source, 0)
            self.act(flat, new, ((new, 1), (source, -1)))
        else:
            self._act_by_groups(flat, new, columns, groups)
        edges = self._weighted(flat, new, columns.reshape(groups, -1), kernel)
        if bias is not None:
            self.act(bias.reshaped(outputs, 1, 1), new, ((new, 1),))
            edges.bias = partial(elements, bias)
        core = torch.from_numpy(new).reshape([-1 if k == dim else 1 for k in range(len(value.shape))])
        return Value(self.shape, [core, *carried], () if carried else (edges,))

    def _act_by_groups(self, weight: Part, new: np.ndarray, columns: np.ndarray, groups: int) -> None:
        if groups == 1:
            self.act(weight, new, ((new, 1),), columns)
            return
        places = weight.elements()
        for group, (rows, inside) in enumerate(
            zip(np.split(np.arange(len(new)), groups), np.split(columns, groups), strict=True)
        ):
            self.wires.tell_apart(new[rows], group)
            self.wires.tell_apart(inside, group)
            part = replace(weight, shape=(len(rows), *weight.shape[1:]), index=places[rows])
            self.act(part, new[rows], ((new[rows], 1),), inside)

    def _weighted(self, weight: Part, new: np.ndarray, columns: np.ndarray, kernel) -> Edges:
        """Edges of a weight [out, in, taps]; columns [groups, in] of one wire share an edge."""
        groups, outputs, taps = len(columns), weight.shape[0], weight.shape[2]
        source, slot, most = [], [], 1
        for inside in columns:
            senders, place = np.unique(inside, return_inverse=True)
            place = place.reshape(-1)
            order = np.argsort(place, kind="stable")
            rank = np.empty(len(inside), dtype=np.int64)
            rank[order] = np.arange(len(inside)) - np.searchsorted(place[order], place[order])
            most = max(most, int(rank.max()) + 1)
            source.append(senders)
            slot.append((place, rank))
        per_group = outputs // groups
        ends = np.concatenate([np.tile(senders, per_group) for senders in source])
        starts = np.repeat(new, np.repeat([len(senders) for senders in source], per_group))
        kind = "linear" if kernel is None else "convolution"
        if all(np.array_equal(place, np.arange(len(place))) for place, _ in slot):
            features = partial(elements, weight, shape=(-1, taps))
        else:
            slots = [torch.from_numpy(place * most + rank) for place, rank in slot]
            features = partial(gathered_columns, weight, slots, [len(senders) * most for senders in source], most)
        shape = (kernel or (1, 1)) if most == 1 else None
        return self.connect(kind, ends, starts, features=features, numbers=most * taps, kernel=shape, receivers=new)

    # -- parameters that are added, multiplied, or stand by themselves -----------------------------------------------

    def labels_of(self, value: Value, part: Part) -> tuple[Value, Tensor | None]:
        """(value, the wire of each element of a parameter that is broadcast against it, None if it meets none)."""
        offset = len(value.shape) - len(part.shape)
        if offset < 0:
            raise self.unsupported(f"broadcasts a value to the shape of {part.name}")
        dims = {offset + dim for dim, size in enumerate(part.shape) if size > 1}
        met = [k for k, factor in enumerate(value.factors) if varying(factor) & dims or factor.numel() == 1]
        factors = list(value.factors)
        for k in met[1:]:
            factors[k] = self.contracted(factors[k], range(factors[k].ndim), fix=True)
        if not met:
            return value, None
        k = met[0]
        factors[k] = self.collapsed(factors[k], varying(factors[k]) & dims)
        unchanged = all(a is b for a, b in zip(factors, value.factors, strict=True))
        settled = self.settled(Value(value.shape, factors, value.edges if unchanged else ()))
        labels = settled.factors[0] if len(settled.factors) == 1 else factors[k]
        return settled, labels.reshape(labels.shape[offset:]).expand(part.shape)

    def _rows_of(self, part: Part, labels: Tensor) -> tuple[Part, np.ndarray]:
        """A parameter as rows of one element each, with their wires."""
        index = part.elements().reshape(-1, 1, 1)
        return replace(part, shape=tuple(index.shape), index=index), labels.reshape(-1).numpy()

    def added(self, value: Value, part: Part) -> Value:
        """value + parameter."""
        value, labels = self.labels_of(value, part)
        if labels is None:
            for factor in value.factors:
                self.wires.restrict(distinct(factor), 0)
            self.note(f"{part.name} is added to all neurons alike and is not in the graph")
            return replace(value, edges=())
        rows, wires = self._rows_of(part, labels)
        self.act(rows, wires, ((wires, 1),))
        core = next(f for f in value.factors if np.isin(wires[0], f.numpy()))
        targets = np.unique(core.numpy())
        self.wires.tell_apart(*np.unique(wires, return_counts=True))
        if len(value.edges) == 1 and np.array_equal(value.edges[0].receivers, wires):
            edges = value.edges[0]
            edges.bias = partial(total, edges.bias, partial(elements, part))
            return value
        new = self.wires.new(len(targets), self._what)
        self.wires.tie(new, targets, 1)
        self.connect("identity", targets, new)
        self._constant(part, wires, targets, new)
        mapped = torch.from_numpy(new[np.searchsorted(targets, core.numpy())])
        return Value(self.shape, [mapped if f is core else f for f in value.factors])

    def _constant(self, part: Part, wires: np.ndarray, targets: np.ndarray, new: np.ndarray) -> None:
        """A parameter as biases, or as the numbers of edges from the neuron that is 1."""
        counts = np.bincount(np.searchsorted(targets, wires), minlength=len(targets))
        order = torch.from_numpy(np.argsort(wires, kind="stable"))
        if counts.max() == 1:
            receivers = new[counts > 0]
            self.edges.append(
                Edges("linear", new[:0], new[:0], receivers=receivers, bias=partial(ordered, part, order, (-1,)))
            )
            return
        one = np.repeat(self.one(), len(new))
        features = partial(ordered, part, order, (len(new), -1))
        self.connect("linear", one, new, features=features, numbers=int(counts.max()), kernel=None)

    def scaled(self, value: Value, part: Part | None, bias: Part | None) -> Value:
        """value * parameter + parameter, as one neuron per neuron."""
        if part is None and bias is None:
            return replace(value, edges=())
        value, labels = self.labels_of(value, bias if part is None else part)
        if labels is None:
            for factor in value.factors:
                self.wires.restrict(distinct(factor), 0 if bias is not None else BOTH)
            names = " and ".join(p.name for p in (part, bias) if p is not None)
            self.note(f"{names} multiply all neurons alike and are not in the graph")
            return replace(value, edges=())
        wires = labels.reshape(-1).numpy()
        core = next(f for f in value.factors if np.isin(wires[0], f.numpy()))
        sources = np.unique(wires)
        name = (bias if part is None else part).name
        new = self.wires.new(len(sources), name.removesuffix(".weight"))
        place = np.searchsorted(sources, wires)
        self.wires.tell_apart(*np.unique(wires, return_counts=True))
        self.wires.tie(new, sources, 0)
        count = len(wires) // len(sources)
        order = torch.from_numpy(np.argsort(wires, kind="stable"))
        numbers = 1 if part is None else count
        edges = self.connect(
            "scale", sources, new, numbers=numbers, kernel=(1, 1) if numbers == 1 else None, receivers=new
        )
        if part is None:
            self.wires.tie(new, sources, 1)
        else:
            rows, _ = self._rows_of(part, labels)
            self.act(rows, new[place], ((new[place], 1), (wires, -1)))
            edges.features = partial(ordered, part, order, (len(sources), -1))
        result = Value(self.shape, [], ())
        mapped = torch.from_numpy(new[np.searchsorted(sources, core.numpy())])
        result.factors = [mapped if f is core else f for f in value.factors]
        if bias is None:
            return replace(result, edges=(edges,))
        self.act(self._rows_of(bias, labels)[0], new[place], ((new[place], 1),))
        if count == 1:
            edges.bias = partial(ordered, bias, order, (-1,))
            return replace(result, edges=(edges,))
        self._constant(bias, new[place], new, new)
        return result

    def parameter(self, part: Part, dims: set[int]) -> Value:
        """A parameter that stands by itself (a class token), its neurons along the dimensions ``dims``."""
        shape = [size if dim in dims else 1 for dim, size in enumerate(part.shape)]
        wires = self.wires.new(prod(shape), part.name)
        core = torch.from_numpy(wires).reshape(shape)
        first = part.view(lambda t: t[:1]) if part.shape[0] > 1 and 0 not in dims else part  # expanded over the batch
        rows, labels = self._rows_of(first, core.expand(first.shape))
        self.act(rows, labels, ((labels, 1),))
        order = torch.from_numpy(np.argsort(labels, kind="stable"))
        one = np.repeat(self.one(), len(wires))
        numbers = len(labels) // len(wires)
        edges = self.connect(
            "linear", one, wires, features=partial(ordered, first, order, (len(wires), -1)), numbers=numbers,
            kernel=(1, 1) if numbers == 1 else None,
        )  # fmt: skip
        return Value(part.shape, [core], (edges,))

    # -- values that meet values -------------------------------------------------------------------------------------

    def joint(self, a: Value, b: Value, *, adds: bool) -> Value:
        """a + b, or another function of both entry by entry."""
        shape, ndim = self.shape, len(self.shape)
        left, right = ([padded(f, ndim) for f in v.factors] for v in (a, b))
        merged, edges = [], ()
        for f in list(left):
            other = next((g for g in right if meet(f, g)), None)
            if other is None:
                continue
            left, right = [x for x in left if x is not f], [x for x in right if x is not other]
            core, edges = self._paired(f, other, a, b, adds)
            merged.append(core)
        if adds:
            rest = [self.contracted(f, range(ndim), fix=True) for f in (left if merged else []) + right]
            rest += [] if merged else left
        else:
            rest = left + right
        if rest:
            edges = ()
            if adds:
                for f in merged + rest:
                    self.wires.restrict(distinct(f), 0)
        return self.settled(Value(shape, merged + rest, edges))

    def _paired(self, f: Tensor, g: Tensor, a: Value, b: Value, adds: bool) -> tuple[Tensor, tuple[Edges, ...]]:
        """Labels of the result of two values whose entries belong to the wires of f and of g."""
        f, g = torch.broadcast_tensors(f, g)
        wires = self.wires
        if torch.equal(f, g):
            if not adds:
                wires.restrict(distinct(f), 0)
            return compressed(f), ()
        first, second = pairs(f, g)
        alone = [len(np.unique(side)) == len(side) for side in (first, second)]
        for side, mark in ((first, 0), (second, 1)):
            wires.tell_apart(side, mark)
        if alone == [True, True]:
            wires.tie(first, second, 1 if adds else 0)
            if not adds:
                wires.restrict(np.append(first, second), 0)
        else:
            for side, is_alone, other in ((first, alone[0], second), (second, alone[1], first)):
                if not is_alone:
                    wires.fix(side)
                    if adds:
                        wires.restrict(other, 0)
        main, other, owner, guest = (first, second, a, b) if alone[0] or not alone[1] else (second, first, b, a)
        labels = compressed(f if main is first else g)
        kind = "identity" if alone == [True, True] else "structure"
        if adds and alone == [True, True]:
            for own, ours, theirs, guests, core in ((owner, main, other, guest, labels),
                                                    (guest, other, main, owner, compressed(g))):  # fmt: skip
                if own.edges and not self._senders(own.edges) & self._senders(guests.edges or (), theirs):
                    if guests.edges:
                        self.shared.append((theirs, ours))
                        return core, own.edges + guests.edges
                    return core, (*own.edges, self.connect("identity", theirs, ours))
        known = np.unique(main)
        new = wires.new(len(known), self._what)
        place = new[np.searchsorted(known, main)]
        wires.tie(new, known, 1)
        self.connect("identity", known, new)
        self.connect(kind, other, place)
        return torch.from_numpy(new[np.searchsorted(known, labels.numpy())]), ()

    def _senders(self, edges: Sequence[Edges], wires=()) -> set[int]:
        """Nodes that send along edges; the given ones if there are none."""
        found = np.concatenate([e.source for e in edges]) if edges else np.asarray(wires)
        return set(self.nodes()[found].tolist())

    def settled(self, value: Value) -> Value:
        """Fixed neurons beside others become neurons that the others depend on, so that one factor is left."""
        factors = list(value.factors)
        while len(factors) > 1:
            fixed = next((f for f in factors if self.wires.fixed[distinct(f)].all()), None)
            if fixed is None:
                break
            factors = [f for f in factors if f is not fixed]
            main = factors[0]
            wire, hub = pairs(*torch.broadcast_tensors(main, fixed))
            known = distinct(main)
            new = self.wires.new(len(known), self._what)
            self.wires.tie(new, known, 1)
            if self.wires.fixed[known].all():
                self.wires.fix(new)
            self.connect("identity", known, new)
            self.connect("structure", hub, new[np.searchsorted(known, wire)])
            self.wires.tell_apart(wire, hub)
            factors[0] = torch.from_numpy(new[np.searchsorted(known, main.numpy())])
            value = Value(value.shape, factors)
        return value

    def nodes(self) -> np.ndarray:
        """The wire whose node each wire shares."""
        node_of = np.arange(len(self.wires))
        for wires, others in self.shared:
            moved = np.arange(len(self.wires))
            moved[node_of[wires]] = node_of[others]
            node_of = moved[node_of]
        return node_of


def operation(node: torch.fx.Node) -> str:
    """Name of a node's operator, without its overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))
