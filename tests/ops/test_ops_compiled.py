"""The ops inside a program that torch.compile turns into code."""

import torch

from scalegmn_fast import ops


def test_default_compiler_and_autocast_give_the_same_numbers():
    """One graph through inductor, forward and backward, a fused neighbour on either side of both ops."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 16, generator=generator)
    weight, bias = torch.randn(16, 16, generator=generator), torch.randn(16, generator=generator)
    ptr = torch.tensor([0, 10, 10, 40])

    def function(x, weight, bias):
        hidden = ops.symmetrize(x @ weight, bias, activation="tanh") * 2
        return ops.segment_reduce(hidden, ptr, ("mean", "std")).sin()

    def results(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(*leaves)
        return [out, *torch.autograd.grad(out.float().sum(), leaves)]

    for actual, expected in zip(results(torch.compile(function, fullgraph=True)), results(function), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
