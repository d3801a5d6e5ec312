"""The flow from noise to token (Eq. 3-4): the field, its solvers, the logit filters and the fused entry."""

from __future__ import annotations

from ddfast.flow.field import CodebookFlow
from ddfast.flow.filters import LogitFilter, filter_logits
from ddfast.flow.registry import DEFAULT_NFE, DEFAULT_SOLVER, SOLVERS, make_solver, solver_from_dict
from ddfast.flow.solver import FlowResult, Solver
from ddfast.flow.tokens import flow_tokens

__all__ = [
    "DEFAULT_NFE",
    "DEFAULT_SOLVER",
    "SOLVERS",
    "CodebookFlow",
    "FlowResult",
    "LogitFilter",
    "Solver",
    "filter_logits",
    "flow_tokens",
    "make_solver",
    "solver_from_dict",
]
