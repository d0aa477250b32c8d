"""Without the optional packages: reading and writing packed data works, the rest says what to install."""

import os
import subprocess
import sys

import pytest

from scalegmn_fast.data.optional import progress, require

SCRIPT = """
import sys
for name in ("tqdm", "matplotlib", "sklearn", "PIL", "safetensors", "yaml"):
    sys.modules[name] = None
import torch
from scalegmn_fast.data import FitSettings, ImageSet, PackedDataset
from scalegmn_fast.data import fit_inrs, load_images, plot_reconstructions, write_packed
path = sys.argv[1]
write_packed(path, [torch.ones(3, 2, 1)], [torch.ones(3, 1)], [0, 1, 2], {"train": [0, 1, 2]}, {})
assert PackedDataset(path).weights([1])[0][0].shape == (1, 2, 1, 1)
images = ImageSet(torch.zeros(4, 2, 2).numpy(), torch.zeros(4, dtype=torch.int64).numpy(), None, "x")
for call, package in (
    (lambda: fit_inrs(images, path + ".fit", FitSettings(steps=1)), "tqdm"),
    (lambda: load_images("digits"), "scikit-learn"),
    (lambda: plot_reconstructions(path, path + ".png", shape=(2, 2)), "matplotlib"),
):
    try:
        call()
    except ImportError as error:
        assert f"pip install {package}," in str(error) and "scalegmn_fast[train]" in str(error), error
    else:
        raise AssertionError(package)
fit_inrs(images, path + ".fit", FitSettings(steps=1), show_progress=False)
"""


def test_without_optional_packages(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "a.safetensors")], check=True, env=environment)


def test_require_names_the_package_and_the_extra():
    with pytest.raises(
        ImportError, match=r"pictures needs no_such_module: pip install no_such_module, or .*\[interop\]"
    ):
        require("no_such_module", "pictures", "interop")


def test_progress_without_a_bar():
    assert list(progress([1, 2], disable=True)) == [1, 2]
    with progress(total=3, disable=True) as bar:
        bar.update(2)
        bar.set_postfix_str("x")
