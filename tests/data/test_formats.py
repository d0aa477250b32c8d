"""The field's formats: state dicts with a splits file (DWS), NFN names, stacked arrays; and the pack command."""

import argparse
import json
import os
from collections import OrderedDict

import numpy as np
import pytest
import torch

from scalegmn_fast.data import PackedDataset, evaluate_inrs, pack, read_dws, read_network, read_nfn, read_stacked_npz
from scalegmn_fast.data.formats import load_pth

LAYOUT = (2, 4, 3, 1)


def state_dict(seed=0, layout=LAYOUT, label=None):
    generator = torch.Generator().manual_seed(seed)
    state = OrderedDict()
    for k, (a, b) in enumerate(zip(layout, layout[1:], strict=False)):
        state[f"seq.{k}.weight"] = torch.randn(b, a, generator=generator)
        state[f"seq.{k}.bias"] = torch.randn(b, generator=generator)
    if label is not None:
        state["label"] = label
    return state


def save(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def equals(networks, index, state):
    layers = len(networks.weights)
    return all(
        torch.equal(networks.weights[k][index, :, :, 0], state[f"seq.{k}.weight"].t())
        and torch.equal(networks.biases[k][index, :, 0], state[f"seq.{k}.bias"])
        for k in range(layers)
    )


def test_one_network_computes_what_its_module_does(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    save(tmp_path / "a.pth", net.state_dict())
    weights, biases, label = read_network(tmp_path / "a.pth")
    assert label is None and [tuple(w.shape) for w in weights] == [(2, 4, 1), (4, 3, 1)]
    x = torch.randn(6, 2)
    found = evaluate_inrs([w[None] for w in weights], [b[None] for b in biases], x, activation="tanh")
    assert torch.allclose(found[0], net(x), atol=1e-6)


@pytest.mark.parametrize("label", [3, torch.tensor(3)])
def test_label_in_the_state_dict(tmp_path, label):
    save(tmp_path / "a.pth", state_dict(label=label))
    assert read_network(tmp_path / "a.pth")[2] == 3


class Evil:
    def __reduce__(self):
        return os.mkdir, (Evil.target,)


def test_code_in_a_file_is_not_run(tmp_path):
    Evil.target = str(tmp_path / "ran")
    torch.save({"w.weight": Evil()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: truncated, or not a .pth file of tensors and plain values"):
        read_network(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"\0" * 50])
def test_foreign_pth(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="a.pth: truncated, or not a .pth file"):
        load_pth(tmp_path / "a.pth")


def test_truncated_and_missing_pth(tmp_path):
    save(tmp_path / "a.pth", state_dict())
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:-300])
    with pytest.raises(ValueError, match="a.pth: truncated"):
        load_pth(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match="b.pth"):
        load_pth(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [1, 2], "not a state dict: it holds a list"),
        (lambda s: {}, "no entry ends in 'weight'; it has none"),
        (lambda s: s.pop("seq.1.bias") is None or s, "seq.1.weight has no seq.1.bias"),
        (lambda s: s.pop("seq.1.weight") is None or s, r"seq.2.weight has 3 inputs after a layer of 4 neurons"),
        (lambda s: {**s, "seq.0.bias": torch.zeros(5)}, "seq.0.bias has 5 entries, seq.0.weight has 4 outputs"),
        (lambda s: {**s, "seq.0.weight": torch.zeros(4, 2, 3, 3)}, r"seq.0.weight must be a tensor of 2 dimensions"),
        (lambda s: {**s, "seq.0.weight": 3}, "seq.0.weight must be a tensor of 2 dimensions, got int"),
        (lambda s: {**s, "seq.1.bias": torch.full((3,), torch.nan)}, "seq.1.bias holds NaN"),
        (lambda s: {**s, "seq.1.weight": torch.full((3, 4), torch.inf)}, "seq.1.weight holds Inf"),
        (lambda s: {**s, "scale": torch.ones(3)}, "'scale' is neither a weight, nor the bias of one, nor the label"),
    ],
)
def test_bad_state_dicts(tmp_path, change, message):
    save(tmp_path / "a.pth", change(state_dict()))
    with pytest.raises(ValueError, match=f"a.pth: {message}"):
        read_network(tmp_path / "a.pth")


