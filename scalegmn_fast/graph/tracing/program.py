"""`trace`: any feed-forward module as a graph of neurons, with the symmetries of its weights.

The module is exported (`torch.export`) and its operations are run on labels instead of numbers. A value's labels say
for each of its entries whose number it is: the wire (`wires`) that carries it. What moves entries (views, slices,
permutations, concatenation) runs on the labels as it would on numbers; what computes reads labels, says what it does to
the symmetry of the wires, and makes new wires where it has weights.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .labels import Value, distinct
from .network import Part, TracedNetwork, plain_attention
from .neurons import operation
from .operations import ELEMENTWISE, MOVING, POOLS, REDUCTIONS, Operations

#: How far to look for the operation that decides what the neurons of an input are.
_CHANNELS_FIRST = ("conv1d", "conv2d", "batch_norm", "group_norm", "max_pool1d", "max_pool2d", "avg_pool2d")


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
        fold_batch_norm: batch norms right after a layer become part of its weights. False, and elsewhere: one neuron
            and one edge per channel.
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
            "module must run on inputs and be feed-forward, without control flow or shapes that depend on data "
            f"(torch.export reads it), got {type(error).__name__}: {reason}"
        ) from error
    finally:
        for part, mode in modes:
            part.training = mode


def _without_repetitions(graph: torch.fx.Graph) -> None:
    """Equal operations on equal arguments become one, results that nothing reads go."""
    graph.eliminate_dead_code()
    known: dict[str, torch.fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if operation(node).endswith("_"):
            known.clear()  # the same name may stand for other numbers from here on
            continue
        key = repr((node.target, node.args, node.kwargs))
        if key in known:
            node.replace_all_uses_with(known[key])
            graph.erase_node(node)
        else:
            known[key] = node


class _Tracer(Operations):
    """One run over a program."""

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
                            self.wires.fix(distinct(factor))
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
        name = operation(node)
        in_place = name.endswith("_") and not name.startswith("_")
        name = name.rstrip("_") if in_place else name
        if node.target is operator.getitem:
            if isinstance(args[0], Value) and args[1] != 0:
                raise self.unsupported("reads the indices of a pooling")
            return args[0] if isinstance(args[0], Value) else args[0][args[1]]
        if in_place:
            self._check_views(node, values)
        if all(isinstance(arg, Part) and arg.is_buffer for arg in operands):
            tensors = dict(self.program.named_buffers())
            real = tree_map(lambda arg: arg.read(tensors) if isinstance(arg, Part) else arg, (args, kwargs))
            return node.target(*real[0], **real[1])
        if name in MOVING:
            result = self._moved(node, args, kwargs)
        elif hasattr(self, f"op_{name}"):
            result = getattr(self, f"op_{name}")(**self._bound(node, args, kwargs))
        elif name in ELEMENTWISE and len(operands) == 1:
            result = self._elementwise(name, operands[0])
        elif name in POOLS:
            result = self._pooled(args[0], POOLS[name], 1 if name.endswith("1d") else 2)
        elif name in REDUCTIONS:
            result = self._reduced(REDUCTIONS[name], **self._bound(node, args, kwargs))
        elif self.fixes_unknown:
            result = self._unknown(operands)
        else:
            raise self.unsupported("is not supported")
        if isinstance(result, Value):
            result = self.settled(result)
            if len(node.users) > 1:
                result = replace(result, edges=())
        if in_place:
            values[node.args[0]] = result
        return result

    def _check_views(self, node: torch.fx.Node, values: dict) -> None:
        """What is written in place may not be seen through another name."""
        target = node.args[0]
        base = target.args[0] if target.op == "call_function" and operation(target) in MOVING else None
        views = [user for user in target.users if user in values and operation(user) in MOVING]
        if views or (base is not None and len(base.users) > 1):
            raise self.unsupported("writes into a tensor that is read under another name, too")

    def _bound(self, node, args, kwargs) -> dict[str, Any]:
        """Arguments by the names of the operator's schema; "value" is its first one, a number to fill with "fill"."""
        schema = node.target._schema.arguments
        given = dict(zip((arg.name for arg in schema), args, strict=False)) | dict(kwargs)
        bound = {arg.name: given.get(arg.name, arg.default_value) for arg in schema}
        if "self" in bound or "input" in bound:
            renamed = {"self": "value", "input": "value", "value": "fill"}
            bound = {renamed.get(name, name): value for name, value in bound.items()}
        return bound

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


def _neuron_dims(node: torch.fx.Node, ndim: int) -> set[int]:
    """The dimensions of an input that its neurons lie along, by the first operation that has to know."""
    waiting, reshaped = list(node.users), False
    while waiting:
        user = waiting.pop(0)
        name = operation(user)
        if name in _CHANNELS_FIRST:
            return {1} if ndim > 2 else set(range(1, ndim)) or {0}
        if name in ("linear", "matmul", "mm", "addmm", "layer_norm", "rms_norm"):
            return set(range(1, ndim)) if reshaped else {ndim - 1}
        reshaped |= name in ("view", "reshape", "flatten", "_unsafe_view")
        waiting += user.users
    return {ndim - 1}
