"""Errors, bounds derived from the eager version's own error, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["assert_close_to_float64", "float64_bound", "nan_poisoned", "relative_error"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of ``expected``.

    Both are compared in float64 on the CPU. NaN or infinity in only one of the two gives infinity, as does a non-zero
    ``actual`` where ``expected`` is zero throughout. Two empty tensors differ by 0.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual must have the shape of expected, {tuple(expected.shape)}, got {tuple(actual.shape)}")
    actual, expected = (t.detach().to("cpu", torch.float64) for t in (actual, expected))
    if actual.numel() == 0:
        return 0.0
    finite = torch.isfinite(expected)
    special = ~finite
    if not torch.isfinite(actual[finite]).all():
        return float("inf")
    if not torch.allclose(actual[special], expected[special], rtol=0, atol=0, equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = float((actual[finite] - expected[finite]).abs().max())
    if difference == 0.0:
        return 0.0
    scale = float(expected[finite].abs().max())
    return difference / scale if scale > 0.0 else float("inf")


def float64_bound(eager: Tensor, exact: Tensor, *, factor: float = 4.0, ulps: float = 16.0) -> float:
    """Relative error that an implementation in ``eager``'s dtype is allowed.

    ``factor`` times the error of the eager PyTorch version in the same dtype, and never less than ``ulps`` units of
    rounding of that dtype: an eager result may by luck be exact.

    Args:
        eager: the plain PyTorch result in the dtype under test.
        exact: the same computation in float64.
    """
    return max(factor * relative_error(eager, exact), ulps * torch.finfo(eager.dtype).eps)


def assert_close_to_float64(
    actual: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 4.0, ulps: float = 16.0, name: str = "result"
) -> None:
    """Asserts that ``actual`` is as near to the float64 result as the eager version in its dtype, up to ``factor``.

    Args:
        actual: result under test; its dtype must be ``eager``'s.
        eager: the plain PyTorch result in that dtype.
        exact: the same computation in float64.
        name: what to call it in the message.

    Raises:
        AssertionError: dtype or shape differ, or the error exceeds ``float64_bound(eager, exact)``.
    """
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name}: expected dtype {eager.dtype}, got {actual.dtype}")
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {tuple(exact.shape)}, got {tuple(actual.shape)}")
    bound = float64_bound(eager, exact, factor=factor, ulps=ulps)
    error = relative_error(actual, exact)
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.3e} against float64 exceeds {bound:.3e} ({eager.dtype})")


@contextmanager
def nan_poisoned() -> Iterator[None]:
    """Fills every uninitialised allocation with NaN (integers: with their largest value) while active.

    An output slot that a kernel leaves unwritten, or a buffer that it accumulates into without clearing, then shows as
    NaN. Covers ``torch.empty`` and what is allocated through it, in C++ too. Restores the previous settings.
    """
    fill = torch.utils.deterministic.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
