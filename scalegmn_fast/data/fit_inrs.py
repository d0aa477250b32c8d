"""Fit one small coordinate network (INR) to every image of a data set and pack the networks.

All networks of a chunk are fitted together by one batched program: forward pass, gradients written out by hand and Adam
on the stacked parameters, in buffers that stay in the cache. Worker threads take chunks in turn. Each chunk's result
goes to a work file next to the output as soon as it is there; a run that was interrupted in any way continues from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from .files import atomic_write
from .images import ImageSet, load_images
from .inr import ACTIVATIONS, coordinates, layer_w0, plot_reconstructions
from .optional import progress
from .packed import PackedDataset, write_packed
from .splits import draw_splits

__all__ = ["FitSettings", "fit_inrs", "fit_networks", "initial_parameters"]

_OUTPUT_OFFSET = 0.5
_ADAM_BETAS = (0.9, 0.999)
_ADAM_EPS = 1e-8
_RECORD_HEADER = 8
_WORK_HEADER = 4096


@dataclass(frozen=True)
class FitSettings:
    """What decides the fitted networks, besides the images.

    ``hidden``: hidden layer sizes; ``activation``: sine, relu or tanh; ``w0``: one value, or one per hidden layer
    (sine); ``steps`` of Adam at ``learning_rate``, which falls to zero along a cosine if ``decay``; ``seed``;
    ``copies``: networks per image, each from its own start; ``chunk``: networks fitted together (0: chosen from the
    sizes, the same on all machines).
    """

    hidden: tuple[int, ...] = (32, 32)
    activation: str = "sine"
    w0: tuple[float, ...] = (30.0,)
    steps: int = 300
    learning_rate: float = 5e-4
    decay: bool = False
    seed: int = 0
    copies: int = 1
    chunk: int = 0

    def __post_init__(self) -> None:
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must be one or more positive layer sizes, got {list(self.hidden)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        layer_w0(self.w0, len(self.hidden))
        for name, least in (("steps", 0), ("seed", 0), ("copies", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def layout(self, channels: int) -> tuple[int, ...]:
        """Layer sizes of the INRs of images with so many channels."""
        return (2, *self.hidden, channels)

    def chunk_size(self, pixels: int) -> int:
        """Networks per chunk: about a megabyte of activations, so that a step's buffers stay in a core's cache."""
        return self.chunk or max(4, min(128, 2**17 // (pixels * max(self.hidden))))


def _layer_slices(layout: Sequence[int]) -> list[tuple[slice, slice]]:
    """Per layer, where weights and biases lie in a network's parameter vector."""
    result, offset = [], 0
    for n_in, n_out in zip(layout, layout[1:], strict=False):
        weights = slice(offset, offset + n_in * n_out)
        biases = slice(weights.stop, weights.stop + n_out)
        result.append((weights, biases))
        offset = biases.stop
    return result


def parameter_count(layout: Sequence[int]) -> int:
    """Weights and biases of one network."""
    return _layer_slices(layout)[-1][1].stop


def initial_parameters(
    layout: Sequence[int], activation: str, w0: Sequence[float], seed: int, images: Sequence[int], copies: Sequence[int]
) -> np.ndarray:
    """Starts of networks, float32 [B, parameters]: per layer the weights (source-major), then the biases.

    Each is a function of (seed, image index, copy) alone, by a counter-based generator. sine: weights of the first
    layer U(-1/n, 1/n), of the others U(-sqrt(6/n)/w0, sqrt(6/n)/w0), n the layer's inputs; biases 0. relu and tanh:
    weights U(-g sqrt(3/n), g sqrt(3/n)) with g = sqrt(2) and 5/3 (1 in the last layer), biases U(-1/sqrt(n),
    1/sqrt(n)).
    """
    slices = _layer_slices(layout)
    hidden_w0 = layer_w0(list(w0), len(layout) - 2)
    bound = np.empty(slices[-1][1].stop, np.float32)
    for layer, (weight, bias) in enumerate(slices):
        n = layout[layer]
        last = layer == len(slices) - 1
        if activation == "sine":
            scale = hidden_w0[-1 if last else layer]
            bound[weight] = 1 / n if layer == 0 else math.sqrt(6 / n) / scale
            bound[bias] = 0.0
        else:
            gain = 1.0 if last else math.sqrt(2.0) if activation == "relu" else 5 / 3
            bound[weight] = gain * math.sqrt(3 / n)
            bound[bias] = 1 / math.sqrt(n)
    raw = np.empty((len(images), len(bound)), np.uint64)
    for row, (image, copy) in enumerate(zip(images, copies, strict=True)):
        generator = np.random.Philox(
            key=np.array([seed, image], np.uint64), counter=np.array([0, 0, copy, 0], np.uint64)
        )
        raw[row] = generator.random_raw(len(bound))
    uniform = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return uniform * bound


