"""Our model over the parameters of a live one: same tensors, same modes, nothing registered twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_hooks_of = attrgetter(*_HOOKS)


class UnsupportedError(Exception):
    """Why a live module, or a batch, cannot run on our ops."""


class Option(NamedTuple):
    """An option that must be equal on both sides: what it is called, and how each side says it."""

    name: str
    ours: Callable[[nn.Module], object]
    theirs: Callable[[nn.Module], object]


class Correspondence(NamedTuple):
    """How the modules of an original stand to ours; classes are known by name.

    Attributes:
        classes: name of each of our classes -> names that the class at the same path may have.
        passive: names of classes that have no parameters and no counterpart, because ours computes them in place.
        options: per name of our class, what must be equal on both sides.
        live: per name of our class, an attribute of ours and how the other side says it; it is read at every call.
    """

    classes: Mapping[str, Collection[str]]
    passive: Collection[str]
    options: Mapping[str, Collection[Option]]
    live: Mapping[str, tuple[str, Callable[[nn.Module], float]]]


def class_name(module: nn.Module) -> str:
    """The name of a module's class as it was written: before scripting, and before parametrisations."""
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name
    cls = type(module)
    return cls.__mro__[1].__name__ if hasattr(module, "parametrizations") else cls.__name__


class _Pair(NamedTuple):
    """A module of ours, the one at the same path, and the names of its parameters and buffers."""

    path: str
    ours: nn.Module
    theirs: nn.Module
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    live: tuple[str, Callable[[nn.Module], float]] | None


class Twin:
    """A model of ours that computes what a live original does, from the original's own parameters.

    `follow` hands the tensors that the original holds at this moment to ours (whatever moved, loaded or replaced them,
    and those that parametrisations compute), and its training modes; nothing is copied.

    Args:
        original: the live model.
        ours: our model, whose own parameters are given up.
        same: how the two trees of modules correspond.

    Raises:
        UnsupportedError: a module that is missing, unknown, of another class or shape, or has another option.
    """

    def __init__(self, original: nn.Module, ours: nn.Module, same: Correspondence):
        self.original, self.ours = original, ours
        self._wanting: dict[tuple[str, ...], list[tuple[dict, str]]] = {}
        theirs = dict(original.named_modules(remove_duplicate=False))
        mine = dict(ours.named_modules(remove_duplicate=False))
        self._pairs = [_pair(path, module, theirs.get(path), same) for path, module in mine.items()]
        self._inner = [(path, module) for path, module in theirs.items() if path]
        self._children = [(module, list(module._modules.values())) for module in theirs.values() if module._modules]
        for path, module in theirs.items():
            if path not in mine and not _in_parametrisation(path):
                _check_extra(path, module, same)

    def problem(self) -> str | None:
        """Why the original has to run itself for now: a hook or another forward on one of its inner modules."""
        for path, module in self._inner:
            if "forward" in module.__dict__ and not isinstance(module, torch.jit.ScriptModule):
                return f"{path} has a forward of its own instance"
            if any(_hooks_of(module)):
                hooks = next(name for name in _HOOKS if getattr(module, name))
                return f"{path} has hooks ({hooks.strip('_').replace('_', ' ')})"
        return None

    def is_current(self) -> bool:
        """Whether the original still consists of the modules that it had."""
        return all(list(module._modules.values()) == children for module, children in self._children)

    def follow(self) -> nn.Module:
        """Our model, with the original's present tensors and modes."""
        for pair in self._pairs:
            ours, theirs = pair.ours.__dict__, pair.theirs
            ours["training"] = theirs.training
            if pair.parameters:
                _hand_over(theirs, "_parameters", pair.parameters, ours["_parameters"])
            if pair.buffers:
                _hand_over(theirs, "_buffers", pair.buffers, ours["_buffers"])
            if pair.live is not None:
                name, read = pair.live
                ours[name] = float(read(theirs))
        return self.ours

    def wanting(self, except_for: tuple[str, ...]) -> list[Tensor]:
        """The present parameters that want gradients, but for those of the modules at these paths; each once."""
        if except_for not in self._wanting:
            prefixes = tuple(f"{path}." for path in except_for)
            kept = (pair for pair in self._pairs if not f"{pair.path}.".startswith(prefixes))
            self._wanting[except_for] = [(pair.ours._parameters, name) for pair in kept for name in pair.parameters]
        values = (parameters[name] for parameters, name in self._wanting[except_for])
        return list({id(value): value for value in values if value.requires_grad}.values())


