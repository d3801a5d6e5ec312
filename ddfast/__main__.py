"""The entry of ``ddfast``, ``python -m ddfast`` and ``torchrun -m ddfast``."""

from __future__ import annotations

import os
import sys

# Read by OpenMP when torch is imported: threads that wait must not spin, or they take the cores of other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    try:
        from .cli import main as run

        return run()
    except KeyboardInterrupt:  # while something was being imported
        print("ddfast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