def mnist_like(root, counts=None, prefix="data/mnist-inrs/"):
    """State dicts as MNIST INRs lie, labels as strings in the splits file."""
    splits, k = {}, 0
    for split, count in (counts or {"train": 4, "val": 1, "test": 2}).items():
        splits[split] = {"path": [], "label": []}
        for _ in range(count):
            name = f"mnist_png_{'testing' if split == 'test' else 'training'}_{k % 10}_{k}/checkpoints/model_final.pth"
            save(root / name, state_dict(seed=k))
            splits[split]["path"].append(prefix + name)
            splits[split]["label"].append(str(k % 10))
            k += 1
    (root / "splits.json").write_text(json.dumps(splits))
    return splits


@pytest.mark.parametrize("prefix", ["", "data/mnist-inrs/", "./data/mnist-inrs/", "/elsewhere/mnist-inrs/"])
def test_dws_mnist(tmp_path, prefix):
    mnist_like(tmp_path, prefix=prefix)
    networks = read_dws(tmp_path, tmp_path / "splits.json")
    assert networks.labels.tolist() == list(range(7)) and networks.splits.tolist() == [0] * 4 + [1] + [2] * 2
    assert all(equals(networks, k, state_dict(seed=k)) for k in range(7))
    assert networks.metadata["w0"] == 30.0 and networks.metadata["output_offset"] == 0.5


