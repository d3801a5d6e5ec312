"""What each precision does to a teacher's distribution: float32, bfloat16 and float16, int8 and fp8 products.

The same tokens are forced on every run, drawn once in float32; each token's guided distribution is then compared with
that of the readable torch module in float32:

    KL        sum_j p_j log(p_j / q_j) in nats, of the guided logits before the filter: mean and 99th percentile
    moved     half of sum_j |p_j - q_j| after the filter (its kept sets may differ, where KL would be infinite): mean
    agreement the share of tokens that the flow reaches from the same noise

The digits teachers have real weights, and are measured end to end too: accuracy and Frechet distance of samples through
the flow, the same noise for each (of 2,000 samples: any other rounding moves FD by about 0.005). The full-size teachers
have random weights here, which say less: their logits are neither as sharp nor as sensitive as trained ones. fp8 is
emulated (e4m3 rounding as on a GPU, float32 sums).

    python benches/bench_precision.py             # all, some minutes on two cores
    python benches/bench_precision.py --quick     # a few digits
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, finish, hardware
from full_size import random_teacher
from torch import Tensor

from ddfast import ops
from ddfast.digits.classifier import load_classifier
from ddfast.digits.evaluate import SEED, drawn, measure
from ddfast.digits.train import CLASSIFIER_FILE
from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import TEACHERS, Sampling, Teacher, load_teacher
from ddfast.models.linear import EMULATED, check_precision
from ddfast.models.llamagen import LlamaGenTransformer
from ddfast.models.zoo import BUNDLED
from ddfast.sampling import Drawing, Sampler, teacher_plan

SAMPLES = 2000
NATIVE = ("float32", "native")
VARIANTS = (
    NATIVE,
    ("bfloat16", "native"),
    ("float16", "native"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("bfloat16", EMULATED),
)
Load = Callable[[str, torch.dtype], Teacher]


@dataclass(frozen=True)
class Case:
    """A teacher, how to load it, at what sampling, on how many images."""

    name: str
    load: Load
    weights: str
    preset: str
    images: int
    variants: tuple[tuple[str, str], ...] = VARIANTS

    @property
    def sampling(self) -> Sampling:
        return TEACHERS[self.name].presets[self.preset]


@dataclass(frozen=True)
class Prefix:
    """What is forced on every run: labels [B], noise [B, L, C], tokens [B, L] that float32 drew from it."""

    labels: Tensor
    noise: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Group:
    """One group's guided logits [B, n, V] in float32."""

    logits: Tensor
    start: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.start + self.logits.shape[1])


def guided(cond: Tensor, uncond: Tensor | None, weight: float) -> Tensor:
    if uncond is None:
        return cond.float()
    return uncond.float().lerp(cond.float(), weight)


@torch.inference_mode()
def decoded(teacher: Teacher, prefix: Prefix, sampling: Sampling, free: bool = False) -> Iterator[Group]:
    """Each group's logits as the engine computes them, the prefix' tokens forced, or with ``free`` written into it."""
    state = teacher.decode_state(prefix.labels, sampling.guidance, sampling.guidance_interval)
    start = 0
    for n in teacher.groups:
        weight = state.weight
        group = Group(guided(*teacher.logits(state), weight), start)
        if free:
            prefix.tokens[:, group.slice] = flow_tokens(teacher, prefix, sampling, group)
        yield group
        teacher.append(state, prefix.tokens[:, group.slice])
        start += n


@torch.inference_mode()
def forwarded(teacher: Teacher, prefix: Prefix, sampling: Sampling) -> list[Group]:
    """The same of the torch module, all groups in one pass without a cache."""
    model: Any = teacher.transformer
    inputs = prefix.tokens
    if not isinstance(model, LlamaGenTransformer):
        inputs = teacher.quantizer.teacher_forcing_inputs(prefix.tokens)
    none = torch.full_like(prefix.labels, teacher.num_classes)
    cond, uncond = model(prefix.labels, inputs), model(none, inputs)
    weights = teacher.guidance_weights(sampling.guidance, sampling.guidance_interval)
    start, groups = 0, []
    for n, weight in zip(teacher.groups, weights, strict=True):
        part = slice(start, start + n)
        groups.append(Group(guided(cond[:, part], uncond[:, part] if weight != 1 else None, weight), start))
        start += n
    return groups


def flow_tokens(teacher: Teacher, prefix: Prefix, sampling: Sampling, group: Group) -> Tensor:
    """The tokens [B, n] that the flow reaches from the prefix' noise under a group's logits."""
    tokens = ops.flow_tokens(
        group.logits.flatten(0, 1),
        None,
        prefix.noise[:, group.slice].flatten(0, 1),
        teacher.codebook,
        guidance=1.0,
        filter=teacher.filter(sampling),
        solver=make_solver(),
    )
    return tokens.view(group.logits.shape[:2])


