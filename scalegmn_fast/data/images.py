"""Labelled images from the usual sources: IDX files, .npz, a folder per class, scikit-learn's digits."""

from __future__ import annotations

import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .optional import require
from .packed import SPLITS

__all__ = ["ImageSet", "load_images", "read_idx"]

_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# Names of the four files of the MNIST family, each with or without .gz.
_MNIST_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "train"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "test"),
)


@dataclass
class ImageSet:
    """Images of one size with their classes.

    ``pixels``: uint8 [n, height, width, channels] (0 to 255) or float32 (0 to 1); ``labels``: int64 [n]; ``splits``:
    uint8 [n] (0 train, 1 val, 2 test) where the source has them, else None; ``name``: the source in a word.
    """

    pixels: np.ndarray
    labels: np.ndarray
    splits: np.ndarray | None
    name: str

    def __post_init__(self) -> None:
        if self.pixels.ndim == 3:
            self.pixels = self.pixels[..., None]
        if self.pixels.ndim != 4:
            raise ValueError(
                f"{self.name}: images must be [n, height, width] or [n, height, width, channels], "
                f"got {list(self.pixels.shape)}"
            )
        if 0 in self.pixels.shape:
            raise ValueError(f"{self.name}: no images, or images without pixels: shape {list(self.pixels.shape)}")
        if self.pixels.dtype != np.uint8:
            if self.pixels.dtype.kind not in "fiub":
                raise ValueError(f"{self.name}: images must be numbers, got {self.pixels.dtype}")
            self.pixels = self.pixels.astype(np.float32)
            low, high = float(self.pixels.min()), float(self.pixels.max())
            if not (0.0 <= low and high <= 1.0):
                raise ValueError(
                    f"{self.name}: images must be uint8, or floats from 0 to 1; got values from {low} to {high}"
                )
        self.labels = np.asarray(self.labels)
        if self.labels.shape != (len(self.pixels),):
            raise ValueError(
                f"{self.name}: one label per image: {len(self.pixels)} images, "
                f"labels of shape {list(self.labels.shape)}"
            )
        if self.labels.dtype.kind not in "iu":
            raise ValueError(f"{self.name}: labels must be integers, got {self.labels.dtype}")
        self.labels = self.labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def scaled(self, indices: np.ndarray) -> np.ndarray:
        """The images ``indices`` as float32 [b, height * width, channels] from 0 to 1, row-major."""
        chosen = self.pixels[indices]
        chosen = chosen.astype(np.float32) / np.float32(255) if chosen.dtype == np.uint8 else chosen
        return chosen.reshape(len(chosen), -1, chosen.shape[-1])

    def limited(self, limit: int) -> ImageSet:
        """About ``limit`` images: the first ones of every split, in the proportion of the splits."""
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if limit >= len(self):
            return self
        codes = np.zeros(len(self), np.uint8) if self.splits is None else self.splits
        kept = []
        for code in np.unique(codes):
            members = np.flatnonzero(codes == code)
            kept.append(members[: max(1, round(limit * len(members) / len(self)))])
        index = np.sort(np.concatenate(kept))
        return ImageSet(
            self.pixels[index], self.labels[index], None if self.splits is None else codes[index], self.name
        )

    def digest(self) -> str:
        """SHA-256 of shapes, pixels, labels and splits."""
        result = hashlib.sha256(repr((self.pixels.shape, self.pixels.dtype.str)).encode())
        for array in (self.pixels, self.labels, np.zeros(0, np.uint8) if self.splits is None else self.splits):
            result.update(np.ascontiguousarray(array).data)
        return result.hexdigest()


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array of an IDX file, gzip-compressed or not; ValueError that says how a damaged file is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no IDX file at {path}")
    with open(path, "rb") as handle:
        compressed = handle.read(2) == b"\x1f\x8b"
    try:
        data = (gzip.open if compressed else open)(path, "rb").read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: truncated or damaged gzip file: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_DTYPES or data[3] == 0:
        raise ValueError(f"{path}: not an IDX file: it starts with {data[:4].hex() or 'nothing'}")
    ndim = data[3]
    start = 4 + 4 * ndim
    if len(data) < start:
        raise ValueError(f"{path}: truncated: its header needs {start} bytes, the file has {len(data)}")
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(ndim))
    dtype = np.dtype(_IDX_DTYPES[data[2]])
    expected = start + int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "longer than its header says"
        raise ValueError(f"{path}: {problem}: shape {list(shape)} needs {expected} bytes, the file has {len(data)}")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def load_npz(path: str | os.PathLike, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an .npz (all where not given); ValueError where one is missing or the file is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: truncated, or not an .npz file")
    with np.load(path, allow_pickle=False) as archive:
        missing = [name for name in names or () if name not in archive.files]
        if missing:
            raise ValueError(f"{path}: no array {missing[0]!r}; it has {', '.join(archive.files) or 'none'}")
        try:
            return {name: archive[name] for name in (archive.files if names is None else names)}
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not an .npz file of plain arrays: {error}") from error


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray, str | None]], name: str) -> ImageSet:
    """One set from (images, labels, split or None) parts; a single part without a split has none."""
    sets = [ImageSet(images, labels, None, name) for images, labels, _ in parts]
    shapes = {s.pixels.shape[1:] for s in sets}
    if len(shapes) > 1:
        raise ValueError(f"{name}: training and test images differ in shape: {sorted(shapes)}")
    splits = None
    if any(split is not None for _, _, split in parts):
        codes = [SPLITS.index(split or "train") for _, _, split in parts]
        splits = np.concatenate([np.full(len(s), code, np.uint8) for s, code in zip(sets, codes, strict=True)])
    return ImageSet(np.concatenate([s.pixels for s in sets]), np.concatenate([s.labels for s in sets]), splits, name)


