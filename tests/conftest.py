"""Settings of every test: one thread unless it asks for more, no chosen backend, and what `gpu` tests need."""

import importlib.util
import os

# Some virtual machines announce AMX and then stop the process at its first instruction, in PyTorch's own bf16 GEMMs.
# Read when torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import pytest  # noqa: E402
import torch  # noqa: E402

import scalegmn_fast  # noqa: E402

# Where CI is set, the same cases every time: a change is judged by itself. Elsewhere each run explores new ones.
# Without hypothesis the modules that import it fail; `make gpu-check` leaves them out and says so.
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    hypothesis.settings.register_profile("ci", derandomize=True)
    if os.environ.get("CI"):
        hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are fastest on one thread; a test that asks for more leaves one behind."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws without a generator of its own; PyTorch starts each process with another seed."""
    torch.manual_seed(0)


@pytest.fixture
def reference_backend():
    with scalegmn_fast.backend("reference"):
        yield


@pytest.fixture(autouse=True)
def _no_chosen_backend(monkeypatch):
    monkeypatch.delenv("SCALEGMN_FAST_BACKEND", raising=False)


@pytest.fixture(autouse=True)
def _gpu_tests_need_a_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.fail("a test marked `gpu` was selected, and torch sees no CUDA device")
