"""The packed format: round trips, whole-batch reads, atomic writes, memory-mapping, and every kind of damaged file."""

import io
import json
import math
import os
import pickle
import resource
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from scalegmn_fast.data import LayerStatistics, PackedDataset, write_packed
from scalegmn_fast.graph import GraphBatch

LAYOUT = (2, 5, 3, 1)
SUFFIXES = ("safetensors", "npz")


def networks(n=7, layout=LAYOUT, edge_dim=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(n, a, b, edge_dim, generator=generator).to(dtype) for a, b in zip(layout, layout[1:], strict=False)
    ]
    return weights, [torch.randn(n, b, 1, generator=generator).to(dtype) for b in layout[1:]]


def write(path, n=7, **changes):
    weights, biases = networks(n)
    arguments = {
        "weights": weights,
        "biases": biases,
        "labels": torch.arange(n),
        "splits": {"train": range(n - 3), "val": [n - 3], "test": [n - 2, n - 1]},
        "metadata": {"activation": "sine", "w0": 30.0, "image_shape": [4, 4, 1], "note": 'quotes " and ü'},
        **changes,
    }
    write_packed(path, **arguments)
    return arguments


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("edge_dim", [1, 9])
def test_round_trip(tmp_path, suffix, dtype, edge_dim):
    path = tmp_path / f"a.{suffix}"
    weights, biases = networks(edge_dim=edge_dim, dtype=dtype)
    mask = torch.arange(7) % 2 == 0
    written = write(path, weights=weights, biases=biases, sign_mask=mask, extras={"psnr": np.arange(7.0)})
    dataset = PackedDataset(path)
    assert len(dataset) == 7 and dataset.layout == LAYOUT and dataset.edge_dim == edge_dim
    assert dataset.metadata == written["metadata"]
    assert dataset.labels.dtype == torch.int64 and dataset.labels.tolist() == list(range(7))
    assert [dataset.split(s).tolist() for s in ("train", "val", "test")] == [[0, 1, 2, 3], [4], [5, 6]]
    assert torch.equal(dataset.sign_mask(), mask)
    assert dataset.extras == ("psnr",) and torch.equal(dataset.extra("psnr"), torch.arange(7.0, dtype=torch.float64))
    found = dataset.weights(slice(None))
    for part, expected in zip(found, (weights, biases), strict=True):
        for a, b in zip(part, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b.float())
    dataset.validate()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_batches_equal_networks_read_one_by_one(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}")
    dataset = PackedDataset(tmp_path / f"a.{suffix}")
    indices = torch.tensor([5, 0, 3, 3, 6])
    batch = dataset.weights(indices)
    for row, index in enumerate(indices.tolist()):
        single = dataset.weights(slice(index, index + 1))
        for whole, one in zip([*batch[0], *batch[1]], [*single[0], *single[1]], strict=True):
            assert torch.equal(whole[row], one[0])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (slice(None), [0, 1, 2, 3, 4, 5, 6]),
        (slice(1, 6, 2), [1, 3, 5]),
        (slice(None, None, -2), [6, 4, 2, 0]),
        (slice(5, 100), [5, 6]),
        (torch.tensor([6, 0]), [6, 0]),
        (np.array([6, 0]), [6, 0]),
        (np.array([2], np.int32), [2]),
        ([1, 1], [1, 1]),
        ([], []),
        (torch.tensor([True, False, False, True, False, False, False]), [0, 3]),
    ],
)
def test_kinds_of_indices(tmp_path, indices, expected):
    written = write(tmp_path / "a.safetensors")
    dataset = PackedDataset(tmp_path / "a.safetensors")
    weights, biases = dataset.weights(indices)
    assert all(torch.equal(a, b[expected]) for a, b in zip(weights, written["weights"], strict=True))
    assert all(torch.equal(a, b[expected]) for a, b in zip(biases, written["biases"], strict=True))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 7], IndexError, "index 7 is out of range for 7 networks"),
        ([-1], IndexError, "index -1 is out of range"),
        (torch.tensor([True, False]), IndexError, r"mask must have shape \[7\]"),
        (torch.tensor([0.5]), TypeError, "int64"),
        (torch.tensor([[0, 1]]), TypeError, r"\[1, 2\]"),
    ],
)
def test_bad_indices(tmp_path, indices, error, message):
    write(tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        PackedDataset(tmp_path / "a.safetensors").weights(indices)


def test_reading_hands_out_fresh_memory(tmp_path):
    write(tmp_path / "a.safetensors")
    dataset = PackedDataset(tmp_path / "a.safetensors")
    for indices in (slice(None), [0, 1]):
        before = dataset.weights(indices)[0][0].clone()
        dataset.weights(indices)[0][0].zero_()
        assert torch.equal(dataset.weights(indices)[0][0], before)


def test_graph_batch(tmp_path):
    mask = torch.arange(7) % 2 == 0
    written = write(tmp_path / "a.safetensors", sign_mask=mask, metadata={"input_value": 0.5})
    dataset = PackedDataset(tmp_path / "a.safetensors")
    indices = torch.tensor([4, 1])
    graph, labels = dataset.batch(indices)
    expected = GraphBatch.from_weights(
        [w[indices] for w in written["weights"]],
        [b[indices] for b in written["biases"]],
        input_value=0.5,
        sign_mask=mask[indices],
    )
    assert labels.tolist() == [4, 1]
    assert torch.equal(graph.node_features, expected.node_features)
    assert torch.equal(graph.edge_features, expected.edge_features)
    assert torch.equal(graph.sign_mask, expected.sign_mask)
    statistics = LayerStatistics.from_dataset(dataset)
    normalized, _ = dataset.batch(indices, statistics)
    back = statistics.denormalize(*normalized.to_weights())
    assert torch.allclose(back[0][1], written["weights"][1][indices], atol=1e-6)
    assert not torch.allclose(normalized.edge_features, graph.edge_features)


def test_regression_labels(tmp_path):
    write(tmp_path / "a.safetensors", labels=np.linspace(0, 1, 7))
    labels = PackedDataset(tmp_path / "a.safetensors").labels
    assert labels.dtype == torch.float32 and labels[-1] == 1.0


def test_weights_and_biases_without_trailing_axis(tmp_path):
    weights, biases = networks()
    write(tmp_path / "a.safetensors", weights=[w[..., 0].numpy() for w in weights], biases=[b[..., 0] for b in biases])
    found = PackedDataset(tmp_path / "a.safetensors").weights(slice(None))
    assert all(torch.equal(a, b) for a, b in zip([*found[0], *found[1]], [*weights, *biases], strict=True))


def test_pickling_maps_the_file_anew(tmp_path):
    write(tmp_path / "a.safetensors")
    dataset = PackedDataset(tmp_path / "a.safetensors")
    data = pickle.dumps(dataset)
    assert len(data) < 500
    assert torch.equal(pickle.loads(data).weights([3])[0][0], dataset.weights([3])[0][0])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_same_arguments_give_the_same_bytes(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}")
    write(tmp_path / f"b.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_other_programs_read_the_files(tmp_path):
    written = write(tmp_path / "a.safetensors")
    arrays = load_file(tmp_path / "a.safetensors")
    assert torch.equal(arrays["weights.1"], written["weights"][1])
    write(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["weights.1"], written["weights"][1].numpy())


@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_other_programs_are_read(tmp_path, compressed):
    weights, biases = networks()
    arrays = {f"weights.{k}": w.numpy() for k, w in enumerate(weights)} | {
        f"biases.{k}": b.numpy() for k, b in enumerate(biases)
    }
    arrays |= {"label": np.arange(7), "split": np.zeros(7, np.uint8)}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    found = PackedDataset(tmp_path / "a.npz").weights([2, 5])
    assert all(torch.equal(a, b[[2, 5]]) for a, b in zip(found[0], weights, strict=True))


def header_of(shapes, metadata=None):
    """A safetensors header: name -> (dtype, item size, shape)."""
    header, offset = {"__metadata__": metadata or {}}, 0
    for name, (dtype, size, shape) in shapes.items():
        end = offset + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded, offset


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in kilobytes on Linux only")
def test_opening_and_reading_a_batch_does_not_read_the_file(tmp_path):
    n, width = 2000, 1024
    shapes = {
        "label": ("I64", 8, (n,)),
        "weights.0": ("F32", 4, (n, width, width, 1)),
        "biases.0": ("F32", 4, (n, width, 1)),
        "split": ("U8", 1, (n,)),
    }
    header, size = header_of(shapes)
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + size)
    assert path.stat().st_size > 8e9
    if path.stat().st_blocks * 512 > 1e8:
        pytest.fail("the file system of the temporary folder has no sparse files")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dataset = PackedDataset(path)
    weights, _ = dataset.weights([0, n - 1])
    assert weights[0].shape == (2, width, width, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("keep", [0, 3, 7, 60, 500, -200, -1])
def test_truncated_files(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"a.{suffix}: (truncated|not a packed dataset)"):
        PackedDataset(path)


def test_longer_than_the_header_says(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="longer than its header says"):
        PackedDataset(path)


def test_damaged_npz_member(tmp_path):
    path = tmp_path / "a.npz"
    write(path)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("weights.0.npy").header_offset
    data[offset + 30 + len("weights.0.npy")] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match="weights.0 is damaged"):
        PackedDataset(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x80\x02ctorch\n" * 40,
        os.urandom(300),
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x08\0\0\0\0\0\0\0{'no': 1" * 3,
    ],
)
def test_foreign_files(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.safetensors: (not a packed dataset|truncated)"):
        PackedDataset(path)


def test_foreign_zip_and_missing_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("data.pkl", b"x")
    with pytest.raises(ValueError, match="data.pkl.*not an array"):
        PackedDataset(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        PackedDataset(tmp_path / "nothing.npz")
    with pytest.raises(FileNotFoundError, match="no packed dataset"):
        PackedDataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights.1": None}, "lacks weights.1"),
        ({"label": None}, "lacks label"),
        ({"split": None}, "lacks split"),
        ({"weights.0": None, "weights.1": None}, "lacks weights.0"),
        ({"biases.1": None}, "lacks biases.1"),
        ({"weights.7": ("F32", 4, (3, 1, 1, 1))}, "lacks weights.2"),
        ({"weights.1": ("F32", 4, (3, 5, 1, 1))}, "weights.1 has 5 inputs, the layer before has 4"),
        ({"weights.1": ("F32", 4, (2, 4, 1, 1))}, "weights.1 holds 2 networks, weights.0 holds 3"),
        ({"weights.1": ("F32", 4, (3, 4, 1, 2))}, "weights.1 has d_e = 2"),
        ({"weights.0": ("F32", 4, (3, 2, 4))}, r"weights.0 must be \[n, n_in, n_out, d_e\]"),
        ({"weights.0": ("I32", 4, (3, 2, 4, 1))}, "weights.0 must hold floating-point"),
        ({"biases.0": ("F32", 4, (3, 1, 4))}, r"biases.0 must be \[3, 4, 1\]"),
        ({"label": ("I64", 8, (4,))}, r"label must have shape \[3\], got \[4\]"),
        ({"label": ("I32", 4, (3,))}, "label must be torch.int64 or torch.float32"),
        ({"split": ("I64", 8, (3,))}, "split must be torch.uint8"),
        ({"sign_mask": ("BOOL", 1, (3, 2))}, r"sign_mask must have shape \[3\] or \[3, 7\]"),
        ({"psnr": ("F32", 4, (2,))}, "psnr must have shape"),
        ({"psnr": ("C64", 8, (3,))}, "psnr has dtype C64"),
    ],
)
def test_inconsistent_files(tmp_path, change, message):
    shapes = {
        "weights.0": ("F32", 4, (3, 2, 4, 1)),
        "biases.0": ("F32", 4, (3, 4, 1)),
        "weights.1": ("F32", 4, (3, 4, 1, 1)),
        "biases.1": ("F32", 4, (3, 1, 1)),
        "label": ("I64", 8, (3,)),
        "split": ("U8", 1, (3,)),
        **change,
    }
    header, size = header_of({name: shape for name, shape in shapes.items() if shape is not None})
    (tmp_path / "a.safetensors").write_bytes(header + bytes(size))
    with pytest.raises(ValueError, match=message):
        PackedDataset(tmp_path / "a.safetensors")


def test_header_whose_sizes_do_not_fit(tmp_path):
    header, size = header_of({"weights.0": ("F32", 4, (3, 2, 4, 1))})
    header = header.replace(b'"shape": [3, 2', b'"shape": [3, 9')
    (tmp_path / "a.safetensors").write_bytes(header + bytes(size))
    with pytest.raises(ValueError, match=r"weights.0 of shape \[3, 9, 4, 1\] does not fit its 96 bytes"):
        PackedDataset(tmp_path / "a.safetensors")


def test_other_formats_and_versions(tmp_path):
    for metadata, message in (
        ({"format": '"pt"'}, "its format is 'pt'"),
        ({"format": "pt"}, "its format is 'pt'"),
        ({"version": "2"}, "packed format 2, this version reads 1"),
    ):
        header, size = header_of({"weights.0": ("F32", 4, (3, 2, 4, 1))}, metadata)
        (tmp_path / "a.safetensors").write_bytes(header + bytes(size))
        with pytest.raises(ValueError, match=message):
            PackedDataset(tmp_path / "a.safetensors")


def test_split_codes_out_of_range_in_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    data = bytearray(path.read_bytes())
    data[-1] = 3
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"split must be 0 \(train\), 1 \(val\) or 2 \(test\), got 3 at network 6"):
        PackedDataset(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "layer"), [("weights", 1), ("biases", 2)])
