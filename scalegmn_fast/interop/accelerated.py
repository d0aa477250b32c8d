"""`accelerate`: live models of the originals run on our ops, with everything else about them unchanged.

A recognised model gets a subclass of its own class, made for it, whose ``forward`` runs our model over the live model's
own parameters (`twin`). So its type, its parameters, its state dict and its hooks stay what they were, and what copies,
moves, wraps or pickles the model needs not know.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import neural_graphs, scalegmn
from .twin import Twin, UnsupportedError, class_name, reached

FAMILIES = (scalegmn, neural_graphs)
_STATE = "_scalegmn_fast"
_NEGLIGIBLE = 1e-2
_ROUNDING = 8.0
_GRADIENTS = 4.0
_log = logging.getLogger("scalegmn_fast")
_subclasses: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


class AccelerationError(RuntimeError):
    """An accelerated model does not compute what the original does; the original's forward is back in place."""


@dataclass(frozen=True)
class Part:
    """One part of a model in a `Report`.

    Attributes:
        path: where it is in the model; empty for the model itself.
        kind: the name of its class.
        fused: whether its next call runs on our ops.
        reason: why not, or what differs from the original nevertheless.
        checked: what the comparison with the original found, if one was made.
    """

    path: str
    kind: str
    fused: bool
    reason: str = ""
    checked: str = ""


@dataclass(frozen=True)
class Report:
    """Which parts of a model run on our ops, which do not, and why. ``str`` gives a line for each."""

    parts: tuple[Part, ...]

    @property
    def fused(self) -> bool:
        """Whether some part of the model runs on our ops."""
        return any(part.fused for part in self.parts)

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            details = "; ".join(filter(None, (part.reason, part.checked)))
            state = "on our ops" if part.fused else "unchanged"
            lines.append(f"{part.path or 'model'} ({part.kind}): {state}{': ' if details else ''}{details}")
        return "\n".join(lines)


def accelerate(model: nn.Module, check: bool = False) -> nn.Module:
    """Let a live model of either original repository run on our ops.

    Models are known by the names of their classes, attributes and parameters and by their shapes, wherever they stand
    inside ``model``; nothing of the originals is imported. Their parameters stay the same objects, so optimisers and
    schedulers made before stay valid, and ``state_dict``, ``train``, ``to``, hooks, ``copy.deepcopy``, pickling and
    DistributedDataParallel do what they did. A batch is what the original takes, or a `GraphBatch`. Outputs and
    gradients are the original's up to rounding; dropout draws other masks of the same distribution.

    A model with a module that is unknown, replaced, or has hooks of its own keeps its own forward, as do calls with a
    batch on which the original would compute something else; `report` says which and why. Calling it again looks anew
    at a model that has changed.

    Args:
        model: any module.
        check: at the next call run both in evaluation mode on its batch, and compare outputs and, where gradients are
            enabled, all gradients. The result is logged (logger ``scalegmn_fast``, level info) and in the `report`.
            Takes the original's time and memory once; modes, gradients and random states stay as they are.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module.
        AccelerationError: at the checked call, where the norm of a difference exceeds the square root of the dtype's
            resolution (4 times that for gradients) times the tensor's norm, and also 8 times what rounding does to the
            original (by a copy of it in float64). `restore` has then been called.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    restore(model)
    for _, module, family in _recognised(model):
        state = _State(check)
        module.__dict__[_STATE] = state
        if state.twin_of(module, family) is not None:
            module.__class__ = _subclass(type(module), family)
    found = report(model)
    if not found.fused:
        _log.warning("accelerate: no part of the model runs on our ops\n%s", found)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` on a model and everything inside it; returns ``model`` itself."""
    for module in model.modules():
        if module.__dict__.pop(_STATE, None) is not None and isinstance(module, _Accelerated):
            module.__class__ = module._original_class
    return model


