"""The rows that an index reads, sorted by the table's rows: once per index, kept for as long as that lives."""

import torch
from torch.utils.weak import WeakIdKeyDictionary

# {index, or the tensor that it is a part of: (its version, {(stream, first, rows read, rows of the table): order})}
_kept = WeakIdKeyDictionary()


def _new_order(index, rows):
    ordered, places = torch.sort(index, stable=True)
    numbers = torch.arange(rows + 1, device=index.device, dtype=index.dtype)
    return torch.searchsorted(ordered, numbers), places


def sorted_index(index, low, high, rows):
    """(ptr int64 [rows + 1], places int64): the places in index[low:high] of row r are places[ptr[r]:ptr[r + 1]].

    Args: index, contiguous, with numbers below `rows`. Sorted again where the index has been written to, and on another
    stream. A CUDA graph that is being captured takes what is kept, of any stream: a capture begins when the device is
    done; an order that it has to sort itself is not kept, because it is not there before a replay.
    """
    owner = index if index._base is None else index._base
    version, orders = _kept.get(owner, (None, {}))
    if version != owner._version:
        orders = {}
    stream, capturing = 0, False
    if index.is_cuda:
        stream = torch.cuda.current_stream(index.device).cuda_stream
        capturing = torch.cuda.is_current_stream_capturing()
    read = index.storage_offset() + low, high - low, rows
    for known, order in orders.items():
        if known[1:] == read and (capturing or known[0] == stream):
            return order
    order = _new_order(index[low:high], rows)
    if not capturing:
        orders[(stream, *read)] = order
        _kept[owner] = owner._version, orders
    return order
