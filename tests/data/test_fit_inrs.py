"""Fitting INRs: gradients, starts, independence of chunks and threads, resuming after a kill, the packed result."""

import argparse
import importlib
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from scalegmn_fast.data import (
    FitSettings,
    ImageSet,
    PackedDataset,
    coordinates,
    evaluate_inrs,
    fit_inrs,
    load_images,
    plot_reconstructions,
    psnr,
    reconstruct,
)

module = importlib.import_module("scalegmn_fast.data.fit_inrs")

SMALL = {"hidden": (6, 5), "steps": 12, "learning_rate": 1e-2, "chunk": 4}


def images(n=10, height=5, width=4, channels=1, seed=0, splits=None):
    rng = np.random.default_rng(seed)
    return ImageSet(rng.random((n, height, width, channels), np.float32), rng.integers(0, 3, n), splits, "random")


def starts_of(layout, settings, n):
    return torch.from_numpy(
        module.initial_parameters(layout, settings.activation, settings.w0, settings.seed, range(n), [0] * n)
    )


def split_parameters(rows, layout):
    weights, biases = [], []
    for layer, (weight, bias) in enumerate(module._layer_slices(layout)):
        weights.append(rows[:, weight].reshape(len(rows), layout[layer], -1))
        biases.append(rows[:, bias])
    return weights, biases


@pytest.mark.parametrize(
    ("activation", "w0", "hidden"),
    [("sine", (30.0,), (6, 5)), ("sine", (30.0, 4.0), (6, 5)), ("relu", (30.0,), (7,)), ("tanh", (30.0,), (4, 5, 3))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_is_adam_on_the_mean_squared_error_of_every_network(activation, w0, hidden, channels):
    settings = FitSettings(hidden=hidden, activation=activation, w0=w0, steps=4, learning_rate=1e-3, decay=True)
    layout = settings.layout(channels)
    targets = torch.rand(3, 20, channels)
    starts = starts_of(layout, settings, 3)
    found, error = module.fit_networks(starts, targets, (5, 4), settings)
    for network in range(3):
        parameters = starts[network : network + 1].clone().requires_grad_()
        optimizer = torch.optim.Adam([parameters], lr=1e-3)

        def loss(parameters=parameters, network=network):
            weights, biases = split_parameters(parameters, layout)
            values = evaluate_inrs(weights, biases, coordinates(5, 4), activation=activation, w0=w0, output_offset=0.5)
            return (values - targets[network]).square().mean()

        for step in range(4):
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 4))
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert torch.allclose(found[network], parameters[0], rtol=0, atol=2e-5)
        assert not torch.allclose(found[network], starts[network], rtol=0, atol=5e-4)
        assert error[network].item() == pytest.approx(loss().item(), rel=1e-3)


@pytest.mark.parametrize("activation", ["sine", "relu", "tanh"])
def test_gradients(activation):
    settings = FitSettings(hidden=(6, 5), activation=activation, w0=(30.0, 7.0))
    layout = settings.layout(2)
    stack = module._Stack(layout, settings, 3, coordinates(5, 4))
    rows = starts_of(layout, settings, 3)
    stack.load(rows)
    assert torch.equal(stack.store(), rows)
    targets = torch.rand(3, 20, 2)
    stack.forward()
    stack.backward(targets)
    rows = rows.double().requires_grad_()
    values = evaluate_inrs(*split_parameters(rows, layout), coordinates(5, 4), activation=activation, w0=settings.w0)
    (values - targets).square().mean(dim=(1, 2)).sum().backward()
    parts = zip(stack.weight_gradients, stack.bias_gradients, strict=True)
    found = torch.cat([part.reshape(3, -1) for pair in parts for part in pair], dim=1)
    assert torch.allclose(found.double(), rows.grad, rtol=1e-4, atol=1e-5 * float(rows.grad.abs().max()))


def test_starts_depend_on_seed_image_and_copy_alone():
    layout = (2, 6, 5, 1)

    def start(seed, image, copy, others=()):
        rows = [*others, (image, copy)]
        return module.initial_parameters(layout, "sine", [30.0], seed, [r[0] for r in rows], [r[1] for r in rows])[-1]

    assert np.array_equal(start(3, 7, 1), start(3, 7, 1, others=[(0, 0), (9, 2)]))
    distinct = [start(3, 7, 1), start(4, 7, 1), start(3, 8, 1), start(3, 7, 2), start(3, 1, 7)]
    for a in range(5):
        for b in range(a):
            assert not np.isin(distinct[a][distinct[a] != 0], distinct[b]).any()