def report(model: nn.Module) -> Report:
    """Which parts of a model run on our ops at its next call, which do not, and why."""
    parts = []
    inside = set()
    for path, module, family in _recognised(model):
        inside.add(path)
        state = module.__dict__.get(_STATE)
        if state is None:
            parts.append(Part(path, type(module).__name__, False, "accelerate has not been called"))
            continue
        twin = state.twin_of(module, family)
        reason = state.problem or "; ".join([*family.notes(twin.ours), *state.refused])
        parts.append(Part(path, type(module).__name__, state.problem is None, reason, state.checked))
    for path, module in _others("", model, inside):
        parts.append(Part(path, class_name(module), False, "not a known model"))
    return Report(tuple(parts))


def _recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, module, its family) of every outermost module that looks like a model of an original."""
    found: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") or not outer for outer in found):
            continue
        family = next((family for family in FAMILIES if family.recognises(module)), None)
        if family is not None:
            found.append(path)
            yield path, module, family


def _others(path: str, module: nn.Module, known: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules with parameters that hold no known model."""
    if path in known:
        return
    if any(other == path or other.startswith(f"{path}." if path else "") for other in known):
        for name, child in module.named_children():
            yield from _others(f"{path}.{name}" if path else name, child, known)
    elif next(module.parameters(), None) is not None:
        yield path, module


class _State:
    """What an accelerated model carries. Copies and pickles carry its settings alone and make their own twin."""

    def __init__(self, check: bool = False, checked: str = ""):
        self.check, self.checked = check, checked
        self.problem: str | None = None
        self.refused: list[str] = []
        self._twin: Twin | None = None

    def __reduce__(self):
        return _State, (self.check, self.checked)

    def twin_of(self, module: nn.Module, family) -> Twin | None:
        """The twin of ``module`` if it can serve now; else None, and `problem` says why."""
        if self._twin is None or self._twin.original is not module or not self._twin.is_current():
            self._twin = None
            try:
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    ours = family.build(module)
                self._twin = Twin(module, ours, family.SAME)
            except UnsupportedError as error:
                self.problem = str(error)
                return None
        self.problem = self._twin.problem()
        return self._twin if self.problem is None else None

    def call(self, module: nn.Module, family, original: Callable, args: tuple, kwargs: dict):
        twin = self.twin_of(module, family)
        if twin is None:
            return original(*args, **kwargs)
        try:
            graph = family.graph_from_call(twin.ours, *args, **kwargs)
        except UnsupportedError as error:
            if str(error) not in self.refused:
                self.refused.append(str(error))
                _log.warning("%s runs unchanged on this batch: %s", type(module).__name__, error)
            return original(*args, **kwargs)
        if self.check:
            self._compare(module, functools.partial(_run, twin, family, graph), original, args, kwargs)
        return _run(twin, family, graph)

    def _compare(self, module: nn.Module, ours: Callable, original: Callable, args: tuple, kwargs: dict) -> None:
        self.check = False
        modes = [(child, child.training) for child in module.modules()]
        parameters = [p for p in module.parameters() if p.requires_grad]
        devices = {p.device for p in module.parameters() if p.device.type != "cpu"}
        try:
            for child, _ in modes:
                child.training = False
            with torch.random.fork_rng(devices=devices):
                expected = _results(lambda: original(*_copied(args), **_copied(kwargs)), parameters)
                actual = _results(ours, parameters)
                bound = _bound(actual.outputs, expected.outputs)
                outputs, gradients = (_difference(a, b) for a, b in zip(actual, expected, strict=True))
                is_close = outputs <= bound and gradients <= _GRADIENTS * bound
                agrees = is_close or (outputs < float("inf") and _is_rounding(module, args, kwargs, actual, expected))
        finally:
            for child, mode in modes:
                child.training = mode
        self.checked = f"outputs differ by {outputs:.1e}"
        self.checked += f", gradients by {gradients:.1e} of their norm" if actual.gradients else " of their norm"
        self.checked += f" (bound {bound:.1e}, {_GRADIENTS:g} times that for gradients)"
        if not agrees:
            restore(module)
            raise AccelerationError(f"{type(module).__name__}: {self.checked}; its own forward is back in place")
        self.checked += "" if is_close else ", as far as rounding moves the original, too"
        _log.info("%s checked against its original: %s", type(module).__name__, self.checked)


