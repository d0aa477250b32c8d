"""Target images: how they are made, kept and read."""

import argparse
import pickle

import numpy as np
import pytest
import torch

from scalegmn_fast.data import (
    STYLES,
    FitSettings,
    ImageSet,
    PackedDataset,
    add_targets,
    fit_inrs,
    reconstruct,
    targets,
    write_packed,
)


def images_of_squares(count=10, side=6, channels=1):
    """uint8 images with one bright square each, and a split of two thirds, a sixth and a sixth."""
    pixels = np.zeros((count, side, side, channels), np.uint8)
    for k in range(count):
        row, column = k % (side - 1), (k // 2) % (side - 1)
        pixels[k, row : row + 2, column : column + 2] = 200 + k
    splits = np.repeat(np.arange(3, dtype=np.uint8), [count - 4, 2, 2])
    return ImageSet(pixels, np.arange(count) % 2, splits, "squares")


@pytest.fixture(params=[".safetensors", ".npz"])
def inrs(tmp_path, request):
    path = tmp_path / f"inrs{request.param}"
    fit_inrs(images_of_squares(), path, FitSettings(hidden=(6,), steps=30, copies=2), show_progress=False)
    return path


def run(*arguments):
    parser = argparse.ArgumentParser()
    targets.configure(parser)
    return targets.run(parser.parse_args([str(a) for a in arguments]))


@pytest.mark.parametrize(("style", "border"), [("dilate", -np.inf), ("erode", np.inf)])
def test_styles_are_morphology(style, border):
    ndimage = pytest.importorskip("scipy.ndimage")
    images = torch.rand(3, 7, 5, 2, generator=torch.Generator().manual_seed(0))
    function = {"dilate": ndimage.grey_dilation, "erode": ndimage.grey_erosion}[style]
    expected = function(images.numpy(), size=(1, 3, 3, 1), mode="constant", cval=border)
    assert np.array_equal(STYLES[style](images).numpy(), expected)


def test_targets_of_the_networks_own_images(inrs, tmp_path, capsys):
    out = tmp_path / "with.safetensors"
    assert run(inrs, out) == 0
    assert "targets: 6 x 6 x 1, dilate" in capsys.readouterr().out
    before, after = PackedDataset(inrs), PackedDataset(out)
    expected = STYLES["dilate"](reconstruct(before, slice(None)).clamp(0, 1))
    assert (after.targets() - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(after.targets([3, 1]), after.targets()[[3, 1]])
    for a, b in zip(sum(before.weights(slice(None)), []), sum(after.weights(slice(None)), []), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(before.labels, after.labels) and torch.equal(before.splits, after.splits)
    assert after.metadata == {**before.metadata, "target": {"style": "dilate", "of": "the networks' own images"}}
    assert set(after.extras) == {*before.extras, "target"}


def test_targets_of_the_images_that_networks_were_fitted_to(inrs, tmp_path):
    images = images_of_squares()
    found = add_targets(inrs, tmp_path / "with.safetensors", "erode", images=images).targets()
    expected = STYLES["erode"](torch.from_numpy(images.pixels).float() / 255)
    assert torch.equal(found, torch.cat([expected, expected]))  # two copies per image


def test_targets_replace_targets(inrs, tmp_path):
    first = add_targets(inrs, tmp_path / "a.npz", "dilate")
    second = add_targets(first.path, tmp_path / "b.npz", "erode")
    assert second.metadata["target"]["style"] == "erode" and (second.targets() < first.targets()).any()


def test_half_precision_networks_stay_so(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, a, b, generator=generator).half() for a, b in ((2, 5), (5, 1))]
    biases = [torch.randn(4, b, generator=generator).half() for b in (5, 1)]
    write_packed(tmp_path / "a.safetensors", weights, biases, [0, 1, 0, 1], {"train": range(4)}, {})
    after = add_targets(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "dilate", shape=(4, 3))
    assert after.weights(slice(None), None)[0][0].dtype == torch.float16
    assert after.targets().shape == (4, 4, 3, 1)


def test_batches_with_targets(inrs, tmp_path):
    dataset = add_targets(inrs, tmp_path / "with.safetensors", "dilate")
    wanted = dataset.with_targets()
    assert torch.equal(wanted.batch([4, 2])[1], dataset.targets([4, 2]))
    assert torch.equal(dataset.batch([4, 2])[1], dataset.labels[[4, 2]])
    assert torch.equal(pickle.loads(pickle.dumps(wanted)).batch([4])[1], dataset.targets([4]))


def test_files_without_targets(inrs):
    for function in (PackedDataset(inrs).targets, PackedDataset(inrs).with_targets):
        with pytest.raises(ValueError, match="has no target images; scalegmn-fast targets adds them"):
            function()


def test_floating_targets_are_as_they_are_and_shapes_are_checked(tmp_path):
    arguments = [torch.ones(2, 2, 1)], [torch.zeros(2, 1)], [0, 1], {"train": [0, 1]}, {}
    images = torch.rand(2, 3, 3, 1)
    write_packed(tmp_path / "a.npz", *arguments, extras={"target": images})
    assert torch.equal(PackedDataset(tmp_path / "a.npz").targets(), images)
    for bad, got in ((images[..., 0], r"torch.float32 \[2, 3, 3\]"), (images.long(), r"torch.int64 \[2, 3, 3, 1\]")):
        write_packed(tmp_path / "b.npz", *arguments, extras={"target": bad})
        with pytest.raises(ValueError, match=rf"target must be uint8 or float .* got {got}"):
            PackedDataset(tmp_path / "b.npz").targets()


def test_what_does_not_fit(inrs, tmp_path):
    out = tmp_path / "no.npz"
    for options, message in (
        ({"style": "sharpen"}, "style must be one of dilate, erode, got 'sharpen'"),
        ({"images": images_of_squares(side=5)}, "images of 6 x 6 pixels and 1 channels, got 5 x 5 and 1"),
        ({"images": images_of_squares(channels=3)}, "images of 6 x 6 pixels and 1 channels, got 6 x 6 and 3"),
        ({"images": images_of_squares(count=9)}, "needs image 9, got 9 images"),
    ):
        with pytest.raises(ValueError, match=message):
            add_targets(inrs, out, **{"style": "dilate", **options})
    with pytest.raises(ValueError, match="--limit belongs to --images"):
        run(inrs, out, "--limit", 3)
    with pytest.raises(FileNotFoundError, match="no packed dataset"):
        run(tmp_path / "nowhere", out)
    write_packed(tmp_path / "b.npz", [torch.ones(2, 2, 1)], [torch.zeros(2, 1)], [0, 1], {"train": [0, 1]}, {})
    with pytest.raises(ValueError, match="does not say its image_shape"):
        add_targets(tmp_path / "b.npz", out, "dilate")
    with pytest.raises(ValueError, match=r"\(image_index\), so one image per network is needed, got 10"):
        add_targets(tmp_path / "b.npz", out, "dilate", images=images_of_squares())
    assert not out.exists()
