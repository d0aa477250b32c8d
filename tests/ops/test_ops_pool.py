"""Large results on the CPU come from buffers that are kept: a repeated call touches no fresh page."""

import resource

import pytest
import torch

from scalegmn_fast import ops

ROWS, WIDTH, PAGE = 10240, 1024, 4096  # 40 MiB a result: larger than what malloc keeps by itself
POINTERS = torch.arange(0, ROWS + 1, 4)


def activation(x):
    program = ops.RowProgram()
    section = program.section(x.shape[0])
    section.write(section.norm_act(section.load(x), None, None, "relu", 0.0))
    return ops.row_program(program)[1]


CALLS = {
    "symmetrize": lambda x: ops.symmetrize(x, kind="normalize"),
    "segment_reduce": lambda x: ops.segment_reduce(x, POINTERS, ("mean", "std", "max")),
    "row_program": activation,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_touches_no_fresh_pages(name):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    cotangent = torch.ones_like(CALLS[name](x))

    def step():
        torch.autograd.grad(CALLS[name](x), x, cotangent)

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < x.nbytes // PAGE // 10  # a fresh result in every call: 80 times as many


@pytest.mark.parametrize("name", CALLS)
def test_results_that_are_held_are_not_written_over(name):
    x = torch.randn(ROWS, WIDTH)
    held = CALLS[name](x)
    copied = held.clone()
    for _ in range(2):
        CALLS[name](x + 1)
    assert torch.equal(held, copied)
