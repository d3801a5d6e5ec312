"""Names of the solvers and their evaluations of the field a token, without importing them."""

from __future__ import annotations

from collections.abc import Mapping

DEFAULT_SOLVER = "adams"
DEFAULT_NFE: Mapping[str, int] = {"adams": 16, "precise": 48, "dpmpp-3m": 10, "dpmpp-3m-lower": 10, "euler": 10}
SOLVER_NAMES = (*DEFAULT_NFE, "exact")
