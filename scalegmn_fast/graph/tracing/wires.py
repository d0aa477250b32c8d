"""The neurons of a traced network, what ties them to each other, and the symmetry group that this leaves.

A *wire* is one neuron as one operation makes it: a channel of a convolution, a feature of a linear layer, the same
after a normalisation. Operations leave facts behind: these two wires carry one number (a residual sum), those move
together (the input and the output of a normalisation), this one may not be scaled by a negative number (ReLU), these
are told apart by where they are read. `Wires.classes` solves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIGN, SCALE = 1, 2
BOTH = SIGN | SCALE
_NAMES = {0: "permutation", SIGN: "sign", SCALE: "scale", BOTH: "sign and scale"}


class NeuronClass(NamedTuple):
    """Neurons that can change places with each other.

    Attributes:
        members: int64 [n, r]: n interchangeable sets of r wires that move together, column for column.
        symmetry: per column what its wires may be multiplied by besides: "sign" (1 and -1), "scale" (positive
            numbers), "sign and scale" (both), "permutation" (1 alone), "fixed" (and they do not change places).
        places: per column the name of the layer that made the wires.
    """

    members: np.ndarray
    symmetry: tuple[str, ...]
    places: tuple[str, ...]

    @property
    def is_fixed(self) -> bool:
        """Whether the neurons have no symmetry, so that they keep their places."""
        return "fixed" in self.symmetry


@dataclass(frozen=True)
class Element:
    """An element of a traced network's group: the new wire k is the old wire ``moved[k]`` times ``scale[k]``.

    ``moved`` int64 [wires], ``scale`` float64 [wires].
    """

    moved: Tensor
    scale: Tensor


class Wires:
    """All wires of a network under construction. Arguments called ``wires`` are integer arrays of their numbers."""

    def __init__(self):
        self.kinds = np.zeros(0, dtype=np.int64)
        self.fixed = np.zeros(0, dtype=bool)
        self.axis = np.zeros(0, dtype=np.int64)
        self.places: list[str] = []
        self._colour = np.zeros(0, dtype=np.int64)
        self._colours = 0
        self._ties: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.kinds)

    def new(self, count: int, place: str, *, fixed: bool = False) -> np.ndarray:
        """``count`` wires that are alike."""
        first = len(self)
        self.kinds = np.append(self.kinds, np.full(count, 0 if fixed else BOTH))
        self.fixed = np.append(self.fixed, np.full(count, fixed))
        self.axis = np.append(self.axis, np.full(count, len(self.places)))
        self._colour = np.append(self._colour, np.full(count, self._colours))
        self._colours += 1
        self.places.append(place)
        return np.arange(first, first + count)

    def place(self, wire: int) -> str:
        """Name of the layer that made a wire."""
        return self.places[self.axis[wire]]

    def restrict(self, wires: np.ndarray, kinds: int) -> None:
        """Only scalings of ``kinds`` (`SIGN`, `SCALE`, `BOTH`, 0) remain."""
        self.kinds[wires] &= kinds

    def fix(self, wires: np.ndarray) -> None:
        """Nothing remains: the wires neither move nor scale."""
        self.kinds[wires] = 0
        self.fixed[wires] = True

    def tie(self, first: np.ndarray, second: np.ndarray, power: int) -> None:
        """``first[k]`` and ``second[k]`` move together; the scale of the second is that of the first to a ``power`` of
        1 or -1, or free of it (0)."""
        self._ties.append(np.stack([first, second, np.full(len(first), power)]))

    def tell_apart(self, wires: np.ndarray, marks: np.ndarray | int = 0) -> None:
        """Wires with one mark stay alike if they were; they differ from those with another, and from all others."""
        wires, marks = np.unique(np.stack([wires, np.broadcast_to(marks, wires.shape)]), axis=1)
        # A wire read at several places has the sorted list of their marks.
        starts = np.flatnonzero(np.r_[True, wires[1:] != wires[:-1]])
        for rank in range(int(np.diff(np.r_[starts, wires.size]).max(initial=0))):
            rows = starts[np.diff(np.r_[starts, wires.size]) > rank] + rank
            keys = np.stack([self._colour[wires[rows]], marks[rows]])
            self._colour[wires[rows]] = self._colours + np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
            self._colours = int(self._colour.max()) + 1

    # -- solving -----------------------------------------------------------------------------------------------------

    def _sets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per wire: the root of its set that moves together, the root of its set of one scale, and its power there."""
        together, scale = np.arange(len(self)), np.arange(len(self))
        power = np.ones(len(self), dtype=np.int64)

        def root(parent: np.ndarray, wire: int) -> int:
            while parent[wire] != wire:
                parent[wire] = parent[parent[wire]]
                wire = parent[wire]
            return wire

        def scale_root(wire: int) -> tuple[int, int]:
            sign = 1
            while scale[wire] != wire:
                sign *= power[wire]
                wire = scale[wire]
            return wire, sign

        for first, second, exponent in np.concatenate([*self._ties, np.zeros((3, 0), dtype=np.int64)], axis=1).T:
            a, b = root(together, first), root(together, second)
            together[max(a, b)] = min(a, b)
            if exponent:
                (a, sign_a), (b, sign_b) = scale_root(first), scale_root(second)
                if a == b and sign_a != exponent * sign_b:
                    self.kinds[a] &= SIGN  # s = 1 / s
                elif a != b:
                    scale[max(a, b)], power[max(a, b)] = min(a, b), exponent * sign_a * sign_b
        for wire in range(len(self)):
            top, sign = scale_root(wire)
            scale[wire], power[wire] = top, sign  # roots have the smallest numbers, so this path was short
        return np.array([root(together, wire) for wire in range(len(self))], dtype=np.int64), scale, power

    def classes(self) -> tuple[list[NeuronClass], np.ndarray, np.ndarray]:
        """(classes, scale set of each wire, its power there). Wires of one scale set share a scale, to that power."""
        together, scale, power = self._sets()
        np.bitwise_and.at(self.kinds, scale, self.kinds)
        self.kinds = self.kinds[scale]
        order = np.lexsort((np.arange(len(self)), together))
        sets = np.split(order, np.flatnonzero(np.diff(together[order])) + 1)
        alike: dict[tuple, list[np.ndarray]] = {}
        for wires in sets:
            fixed = bool(self.fixed[wires].any())
            roots = np.unique(scale[wires], return_inverse=True)[1].reshape(-1)
            key = (fixed, *zip(self._colour[wires], self.kinds[wires], roots, power[wires], strict=True))
            if fixed and len(wires) == 1:
                key = (fixed, self.axis[wires[0]])
            alike.setdefault(key, []).append(wires)
        classes = []
        for (fixed, *_), members in alike.items():
            wires = members[0]
            names = tuple("fixed" if fixed and not self.kinds[w] else _NAMES[int(self.kinds[w])] for w in wires)
            classes.append(NeuronClass(np.stack(members), names, tuple(self.place(w) for w in wires)))
        return classes, scale, power


def random_element(
    classes: Sequence[NeuronClass], scale_set: np.ndarray, power: np.ndarray, generator: torch.Generator | None = None
) -> Element:
    """Any permutation within each class, signs, and scales between 1/2 and 2. Deterministic for a seeded generator."""
    count = len(scale_set)
    moved = torch.arange(count)
    log_scale = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
    sign = 1 - 2 * torch.randint(2, (count,), generator=generator).double()
    may_scale, may_flip = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for neurons in classes:
        members = torch.from_numpy(neurons.members)
        if not neurons.is_fixed:
            moved[members] = members[torch.randperm(len(members), generator=generator)]
        for column, symmetry in enumerate(neurons.symmetry):
            may_scale[members[:, column]] = "scale" in symmetry
            may_flip[members[:, column]] = "sign" in symmetry
    roots = torch.from_numpy(scale_set)
    magnitude = torch.exp2(log_scale[roots] * torch.from_numpy(power))
    factor = torch.where(may_scale, magnitude, 1.0) * torch.where(may_flip, sign[roots], 1.0)
    return Element(moved, factor)
