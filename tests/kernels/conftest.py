"""Where the Triton tests run.

numerics/ calls the kernels: on the GPU where there is one, else under Triton's interpreter, which has to be chosen
before Triton is first imported. So on a machine without a GPU numerics/ is not collected here:
test_kernels_interpreted.py runs it in processes of its own. `TRITON_INTERPRET=1 pytest tests/kernels/numerics` runs it
directly.
"""

import os

import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore = []
if INTERPRETING:
    collect_ignore += ["test_kernels_compiled.py", "test_kernels_interpreted.py"]
elif not torch.cuda.is_available():
    collect_ignore += ["numerics"]
