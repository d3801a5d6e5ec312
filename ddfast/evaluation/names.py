"""Names of what an evaluation reads and writes, without importing what does it."""

from __future__ import annotations

DIGITS = "digits"  # the reference: scikit-learn's digits
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # its name ends in the first digits of its SHA-256
JSON_FILE, TABLE_FILE, PICTURE_FILE = "eval.json", "eval.md", "samples.png"
