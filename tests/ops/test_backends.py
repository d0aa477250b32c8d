"""Choosing a backend: explicit choices never fall back, `auto` says why it does."""

import subprocess
import sys

import pytest
import torch

import scalegmn_fast
from scalegmn_fast import backends, ops

H = torch.randn(3, 4)


def run(code, **environment):
    """The output of a fresh interpreter."""
    import os

    environment = {**os.environ, **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_compiled_module_serves_cpu_tensors():
    for op in backends.OPS:
        for dtype in backends.DTYPES["cpp"]:
            assert backends.resolve(op, H.to(dtype)) == "cpp"


def test_contexts_nest_and_decorate():
    @scalegmn_fast.backend("reference")
    def inside():
        return backends.active()

    assert backends.active() == "auto"
    with scalegmn_fast.backend("cpp"):
        assert backends.active() == "cpp"
        assert inside() == "reference"
        assert backends.active() == "cpp"
        with pytest.raises(KeyError), scalegmn_fast.backend("reference"):
            raise KeyError
        assert backends.active() == "cpp"
    assert backends.active() == "auto"


def test_the_variable_decides_outside_of_contexts(monkeypatch):
    monkeypatch.setenv("SCALEGMN_FAST_BACKEND", "reference")
    assert backends.resolve("symmetrize", H) == "reference"
    with scalegmn_fast.backend("cpp"):
        assert backends.resolve("symmetrize", H) == "cpp"
    monkeypatch.setenv("SCALEGMN_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="SCALEGMN_FAST_BACKEND: expected one of reference, .*, auto, got 'fast'"):
        ops.symmetrize(H)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="backend: expected one of reference, cpp, triton, cuda, auto, got 'gpu'"):
        scalegmn_fast.backend("gpu")


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("cuda", H, "backend 'cuda' cannot serve symmetrize: it serves CUDA tensors, got cpu"),
        ("triton", H, "backend 'triton' cannot serve symmetrize: it serves CUDA tensors .*, got cpu"),
        ("triton", H.double(), "backend 'triton' cannot serve symmetrize: it does not take torch.float64"),
    ],
)
def test_an_explicit_choice_never_falls_back(monkeypatch, name, tensor, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with scalegmn_fast.backend(name), pytest.raises(backends.BackendError, match=reason):
        ops.symmetrize(tensor)


def test_which_backends_run_models_as_row_programs(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    found = {}
    for name in (*backends.BACKENDS, "auto"):
        with scalegmn_fast.backend(name):
            found[name] = backends.fuses(H)
    assert found == {"reference": False, "cpp": True, "triton": True, "cuda": True, "auto": True}


def test_the_backward_pass_uses_the_backend_in_force_then(monkeypatch):
    h = H.clone().requires_grad_()
    with scalegmn_fast.backend("reference"):
        out = ops.symmetrize(h)
    monkeypatch.setenv("SCALEGMN_FAST_BACKEND", "cuda")
    with pytest.raises(backends.BackendError, match="cuda"):
        out.sum().backward()


def test_importing_loads_neither_kernels_nor_optional_packages():
    # what torch itself imports does not count
    loaded = run(
        "import sys, torch; before = set(sys.modules); import scalegmn_fast;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} |"
        " {name for name in sys.modules if name.startswith('scalegmn_fast.')}))"
    ).split()
    assert "scalegmn_fast._C" not in loaded and "scalegmn_fast.kernels" not in loaded
    foreign = {
        "triton",
        "yaml",
        "safetensors",
        "tqdm",
        "matplotlib",
        "tensorboard",
        "sklearn",
        "torch_geometric",
        "PIL",
    }
    assert not foreign & set(loaded)


WITHOUT = """
import sys, warnings
for name in {blocked}:
    sys.modules[name] = None
import torch, scalegmn_fast
from scalegmn_fast import backends, ops
h = torch.randn(5, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        ops.symmetrize(h).sum().backward()
        ops.segment_reduce(h, torch.tensor([0, 2, 5]), ("mean", "max")).sum().backward()
print(len(caught), *(str(w.message) for w in caught), sep="\\n")
try:
    with scalegmn_fast.backend("cpp"):
        ops.symmetrize(h)
except backends.BackendError as error:
    print(error)
print(scalegmn_fast.build_info()["auto"])
"""


def test_without_compiled_module_and_triton_the_reference_serves_with_one_warning():
    blocked = ["scalegmn_fast._C", "triton", "scalegmn_fast.kernels"]
    count, warning, error, auto = run(WITHOUT.format(blocked=blocked)).splitlines()
    assert count == "1"
    assert warning.startswith("scalegmn_fast uses its slow reference backend (cpp: ")
    assert "scalegmn_fast._C" in warning
    assert error.startswith("backend 'cpp' cannot serve symmetrize: the compiled module scalegmn_fast._C is not")
    assert auto == str({op: {"cpu": "reference"} for op in backends.OPS})


def test_without_triton_the_compiled_module_serves():
    output = run(WITHOUT.format(blocked=["triton"])).splitlines()
    assert output[0] == "0"


def test_a_module_built_against_another_torch_is_refused(monkeypatch):
    module, _ = backends.compiled_module()
    assert module is not None
    backends.compiled_module.cache_clear()
    try:
        monkeypatch.setattr(torch, "__version__", "1.0.0")
        found, reason = backends.compiled_module()
        assert found is None and "was built against torch" in reason and "1.0.0" in reason
    finally:
        backends.compiled_module.cache_clear()


ISA = """
import hashlib, torch, scalegmn_fast
from scalegmn_fast import ops, reference
from scalegmn_fast.testing import assert_close_to_float64 as close
torch.manual_seed(0)
h, b, w, c = torch.randn(40, 33), torch.randn(33), torch.randn(33), torch.randn(33)
kept = []
ptr, names = torch.tensor([0, 3, 3, 40]), ("sum", "mean", "min", "max", "var", "std")
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    def both(module, to):
        x = h.to(dtype).to(to).requires_grad_()
        one = module.symmetrize(x, b.to(to), w.to(to), c.to(to), activation="sine", w0=3.0)
        two = module.segment_reduce(x, ptr, names)
        return one, two, *torch.autograd.grad(one.sum() + two.sum(), x)
    exact, eager = both(reference, torch.float64), both(reference, dtype)
    with scalegmn_fast.backend("cpp"):
        results = both(ops, dtype)
    kept += results
    for actual, plain, wanted in zip(results, eager, exact):
        close(actual, plain, wanted, ulps=32)
digest = hashlib.sha256(b"".join(t.detach().view(torch.uint8).numpy().tobytes() for t in kept)).hexdigest()
print(scalegmn_fast.build_info()["compiled"]["cpu_isa"], digest)
"""


def test_every_instruction_set_is_right_and_gives_the_same_bits():
    """Those that are compiled, up to the newest that this processor has."""
    compiled = scalegmn_fast.build_info()["compiled"]
    isas = compiled["cpu_isas"]
    served = isas[: isas.index(compiled["cpu_isa"]) + 1]
    outputs = [run(ISA, SCALEGMN_FAST_ISA=isa).split() for isa in served]
    assert [isa for isa, _ in outputs] == served
    assert len({digest for _, digest in outputs}) == 1
