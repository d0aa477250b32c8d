"""Checkpoints are whole or refused, and never overwritten by a failed write."""

import random
import zipfile

import numpy as np
import pytest
import torch

from scalegmn_fast.train.checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint

STATE = {
    "model": {"w": torch.arange(300.0)},
    "config": {"a": [1, 2.5, None, "x", True]},
    "layout": (2, 4, 1),
    "epoch": 3,
    "step": np.int64(2),
    "seed": 0,
    "best": np.float64(0.25),
}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "c.pt", STATE)
    return tmp_path / "c.pt"


def test_round_trip_in_plain_values(path):
    state = load_checkpoint(path)
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert state["config"] == STATE["config"] and state["layout"] == [2, 4, 1]
    assert (type(state["step"]), type(state["best"])) == (int, float)
    assert [p.name for p in path.parent.iterdir()] == ["c.pt"]


def test_a_view_is_saved_without_its_storage(tmp_path):
    save_checkpoint(tmp_path / "v.pt", {**STATE, "model": {"w": torch.zeros(1_000_000)[:10]}})
    assert (tmp_path / "v.pt").stat().st_size < 20_000


@pytest.mark.parametrize("keep", [0, 10, 100, 0.3, 0.7, 0.99])
def test_truncated(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def test_a_flipped_bit_is_found(path):
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    content[data.header_offset + 200 + data.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="corrupt: the checksum of"):
        load_checkpoint(path)


def test_foreign_files(tmp_path):
    path = tmp_path / "f.pt"
    torch.save({"state_dict": {"w": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match="not written by .* trainer: it holds a dict with keys state_dict"):
        load_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="not written by"):
        load_checkpoint(path)
    path.write_text("epoch,loss\n")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_checkpoint(tmp_path / "none.pt")


def test_no_code_is_run_from_a_file(tmp_path):
    class Payload:
        def __reduce__(self):
            return (random.seed, (1,))

    torch.save({"format": "scalegmn_fast.checkpoint", "version": 1, "model": Payload()}, tmp_path / "p.pt")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        load_checkpoint(tmp_path / "p.pt")


def test_incomplete_or_newer(tmp_path):
    path = tmp_path / "c.pt"
    save_checkpoint(path, {"model": {}})
    with pytest.raises(ValueError, match="lacks config, layout, epoch, step, seed"):
        load_checkpoint(path)
    torch.save({"format": "scalegmn_fast.checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="version 99"):
        load_checkpoint(path)


def test_a_write_that_fails_leaves_the_old_file(path):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="state.best: .* got object"):
        save_checkpoint(path, {**STATE, "best": object()})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["c.pt"]


def test_random_states_survive_a_file(tmp_path):
    def draw():
        return [torch.rand(3).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]

    np.random.randn()
    random.gauss(0, 1)  # leaves a cached second value in each generator
    save_checkpoint(tmp_path / "r.pt", {**STATE, "rng": capture_rng()})
    expected = draw()
    draw()
    restore_rng(load_checkpoint(tmp_path / "r.pt")["rng"])
    assert draw() == expected
