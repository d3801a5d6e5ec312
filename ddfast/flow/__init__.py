"""The flow from noise to token (Eq. 3-4): the field, its solvers, and the logit filters."""

from __future__ import annotations

from ddfast.flow.field import CodebookFlow
from ddfast.flow.filters import LogitFilter, filter_logits
from ddfast.flow.registry import DEFAULT_NFE, DEFAULT_SOLVER, SOLVERS, make_solver, solver_from_dict
from ddfast.flow.solver import FlowResult, Solver

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "SOLVERS",
    "CodebookFlow",
    "FlowResult",
    "LogitFilter",
    "Solver",
    "filter_logits",
    "make_solver",
    "solver_from_dict",
]
