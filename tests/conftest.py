"""Settings that every test needs before torch is imported."""

import os

# Some virtual machines announce AMX and then stop the process at its first instruction, in PyTorch's own bf16 GEMMs.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
