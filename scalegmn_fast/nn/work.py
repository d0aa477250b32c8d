"""Which exact identities a model uses. All are on by default; turning one off is for ablations and tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class WorkPlan:
    """The algebraic identities of the models' plan of work. Each changes the cost, none the result (up to rounding).

    Attributes:
        partition: a row class runs only its own branch (off: every branch on every row, then a mask).
        hoist: linear maps and canonicalisations of gathered node rows run on nodes (off: on edges).
        liveness: with a last-layer readout, the last rounds run only on what the output still depends on.
        low_rank: layer-0 edge features stay factored as ``map @ weight`` (off: [E, d] from the start).
        share: ``rho(x) + rho(-x)`` runs rho's first linear map once.
        compose: two linear maps with nothing between them become one.
        across: with one number per weight, the last linear map of the first edge update's mlp is composed with the
            linear maps that read its edges in the next round (off: it runs, and the edges are written).
        fuse: where a `row_program` engine serves the tensors (on a GPU where it is chosen) and all of the above but
            ``across`` are on, messages, edge updates and node updates run as programs, tile by tile.
    """

    partition: bool = True
    hoist: bool = True
    liveness: bool = True
    low_rank: bool = True
    share: bool = True
    compose: bool = True
    across: bool = True
    fuse: bool = True

    @classmethod
    def none(cls) -> WorkPlan:
        """Every identity off: the computation as the paper writes it."""
        return cls(False, False, False, False, False, False, False, False)


class PlannedModule(nn.Module):
    """A module that follows a `WorkPlan`."""

    work = WorkPlan()


def set_work_plan(module: nn.Module, work: WorkPlan) -> nn.Module:
    """Set the work plan of a module and of all its children; returns the module."""
    for child in module.modules():
        if isinstance(child, PlannedModule):
            child.work = work
    return module
