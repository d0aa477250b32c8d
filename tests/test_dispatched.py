"""Counting operators, and finding what copies between host and device or waits for it."""

import pytest
import torch

import scalegmn_fast
from scalegmn_fast import ops
from scalegmn_fast.testing import Dispatched

HOST = torch.ones(4, 3)
DEVICE = HOST.to("meta")


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: HOST.to("meta"), "aten._to_copy.default"),
        (lambda: DEVICE.clone().copy_(HOST), "aten.copy_.default"),
        (lambda: DEVICE[torch.tensor([0, 1])], "aten.index.Tensor"),
        (lambda: torch.tensor([1.0], device="meta"), "torch.tensor"),
        (lambda: torch.as_tensor([1.0], device="meta"), "torch.as_tensor"),
    ],
)
def test_what_crosses_is_named(call, found):
    with Dispatched() as dispatched:
        call()
    assert dispatched.crossings == [found]


@pytest.mark.parametrize(
    "call",
    [
        lambda: DEVICE.sum().item(),
        lambda: bool((DEVICE > 0).any()),
        lambda: DEVICE.nonzero(),
        lambda: DEVICE[DEVICE > 0],
        lambda: DEVICE.repeat_interleave(torch.ones(4, dtype=torch.long, device="meta"), 0),
        lambda: DEVICE.cpu(),
    ],
)
def test_what_waits_raises_on_meta(call):
    with Dispatched(), pytest.raises((RuntimeError, NotImplementedError)):
        call()


def test_what_stays_on_one_side_does_not_cross():
    with Dispatched() as dispatched:
        torch.randint(0, 9, (2,)) + torch.tensor([1, 2])  # the host alone
        (DEVICE * torch.tensor(2.0) + 1).sum()  # a number is an argument of the kernel
        torch.as_tensor(DEVICE, device="meta")
    assert dispatched.crossings == []


def test_operators_are_counted_in_backward_passes_too_and_views_are_not():
    x = DEVICE.clone().requires_grad_()
    with Dispatched() as dispatched:
        (x.t().reshape(-1)[2:] * 3).sum().backward()
    assert dispatched.counts["aten::mul"] == 2
    assert dispatched.counts["aten::sum"] == 1
    assert not {"aten::t", "aten::slice", "aten::expand", "aten::empty"} & set(dispatched.counts)
    assert dispatched.total == sum(dispatched.counts.values())


def test_an_op_counts_once_or_as_what_its_reference_runs():
    x = DEVICE.clone().requires_grad_()
    with scalegmn_fast.backend("reference"):
        with Dispatched() as whole:
            ops.symmetrize(x, kind="normalize").sum().backward()
        with Dispatched(inside=True) as inside:
            ops.symmetrize(x, kind="normalize").sum().backward()
    assert whole.counts["scalegmn_fast::symmetrize"] == whole.counts["scalegmn_fast::symmetrize_backward"] == 1
    assert not any(name.startswith("scalegmn_fast") for name in inside.counts)
    assert inside.total > whole.total
