"""One optimiser step: forward, loss, backward, clipping, update; on a GPU nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scalegmn_fast.graph import GraphBatch

__all__ = ["StepResult", "TrainingStep"]


class StepResult(NamedTuple):
    """What a step leaves: detached loss [] and output [B, ...], and the gradients' norm before clipping, or None."""

    loss: Tensor
    output: Tensor
    norm: Tensor | None


class TrainingStep:
    """Optimiser steps of a model; call it with a batch and its labels, which are on the model's device.

    Args:
        model: from a GraphBatch to what the loss takes, in training mode.
        loss: (output, labels) -> scalar.
        optimizer: of the model's parameters.
        max_norm: to which gradients are clipped; None: they are not.
        output: (model, graph) -> what the loss takes, where that is not the model's output.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        output: Callable[[nn.Module, GraphBatch], Tensor] | None = None,
    ):
        self.model, self.loss, self.optimizer, self.max_norm = model, loss, optimizer, max_norm
        self.output = output

    def __call__(self, graph: GraphBatch, labels: Tensor, weight: float = 1.0) -> StepResult:
        """A step whose gradients are those of ``weight`` times the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(graph) if self.output is None else self.output(self.model, graph)
        loss = self.loss(output, labels)
        (loss if weight == 1 else loss * weight).backward()
        norm = None
        if self.max_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        return StepResult(loss.detach(), output.detach(), norm)
