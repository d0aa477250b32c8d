"""Builds the compiled module scalegmn_fast._C with CMake and installs kernels/ as scalegmn_fast.kernels.

The build compiles against the torch that the package will run with, so install without isolation:
`pip install --no-build-isolation -e .`

Environment variables:
    SCALEGMN_FAST_NO_EXT=1          install the Python part alone; ops then use Triton (GPU) or the reference (CPU).
    SCALEGMN_FAST_CUDA=auto|0|1     CUDA kernels: if nvcc is found (auto, the default), never (0), or required (1).
                                    torch itself may be a CPU build: no CUDA symbol of torch is needed.
    SCALEGMN_FAST_CUDA_ARCHS        CMake's CUDA_ARCHITECTURES; default "80-real;90-real;90-virtual" (and PTX).
    MAX_JOBS                        parallel compiler processes; default: ninja's choice.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def environment(name: str, default: str, allowed: tuple[str, ...] | None = None) -> str:
    value = os.environ.get(name) or default
    if allowed and value not in allowed:
        raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def tool(name: str) -> str:
    """A build tool: beside this Python (its pip package), else on PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build scalegmn_fast's compiled module: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures CMakeLists.txt with ninja and builds the module to where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise SystemExit(
                f"building scalegmn_fast's compiled module needs {error.name} in this environment: install it and use "
                "pip install --no-build-isolation, or set SCALEGMN_FAST_NO_EXT=1 for the Python part alone"
            ) from error
        cuda = environment("SCALEGMN_FAST_CUDA", "auto", ("auto", "0", "1"))
        nvcc = None if cuda == "0" else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if cuda == "1" and nvcc is None:
            raise SystemExit("SCALEGMN_FAST_CUDA=1: nvcc is neither on PATH nor in /usr/local/cuda/bin")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # not setuptools' build_temp, which is new for each editable install: the next one compiles what changed
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{self.plat_name}-torch{torch.__version__}"
        arguments = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_DIRECTORY": str(Path(torch.__file__).parent),
            "TORCH_VERSION": torch.__version__,
            "MODULE_DIRECTORY": str(target.parent),
            "MODULE_FILE": target.name,
            "NVCC": nvcc or "",
        }
        if nvcc:
            arguments["CUDA_ARCHS"] = environment("SCALEGMN_FAST_CUDA_ARCHS", "80-real;90-real;90-virtual")
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        options = [f"-D{name}={value}" for name, value in arguments.items()]
        jobs = os.environ.get("MAX_JOBS")
        for command in (
            [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options],
            [cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])],
        ):
            if subprocess.run(command).returncode:
                raise SystemExit("building scalegmn_fast's compiled module failed (see above)")


packages = find_packages(include=["scalegmn_fast", "scalegmn_fast.*"], exclude=["scalegmn_fast.kernels"])
without_extension = environment("SCALEGMN_FAST_NO_EXT", "0", ("0", "1")) == "1"
setup(
    packages=[*packages, "scalegmn_fast.kernels"],
    package_dir={"scalegmn_fast": "scalegmn_fast", "scalegmn_fast.kernels": "kernels"},
    ext_modules=[] if without_extension else [Extension("scalegmn_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
