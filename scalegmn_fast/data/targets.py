"""Target images for training networks that edit INRs: styled images, put into a packed dataset."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from .images import ImageSet, load_images
from .inr import reconstruct
from .packed import PackedDataset, write_packed

__all__ = ["STYLES", "add_targets"]

_CHUNK = 512


def _dilate(images: torch.Tensor) -> torch.Tensor:
    """Of each pixel the largest of the 3 x 3 around it, per channel; [b, height, width, channels]."""
    return F.max_pool2d(images.movedim(3, 1), 3, stride=1, padding=1).movedim(1, 3)


def _erode(images: torch.Tensor) -> torch.Tensor:
    return -_dilate(-images)


#: name -> what it makes of images float32 [b, height, width, channels]
STYLES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"dilate": _dilate, "erode": _erode}


def add_targets(
    source: str | os.PathLike,
    output: str | os.PathLike,
    style: str,
    *,
    images: ImageSet | None = None,
    shape: tuple[int, int] | None = None,
) -> PackedDataset:
    """Writes the packed dataset of INRs ``source`` again, with target images in ``style`` (one of `STYLES`).

    The images are those that the networks stand for, clipped to [0, 1], or ``images``, those that they were fitted to:
    network k's is number ``image_index[k]`` where the file has such an array, else number k. They are stored as uint8.

    Args:
        shape: height and width at which networks are evaluated; None: the file's ``image_shape``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown style; networks that stand for no images; images of another number, size or channels.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    dataset = PackedDataset(source)
    numbers = None
    if images is not None:
        numbers = _image_numbers(dataset, images, shape)
    parts = []
    for start in range(0, len(dataset), _CHUNK):
        block = slice(start, min(start + _CHUNK, len(dataset)))
        if numbers is None:
            found = reconstruct(dataset, block, shape=shape).clamp(0, 1)
        else:
            chosen = numbers[block].numpy()
            found = torch.from_numpy(images.scaled(chosen)).view(len(chosen), *images.pixels.shape[1:])
        parts.append((STYLES[style](found) * 255).round().to(torch.uint8))
    weights, biases = dataset.weights(slice(None), dtype=None)
    others = {name: dataset.extra(name) for name in dataset.extras if name != "target"}
    made_of = "the networks' own images" if images is None else images.name
    write_packed(
        output,
        weights,
        biases,
        dataset.labels,
        dataset.splits,
        {**dataset.metadata, "target": {"style": style, "of": made_of}},
        dataset.sign_mask(),
        extras={**others, "target": torch.cat(parts)},
    )
    return PackedDataset(output)


def _image_numbers(dataset: PackedDataset, images: ImageSet, shape: tuple[int, int] | None) -> torch.Tensor:
    """int64 [n]: which image each network was fitted to."""
    size = images.pixels.shape[1:]
    expected = shape or tuple(dataset.metadata.get("image_shape", size)[:2])
    if (*expected, dataset.layout[-1]) != size:
        raise ValueError(
            f"images: {dataset.path} stands for images of {expected[0]} x {expected[1]} pixels and "
            f"{dataset.layout[-1]} channels, got {size[0]} x {size[1]} and {size[2]}"
        )
    if "image_index" in dataset.extras:
        numbers = dataset.extra("image_index").long()
        if int(numbers.min()) < 0 or int(numbers.max()) >= len(images):
            raise ValueError(f"images: {dataset.path} needs image {int(numbers.max())}, got {len(images)} images")
        return numbers
    if len(images) != len(dataset):
        raise ValueError(
            f"images: {dataset.path} does not say which image each of its {len(dataset)} networks was fitted to "
            f"(image_index), so one image per network is needed, got {len(images)}"
        )
    return torch.arange(len(dataset))


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``scalegmn-fast targets``."""
    parser.add_argument("source", help="packed dataset of INRs")
    parser.add_argument("output", help="packed file to write: .safetensors, or .npz")
    parser.add_argument("--style", choices=list(STYLES), default="dilate", help="default: %(default)s")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images; default: what the file says"
    )
    parser.add_argument(
        "--images",
        help="the images that the networks were fitted to (a source of fit-inrs), to be styled instead of those that "
        "the networks stand for",
    )
    parser.add_argument("--limit", type=int, help="--limit that fit-inrs was given")


def run(args: argparse.Namespace) -> int:
    """Adds targets; 0 when done."""
    images = None if args.images is None else load_images(args.images)
    if args.limit is not None:
        if images is None:
            raise ValueError("--limit belongs to --images, which is not given")
        images = images.limited(args.limit)
    shape = None if args.shape is None else tuple(args.shape)
    dataset = add_targets(args.source, args.output, args.style, images=images, shape=shape)
    print(dataset, file=sys.stdout)
    height, width, channels = dataset.targets(slice(0, 1)).shape[1:]
    print(f"targets: {height} x {width} x {channels}, {args.style}")
    return 0
