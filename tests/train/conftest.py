"""One thread, and a tiny packed dataset."""

import pytest
import torch
from train_tiny import write_tiny


@pytest.fixture
def dataset(tmp_path):
    return write_tiny(tmp_path / "tiny.safetensors")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
