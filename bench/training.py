"""What benchmarks of models run: a configuration's training step on random networks and labels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalegmn_fast.data.inr import coordinates, evaluate_inrs
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.testing import random_network


class Problem:
    """Random networks for a configuration (the original's format), and its loss against random labels.

    In a CNN's networks the last layer is linear: its weights are the first of the numbers per edge, zeros follow.

    Attributes:
        weights, biases: float32, [B, n_in, n_out, d_e] and [B, n_out, 1] per layer.
        input_value: node feature of input neurons.
        sign_mask: bool [B] for ``hetero``, on the CPU, else None.
    """

    host: Problem | None = None
    device = "cpu"

    def __init__(self, config: dict, batch: int, seed: int = 0):
        args, data = config["scalegmn_args"], config["data"]
        d_e = args.get("_max_kernel_height", 1) * args.get("_max_kernel_width", 1)
        generator = torch.Generator().manual_seed(seed)
        drawn = {"generator": generator, "dtype": torch.float32}
        self.config, self.batch = config, batch
        self.weights, self.biases = random_network(data["layer_layout"], batch, d_e=d_e, **drawn)
        self.weights[-1][..., 1:] = 0
        self.input_value = 1.0 if d_e == 1 else 0.0
        self.sign_mask = torch.arange(batch) % 2 == 0 if args["symmetry"] == "hetero" else None
        if args["equivariant"]:
            self.points = coordinates(*data["image_size"])
            self.target = torch.rand(batch, len(self.points), data["layer_layout"][-1], **drawn)
        elif config["train_args"]["loss"] == "MSE":
            self.target = torch.rand(batch, **drawn)
        else:
            self.target = torch.randint(args["readout_args"]["d_out"], (batch,), generator=generator)

    def to(self, device: str) -> Problem:
        """The problem on a device; graphs are built on the CPU and then moved, as a data loader does it."""
        moved = copy.copy(self)
        moved.host, moved.device = self, device
        moved.weights, moved.biases = ([x.to(device) for x in group] for group in (self.weights, self.biases))
        moved.target = self.target.to(device)
        if hasattr(self, "points"):
            moved.points = self.points.to(device)
        return moved

    def on_host(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases on the CPU."""
        problem = self.host or self
        return problem.weights, problem.biases

    def graph(self) -> GraphBatch:
        if self.host is not None:
            return self.host.graph().to(self.device)
        return GraphBatch.from_weights(
            self.weights, self.biases, input_value=self.input_value, sign_mask=self.sign_mask
        )

    def loss(self, output) -> Tensor:
        """Cross entropy, or mean squared error: of a score, or of the images that the edited INRs stand for."""
        if not isinstance(output, Tensor):
            weights, biases = (
                [old + new.to(old.dtype) for old, new in zip(*pair, strict=True)]
                for pair in ((self.weights, output[0]), (self.biases, output[1]))
            )
            return F.mse_loss(evaluate_inrs(weights, biases, self.points, output_offset=0.5), self.target)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.target.is_floating_point():
            return F.mse_loss(output.sigmoid().squeeze(-1), self.target)
        return F.cross_entropy(output, self.target)


class Training:
    """A model in training mode and its AdamW, at the rate of the first step of the configuration's warm-up.

    ``capturable``: the optimiser keeps its state on the device, so that a step can be captured in a CUDA graph.
    """

    def __init__(self, model: nn.Module, config: dict, capturable: bool = False):
        options = config["optimization"]
        settings = options["optimizer_args"]
        self.clip = options["clip_grad_max_norm"]
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.train()
        rate = settings["lr"] / options["scheduler_args"]["warmup_steps"]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=rate,
            weight_decay=settings["weight_decay"],
            amsgrad=settings.get("amsgrad", False),
            capturable=capturable,
        )

    def prepare(self) -> None:
        """Make what lasts from the first step on: the optimiser's state, PyTorch's threads and their buffers."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        matrix = torch.rand(512, 512, requires_grad=True)
        torch.mm(matrix, matrix).sum().backward()

    def step(self, forward: Callable[[], object], problem: Problem) -> None:
        """One training step: forward, loss, backward, clipping, optimiser."""
        self.optimizer.zero_grad()
        problem.loss(forward()).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
