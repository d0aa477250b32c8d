"""One thread, and a tiny packed dataset."""

import pytest
from train_tiny import write_tiny


@pytest.fixture
def dataset(tmp_path):
    return write_tiny(tmp_path / "tiny.safetensors")
