"""Where the ops' tests run: every backend on its device, those of a GPU under the marker `gpu`."""

import pytest

import scalegmn_fast

CPU = [("reference", "cpu"), ("cpp", "cpu")]
GPU = [("reference", "cuda"), ("triton", "cuda"), ("cuda", "cuda")]


def _params(places):
    return [
        pytest.param(place, id="-".join(place), marks=[pytest.mark.gpu] if place[1] == "cuda" else [])
        for place in places
    ]


@pytest.fixture(params=_params(CPU + GPU))
def device(request):
    """A device, with each backend that serves it chosen in turn."""
    backend, device = request.param
    with scalegmn_fast.backend(backend):
        yield device


@pytest.fixture(params=_params([place for place in CPU + GPU if place[0] != "triton"]))
def float64_device(request):
    """As `device`, for the backends that take float64."""
    backend, device = request.param
    with scalegmn_fast.backend(backend):
        yield device


@pytest.fixture(params=_params([("cpp", "cpu"), ("cuda", "cuda")]))
def native_device(request):
    """As `device`, for the compiled kernels."""
    backend, device = request.param
    with scalegmn_fast.backend(backend):
        yield device
