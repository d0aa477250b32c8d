"""Embed the networks of packed files with a trained model: a vector per network, in Parquet files.

A folder of results holds ``_manifest.json`` and per shard (input file) one part, or several of ``part_rows`` rows:
``part-SHARD-PIECE-of-PIECES.parquet``, with the columns

============== =============================== ================================================================
``shard``      string                          the input file, as in the manifest
``index``      int64                           the network's place in that file
``embedding``  fixed_size_list<float32>[d]     ``model.embed``: the graph embedding that the model's head reads
``prediction`` fixed_size_list<float32>[d_out] the model's output, where asked for
============== =============================== ================================================================

A part takes its name when it is complete, so that a run that was killed goes on with the parts that are missing. The
manifest ties the folder to the bytes of the checkpoint, to the shards (size and time of change) and to the options:
another checkpoint or other shards are refused. Processes that torchrun starts share the shards out by rank and need
nothing else of each other. The files do not depend on how many they are, nor on restarts.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Counts", "configure", "embed_shards", "run"]

FORMAT = "scalegmn_fast.embeddings"
VERSION = 1
MANIFEST = "_manifest.json"  # readers of Parquet folders pass over names that begin so
_PART = re.compile(r"part-(\d+)-(\d+)-of-(\d+)\.parquet")
_ROW_GROUP_BYTES = 1 << 25


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``scalegmn-fast embed``."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    parser.add_argument(
        "shards", nargs="+", metavar="SHARD", help="packed files: paths, fsspec URLs, or globs of either (quoted)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the Parquet files, a path or an URL")
    parser.add_argument("--part-rows", type=int, metavar="N", help="rows per Parquet file (default: a file per shard)")
    parser.add_argument("--predictions", action="store_true", help="write the model's outputs, too")
    parser.add_argument(
        "--on-error", default="stop", choices=("stop", "skip"),
        help="at a shard that cannot be embedded: stop (default), or go on and exit with 1 at the end",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, help="default: the training run's")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto (default): cuda where present")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--backend", help="reference, cpp, triton, cuda or auto")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Embeds; 0 when all shards are done, 1 where some were skipped."""
    from .distributed import started
    from .train import prepare_device

    device = prepare_device(args.device, args.threads)
    counts = embed_shards(
        args.checkpoint,
        args.shards,
        args.out,
        batch_size=args.batch_size,
        part_rows=args.part_rows,
        predictions=args.predictions,
        on_error=args.on_error,
        device=device,
        backend=args.backend,
        show_progress=not args.no_progress,
    )
    rank, size = started()
    process = f"process {rank} of {size}: " if size > 1 else ""
    print(
        f"{process}{counts.networks:,} networks in {counts.written} new parts, {counts.found} parts were there, "
        f"{len(counts.skipped)} shards skipped"
    )
    return 1 if counts.skipped else 0


