"""With several GPUs: ops run on their tensors' device, whichever is the current one, and leave that as it was."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_ops_streams import row_program, segment_reduce, symmetrize

from scalegmn_fast import testing
from scalegmn_fast.graph import GraphBatch
from scalegmn_fast.models import from_config, published_config

LAYOUT = [2, 3, 4, 1]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*not exactly equivariant", "ignore:.*override other keys"),
    pytest.mark.parametrize("chosen", ["triton", "cuda"]),
]


@pytest.fixture(autouse=True)
def _backend(chosen, monkeypatch):
    """For all threads."""
    monkeypatch.setenv("SCALEGMN_FAST_BACKEND", chosen)


@pytest.fixture
def devices():
    """Two GPUs of the same kind, the first of them current."""
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_name(0) != torch.cuda.get_device_name(1):
        pytest.skip("needs two GPUs of the same kind")
    with torch.cuda.device(0):
        yield [torch.device("cuda", number) for number in range(2)]


def outcome(call, x):
    """Result and gradient of an op on rows."""
    leaf = x.clone().requires_grad_()
    result = call(leaf)
    (grad,) = torch.autograd.grad(result.square().sum(), leaf)
    return [result.detach(), grad]


def assert_same_bits(found, expected, device):
    assert torch.cuda.current_device() == 0
    assert {tensor.device for tensor in found} == {device}
    assert all(torch.equal(a.cpu(), e.cpu()) for a, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", [symmetrize, segment_reduce, row_program])
def test_a_device_that_is_not_the_current_one(call, devices):
    x = torch.randn(1024, 32, device=devices[0])
    found = outcome(call, x.to(devices[1]))  # first: nothing is compiled or kept on the current device yet
    assert_same_bits(found, outcome(call, x), devices[1])


@pytest.mark.parametrize("call", [symmetrize, segment_reduce, row_program])
def test_streams_of_two_devices(call, devices):
    """Queued in turn on both without waiting: each device's kernels are behind what its own stream has before them."""
    x = torch.randn(1024, 32, device=devices[0])
    expected = outcome(call, 2 * x)
    found, streams = [], [torch.cuda.Stream(device) for device in devices]
    rows = [x.to(device) for device in devices]
    for device in devices:
        torch.cuda.synchronize(device)
    for stream, mine in zip(streams, rows, strict=True):
        with torch.cuda.stream(stream):
            late = torch.full_like(mine, float("nan"))
            torch.cuda._sleep(50_000_000)
            torch.mul(mine, 2, out=late)
            found.append(outcome(call, late))
    for stream, device, mine in zip(streams, devices, found, strict=True):
        stream.synchronize()
        assert_same_bits(mine, expected, device)


def gradients(model, drawn, device):
    """Output and gradients of a copy of a model, and of the networks it reads, on a device."""
    copied = copy.deepcopy(model).to(device)
    weights, biases = ([tensor.to(device).requires_grad_() for tensor in group] for group in drawn)
    out = copied(GraphBatch.from_weights(weights, biases, input_value=1.0))
    leaves = [*weights, *biases, *(p for p in copied.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
    return [out.detach(), *grads]


def test_a_model_on_each_device_in_a_thread(devices):
    """Copies of one model, each with networks of its own, as in training with a process per device but in one."""
    config = published_config("mnist_cls/scalegmn")
    config["data"]["layer_layout"] = LAYOUT
    config["scalegmn_args"] |= {"d_hid": 16, "num_layers": 2}
    model = from_config(config).eval()
    testing.randomize_parameters(model, generator=torch.Generator().manual_seed(1), spread=0.02)
    drawn = [
        testing.random_network(LAYOUT, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in range(2)
    ]
    expected = [gradients(model, networks, devices[0]) for networks in drawn]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(gradients, [model] * 2, drawn, devices))
    for mine, plain, device in zip(found, expected, devices, strict=True):
        assert_same_bits(mine, plain, device)
