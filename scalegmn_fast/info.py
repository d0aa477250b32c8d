"""What is installed and which backend serves what."""

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from scalegmn_fast import backends


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_info() -> dict[str, Any]:
    """Versions, the compiled module, devices, and the backend that `auto` picks per op, device and dtype.

    Keys: version, python, torch, triton (None if absent), compiled (available, and if so torch, compiler, cpu_isas,
    cpu_isa in use, cuda_archs, cuda_toolkit; else reason), devices, backend (in force), auto ({op: {device: backend}}).
    Imports neither Triton nor its kernels.
    """
    from scalegmn_fast import __version__

    module, reason = backends.compiled_module()
    compiled: dict[str, Any] = {"available": module is not None}
    compiled.update({"reason": reason} if module is None else module.build_info())
    devices = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    auto: dict[str, dict[str, str]] = {}
    for op in backends.OPS:
        auto[op] = {}
        for device in devices:
            sample = torch.empty(0, device=device)
            served = (name for name in backends.PREFERENCE[op][device] if backends.why_not(name, op, sample) is None)
            auto[op][device] = next(served, "reference")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "compiled": compiled,
        "devices": devices,
        "backend": backends.active(),
        "auto": auto,
    }


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the dictionary of build_info() as JSON")


def run(args: argparse.Namespace) -> int:
    info = build_info()
    if args.json:
        json.dump(info, sys.stdout, indent=2)
        print()
        return 0
    compiled = info["compiled"]
    print(f"scalegmn_fast {info['version']}, Python {info['python']}, torch {info['torch']}, triton {info['triton']}")
    if compiled["available"]:
        archs = ", ".join(compiled["cuda_archs"])
        cuda = f"CUDA {compiled['cuda_toolkit']} for {archs}" if archs else "no CUDA (built without nvcc)"
        isas = f"CPU kernels for {', '.join(compiled['cpu_isas'])}, in use {compiled['cpu_isa']}"
        print(f"compiled module: {compiled['compiler']}, {isas}; {cuda}")
    else:
        print(f"compiled module: not in use: {compiled['reason']}")
    for device, name in info["devices"].items():
        print(f"{device}: {name}")
    print(f"backend: {info['backend']}")
    for op, choice in info["auto"].items():
        print(f"  {op}: " + ", ".join(f"{device} -> {name}" for device, name in choice.items()))
    return 0
