"""Which implementation serves an op: `reference`, `cpp` (CPU), `triton` and `cuda` (GPU), or `auto`, which picks.

The choice is the process's, not the thread's, because autograd runs backward passes on threads of its own. It is looked
up at every call of an op, backward calls included, and under `torch.compile` when the compiled function runs: put
`backend(...)` around its call, not into it.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("reference", "cpp", "triton", "cuda")
VARIABLE = "SCALEGMN_FAST_BACKEND"

# The ops and the fused backends that each one has; the reference serves all.
OPS = {
    "symmetrize": ("cpp", "triton", "cuda"),
    "segment_reduce": ("cpp", "triton", "cuda"),
    "row_program": ("cpp", "triton", "cuda"),
}

DTYPES = {
    "reference": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
# What `auto` tries in turn for tensors of a device.
PREFERENCE = {op: {"cpu": ("cpp",), "cuda": ("triton", "cuda")} for op in OPS}
PREFERENCE["row_program"]["cuda"] = ("cuda", "triton")  # Triton's are not measured yet

_active: list[str] = []
_warned: set[str] = set()


class BackendError(RuntimeError):
    """The chosen backend cannot serve this call; the message names the reason and the remedy."""


def _validated(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join((*BACKENDS, 'auto'))}, got {name!r}")
    return name


class backend(contextlib.ContextDecorator):
    """Context manager and decorator: ops called inside use the named backend.

    Args:
        name: "reference", "cpp", "triton", "cuda" or "auto". An explicit name never falls back: an op that it cannot
            serve raises `BackendError`. "auto" picks per op, device and dtype, and warns once, naming the reason, where
            it has to use the reference. Outside of any context SCALEGMN_FAST_BACKEND decides, "auto" if unset.
    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str):
        self.name = _validated(name, "backend")

    def __enter__(self) -> "backend":
        _active.append(self.name)
        return self

    def __exit__(self, *_) -> None:
        _active.pop()


def active() -> str:
    """The name in force: of the innermost `backend(...)`, else of SCALEGMN_FAST_BACKEND, else "auto"."""
    if _active:
        return _active[-1]
    return _validated(os.environ.get(VARIABLE) or "auto", VARIABLE)


@functools.cache
def compiled_module() -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and why it cannot be used."""
    try:
        module = importlib.import_module("scalegmn_fast._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            return None, "the compiled module scalegmn_fast._C is not installed (install with a C++ compiler)"
        return None, f"the compiled module scalegmn_fast._C does not load ({error}); install again to rebuild it"
    built = module.build_info()["torch"]
    if built.split("+")[0] != torch.__version__.split("+")[0]:
        return None, f"the compiled module was built against torch {built}, this is {torch.__version__}: install again"
    return module, ""


def _native_missing() -> str:
    """Why the compiled module cannot be used; "" if it can."""
    return compiled_module()[1]


# What `torch.compiler.assume_constant_result` sets, without the second that importing the compiler takes.
_native_missing._dynamo_marked_constant = True


def triton_interpreted() -> bool:
    """Whether Triton kernels run under Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_missing() -> str | None:
    for module in ("triton", "scalegmn_fast.kernels"):
        try:
            if importlib.util.find_spec(module) is None:
                return f"the package {module} is not installed"
        except (ImportError, ValueError):
            return f"the package {module} is not installed"
    return None


def _cuda_missing(tensor: Tensor) -> str | None:
    module, reason = compiled_module()
    if module is None:
        return reason
    archs = module.build_info()["cuda_archs"]
    if not archs:
        return "the compiled module was built without nvcc (install again with nvcc on PATH)"
    oldest = min(int(arch.split("-")[0].rstrip("af")) for arch in archs)
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if 10 * major + minor < oldest:
        return f"this GPU is sm_{major}{minor}, the compiled kernels start at sm_{oldest} (SCALEGMN_FAST_CUDA_ARCHS)"
    return None


def why_not(name: str, op: str, tensor: Tensor) -> str | None:
    """Why the backend `name` cannot serve the op for this tensor's device and dtype; None if it can."""
    device = tensor.device.type
    if name != "reference" and name not in OPS[op]:
        return f"{op} has no such implementation"
    if tensor.dtype not in DTYPES[name]:
        return f"it does not take {tensor.dtype}"
    if name == "cpp":
        return _native_missing() or None if device == "cpu" else f"it serves CPU tensors, got {device}"
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and triton_interpreted()):
            return f"it serves CUDA tensors (CPU ones with TRITON_INTERPRET=1), got {device}"
        return _triton_missing()
    if name == "cuda":
        return _cuda_missing(tensor) if device == "cuda" else f"it serves CUDA tensors, got {device}"
    return None


def fuses(tensor: Tensor) -> bool:
    """Whether models run tensors like this one as row programs; never warns or raises.

    With "triton" or "cuda" chosen they do so on a GPU; "auto" does on the CPU alone, where it is measured to be faster.
    """
    name = "cpp" if active() == "auto" else active()
    return name != "reference" and why_not(name, "row_program", tensor) is None


def warn_unfused(option: str, part: str, tensor: Tensor) -> None:
    """Warns, once per process and option, that a part of a model runs as PyTorch operators because of the option.

    Silent where tensors like this one run as operators whatever the options, and under `torch.compile`.
    """
    if torch.compiler.is_compiling() or option in _warned or not fuses(tensor):
        return
    _warned.add(option)
    warnings.warn(
        f"{option}: {part} as PyTorch operators instead of fused row programs, slower and in more memory "
        "(docs/models.md, 'What runs as PyTorch operators')",
        stacklevel=3,
    )


def _no_limits(name: str) -> str | None:
    return None


def resolve(op: str, tensor: Tensor, limits: Callable[[str], str | None] = _no_limits) -> str:
    """The backend that serves a call of `op` on tensors of this device and dtype.

    Args:
        limits: gives why the backend of a name cannot serve this call for other reasons than these; None if it can.
    Raises:
        BackendError: an explicit choice cannot serve the call.
    """
    name = active()
    if name != "auto":
        reason = why_not(name, op, tensor) or limits(name)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot serve {op}: {reason}")
        return name
    reasons = []
    for candidate in PREFERENCE[op].get(tensor.device.type, ()):
        reason = why_not(candidate, op, tensor) or limits(candidate)
        if reason is None:
            return candidate
        reasons.append(f"{candidate}: {reason}")
    why = "; ".join(reasons) or f"no fused kernels for {tensor.device.type} tensors"
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"scalegmn_fast uses its slow reference backend ({why})", stacklevel=2)
    return "reference"


def implementation(
    op: str, direction: str, tensor: Tensor, limits: Callable[[str], str | None] = _no_limits
) -> Callable:
    """The function with the signature of the op's schema that serves tensors like this one.

    Args:
        op: the op's stem; direction: "forward" or "backward"; tensor: decides by its device and dtype;
            limits: as in `resolve`.
    """
    name = resolve(op, tensor, limits)
    entry = op if direction == "forward" else f"{op}_backward"
    if name == "reference":
        return getattr(importlib.import_module(f"scalegmn_fast.reference.{op}"), f"{op}_{direction}")
    if name == "triton":
        return getattr(importlib.import_module(f"scalegmn_fast.kernels.{op}"), entry)
    return getattr(torch.ops.scalegmn_fast_native, entry)
