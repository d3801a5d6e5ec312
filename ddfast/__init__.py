"""ddfast: Distilled Decoding (arXiv 2412.17153) from a teacher's noise-token pairs to a one-step student."""

from __future__ import annotations

__version__ = "0.1.0"