def draw_prefix(teacher: Teacher, case: Case) -> Prefix:
    labels = torch.arange(case.images) * teacher.num_classes // case.images
    length, channels = teacher.num_tokens, teacher.codebook.shape[1]
    noise = ops.normal_noise(SEED, torch.arange(case.images), 0, length, channels)
    prefix = Prefix(labels, noise, torch.zeros(case.images, length, dtype=torch.int64))
    for _ in decoded(teacher, prefix, case.sampling, free=True):
        pass
    return prefix


@torch.inference_mode()
def effect(teacher: Teacher, prefix: Prefix, sampling: Sampling, reference: list[Group]) -> dict[str, float]:
    """How far the teacher's distributions are from the reference's (see the top of this file)."""
    rule = teacher.filter(sampling)
    kl, moved, same = [], [], []
    for want, got in zip(reference, decoded(teacher, prefix, sampling), strict=True):
        log_p, log_q = want.logits.double().log_softmax(-1), got.logits.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).flatten())
        p, q = (ops.filter_logits(g.logits.contiguous(), rule).softmax(-1) for g in (want, got))
        moved.append((p - q).abs().sum(-1).flatten() / 2)
        tokens = [flow_tokens(teacher, prefix, sampling, g) for g in (want, got)]
        same.append((tokens[0] == tokens[1]).flatten())
    every = torch.cat(kl).clamp_min(0)
    return {
        "tokens": len(every),
        "kl_mean": float(every.mean()),
        "kl_p99": float(every.quantile(0.99)),
        "moved": float(torch.cat(moved).double().mean()),
        "agreement": float(torch.cat(same).double().mean()),
    }


def quality(teacher: Teacher, sampling: Sampling, samples: int) -> dict[str, float]:
    """Accuracy and Frechet distance of samples through the flow."""
    classifier, reference = load_classifier(BUNDLED / CLASSIFIER_FILE)
    draw = drawn(Sampler(drawing=Drawing(teacher, sampling)), teacher_plan(len(teacher.groups)), SEED)
    return {"samples": samples, **measure(draw, teacher.num_classes, classifier, reference, samples)[0].to_dict()}


def rows_of(case: Case, samples: int) -> Iterator[dict[str, Any]]:
    """One row a variant that this machine can compute."""
    exact = case.load(case.name, torch.float32)
    prefix = draw_prefix(exact, case)
    reference = forwarded(exact, prefix, case.sampling)
    about = {"teacher": case.name, "weights": case.weights, "preset": case.preset, "images": case.images}
    del exact
    for dtype, precision in case.variants:
        try:
            check_precision(precision, torch.device("cpu"), getattr(torch, dtype))
        except UserError as error:
            print(f"left out: {error}", flush=True)
            continue
        teacher = case.load(case.name, getattr(torch, dtype))
        teacher.prepare(precision)
        row = about | {"dtype": dtype, "precision": precision} | effect(teacher, prefix, case.sampling, reference)
        yield row | (quality(teacher, case.sampling, samples) if case.weights == "trained" and samples else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown."""
    head = ("teacher", "computed in", "KL mean", "KL p99", "moved", "tokens agree", "accuracy", "FD")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        how = row["dtype"] if row["precision"] == "native" else f"{row['precision']}, rest {row['dtype']}"
        ends = (f"{row['accuracy']:.4f}", f"{row['fd']:.4f}") if "fd" in row else ("", "")
        name = row["teacher"] if row["weights"] == "trained" else f"{row['teacher']} (random weights)"
        kls = (f"{row['kl_mean']:.1e}", f"{row['kl_p99']:.1e}", f"{row['moved']:.1e}")
        lines.append((name, how, *kls, f"{100 * row['agreement']:.2f}%", *ends))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 digits of each kind, no end-to-end figures")
    parser.add_argument("--only", choices=["digits", "full"], help="the digits teachers, or the full-size ones")
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    args = parser.parse_args()
    digits = 16 if args.quick else 400
    cases = [Case(f"digits-{kind}", load_teacher_of, "trained", "release", digits) for kind in ("var", "llamagen")]
    slow = tuple(v for v in VARIANTS if v[0] != "float16")  # no CPU of ours multiplies it fast
    full = [Case("var-d16", random_teacher, "random", "paper", 1, slow)]
    full += [Case("llamagen-b-256", random_teacher, "random", "paper", 4, slow)]
    chosen = (cases if args.only != "full" else []) + (full if args.only != "digits" and not args.quick else [])
    rows: list[dict[str, Any]] = []
    for case in chosen:
        for row in rows_of(case, 0 if args.quick else SAMPLES):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    print("\n" + table(rows) + "\n", flush=True)
    finish({"bench": "precision", "hardware": hardware(), "solver": make_solver().describe(), "rows": rows}, args.out)


def load_teacher_of(name: str, dtype: torch.dtype) -> Teacher:
    return load_teacher(name, dtype=dtype)


if __name__ == "__main__":
    main()
