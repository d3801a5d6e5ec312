"""The entry of ``ddfast``, ``python -m ddfast`` and ``torchrun -m ddfast``."""

from __future__ import annotations

import os
import sys

# Read by OpenMP when torch is imported: threads that wait must not spin, or they take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
