"""Image sources: IDX files, .npz, folders and the digits; damaged and unsuitable ones."""

import gzip

import numpy as np
import pytest
from PIL import Image

from scalegmn_fast.data import ImageSet, draw_splits, load_images, read_idx


def idx_bytes(array):
    code = {"u1": 0x08, "i4": 0x0C, "f4": 0x0D}[array.dtype.str[1:]]
    shape = b"".join(s.to_bytes(4, "big") for s in array.shape)
    return bytes([0, 0, code, array.ndim]) + shape + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (9, 5, 4), np.uint8), rng.integers(0, 3, 9).astype(np.uint8)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i4", "f4"])
def test_idx(tmp_path, compressed, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    data = idx_bytes(array)
    (tmp_path / "a").write_bytes(gzip.compress(data) if compressed else data)
    found = read_idx(tmp_path / "a")
    assert found.dtype == array.dtype and np.array_equal(found, array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], "truncated: shape .* needs 40 bytes, the file has 39"),
        (lambda d: d + b"x", "longer than its header says"),
        (lambda d: d[:9], "truncated: its header needs 16 bytes, the file has 9"),
        (lambda d: b"", "not an IDX file: it starts with nothing"),
        (lambda d: b"PK" + d[2:], "not an IDX file: it starts with 504b0803"),
        (lambda d: d[:2] + b"\x07" + d[3:], "not an IDX file"),
        (lambda d: gzip.compress(d)[:-9], "truncated or damaged gzip file"),
        (lambda d: gzip.compress(d)[:20] + b"\xff" * 20, "truncated or damaged gzip file"),
    ],
)
def test_damaged_idx(tmp_path, change, message):
    (tmp_path / "a").write_bytes(change(idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))))
    with pytest.raises(ValueError, match=f"a: {message}"):
        read_idx(tmp_path / "a")


def test_idx_files(tmp_path, arrays):
    pixels, labels = arrays
    (tmp_path / "images").write_bytes(idx_bytes(pixels))
    (tmp_path / "labels").write_bytes(idx_bytes(labels))
    found = load_images(tmp_path / "images", tmp_path / "labels")
    assert found.splits is None and found.pixels.shape == (9, 5, 4, 1) and np.array_equal(found.labels, labels)
    assert np.allclose(found.scaled(np.array([3]))[0, :, 0], pixels[3].reshape(-1) / 255)
    both = load_images(
        tmp_path / "images", tmp_path / "labels", test_images=tmp_path / "images", test_labels=tmp_path / "labels"
    )
    assert both.splits.tolist() == [0] * 9 + [2] * 9
    with pytest.raises(ValueError, match="needs the IDX file of its labels"):
        load_images(tmp_path / "images")
    with pytest.raises(ValueError, match="test_images and test_labels belong together"):
        load_images(tmp_path / "images", tmp_path / "labels", test_images=tmp_path / "images")
    (tmp_path / "labels").write_bytes(idx_bytes(labels[:-1]))
    with pytest.raises(ValueError, match=r"one label per image: 9 images, labels of shape \[8\]"):
        load_images(tmp_path / "images", tmp_path / "labels")


def test_mnist_folder(tmp_path, arrays):
    pixels, labels = arrays
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(pixels)))
    with pytest.raises(FileNotFoundError, match="no train-labels-idx1-ubyte"):
        load_images(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert load_images(tmp_path).splits.tolist() == [0] * 9
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pixels[:2]))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels[:2]))
    found = load_images(tmp_path)
    assert found.splits.tolist() == [0] * 9 + [2] * 2 and found.name == tmp_path.name
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(pixels[:2, :3]))
    with pytest.raises(ValueError, match="training and test images differ in shape"):
        load_images(tmp_path)


