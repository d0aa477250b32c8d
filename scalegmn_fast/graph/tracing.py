"""`trace`: any feed-forward module as a graph of neurons, with the symmetries of its weights.

The module is exported (`torch.export`) and its operations are run on labels instead of numbers. A value's labels say for
each of its entries whose number it is: the wire (`wires`) that carries it. What moves entries (views, slices,
permutations, concatenation) runs on the labels as it would on numbers; what computes reads labels, says what it does to
the symmetry of the wires, and makes new wires where it has weights.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .architecture import ACTIVATION_NAMES
from .traced import Action, Edges, Part, TracedNetwork, plain_attention
from .wires import BOTH, SCALE, SIGN, Wires

#: What an elementwise function of one value leaves of its neurons' scalings.
_ELEMENTWISE = {
    **dict.fromkeys(("dropout", "alpha_dropout", "feature_dropout", "neg", "contiguous", "clone", "alias"), BOTH),
    **dict.fromkeys(("detach", "to", "_to_copy", "type_as"), BOTH),
    **dict.fromkeys(("relu", "leaky_relu", "rrelu", "abs"), SCALE),
    **dict.fromkeys(("tanh", "sin", "asinh", "sinh", "atan", "erf", "softshrink", "hardshrink"), SIGN),
    **dict.fromkeys(("gelu", "silu", "sigmoid", "elu", "selu", "celu", "softplus", "mish", "hardswish"), 0),
    **dict.fromkeys(("hardsigmoid", "log_sigmoid", "relu6", "exp", "log", "cos", "pow", "sqrt", "rsqrt"), 0),
    **dict.fromkeys(("clamp", "square", "reciprocal", "log1p", "expm1", "exp2"), 0),
}
_MOVING = (
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "numpy_T", "movedim", "swapaxes",
    "squeeze", "unsqueeze", "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "expand",
    "expand_as", "repeat", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "swapdims",
)  # fmt: skip
_POOLS = {
    **dict.fromkeys(("max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"), SCALE),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"), BOTH),
    **dict.fromkeys(("upsample_nearest2d", "upsample_bilinear2d"), BOTH),
}
_REDUCTIONS = {"mean": BOTH, "sum": BOTH, "amax": SCALE}
#: How far to look for the operation that decides what the neurons of an input are.
_CHANNELS_FIRST = ("conv1d", "conv2d", "batch_norm", "group_norm", "max_pool1d", "max_pool2d", "avg_pool2d")


@dataclass(eq=False)
class Value:
    """A tensor of the network as whose numbers its entries are.

    ``factors``: int64 tensors of the value's dimensions, of size 1 along those where the wire is the same. With several
    factors an entry belongs to one wire of each and scales with all of them (hidden units of a token mixer, for every
    channel). ``edges``: what computes exactly this value, read by nothing else.
    """

    shape: tuple[int, ...]
    factors: list[Tensor]
    edges: tuple[Edges, ...] = ()

    def varying(self, factor: Tensor) -> set[int]:
        return {dim for dim, size in enumerate(factor.shape) if size > 1}


def trace(
    module: nn.Module,
    *inputs: Tensor,
    fold_batch_norm: bool = True,
    kernel_size: tuple[int, int] | None = None,
    input_value: float | None = None,
    unknown: str = "error",
) -> TracedNetwork:
    """The graph and the symmetry group of a feed-forward module.

    Supported are the operations in docs/tracing.md, as modules or as functions. Weights must be parameters or views of
    them, each used once; shapes may not depend on data. Which symmetry a neuron has follows from what reads it:
    positively homogeneous functions keep positive scalings, odd ones signs, others permutations alone; the branches of
    a residual sum share their neurons; a normalisation over neurons takes their scalings.

    Args:
        module: the network; read in evaluation mode, and left as it was.
        inputs: an example of what ``forward`` takes. Only shapes and dtypes matter.
        fold_batch_norm: batch norms right after a layer become part of its weights. False, and elsewhere: one neuron and
            one edge per channel.
        kernel_size: height and width that kernels are padded to, None for the largest. Larger kernels, pixels of a
            flattened channel and position embeddings that have more numbers than that are spread over nodes that repeat
            the sending neuron.
        input_value: node feature of input neurons; None for 1 in networks of linear layers and 0 in networks with
            convolutions, as the published models have it.
        unknown: what becomes of an operation that is not supported. "error": a ValueError. "fix": all neurons that it
            reads lose their symmetries and go into one neuron, which stands for its result; the report names it.

    Returns:
        A `TracedNetwork`: ``batch`` makes graphs, ``report`` says what was kept and what was not understood, ``verify``
        proves the group on a module. Deterministic.

    Raises:
        TypeError: ``module`` is no module, an input no tensor.
        ValueError: no inputs; an operation that is not supported (the message names it, its place in the module and
            what is); a parameter used twice or computed with; control flow or shapes that depend on data.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if not inputs:
        raise ValueError("inputs must hold an example of what forward takes, got none")
    for index, value in enumerate(inputs):
        if not isinstance(value, Tensor):
            raise TypeError(f"inputs[{index}] must be a torch.Tensor, got {type(value).__name__}")
    if kernel_size is not None and (len(kernel_size) != 2 or min(kernel_size) < 1):
        raise ValueError(f"kernel_size must be two positive integers, height and width, got {kernel_size!r}")
    if unknown not in ("error", "fix"):
        raise ValueError(f"unknown must be error or fix, got {unknown!r}")
    tracer = _Tracer(_exported(module, inputs), fold_batch_norm, unknown == "fix")
    tracer.run(inputs)
    return tracer.network(module, inputs, kernel_size, input_value)


