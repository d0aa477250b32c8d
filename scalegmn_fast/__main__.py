"""``python -m scalegmn_fast``: the command ``scalegmn-fast``, for torchrun."""

import sys

from scalegmn_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
