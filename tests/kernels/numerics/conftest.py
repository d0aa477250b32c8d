import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def device():
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
