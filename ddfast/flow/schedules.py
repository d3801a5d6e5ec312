"""Where solvers evaluate the flow: knots in t, in r, and the change between them."""

from __future__ import annotations

import math

from ddfast.errors import UserError

SKIPS = ("time_uniform", "logSNR")


def time_knots(skip: str, t_start: float, t_end: float, steps: int) -> tuple[float, ...]:
    """steps + 1 knots from t_start to t_end, float64.

    "time_uniform": equal steps of t. "logSNR": equal steps of log(t / (1 - t)), the log of signal over noise in
    x_t = (1 - t) eps + t c; needs t_start > 0. Raises UserError for another name or times outside [0, 1).
    """
    if skip not in SKIPS:
        raise UserError(f"skip {skip!r} does not exist: use one of {', '.join(SKIPS)}")
    if not 0 <= t_start < t_end < 1:
        raise UserError(f"times must satisfy 0 <= t_start < t_end < 1, not {t_start!r}, {t_end!r}")
    if skip == "time_uniform":
        return tuple(t_start + (t_end - t_start) * i / steps for i in range(steps + 1))
    if t_start == 0:
        raise UserError("a logSNR grid cannot start at t_start = 0, where log r is -inf: use 0.001")
    low, high = (math.log(t / (1 - t)) for t in (t_start, t_end))
    return tuple(1 / (1 + math.exp(-(low + (high - low) * i / steps))) for i in range(steps + 1))


def adams_knots(nfe: int) -> tuple[float, ...]:
    """Knots rho = r / R* for ``nfe`` evaluations of the default solver, ascending, float64.

    They run to 4.5 nfe / (nfe + 9), beyond which hardly a token has more than two codes left, in equal steps of
    log(4 + rho): almost linear. The first step is shorter by 0.68, since the method has no history there. The constants
    were searched on random problems of both families together with AdamsSolver's; around them lies a plateau, and no
    nfe from 4 to 40 would gain much from constants of its own. Rounded, so that machines with other maths libraries
    write the same manifest.
    """
    end, bend, first = 4.5 * nfe / (nfe + 9), 4.0, 0.68
    stretch = math.log1p(end / bend) / (nfe - 1 + first)
    return tuple(round(bend * math.expm1(stretch * (i + first)), 12) for i in range(nfe))