@dataclass
class Counts:
    """What a process did: networks embedded, parts written and found, and skipped shards with the reason."""

    networks: int = 0
    written: int = 0
    found: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def embed_shards(
    checkpoint: str | os.PathLike,
    shards: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    batch_size: int | None = None,
    part_rows: int | None = None,
    predictions: bool = False,
    on_error: str = "stop",
    device="cpu",
    backend: str | None = None,
    show_progress: bool = False,
) -> Counts:
    """Embeds this process's share of ``shards`` into ``out``; see the module for the files.

    Args:
        checkpoint: a file of the trainer.
        shards: packed files: local paths, fsspec URLs, or globs of either. One that is not local is copied to the
            temporary folder while it is read.
        batch_size: networks at once; None: the training run's.
        part_rows: rows per part; None: a part per shard.
        on_error: "stop" raises at a shard that cannot be embedded, "skip" says so on stderr and goes on.

    Deterministic. Memory: a batch, 32 MiB of results, and what the operating system maps of the shard. Needs pyarrow
    and fsspec (``scalegmn_fast[embed]``).

    Raises:
        FileNotFoundError: no such checkpoint, or a shard or glob without a file.
        FileExistsError: ``out`` holds other files and no manifest.
        ValueError: an argument out of range; ``out`` has results of another checkpoint, of other shards or options; a
            shard that is damaged, does not fit the model, or gives NaN or Inf (the message names it).
    """
    import torch

    import scalegmn_fast
    from scalegmn_fast.data.optional import progress

    from .distributed import started
    from .evaluate import load_model
    from .model import edits
    from .trainer import deterministic

    for name, value in (("batch_size", batch_size), ("part_rows", part_rows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}")
    model, statistics, state = load_model(checkpoint)
    if edits(state["config"]):
        raise ValueError(f"checkpoint '{checkpoint}' edits networks: it has no vector per network")
    found = _find(shards)
    folder = _Folder(out)
    batch_size = batch_size or state["config"]["batch_size"]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": {"sha256": _sha256(checkpoint), "epoch": state["epoch"]},
        "batch_size": batch_size,
        "part_rows": part_rows,
        "predictions": predictions,
        "shards": [shard.identity for shard in found],
    }
    folder.claim(manifest)
    rank, size = started()
    own = list(enumerate(found))[rank::size]
    folder.remove_unfinished({number for number, _ in own})
    job = _Job(model.to(device), statistics, state, checkpoint, manifest, folder, torch.device(device))
    backend_block = scalegmn_fast.backend(backend) if backend else contextlib.nullcontext()
    bar = progress(unit=" networks", disable=not show_progress or rank > 0)
    with bar, backend_block, deterministic(), torch.no_grad():
        for place, (number, shard) in enumerate(own):
            bar.set_postfix_str(f"shard {place + 1} of {len(own)}")
            try:
                job.embed(number, shard, bar)
            except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
                if on_error == "stop":
                    raise ValueError(f"shard '{shard.name}': {error}") from error
                print(f"skipped shard '{shard.name}': {error}", file=sys.stderr)
                job.counts.skipped[shard.name] = str(error)
    return job.counts


@dataclass
class _Shard:
    """An input file: its file system, the path there, and the name that the results show."""

    fs: Any
    path: str
    name: str
    identity: dict[str, Any]

    @contextlib.contextmanager
    def local(self) -> Iterator[str]:
        """A local path of the file inside the block."""
        if _is_local(self.fs):
            yield self.path
            return
        with tempfile.TemporaryDirectory(prefix="scalegmn-fast-embed-", ignore_cleanup_errors=True) as folder:
            copy = os.path.join(folder, os.path.basename(self.path))
            self.fs.get_file(self.path, copy)
            yield copy


def _fsspec():
    from scalegmn_fast.data.optional import require

    return require("fsspec", "embedding files", "embed")


def _is_local(fs) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _find(patterns: Iterable[str | os.PathLike]) -> list[_Shard]:
    """The shards of paths, URLs and globs, those of a glob in the order of their names."""
    result: dict[str, _Shard] = {}
    for pattern in map(os.fspath, patterns):
        fs, path = _fsspec().core.url_to_fs(pattern)
        matches = [path]
        if any(c in path for c in "*?[") and not fs.exists(path):
            matches = sorted(fs.glob(path))
        if not matches or not all(fs.exists(match) for match in matches):
            raise FileNotFoundError(f"shards: there is no file at '{pattern}'")
        for match in matches:
            name = match if _is_local(fs) else fs.unstrip_protocol(match)
            if fs.isdir(match):
                raise ValueError(
                    f"shards: '{name}' is a folder: expected packed files, or a glob such as '{name}/*.npz'"
                )
            if name in result:
                raise ValueError(f"shards: '{name}' is given twice")
            info = fs.info(match)
            result[name] = _Shard(
                fs, match, name, {"path": name, "bytes": info["size"], "changed": _changed(fs, match, info)}
            )
    if not result:
        raise ValueError("shards: expected at least one, got none")
    return list(result.values())


