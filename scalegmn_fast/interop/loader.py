"""The originals' datasets read once and packed: a batch is a few gathers instead of one graph built per network."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data.optional import require
from ..graph.pyg import STRUCTURE

_CHUNK = 256


def loader(dataset: Sized, batch_size: int = 1, shuffle: bool = False, *, workers: int = 0, **options) -> DataLoader:
    """A DataLoader over a dataset object of either original, in the place of the script's own.

    All items are read once, here, and packed into one tensor per attribute. Batches are what the script's loader gives:
    PyG batches with all attributes of the items (``label``, ``y``, masks, types), named tuples of stacked tensors, and
    lists of both. The order of shuffled items is that of a DataLoader with the same seed.

    PyG items with the same structure and no attributes but tensors and numbers are packed; others (networks of varying
    architectures) are kept as they are and collated by PyG, batch by batch.

    Args:
        dataset: has a length and items; each a PyG ``Data``, a (named) tuple, a tensor or a number, or tuples of these.
        batch_size, shuffle, options: as for `torch.utils.data.DataLoader`; its workers are not needed any more.
        workers: processes that read the items.

    Raises:
        TypeError: a dataset without a length.
        ValueError: an empty dataset, one that augments its items at random (they would be frozen), or items that cannot
            be stacked.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset must have a length and items, got {type(dataset).__name__}")
    for name in ("augmentation", "permutation"):
        if getattr(dataset, name, False):
            raise ValueError(f"dataset must not change its items at random to be packed, got {name}=True")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one item, got none")
    reader = DataLoader(dataset, batch_size=_CHUNK, num_workers=workers, collate_fn=list)
    packed = PackedItems([item for chunk in reader for item in chunk])
    return DataLoader(packed, batch_size, shuffle, collate_fn=_as_it_is, **options)


class PackedItems(Dataset):
    """Items in packed columns; ``packed[index]`` and ``packed.__getitems__(indices)`` give batches."""

    def __init__(self, items: Sequence[Any]):
        self._count, self._column = len(items), _column("item", items)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]):
        return self._column.take(torch.as_tensor(indices))


def _as_it_is(batch):
    return batch


def _column(name: str, items: Sequence[Any]):
    first = items[0]
    if isinstance(first, Tensor):
        shapes = {tuple(item.shape) for item in items}
        if len(shapes) > 1:
            raise ValueError(f"{name} must have one shape to be stacked, got {sorted(shapes)[:3]}")
        return _Tensors(torch.stack(list(items)))
    if isinstance(first, bool | int | float):
        return _Tensors(torch.tensor(items))
    if isinstance(first, tuple | list) and first:
        return _Tuples(name, items)
    if hasattr(first, "edge_index") and hasattr(first, "to_dict"):
        return _graphs(items)
    return _Objects(items)


class _Tensors:
    def __init__(self, stacked: Tensor):
        self.stacked = stacked

    def take(self, index: Tensor) -> Tensor:
        return self.stacked[index]


class _Objects:
    def __init__(self, items: Sequence[Any]):
        self.items = list(items)

    def take(self, index: Tensor) -> list:
        return [self.items[k] for k in index.tolist()]


class _Tuples:
    """Tuples field by field. Named ones keep their class, others become lists, as in PyG's and PyTorch's loaders."""

    def __init__(self, name: str, items: Sequence[tuple]):
        self.make = type(items[0])
        fields = getattr(self.make, "_fields", range(len(items[0])))
        by_field = zip(fields, zip(*items, strict=True), strict=True)
        self.columns = [_column(f"{name}.{field}", column) for field, column in by_field]

    def take(self, index: Tensor):
        values = [column.take(index) for column in self.columns]
        return self.make(*values) if hasattr(self.make, "_fields") else values


def _graphs(items: Sequence[Any]):
    fields = [item.to_dict() for item in items]
    first = fields[0]
    shared = {name: value for name, value in first.items() if name in STRUCTURE}
    for other in fields:
        same_fields = other.keys() == first.keys()
        if not same_fields or not all(isinstance(v, Tensor | bool | int | float) for v in other.values()):
            return _Collated(items)
        if not all(torch.equal(other[name], value) for name, value in shared.items()):
            return _Collated(items)
        if any(other[name].shape != value.shape for name, value in first.items() if isinstance(value, Tensor)):
            return _Collated(items)
    return _Graphs(fields, shared)


class _Collated:
    """Graphs of several structures: PyG joins them."""

    def __init__(self, items: Sequence[Any]):
        self.items, self.batch = list(items), require("torch_geometric.data", "the loader", "interop").Batch

    def take(self, index: Tensor):
        return self.batch.from_data_list([self.items[k] for k in index.tolist()])


class _Graphs:
    """Graphs of one structure: features stacked, the structure once."""

    def __init__(self, fields: Sequence[dict], shared: dict[str, Tensor]):
        self.batch = require("torch_geometric.data", "the loader", "interop").Batch
        self.nodes, self.shared = len(fields[0]["x"]), shared
        self.columns = {
            name: _column(name, [entry[name] for entry in fields]).stacked for name in fields[0] if name not in shared
        }
        self.structures: dict[int, dict[str, Tensor]] = {}

    def take(self, index: Tensor):
        """The PyG batch of some graphs; batches of one size share the tensors of their structure."""
        if len(index) not in self.structures:
            self.structures[len(index)] = self._structure(len(index))
        values = {name: column[index] for name, column in self.columns.items()}
        joined = {name: value.flatten(0, 1) if value.ndim > 1 else value for name, value in values.items()}
        return self.batch(**joined, **self.structures[len(index)])

    def _structure(self, count: int) -> dict[str, Tensor]:
        graph = torch.arange(count)
        found = {"batch": graph.repeat_interleave(self.nodes), "ptr": torch.arange(count + 1) * self.nodes}
        for name, value in self.shared.items():
            if "index" in name:  # numbers of nodes
                offsets = (graph * self.nodes).repeat_interleave(value.shape[1])
                found[name] = value.repeat(1, count) + offsets
            else:
                found[name] = value.repeat(count, *(1,) * (value.ndim - 1))
        return found