@pytest.mark.parametrize("activation", ["sine", "relu", "tanh"])
def test_start_distributions(activation):
    layout, w0 = (2, 64, 64, 1), [30.0, 15.0]
    rows = module.initial_parameters(layout, activation, w0, 0, range(200), [0] * 200)
    weights, biases = split_parameters(torch.from_numpy(rows), layout)
    if activation == "sine":
        bounds = [1 / 2, math.sqrt(6 / 64) / 15, math.sqrt(6 / 64) / 15]
        assert all(float(b.abs().max()) == 0 for b in biases)
    else:
        gain = math.sqrt(2) if activation == "relu" else 5 / 3
        bounds = [gain * math.sqrt(3 / 2), gain * math.sqrt(3 / 64), math.sqrt(3 / 64)]
        for bias, n in zip(biases, (2, 64, 64), strict=True):
            assert 0.9 / math.sqrt(n) < float(bias.abs().max()) <= 1 / math.sqrt(n)
    for weight, bound in zip(weights, bounds, strict=True):
        assert float(weight.abs().max()) <= bound * (1 + 1e-6)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(float(weight.mean())) < 0.02 * bound


def test_threads_and_limits_change_no_bit_and_chunks_only_roundings(tmp_path):
    def rows(name, count=10, threads=1, **changes):
        settings = FitSettings(**{**SMALL, **changes})
        source = images()
        source = ImageSet(source.pixels[:count], source.labels[:count], None, "random")
        dataset = fit_inrs(source, tmp_path / name, settings, threads=threads, show_progress=False)
        weights, biases = dataset.weights(slice(None))
        return torch.cat([t.flatten(1) for t in (*weights, *biases)], dim=1)

    reference = rows("a.safetensors")
    assert torch.equal(rows("b.safetensors", threads=3), reference)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(rows("c.safetensors", count=6), reference[:6])
    assert torch.allclose(rows("d.safetensors", chunk=7), reference, rtol=0, atol=1e-5)
    assert not torch.equal(rows("e.safetensors", seed=1), reference)
    assert not list(tmp_path.glob("*.partial"))