def _changed(fs, path: str, info: Mapping[str, Any]) -> str | None:
    """What changes when the file does: its tag in a store, else its time of change; None where nobody knows."""
    if info.get("ETag"):
        return str(info["ETag"])
    try:
        return fs.modified(path).isoformat()
    except NotImplementedError:
        return None


def _sha256(path: str | os.PathLike) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Folder:
    """The folder of results, local or behind an URL; what is written there appears whole or not at all."""

    def __init__(self, url: str | os.PathLike):
        self.fs, self.path = _fsspec().core.url_to_fs(os.fspath(url))
        self.shown = os.fspath(url)

    def names(self) -> set[str]:
        return {entry.rstrip("/").rpartition("/")[2] for entry in self.fs.ls(self.path, detail=False, refresh=True)}

    def claim(self, manifest: Mapping[str, Any]) -> None:
        """Writes the manifest, or checks it against the one that is there.

        Several processes may do so at once: they write the same bytes, and no part comes before a manifest.
        """
        if self.fs.isfile(self.path):
            raise FileExistsError(f"out: '{self.shown}' is a file, expected a folder")
        self.fs.makedirs(self.path, exist_ok=True)
        present = {name for name in self.names() if not name.startswith(".")}
        path = f"{self.path}/{MANIFEST}"
        if self.fs.exists(path):
            _check_same(json.loads(self.fs.cat_file(path)), manifest, self.shown)
        elif present:
            raise FileExistsError(f"out: '{self.shown}' is not empty and has no {MANIFEST} of an earlier run")
        else:
            with self.whole(MANIFEST) as handle:
                handle.write((json.dumps(manifest, indent=1) + "\n").encode())

    def finished(self) -> dict[int, set[tuple[int, int]]]:
        """(piece, number of pieces) of the parts that are there, by shard."""
        result: dict[int, set[tuple[int, int]]] = {}
        for match in filter(None, map(_PART.fullmatch, self.names())):
            shard, piece, pieces = map(int, match.groups())
            result.setdefault(shard, set()).add((piece, pieces))
        return result

    def remove_unfinished(self, shards: set[int]) -> None:
        """Removes what killed writers of these shards left."""
        for name in self.names():
            match = re.match(r"\.part-(\d+)-.*\.tmp$", name)
            if match and int(match.group(1)) in shards:
                self.fs.rm_file(f"{self.path}/{name}")

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Any]:
        """A binary file that takes its name when the block ends without an exception."""
        from scalegmn_fast.data.files import atomic_write

        if _is_local(self.fs):
            with atomic_write(os.path.join(self.path, name)) as handle:
                yield handle
            return
        with tempfile.TemporaryDirectory(prefix="scalegmn-fast-embed-") as folder:
            local = os.path.join(folder, name)
            with open(local, "wb") as handle:
                yield handle
            temporary = f"{self.path}/.{name}.tmp"
            self.fs.put_file(local, temporary)
            self.fs.mv(temporary, f"{self.path}/{name}")


def _check_same(old: Any, new: Mapping[str, Any], where: str) -> None:
    """Raises ValueError that names what differs between the manifest of ``out`` and this run."""
    if not isinstance(old, dict) or old.get("format") != FORMAT or old.get("version") != VERSION:
        raise ValueError(f"out: the {MANIFEST} in '{where}' is not one of scalegmn-fast embed, version {VERSION}")
    differences = [
        f"{key}: {old.get(key)!r} there, {new[key]!r} now"
        for key in new
        if key != "shards" and old.get(key) != new[key]
    ]
    before = {shard["path"]: shard for shard in old["shards"]}
    now = {shard["path"]: shard for shard in new["shards"]}
    for path in [*now, *(path for path in before if path not in now)]:
        if before.get(path) != now.get(path):
            what = "missing now" if path not in now else "new" if path not in before else "changed"
            differences.append(f"shard '{path}' is {what}")
    if not differences and old["shards"] != new["shards"]:
        differences.append("the shards come in another order")
    if differences:
        shown = "; ".join(differences[:3]) + "; ..." * (len(differences) > 3)
        raise ValueError(f"out: '{where}' belongs to another run: {shown}")


