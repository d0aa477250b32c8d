"""``scalegmn-fast embed``: the model's own numbers, restart after a kill, shares, URLs, and what it refuses."""

import argparse
import json
import os
import shutil

import pytest
import torch
from test_train_neural_graphs import config_of
from train_tiny import tiny_config, write_tiny

from scalegmn_fast.data import open_packed
from scalegmn_fast.train import Trainer, embed
from scalegmn_fast.train.embed import embed_shards
from scalegmn_fast.train.evaluate import load_model

fsspec = pytest.importorskip("fsspec")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Checkpoints of two models after no step, three shards of 12, 9 and 5 networks, and one of another layout."""
    folder = tmp_path_factory.mktemp("zoo")
    torch.set_num_threads(1)
    sizes = {"a.safetensors": (8, 2, 2), "b.npz": (5, 2, 2), "c.safetensors": (3, 1, 1)}
    for name, size in sizes.items():
        write_tiny(folder / name, sizes=size)
    write_tiny(folder / "other.layout", sizes=(4, 2, 2), layout=(2, 5, 1))
    for name, config in (("sign", tiny_config()), ("pna", config_of("pna", model__gnn_backbone__norm_scope="graph"))):
        Trainer.from_config(config, open_packed(folder / "a.safetensors"), folder / name, make_plots=False)
    return folder


def shards(zoo):
    return [zoo / name for name in ("a.safetensors", "b.npz", "c.safetensors")]


def run(zoo, out, *, model="sign", inputs=None, **options):
    return embed_shards(zoo / model / "last.pt", inputs or shards(zoo), out, batch_size=4, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model", ["sign", "pna"])
def test_the_numbers_are_the_model_s(zoo, tmp_path, model):
    counts = run(zoo, tmp_path / "out", model=model, predictions=True)
    assert (counts.networks, counts.written, counts.found, counts.skipped) == (26, 3, 0, {})
    net, statistics, _ = load_model(zoo / model / "last.pt")
    for number, path in enumerate(shards(zoo)):
        table = parquet.read_table(tmp_path / "out" / f"part-{number:05d}-00000-of-00001.parquet")
        assert table.column_names == ["shard", "index", "embedding", "prediction"]
        assert set(table["shard"].to_pylist()) == {str(path)}
        assert table["index"].to_pylist() == list(range(len(open_packed(path))))
        with torch.no_grad():
            graph, _ = open_packed(path).batch(slice(None), statistics)
            expected = {"embedding": net.embed(graph), "prediction": net(graph)}
        for name, values in expected.items():
            assert str(table.schema.field(name).type) == f"fixed_size_list<element: float>[{values.shape[1]}]"
            torch.testing.assert_close(torch.tensor(table[name].to_pylist()), values, rtol=1e-5, atol=1e-6)


def test_rows_per_part(zoo, tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    run(zoo, whole)
    counts = run(zoo, pieces, part_rows=8)
    assert counts.written == 5 and {p.name[:16] for p in pieces.glob("*.parquet")} == {
        "part-00000-00000", "part-00000-00001", "part-00001-00000", "part-00001-00001", "part-00002-00000",
    }  # fmt: skip
    tables = [parquet.read_table(sorted(folder.glob("*.parquet"))) for folder in (whole, pieces)]
    assert tables[0].equals(tables[1])  # 8 rows are whole batches of 4
    metadata = tables[0].schema.metadata
    manifest = json.loads((whole / "_manifest.json").read_text())
    assert metadata[b"scalegmn_fast.checkpoint"].decode() == manifest["checkpoint"]["sha256"]


def test_large_results_become_several_row_groups(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_ROW_GROUP_BYTES", 1)
    run(zoo, tmp_path / "out")
    assert parquet.ParquetFile(tmp_path / "out" / "part-00000-00000-of-00001.parquet").num_row_groups == 3


def test_a_killed_run_goes_on_with_what_is_missing(zoo, tmp_path, monkeypatch):
    """Killed while it writes the second piece of the first shard; what a kill leaves of that file is removed."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(zoo, whole, part_rows=8)
    table, calls = embed._Job._table, []

    def killed(self, shard, dataset, indices):
        calls.append(indices.start)
        if indices.start == 8:
            raise KeyboardInterrupt
        return table(self, shard, dataset, indices)

    with monkeypatch.context() as patch:
        patch.setattr(embed._Job, "_table", killed)
        with pytest.raises(KeyboardInterrupt):
            run(zoo, out, part_rows=8)
    assert calls == [0, 4, 8]
    assert sorted(os.listdir(out)) == ["_manifest.json", "part-00000-00000-of-00002.parquet"]
    (out / ".part-00000-00001-of-00002.parquet.77.tmp").write_bytes(b"half")
    counts = run(zoo, out, part_rows=8)
    assert (counts.networks, counts.written, counts.found) == (18, 4, 1)
    assert contents(out) == contents(whole)
    counts = run(zoo, out, part_rows=8)
    assert (counts.networks, counts.written, counts.found) == (0, 0, 5)


