"""How often each solver gives the exact flow's token, at what cost, over both families' problems.

    python benches/bench_solvers.py            # 4,000 problems a family, about 10 minutes on one core
    python benches/bench_solvers.py --quick    # a smoke run

After random problems come the distributions of the two bundled teachers. The exact flow is ``ExactSolver(rtol=1e-6)``
in float64; the solvers run in float32, as ``ddfast.ops.flow`` runs them here. ``bench_flow.py`` has their speed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, finish, hardware
from problems import FAMILIES, Family, draw
from torch import Tensor

from ddfast import ops
from ddfast.flow import DEFAULT_NFE, CodebookFlow, FlowResult, LogitFilter, filter_logits, make_solver
from ddfast.flow.reference import ExactSolver
from ddfast.flow.tokens import guide
from ddfast.models import load_teacher

NFES = {
    "adams": (4, 6, 8, 10, 12, 16, 20, 28),
    "precise": (48,),
    "dpmpp-3m-lower": (8, 10, 14, 20),
    "dpmpp-3m": (8, 10, 20),
    "euler": (8, 10, 20),
}
QUICK = {"adams": (4, 16), "dpmpp-3m": (10,)}
REFERENCE = ExactSolver(rtol=1e-6, certain=1e-6)
CHUNK = 100


Nfes = dict[str, tuple[int, ...]]


@dataclass
class Tally:
    """Sums over problems."""

    problems: int = 0
    agreed: int = 0
    evaluations: int = 0

    def add(self, got: FlowResult, want: Tensor) -> None:
        """Count the tokens [n] of one solve."""
        self.problems += len(want)
        self.agreed += int((got.tokens == want).sum())
        self.evaluations += int(got.evaluations.sum())

    def figures(self) -> dict[str, float]:
        """Agreement in % and average evaluations of a token."""
        return {
            "agreement_percent": round(100 * self.agreed / self.problems, 3),
            "evaluations": round(self.evaluations / self.problems, 2),
        }


def judge(family: Family, count: int, seed: int, nfes: Nfes) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of one family by solver and number of evaluations."""
    tallies: dict[tuple[str, int], Tally] = defaultdict(Tally)
    for problem in draw(family, count, seed, chunk=CHUNK):
        want = REFERENCE.solve(CodebookFlow(problem.log_p, problem.codebook), problem.noise).tokens
        given = (problem.log_p, None, problem.noise, problem.codebook)
        for name, nfe in ((name, nfe) for name, choices in nfes.items() for nfe in choices):
            got = ops.flow(*given, guidance=1.0, filter=LogitFilter(), solver=make_solver(name, nfe))
            tallies[name, nfe].add(got, want)
    return {name: {str(nfe): tallies[name, nfe].figures() for nfe in nfes[name]} for name in nfes}


@torch.inference_mode()
def judge_teacher(name: str, images: int, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of DEFAULT_NFE on the distributions that a bundled teacher gives, under its ``release`` sampling.

    The exact flow's tokens are what the teacher continues with.
    """
    teacher = load_teacher(name)
    sampling = teacher.preset("release")
    keep, channels = teacher.filter(sampling), teacher.codebook.shape[1]
    noise = ops.normal_noise(seed, torch.arange(images), 0, teacher.num_tokens, channels)
    labels = torch.arange(images) % teacher.num_classes
    state = teacher.decode_state(labels, sampling.guidance, sampling.guidance_interval)
    tallies: dict[str, Tally] = defaultdict(Tally)
    start = 0
    for n in teacher.groups:
        weight = state.weight
        cond, uncond = (None if t is None else t.flatten(0, 1) for t in teacher.logits(state))
        part = noise[:, start : start + n].reshape(-1, channels)
        log_p = filter_logits(guide(cond, uncond, weight), keep)
        want = REFERENCE.solve(CodebookFlow(log_p, teacher.codebook), part).tokens
        for solver, nfe in DEFAULT_NFE.items():
            given = (cond, uncond, part, teacher.codebook)
            got = ops.flow(*given, guidance=weight, filter=keep, solver=make_solver(solver, nfe))
            tallies[solver].add(got, want)
        teacher.append(state, want.view(images, n))
        start += n
    return {solver: {str(nfe): tallies[solver].figures()} for solver, nfe in DEFAULT_NFE.items()}


def print_table(family: str, results: dict[str, Any]) -> None:
    """Agreement (%) of one family by solver and nfe, with the average evaluations of a token."""
    for name, by_nfe in results.items():
        row = "".join(
            f"  {nfe:>3}: {f['agreement_percent']:6.2f} ({f['evaluations']:4.1f})" for nfe, f in by_nfe.items()
        )
        print(f"{family:12} {name:15}{row}", flush=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of wrong tokens against average evaluations, one panel a kind of problem, the mean over its families."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = ("var", "llama", "small")
    figure, axes = plt.subplots(1, len(kinds), figsize=(13, 4), sharey=True, layout="constrained")
    for axis, kind in zip(axes, kinds, strict=True):
        chosen = [solvers for family, solvers in results.items() if family.startswith(kind)]
        for name in chosen[0]:
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(chosen[0]))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the bench, print the table and save figures and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="problems a family")
    parser.add_argument("--quick", action="store_true", help="40 problems a family, few settings")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "solvers.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count, nfes = (40, QUICK) if options.quick else (options.count, NFES)
    results = {}
    for number, (name, family) in enumerate(FAMILIES.items()):
        results[name] = judge(family, count, options.seed + number, nfes)
        print_table(name, results[name])
    teachers = {}
    for name in ("digits-var", "digits-llamagen"):
        teachers[name] = judge_teacher(name, 10 if options.quick else 300, options.seed)
        print_table(name, teachers[name])
    figures = {
        "bench": "solvers",
        "hardware": hardware(),
        "problems_a_family": count,
        "seed": options.seed,
        "dtype": "float32",
        "path": ops.backend(torch.device("cpu"), "flow"),
        "reference": REFERENCE.to_dict(),
        "solvers": {name: make_solver(name, DEFAULT_NFE[name]).to_dict() for name in nfes},
        "results": results,
        "teachers": teachers,
    }
    finish(figures, options.out)
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