class _Job:
    """One process's work: the model, and the parts that it makes of shards."""

    def __init__(self, model, statistics, state, checkpoint, manifest, folder: _Folder, device):
        from scalegmn_fast.data.optional import require

        self.arrow = require("pyarrow", "writing Parquet files", "embed")
        self.parquet = require("pyarrow.parquet", "writing Parquet files", "embed")
        self.model, self.statistics, self.state, self.checkpoint = model, statistics, state, checkpoint
        self.manifest, self.folder, self.device = manifest, folder, device
        self.finished = folder.finished()
        self.counts = Counts()

    def embed(self, number: int, shard: _Shard, bar) -> None:
        """Writes the parts of a shard that are missing."""
        from scalegmn_fast.data import open_packed

        from .evaluate import fitting

        done = self.finished.get(number, set())
        self.counts.found += len(done)
        if done and len(done) == next(iter(done))[1]:
            return
        with shard.local() as path:
            dataset = fitting(open_packed(path), self.state, self.checkpoint)
            rows = self.manifest["part_rows"] or len(dataset)
            pieces = -(-len(dataset) // rows)
            for piece in range(pieces):
                if (piece, pieces) not in done:
                    name = f"part-{number:05d}-{piece:05d}-of-{pieces:05d}.parquet"
                    stop = min(len(dataset), (piece + 1) * rows)
                    with self.folder.whole(name) as handle:
                        self._write(handle, shard, dataset, range(piece * rows, stop), bar)
                    self.counts.written += 1
                    self.counts.networks += stop - piece * rows

    def _write(self, handle, shard: _Shard, dataset, rows: range, bar) -> None:
        writer, waiting, waiting_bytes = None, [], 0
        with contextlib.ExitStack() as stack:
            for start in range(rows.start, rows.stop, self.manifest["batch_size"]):
                indices = slice(start, min(rows.stop, start + self.manifest["batch_size"]))
                table = self._table(shard, dataset, indices)
                writer = writer or stack.enter_context(self.parquet.ParquetWriter(handle, table.schema))
                waiting.append(table)
                waiting_bytes += table.nbytes
                if waiting_bytes >= _ROW_GROUP_BYTES or indices.stop == rows.stop:
                    writer.write_table(self.arrow.concat_tables(waiting).combine_chunks())
                    waiting, waiting_bytes = [], 0
                bar.update(indices.stop - indices.start)

    def _table(self, shard: _Shard, dataset, indices: slice):
        """Rows of the networks ``indices``."""
        graph, _ = dataset.batch(indices, self.statistics)
        embedding = self.model.embed(graph.to(device=self.device))
        columns = {"embedding": embedding}
        if self.manifest["predictions"]:
            columns["prediction"] = self.model.read_out(embedding)
        arrow, numbers = self.arrow, range(indices.start, indices.stop)
        arrays = [arrow.array([shard.name] * len(numbers), arrow.string()), arrow.array(numbers, arrow.int64())]
        for name, values in columns.items():
            values = values.float().cpu()
            bad = (~values.isfinite()).any(dim=1).nonzero()
            if len(bad):
                raise ValueError(f"network {indices.start + int(bad[0])}: its {name} is not finite")
            arrays.append(arrow.FixedSizeListArray.from_arrays(values.contiguous().view(-1).numpy(), values.shape[1]))
        metadata = {
            "scalegmn_fast.checkpoint": self.manifest["checkpoint"]["sha256"],
            "scalegmn_fast.shard": json.dumps(shard.identity),
        }
        return arrow.table(arrays, names=["shard", "index", *columns], metadata=metadata)