def test_not_finite_networks(tmp_path, value, kind, layer):
    weights, biases = networks()
    {"weights": weights, "biases": biases}[kind][layer][5].view(-1)[0] = value
    name = "NaN" if math.isnan(value) else "Inf"
    with pytest.raises(ValueError, match=f"network 5 holds {name} in {kind}.{layer}; nothing was written"):
        write(tmp_path / "a.safetensors", weights=weights, biases=biases)
    assert list(tmp_path.iterdir()) == []


def test_validate_finds_the_network_and_layer(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    written = write(path)
    data = path.read_bytes()
    needle = written["weights"][1][4].numpy().tobytes()
    assert data.count(needle) == 1
    path.write_bytes(data.replace(needle, needle[:-4] + np.float32(np.nan).tobytes()))
    dataset = PackedDataset(path)
    with pytest.raises(ValueError, match="network 4 holds NaN in weights.1"):
        dataset.validate()
    monkeypatch.setattr("scalegmn_fast.data.packed._CHUNK_BYTES", 1)
    with pytest.raises(ValueError, match="network 4 holds NaN in weights.1"):
        dataset.validate()


def test_finite_values_whose_sum_overflows_are_finite(tmp_path):
    weights, biases = networks()
    weights[0].fill_(3e38)
    write(tmp_path / "a.safetensors", weights=weights, biases=biases)
    PackedDataset(tmp_path / "a.safetensors").validate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {"train": [0, 1, 7]}}, "train holds index 7, but there are 7 networks"),
        ({"splits": {"train": range(6)}}, "network 6 is in no split"),
        ({"splits": {"train": range(7), "val": [3]}}, "network 3 is in both train and val"),
        ({"splits": {"training": range(7)}}, "unknown split 'training'; expected train, val, test"),
        ({"splits": [0, 0, 0, 0, 0, 0, 3]}, "split must be 0.*got 3 at network 6"),
        ({"splits": [0, 0, 0, 0, 0, 0, 256]}, "split must be 0.*got 256 at network 6"),
        ({"splits": [0, 0, 0, 0, 0, 0, -1]}, "split must be 0.*got -1 at network 6"),
        ({"splits": [0, 0]}, r"split must have shape \[7\], got \[2\]"),
        ({"splits": [0.5] * 7}, "split must be torch.uint8"),
        ({"labels": [1, 2]}, r"label must have shape \[7\], got \[2\]"),
        ({"labels": ["a"] * 7}, "labels: expected an array of numbers"),
        ({"labels": [math.nan] * 7}, "network 0 holds NaN in label"),
        ({"sign_mask": torch.zeros(7)}, "sign_mask must be torch.bool"),
        ({"sign_mask": torch.zeros(7, 4, dtype=torch.bool)}, r"sign_mask must have shape \[7\] or \[7, 11\]"),
        ({"extras": {"weights.9": [0] * 7}}, "'weights.9' is the name of another array"),
        ({"extras": {"psnr": [0] * 6}}, "psnr must have shape"),
        ({"metadata": {"format": "x"}}, "'format' is reserved"),
        ({"metadata": {"x": {1, 2}}}, "'x' is not a JSON value"),
        ({"weights": []}, "at least one"),
        ({"weights": networks(layout=(2, 5, 4, 1))[0]}, r"biases.1 must be \[7, 4, 1\]"),
        ({"weights": networks(n=0)[0], "biases": networks(n=0)[1]}, "no networks or an empty layer"),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.safetensors", **changes)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder .*none does not exist"):
        write(tmp_path / "none" / "a.safetensors")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path)
    before = path.read_bytes()

    def failing(handle, *_):
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("scalegmn_fast.data.packed._write_safetensors", failing)
    monkeypatch.setattr("scalegmn_fast.data.packed._write_npz", failing)
    with pytest.raises(OSError, match="disk full"):
        write(path, n=9)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_unknown_names(tmp_path):
    write(tmp_path / "a.safetensors")
    dataset = PackedDataset(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="train, val, test, got 'valid'"):
        dataset.split("valid")
    with pytest.raises(KeyError, match="no array 'psnr'"):
        dataset.extra("psnr")
    assert dataset.sign_mask() is None
    assert "7 networks 2-5-3-1; 4 train, 1 val, 2 test" in repr(dataset)


def test_npz_with_unreadable_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **{"weights.0": np.zeros(2, dtype="U3")})
    with pytest.raises(ValueError, match="weights.0 has dtype <U3"):
        PackedDataset(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **{"weights.0": np.asfortranarray(np.zeros((2, 3)))})
    with pytest.raises(ValueError, match="Fortran order"):
        PackedDataset(tmp_path / "b.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros(4))
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("weights.0.npy", buffer.getvalue()[:-8])
    with pytest.raises(ValueError, match="truncated: weights.0 needs 32 bytes and has 24"):
        PackedDataset(tmp_path / "c.npz")
