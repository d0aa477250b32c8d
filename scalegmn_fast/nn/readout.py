"""Readouts over a whole graph: permutation-, sign- and scale-invariant."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .equivariant import CANONICAL_EPS, SymmetryPair
from .mlp import Mlp
from .rows import RowClasses
from .work import PlannedModule


class InvariantReadout(SymmetryPair):
    """``global_mlp([sum over hidden neurons of g(x), x of first and last neurons])``.

    Args:
        d_in, d_rho, d_out: widths of node features, of g and of the result.
        num_io_nodes: first plus last neurons of a network.
        others: see `InvariantLayer`.

    ``phi`` is in the original's checkpoints and computes nothing; it is frozen.
    Source: spec, *Before and after* (invariant head, ``full_graph``).
    """

    def __init__(
        self,
        d_in: int,
        d_rho: int,
        d_out: int,
        mlp_args: dict,
        symmetry: str,
        num_io_nodes: int,
        sign_symmetrization: bool = True,
        eps: float = CANONICAL_EPS,
    ):
        super().__init__()
        self.phi = Mlp(d_in, d_rho, **mlp_args).requires_grad_(False)
        self.add_layers(d_in, d_rho, mlp_args, symmetry, sign_symmetrization, eps)
        self.global_mlp = Mlp(d_rho + d_in * num_io_nodes, d_out, **mlp_args)

    def forward(self, x: Tensor, classes: RowClasses, order: Tensor, ptr: Tensor) -> Tensor:
        """[B, d_out] from node features [N, d_in]; ``order`` and ``ptr`` group the hidden rows by graph."""
        return self.global_mlp(self.embed(x, classes, order, ptr))

    def embed(self, x: Tensor, classes: RowClasses, order: Tensor, ptr: Tensor) -> Tensor:
        """[B, d_rho + d_in * num_io_nodes]: what ``global_mlp`` reads."""
        last, hidden, first = x.split([classes.last, classes.hidden, classes.first])
        hidden = self.invariant(hidden, None, classes.only("hidden"))
        summed = ops.segment_reduce(hidden, ptr, "sum", order=order)
        graphs = summed.shape[0]
        ends = torch.cat([first.reshape(graphs, -1), last.reshape(graphs, -1)], dim=1)
        return torch.cat([summed, ends], dim=1)


class DeepSet(PlannedModule):
    """``global_mlp(sum over neurons of local_mlp(x))``: the readout of the ``permutation`` symmetry.

    Args:
        d_in, d_rho, d_out: widths of node features, of the sum and of the result.
        mlp_args: arguments of `Mlp`.
    """

    def __init__(self, d_in: int, d_rho: int, d_out: int, mlp_args: dict):
        super().__init__()
        self.local_mlp = Mlp(d_in, d_rho, **mlp_args)
        self.global_mlp = Mlp(d_rho, d_out, **mlp_args)
        self.aggr = torch.nn.ModuleDict({"local_nn": self.local_mlp, "global_nn": self.global_mlp})

    def forward(self, x: Tensor, order: Tensor, ptr: Tensor) -> Tensor:
        """[B, d_out] from node features [N, d_in]; ``order`` and ``ptr`` group the rows by graph."""
        return self.global_mlp(self.embed(x, order, ptr))

    def embed(self, x: Tensor, order: Tensor, ptr: Tensor) -> Tensor:
        """[B, d_rho]: what ``global_mlp`` reads."""
        return ops.segment_reduce(self.local_mlp(x), ptr, "sum", order=order)