@pytest.mark.parametrize("listed", ["paths", "paths and labels"])
def test_dws_fashion_mnist(tmp_path, listed):
    splits = {}
    for split, numbers in (("train", [8, 3, 5]), ("val", [1]), ("test", [0, 2])):
        folder = "test" if split == "test" else "train"
        for k in numbers:
            label = {"label": k} if listed == "paths" else {}
            save(tmp_path / "fmnist_inrs" / folder / f"model_{k}.pth", state_dict(seed=k, **label))
        paths = [f"fmnist_inrs/{folder}/model_{k}.pth" for k in numbers]
        splits[split] = paths if listed == "paths" else {"path": paths, "label": numbers}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    for root in (tmp_path, tmp_path / "fmnist_inrs"):
        networks = read_dws(root, tmp_path / "splits.json")
        assert networks.labels.tolist() == [8, 3, 5, 1, 0, 2] and networks.splits.tolist() == [0, 0, 0, 1, 2, 2]
        assert all(equals(networks, row, state_dict(seed=k)) for row, k in enumerate([8, 3, 5, 1, 0, 2]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: "{", ValueError, "splits.json: truncated, or not a JSON file"),
        (lambda s: "[]", ValueError, "splits.json: expected an object with train, val, test"),
        (lambda s: {**s, "valid": []}, ValueError, "unknown split 'valid'"),
        (lambda s: {"train": {"label": [1]}}, ValueError, "'train' must be a list of paths"),
        (lambda s: {"train": [1, 2]}, ValueError, "'train' must be a list of paths"),
        (lambda s: {"train": []}, ValueError, "it lists no networks"),
        (lambda s: {"train": {**s["train"], "label": ["1"]}}, ValueError, "has 4 paths; .* got 1"),
        (lambda s: {"train": {**s["train"], "label": "1234"}}, ValueError, "got str"),
        (lambda s: {"train": {**s["train"], "label": ["a"] * 4}}, ValueError, "a label that is not an integer"),
        (lambda s: {"train": s["train"]["path"]}, ValueError, "no label, neither in the splits nor in the state dict"),
        (lambda s: {**s, "val": s["train"]}, ValueError, "is listed twice, in train and in val"),
        (lambda s: {"train": ["data/no/model.pth"]}, FileNotFoundError, "'data/no/model.pth' is not under"),
    ],
)
def test_bad_splits_files(tmp_path, change, error, message):
    changed = change(mnist_like(tmp_path))
    (tmp_path / "splits.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(error, match=message):
        read_dws(tmp_path, tmp_path / "splits.json")


def test_layouts_that_differ_and_missing_places(tmp_path):
    splits = mnist_like(tmp_path)
    save(tmp_path / splits["val"]["path"][0].removeprefix("data/mnist-inrs/"), state_dict(layout=(2, 5, 3, 1)))
    with pytest.raises(ValueError, match=r"its layers are \[\(2, 5\), .* those of .* are \[\(2, 4\)"):
        read_dws(tmp_path, tmp_path / "splits.json")
    with pytest.raises(FileNotFoundError, match="no splits file"):
        read_dws(tmp_path, tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_dws(tmp_path / "none", tmp_path / "splits.json")
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_nfn(tmp_path / "none")


def nfn_like(root, n=8, prefix="randinit_smaller", offset=0):
    for k in range(n):
        save(root / f"{prefix}_{(3 * k) % 4}s" / f"siren_net{k}.pth", state_dict(seed=k + offset, layout=(2, 4, 4, 3)))


def test_nfn(tmp_path):
    nfn_like(tmp_path)
    nfn_like(tmp_path, prefix="randinit_smaller_aug0", offset=100)
    networks = read_nfn(tmp_path, split_points=(5, 6))
    assert networks.labels.tolist() == [(3 * k) % 4 for k in range(8)]
    assert networks.splits.tolist() == [0] * 5 + [1] + [2] * 2
    assert all(equals(networks, k, state_dict(seed=k, layout=(2, 4, 4, 3))) for k in range(8))
    more = read_nfn(tmp_path, split_points=(5, 6), augmented=1)
    assert more.splits.tolist() == [0] * 5 + [1] + [2] * 2 + [0] * 5
    assert equals(more, 12, state_dict(seed=104, layout=(2, 4, 4, 3)))
    with pytest.raises(FileNotFoundError, match="randinit_smaller_aug1"):
        read_nfn(tmp_path, split_points=(5, 6), augmented=2)


def test_bad_nfn(tmp_path):
    with pytest.raises(FileNotFoundError, match="no networks at .*randinit_smaller_<class>s"):
        read_nfn(tmp_path)
    nfn_like(tmp_path)
    for points in ((5, 9), (6, 5), (0, 5)):
        with pytest.raises(ValueError, match=r"split_points .* must be ascending and within 8 networks"):
            read_nfn(tmp_path, split_points=points)
    save(tmp_path / "randinit_smaller_7s" / "net3.pth", state_dict())
    with pytest.raises(ValueError, match="network 3 is also"):
        read_nfn(tmp_path, split_points=(5, 6))
    (tmp_path / "randinit_smaller_7s" / "net3.pth").rename(tmp_path / "randinit_smaller_7s" / "net9.pth")
    with pytest.raises(ValueError, match="has 9 networks, but none with index 8"):
        read_nfn(tmp_path, split_points=(5, 6))
    (tmp_path / "randinit_smaller_7s" / "net9.pth").rename(tmp_path / "randinit_smaller_7s" / "other.pth")
    with pytest.raises(ValueError, match=r"expected a name that ends in net<index>.pth"):
        read_nfn(tmp_path, split_points=(5, 6))


def stacked(n=6, **changes):
    rng = np.random.default_rng(0)
    arrays = {f"w{k}": rng.normal(size=(n, *s)).astype(np.float16) for k, s in enumerate([(2, 4), (4, 3), (3, 1)])}
    arrays |= {f"b{k}": rng.normal(size=(n, s)).astype(np.float16) for k, s in enumerate([4, 3, 1])}
    arrays |= {"labels": np.arange(n).astype(np.uint8), "n_train": np.array(4), "psnr": np.ones(n, np.float32)}
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


def test_stacked_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **stacked())
    networks = read_stacked_npz(tmp_path / "a.npz")
    assert networks.splits.tolist() == [0] * 4 + [2] * 2 and networks.labels.tolist() == list(range(6))
    assert networks.weights[1].dtype == torch.float16 and networks.weights[1].shape == (6, 4, 3, 1)
    assert list(networks.extras) == ["psnr"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b1": None}, "no array 'b1'"),
        ({"labels": None}, "no array 'labels'"),
        ({"n_train": None}, "no array 'n_train'"),
        ({"w0": None, "w1": None, "w2": None}, "no array 'w0'"),
        ({"n_train": np.array(7)}, "n_train must be a number from 1 to 6, got 7"),
        ({"n_train": np.array(0)}, "n_train must be a number from 1 to 6, got 0"),
        ({"w1": np.zeros((5, 4, 3))}, r"w1 must be 6 networks in 3 dimensions, got float64 \[5, 4, 3\]"),
        ({"b0": np.zeros((6, 4, 1))}, "b0 must be 6 networks in 2 dimensions"),
        ({"b0": np.zeros((6, 4), int)}, "b0 must be .* got int64"),
    ],
)
def test_bad_stacked_npz(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **stacked(**changes))
    with pytest.raises(ValueError, match=f"a.npz: {message}"):
        read_stacked_npz(tmp_path / "a.npz")