class _Stack:
    """C networks of one layout, their gradients and the buffers of a step; all float32, one thread."""

    def __init__(self, layout: Sequence[int], settings: FitSettings, chunk: int, points: torch.Tensor):
        self.layout = tuple(layout)
        self.activation = settings.activation
        hidden = len(layout) - 2
        scales = layer_w0(list(settings.w0), hidden) if settings.activation == "sine" else [1.0] * hidden
        self.scales = [*scales, 1.0]
        self.slices = _layer_slices(layout)
        total = parameter_count(layout)
        self.parameters = torch.zeros(chunk * total)
        self.gradient = torch.zeros_like(self.parameters)
        self.weights, self.biases = self._views(self.parameters, chunk)
        self.weight_gradients, self.bias_gradients = self._views(self.gradient, chunk)
        shape = [(chunk, len(points), width) for width in layout[1:]]
        self.outputs = [torch.empty(s) for s in shape]
        self.slopes = [torch.empty(s) for s in shape[:-1]]
        self.deltas = [torch.empty(s) for s in shape]
        self.points = points.expand(chunk, -1, -1)

    def _views(self, flat: torch.Tensor, chunk: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Layer-major: every layer's weights of all networks are contiguous, and all of them are one vector for
        Adam."""
        weights, biases, offset = [], [], 0
        for n_in, n_out in zip(self.layout, self.layout[1:], strict=False):
            weights.append(flat[offset : offset + chunk * n_in * n_out].view(chunk, n_in, n_out))
            offset += chunk * n_in * n_out
            biases.append(flat[offset : offset + chunk * n_out].view(chunk, 1, n_out))
            offset += chunk * n_out
        return weights, biases

    def load(self, rows: torch.Tensor) -> None:
        """Take the parameter vectors [C, parameters]."""
        for layer, (weight, bias) in enumerate(self.slices):
            self.weights[layer].copy_(rows[:, weight].view_as(self.weights[layer]))
            self.biases[layer].copy_(rows[:, bias].view_as(self.biases[layer]))

    def store(self) -> torch.Tensor:
        """The parameter vectors [C, parameters]."""
        both = zip(self.weights, self.biases, strict=True)
        return torch.cat([part.reshape(len(part), -1) for pair in both for part in pair], dim=1)

    def forward(self, slopes: bool = True) -> torch.Tensor:
        """Outputs [C, P, n_out] without the offset; ``slopes``: also the activations' derivatives, for ``backward``."""
        x = self.points
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            scale = self.scales[layer]
            z = self.deltas[layer] if layer < last else self.outputs[layer]
            torch.baddbmm(bias, x, weight, beta=scale, alpha=scale, out=z)
            if layer < last:
                x = self.outputs[layer]
                if self.activation == "sine":
                    torch.sin(z, out=x)
                    if slopes:
                        torch.cos(z, out=self.slopes[layer])
                elif self.activation == "relu":
                    torch.clamp_min(z, 0.0, out=x)
                    if slopes:
                        torch.sign(x, out=self.slopes[layer])
                else:
                    torch.tanh(z, out=x)
                    if slopes:
                        torch.mul(x, x, out=self.slopes[layer]).neg_().add_(1.0)
        return self.outputs[-1]

    def backward(self, targets: torch.Tensor) -> None:
        """Gradient of every network's mean squared error against ``targets`` [C, P, n_out]."""
        last = len(self.weights) - 1
        delta = torch.sub(self.outputs[last], targets, out=self.deltas[last])
        delta.mul_(2.0 / (targets.shape[1] * targets.shape[2]))
        for layer in range(last, -1, -1):
            # delta: gradient wrt the pre-activation scale * (x W + b).
            scale = self.scales[layer]
            x = self.outputs[layer - 1] if layer else self.points
            gradient = self.weight_gradients[layer]
            torch.baddbmm(gradient, x.transpose(1, 2), delta, beta=0, alpha=scale, out=gradient)
            torch.sum(delta, dim=1, keepdim=True, out=self.bias_gradients[layer])
            if scale != 1.0:
                self.bias_gradients[layer].mul_(scale)
            if layer:
                below = self.deltas[layer - 1]
                torch.baddbmm(below, delta, self.weights[layer].transpose(1, 2), beta=0, alpha=scale, out=below)
                delta = below.mul_(self.slopes[layer - 1])


def fit_networks(
    starts: torch.Tensor,
    targets: torch.Tensor,
    shape: tuple[int, int],
    settings: FitSettings,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Fit C networks: (parameters float32 [C, parameters], mean squared error float32 [C]).

    ``starts`` float32 [C, parameters] as from `initial_parameters`; ``targets`` float32 [C, height * width,
    channels] from 0 to 1, row-major; ``shape`` (height, width). Bitwise reproducible on one machine with one thread.
    None where ``should_stop()`` became true.
    """
    layout = settings.layout(targets.shape[2])
    stack = _Stack(layout, settings, len(starts), coordinates(*shape))
    stack.load(starts)
    shifted = targets - _OUTPUT_OFFSET
    optimizer = torch.optim.Adam(
        [stack.parameters], lr=settings.learning_rate, betas=_ADAM_BETAS, eps=_ADAM_EPS, fused=True
    )
    stack.parameters.grad = stack.gradient
    for step in range(settings.steps):
        if should_stop():
            return None
        if settings.decay:
            optimizer.param_groups[0]["lr"] = (
                settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            )
        stack.forward()
        stack.backward(shifted)
        optimizer.step()
    error = (stack.forward(slopes=False) - shifted).square().mean(dim=(1, 2))
    return stack.store(), error


class _WorkFile:
    """Finished chunks on the disk: a header that says what they belong to, then one record per chunk with its checksum.

    A record that was cut short does not pass its checksum and is computed again.
    """

    def __init__(self, path: Path, identity: dict[str, object], record_floats: int):
        self.path = path
        self._record = _RECORD_HEADER + 4 * record_floats
        header = json.dumps(identity, sort_keys=True).encode()
        if len(header) >= _WORK_HEADER:
            raise ValueError(f"the settings take {len(header)} bytes, more than {_WORK_HEADER}")
        header = header.ljust(_WORK_HEADER)
        if path.exists():
            with open(path, "rb") as handle:
                found = handle.read(_WORK_HEADER)
            if found != header:
                raise ValueError(
                    f"{path} is the work file of another run{self._difference(found, identity)}; "
                    "delete it, or finish that run"
                )
        else:
            with atomic_write(path) as handle:
                handle.write(header)
        self._file = open(path, "r+b")

    @staticmethod
    def _difference(found: bytes, identity: dict[str, object]) -> str:
        try:
            other = json.loads(found)
            key = next(k for k in sorted(identity) if identity[k] != other.get(k))
        except (ValueError, AttributeError, StopIteration):
            return ""
        return f" ({key}: {other.get(key)!r} there, {identity[key]!r} here)"

    def read(self, chunk: int) -> np.ndarray | None:
        """The floats of a finished chunk, or None."""
        record = os.pread(self._file.fileno(), self._record, _WORK_HEADER + chunk * self._record)
        if len(record) < self._record:
            return None
        payload = record[_RECORD_HEADER:]
        expected = (chunk << 32 | zlib.crc32(payload)).to_bytes(_RECORD_HEADER, "little")
        return np.frombuffer(payload, np.float32) if record[:_RECORD_HEADER] == expected else None

    def write(self, chunk: int, values: np.ndarray) -> None:
        payload = np.ascontiguousarray(values, np.float32).tobytes()
        record = (chunk << 32 | zlib.crc32(payload)).to_bytes(_RECORD_HEADER, "little") + payload
        os.pwrite(self._file.fileno(), record, _WORK_HEADER + chunk * self._record)

    def close(self) -> None:
        self._file.close()


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``event`` meanwhile (only where Python allows handlers: in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.signal(s, lambda *_: event.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quality_report(psnr: np.ndarray, bins: int = 8) -> str:
    """Mean, least, quartiles and a histogram of PSNR values, as lines of text."""
    low, median, high = np.percentile(psnr, [25, 50, 75])
    counts, edges = np.histogram(psnr, bins=bins)
    lines = [
        f"PSNR of {len(psnr)} networks: mean {psnr.mean():.2f} dB, min {psnr.min():.2f}, "
        f"quartiles {low:.2f} / {median:.2f} / {high:.2f}, max {psnr.max():.2f}"
    ]
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        lines.append(f"  {left:6.1f} - {right:6.1f} dB {count:7d} {'#' * math.ceil(40 * count / counts.max())}")
    return "\n".join(lines)


def fit_inrs(
    images: ImageSet,
    output: str | os.PathLike,
    settings: FitSettings | None = None,
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.15,
    threads: int | None = None,
    show_progress: bool = True,
    overwrite: bool = False,
) -> PackedDataset:
    """Fit networks to ``images`` and write them to the packed dataset ``output``.

    Network k of the output belongs to image k mod n and is copy k // n of it, its start a function of (seed, k mod n, k
    // n). Copies of an image are in its split. Splits that the source lacks are drawn at random (see
    `scalegmn_fast.data.draw_splits`). Extras of the file: ``psnr`` float32 and ``image_index`` int64.

    Finished chunks are kept in ``<output>.partial``: after a crash or an interruption the same call goes on from there,
    and the bytes of the output are those of an uninterrupted run (on one machine; the number of threads does not
    matter). An output that the same call has completed before is returned as it is; another file is an error unless
    ``overwrite``. Raises KeyboardInterrupt when interrupted, ValueError naming what does not fit.
    """
    settings = settings or FitSettings()
    output = Path(output)
    n, (height, width, channels) = len(images), images.pixels.shape[1:]
    layout = settings.layout(channels)
    splits = np.tile(
        draw_splits(n, given=images.splits, val_fraction=val_fraction, test_fraction=test_fraction, seed=settings.seed),
        settings.copies,
    )
    chunk = settings.chunk_size(height * width)
    # Lists, as in the JSON that they are compared with.
    fit = json.loads(json.dumps({**asdict(settings), "chunk": chunk}))
    fit |= {"images": images.name, "images_sha256": images.digest()}
    fit |= {"val_fraction": val_fraction, "test_fraction": test_fraction}
    if output.exists() and not overwrite:
        finished = PackedDataset(output)
        if finished.metadata.get("fit") != fit:
            raise ValueError(f"{output} exists and was made from other images or settings; delete it, or overwrite it")
        return finished
    if not output.parent.is_dir():
        raise FileNotFoundError(f"cannot write {output}: the folder {output.parent} does not exist")

    total = n * settings.copies
    parameters = parameter_count(layout)
    chunks = -(-total // chunk)
    work = _WorkFile(output.with_name(output.name + ".partial"), fit, chunk * (parameters + 1))
    results = np.empty((chunks * chunk, parameters + 1), np.float32)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    missing: set[int] = set()
    resumed = 0
    for index in range(chunks):
        stored = work.read(index)
        if stored is None:
            missing.add(index)
            todo.put(index)
        else:
            results[index * chunk : (index + 1) * chunk] = stored.reshape(chunk, -1)
            resumed += min(chunk, total - index * chunk)
    stop = threading.Event()
    failures: list[BaseException] = []
    finished_chunks: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def work_on_chunks() -> None:
        # One thread per chunk: the number of threads PyTorch uses is a setting of each thread.
        torch.set_num_threads(1)
        try:
            while not stop.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    break
                # The last chunk is filled up with further networks, so that every chunk runs the same program.
                networks = np.arange(index * chunk, (index + 1) * chunk)
                starts = initial_parameters(
                    layout, settings.activation, settings.w0, settings.seed, networks % n, networks // n
                )
                fitted = fit_networks(
                    torch.from_numpy(starts),
                    torch.from_numpy(images.scaled(networks % n)),
                    (height, width),
                    settings,
                    stop.is_set,
                )
                if fitted is None:
                    break
                rows = results[index * chunk : (index + 1) * chunk]
                rows[:, :-1], rows[:, -1] = fitted[0].numpy(), fitted[1].numpy()
                work.write(index, rows)
                finished_chunks.put(index)
        except BaseException as error:  # handed to the caller
            failures.append(error)
            stop.set()
        finally:
            finished_chunks.put(None)

    count = min(threads or _available_cores(), max(1, len(missing)))
    workers = [threading.Thread(target=work_on_chunks, daemon=True) for _ in range(count)]
    try:
        with (
            _signals_set(stop),
            progress(total=total, initial=resumed, unit="network", desc="fit", disable=not show_progress) as bar,
        ):
            for worker in workers:
                worker.start()
            alive = count
            while alive:
                index = finished_chunks.get()
                if index is None:
                    alive -= 1
                else:
                    missing.discard(index)
                    end = min(total, (index + 1) * chunk)
                    bar.update(end - index * chunk)
                    bar.set_postfix_str(f"{-10 * np.log10(results[index * chunk : end, -1]).mean():.1f} dB")
    finally:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        work.close()
    if failures:
        raise failures[0]
    if missing:
        raise KeyboardInterrupt
    results = results[:total]
    quality = -10 * np.log10(np.maximum(results[:, -1].astype(np.float64), 1e-20))
    slices = _layer_slices(layout)
    write_packed(
        output,
        [results[:, weight].reshape(total, layout[layer], -1, 1) for layer, (weight, _) in enumerate(slices)],
        [results[:, bias].reshape(total, -1, 1) for _, bias in slices],
        np.tile(images.labels, settings.copies),
        splits,
        {
            "activation": settings.activation,
            "w0": fit["w0"] if settings.activation == "sine" else None,
            "symmetry": "scale" if settings.activation == "relu" else "sign",
            "input_value": 1.0,
            "output_offset": _OUTPUT_OFFSET,
            "coordinates": "x = (column, row), each from -1 to 1 with the corner pixels at -1 and 1; pixels row-major",
            "image_shape": [height, width, channels],
            "source": f"fitted to {images.name}",
            "fit": fit,
        },
        extras={"psnr": quality.astype(np.float32), "image_index": np.tile(np.arange(n), settings.copies)},
    )
    work.path.unlink()
    return PackedDataset(output)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="'digits', a folder (IDX files of the MNIST family, or images by class), an IDX file, or an .npz"
    )
    parser.add_argument("output", help="packed file to write: .safetensors, or .npz")
    images = parser.add_argument_group("images")
    images.add_argument("--labels", help="IDX file of labels, where the source is an IDX file of images")
    images.add_argument("--test-images", help="IDX file of test images")
    images.add_argument("--test-labels", help="IDX file of test labels")
    images.add_argument(
        "--keys", nargs=2, default=("images", "labels"), metavar=("IMAGES", "LABELS"), help="arrays of an .npz"
    )
    images.add_argument("--test-keys", nargs=2, metavar=("IMAGES", "LABELS"), help="test arrays of an .npz")
    images.add_argument(
        "--resize", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="resize an image folder's images"
    )
    images.add_argument("--grayscale", action="store_true", help="read an image folder as grey images")
    images.add_argument("--limit", type=int, help="use about this many images, the first of every split")
    default = FitSettings()
    networks = parser.add_argument_group("networks")
    networks.add_argument(
        "--hidden", type=int, nargs="+", default=default.hidden, help="hidden layer sizes (default: 32 32)"
    )
    networks.add_argument("--activation", choices=ACTIVATIONS, default=default.activation, help="default: %(default)s")
    networks.add_argument(
        "--w0", type=float, nargs="+", default=default.w0, help="one value, or one per hidden layer (default: 30)"
    )
    networks.add_argument("--steps", type=int, default=default.steps, help="of Adam (default: %(default)s)")
    networks.add_argument(
        "--lr", type=float, default=default.learning_rate, help="learning rate (default: %(default)s)"
    )
    networks.add_argument("--decay", action="store_true", help="let the learning rate fall to zero along a cosine")
    networks.add_argument(
        "--seed", type=int, default=default.seed, help="of starts and drawn splits (default: %(default)s)"
    )
    networks.add_argument(
        "--copies", type=int, default=default.copies, help="networks per image (default: %(default)s)"
    )
    parts = parser.add_argument_group("splits that the source lacks")
    parts.add_argument("--test-fraction", type=float, default=0.15, help="of all images (default: %(default)s)")
    parts.add_argument("--val-fraction", type=float, default=0.1, help="of the training images (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=0, help="networks fitted together (default: fitted to the cache)")
    parser.add_argument("--threads", type=int, help="worker threads (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output made from other images or settings")
    parser.add_argument("--plot", metavar="PNG", help="also draw what some of the networks stand for")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    images = load_images(
        args.source,
        args.labels,
        test_images=args.test_images,
        test_labels=args.test_labels,
        keys=args.keys,
        test_keys=args.test_keys,
        resize=tuple(args.resize) if args.resize else None,
        grayscale=args.grayscale,
    )
    if args.limit is not None:
        images = images.limited(args.limit)
    settings = FitSettings(
        hidden=tuple(args.hidden),
        activation=args.activation,
        w0=tuple(args.w0),
        steps=args.steps,
        learning_rate=args.lr,
        decay=args.decay,
        seed=args.seed,
        copies=args.copies,
        chunk=args.chunk,
    )
    start = time.perf_counter()
    try:
        dataset = fit_inrs(
            images,
            args.output,
            settings,
            val_fraction=args.val_fraction,
            test_fraction=args.test_fraction,
            threads=args.threads,
            show_progress=not args.quiet,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {args.output}.partial", file=sys.stderr)
        return 130
    print(dataset)
    print(f"{time.perf_counter() - start:.1f} s")
    print(quality_report(dataset.extra("psnr").numpy()))
    if args.plot:
        plot_reconstructions(args.output, args.plot)
        print(f"reconstructions: {args.plot}")
    return 0
