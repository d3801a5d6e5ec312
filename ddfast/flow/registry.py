"""Solvers by name.

Agreement below is the share of tokens equal to the exact flow's, at the default nfe, over 4,000 problems of each
family of ``benches/problems.py``: VAR-like (V 4096, C 32), LlamaGen-like (V 16384, C 8, unit codebook) and small
(V 64, C 4 or 8). ``benches/results/solvers.json`` has the other settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ddfast.errors import UserError
from ddfast.flow.dpm import DPMSolver
from ddfast.flow.multistep import AdamsSolver
from ddfast.flow.names import DEFAULT_NFE, DEFAULT_SOLVER, SOLVER_NAMES
from ddfast.flow.reference import ExactSolver
from ddfast.flow.schedules import adams_knots
from ddfast.flow.solver import Solver, check_count


def _adams(nfe: int) -> Solver:
    """The default: 99.8% or more in each family, 99.93% over all, at 6.6 to 8.4 evaluations a token."""
    check_count("adams", nfe, 2, 64)
    return AdamsSolver(adams_knots(nfe))


def _precise(nfe: int) -> Solver:
    """The same with less haste: 99.97% or more in each family, at 17 to 22 evaluations a token."""
    check_count("precise", nfe, 2, 64)
    return AdamsSolver(adams_knots(nfe), certain=0.005, pair=0.01, prune=1e-4)


def _dpmpp_3m(nfe: int) -> Solver:
    """DPM-Solver++ 3M, uniform t in [0.001, 0.999], as the public code runs it: the DD paper's setting at nfe 10.

    38-98% VAR-like, 0-22% LlamaGen-like, 44-88% small: from 10 steps on the public code keeps order 3 to the end, and
    the last step, over which r grows from 9 to 999, overshoots. At 8 steps, where it lowers the order: 93-99%, 82-95%
    and 96-98%.
    """
    check_count("dpmpp-3m", nfe, 3, 10_000)
    return DPMSolver(nfe)


def _dpmpp_3m_lower(nfe: int) -> Solver:
    """DPM-Solver++ 3M, uniform t in [0, 0.99], the last steps of lower order.

    95-99% VAR-like, 88-97% LlamaGen-like, 97-98% small.
    """
    check_count("dpmpp-3m-lower", nfe, 3, 10_000)
    return DPMSolver(nfe, t_start=0.0, t_end=0.99, lower_order_end="always")


def _euler(nfe: int) -> Solver:
    """Euler, uniform t in [0, 0.99]: the plain baseline. 89-96% VAR-like, 77-92% LlamaGen-like, 86-93% small."""
    check_count("euler", nfe, 1, 10_000)
    return DPMSolver(nfe, order=1, t_start=0.0, t_end=0.99)


SOLVERS: Mapping[str, Callable[[int], Solver]] = {
    "adams": _adams,
    "precise": _precise,
    "dpmpp-3m": _dpmpp_3m,
    "dpmpp-3m-lower": _dpmpp_3m_lower,
    "euler": _euler,
    "exact": lambda nfe: ExactSolver(),
}
assert tuple(SOLVERS) == SOLVER_NAMES
_KINDS: dict[str, type[Solver]] = {kind.kind: kind for kind in (AdamsSolver, DPMSolver, ExactSolver)}


def make_solver(name: str = DEFAULT_SOLVER, nfe: int | None = None) -> Solver:
    """A named solver with at most ``nfe`` evaluations of the field a token (default: DEFAULT_NFE).

    "exact" picks its own number of evaluations and takes none. Raises UserError for an unknown name or an nfe the
    solver does not take.

    >>> make_solver("adams", 16)
    """
    if name not in SOLVERS:
        raise UserError(f"solver {name!r} does not exist: use one of {', '.join(SOLVERS)}")
    if name == "exact" and nfe is not None:
        raise UserError(f"solver 'exact' chooses its own number of evaluations: leave nfe={nfe!r} out")
    return SOLVERS[name](DEFAULT_NFE.get(name, 0) if nfe is None else nfe)


def solver_from_dict(values: Mapping[str, Any]) -> Solver:
    """The solver that ``Solver.to_dict`` described. Raises UserError for an unknown kind or wrong fields."""
    kind = _KINDS.get(values.get("kind", ""))
    known = {field.name for field in fields(kind)} if kind else set()
    given = {key: value for key, value in values.items() if key != "kind"}
    if kind is None or set(given) != known:
        raise UserError(
            f"no solver is described by {dict(values)!r}: kinds are {', '.join(_KINDS)}, fields as in to_dict"
        )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
