"""How often each solver gives the exact flow's token, at what cost, over both families' problems.

    python benches/bench_solvers.py            # 4,000 problems a family, about 15 minutes on one core
    python benches/bench_solvers.py --quick    # a smoke run

The exact flow is ``ExactSolver(rtol=1e-6)`` in float64; the solvers run in float32. Time is CPU time of one thread for
the solver alone (no guidance, no filter), in chunks of 100 rows.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, finish, hardware
from problems import FAMILIES, Family, draw

from ddfast.flow import CodebookFlow, Solver, make_solver
from ddfast.flow.reference import ExactSolver

SOLVERS = ("adams", "dpmpp-3m-lower", "dpmpp-3m", "euler")
NFES = (4, 6, 8, 10, 14, 20)
REFERENCE = ExactSolver(rtol=1e-6, certain=1e-6)
CHUNK = 100


@dataclass
class Tally:
    """Sums over problems."""

    problems: int = 0
    agreed: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0

    def add(self, flow: CodebookFlow, noise: torch.Tensor, solver: Solver, want: torch.Tensor) -> None:
        """Solve one chunk and count."""
        begin = time.process_time()
        result = solver.solve(flow, noise)
        self.seconds += time.process_time() - begin
        self.problems += len(want)
        self.agreed += int((result.tokens == want).sum())
        self.evaluations += result.nfe * len(want)

    def figures(self) -> dict[str, float]:
        """Agreement in %, average evaluations and CPU microseconds a token."""
        return {
            "agreement_percent": round(100 * self.agreed / self.problems, 3),
            "evaluations": round(self.evaluations / self.problems, 2),
            "microseconds": round(1e6 * self.seconds / self.problems, 1),
        }


def judge(family: Family, count: int, seed: int, nfes: tuple[int, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of one family by solver and number of evaluations."""
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    for problem in draw(family, count, seed, chunk=CHUNK):
        flow = CodebookFlow(problem.log_p, problem.codebook)
        want = REFERENCE.solve(flow, problem.noise).tokens
        for name in SOLVERS:
            for nfe in nfes:
                tallies[name, nfe].add(flow, problem.noise, make_solver(name, nfe), want)
    return {name: {str(nfe): tallies[name, nfe].figures() for nfe in nfes} for name in SOLVERS}


def print_table(results: dict[str, Any], nfes: tuple[int, ...]) -> None:
    """Agreement (%) by family, solver and nfe, with the average evaluations where a solver uses fewer."""
    print(f"{'family':12} {'solver':15}" + "".join(f"{f'nfe {nfe}':>14}" for nfe in nfes))
    for family, solvers in results.items():
        for name, by_nfe in solvers.items():
            cells = (by_nfe[str(nfe)] for nfe in nfes)
            row = "".join(f"{c['agreement_percent']:8.2f} ({c['evaluations']:4.1f})" for c in cells)
            print(f"{family:12} {name:15}{row}")


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of wrong tokens against average evaluations, one panel a kind of problem, the mean over its families."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = ("var", "llama", "small")
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 4), sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [solvers for family, solvers in results.items() if family.startswith(kind)]
        for name in SOLVERS:
            points = [[by_nfe for by_nfe in solvers[name].values()] for solvers in chosen]
            cost = [sum(p["evaluations"] for p in column) / len(column) for column in zip(*points, strict=True)]
            wrong = [
                max(100 - sum(p["agreement_percent"] for p in column) / len(column), 0.01)
                for column in zip(*points, strict=True)
            ]
            axis.plot(cost, wrong, marker="o", label=name)
        axis.set(title=f"{kind}: mean of {len(chosen)} families", xlabel="evaluations a token", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("tokens unlike the exact flow's (%)")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the bench, print the table and save figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="problems a family")
    parser.add_argument("--quick", action="store_true", help="40 problems a family, nfe 4 and 10")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, nfes = (40, (4, 10)) if options.quick else (options.count, NFES)
    results = {}
    for number, (name, family) in enumerate(FAMILIES.items()):
        results[name] = judge(family, count, options.seed + number, nfes)
        print_table({name: results[name]}, nfes)
    figures = {
        "bench": "solvers",
        "hardware": hardware(),
        "problems_a_family": count,
        "seed": options.seed,
        "dtype": "float32",
        "reference": REFERENCE.to_dict(),
        "solvers": {name: make_solver(name, 10).to_dict() for name in SOLVERS},
        "results": results,
    }
    finish(figures, options.out)
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
