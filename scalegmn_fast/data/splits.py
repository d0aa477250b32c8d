"""Drawing validation and test parts at random."""

from __future__ import annotations

import numpy as np

from .packed import SPLITS

__all__ = ["draw_splits"]


def draw_splits(
    n: int, *, given: np.ndarray | None = None, val_fraction: float = 0.0, test_fraction: float = 0.0, seed: int = 0
) -> np.ndarray:
    """Split codes uint8 [n]: 0 train, 1 val, 2 test.

    ``given`` codes are kept; only what they lack is drawn from their training part, the test part first. Fractions
    count of the part they are drawn from: ``test_fraction`` of all training networks, ``val_fraction`` of those left
    then. The result is a function of the arguments alone.
    """
    for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= fraction < 1.0:
            raise ValueError(f"{name} must be at least 0 and less than 1, got {fraction}")
    codes = np.zeros(n, np.uint8) if given is None else np.array(given, np.uint8)
    if codes.shape != (n,):
        raise ValueError(f"given must have shape [{n}], got {list(codes.shape)}")
    rng = np.random.Generator(np.random.PCG64([seed, 0x5711]))
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        code = SPLITS.index(name)
        if (codes == code).any():
            continue
        members = rng.permutation(np.flatnonzero(codes == 0))
        codes[members[: round(fraction * len(members))]] = code
    if not (codes == 0).any():
        raise ValueError(f"no network is left for training: {n} networks, val {val_fraction}, test {test_fraction}")
    return codes
