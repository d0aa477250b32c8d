"""On a GPU, kernels run on the current stream, behind what was queued there before them."""

import pytest
import torch

import scalegmn_fast
from scalegmn_fast import ops

SLEEP_CYCLES = 50_000_000


def symmetrize(h):
    return ops.symmetrize(h, kind="normalize")


def segment_reduce(h):
    ptr = torch.arange(0, h.shape[0] + 1, 16, dtype=torch.int32, device=h.device)
    return ops.segment_reduce(h, ptr, ("sum", "max"))


def row_program(h):
    program = ops.RowProgram()
    section = program.section(h.shape[0])
    value = section.load(h)
    section.add_up(section.mul(value, section.linear(value, torch.eye(h.shape[1], device=h.device))))
    section.write(section.norm_act(value, None, None, "silu", 1.0))
    reduced, rows = ops.row_program(program, torch.tensor([0, 100, h.shape[0]], device=h.device))
    return torch.cat([reduced, rows])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("call", "chosen"),
    [
        (symmetrize, "triton"),
        (symmetrize, "cuda"),
        (segment_reduce, "triton"),
        (segment_reduce, "cuda"),
        (row_program, "cuda"),
    ],
)
def test_kernels_wait_for_the_current_stream(call, chosen):
    """The input is written late, on a side stream: a kernel on any other stream would read it too early."""
    h = torch.randn(4096, 128, device="cuda")
    with scalegmn_fast.backend("reference"):
        expected = call(2 * h)
    with scalegmn_fast.backend(chosen):
        call(h)  # compiled and loaded before the race
        late = torch.full_like(h, float("nan"))
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            torch.mul(h, 2, out=late)
            found = call(late)
        stream.synchronize()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