SCRIPT = """
import sys
import numpy as np
from scalegmn_fast.data import FitSettings, ImageSet, fit_inrs
rng = np.random.default_rng(0)
images = ImageSet(rng.random((10, 5, 4, 1), np.float32), rng.integers(0, 3, 10), None, "random")
module = sys.modules["scalegmn_fast.data.fit_inrs"]
fit_networks = module.fit_networks
count = 0
def slower(*arguments):
    global count
    count += 1
    if count > 2:
        print("started", flush=True)
        while not arguments[-1]():
            pass
        return None
    return fit_networks(*arguments)
module.fit_networks = slower
fit_inrs(images, sys.argv[1], FitSettings(hidden=(6, 5), steps=12, learning_rate=1e-2, chunk=4),
         threads=1, show_progress=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, number):
    whole = tmp_path / "whole.safetensors"
    fit_inrs(images(), whole, FitSettings(**SMALL), threads=1, show_progress=False)
    output = tmp_path / "killed.safetensors"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"started\n", process.stderr.read().decode()
        process.send_signal(number)
        errors = process.stderr.read().decode()
        assert process.wait(timeout=60) != 0
    assert number == signal.SIGKILL or "KeyboardInterrupt" in errors
    assert not output.exists() and output.with_name("killed.safetensors.partial").exists()

    fitted = []
    original = module.fit_networks
    monkeypatch.setattr(module, "fit_networks", lambda *a: fitted.append(1) or original(*a))
    fit_inrs(images(), output, FitSettings(**SMALL), threads=1, show_progress=False)
    assert len(fitted) == 1
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


def interrupted_run(tmp_path, monkeypatch, name="a.safetensors", after=2):
    """A work file with ``after`` finished chunks."""
    original = module.fit_networks
    count = []

    def stopping(*arguments):
        count.append(1)
        return original(*arguments) if len(count) <= after else None

    monkeypatch.setattr(module, "fit_networks", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_inrs(images(), tmp_path / name, FitSettings(**SMALL), threads=1, show_progress=False)
    monkeypatch.setattr(module, "fit_networks", original)
    return tmp_path / f"{name}.partial"


@pytest.mark.parametrize("damage", ["flipped bit", "cut short"])
def test_damaged_chunks_are_fitted_again(tmp_path, monkeypatch, damage):
    fit_inrs(images(), tmp_path / "whole.safetensors", FitSettings(**SMALL), threads=1, show_progress=False)
    work = interrupted_run(tmp_path, monkeypatch)
    data = bytearray(work.read_bytes())
    if damage == "flipped bit":
        data[-100] ^= 1
    work.write_bytes(data if damage == "flipped bit" else data[:-100])
    fitted = []
    original = module.fit_networks
    monkeypatch.setattr(module, "fit_networks", lambda *a: fitted.append(1) or original(*a))
    fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**SMALL), threads=1, show_progress=False)
    assert len(fitted) == 2
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_work_file_of_other_settings_or_images(tmp_path, monkeypatch):
    work = interrupted_run(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"partial is the work file of another run \(steps: 12 there, 13 here\)"):
        fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**{**SMALL, "steps": 13}), show_progress=False)
    with pytest.raises(ValueError, match=r"images_sha256"):
        fit_inrs(images(seed=1), tmp_path / "a.safetensors", FitSettings(**SMALL), show_progress=False)
    work.write_bytes(b"something else")
    with pytest.raises(ValueError, match="work file of another run; delete it"):
        fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**SMALL), show_progress=False)
    assert work.read_bytes() == b"something else"


def test_a_failing_chunk_raises_and_keeps_the_others(tmp_path, monkeypatch):
    original = module.fit_networks
    count = []

    def failing(*arguments):
        count.append(1)
        if len(count) == 2:
            raise RuntimeError("out of memory")
        return original(*arguments)

    monkeypatch.setattr(module, "fit_networks", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**SMALL), threads=1, show_progress=False)
    assert not (tmp_path / "a.safetensors").exists()
    assert len(fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**SMALL), show_progress=False)) == 10


def test_existing_output(tmp_path, monkeypatch):
    output = tmp_path / "a.safetensors"
    fit_inrs(images(), output, FitSettings(**SMALL), show_progress=False)
    before = output.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_networks", lambda *a: pytest.fail("fitted again"))
        assert len(fit_inrs(images(), output, FitSettings(**SMALL), show_progress=False)) == 10
    assert output.stat().st_mtime_ns == before
    other = FitSettings(**{**SMALL, "seed": 1})
    with pytest.raises(ValueError, match="a.safetensors exists and was made from other images or settings"):
        fit_inrs(images(), output, other, show_progress=False)
    assert fit_inrs(images(), output, other, show_progress=False, overwrite=True).metadata["fit"]["seed"] == 1


def test_copies_metadata_and_quality(tmp_path):
    source = images(12, height=6, width=4, channels=3)
    settings = FitSettings(hidden=(16, 16), steps=150, copies=2, learning_rate=1e-3)
    dataset = fit_inrs(source, tmp_path / "a.safetensors", settings, test_fraction=0.25, show_progress=False)
    assert len(dataset) == 24 and dataset.layout == (2, 16, 16, 3)
    assert torch.equal(dataset.splits[:12], dataset.splits[12:])
    assert [len(dataset.split(s)) for s in ("train", "val", "test")] == [16, 2, 6]
    assert dataset.extra("image_index").tolist() == [*range(12), *range(12)]
    assert dataset.labels.tolist() == source.labels.tolist() * 2
    weights, _ = dataset.weights(slice(None))
    assert not torch.allclose(weights[0][:12], weights[0][12:], atol=0.05)
    expected = {"activation": "sine", "w0": [30.0], "symmetry": "sign", "input_value": 1.0, "output_offset": 0.5}
    assert expected.items() <= dataset.metadata.items()
    assert dataset.metadata["image_shape"] == [6, 4, 3]

    restored = reconstruct(dataset, slice(None))
    assert restored.shape == (24, 6, 4, 3)
    quality = psnr(restored, torch.from_numpy(np.concatenate([source.pixels, source.pixels])))
    assert torch.allclose(quality, dataset.extra("psnr"), atol=0.05)
    assert float(quality.min()) > 25
    assert reconstruct(dataset, [0, 5], shape=(9, 7)).shape == (2, 9, 7, 3)


def test_given_splits_are_kept(tmp_path):
    codes = np.array([0, 2, 0, 0, 2, 0, 0, 0, 0, 2], np.uint8)
    dataset = fit_inrs(
        images(splits=codes), tmp_path / "a.npz", FitSettings(**SMALL), val_fraction=0.3, show_progress=False
    )
    assert dataset.split("test").tolist() == [1, 4, 9]
    assert len(dataset.split("val")) == 2 and len(dataset.split("train")) == 5


def test_a_pixel_keeps_its_place():
    """x is (column, row): a network that is the first coordinate shows a ramp from left to right."""
    points = coordinates(3, 5)
    assert points.reshape(3, 5, 2)[0, :, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert points.reshape(3, 5, 2)[:, 0, 1].tolist() == [-1, 0, 1]
    settings = FitSettings(hidden=(16, 16), steps=200, learning_rate=1e-3)
    ramp = torch.linspace(0, 1, 5).expand(1, 3, 5).reshape(1, 15, 1)
    rows, error = module.fit_networks(starts_of((2, 16, 16, 1), settings, 1), ramp, (3, 5), settings)
    assert error.item() < 1e-4
    values = evaluate_inrs(*split_parameters(rows, (2, 16, 16, 1)), torch.tensor([[1.0, -1.0]]), output_offset=0.5)
    assert values.item() == pytest.approx(1.0, abs=0.05)


def test_digits_are_fitted_well_and_fast(tmp_path):
    source = load_images("digits").limited(64)
    start = time.perf_counter()
    dataset = fit_inrs(source, tmp_path / "a.safetensors", FitSettings(steps=100), show_progress=False)
    assert time.perf_counter() - start < 60
    assert float(dataset.extra("psnr").min()) > 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": ()}, r"hidden must be one or more positive layer sizes, got \[\]"),
        ({"hidden": (8, 0)}, r"hidden must be .* got \[8, 0\]"),
        ({"activation": "gelu"}, "activation must be one of sine, relu, tanh, got 'gelu'"),
        ({"w0": (30.0, 30.0, 30.0)}, "each of 2 hidden layers, got 3"),
        ({"w0": (-1.0,)}, "w0 must be positive"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"chunk": -4}, "chunk must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        FitSettings(**changes)


def test_diverging_fit_is_reported_and_writes_nothing(tmp_path):
    settings = FitSettings(hidden=(6, 5), activation="relu", steps=60, learning_rate=1e30)
    with pytest.raises(ValueError, match="network 0 holds (NaN|Inf) in"):
        fit_inrs(images(), tmp_path / "a.safetensors", settings, show_progress=False)
    assert not (tmp_path / "a.safetensors").exists()


def test_bad_places(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder .*none does not exist"):
        fit_inrs(images(), tmp_path / "none" / "a.safetensors", FitSettings(**SMALL), show_progress=False)
    (tmp_path / "a.safetensors").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="not a packed dataset"):
        fit_inrs(images(), tmp_path / "a.safetensors", FitSettings(**SMALL), show_progress=False)


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    module.configure(parser)
    return module.run(parser.parse_args([str(a) for a in arguments]))


def test_command(tmp_path, capsys):
    output, picture = tmp_path / "digits.safetensors", tmp_path / "digits.png"
    arguments = ["digits", output, "--limit", "20", "--hidden", "8", "6", "--w0", "30", "10", "--steps", "40"]
    assert run_command(*arguments, "--lr", "1e-3", "--plot", picture, "--threads", "1") == 0
    printed = capsys.readouterr()
    assert "PSNR of 20 networks: mean" in printed.out and "dB" in printed.out
    assert "20/20" in printed.err
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dataset = PackedDataset(output)
    assert dataset.layout == (2, 8, 6, 1) and dataset.metadata["w0"] == [30.0, 10.0]
    assert [len(dataset.split(s)) for s in ("train", "val", "test")] == [15, 2, 3]
    report = module.quality_report(np.array([10.0, 20.0, 20.0, 40.0]), bins=3)
    assert "mean 22.50 dB, min 10.00" in report and report.count("\n") == 3


def test_interrupted_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "fit_networks", lambda *a: None)
    assert run_command("digits", tmp_path / "a.safetensors", "--limit", "5", "--quiet") == 130
    assert "a.safetensors.partial" in capsys.readouterr().err


def test_pictures(tmp_path):
    dataset = fit_inrs(images(channels=3), tmp_path / "a.safetensors", FitSettings(**SMALL), show_progress=False)
    plot_reconstructions(dataset.path, tmp_path / "a.png", indices=[3, 1], class_names=["x", "y", "z"])
    assert (tmp_path / "a.png").stat().st_size > 1000
    plot_reconstructions(dataset.path, tmp_path / "b.png", count=500, shape=(12, 12))
    assert (tmp_path / "b.png").stat().st_size > (tmp_path / "a.png").stat().st_size
