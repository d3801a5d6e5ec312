"""A training step of the student, beside the bare matrix products of its linear layers, forwards and backwards.

A step is all of it: noise, forward pass, loss (L2 and cross entropy), backward pass, clipping, AdamW and the moving
average; reading pairs from disk and pictures are not. The products are y = x W', dx = dy W and dW = dy' x of every
linear layer at the positions it runs at, in the same dtype, by torch.mm; those of attention are not among them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _common import RESULTS, finish, hardware
from full_size import random_teacher
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ddfast import ops
from ddfast.models import TEACHERS, Teacher, load_teacher
from ddfast.models.student import Student
from ddfast.pairs import Pairs
from ddfast.training import Run, Trainer, recipe
from ddfast.training.distance import make_distance
from ddfast.training.monitor import peak_flops
from ddfast.training.objective import Objective
from ddfast.training.parallel import Ranks

TIMESTEPS = {"digits-var": (0, 2), "digits-llamagen": (0, 5), "var-d16": (0, 5), "llamagen-b-256": (0, 80)}


class RandomPairs:
    """Pairs of nobody: random tokens, and noise made as from a folder."""

    def __init__(self, student: Student, device: torch.device) -> None:
        self.student, self.device = student, device

    def batch(self, step: int, part: range) -> Pairs:
        student, generator = self.student, torch.Generator().manual_seed(step)
        labels = torch.randint(student.num_classes, (len(part),), generator=generator)
        tokens = torch.randint(student.vocab_size, (len(part), student.num_tokens), generator=generator)
        index = torch.arange(part.start, part.stop, device=self.device)
        noise = ops.normal_noise(step, index, 0, student.num_tokens, student.channels)
        return Pairs(labels.to(self.device), tokens.to(self.device), noise)

    holdout = batch


class Quiet:
    def step(self, step: int, figures: dict[str, float]) -> None: ...
    def say(self, text: str) -> None: ...


@contextmanager
def trainer_of(teacher: Teacher, batch: int, run: Run) -> Iterator[Trainer]:
    """A trainer of a new student of ``teacher``, whose transformer may be gone afterwards."""
    name = TEACHERS[teacher.name].recipe
    config = recipe(name, TIMESTEPS[teacher.name], batch=batch, steps=1_000_000, distance="l2")
    student = teacher.new_student(torch.Generator().manual_seed(0))
    tokenizer = teacher._tokenizer
    objective = Objective(student, make_distance("l2", tokenizer, device=teacher.device), teacher.codebook, config)  # type: ignore[arg-type]
    source: Any = RandomPairs(student, teacher.device)
    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(
            Path(folder),
            config,
            run,
            student,
            source,
            objective,
            {},
            images=tokenizer.decode_embeddings,
            keep_student=lambda weights, step: None,
            ranks=Ranks(),
            report=Quiet(),
        )


class Linears(TorchFunctionMode):
    """Counts the shapes (rows, channels in, channels out) of every linear layer that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            self.shapes[x.numel() // x.shape[-1], weight.shape[1], weight.shape[0]] += 1
        return func(*args, **(kwargs or {}))


class Products:
    """The products of a student's linear layers over one batch, on tensors of their own.

    Attributes:
        gflop: of one call.
    """

    def __init__(self, trainer: Trainer) -> None:
        linear, pairs = Linears(), trainer.source.batch(0, range(trainer.micro))
        with torch.no_grad(), linear:
            trainer.student(pairs.labels, pairs.noise, 0)
        self.shapes, self.device, self.dtype = linear.shapes, trainer.device, trainer.dtype
        self.times = trainer.accumulate
        self.gflop = sum(6e-9 * m * k * n * count for (m, k, n), count in self.shapes.items()) * self.times

    def __call__(self) -> float:
        """Seconds: the median of four timings of every shape, a cold one included, as often as it occurs."""
        total = 0.0
        for (m, k, n), count in self.shapes.items():
            x, w, g = (torch.randn(*s, device=self.device).to(self.dtype) for s in ((m, k), (n, k), (m, n)))
            for a, b in ((x, w.T), (g, w), (g.T, x)):
                total += count * self.times * median(self._timed(a, b) for _ in range(4))
        return total

    def _timed(self, a: Tensor, b: Tensor) -> float:
        begin = time.perf_counter()
        torch.mm(a, b)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin


def timed_steps(teacher: Teacher, batch: int, run: Run, rounds: int, steps: int = 1) -> dict[str, Any]:
    """``steps`` steps and the bare products in turn, ``rounds`` times after two steps that do not count; medians."""
    with trainer_of(teacher, batch, run) as trainer:
        products = Products(trainer)
        device, wait = trainer.device, torch.cuda.synchronize if trainer.device.type == "cuda" else lambda: None
        trainer.step(0)
        trainer.step(1)  # the first with the optimiser's moments, and memory still grows
        seconds, bare, step = [], [], 2
        for _ in range(rounds):
            wait()
            begin = time.perf_counter()
            for _ in range(steps):
                trainer.step(step)
                step += 1
            wait()
            seconds.append((time.perf_counter() - begin) / steps)
            bare.append(products())
        trainer.check_finite()
        peak, source = peak_flops(device, trainer.dtype)
        ratios = [s / b for s, b in zip(seconds, bare, strict=True)]
        cuda = device.type == "cuda"
        memory = (
            torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return {
            "teacher": teacher.name,
            "batch": batch,
            "micro_batch": trainer.micro,
            "precision": run.precision,
            "compile": run.compile,
            "activation_checkpointing": run.activation_checkpointing,
            "rounds": rounds,
            "steps": steps * rounds,
            "s_per_step": median(seconds),
            "pairs_per_s": batch / median(seconds),
            "products_s": median(bare),
            "products_gflop": products.gflop,
            "products_gflop_per_s": products.gflop / median(bare),
            "time_over_products": median(ratios),
            "time_over_products_of_rounds": ratios,
            "model_gflop_per_pair": trainer.flops / 1e9,
            "mfu": trainer.flops * batch / median(seconds) / peak,
            "peak_tflop_per_s": peak / 1e12,
            "peak_source": source,
            "memory_gib": memory / 2**30,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(TIMESTEPS))
    parser.add_argument("--precision", choices=["float32", "bfloat16"])
    parser.add_argument("--quick", action="store_true", help="one round, large students in bfloat16 alone")
    parser.add_argument("--out", type=Path, default=RESULTS / "train-cpu.json")
    args = parser.parse_args()
    rows = []
    cases = [("digits-var", 128, 20), ("digits-llamagen", 128, 20), ("var-d16", 8, 1), ("llamagen-b-256", 8, 1)]
    for name, batch, steps in cases:
        digits = name.startswith("digits")
        for precision in ("float32", "bfloat16") if digits else ("bfloat16", "float32")[: 1 if args.quick else 2]:
            if args.only in (None, name) and args.precision in (None, precision):
                teacher = load_teacher(name) if digits else random_teacher(name, torch.float32)
                rows.append(timed_steps(teacher, batch, Run(precision=precision), 1 if args.quick else 3, steps))
                show(rows[-1])
    finish({"bench": "train", "hardware": hardware(), "weights": "random but for digits", "rows": rows}, args.out)


def show(row: dict[str, Any]) -> None:
    line = {k: row[k] for k in ("teacher", "precision", "batch")}
    print(
        json.dumps(line),
        f"{row['s_per_step']:.3g} s a step, {row['time_over_products']:.2f}x its bare products, "
        f"MFU {row['mfu']:.0%}, {row['memory_gib']:.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
