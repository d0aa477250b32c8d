"""What the Triton engine does on the host, shown on the device `meta`: kernels are not launched, all else runs."""

import dataclasses
import gc
import inspect
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from scalegmn_fast.kernels import compile as aot  # noqa: E402
from scalegmn_fast.kernels import row_program  # noqa: E402
from scalegmn_fast.kernels.launching import compile_ahead, compiles_only, launch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction, KernelInterface  # noqa: E402

from bench import compare_neural_graphs  # noqa: E402
from bench.training import Problem  # noqa: E402
from scalegmn_fast import backend  # noqa: E402
from scalegmn_fast.models import from_config, neural_graphs_config, published_config, published_names  # noqa: E402
from scalegmn_fast.ops.row_program import RowProgram  # noqa: E402
from scalegmn_fast.testing import Dispatched  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*not exactly equivariant", "ignore:.*override other keys")
BATCH = 2
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
NEURAL_GRAPHS = compare_neural_graphs.names()


@pytest.fixture
def launches(monkeypatch):
    """Counts launches by kernel instead of making them; each has to fit its kernel's parameters and a GPU's grid."""
    found = Counter()

    def launcher(kernel: JITFunction, grid):
        def launch(*args, num_warps, num_stages=None, enable_fp_fusion=True, **named):
            inspect.signature(kernel.fn).bind(*args, **named)
            assert all(0 < count <= most for count, most in zip(grid, GRID, strict=False)), grid
            found[kernel.fn.__name__] += 1

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr("scalegmn_fast.backends.why_not", lambda *_: None)
    with backend("triton"):
        yield found


class Hopper:
    """A stand-in for Triton's driver of a GPU: enough to compile for it."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compilations(monkeypatch):
    """Names of kernels, each compiled as its launch on a GPU would compile it: types and constants of the arguments."""
    found = []

    def launcher(kernel: JITFunction, grid):
        def compile_it(*args, **named):
            found.append(kernel.run(*args, grid=grid, warmup=True, **named).metadata.name)

        return compile_it

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    driver.set_active(Hopper())
    yield found
    driver.set_active(None)  # the machine's own, looked for when it is needed


@pytest.fixture
def compiled_from_scratch(monkeypatch, tmp_path):
    """Names of kernels that are compiled, each when it is done, for a cache that was empty."""
    found = []

    def note(*, src, cache_hit, **_):
        if not cache_hit:
            found.append(src.fn.__name__)

    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return found


def run_statistics(width):
    """Forward and backward of a program of NG-GNN's kind."""
    program = RowProgram()
    aot.ROW_PROGRAMS["statistics"](
        program.section(200),
        lambda: torch.empty(200, width, device="meta"),
        lambda: torch.empty(width, width, device="meta"),
        lambda: torch.empty(width, device="meta"),
        *(torch.empty(200, dtype=torch.int64, device="meta") for _ in range(2)),
    )
    arguments = program.arguments(torch.empty(7, dtype=torch.int64, device="meta"))
    tensors = arguments[0]
    reduced, rows, *kept = row_program.row_program(*arguments)
    grads = torch.empty_like(reduced), torch.empty_like(rows)
    found = row_program.row_program_backward(*grads, reduced, *kept, *arguments, [True] * len(tensors))
    assert [grad.shape for grad in found] == [tensor.shape for tensor in tensors]


def test_what_a_launch_compiles(compilations):
    """Numbers have other types there than ahead of time, and a kernel whose arguments do not fit is refused."""
    run_statistics(16)
    assert compilations[:3] == ["forward_kernel", "merge_statistics_kernel", "stage0_kernel"]
    assert compilations[-1] == "segments_kernel"


def test_compiled_ahead_a_step_compiles_nothing(compilations, compiled_from_scratch):
    collected = gc.isenabled()
    with compile_ahead(2):
        assert compiles_only()
        run_statistics(17)
        run_statistics(17)
    assert not compiles_only() and gc.isenabled() == collected
    assert compilations == []  # nothing was launched
    ahead = list(compiled_from_scratch)
    assert {"forward_kernel", "merge_statistics_kernel", "stage0_kernel", "segments_kernel"} <= set(ahead)
    run_statistics(17)
    assert set(compilations) == set(ahead)
    assert compiled_from_scratch == ahead


@triton.jit
def refused_kernel(x, COUNT: tl.constexpr):
    tl.static_assert(COUNT == 1, "one alone")
    tl.store(x, COUNT)


def test_what_does_not_compile_ahead_says_so_where_it_is_launched(compilations, compiled_from_scratch):
    x = torch.empty(16, device="meta")
    with compile_ahead():
        launch(refused_kernel, (1,), x, COUNT=2)
        launch(refused_kernel, (1,), x, COUNT=1)
    assert compiled_from_scratch == ["refused_kernel"]
    with pytest.raises(Exception, match="one alone"):
        launch(refused_kernel, (1,), x, COUNT=2).result()
    launch(refused_kernel, (1,), x, COUNT=1)
    assert compiled_from_scratch == ["refused_kernel"]


def test_an_error_while_compiling_ahead_ends_it(compilations):
    with pytest.raises(KeyError), compile_ahead(1):
        raise KeyError
    assert not compiles_only()
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"), compile_ahead(0):
        pass
    with compile_ahead(1):
        with pytest.raises(RuntimeError, match="active already"), compile_ahead(1):
            pass
        assert compiles_only()


def on_meta(value):
    """Tensors, and what named tuples and dataclasses hold of them, on `meta`."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if dataclasses.is_dataclass(value):
        fields = {field.name: on_meta(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return type(value)(*map(on_meta, value)) if hasattr(value, "_fields") else tuple(map(on_meta, value))
    return value


def scalegmn(name):
    """A published ScaleGMN and its problem, on `meta`."""
    config = published_config(name)
    return from_config(config).to("meta").train(), Problem(config, BATCH).to("meta")


def neural_graphs(name):
    """A published Neural Graphs network and its problem, on `meta`; what its first step derives from a plan is there.

    Which nodes a readout reads is decided by looking at the plan, once.
    """
    config = neural_graphs_config(name)
    model, problem = from_config(config), compare_neural_graphs.problem_of(config, BATCH)
    graph = problem.graph()
    with torch.no_grad(), backend("reference"):
        model(graph)
    moved = problem.to("meta")
    known = {key: on_meta(value) for key, value in graph.plan._cache.items() if key[0] != "device"}
    moved.graph().plan._cache.update(known)
    return model.to("meta").train(), moved


def step(model, problem, graph):
    """What forward, loss and backward run besides kernels."""
    with Dispatched(inside=True) as found:
        problem.loss(model(graph)).backward()
    return found


@pytest.mark.parametrize("name", [*published_names(), *NEURAL_GRAPHS])
def test_a_step_waits_for_nothing_and_sorts_nothing(name, launches):
    """On `meta` what would wait for the device raises. A plan's indices are sorted in the first step; which rows have
    which symmetry (``hetero``) is new in every batch."""
    model, problem = (neural_graphs if name in NEURAL_GRAPHS else scalegmn)(name)
    step(model, problem, problem.graph())
    launches.clear()
    found = step(model, problem, problem.graph())
    assert found.crossings == []
    assert launches["forward_kernel"] and launches["stage0_kernel"]
    assert found.counts["aten::sort"] == 0 or "hetero" in name
