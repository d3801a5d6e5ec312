"""The flow from noise to token (Eq. 3-4): the field, its solvers, and the logit filters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import front

if TYPE_CHECKING:
    from .field import CodebookFlow as CodebookFlow
    from .filters import LogitFilter as LogitFilter
    from .filters import filter_logits as filter_logits
    from .names import DEFAULT_NFE as DEFAULT_NFE
    from .names import DEFAULT_SOLVER as DEFAULT_SOLVER
    from .registry import SOLVERS as SOLVERS
    from .registry import make_solver as make_solver
    from .registry import solver_from_dict as solver_from_dict
    from .solver import FlowResult as FlowResult
    from .solver import Solver as Solver

__getattr__, __all__ = front(
    __name__,
    {
        "CodebookFlow": "field",
        "LogitFilter": "filters",
        "filter_logits": "filters",
        "DEFAULT_NFE": "names",
        "DEFAULT_SOLVER": "names",
        "SOLVERS": "registry",
        "make_solver": "registry",
        "solver_from_dict": "registry",
        "FlowResult": "solver",
        "Solver": "solver",
    },
)
