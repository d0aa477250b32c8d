"""What is installed: metadata, commands, and what the compiled module holds."""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import scalegmn_fast
from scalegmn_fast import backends, info


def compiled():
    module, reason = backends.compiled_module()
    assert module is not None, reason
    return module


def test_version_is_the_installed_one():
    assert importlib.metadata.version("scalegmn_fast") == scalegmn_fast.__version__


def test_kernels_are_installed_as_a_part_of_the_package():
    spec = importlib.util.find_spec("scalegmn_fast.kernels")
    assert spec is not None
    assert {"symmetrize.py", "segment_reduce.py"} <= {path.name for path in Path(spec.origin).parent.iterdir()}


def test_build_info_names_versions_module_and_choices():
    found = scalegmn_fast.build_info()
    assert found["torch"] == torch.__version__
    assert found["compiled"]["available"] and found["compiled"]["torch"] == torch.__version__
    assert found["compiled"]["cpu_isa"] in found["compiled"]["cpu_isas"]
    assert found["auto"] == {
        op: {device: found["auto"][op][device] for device in found["devices"]} for op in backends.OPS
    }
    assert all(choice["cpu"] == "cpp" for choice in found["auto"].values())


def test_info_prints_it(capsys):
    parser = argparse.ArgumentParser()
    info.configure(parser)
    assert info.run(parser.parse_args([])) == 0
    text = capsys.readouterr().out
    assert f"scalegmn_fast {scalegmn_fast.__version__}" in text and "symmetrize: cpu -> cpp" in text
    assert info.run(parser.parse_args(["--json"])) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(scalegmn_fast.build_info()))


def test_the_module_needs_no_symbol_of_a_cuda_build_of_torch():
    nm = shutil.which("nm")
    assert nm is not None, "nm (binutils) comes with the compiler that built the module"
    undefined = subprocess.run([nm, "-D", "--undefined-only", compiled().__file__], capture_output=True, text=True)
    symbols = undefined.stdout.split()
    assert "_ZN2at11accelerator16getCurrentStreamEa" in symbols or not compiled().build_info()["cuda_archs"]
    foreign = [s for s in symbols if re.search(r"N3c104cuda|N2at4cuda|^cuda|^cu[A-Z]|^__cuda", s)]
    assert not foreign


def cuda_tool(name):
    found = shutil.which(name)
    if found is None:
        triton = importlib.util.find_spec("triton")
        found = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton else None
    assert found is not None and Path(found).exists(), f"{name} comes with CUDA's toolkit and with triton"
    return str(found)


def test_cuda_kernels_are_in_the_module():
    archs = compiled().build_info()["cuda_archs"]
    if not archs:
        pytest.skip("the module was built where nvcc was absent: it holds no CUDA kernels to look at")
    command = [cuda_tool("cuobjdump"), "--list-elf", "--list-ptx", compiled().__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stems = sum("cuda" in served for served in backends.OPS.values())  # one .cu file each
    for arch in archs:
        number, _, what = arch.partition("-")
        if what in ("", "real"):
            assert listing.count(f"sm_{number}.cubin") >= stems, (arch, listing)
        if what in ("", "virtual"):
            assert listing.count(f"sm_{number}.ptx") >= stems, (arch, listing)


@pytest.fixture(scope="module")
def ptx_files(tmp_path_factory):
    """The PTX of each .cu file."""
    if not compiled().build_info()["cuda_archs"]:
        pytest.skip("the module was built where nvcc was absent: it holds no CUDA kernels to look at")
    folder = tmp_path_factory.mktemp("ptx")
    command = [cuda_tool("cuobjdump"), "--extract-ptx", "all", compiled().__file__]
    subprocess.run(command, capture_output=True, check=True, cwd=folder)
    found = sorted(folder.glob("*.ptx"))
    assert found
    return found


@pytest.fixture(scope="module")
def kernels_ptx(ptx_files):
    """{kernel: its PTX}"""
    entries = [entry for file in ptx_files for entry in file.read_text().split(".entry ")[1:]]
    parts = [re.split(r"^\.(?:visible|weak|func)\b", entry, flags=re.M)[0] for entry in entries]
    return {part.split("(")[0]: part for part in parts}


def stack_of(body):
    """Bytes that a kernel's arrays may take on a thread's stack, with the frame of a call if it makes one."""
    arrays = sum(map(int, re.findall(r"\.local\b.*\[(\d+)\];", body)))
    return 8 * math.ceil(arrays / 8) + (40 if re.search(r"^\s*call\b", body, re.M) else 0)


def test_cuda_kernels_multiply_offsets_in_64_bits(kernels_ptx):
    """A product of 32 bits in a kernel would be an offset that wraps beyond 2^31 elements; dropout's hash has two."""
    for name, body in kernels_ptx.items():
        factors = re.findall(r"\b(?:mul|mad)\.lo\.[us]32\b.*, (\S+);", body)
        assert set(factors) <= {"2146121005", "-2073254261"}, name
        assert re.search(r"\b(?:mul|mad)\.(?:lo\.[us]64|wide\.[us]32)\b", body), name


def test_cuda_kernels_do_not_spill(ptx_files, kernels_ptx):
    """As ptxas counts when it compiles the module's PTX; arrays and calls are on the stack apart from that."""
    found = {}
    for file in ptx_files:
        target = re.search(r"^\.target (\w+)", file.read_text(), re.M)[1]
        command = [cuda_tool("ptxas"), f"-arch={target}", "-v", "--fmad", "false", str(file), "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        counts = r"for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        found |= {name: (int(stack), stores, loads) for name, stack, stores, loads in re.findall(counts, report)}
    assert kernels_ptx.keys() <= found.keys()
    for name, (stack, *spills) in found.items():
        assert spills == ["0", "0"], name
        assert stack <= stack_of(kernels_ptx.get(name, "")), name


def test_cuda_kernels_of_every_architecture_have_nothing_else_on_the_stack(kernels_ptx):
    """A thread's stack holds arrays, as for sine's argument reduction, and in float64 the frame of a call."""
    command = [cuda_tool("cuobjdump"), "--dump-resource-usage", compiled().__file__]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", usage)
    assert {name for name, _ in used} == kernels_ptx.keys()
    for name, stack in used:
        assert int(stack) <= stack_of(kernels_ptx[name]), name


def test_every_op_is_registered_for_both_devices():
    compiled()
    for op, served in backends.OPS.items():
        for name in (op, f"{op}_backward"):
            kernel = f"scalegmn_fast_native::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "CPU")
            built = bool(compiled().build_info()["cuda_archs"]) and "cuda" in served
            assert torch._C._dispatch_has_kernel_for_dispatch_key(kernel, "CUDA") == built


def test_one_stem_in_every_folder():
    root = Path(__file__).parent.parent
    for op, served in backends.OPS.items():
        on_gpus = (f"csrc/common/{op}.h", f"csrc/cuda/{op}.cu", f"kernels/{op}.py")
        for path in (
            *(on_gpus if {"cuda", "triton"} <= set(served) else ()),
            f"csrc/ops/{op}.h",
            f"csrc/ops/{op}.cpp",
            f"csrc/cpu/{op}.cpp",
            f"scalegmn_fast/ops/{op}.py",
            f"scalegmn_fast/reference/{op}.py",
            f"tests/ops/test_ops_{op}.py",
        ):
            assert (root / path).is_file(), path