def test_processes_share_the_shards_and_give_the_same_files(zoo, tmp_path, monkeypatch):
    run(zoo, tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        written.append(run(zoo, tmp_path / "two").networks)
    assert written == [9, 17] and contents(tmp_path / "two") == contents(tmp_path / "one")


def test_urls_and_globs(zoo, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in shards(zoo):
        memory.pipe_file(f"/zoo/{path.name}", path.read_bytes())
    url = "memory://zoo-out"
    counts = run(zoo, url, inputs=["memory://zoo/*.safetensors", "memory://zoo/b.npz"])
    assert counts.networks == 26
    names = sorted(entry.rpartition("/")[2] for entry in memory.ls("/zoo-out", detail=False))
    assert names == ["_manifest.json", *(f"part-0000{k}-00000-of-00001.parquet" for k in range(3))]
    with memory.open("/zoo-out/part-00001-00000-of-00001.parquet") as handle:
        remote = parquet.read_table(handle)
    assert set(remote["shard"].to_pylist()) == {"memory:///zoo/c.safetensors"}
    run(zoo, tmp_path / "local", inputs=[str(zoo / "*.safetensors"), zoo / "b.npz"])
    local = parquet.read_table(tmp_path / "local" / "part-00001-00000-of-00001.parquet")
    assert local["embedding"].equals(remote["embedding"])
    assert run(zoo, url, inputs=["memory://zoo/*.safetensors", "memory://zoo/b.npz"]).found == 3
    memory.pipe_file("/zoo/b.npz", (zoo / "c.safetensors").read_bytes())
    with pytest.raises(ValueError, match="shard 'memory:///zoo/b.npz' is changed"):
        run(zoo, url, inputs=["memory://zoo/*.safetensors", "memory://zoo/b.npz"])


def test_results_of_another_run_are_refused(zoo, tmp_path):
    out = tmp_path / "out"
    run(zoo, out)
    before = contents(out)
    for options, message in (
        ({"model": "pna"}, "checkpoint: {'sha256'"),
        ({"part_rows": 3}, "part_rows: None there, 3 now"),
        ({"predictions": True}, "predictions: False there, True now"),
        ({"inputs": shards(zoo)[:2]}, "c.safetensors' is missing now"),
        ({"inputs": [*shards(zoo), zoo / "other.layout"]}, "other.layout' is new"),
        ({"inputs": shards(zoo)[::-1]}, "the shards come in another order"),
    ):
        with pytest.raises(ValueError, match="belongs to another run: .*" + message):
            run(zoo, out, **options)
    assert contents(out) == before
    (out / "_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is not one of scalegmn-fast embed"):
        run(zoo, out)
    (out / "_manifest.json").unlink()
    with pytest.raises(FileExistsError, match="is not empty and has no _manifest.json"):
        run(zoo, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        run(zoo, tmp_path / "file")


def test_a_bad_shard_is_named_and_stops_or_is_skipped(zoo, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((zoo / "a.safetensors").read_bytes()[:-8])
    inputs = [damaged, zoo / "other.layout", zoo / "c.safetensors"]
    with pytest.raises(ValueError, match="shard '.*damaged.safetensors': .*truncated"):
        run(zoo, tmp_path / "stop", inputs=inputs)
    assert os.listdir(tmp_path / "stop") == ["_manifest.json"]
    counts = run(zoo, tmp_path / "skip", inputs=inputs, on_error="skip")
    assert counts.networks == 5 and set(counts.skipped) == {str(damaged), str(zoo / "other.layout")}
    text = capsys.readouterr().err
    assert "other.layout': checkpoint" in text and "layout [2, 4, 1]" in text and "holds [2, 5, 1]" in text


def test_a_network_that_gives_nan_is_named(zoo, tmp_path, monkeypatch):
    batch = type(open_packed(zoo / "a.safetensors")).batch

    def poisoned(self, indices, statistics=None):
        graph, labels = batch(self, indices, statistics)
        if indices.start == 4:
            graph.node_features[:] = float("nan")
        return graph, labels

    monkeypatch.setattr(type(open_packed(zoo / "a.safetensors")), "batch", poisoned)
    with pytest.raises(ValueError, match="a.safetensors': network 4: its embedding is not finite"):
        run(zoo, tmp_path / "out")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"inputs": ["none.npz"]}, FileNotFoundError, "no file at 'none.npz'"),
    ({"inputs": ["none*.npz"]}, FileNotFoundError, r"no file at 'none\*.npz'"),
    ({"inputs": ["."]}, ValueError, "is a folder: expected packed files"),
    ({"part_rows": 0}, ValueError, "part_rows must be at least 1, got 0"),
    ({"on_error": "ignore"}, ValueError, "on_error must be 'stop' or 'skip', got 'ignore'"),
])  # fmt: skip
def test_wrong_arguments_write_nothing(zoo, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(zoo, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_shard_given_twice(zoo, tmp_path):
    with pytest.raises(ValueError, match="a.safetensors' is given twice"):
        run(zoo, tmp_path / "out", inputs=[zoo / "a.safetensors", str(zoo / "*.safetensors")])


def test_the_command(zoo, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    embed.configure(parser)
    broken = shutil.copy(zoo / "other.layout", tmp_path / "broken.safetensors")
    arguments = [zoo / "sign" / "last.pt", zoo / "c.safetensors", broken, "--out", tmp_path / "out", "--device", "cpu"]
    options = ["--threads", "1", "--no-progress", "--on-error", "skip"]
    assert embed.run(parser.parse_args([*map(str, arguments), *options])) == 1
    captured = capsys.readouterr()
    assert "5 networks in 1 new parts, 0 parts were there, 1 shards skipped" in captured.out
    assert "skipped shard" in captured.err