def test_npz(tmp_path, arrays):
    pixels, labels = arrays
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels, x=pixels[:2] / 255.0, y=labels[:2].astype(np.int32))
    found = load_images(tmp_path / "a.npz")
    assert found.splits is None and found.pixels.dtype == np.uint8 and found.labels.dtype == np.int64
    assert load_images(tmp_path / "a.npz", keys=("x", "y")).pixels.dtype == np.float32
    assert load_images(tmp_path / "a.npz", test_keys=("images", "labels")).splits.tolist() == [0] * 9 + [2] * 9
    with pytest.raises(ValueError, match="no array 'z'; it has images, labels, x, y"):
        load_images(tmp_path / "a.npz", keys=("z", "y"))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(ValueError, match="a.npz: truncated, or not an .npz file"):
        load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.array([None, 1]), labels=labels)
    with pytest.raises(ValueError, match="b.npz: damaged, or not an .npz file of plain arrays"):
        load_images(tmp_path / "b.npz")
    with pytest.raises(FileNotFoundError, match="c.npz"):
        load_images(tmp_path / "c.npz")


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def test_image_folder(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 6, 5, 3), np.uint8)
    for k, name in enumerate(["cat/b.png", "cat/a.png", "ant/z.png", "dog/q.bmp"]):
        save(tmp_path / name, pictures[k])
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    found = load_images(tmp_path)
    assert found.labels.tolist() == [0, 1, 1, 2] and found.splits is None
    assert np.array_equal(found.pixels, pictures[[2, 1, 0, 3]])
    gray = load_images(tmp_path, grayscale=True, resize=(3, 2))
    assert gray.pixels.shape == (4, 3, 2, 1)
    save(tmp_path / "dog" / "r.png", pictures[0, :4])
    with pytest.raises(ValueError, match=r"r.png: images must have one size: \(4, 5\) after \(6, 5\)"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, resize=(4, 4))) == 5
    (tmp_path / "dog" / "s.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match="s.png: not a readable image"):
        load_images(tmp_path, resize=(4, 4))


def test_image_folder_with_splits(tmp_path):
    picture = np.zeros((2, 2), np.uint8)
    for name in ("train/b/1.png", "train/a/1.png", "val/b/1.png", "test/c/1.png"):
        save(tmp_path / name, picture)
    found = load_images(tmp_path)
    assert found.labels.tolist() == [0, 1, 1, 2] and found.splits.tolist() == [0, 0, 1, 2]


def test_unsuitable_places(tmp_path):
    with pytest.raises(ValueError, match="neither IDX files nor a sub-folder of images per class"):
        load_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no images"):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected 'digits', an IDX file, an .npz or a folder"):
        load_images(tmp_path / "nothing")


def test_digits():
    digits = load_images("digits")
    assert digits.pixels.shape == (1797, 8, 8, 1) and digits.pixels.max() == 1.0 and digits.splits is None
    assert np.bincount(digits.labels).min() > 170


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (np.zeros((3, 4)), np.zeros(3, int), r"must be \[n, height, width\].*got \[3, 4\]"),
        (np.zeros((0, 4, 4)), np.zeros(0, int), "no images"),
        (np.full((3, 4, 4), 1.5), np.zeros(3, int), "floats from 0 to 1; got values from 1.5 to 1.5"),
        (np.full((3, 4, 4), np.nan), np.zeros(3, int), "floats from 0 to 1"),
        (np.full((3, 4, 4), "a"), np.zeros(3, int), "images must be numbers"),
        (np.zeros((3, 4, 4)), np.zeros(3), "labels must be integers, got float64"),
    ],
)
def test_bad_images(pixels, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet(pixels, labels, None, "x")


def test_limit_keeps_the_proportion_of_the_splits():
    codes = np.array([0] * 60 + [2] * 20, np.uint8)
    images = ImageSet(np.zeros((80, 2, 2)), np.arange(80), codes, "x").limited(8)
    assert images.labels.tolist() == [0, 1, 2, 3, 4, 5, 60, 61] and images.splits.tolist() == [0] * 6 + [2] * 2
    assert len(images.limited(100)) == 8
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        images.limited(0)


def test_digest_depends_on_all_parts():
    def digest(value=0.0, label=0, splits=None, shape=(4, 2, 2)):
        pixels = np.zeros(shape)
        pixels.flat[0] = value
        return ImageSet(pixels, np.full(4, label), splits, "x").digest()

    digests = {
        digest(),
        digest(value=1.0),
        digest(label=1),
        digest(splits=np.zeros(4, np.uint8)),
        digest(shape=(4, 4, 1)),
    }
    assert len(digests) == 5 and digest() in digests


def test_drawn_splits():
    codes = draw_splits(100, val_fraction=0.1, test_fraction=0.2, seed=3)
    assert np.bincount(codes).tolist() == [72, 8, 20]
    assert np.array_equal(codes, draw_splits(100, val_fraction=0.1, test_fraction=0.2, seed=3))
    assert not np.array_equal(codes, draw_splits(100, val_fraction=0.1, test_fraction=0.2, seed=4))
    given = np.array([0] * 80 + [2] * 20, np.uint8)
    kept = draw_splits(100, given=given, val_fraction=0.25, test_fraction=0.5)
    assert np.bincount(kept).tolist() == [60, 20, 20] and (kept[80:] == 2).all()
    assert np.array_equal(draw_splits(100, given=kept, val_fraction=0.5), kept)
    for options, message in (
        ({"val_fraction": 1.0}, "val_fraction must be at least 0 and less than 1, got 1.0"),
        ({"test_fraction": -0.1}, "test_fraction must be"),
        ({"given": np.full(100, 2)}, "no network is left for training"),
        ({"given": np.zeros(3)}, r"given must have shape \[100\]"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_splits(100, **options)
