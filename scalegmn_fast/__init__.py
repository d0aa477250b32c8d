"""Graph networks that read other networks' weights, fast.

Importing needs torch and numpy alone: kernels, the compiled module and every optional package are loaded at first use.
"""

from scalegmn_fast import ops
from scalegmn_fast.backends import backend
from scalegmn_fast.info import build_info

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "build_info", "ops"]
