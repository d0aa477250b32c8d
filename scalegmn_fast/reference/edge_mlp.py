"""The edge updates of both Neural Graphs networks, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scalegmn_fast.reference.activations import activation

Linear = tuple[Tensor, Tensor]


def pair_sum(a: Tensor, b: Tensor, source: Tensor | None, target: Tensor | None, size: int | None) -> Tensor:
    """``a[source] + b[target]`` [R, d] for node rows a, b [N, d].

    With `size`, rows are all pairs (i, j) of graphs of `size` nodes each, by graph, i, j: then the index tensors are
    not read.
    """
    if size is None:
        return a[source] + b[target]
    a, b = (rows.unflatten(0, (-1, size)) for rows in (a, b))
    return (a.unsqueeze(2) + b.unsqueeze(1)).flatten(0, 2)


def reversed_rows(e: Tensor, reverse: Tensor | None, size: int | None) -> Tensor:
    """Row (j, i) of e [P, d] for every row (i, j); `size` as for `pair_sum`."""
    if size is None:
        return e[reverse]
    return e.unflatten(0, (-1, size, size)).transpose(1, 2).flatten(0, 2)


def edge_mlp(
    x: Tensor,
    e: Tensor,
    source: Tensor | None,
    target: Tensor | None,
    *,
    edge: Linear,
    from_source: Linear,
    from_target: Linear,
    out: Linear,
    act: str,
    both_ways: bool = False,
    reverse: Tensor | None = None,
    size: int | None = None,
) -> Tensor:
    """``out(act(edge(e) + from_source(x_source) + from_target(x_target)))``: a first linear map split over its parts.

    The parts of the nodes run on nodes; edges gather and add.

    Args:
        x: node features [N, d]. Floating point.
        e: edge features [R, d_e]; with `both_ways` the map `edge` reads [e_ij, e_ji], 2 d_e numbers.
        source, target: int64 [R], rows of x (not read with `size`).
        edge, from_source, from_target: (weight [d_h, .], bias [d_h]) of the first map's parts.
        out: (weight [d_out, d_h], bias [d_out]).
        act: see `activations.activation`.
        both_ways: read the edge in the other direction too; its rows are `reverse` (int64 [R]).
        size: if the rows are all pairs (i, j) of graphs of `size` nodes each, sorted by graph, i, j: views replace
            gathers.

    Returns:
        [R, d_out].

    Raises:
        ValueError: x or e of other than 2 dimensions; a row count that `size` does not divide; no indices and no
            `size`.

    Differentiable any number of times in all tensors. Deterministic. Source: Kofinas et al., "Graph Neural Networks for
    Learning Equivariant Representations of Neural Networks", ICLR 2024.
    """
    for name, rows in (("x", x), ("e", e)):
        if rows.dim() != 2:
            raise ValueError(f"{name}: expected rows of 2 dimensions, got shape {tuple(rows.shape)}")
    if size is None and (source is None or target is None or (both_ways and reverse is None)):
        raise ValueError("source, target and reverse: expected indices where size is not given, got None")
    if size is not None and (x.shape[0] % size or e.shape[0] != x.shape[0] * size):
        raise ValueError(
            f"e: expected all pairs of graphs of {size} nodes, got {e.shape[0]} rows for {x.shape[0]} nodes"
        )
    read = torch.cat([e, reversed_rows(e, reverse, size)], dim=1) if both_ways else e
    nodes = pair_sum(F.linear(x, *from_source), F.linear(x, *from_target), source, target, size)
    return F.linear(activation(F.linear(read, *edge) + nodes, act), *out)