def _exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with plain_attention(), torch.no_grad():
            return torch.export.export(module, inputs, strict=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            "module must be feed-forward, without control flow or shapes that depend on data (torch.export reads it), "
            f"got {type(error).__name__}: {reason}"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode


def _without_repetitions(graph: torch.fx.Graph) -> None:
    """Equal operations on equal arguments become one, results that nothing reads go."""
    graph.eliminate_dead_code()
    known: dict[str, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _name(node).endswith("_"):
            continue
        key = repr((node.target, node.args, node.kwargs))
        if key in known:
            node.replace_all_uses_with(known[key])
            graph.erase_node(node)
        else:
            known[key] = node


def _name(node: torch.fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else getattr(node.target, "__name__", str(node.target))


class _Tracer:
    """One run over a program."""

    def __init__(self, program: torch.export.ExportedProgram, fold: bool, fixes_unknown: bool):
        self.program, self.fold, self.fixes_unknown = program, fold, fixes_unknown
        self.wires = Wires()
        self.edges: list[Edges] = []
        self.actions: list[Action] = []
        self.notes: list[tuple[str, str]] = []
        self.joined: list[tuple[np.ndarray, np.ndarray]] = []  # wires that share the nodes of other wires
        self.activations: dict[int, str] = {}
        self.used: dict[str, tuple[np.ndarray | None, str]] = {}
        self.seen: set[str] = set()
        self.node: torch.fx.Node | None = None
        self._one: np.ndarray | None = None

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        graph, signature = self.program.graph, self.program.graph_signature
        _without_repetitions(graph)
        values: dict[torch.fx.Node, Any] = {}
        examples = iter(inputs)
        for node in graph.nodes:
            self.node = node
            if node.op == "placeholder":
                values[node] = self._placeholder(node, signature, examples)
            elif node.op == "output":
                for value in tree_leaves(tree_map(lambda arg: values.get(arg, arg), node.args)):
                    if isinstance(value, Value):
                        for factor in value.factors:
                            self.wires.fix(_numbers(factor))
            else:
                values[node] = self._call(node, values)

    def _placeholder(self, node: torch.fx.Node, signature, examples):
        for kind in ("parameters", "buffers"):
            name = getattr(signature, f"inputs_to_{kind}").get(node.name)
            if name is not None:
                return Part(name, tuple(node.meta["val"].shape), is_buffer=kind == "buffers")
        if node.name in signature.inputs_to_lifted_tensor_constants:
            return self.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
        example = next(examples)
        if not example.is_floating_point():
            return example
        dims = _neuron_dims(node, example.ndim)
        shape = tuple(size if dim in dims else 1 for dim, size in enumerate(example.shape))
        wires = self.wires.new(prod(shape), "", fixed=True)
        return Value(tuple(example.shape), [torch.from_numpy(wires).reshape(shape)])

    def _call(self, node: torch.fx.Node, values: dict):
        args, kwargs = tree_map(lambda arg: values.get(arg, arg), (node.args, node.kwargs))
        operands = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Value | Part)]
        self.seen.update(arg.name for arg in operands if isinstance(arg, Part))
        name = _name(node)
        in_place = name.endswith("_") and not name.startswith("_")
        name = name.rstrip("_") if in_place else name
        if node.target is operator.getitem:
            return args[0] if isinstance(args[0], Value) else args[0][args[1]]
        if all(isinstance(arg, Part) and arg.is_buffer for arg in operands):
            tensors = dict(self.program.named_buffers())
            real = tree_map(lambda arg: arg.read(tensors) if isinstance(arg, Part) else arg, (args, kwargs))
            return node.target(*real[0], **real[1])
        if name in _MOVING:
            result = self._moved(node, args, kwargs)
        elif hasattr(self, f"op_{name}"):
            result = getattr(self, f"op_{name}")(**self._bound(node, args, kwargs))
        elif name in _ELEMENTWISE:
            result = self._elementwise(name, args[0])
        elif name in _POOLS:
            result = self._pooled(args[0], _POOLS[name], 1 if name.endswith("1d") else 2)
        elif name in _REDUCTIONS:
            result = self._reduced(_REDUCTIONS[name], **self._bound(node, args, kwargs))
        elif self.fixes_unknown:
            result = self._unknown(operands)
        else:
            raise self.unsupported("is not supported")
        if isinstance(result, Value):
            result = self._settled(result)
            if len(node.users) > 1:
                result = replace(result, edges=())
        if in_place:
            values[node.args[0]] = result
        return result

    def _bound(self, node, args, kwargs) -> dict[str, Any]:
        """Arguments by the names of the operator's schema; "value" is its first one, a number to fill with "fill"."""
        schema = node.target._schema.arguments
        given = dict(zip((arg.name for arg in schema), args, strict=False)) | dict(kwargs)
        bound = {arg.name: given.get(arg.name, arg.default_value) for arg in schema}
        if "self" in bound or "input" in bound:
            renamed = {"self": "value", "input": "value", "value": "fill"}
            bound = {renamed.get(name, name): value for name, value in bound.items()}
        return bound

    @property
    def place(self) -> str:
        """Path of the module that the running operation is in."""
        stack = list((self.node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        return stack[-1][0] or "forward"

    @property
    def _what(self) -> str:
        return f"{self.place} [{_name(self.node)}]"

    @property
    def shape(self) -> tuple[int, ...]:
        value = self.node.meta["val"]
        return tuple((value if isinstance(value, Tensor) else value[0]).shape)

    def unsupported(self, problem: str) -> ValueError:
        return ValueError(f"{_name(self.node)} in {self.place} {problem}; supported are {supported_operations()}")

    def note(self, what: str) -> None:
        self.notes.append((self.place, what))

    # -- wires and edges ---------------------------------------------------------------------------------------------

    def act(self, part: Part, rows, factors, columns=None) -> None:
        """Note how a part [rows, columns, rest] moves; a part is read once."""
        elements = part.elements().reshape(-1).numpy() if part.index is not None or part.name in self.used else None
        if part.name in self.used:
            before, place = self.used[part.name]
            if before is None or np.intersect1d(before, elements).size:
                raise self.unsupported(f"reads {part.name} a second time, after {place}: weights must be used once")
            elements = np.union1d(before, elements)
        self.used[part.name] = (elements, self.place)
        self.actions.append(Action(part, rows, factors, columns))

    def connect(self, kind: str, source, target, **values) -> Edges:
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
        place, wire = _pairs(places, rows)
        self.wires.tell_apart(wire, 0)
        new = self.wires.new(len(rows), self._what)
        self.wires.tie(new[place], wire, 1)
        self.connect("identity", wire, new[place])
        return torch.from_numpy(new).reshape([factor.shape[dim] if dim in keep else 1 for dim in range(factor.ndim)])

    def contracted(self, factor: Tensor, dims: Sequence[int], *, fix: bool) -> Tensor:
        """A fixed neuron for all wires along ``dims``, of which it is a function; they may not scale (nor move)."""
        self.wires.restrict(_numbers(factor), 0)
        if fix:
            self.wires.fix(_numbers(factor))
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
            wire, hub = _pairs(*torch.broadcast_tensors(factor, hubs))
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
                self.connect("structure", np.repeat(_numbers(hub), len(columns)), columns)
        self.wires.tell_apart(*np.unique(columns, return_counts=True))
        return columns, carried

    def layer(self, value: Value, dim: int, weight: Part, bias: Part | None, *, groups: int = 1, kernel=None) -> Value:
        """New wires along a dimension for a weight [out, in / groups, *kernel]."""
        dim %= len(value.shape)
        columns, carried = self.read(value, dim)
        outputs, inputs = weight.shape[:2]
        new = self.wires.new(outputs, weight.name.removesuffix(".weight"))
        for factor in carried:
            self.wires.tell_apart(_numbers(factor), 0)
            if bias is not None:
                self.wires.restrict(_numbers(factor), 0)
        flat = weight.view(lambda t: t.reshape(outputs, inputs, -1)) if weight.index is not None else weight
        flat = replace(flat, shape=(outputs, inputs, prod(weight.shape[2:])))
        if groups > 1 and inputs == 1:
            source = columns.repeat(outputs // groups)
            self.wires.tie(new, source, 0)
            self.act(flat, new, ((new, 1), (source, -1)))
        else:
            self._act_by_groups(flat, new, columns, groups)
        edges = self._weighted(flat, new, columns.reshape(groups, -1), kernel)
        if bias is not None:
            self.act(replace(bias, shape=(outputs, 1, 1), index=_reshaped(bias, (outputs, 1, 1))), new, ((new, 1),))
            edges.bias = partial(_elements, bias)
        core = torch.from_numpy(new).reshape([-1 if k == dim else 1 for k in range(len(value.shape))])
        return Value(self.shape, [core, *carried], () if carried else (edges,))

    def _act_by_groups(self, weight: Part, new: np.ndarray, columns: np.ndarray, groups: int) -> None:
        if groups == 1:
            self.act(weight, new, ((new, 1),), columns)
            return
        elements = weight.elements()
        for group, (rows, inside) in enumerate(
            zip(np.split(np.arange(len(new)), groups), np.split(columns, groups), strict=True)
        ):
            self.wires.tell_apart(new[rows], group)
            self.wires.tell_apart(inside, group)
            part = replace(weight, shape=(len(rows), *weight.shape[1:]), index=elements[rows])
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
            features = partial(_elements, weight, shape=(-1, taps))
        else:
            slots = [torch.from_numpy(place * most + rank) for place, rank in slot]
            features = partial(_gathered_columns, weight, slots, [len(senders) * most for senders in source], most)
        shape = (kernel or (1, 1)) if most == 1 else None
        return self.connect(kind, ends, starts, features=features, numbers=most * taps, kernel=shape, receivers=new)

    # -- parameters that are added, multiplied, or stand by themselves -----------------------------------------------

    def labels_of(self, value: Value, part: Part) -> tuple[Value, Tensor | None]:
        """(value, the wire of each element of a parameter that is broadcast against it, None if it meets none)."""
        offset = len(value.shape) - len(part.shape)
        if offset < 0:
            raise self.unsupported(f"broadcasts a value to the shape of {part.name}")
        dims = {offset + dim for dim, size in enumerate(part.shape) if size > 1}
        met = [k for k, factor in enumerate(value.factors) if value.varying(factor) & dims or factor.numel() == 1]
        factors = list(value.factors)
        for k in met[1:]:
            factors[k] = self.contracted(factors[k], range(factors[k].ndim), fix=True)
        if not met:
            return value, None
        k = met[0]
        factors[k] = self.collapsed(factors[k], value.varying(factors[k]) & dims)
        unchanged = all(a is b for a, b in zip(factors, value.factors, strict=True))
        settled = self._settled(Value(value.shape, factors, value.edges if unchanged else ()))
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
                self.wires.restrict(_numbers(factor), 0)
            self.note(f"{part.name} is added to all neurons alike and is not in the graph")
            return replace(value, edges=())
        rows, wires = self._rows_of(part, labels)
        self.act(rows, wires, ((wires, 1),))
        core = next(f for f in value.factors if np.isin(wires[0], f.numpy()))
        targets = np.unique(core.numpy())
        self.wires.tell_apart(*np.unique(wires, return_counts=True))
        if len(value.edges) == 1 and np.array_equal(value.edges[0].receivers, wires):
            edges = value.edges[0]
            edges.bias = partial(_sum, edges.bias, partial(_elements, part))
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
                Edges("linear", new[:0], new[:0], receivers=receivers, bias=partial(_ordered, part, order, (-1,)))
            )
            return
        one = np.repeat(self.one(), len(new))
        features = partial(_ordered, part, order, (len(new), -1))
        self.connect("linear", one, new, features=features, numbers=int(counts.max()), kernel=None)

    def scaled(self, value: Value, part: Part | None, bias: Part | None) -> Value:
        """value * parameter + parameter, as one neuron per neuron."""
        if part is None and bias is None:
            return replace(value, edges=())
        value, labels = self.labels_of(value, bias if part is None else part)
        if labels is None:
            for factor in value.factors:
                self.wires.restrict(_numbers(factor), 0 if bias is not None else BOTH)
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
            edges.features = partial(_ordered, part, order, (len(sources), -1))
        result = Value(self.shape, [], ())
        mapped = torch.from_numpy(new[np.searchsorted(sources, core.numpy())])
        result.factors = [mapped if f is core else f for f in value.factors]
        if bias is None:
            return replace(result, edges=(edges,))
        self.act(self._rows_of(bias, labels)[0], new[place], ((new[place], 1),))
        if count == 1:
            edges.bias = partial(_ordered, bias, order, (-1,))
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
            "linear", one, wires, features=partial(_ordered, first, order, (len(wires), -1)), numbers=numbers,
            kernel=(1, 1) if numbers == 1 else None,
        )  # fmt: skip
        return Value(part.shape, [core], (edges,))

    # -- operations --------------------------------------------------------------------------------------------------

    def _moved(self, node, args, kwargs):
        operand = args[0]
        others = [arg for arg in tree_leaves((args[1:], kwargs)) if isinstance(arg, Value | Part)]
        shapes = [torch.empty(arg.shape, device="meta") for arg in others]
        rest = iter(shapes)
        args = (args[0], *tree_map(lambda arg: next(rest) if isinstance(arg, Value | Part) else arg, args[1:]))
        if isinstance(operand, Part):
            index = node.target(operand.elements(), *args[1:], **kwargs)
            if isinstance(index, Tensor):
                return replace(operand, shape=tuple(index.shape), index=index)
            return [replace(operand, shape=tuple(piece.shape), index=piece) for piece in index]
        columns = [node.target(f.expand(operand.shape).contiguous(), *args[1:], **kwargs) for f in operand.factors]
        if not columns or isinstance(columns[0], Tensor):
            return Value(self.shape, [_compressed(f) for f in columns], operand.edges)
        shapes = [tuple(piece.shape) for piece in node.meta["val"]]
        return [Value(shape, [_compressed(f) for f in found]) for shape, *found in zip(shapes, *columns, strict=True)]

    def _elementwise(self, name: str, value: Value) -> Value:
        if not isinstance(value, Value):
            raise self.unsupported(
                f"computes with the parameter {value.name}: weights must be parameters or views of them"
            )
        kinds = _ELEMENTWISE[name]
        for factor in value.factors:
            wires = _numbers(factor)
            self.wires.restrict(wires, kinds)
            if kinds != BOTH:
                self.wires.tell_apart(wires, 0)
            if name in ACTIVATION_NAMES:
                self.activations.update(dict.fromkeys(wires.tolist(), name))
        return Value(self.shape, value.factors, value.edges if kinds == BOTH and name != "neg" else ())

    def _unknown(self, operands: list[Value | Part]):
        """One fixed neuron for the result of an operation, which reads fixed ones."""
        hub = self.wires.new(1, self._what, fixed=True)
        read = [_numbers(factor) for value in operands if isinstance(value, Value) for factor in value.factors]
        read = np.unique(np.concatenate([*read, np.zeros(0, dtype=np.int64)]))
        self.wires.fix(read)
        self.connect("structure", read, np.repeat(hub, len(read)))
        weights = ", ".join(sorted({part.name for part in operands if isinstance(part, Part)}))
        self.note(
            f"{_name(self.node)} is not understood: what it reads is fixed{weights and f', and not in it: {weights}'}"
        )
        results = self.node.meta["val"]
        shapes = [tuple(value.shape) for value in ([results] if isinstance(results, Tensor) else results)]
        found = [Value(shape, [torch.from_numpy(hub).reshape([1] * len(shape))]) for shape in shapes]
        return found[0] if isinstance(results, Tensor) else found

    def op_hardtanh(self, value, min_val, max_val):
        self._restrict(value, SIGN if min_val == -max_val else 0)
        return replace(value, edges=())

    def op_prelu(self, value, weight):
        self._restrict(value, SCALE)
        if prod(weight.shape) > 1:
            columns, _ = self.read(value, 1)
            rows, wires = self._rows_of(weight, torch.from_numpy(columns))
            self.act(rows, wires, ())
        self.note(f"{weight.name}, slopes of a PReLU, are not in the graph")
        return replace(value, edges=())

    def _restrict(self, value: Value, kinds: int) -> None:
        for factor in value.factors:
            self.wires.restrict(_numbers(factor), kinds)
            self.wires.tell_apart(_numbers(factor), 0)

    def op_linear(self, value, weight, bias):
        return self.layer(self._plain(value), -1, self._weight(weight), bias)

    def op_addmm(self, value, mat1, mat2, beta, alpha):
        if alpha != 1 or beta != 1:
            raise self.unsupported(f"with alpha={alpha}, beta={beta}")
        return self.layer(self._plain(mat1), -1, self._weight(mat2).view(lambda t: t.t()), value)

    def op_conv1d(self, value, weight, bias, stride, padding, dilation, groups):
        return self._convolution(value, weight, bias, groups, (1, weight.shape[2]), 1)

    def op_conv2d(self, value, weight, bias, stride, padding, dilation, groups):
        return self._convolution(value, weight, bias, groups, tuple(weight.shape[2:]), 2)

    def _convolution(self, value, weight, bias, groups, kernel, axes: int) -> Value:
        value = self._even(self._plain(value), axes)
        return self.layer(value, -axes - 1, self._weight(weight), bias, groups=groups, kernel=kernel)

    def _plain(self, value) -> Value:
        if not isinstance(value, Value):
            raise self.unsupported("does not read the input or what is computed from it")
        return value

    def _weight(self, weight) -> Part:
        if not isinstance(weight, Part) or weight.is_buffer:
            raise self.unsupported("has a weight that is no parameter or view of one")
        return weight

    def _even(self, value: Value, axes: int) -> Value:
        """The value with wires that do not differ along its last ``axes`` dimensions."""
        last = set(range(len(value.shape) - axes, len(value.shape)))
        factors = []
        for factor in value.factors:
            along = value.varying(factor)
            if along & last:
                rest = along - last
                factor = self.collapsed(factor, rest) if rest else self.contracted(factor, along, fix=True)
            factors.append(factor)
        same = all(a is b for a, b in zip(factors, value.factors, strict=True))
        return self._settled(Value(value.shape, factors, value.edges if same else ()))

    def _pooled(self, value: Value, kinds: int, axes: int) -> Value:
        value = self._even(value, axes)
        self._restrict(value, kinds)
        result = Value(self.shape, value.factors, value.edges if kinds == BOTH else ())
        return result

    def _reduced(self, kinds: int, value: Value, dim=None, keepdim=False, **_) -> Value:
        ndim = len(value.shape)
        dims = range(ndim) if dim in (None, []) else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
        factors, same = [], True
        for factor in value.factors:
            if value.varying(factor) & set(dims):
                factor, same = self.contracted(factor, dims, fix=False), False
            else:
                self.wires.restrict(_numbers(factor), kinds)
            keep = factor.shape if keepdim else [s for d, s in enumerate(factor.shape) if d not in dims]
            factors.append(factor.reshape(keep))
        return self._settled(Value(self.shape, factors, value.edges if same and kinds == BOTH else ()))

    def op_softmax(self, value, dim, dtype=None, half_to_float=None):
        self._normalised(value, [dim])
        return Value(self.shape, value.factors)

    op__softmax = op_softmax

    def _normalised(self, value: Value, dims: Sequence[int], groups: Tensor | None = None) -> None:
        """Statistics over dimensions are taken: no scaling stays, and wires stay within the sets that are joined."""
        dims = {dim % len(value.shape) for dim in dims}
        for factor in value.factors:
            self.wires.restrict(_numbers(factor), 0)
            rest = [1 if dim in dims else size for dim, size in enumerate(factor.shape)]
            marks = torch.arange(prod(rest)).reshape(rest) if groups is None else groups
            self.wires.tell_apart(*_pairs(factor, marks.expand(factor.shape)))

    def op_layer_norm(self, value, normalized_shape, weight, bias, **_):
        self._normalised(value, range(-len(normalized_shape), 0))
        return self.scaled(value, weight, bias)

    def op_rms_norm(self, value, normalized_shape, weight, **_):
        self._normalised(value, range(-len(normalized_shape), 0))
        return self.scaled(value, weight, None)

    def op_group_norm(self, value, num_groups, weight, bias, **_):
        columns, carried = self.read(value, 1)
        core = torch.from_numpy(columns).reshape(1, -1, *[1] * (len(value.shape) - 2))
        value = Value(value.shape, [core, *carried])
        groups = torch.arange(num_groups).repeat_interleave(value.shape[1] // num_groups).reshape(core.shape)
        self._normalised(value, [1], groups)
        axes = (1,) * (len(value.shape) - 2)
        return self.scaled(value, *(_unsqueezed(part, axes) for part in (weight, bias)))

    def op_batch_norm(self, value, weight, bias, running_mean, running_var, training, eps, **_):
        if running_mean is None or training:
            raise self.unsupported("has no running statistics: its output depends on the batch")
        columns, carried = self.read(value, 1)
        new = self.wires.new(len(columns), running_mean.name.removesuffix(".running_mean"))
        self.wires.tie(new, columns, 0)
        for factor in carried:
            self.wires.restrict(_numbers(factor), 0)
        if weight is None:
            self.wires.restrict(np.append(new, columns), 0)
        rows = [None if part is None else self._rows_of(part, torch.from_numpy(new))[0] for part in (weight, bias)]
        if weight is not None:
            self.act(rows[0], new, ((new, 1), (columns, -1)))
        if bias is not None:
            self.act(rows[1], new, ((new, 1),))
        else:
            self.wires.restrict(new, BOTH)
        for part, factors in ((running_mean, ((columns, 1),)), (running_var, ())):
            self.act(self._rows_of(part, torch.from_numpy(new))[0], columns, factors)
        norm = partial(_batch_norm, weight, bias, running_mean, running_var, eps)
        core = torch.from_numpy(new).reshape(1, -1, *[1] * (len(value.shape) - 2))
        before = value.edges[0] if len(value.edges) == 1 else None
        if self.fold and before is not None and np.array_equal(before.receivers, columns):
            target = torch.from_numpy(np.unique(before.target, return_inverse=True)[1].reshape(-1))
            before.features = partial(_folded, before.features, norm, target)
            before.bias = partial(_folded_bias, before.bias, norm)
            self.joined.append((new, columns))
            before.receivers = new
            return Value(self.shape, [core], value.edges)
        edges = self.connect(
            "scale", columns, new, features=partial(_norm_gain, norm), receivers=new, bias=partial(_norm_shift, norm)
        )
        return Value(self.shape, [core, *carried], () if carried else (edges,))

    def op_embedding(self, weight, indices, **_):
        weight = self._weight(weight)
        if isinstance(indices, Value | Part):
            raise self.unsupported("reads numbers that are computed")
        symbols = self.wires.new(weight.shape[0], self._what, fixed=True)
        core = torch.from_numpy(symbols).reshape(*[1] * indices.ndim, -1)
        value = Value((*indices.shape, weight.shape[0]), [core])
        return self.layer(value, -1, weight.view(lambda t: t.t()), None)

    def op_matmul(self, value, other):
        if isinstance(other, Part) and isinstance(value, Value) and len(other.shape) == 2:
            return self.layer(value, -1, self._weight(other).view(lambda t: t.t()), None)
        if not isinstance(value, Value) or not isinstance(other, Value):
            raise self.unsupported("multiplies with something else than a matrix or another value")
        return self._product(value, other, self.shape)

    def _product(self, a: Value, b: Value, shape: tuple[int, ...]) -> Value:
        """a @ b. Neurons that are summed over move together, and the second ones scale against the first."""
        ndim = max(len(a.shape), len(b.shape))
        left, right = ([_padded(f, ndim) for f in v.factors] for v in (a, b))
        summed = [f for f in left if f.shape[-1] > 1], [f for f in right if f.shape[-2] > 1]
        factors = [f for f in left if f.shape[-1] == 1] + [f for f in right if f.shape[-2] == 1]
        pair = [f for side in summed for f in side]
        if len(summed[0]) == len(summed[1]) == 1 and self._opposed(*pair):
            factors.append(self.hubs([pair[0].transpose(-1, -2), pair[1]], [ndim - 2, ndim - 1]))
        else:
            factors += [self.contracted(f, range(ndim), fix=True) for f in pair]
        return self._settled(Value(shape, [_padded(f, len(shape)) for f in factors]))

    def _opposed(self, f: Tensor, g: Tensor) -> bool:
        """Tie the wires along f's last and g's last but one dimension, if they are in pairs."""
        if f.shape[-2] > 1 or g.shape[-1] > 1:
            return False
        first, second = _pairs(*torch.broadcast_tensors(f.transpose(-1, -2), g))
        if len(np.unique(first)) < len(first) or len(np.unique(second)) < len(second):
            return False
        for side, mark in ((first, 0), (second, 1)):
            self.wires.tell_apart(side, mark)
        self.wires.tie(first, second, -1)
        return True

    def op_bmm(self, value, mat2):
        return self.op_matmul(value, mat2)

    def op_mm(self, value, mat2):
        return self.op_matmul(value, mat2)

    def op_scaled_dot_product_attention(self, query, key, value, attn_mask, enable_gqa=False, **_):
        if enable_gqa or isinstance(attn_mask, Value | Part):
            raise self.unsupported("has a mask that is computed or learnt, or heads that share keys")
        turned = (*key.shape[:-2], key.shape[-1], key.shape[-2])
        keys = Value(turned, [f.transpose(-1, -2) for f in key.factors])
        scores = self._product(query, keys, (*query.shape[:-1], key.shape[-2]))
        self._normalised(scores, [-1])
        return self._product(scores, value, self.shape)

    def op_add(self, value, other, alpha=1):
        return self._sum(value, other, alpha)

    def op_sub(self, value, other, alpha=1):
        return self._sum(value, other, -alpha)

    def op_rsub(self, value, other, alpha=1):
        return self._sum(value, other, 1)

    def _sum(self, value, other, alpha) -> Value:
        if isinstance(value, Value) and isinstance(other, Value):
            return self._joined(value, other, adds=True)
        value, other = (value, other) if isinstance(value, Value) else (other, value)
        if isinstance(other, Part) and not other.is_buffer:
            if alpha != 1:
                raise self.unsupported(f"subtracts or scales the parameter {other.name}")
            return self.added(self._plain(value), other)
        return self._with_constant(self._plain(value), other, adds=True)

    def op_mul(self, value, other):
        if isinstance(value, Value) and isinstance(other, Value):
            return self._joined(value, other, adds=False)
        value, other = (value, other) if isinstance(value, Value) else (other, value)
        if isinstance(other, Part) and not other.is_buffer:
            return self.scaled(self._plain(value), other, None)
        return self._with_constant(self._plain(value), other, adds=False)

    def op_div(self, value, other, rounding_mode=None):
        if isinstance(value, Value) and isinstance(other, Value):
            return self._joined(value, other, adds=False)
        if not isinstance(value, Value) or isinstance(other, Part):
            raise self.unsupported("divides by, or divides, a parameter or constant")
        return self._with_constant(value, other, adds=False)

    def op_masked_fill(self, value, mask, **_):
        return self._with_constant(value, mask, adds=True)

    def op_constant_pad_nd(self, value, pad, fill=None, **_):
        padded = {len(value.shape) - 1 - k // 2 for k, size in enumerate(pad) if size}
        if any(value.varying(factor) & padded for factor in value.factors):
            raise self.unsupported("pads along neurons")
        if fill not in (0, None):
            self._restrict(value, 0)
        return Value(self.shape, value.factors, ())

    def op_pad(self, value, pad, mode, fill=None):
        return self.op_constant_pad_nd(value, pad, fill if mode == "constant" else None)

    def _with_constant(self, value: Value, other, *, adds: bool) -> Value:
        """A number or a constant tensor is added or multiplied: neurons that it differs between stay where they are."""
        if isinstance(other, Part):
            other = other.read(dict(self.program.named_buffers()))
        changes = bool(torch.as_tensor(other).ne(0 if adds else 1).any())
        if isinstance(other, Tensor):
            constant = _compressed(_padded(other, len(self.shape)))
            for factor in value.factors:
                if any(size > 1 for size, own in zip(constant.shape, factor.shape, strict=True) if own > 1):
                    self.wires.fix(_numbers(factor))
        if adds and changes:
            self._restrict(value, 0)
        return Value(self.shape, value.factors, () if changes else value.edges)

    def op_cat(self, tensors, dim=0):
        dim %= len(self.shape)
        values = [t for t in tensors if isinstance(t, Value)]
        if not values:
            raise self.unsupported("joins parameters")
        along = set().union(*(v.varying(f) for v in values for f in v.factors[:1])) - {dim}
        pieces = []
        for operand in tensors:
            if isinstance(operand, Part):
                operand = self.parameter(operand, along)
            if isinstance(operand, Tensor):
                operand = Value(tuple(operand.shape), [torch.from_numpy(self.one()).reshape([1] * operand.ndim)])
            while len(operand.factors) > 1:
                dropped = self.contracted(operand.factors[-1], range(len(operand.shape)), fix=True)
                operand = self._settled(replace(operand, factors=[*operand.factors[:-1], dropped], edges=()))
            pieces.append(operand)
        cores = [piece.factors[0] for piece in pieces]
        sizes = torch.broadcast_shapes(*([1 if d == dim else s for d, s in enumerate(c.shape)] for c in cores))
        full = [
            core.expand([piece.shape[d] if d == dim else s for d, s in enumerate(sizes)])
            for core, piece in zip(cores, pieces, strict=True)
        ]
        core = _compressed(torch.cat(full, dim))
        if all(c.shape[dim] == 1 for c in cores) and any(c.numel() > 1 for c in cores):
            core = self.collapsed(core, {d for d, size in enumerate(sizes) if size > 1})
        return Value(self.shape, [core])

    def op_stack(self, tensors, dim=0):
        dim %= len(self.shape)
        if not all(isinstance(t, Value) for t in tensors):
            raise self.unsupported("joins parameters or constants")
        return self.op_cat(
            [Value((*t.shape[:dim], 1, *t.shape[dim:]), [f.unsqueeze(dim) for f in t.factors]) for t in tensors], dim
        )

    # -- values that meet values -------------------------------------------------------------------------------------

    def _joined(self, a: Value, b: Value, *, adds: bool) -> Value:
        """a + b, or another function of both entry by entry."""
        shape, ndim = self.shape, len(self.shape)
        left, right = ([_padded(f, ndim) for f in v.factors] for v in (a, b))
        merged, edges = [], ()
        for f in list(left):
            other = next((g for g in right if _meet(f, g)), None)
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
                    self.wires.restrict(_numbers(f), 0)
        return self._settled(Value(shape, merged + rest, edges))

    def _paired(self, f: Tensor, g: Tensor, a: Value, b: Value, adds: bool) -> tuple[Tensor, tuple[Edges, ...]]:
        """Labels of the result of two values whose entries belong to the wires of f and of g."""
        f, g = torch.broadcast_tensors(f, g)
        wires = self.wires
        if torch.equal(f, g):
            if not adds:
                wires.restrict(_numbers(f), 0)
            return _compressed(f), ()
        first, second = _pairs(f, g)
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
        labels = _compressed(f if main is first else g)
        kind = "identity" if alone == [True, True] else "structure"
        if adds and alone == [True, True]:
            for own, ours, theirs, guests, core in ((owner, main, other, guest, labels),
                                                    (guest, other, main, owner, _compressed(g))):  # fmt: skip
                if own.edges and not self._senders(own.edges) & self._senders(guests.edges or (), theirs):
                    if guests.edges:
                        self.joined.append((theirs, ours))
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

    def _settled(self, value: Value) -> Value:
        """Fixed neurons beside others become neurons that the others depend on, so that one factor is left."""
        factors = list(value.factors)
        while len(factors) > 1:
            fixed = next((f for f in factors if self.wires.fixed[_numbers(f)].all()), None)
            if fixed is None:
                break
            factors = [f for f in factors if f is not fixed]
            main = factors[0]
            wire, hub = _pairs(*torch.broadcast_tensors(main, fixed))
            known = _numbers(main)
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

    # -- the result --------------------------------------------------------------------------------------------------

    def nodes(self) -> np.ndarray:
        """The wire whose node each wire shares."""
        node_of = np.arange(len(self.wires))
        for wires, others in self.joined:
            moved = np.arange(len(self.wires))
            moved[node_of[wires]] = node_of[others]
            node_of = moved[node_of]
        return node_of

    def network(self, module: nn.Module, inputs, kernel_size, input_value: float | None) -> TracedNetwork:
        """What was found."""
        classes, scale_set, power = self.wires.classes()
        signature = self.program.graph_signature
        for name in signature.inputs_to_parameters.values():
            if name not in self.seen:
                self.notes.append((name.rpartition(".")[0], f"{name} is not used"))
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        if input_value is None:
            input_value = 0.0 if any(edges.kind == "convolution" for edges in self.edges) else 1.0
        return TracedNetwork(
            classes=classes, notes=self.notes, edges=self.edges, actions=self.actions, scale_sets=(scale_set, power),
            node_of=self.nodes(), activations=self.activations, inputs=inputs, kernel_size=kernel_size,
            input_value=input_value,
            shapes={name: tuple(tensors[name].shape) for name in sorted({action.part.name for action in self.actions})},
        )  # fmt: skip


def supported_operations() -> str:
    """The operations that `trace` understands, for messages."""
    own = [name[3:] for name in dir(_Tracer) if name.startswith("op_")]
    return ", ".join(sorted({*own, *_ELEMENTWISE, *_POOLS, *_REDUCTIONS, *_MOVING}))


# -- labels ----------------------------------------------------------------------------------------------------------


def _neuron_dims(node: torch.fx.Node, ndim: int) -> set[int]:
    """The dimensions of an input that its neurons lie along, by the first operation that has to know."""
    waiting, reshaped = list(node.users), False
    while waiting:
        user = waiting.pop(0)
        name = _name(user)
        if name in _CHANNELS_FIRST:
            return {1} if ndim > 2 else set(range(1, ndim)) or {0}
        if name in ("linear", "matmul", "mm", "addmm", "layer_norm", "rms_norm"):
            return set(range(1, ndim)) if reshaped else {ndim - 1}
        reshaped |= name in ("view", "reshape", "flatten", "_unsafe_view")
        waiting += user.users
    return {ndim - 1}


def _numbers(labels: Tensor) -> np.ndarray:
    return np.unique(labels.numpy())


def _pairs(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of entries of two tensors of one shape, sorted."""
    base = int(b.max()) + 1
    keys = np.unique((a * base + b).numpy())
    return keys // base, keys % base


def _padded(tensor: Tensor, ndim: int) -> Tensor:
    return tensor.reshape((1,) * (ndim - tensor.ndim) + tuple(tensor.shape))


def _compressed(labels: Tensor) -> Tensor:
    """Size 1 along dimensions where nothing changes."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and (labels.stride(dim) == 0 or torch.equal(labels, labels.narrow(dim, 0, 1).expand_as(labels))):
            labels = labels.narrow(dim, 0, 1)
    return labels.contiguous()


def _meet(f: Tensor, g: Tensor) -> bool:
    """Whether two factors of one value's entries vary along a common dimension, or one of them not at all."""
    return f.numel() == 1 or g.numel() == 1 or any(a > 1 and b > 1 for a, b in zip(f.shape, g.shape, strict=True))


def _unsqueezed(part: Part | None, axes: tuple[int, ...]) -> Part | None:
    return None if part is None else part.view(lambda t: t.reshape(*t.shape, *axes))


def _reshaped(part: Part, shape: tuple[int, ...]) -> Tensor | None:
    return None if part.index is None else part.index.reshape(shape)


# -- features --------------------------------------------------------------------------------------------------------


def _elements(part: Part, tensors, shape=(-1,)) -> Tensor:
    return part.read(tensors).reshape(shape)


def _ordered(part: Part, order: Tensor, shape, tensors) -> Tensor:
    return part.read(tensors).reshape(-1)[order].reshape(shape)


def _sum(first, second, tensors) -> Tensor:
    return second(tensors) if first is None else first(tensors) + second(tensors)


def _gathered_columns(weight: Part, slots: list[Tensor], sizes: list[int], most: int, tensors) -> Tensor:
    """[edges, most * taps]: columns of one wire side by side, 0 where a wire has fewer."""
    blocks = []
    for block, slot, size in zip(weight.read(tensors).chunk(len(slots)), slots, sizes, strict=True):
        wide = block.new_zeros(block.shape[0], size, block.shape[2]).index_copy(1, slot.to(block.device), block)
        blocks.append(wide.reshape(-1, most * block.shape[2]))
    return torch.cat(blocks)


def _batch_norm(weight, bias, mean, var, eps: float, tensors) -> tuple[Tensor, Tensor]:
    """(gain, shift) of a batch norm in evaluation mode."""
    gain = (var.read(tensors) + eps).rsqrt()
    gain = gain if weight is None else gain * weight.read(tensors)
    shift = -mean.read(tensors) * gain
    return gain, shift if bias is None else shift + bias.read(tensors)


def _norm_gain(norm, tensors) -> Tensor:
    return norm(tensors)[0].unsqueeze(1)


def _norm_shift(norm, tensors) -> Tensor:
    return norm(tensors)[1]


def _folded(features, norm, target: Tensor, tensors) -> Tensor:
    return features(tensors) * norm(tensors)[0][target].unsqueeze(1)


def _folded_bias(bias, norm, tensors) -> Tensor:
    gain, shift = norm(tensors)
    return shift if bias is None else bias(tensors) * gain + shift
