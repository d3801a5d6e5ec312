"""Triton kernels for NVIDIA GPUs (sm_80 and up), each with a torch twin in ``ddfast.flow``.

``flow.flow_adams``, ``filters.filter_rows`` and ``nearest.nearest_code`` fill the output tensors they are given.
Nothing is checked here: ``ddfast.ops`` checks at its door. Importing this package does not import Triton; its modules
do.
"""

from __future__ import annotations

import importlib.util


def available() -> bool:
    """Whether Triton is installed (a GPU may still be absent)."""
    return importlib.util.find_spec("triton") is not None
