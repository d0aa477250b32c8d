"""One run by several processes: what torchrun starts joins one group, computes together and writes once.

Every process has the whole model (`DistributedDataParallel`). It takes its part of each batch in training, and whole
batches in evaluation; process 0 alone writes. One process is the same code with nothing to communicate.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Processes", "joined", "local_device", "started"]

T = TypeVar("T")


def started() -> tuple[int, int]:
    """(rank, number of processes) that torchrun set in the environment; (0, 1) without it.

    Raises ValueError where the variables are no such numbers.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and size.isdigit() and int(rank) < int(size)):
        raise ValueError(
            f"RANK must be a number from 0 below WORLD_SIZE, as torchrun sets them, got {rank!r}, {size!r}"
        )
    return int(rank), int(size)


def local_device(name: str) -> str:
    """The device of this process: of several, each takes the GPU of its number on its machine.

    Raises ValueError where there are fewer GPUs than processes, or ``name`` is one GPU for all of them.
    """
    if started()[1] == 1 or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ValueError(f"--device {name}: expected cuda (a GPU for each process) or cpu with several processes")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"--device cuda: process {local} of this machine has no GPU, there are {count}")
    torch.cuda.set_device(local)
    return f"cuda:{local}"


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The group of the processes that torchrun started, for the length of the block; nothing without several.

    gloo on the CPU, NCCL between GPUs. A process that fails leaves without the others' consent: they then fail too, or
    torchrun ends them.
    """
    if started()[1] == 1:
        yield
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
    yield
    gc.collect()  # models that stand in reference cycles keep the group's threads, which must end before Python does
    dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """The processes of a run: this one's rank and how many they are. Methods are collective but for `part`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of the initialised default group, else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def part(self, batch: Tensor) -> tuple[Tensor, float]:
        """(this process's part of a batch [b], its weight).

        Parts are consecutive and differ by at most one in length. With the weight ``len(part) * size / b`` on the mean
        loss of each part, gradients that are averaged over the processes are those of the mean over the batch. A
        process without a part gets the batch's first network, with weight 0.
        """
        if self.size == 1:
            return batch, 1.0
        own = torch.tensor_split(batch, self.size)[self.rank]
        return (own, len(own) * self.size / len(batch)) if len(own) else (batch[:1], 0.0)

    def seed(self, seed: int, step: int) -> int:
        """A seed of this process at a step: a function of the arguments and the rank alone."""
        return int(np.random.SeedSequence([seed, step, self.rank]).generate_state(1)[0])

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients averaged over the processes; its parameters and buffers become those of rank 0."""
        if self.size == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process rank 0's buffers (running statistics of batch norm, which no gradient keeps equal)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums of scalars of one dtype over the processes."""
        if self.size == 1:
            return dict(values)
        stacked = torch.stack(list(values.values()))
        dist.all_reduce(stacked)
        return dict(zip(values, stacked.unbind(), strict=True))

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether it is set in any process."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.bool().tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, action: Callable[[], T]) -> T:
        """What ``action()`` returns in process 0, the only one that calls it; what it raises is raised in all."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except Exception as error:  # shared, so that no process waits for one that has ended
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