def _from_mnist_folder(folder: Path) -> ImageSet | None:
    """The four IDX files under their published names; None where the folder has none of them."""

    def find(stem: str) -> Path | None:
        return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)

    parts = []
    for image_stem, label_stem, split in _MNIST_FILES:
        image_file, label_file = find(image_stem), find(label_stem)
        if image_file is None:
            continue
        if label_file is None:
            raise FileNotFoundError(f"{folder} has {image_file.name} but no {label_stem}[.gz]")
        parts.append((read_idx(image_file), read_idx(label_file), split))
    return _joined(parts, folder.name) if parts else None


def _from_npz(path: Path, keys: Sequence[str], test_keys: Sequence[str] | None) -> ImageSet:
    loaded = load_npz(path, [*keys, *(test_keys or ())])
    parts: list[tuple[np.ndarray, np.ndarray, str | None]] = [
        (loaded[keys[0]], loaded[keys[1]], "train" if test_keys else None)
    ]
    if test_keys:
        parts.append((loaded[test_keys[0]], loaded[test_keys[1]], "test"))
    return _joined(parts, path.stem)


def _from_image_folder(folder: Path, resize: tuple[int, int] | None, grayscale: bool) -> ImageSet:
    split_folders = [(name, folder / name) for name in SPLITS if (folder / name).is_dir()]
    roots: list[tuple[str | None, Path]] = list(split_folders) or [(None, folder)]
    classes = sorted({c.name for _, root in roots for c in root.iterdir() if c.is_dir()})
    if not classes:
        raise ValueError(f"{folder}: neither IDX files nor a sub-folder of images per class")
    pillow = require("PIL.Image", "reading an image folder")
    parts: list[tuple[np.ndarray, np.ndarray, str | None]] = []
    shape = None
    for split, root in roots:
        pixels, labels = [], []
        for label, name in enumerate(classes):
            files = sorted(p for p in (root / name).glob("*") if p.suffix.lower() in _IMAGE_SUFFIXES)
            for file in files:
                try:
                    with pillow.open(file) as image:
                        converted = image.convert("L" if grayscale else "RGB")
                        resized = converted if resize is None else converted.resize((resize[1], resize[0]), pillow.BOX)
                        array = np.asarray(resized)
                except OSError as error:
                    raise ValueError(f"{file}: not a readable image: {error}") from error
                shape = shape or array.shape
                if array.shape != shape:
                    raise ValueError(
                        f"{file}: images must have one size: {array.shape[:2]} after {shape[:2]}; resize them all"
                    )
                pixels.append(array)
                labels.append(label)
        if pixels:
            parts.append((np.stack(pixels), np.asarray(labels, np.int64), split))
    if not parts:
        raise ValueError(f"{folder}: no images ({', '.join(_IMAGE_SUFFIXES)}) in its class folders")
    return _joined(parts, folder.name)


def load_images(
    source: str | os.PathLike,
    labels: str | os.PathLike | None = None,
    *,
    test_images: str | os.PathLike | None = None,
    test_labels: str | os.PathLike | None = None,
    keys: Sequence[str] = ("images", "labels"),
    test_keys: Sequence[str] | None = None,
    resize: tuple[int, int] | None = None,
    grayscale: bool = False,
) -> ImageSet:
    """Images with their classes from ``source``:

    - ``"digits"``: scikit-learn's bundled 8 x 8 digits, scaled to 0..1;
    - a folder with the IDX files of the MNIST family under their published names, gzip-compressed or not;
    - an IDX file of images, with ``labels`` naming the IDX file of labels (``test_images``, ``test_labels``: a test
      set);
    - an .npz with the arrays ``keys`` (images, labels) and, if given, ``test_keys``;
    - a folder with one sub-folder per class, in ``train``, ``val`` and ``test`` folders or without; classes are
      numbered in alphabetical order; ``resize`` (height, width) and ``grayscale`` apply here.

    Raises FileNotFoundError, or ValueError that names the file and what is wrong with it.
    """
    if str(source) == "digits":
        digits = require("sklearn.datasets", "the digits data set").load_digits()
        return ImageSet((digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64), None, "digits")
    path = Path(source)
    if path.is_dir():
        return _from_mnist_folder(path) or _from_image_folder(path, resize, grayscale)
    if path.suffix == ".npz":
        return _from_npz(path, keys, test_keys)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: expected 'digits', an IDX file, an .npz or a folder")
    if labels is None:
        raise ValueError(f"{path}: an IDX file of images needs the IDX file of its labels too")
    if (test_images is None) != (test_labels is None):
        raise ValueError("test_images and test_labels belong together: give both or neither")
    parts: list[tuple[np.ndarray, np.ndarray, str | None]] = [
        (read_idx(path), read_idx(labels), None if test_images is None else "train")
    ]
    if test_images is not None:
        parts.append((read_idx(test_images), read_idx(test_labels), "test"))
    return _joined(parts, path.name.split(".")[0])
