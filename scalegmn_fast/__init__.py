"""Graph networks that read other networks' weights, fast.

Importing needs torch and numpy alone: kernels, the compiled module and every optional package are loaded at first use.
"""

from scalegmn_fast import ops
from scalegmn_fast.backends import backend
from scalegmn_fast.info import build_info

__version__ = "0.1.0"
__all__ = ["__version__", "accelerate", "backend", "build_info", "ops", "report", "restore"]


def __getattr__(name: str):
    if name in ("accelerate", "report", "restore"):
        from scalegmn_fast import interop

        return getattr(interop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