def _hand_over(theirs: nn.Module, kind: str, names: tuple[str, ...], ours: dict[str, Tensor]) -> None:
    """Put the present tensors of these names into ``ours``; those of parametrisations and scripts are computed."""
    held = theirs.__dict__.get(kind, ())
    for name in names:
        ours[name] = held[name] if name in held else getattr(theirs, name)


def _pair(path: str, ours: nn.Module, theirs: nn.Module | None, same: Correspondence) -> _Pair:
    kind = type(ours).__name__
    if theirs is None:
        raise UnsupportedError(f"{path or 'the model'} is missing")
    names, found = same.classes.get(kind, (kind,)), class_name(theirs)
    if path and found not in names:
        raise UnsupportedError(f"{path} is a {found}, expected {' or '.join(names)}")
    for option in same.options.get(kind, ()):
        mine, other = option.ours(ours), option.theirs(theirs)
        if mine != other:
            raise UnsupportedError(f"{path}.{option.name} is {other!r}, and {mine!r} elsewhere in the model")
    parameters = tuple(name for name, value in ours._parameters.items() if value is not None)
    buffers = tuple(name for name, value in ours._buffers.items() if value is not None)
    for name in (*parameters, *buffers):
        mine, other = getattr(ours, name), getattr(theirs, name, None)
        if not isinstance(other, Tensor) or other.shape != mine.shape:
            shape = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise UnsupportedError(f"{path}.{name} must have shape {list(mine.shape)}, got {shape}".lstrip("."))
    for name, _ in _own_tensors(theirs):
        if name not in parameters and name not in buffers:
            raise UnsupportedError(f"{path}.{name} is unknown".lstrip("."))
    return _Pair(path, ours, theirs, parameters, buffers, same.live.get(kind))


def _check_extra(path: str, module: nn.Module, same: Correspondence) -> None:
    if class_name(module) not in same.passive or any(True for _ in _own_tensors(module)):
        raise UnsupportedError(f"{path} is a {class_name(module)}, which is unknown there")


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers of the state dict, of the module alone."""
    yield from module.named_parameters(recurse=False)
    for name, value in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, value


def _in_parametrisation(path: str) -> bool:
    return "parametrizations" in path.split(".")


class _Reached(torch.autograd.Function):
    """Outputs as they are; the parameters given with them get gradients of zero on top of their own.

    The original runs every module on every row and multiplies by 0 and 1, so that its parameters have gradients of zero
    where ours, which does not run them, would have none: optimisers that decay weights treat the two differently.
    """

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.likes = [(t.shape, t.dtype, t.device) for t in inputs[1 + inputs[0] :]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.likes)
        return None, *grads, *zeros


def reached(outputs, parameters: list[Tensor]):
    """``outputs`` (a tensor, or a pair of lists of tensors) whose backward pass reaches all ``parameters``."""
    if not torch.is_grad_enabled():
        return outputs
    first, second = ([outputs], []) if isinstance(outputs, Tensor) else outputs
    parameters = _not_behind([*first, *second], parameters)
    if not parameters:
        return outputs
    tensors = _Reached.apply(len(first) + len(second), *first, *second, *parameters)
    if isinstance(outputs, Tensor):
        return tensors[0]
    return list(tensors[: len(first)]), list(tensors[len(first) :])


def _not_behind(outputs: Iterable[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Those of ``parameters`` that the recorded backward pass of ``outputs`` does not lead to."""
    waiting = [tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None]
    found, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        following = node.next_functions
        if not following:
            leaves.add(id(getattr(node, "variable", None)))
        for other, _ in following:
            if other is not None and other not in found:
                found.add(other)
                waiting.append(other)
    return [p for p in parameters if id(p) not in leaves and (p.is_leaf or p.grad_fn not in found)]
