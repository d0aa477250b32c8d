"""Whole training steps as a CUDA graph: at small batches a step costs what its launches cost, and a replay is one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from scalegmn_fast.graph import GraphBatch

from .step import StepResult

__all__ = ["CudaGraphs", "GraphedStep", "make_capturable"]

Step = Callable[[GraphBatch, Tensor], StepResult]


class Recorder(Protocol):
    """How steps are warmed up and recorded."""

    def warm_up(self, call: Callable[[], StepResult]) -> StepResult:
        """Run a step as recorded steps will run."""

    def record(self, call: Callable[[], StepResult]) -> Callable[[], StepResult]:
        """What runs the step again, on the same tensors. Recording alone computes nothing."""


class CudaGraphs:
    """`Recorder` of CUDA graphs. Steps warm up on a stream of their own, as a capture needs it."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def warm_up(self, call: Callable[[], StepResult]) -> StepResult:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = call()
        current.wait_stream(self.stream)
        return result

    def record(self, call: Callable[[], StepResult]) -> Callable[[], StepResult]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = call()

        def replay() -> StepResult:
            graph.replay()
            return result

        return replay


class GraphedStep:
    """A training step that is recorded once and then replayed for every batch of the same plan and shapes.

    The first ``warm_up`` batches of equal plan and shapes in a row run as they are, the next one is recorded. Every
    batch is a training step, none is run twice. Other batches run as they are: smaller ones, those with a sign mask
    or architectures (how many rows each kind has is part of a recording), and mixed layouts, whose plans differ from
    batch to batch.

    What the step reads besides the batch has to stay where it is: parameters, the optimiser's state and its rate (see
    `make_capturable`); modes, autocast and the chosen backend are those of the recording. Dropout draws new masks in
    every replay. A replay computes what the step computes, with the same kernels.

    Args:
        step: (graph, labels) -> `StepResult`, such as a `TrainingStep`; must not wait for the device.
        warm_up: batches before the recording, at least 1: kernels are compiled and the optimiser's state is made.
        recorder: `CudaGraphs` if None.

    A call returns what the step returns; a replay's tensors are overwritten by the next one.

    Raises:
        ValueError: ``warm_up`` below 1.
    """

    def __init__(self, step: Step, *, warm_up: int = 3, recorder: Recorder | None = None):
        if warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {warm_up}")
        self.step, self.warm_up = step, warm_up
        self.recorder = CudaGraphs() if recorder is None else recorder
        self.replays = 0
        self._last: tuple[GraphBatch, Tensor] | None = None
        self._seen = 0
        self._inputs: tuple[GraphBatch, Tensor] | None = None
        self._replay: Callable[[], StepResult] | None = None

    @property
    def recorded(self) -> bool:
        """Whether there is a recording."""
        return self._replay is not None

    def __call__(self, graph: GraphBatch, labels: Tensor) -> StepResult:
        if self._replay is None:
            return self._before_recording(graph, labels)
        if not _alike(self._inputs, (graph, labels)):
            return self.step(graph, labels)
        for mine, given in zip(_tensors(*self._inputs), _tensors(graph, labels), strict=True):
            mine.copy_(given)
        self.replays += 1
        return self._replay()

    def _before_recording(self, graph: GraphBatch, labels: Tensor) -> StepResult:
        self._seen = self._seen + 1 if _alike(self._last, (graph, labels)) else 1
        self._last = graph, labels
        if self._seen <= self.warm_up or not _recordable(graph):
            return self.recorder.warm_up(lambda: self.step(graph, labels))
        nodes, edges, labels = (value.clone() for value in _tensors(graph, labels))
        inputs = GraphBatch(nodes, edges, graph.plan, symmetry=graph.symmetry), labels
        self._replay = self.recorder.record(lambda: self.step(*inputs))
        self._inputs, self._last = inputs, None
        return self._replay()


def _tensors(graph: GraphBatch, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return graph.node_features, graph.edge_features, labels


def _recordable(graph: GraphBatch) -> bool:
    return graph.sign_mask is None and graph.architectures is None


def _alike(one: tuple[GraphBatch, Tensor] | None, other: tuple[GraphBatch, Tensor]) -> bool:
    """Whether two batches have one plan and tensors of equal shapes and types, and nothing else."""
    if one is None or one[0].plan is not other[0].plan or not _recordable(other[0]):
        return False
    pairs = zip(_tensors(*one), _tensors(*other), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and a.device == b.device for a, b in pairs)


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep an optimiser's steps and its learning rates on a device, where a recorded step reads them.

    Call it after schedulers are made and after every ``load_state_dict``; schedulers then write the rate into its
    tensor (float32).

    Raises:
        ValueError: the optimiser has no ``capturable`` option.
    """
    kind = type(optimizer)
    if "capturable" not in inspect.signature(kind).parameters:
        raise ValueError(
            f"train_args.cuda_graph needs an optimiser with the option 'capturable', such as AdamW, got {kind.__name__}"
        )
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32).to(device)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device)
