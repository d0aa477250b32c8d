"""Packed datasets of convolutional networks whose architectures may differ, one flat row of numbers per network.

====================  =================  ==============================================================================
array                 shape              meaning
====================  =================  ==============================================================================
``parameters``        [total] float      all networks' numbers, one network after another; of each, layer by layer, the
                                         weight and then the bias, as PyTorch has them
``offset``            [n + 1] int64      where each network begins, and the end of the last
``architecture``      [n] int64          which entry of ``metadata["architectures"]`` describes the network
``label``, ``split``  [n]                as in `scalegmn_fast.data.packed`
any other name        [n, ...]           further numbers per network
====================  =================  ==============================================================================

An architecture is ``{"weights": [shape, ...], "activations": [name, ...] or null, "residuals": [layer, ...] or null}``:
shapes of the weights, [out, in, height, width] or [out, in]; per hidden layer the name of its activation; per hidden
layer the earlier hidden layer that is added to it, or -1.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import packed
from .files import atomic_write
from .packed import SPLITS, PackedDataset

__all__ = ["CnnSet", "PackedCnns", "open_packed", "write_cnns"]

FORMAT = "scalegmn_fast.packed_cnns"
_VERSION = 1
_ARRAYS = ("parameters", "offset", "architecture", "label", "split")
# Of a network whose hidden layers have these alone; linear ones go with either.
_SYMMETRY = {"sign": {"tanh", "none"}, "scale": {"relu", "leaky_relu", "none"}}


@dataclass
class CnnSet:
    """Networks in memory: per network its layers ``(weight, bias)``, as PyTorch has them.

    ``activations[k]``: a name per hidden layer of network k, or None; ``residuals[k]``: per hidden layer the earlier
    one that is added to it, or -1, or None; ``labels`` float [n]; ``splits`` uint8 [n].
    """

    networks: list[list[tuple[torch.Tensor, torch.Tensor]]]
    activations: list[list[str] | None]
    residuals: list[list[int] | None]
    labels: torch.Tensor
    splits: np.ndarray
    metadata: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)


def _symmetry_of(activations: Sequence[str] | None) -> str:
    found = [name for name, known in _SYMMETRY.items() if activations is not None and set(activations) <= known]
    return found[0] if found else "permutation"


def _symmetry(architectures: Sequence[Mapping[str, Any]]) -> str:
    """The symmetry of all networks; ``hetero`` where some have the sign and the others the scale symmetry."""
    found = {_symmetry_of(entry["activations"]) for entry in architectures}
    return found.pop() if len(found) == 1 else "permutation" if "permutation" in found else "hetero"


def write_cnns(path: str | os.PathLike, networks: CnnSet) -> None:
    """Write a packed dataset of CNNs: a .npz if ``path`` ends so, else a .safetensors file; numbers as float32.

    Atomic, and the same networks give the same bytes. Raises ValueError that names the network and the layer: NaN or
    Inf, a bias of another length, activations or residuals of another number than the hidden layers.
    """
    path = Path(path)
    count = len(networks.networks)
    if count == 0:
        raise ValueError(f"{path}: no networks")
    for name in ("activations", "residuals", "labels", "splits"):
        if len(getattr(networks, name)) != count:
            raise ValueError(f"{name}: expected {count} entries, one per network, got {len(getattr(networks, name))}")
    known: dict[str, int] = {}
    rows, numbers, offsets = [], [], [0]
    for index, layers in enumerate(networks.networks):
        for layer, (weight, bias) in enumerate(layers):
            if weight.ndim not in (2, 4) or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"network {index}, layer {layer}: expected a weight [out, in] or [out, in, height, width] and a "
                    f"bias [out], got {list(weight.shape)} and {list(bias.shape)}"
                )
            for kind, value in (("weight", weight), ("bias", bias)):
                if not bool(torch.isfinite(value).all()):
                    what = "NaN" if bool(torch.isnan(value).any()) else "Inf"
                    raise ValueError(
                        f"network {index} holds {what} in the {kind} of layer {layer}; nothing was written"
                    )
        entry = {
            "weights": [list(weight.shape) for weight, _ in layers],
            "activations": networks.activations[index],
            "residuals": networks.residuals[index],
        }
        for name in ("activations", "residuals"):
            if entry[name] is not None and len(entry[name]) != len(layers) - 1:
                raise ValueError(
                    f"network {index}: {name} must have one entry per hidden layer, {len(layers) - 1}, "
                    f"got {len(entry[name])}"
                )
        numbers += [value.detach().to(torch.float32).reshape(-1) for layer in layers for value in layer]
        offsets.append(offsets[-1] + sum(weight.numel() + bias.numel() for weight, bias in layers))
        rows.append(known.setdefault(json.dumps(entry), len(known)))
    splits = torch.as_tensor(networks.splits)
    packed._check_split_values(splits, "splits")
    labels = torch.as_tensor(networks.labels)
    arrays = {
        "parameters": torch.cat(numbers),
        "offset": torch.tensor(offsets),
        "architecture": torch.tensor(rows),
        "label": labels.to(torch.float32 if labels.is_floating_point() else torch.int64),
        "split": splits.to(torch.uint8),
        **{name: torch.as_tensor(value) for name, value in networks.extras.items()},
    }
    bad = packed._first_not_finite(arrays["label"])
    if bad is not None:
        raise ValueError(f"network {bad} has a label that is not finite; nothing was written")
    architectures = [json.loads(text) for text in known]
    metadata = {**networks.metadata, "architectures": architectures, "symmetry": _symmetry(architectures)}
    encoded = {key: json.dumps(value) for key, value in {"format": FORMAT, "version": _VERSION, **metadata}.items()}
    with atomic_write(path) as handle:
        (packed._write_npz if path.suffix == ".npz" else packed._write_safetensors)(handle, arrays, encoded)


class PackedCnns:
    """A packed dataset of CNNs, memory-mapped; see the module for the file.

    ``len(ds)``; ``ds.labels``, ``ds.splits``, ``ds.split(name)``, ``ds.metadata``, ``ds.extra(name)`` as for
    `PackedDataset`. ``ds.layout``: the channels and neurons per layer that all networks have, None where they differ;
    ``ds.ends``: input channels and outputs of every network; ``ds.hidden_layers``: of the deepest; ``ds.kernel_size``:
    of the largest. ``batch`` makes graphs with `scalegmn_fast.graph.from_cnns`; `as_read` sets how.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong in it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._open()
        self._options: dict[str, Any] = {"kernel_size": None, "linear_as_conv": True, "flattening_method": None}

    def _open(self) -> None:
        arrays, raw = packed._map_file(self.path)
        metadata = packed._decode_metadata(raw)
        where = str(self.path)
        if metadata.get("format") != FORMAT or metadata.get("version") != _VERSION:
            raise ValueError(
                f"{where}: expected format {FORMAT!r} {_VERSION}, got {metadata.get('format')!r} "
                f"{metadata.get('version')!r}"
            )
        missing = [name for name in _ARRAYS if name not in arrays] + ["architectures"] * (
            "architectures" not in metadata
        )
        if missing:
            raise ValueError(f"{where}: not a packed dataset of CNNs: it lacks {missing[0]}")
        self.metadata = {k: v for k, v in metadata.items() if k not in ("format", "version", "architectures")}
        self.architectures: list[dict[str, Any]] = metadata["architectures"]
        self._parameters = arrays["parameters"]
        self.labels, self.splits, self._rows, self._offsets = (
            arrays[name].read(slice(None)) for name in ("label", "split", "architecture", "offset")
        )
        self._arrays = {name: array for name, array in arrays.items() if name not in _ARRAYS}
        self.extras = tuple(self._arrays)
        packed._check_split_values(self.splits, where)
        count = len(self.labels)
        sizes = [_count(entry) for entry in self.architectures]
        if len(self.splits) != count or len(self._rows) != count or len(self._offsets) != count + 1 or count == 0:
            raise ValueError(f"{where}: label, split, architecture and offset must be of [n], [n], [n] and [n + 1]")
        if int(self._rows.min()) < 0 or int(self._rows.max()) >= len(sizes):
            raise ValueError(f"{where}: architecture must be from 0 to {len(sizes) - 1}")
        wrong = (self._offsets.diff() != torch.tensor(sizes)[self._rows]).nonzero()
        if len(wrong) or int(self._offsets[0]) or int(self._offsets[-1]) != self._parameters.shape[0]:
            network = int(wrong[0]) if len(wrong) else count - 1
            raise ValueError(f"{where}: offset does not fit the architecture of network {network}")
        layouts = {_layout(entry) for entry in self.architectures}
        self.layout = layouts.pop() if len(layouts) == 1 else None
        ends = {(_layout(entry)[0], _layout(entry)[-1]) for entry in self.architectures}
        if len(ends) > 1:
            raise ValueError(f"{where}: networks must have the same inputs and outputs, got {sorted(ends)}")
        self.ends = ends.pop()
        self.hidden_layers = max(len(entry["weights"]) - 1 for entry in self.architectures)
        shapes = [shape[2:] for entry in self.architectures for shape in entry["weights"] if len(shape) == 4]
        self.kernel_size = tuple(max((shape[axis] for shape in shapes), default=1) for axis in (0, 1))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.splits == k).sum())} {name}" for k, name in enumerate(SPLITS))
        return f"PackedCnns({str(self.path)!r}: {len(self)} CNNs, {len(self.architectures)} architectures; {counts})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def edge_dim(self) -> int:
        """Numbers per weight in a batch."""
        return math.prod(self._options["kernel_size"] or self.kernel_size)

    def as_read(
        self,
        *,
        kernel_size: tuple[int, int] | None = None,
        linear_as_conv: bool = True,
        flattening_method: str | None = None,
    ) -> PackedCnns:
        """The same networks, with `from_cnns`' arguments for batches; by default kernels are padded to the largest."""
        result = copy.copy(self)
        result._options = {
            "kernel_size": kernel_size, "linear_as_conv": linear_as_conv, "flattening_method": flattening_method,
        }  # fmt: skip
        return result

    split = PackedDataset.split
    _indices = PackedDataset._indices
    extra = PackedDataset.extra

    def rows(self, indices) -> torch.Tensor:
        """int64 [b]: the entry of ``architectures`` of each of the networks ``indices``."""
        return self._rows[self._indices(indices)]

    def parameters(self, index: int) -> torch.Tensor:
        """All numbers of a network, float32 [p], in fresh memory."""
        return self._parameters.read(slice(int(self._offsets[index]), int(self._offsets[index + 1]))).float()

    def layers(self, index: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """``(weight, bias)`` per layer of a network, as PyTorch has them, float32."""
        shapes = [s for w in self.architectures[int(self._rows[index])]["weights"] for s in (w, w[:1])]
        pieces = self.parameters(index).split([math.prod(shape) for shape in shapes])
        values = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return list(zip(values[::2], values[1::2], strict=True))

    def weights(self, indices) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """All weights and all biases of the networks ``indices``, network by network and layer by layer."""
        layers = [layer for index in self._list(indices) for layer in self.layers(index)]
        return [weight for weight, _ in layers], [bias for _, bias in layers]

    def _list(self, indices) -> list[int]:
        selected = self._indices(indices)
        return (torch.arange(len(self))[selected] if isinstance(selected, slice) else selected).tolist()

    def batch(self, indices, statistics=None):
        """``(GraphBatch, labels)`` of the networks ``indices``, in their order.

        ``statistics``: a `LayerStatistics` of one number per layer that normalises weights and biases first. The
        batch has ``architectures``, and where the sign and the scale symmetry both occur a ``sign_mask``.
        """
        from scalegmn_fast.graph import from_cnns

        selected = self._list(indices)
        states = []
        for index in selected:
            layers = self.layers(index)
            if statistics is not None:
                layers = statistics.normalize_layers(layers)
            states.append(
                {f"{k}.{kind}": v for k, pair in enumerate(layers) for kind, v in zip(_KINDS, pair, strict=True)}
            )
        entries = [self.architectures[int(self._rows[index])] for index in selected]
        activations = [entry["activations"] for entry in entries]
        residuals = [entry["residuals"] or [-1] * (len(entry["weights"]) - 1) for entry in entries]
        graph = from_cnns(
            states,
            activations=None if None in activations else activations,
            residual_connections=residuals,
            **{**self._options, "kernel_size": self._options["kernel_size"] or self.kernel_size},
        )
        if self.metadata.get("symmetry") == "hetero":
            signs = torch.tensor([_symmetry_of(names) == "sign" for names in activations])
            graph.sign_mask = signs[graph.plan.index("node_graph")]
        return graph, self.labels[selected]

    def validate(self) -> None:
        """Read the whole file and raise ValueError naming the first network that holds NaN or Inf."""
        for index in range(len(self)):
            values = self.parameters(index)
            if packed._first_not_finite(values.unsqueeze(0)) is not None:
                raise ValueError(f"{self.path}: network {index} holds {packed._describe_not_finite(values)}")


_KINDS = ("weight", "bias")


def _count(entry: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) + shape[0] for shape in entry["weights"])


def _layout(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return (entry["weights"][0][1], *(shape[0] for shape in entry["weights"]))


def open_packed(path: str | os.PathLike) -> PackedDataset | PackedCnns:
    """Opens a packed dataset of either kind, as its metadata say."""
    _, metadata = packed._map_file(Path(path))
    is_cnns = packed._decode_metadata(metadata).get("format") == FORMAT
    return PackedCnns(path) if is_cnns else PackedDataset(path)
