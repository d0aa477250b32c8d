"""Edge-conditioned attention over all pairs of nodes of each graph, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _segment_softmax(logits: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Softmax of logits [P, h] over the pairs of each row."""
    index = row[:, None].expand(-1, logits.shape[1])
    largest = logits.detach().new_full((num_rows, logits.shape[1]), -torch.inf)
    largest = largest.scatter_reduce(0, index, logits.detach(), "amax")
    weights = torch.exp(logits - largest[row])
    total = weights.new_zeros(num_rows, logits.shape[1]).index_add(0, row, weights)
    return weights / total[row]


def relational_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    e: Tensor,
    w_edge: Tensor,
    *,
    heads: int,
    scale: float,
    row: Tensor | None = None,
    column: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Nodes i attend to all nodes j of their graph; the pair's edge takes part in query, key and value.

    Per head ``q_ij = q_i + q^e_ij``, ``k_ij = k_j + k^e_ij``, ``v_ij = v_j * m^e_ij + v^e_ij`` (without m:
    ``v_j + v^e_ij``); weights are the softmax over j of ``scale * <q_ij, k_ij>``; the result is the weighted sum of
    ``v_ij``. There is no mask: pairs without an edge count with what their row of e holds.

    Args:
        q: [R, d], of the nodes that attend; k, v: [N, d], of all nodes; head by head. Floating point.
        e: edge features [P, d_e], one row per pair (i, j), sorted by i, then j.
        w_edge: [3 d, d_e], or [4 d, d_e] to modulate v; head by head, in each q, k, v and m. Its maps have no bias.
        heads: number of heads, a divisor of d.
        scale: factor of the logits (the published models: 1 / sqrt(d), the full width).
        row, column: int64 [P], i (row of q) and j (row of k and v) of each pair; every i needs a pair. Not read with
            `shape`.
        shape: (r, n) if in every graph r nodes attend to all its n: views replace gathers.

    Returns:
        [R, d], heads concatenated.

    Raises:
        ValueError: widths that do not fit each other or the heads; a number of pairs that does not fit `shape`; neither
            indices nor `shape`.

    Differentiable any number of times in q, k, v, e and w_edge. Softmax in the inputs' dtype. Deterministic on a CPU;
    on a GPU without `shape` sums are in no fixed order. Source: Kofinas et al., "Graph Neural Networks for Learning
    Equivariant Representations of Neural Networks", ICLR 2024; relational attention: Diao and Loynd, ICLR 2023.
    """
    if q.dim() != 2 or q.shape[1] % heads:
        raise ValueError(f"q: expected [R, d] with d divisible by {heads} heads, got {tuple(q.shape)}")
    width = q.shape[1]
    for name, part in (("k", k), ("v", v)):
        if part.dim() != 2 or part.shape[1] != width:
            raise ValueError(f"{name}: expected [N, {width}], got {tuple(part.shape)}")
    if w_edge.dim() != 2 or w_edge.shape[0] not in (3 * width, 4 * width):
        raise ValueError(f"w_edge: expected [{3 * width} or {4 * width}, d_e], got {tuple(w_edge.shape)}")
    if e.dim() != 2 or e.shape[1] != w_edge.shape[1]:
        raise ValueError(f"e: expected [P, {w_edge.shape[1]}], got {tuple(e.shape)}")
    if shape is None and (row is None or column is None):
        raise ValueError("row and column: expected indices where shape is not given, got None")
    if shape is not None and (q.shape[0] % shape[0] or k.shape[0] % shape[1] or e.shape[0] != q.shape[0] * shape[1]):
        raise ValueError(
            f"e: expected {shape[0]} x {shape[1]} pairs per graph, got {e.shape[0]} rows for {q.shape[0]} nodes that "
            f"attend to {k.shape[0]}"
        )
    rows, head = q.shape[0], width // heads
    q, k, v = (part.unflatten(1, (heads, head)) for part in (q, k, v))
    edge = F.linear(e, w_edge).unflatten(1, (heads, -1, head)).unbind(2)
    if shape is None:
        q, k, v = q[row], k[column], v[column]
    else:
        edge = [part.unflatten(0, (-1, *shape)) for part in edge]
        q = q.unflatten(0, (-1, shape[0])).unsqueeze(2)
        k, v = (part.unflatten(0, (-1, shape[1])).unsqueeze(1) for part in (k, v))
    values = v * edge[3] + edge[2] if len(edge) == 4 else v + edge[2]
    logits = scale * ((q + edge[0]) * (k + edge[1])).sum(-1)
    if shape is not None:
        weights = torch.softmax(logits, dim=2)
        return (weights.unsqueeze(-1) * values).sum(2).reshape(-1, width)
    weighted = _segment_softmax(logits, row, rows).unsqueeze(-1) * values
    return weighted.new_zeros(rows, width).index_add(0, row, weighted.flatten(1))
