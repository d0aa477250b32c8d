"""Tensors of more than 2^31 elements, on a CPU without their memory: pages that nothing touches are never there."""

import pytest
import torch

import scalegmn_fast
from scalegmn_fast import ops

WIDTH = 128
ROWS = 2**31 // WIDTH + 8


def test_rows_beyond_2_to_the_31_elements_are_found(device):
    """Two rows are read of 4 GB, the last one at an offset that 32 bits do not hold."""
    x = torch.empty(ROWS, WIDTH, dtype=torch.float16, device=device)
    rows = torch.tensor([ROWS - 1, 5], device=device)
    values = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)).half()
    x[rows] = values.to(device)
    ptr = torch.tensor([0, 1, 2], device=device)
    found = ops.segment_reduce(x, ptr, "sum", order=rows)
    assert torch.equal(found.cpu(), values)


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", ["triton", "cuda"])
def test_rows_of_large_tensors_are_computed_like_those_of_small_ones(chosen):
    x = torch.empty(ROWS, WIDTH, dtype=torch.float16, device="cuda").normal_().requires_grad_()
    tail = x.detach()[-64:].clone().requires_grad_()
    ptr = torch.arange(0, ROWS + 1, 8, device="cuda")
    with scalegmn_fast.backend(chosen):
        for large, small in (
            (ops.symmetrize(x, kind="normalize"), ops.symmetrize(tail, kind="normalize")),
            (ops.segment_reduce(x, ptr, "sum"), ops.segment_reduce(tail, ptr[:9], "sum")),
        ):
            assert torch.equal(large[-len(small) :], small)
            (of_large,) = torch.autograd.grad(large.sum(), x)
            (of_small,) = torch.autograd.grad(small.sum(), tail)
            assert torch.equal(of_large[-64:], of_small)
