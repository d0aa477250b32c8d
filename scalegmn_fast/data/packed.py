"""Packed datasets: all networks of a data set in one file, layer by layer, memory-mapped, read in whole batches.

One file holds n networks of one layout ``(n_0, ..., n_L)``:

====================  ==================================  =============================================================
array                 shape                               meaning
====================  ==================================  =============================================================
``weights.l``         [n, n_l, n_{l+1}, d_e] float        weights from layer l to layer l + 1, source neuron first
``biases.l``          [n, n_{l+1}, 1] float               biases of layer l + 1
``label``             [n] int64 or float32                class, or a number to predict
``split``             [n] uint8                           0 train, 1 val, 2 test
``sign_mask``         [n] or [n, neurons] bool, optional  True where a network (or neuron) has the sign symmetry
``target``            [n, height, width, channels] uint8  for training editors: the image that the edited network is
                      or float, optional                  to stand for; uint8 stands for value / 255
any other name        [n, ...]                            further numbers per network, such as ``psnr``
====================  ==================================  =============================================================

The file is a .safetensors file, or an uncompressed .npz; which one is read off its first bytes. Metadata are JSON
values: in the safetensors header one string per key, in the .npz one string array called ``__metadata__``.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import atomic_write

__all__ = ["SPLITS", "PackedDataset", "write_packed"]

SPLITS = ("train", "val", "test")
_VERSION = 1
_FORMAT = "scalegmn_fast.packed"
_RESERVED_METADATA = ("format", "version")
_CHUNK_BYTES = 1 << 25

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
_NUMPY_DTYPES = {
    np.dtype(name): getattr(torch, name)
    for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}


class _Array:
    """One array of a file as rows of raw bytes, so that neither its alignment in the file nor its dtype matter."""

    def __init__(self, data: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]):
        self.dtype = dtype
        self.shape = shape
        rows = shape[0] if shape else 1
        self._rows = data.reshape(rows, data.size // rows if rows else 0)

    def read(self, indices: slice | torch.Tensor) -> torch.Tensor:
        """The rows ``indices``, copied out of the file."""
        rows = self._rows[indices].copy() if isinstance(indices, slice) else self._rows.take(indices.numpy(), axis=0)
        return torch.from_numpy(rows).view(-1).view(self.dtype).view(rows.shape[0], *self.shape[1:])


def _map_safetensors(path: Path) -> tuple[dict[str, _Array], dict[str, str]]:
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path}: not a packed dataset: {size} bytes, too few for the header of a safetensors file")
    with open(path, "rb") as handle:
        header_size = int.from_bytes(handle.read(8), "little")
        if header_size > 100_000_000:
            raise ValueError(f"{path}: not a packed dataset: neither a safetensors nor an .npz file")
        if 8 + header_size > size:
            raise ValueError(f"{path}: truncated: the header alone takes {8 + header_size} bytes, the file has {size}")
        try:
            header = json.loads(handle.read(header_size))
        except ValueError as error:
            raise ValueError(f"{path}: not a packed dataset: its header is not that of a safetensors file") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a packed dataset: its header is not that of a safetensors file")
    metadata = header.pop("__metadata__", {})
    try:
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        entries = {
            name: (entry["dtype"], tuple(int(s) for s in entry["shape"]), *(int(o) for o in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a packed dataset: its header is not that of a safetensors file") from error
    start = 8 + header_size
    if start + end != size:
        problem = "truncated" if start + end > size else "longer than its header says"
        raise ValueError(f"{path}: {problem}: {start + end} bytes expected, the file has {size}")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    arrays = {}
    for name, (dtype_name, shape, first, last) in entries.items():
        if dtype_name not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {dtype_name}, which no packed dataset holds")
        dtype = _SAFETENSORS_DTYPES[dtype_name]
        if not 0 <= first <= last or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} of shape {list(shape)} does not fit its {last - first} bytes")
        arrays[name] = _Array(mapped[start + first : start + last], dtype, shape)
    return arrays, metadata


def _map_npz(path: Path) -> tuple[dict[str, _Array], dict[str, str]]:
    """Members stored without compression are mapped; compressed ones are read into memory."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated, or not an .npz file: {error}") from error
    arrays: dict[str, _Array] = {}
    metadata: dict[str, str] = {}
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    with archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise ValueError(f"{path}: not a packed dataset: it holds {member.filename!r}, which is not an array")
            try:
                with archive.open(member) as handle:
                    major, _ = np.lib.format.read_magic(handle)
                    read_header = (
                        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, dtype = read_header(handle)
                    header_size = handle.tell()
                if name == "__metadata__":
                    with archive.open(member) as handle:
                        metadata = json.loads(str(np.lib.format.read_array(handle, allow_pickle=False)))
                    continue
                if dtype not in _NUMPY_DTYPES or fortran:
                    kind = "Fortran order" if fortran else f"dtype {dtype}"
                    raise ValueError(f"{path}: {name} has {kind}, which no packed dataset holds")
                if member.compress_type == zipfile.ZIP_STORED:
                    # The local header's name and extra field may differ in length from the central directory's.
                    local = mapped[member.header_offset + 26 : member.header_offset + 30].view("<u2")
                    start = member.header_offset + 30 + int(local[0]) + int(local[1])
                    data = mapped[start + header_size : start + member.file_size]
                else:
                    with archive.open(member) as handle:
                        handle.seek(header_size)
                        data = np.frombuffer(bytearray(handle.read()), np.uint8)
            except (zipfile.BadZipFile, EOFError, IndexError) as error:
                raise ValueError(f"{path}: {name} is damaged: {error}") from error
            expected = math.prod(shape) * dtype.itemsize
            if data.size != expected:
                raise ValueError(f"{path}: truncated: {name} needs {expected} bytes and has {data.size}")
            arrays[name] = _Array(data, _NUMPY_DTYPES[dtype], shape)
    return arrays, metadata


def _map_file(path: Path) -> tuple[dict[str, _Array], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no packed dataset at {path}")
    with open(path, "rb") as handle:
        magic = handle.read(4)
    return _map_npz(path) if magic == b"PK\x03\x04" else _map_safetensors(path)


def _decode_metadata(raw: Mapping[str, str]) -> dict[str, Any]:
    """JSON values; a string that is not JSON (written by another program) stands for itself."""
    metadata = {}
    for key, value in raw.items():
        try:
            metadata[key] = json.loads(value)
        except ValueError:
            metadata[key] = value
    return metadata


def _layout(
    weight_shapes: Sequence[tuple[int, ...]], bias_shapes: Sequence[tuple[int, ...]], where: str
) -> tuple[int, ...]:
    """Layer sizes, after checking that the shapes of all layers belong together."""
    if not weight_shapes or len(weight_shapes) != len(bias_shapes):
        raise ValueError(
            f"{where}: expected as many arrays of weights as of biases and at least one, "
            f"got {len(weight_shapes)} and {len(bias_shapes)}"
        )
    n = weight_shapes[0][0] if weight_shapes[0] else 0
    layout: list[int] = []
    for layer, (weight, bias) in enumerate(zip(weight_shapes, bias_shapes, strict=True)):
        if len(weight) != 4:
            raise ValueError(f"{where}: weights.{layer} must be [n, n_in, n_out, d_e], got shape {list(weight)}")
        if weight[3] != weight_shapes[0][3]:
            raise ValueError(f"{where}: weights.{layer} has d_e = {weight[3]}, weights.0 has {weight_shapes[0][3]}")
        if layout and weight[1] != layout[-1]:
            raise ValueError(
                f"{where}: weights.{layer} has {weight[1]} inputs, the layer before has {layout[-1]} neurons"
            )
        if weight[0] != n:
            raise ValueError(f"{where}: weights.{layer} holds {weight[0]} networks, weights.0 holds {n}")
        if tuple(bias) != (n, weight[2], 1):
            raise ValueError(f"{where}: biases.{layer} must be {[n, weight[2], 1]}, got shape {list(bias)}")
        layout = layout or [weight[1]]
        layout.append(weight[2])
    if n == 0 or 0 in layout or weight_shapes[0][3] == 0:
        raise ValueError(f"{where}: no networks or an empty layer: weights.0 has shape {list(weight_shapes[0])}")
    return tuple(layout)


def _check_per_network(name: str, dtype: torch.dtype, shape: Sequence[int], n: int, neurons: int, where: str) -> None:
    if name == "label":
        allowed, shapes = (torch.int64, torch.float32), [(n,)]
    elif name == "split":
        allowed, shapes = (torch.uint8,), [(n,)]
    elif name == "sign_mask":
        allowed, shapes = (torch.bool,), [(n,), (n, neurons)]
    else:
        allowed, shapes = (dtype,), [(n, *shape[1:])]
    if tuple(shape) not in shapes:
        expected = " or ".join(str(list(s)) for s in shapes)
        raise ValueError(f"{where}: {name} must have shape {expected}, got {list(shape)}")
    if dtype not in allowed:
        expected = " or ".join(str(d) for d in allowed)
        raise ValueError(f"{where}: {name} must be {expected}, got {dtype}")


def _check_split_values(split: torch.Tensor, where: str) -> None:
    wrong = ((split < 0) | (split >= len(SPLITS))).nonzero()
    if len(wrong):
        index = int(wrong[0, 0])
        raise ValueError(
            f"{where}: split must be 0 (train), 1 (val) or 2 (test), got {int(split[index])} at network {index}"
        )


def _first_not_finite(rows: torch.Tensor) -> int | None:
    """Index of the first row that holds NaN or Inf."""
    if not rows.is_floating_point() or bool(torch.isfinite(rows.sum())):
        # A finite sum proves that every term is finite; the reverse does not hold, so only then look row by row.
        return None
    bad = (~torch.isfinite(rows.reshape(rows.shape[0], -1))).any(1).nonzero()
    return int(bad[0]) if len(bad) else None


def _describe_not_finite(values: torch.Tensor) -> str:
    return "NaN" if bool(torch.isnan(values).any()) else "Inf"


class PackedDataset:
    """A packed dataset, memory-mapped: opening reads the header, the labels and the splits, not the networks.

    ``path`` is a .safetensors or .npz file written by `write_packed`. Raises FileNotFoundError where there is
    none, ValueError that names the file and the array for truncated or foreign files and inconsistent shapes. NaN and
    Inf in the networks are found by `validate`, which reads the whole file (and by `write_packed`, which
    writes none).

    ``len(ds)``; ``ds.layout``: layer sizes ``(n_0, ..., n_L)``; ``ds.metadata``: dict; ``ds.labels``: int64 [n] or
    float32 [n]; ``ds.splits``: uint8 [n]; ``ds.extras``: names of the further arrays, read with `extra`.
    Instances can be pickled (each process maps the file anew) and read from several threads at once.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        arrays, raw_metadata = _map_file(self.path)
        metadata = _decode_metadata(raw_metadata)
        where = str(self.path)
        if metadata.get("format", _FORMAT) != _FORMAT:
            raise ValueError(f"{where}: not a packed dataset: its format is {metadata['format']!r}, not {_FORMAT!r}")
        if metadata.get("version", _VERSION) != _VERSION:
            raise ValueError(f"{where}: packed format {metadata['version']}, this version reads {_VERSION}")
        self.metadata: dict[str, Any] = {k: v for k, v in metadata.items() if k not in _RESERVED_METADATA}

        depth = max(1, *(sum(name.startswith(kind) for name in arrays) for kind in ("weights.", "biases.")))

        def layers(kind: str) -> list[_Array]:
            names = [f"{kind}.{layer}" for layer in range(depth)]
            for name in names:
                if name not in arrays:
                    raise ValueError(f"{where}: not a packed dataset: it lacks {name}")
                if not arrays[name].dtype.is_floating_point:
                    raise ValueError(f"{where}: {name} must hold floating-point numbers, got {arrays[name].dtype}")
            return [arrays[name] for name in names]

        self._weights, self._biases = layers("weights"), layers("biases")
        self.layout = _layout([w.shape for w in self._weights], [b.shape for b in self._biases], where)
        self.edge_dim = self._weights[0].shape[3]
        self._length = self._weights[0].shape[0]
        self._arrays = {k: a for k, a in arrays.items() if not k.startswith(("weights.", "biases."))}
        for name in ("label", "split"):
            if name not in self._arrays:
                raise ValueError(f"{where}: not a packed dataset: it lacks {name}")
        for name, array in self._arrays.items():
            _check_per_network(name, array.dtype, array.shape, len(self), sum(self.layout), where)
        self.labels = self._arrays["label"].read(slice(None))
        self.splits = self._arrays["split"].read(slice(None))
        _check_split_values(self.splits, where)
        self.extras = tuple(name for name in self._arrays if name not in ("label", "split", "sign_mask"))
        self.gives_targets = False

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        counts = ", ".join(f"{int((self.splits == k).sum())} {name}" for k, name in enumerate(SPLITS))
        return f"PackedDataset({str(self.path)!r}: {len(self)} networks {'-'.join(map(str, self.layout))}; {counts})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "gives_targets": self.gives_targets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])
        self.gives_targets = state["gives_targets"]

    @property
    def hidden_layers(self) -> int:
        """Of every network."""
        return len(self.layout) - 2

    def split(self, name: str) -> torch.Tensor:
        """Indices, int64 and ascending, of the networks of the split ``"train"``, ``"val"`` or ``"test"``."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        return (self.splits == SPLITS.index(name)).nonzero().squeeze(1)

    def _indices(self, indices: slice | torch.Tensor | np.ndarray | Sequence[int]) -> slice | torch.Tensor:
        if isinstance(indices, slice):
            start, stop, step = indices.indices(len(self))
            return indices if step > 0 else torch.arange(start, stop, step)
        selected = torch.as_tensor(indices)
        if selected.dtype == torch.bool:
            if selected.shape != (len(self),):
                raise IndexError(f"a mask must have shape [{len(self)}], got {list(selected.shape)}")
            return selected.nonzero().squeeze(1)
        if selected.numel() == 0:
            return torch.zeros(0, dtype=torch.int64)
        if selected.dtype not in (torch.int64, torch.int32) or selected.ndim != 1:
            raise TypeError(f"indices must be a slice or int64 [b], got {selected.dtype} {list(selected.shape)}")
        low, high = int(selected.min()), int(selected.max())
        if low < 0 or high >= len(self):
            raise IndexError(f"index {low if low < 0 else high} is out of range for {len(self)} networks")
        return selected.to(torch.int64)

    def weights(
        self, indices: slice | torch.Tensor | np.ndarray | Sequence[int], dtype: torch.dtype | None = torch.float32
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The networks ``indices``: weights, a list of [b, n_in, n_out, d_e], and biases, a list of [b, n_out, 1].

        In ``dtype`` (None: as stored), in fresh memory, one copy per layer whatever the number of networks.
        ``indices`` is a slice, integers [b] in any order, repeats allowed, or a mask bool [n]; IndexError where one is
        out of range.
        """
        selected = self._indices(indices)
        weights, biases = (
            [array.read(selected).to(dtype or array.dtype) for array in layers]
            for layers in (self._weights, self._biases)
        )
        return weights, biases

    def sign_mask(
        self, indices: slice | torch.Tensor | np.ndarray | Sequence[int] = slice(None)
    ) -> torch.Tensor | None:
        """bool [b] or [b, neurons], or None where the file has none."""
        return self._arrays["sign_mask"].read(self._indices(indices)) if "sign_mask" in self._arrays else None

    def extra(
        self, name: str, indices: slice | torch.Tensor | np.ndarray | Sequence[int] = slice(None)
    ) -> torch.Tensor:
        """The further array ``name`` of the networks ``indices``, in its stored dtype; KeyError where there is none."""
        if name not in self.extras:
            raise KeyError(f"{self.path} has no array {name!r}; it has {', '.join(self.extras) or 'none'}")
        return self._arrays[name].read(self._indices(indices))

    def targets(self, indices: slice | torch.Tensor | np.ndarray | Sequence[int] = slice(None)) -> torch.Tensor:
        """The target images of the networks ``indices``: float32 [b, height, width, channels].

        Raises ValueError where the file has none, or none of that shape.
        """
        if "target" not in self.extras:
            raise ValueError(f"{self.path} has no target images; scalegmn-fast targets adds them")
        array = self._arrays["target"]
        if len(array.shape) != 4 or not (array.dtype == torch.uint8 or array.dtype.is_floating_point):
            raise ValueError(
                f"{self.path}: target must be uint8 or float [n, height, width, channels], "
                f"got {array.dtype} {list(array.shape)}"
            )
        found = array.read(self._indices(indices))
        return found.float() / 255 if found.dtype == torch.uint8 else found.float()

    def with_targets(self) -> PackedDataset:
        """The same networks; their `batch` gives target images in the place of labels."""
        self.targets(slice(0, 0))
        result = copy.copy(self)
        result.gives_targets = True
        return result

    def batch(self, indices: slice | torch.Tensor | np.ndarray | Sequence[int], statistics=None):
        """``(GraphBatch, labels)`` of the networks ``indices``; of `with_targets` ``(GraphBatch, targets)``.

        ``statistics`` is a `LayerStatistics` that normalises weights and biases first. Input neurons get
        ``metadata["input_value"]`` (1 where it is not given).
        """
        from scalegmn_fast.graph import GraphBatch

        selected = self._indices(indices)
        weights, biases = self.weights(selected)
        if statistics is not None:
            weights, biases = statistics.normalize(weights, biases)
        graph = GraphBatch.from_weights(
            weights,
            biases,
            input_value=float(self.metadata.get("input_value", 1.0)),
            sign_mask=self.sign_mask(selected),
        )
        return graph, self.targets(selected) if self.gives_targets else self.labels[selected]

    def validate(self) -> None:
        """Read the whole file and raise ValueError naming the first network and layer that holds NaN or Inf."""
        named = [(f"weights.{layer}", array) for layer, array in enumerate(self._weights)]
        named += [(f"biases.{layer}", array) for layer, array in enumerate(self._biases)]
        named += [("label", self._arrays["label"])]
        for name, array in named:
            step = max(1, _CHUNK_BYTES // (math.prod(array.shape[1:]) * array.dtype.itemsize))
            for start in range(0, len(self), step):
                rows = array.read(slice(start, start + step))
                bad = _first_not_finite(rows)
                if bad is not None:
                    raise ValueError(
                        f"{self.path}: network {start + bad} holds {_describe_not_finite(rows[bad])} in {name}"
                    )


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array of numbers: {error}") from error


def _split_codes(splits: Any, n: int) -> torch.Tensor:
    if not isinstance(splits, Mapping):
        codes = _as_tensor("splits", splits)
        if codes.dtype not in (torch.int16, torch.int32, torch.int64):
            return codes
        _check_split_values(codes, "splits")
        return codes.to(torch.uint8)
    codes = torch.full((n,), 255, dtype=torch.uint8)
    for name, indices in splits.items():
        if name not in SPLITS:
            raise ValueError(f"splits: unknown split {name!r}; expected {', '.join(SPLITS)}")
        selected = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        outside = selected[(selected < 0) | (selected >= n)]
        if len(outside):
            raise ValueError(f"splits: {name} holds index {int(outside[0])}, but there are {n} networks")
        taken = selected[codes[selected] != 255]
        if len(taken):
            other = SPLITS[int(codes[taken[0]])]
            raise ValueError(f"splits: network {int(taken[0])} is in both {other} and {name}")
        codes[selected] = SPLITS.index(name)
    missing = (codes == 255).nonzero()
    if len(missing):
        raise ValueError(f"splits: network {int(missing[0])} is in no split")
    return codes


def write_packed(
    path: str | os.PathLike,
    weights: Sequence[torch.Tensor | np.ndarray],
    biases: Sequence[torch.Tensor | np.ndarray],
    labels: torch.Tensor | np.ndarray | Sequence[float],
    splits: torch.Tensor | np.ndarray | Mapping[str, Sequence[int]],
    metadata: Mapping[str, Any],
    sign_mask: torch.Tensor | np.ndarray | None = None,
    *,
    extras: Mapping[str, torch.Tensor | np.ndarray] | None = None,
) -> None:
    """Write a packed dataset: a .npz if ``path`` ends so, else a .safetensors file.

    ``weights[l]`` [n, n_in, n_out, d_e] or [n, n_in, n_out]; ``biases[l]`` [n, n_out, 1] or [n, n_out]; float16,
    bfloat16 and float32 are kept (a .npz holds bfloat16 as float32), other dtypes become float32. ``labels`` [n]:
    integers are stored as int64, floats as float32. ``splits``: uint8 [n] with 0 train, 1 val, 2 test, or a dict of
    split name to indices. ``metadata``: JSON values. ``sign_mask``: bool [n] or [n, neurons]. ``extras``: arrays [n,
    ...].

    Atomic: ``path`` appears complete or not at all. The same arguments give the same bytes. Raises ValueError that
    names the argument, or, for NaN and Inf, the network and the layer; then nothing is written.
    """
    path = Path(path)
    npz = path.suffix == ".npz"
    arrays: dict[str, torch.Tensor] = {}
    for kind, layers, ndim in (("weights", weights, 4), ("biases", biases, 3)):
        for layer, value in enumerate(layers):
            tensor = _as_tensor(f"{kind}[{layer}]", value)
            if tensor.ndim == ndim - 1:
                tensor = tensor.unsqueeze(-1)
            keep = (torch.float16, torch.float32) if npz else (torch.float16, torch.bfloat16, torch.float32)
            arrays[f"{kind}.{layer}"] = tensor if tensor.dtype in keep else tensor.to(torch.float32)
    shapes = {name: tuple(tensor.shape) for name, tensor in arrays.items()}
    where = str(path)
    layout = _layout(
        [shapes[f"weights.{layer}"] for layer in range(len(weights))],
        [shapes[f"biases.{layer}"] for layer in range(len(biases))],
        where,
    )
    n = shapes["weights.0"][0]
    label = _as_tensor("labels", labels)
    arrays["label"] = label.to(torch.float32 if label.is_floating_point() else torch.int64)
    codes = _split_codes(splits, n)
    arrays["split"] = codes
    if sign_mask is not None:
        arrays["sign_mask"] = _as_tensor("sign_mask", sign_mask)
    for name, value in (extras or {}).items():
        if name in arrays or name == "__metadata__" or name.startswith(("weights.", "biases.")):
            raise ValueError(f"extras: {name!r} is the name of another array of the file")
        arrays[name] = _as_tensor(f"extras[{name!r}]", value)
        if arrays[name].dtype not in _SAFETENSORS_NAMES:
            raise ValueError(f"extras[{name!r}]: dtype {arrays[name].dtype} is not supported")
    for name, tensor in arrays.items():
        if not name.startswith(("weights.", "biases.")):
            _check_per_network(name, tensor.dtype, tensor.shape, n, sum(layout), where)
    _check_split_values(codes, where)
    for name, tensor in arrays.items():
        if name in ("label",) or name.startswith(("weights.", "biases.")):
            bad = _first_not_finite(tensor)
            if bad is not None:
                raise ValueError(
                    f"network {bad} holds {_describe_not_finite(tensor[bad])} in {name}; nothing was written"
                )

    reserved = [key for key in metadata if key in _RESERVED_METADATA]
    if reserved:
        raise ValueError(f"metadata: the key {reserved[0]!r} is reserved")
    encoded = {"format": json.dumps(_FORMAT), "version": json.dumps(_VERSION)}
    for key, value in metadata.items():
        try:
            encoded[str(key)] = json.dumps(value)
        except TypeError as error:
            raise ValueError(f"metadata: {key!r} is not a JSON value: {error}") from error

    with atomic_write(path) as handle:
        (_write_npz if npz else _write_safetensors)(handle, arrays, encoded)


def _write_safetensors(handle, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    # Wide items first keeps every array aligned to its item size.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in names:
        tensor = arrays[name]
        size = tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)
    handle.write(len(encoded).to_bytes(8, "little"))
    handle.write(encoded)
    for name in names:
        handle.write(arrays[name].contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_npz(handle, arrays: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    members: dict[str, np.ndarray] = {"__metadata__": np.array(json.dumps(dict(metadata)))}
    members |= {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
        for name, tensor in arrays.items()
    }
    with zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED) as archive:
        for name, array in members.items():
            # The fixed date makes the bytes of the file a function of its contents.
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            member.file_size = len(header.getvalue()) + array.nbytes
            with archive.open(member, "w") as stream:
                stream.write(header.getvalue())
                stream.write(array.reshape(-1).view(np.uint8).data if array.dtype.kind != "U" else array.tobytes())
