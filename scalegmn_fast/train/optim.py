"""Optimisers by name and the learning-rate schedules of the published configurations."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

__all__ = ["WarmupLRScheduler", "build_optimizer", "build_scheduler"]


class WarmupLRScheduler(LRScheduler):
    """Linear warm-up: optimiser step s (from 1) uses ``base_lr * min(1, s / warmup_steps)``; constant afterwards."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int = 10000, last_epoch: int = -1):
        if warmup_steps < 1:
            raise ValueError(f"warmup_steps must be at least 1, got {warmup_steps}")
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, last_epoch=last_epoch)

    def get_lr(self) -> list[float]:
        step = self.last_epoch + 1
        if step >= self.warmup_steps:
            return list(self.base_lrs)
        return [base * step / self.warmup_steps for base in self.base_lrs]


def build_optimizer(parameters: Iterable[torch.nn.Parameter], name: str, args: Mapping) -> torch.optim.Optimizer:
    """Makes ``torch.optim.<name>(parameters, **args)``.

    On the CPU PyTorch's fused kernel steps all parameters at once, where the optimiser has one and ``args`` ask for no
    other (``fused: false``, ``foreach``, ``capturable``, ``differentiable``); it rounds differently.

    Raises ValueError for a name that is no optimiser and for an argument that it does not take, naming the nearest
    valid one.
    """
    cls = getattr(torch.optim, str(name), None)
    if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer):
        names = [n for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)]
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
        raise ValueError(f"optimization.optimizer_name {name!r} is not in torch.optim; the nearest is {near[0]!r}")
    accepted = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "params")]
    for key in args:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1, cutoff=0.0)
            raise ValueError(f"optimization.optimizer_args.{key}: {name} has none; the nearest is '{near[0]}'")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    parameters = list(parameters)
    asked = options.keys() & {"fused", "foreach", "capturable", "differentiable"}
    if "fused" in accepted and not asked and all(parameter.device.type == "cpu" for parameter in parameters):
        options["fused"] = True
    return cls(parameters, **options)


def build_scheduler(optimizer: torch.optim.Optimizer, args: Mapping) -> LRScheduler | ReduceLROnPlateau | None:
    """Makes the schedule of ``scheduler_args`` (validated), or None.

    ``WarmupLRScheduler`` and ``StepLR`` are stepped after every optimiser step; ``ReduceLROnPlateau`` after every
    validation, with the loss for mode ``min`` and the accuracy (Kendall's tau for regression) for mode ``max``.
    """
    name = args.get("scheduler")
    if name is None:
        return None
    if name == "WarmupLRScheduler":
        return WarmupLRScheduler(optimizer, args["warmup_steps"])
    if name == "StepLR":
        return StepLR(optimizer, args["decay_steps"], gamma=args["decay_rate"])
    if name == "ReduceLROnPlateau":
        return ReduceLROnPlateau(
            optimizer,
            mode=args["scheduler_mode"],
            factor=args["decay_rate"],
            patience=args["patience"],
            min_lr=args["min_lr"],
        )
    raise ValueError(f"optimization.scheduler_args.scheduler {name!r} is unknown")