def _run(twin: Twin, family, graph):
    """Our model's result; its backward pass reaches the parameters that the original's reaches."""
    outputs = twin.follow()(graph)
    unreached = family.unreached(twin.ours, graph)
    return outputs if unreached is None else reached(outputs, twin.wanting(unreached))


class _Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]


def _results(run: Callable, parameters: list[Tensor]) -> _Results:
    """What a call returns, and the gradients of a fixed random sum of it (none where they are not recorded)."""
    outputs = _flat(run())
    if not parameters or not any(t.requires_grad for t in outputs):
        return _Results(outputs, [])
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in outputs]
    grads = torch.autograd.grad(outputs, parameters, cotangents, allow_unused=True)
    found = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]
    return _Results(outputs, found)


def _flat(outputs) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flat(part)]


def _copied(values, convert: Callable[[Tensor], Tensor] = lambda t: t):
    """Arguments of a call, with new objects around converted tensors: the original overwrites its batch."""
    if isinstance(values, Tensor):
        return convert(values)
    if isinstance(values, dict):
        return {name: _copied(value, convert) for name, value in values.items()}
    if type(values) in (list, tuple):
        return type(values)(_copied(value, convert) for value in values)
    values = copy.copy(values)
    for name in ("x", "edge_attr"):
        if isinstance(getattr(values, name, None), Tensor):
            setattr(values, name, convert(getattr(values, name)))
    if hasattr(values, "layer_layout"):
        values.layer_layout = copy.deepcopy(values.layer_layout)
    return values


def _bound(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The square root of the coarsest resolution in use."""
    dtypes = {t.dtype for t in (*actual, *expected)}
    device = actual[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest norm of a difference, relative to its tensor's, or to a hundredth of the largest where that is more."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    norms = [float(t.detach().double().norm()) for t in expected]
    worst = 0.0
    for a, b, norm in zip(actual, expected, norms, strict=True):
        error = float((a.detach().double() - b.detach().double()).norm())
        scale = max(norm, _NEGLIGIBLE * max(norms), torch.finfo(torch.float64).tiny)
        worst = max(worst, error / scale if error == error else float("inf"))
    return worst


def _is_rounding(module: nn.Module, args: tuple, kwargs: dict, actual: _Results, expected: _Results) -> bool:
    """Whether ours is, up to a factor, as near to the original's result in float64 as the original itself is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = restore(copy.deepcopy(module)).double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(next(module.parameters()).device.type, enabled=False):
            wide = [_copied(values, lambda t: t.double() if t.is_floating_point() else t) for values in (args, kwargs)]
            parameters = [p for p in exact.parameters() if p.requires_grad]
            truth = _results(lambda: exact(*wide[0], **wide[1]), parameters)
    finally:
        torch.set_default_dtype(default)
    return all(
        _difference(ours, true) <= _ROUNDING * _difference(theirs, true)
        for ours, theirs, true in zip(actual, expected, truth, strict=True)
    )


class _Accelerated:
    """Mixin of the classes that accelerated models get."""

    _original_class: type
    _family: Any

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        if make is copyreg.__newobj__:
            make, args = _new, (self._original_class, self._family.__name__, *args[1:])
        return (make, args, *rest)


def _subclass(original: type, family) -> type:
    """The class of accelerated models of ``original``."""
    if original not in _subclasses:

        @functools.wraps(original.forward)
        def forward(self, *args, **kwargs):
            return self.__dict__[_STATE].call(self, family, super(made, self).forward, args, kwargs)

        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_original_class": original,
            "_family": family,
            "forward": forward,
        }
        made = type(original)(original.__name__, (_Accelerated, original), namespace)
        _subclasses[original] = made
    return _subclasses[original]


def _new(original: type, family: str, *args):
    """An instance to be filled by unpickling or copying."""
    cls = _subclass(original, next(known for known in FAMILIES if known.__name__ == family))
    return cls.__new__(cls, *args)