def run_pack(*arguments):
    parser = argparse.ArgumentParser()
    pack.configure(parser)
    return pack.run(parser.parse_args([str(a) for a in arguments]))


def test_pack_dws(tmp_path, capsys):
    mnist_like(tmp_path / "in")
    output = tmp_path / "a.safetensors"
    assert run_pack(tmp_path / "in", output, "--splits", tmp_path / "in" / "splits.json", "--metadata", "w0=20") == 0
    printed = capsys.readouterr()
    assert "7 networks 2-4-3-1; 4 train, 1 val, 2 test" in printed.out and "7/7" in printed.err
    dataset = PackedDataset(output)
    assert dataset.metadata["w0"] == 20 and dataset.metadata["activation"] == "sine"
    weights, _ = dataset.weights([6])
    assert torch.equal(weights[0][0, :, :, 0], state_dict(seed=6)["seq.0.weight"].t())


def test_pack_draws_a_missing_validation_part(tmp_path):
    mnist_like(tmp_path / "in", {"train": 8, "test": 2})
    arguments = (tmp_path / "in", tmp_path / "a.npz", "--splits", tmp_path / "in" / "splits.json", "--quiet")
    assert run_pack(*arguments, "--val-fraction", "0.25", "--seed", "5") == 0
    first = PackedDataset(tmp_path / "a.npz")
    assert [len(first.split(s)) for s in ("train", "val", "test")] == [6, 2, 2]
    assert run_pack(*arguments, "--val-fraction", "0.25", "--seed", "6") == 0
    assert not torch.equal(PackedDataset(tmp_path / "a.npz").splits, first.splits)


def test_pack_nfn_and_stacked(tmp_path):
    nfn_like(tmp_path / "in")
    assert run_pack(tmp_path / "in", tmp_path / "a.safetensors", "--split-points", "5", "6", "--quiet") == 0
    assert PackedDataset(tmp_path / "a.safetensors").layout == (2, 4, 4, 3)
    np.savez(tmp_path / "b.npz", **stacked())
    metadata = ["--metadata", "image_shape=[4,4,1]", "--metadata", "note=plain text"]
    assert run_pack(tmp_path / "b.npz", tmp_path / "b.safetensors", "--val-fraction", "0.5", *metadata) == 0
    dataset = PackedDataset(tmp_path / "b.safetensors")
    assert [len(dataset.split(s)) for s in ("train", "val", "test")] == [2, 2, 2]
    assert dataset.metadata["image_shape"] == [4, 4, 1] and dataset.metadata["note"] == "plain text"
    assert dataset.extras == ("psnr",)
    assert torch.equal(dataset.weights([2])[0][0][0, :, :, 0], torch.from_numpy(stacked()["w0"][2]).float())


def test_pack_refuses(tmp_path):
    weights = stacked()["w1"]
    weights[3, 0, 0] = np.nan
    np.savez(tmp_path / "b.npz", **stacked(w1=weights))
    with pytest.raises(ValueError, match="network 3 holds NaN in weights.1"):
        run_pack(tmp_path / "b.npz", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="--splits belongs to a folder"):
        run_pack(tmp_path / "b.npz", tmp_path / "a.safetensors", "--splits", "x.json")
    with pytest.raises(ValueError, match="expected KEY=VALUE, got 'w0'"):
        run_pack(tmp_path / "b.npz", tmp_path / "a.safetensors", "--metadata", "w0")
    with pytest.raises(FileNotFoundError, match="none.npz"):
        run_pack(tmp_path / "none.npz", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
