"""What ``make gpu`` times of pair generation: teachers at full size with random weights, everything counted.

Noise, transformer, guidance, filter, flow, quantizer, checks and writing; not loading, and not the first batch, before
which CUDA graphs are recorded. Random weights compute what released ones do.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from full_size import random_teacher
from gpu_cases import Ceilings

from ddfast.errors import UserError
from ddfast.flow import make_solver
from ddfast.models import TEACHERS, Teacher
from ddfast.models.llamagen import LlamaGenConfig
from ddfast.models.var import VARConfig
from ddfast.pairs import Plan, describe, execute, memory

Figures = dict[str, Any]
BARS = {"share_of_matmul_peak": 0.5, "share_of_copy_bandwidth": 0.6}  # of VAR and of LlamaGen
BATCHES = 10  # made in a case


@dataclass(frozen=True)
class Work:
    """What the transformer does for one image.

    Attributes:
        gemm_flop, attention_flop: of all matrix products with weights, and of scores and their sums of values.
        weights: entries of the matrices, all of which every step reads, once a batch.
        steps: K.
        cached: entries of keys and values that are read, over all steps.
    """

    gemm_flop: float
    attention_flop: float
    weights: int
    steps: int
    cached: int

    @property
    def flop(self) -> float:
        return self.gemm_flop + self.attention_flop

    def read_bytes(self, batch: int, itemsize: int = 2, weight_itemsize: int | None = None) -> float:
        """Bytes of weights and cache read for an image, in batches of so many."""
        weight_itemsize = itemsize if weight_itemsize is None else weight_itemsize
        return weight_itemsize * self.weights * self.steps / batch + itemsize * self.cached


def count_work(config: VARConfig | LlamaGenConfig, rows: int = 2) -> Work:
    """The work for an image of a teacher; ``rows`` is 2 with guidance."""
    if isinstance(config, VARConfig):
        groups, dim, depth = config.groups, config.embed_dim, config.depth
        block = 4 * dim * dim + 2 * dim * round(dim * config.mlp_ratio)
        once = (1 if config.shared_aln else depth) * 6 * dim * dim + 2 * dim * dim  # modulations, once an image
        keys = dim
    else:
        groups, dim, depth = (1,) * config.block_size, config.dim, config.n_layer
        keys = config.kv_heads * config.head_dim
        block, once = 2 * dim * (dim + keys) + 3 * dim * config.ffn_hidden, 0
    weights = depth * block + dim * config.vocab_size
    ends = [sum(groups[: k + 1]) for k in range(len(groups))]
    seen = sum(n * end for n, end in zip(groups, ends, strict=True))  # query-key pairs of a head, in a layer
    return Work(
        gemm_flop=2.0 * rows * (sum(groups) * weights + once),
        attention_flop=4.0 * rows * depth * dim * seen,
        weights=weights,
        steps=len(groups),
        cached=rows * depth * 2 * keys * sum(ends),
    )


@dataclass(frozen=True)
class PairCase:
    """One line of the report."""

    teacher: str
    batch: int
    precision: str = "native"

    @property
    def name(self) -> str:
        return f"pairs {self.teacher} batch {self.batch} {self.precision}"


def pair_cases() -> list[PairCase]:
    """The most telling first; a teacher and a precision together, so that its weights are made once."""
    native = [PairCase("var-d16", 128), PairCase("var-d16", 32), PairCase("llamagen-l-256", 256)]
    native += [PairCase("llamagen-l-256", 64), PairCase("llamagen-l-256", 512)]
    return [*native, PairCase("var-d16", 128, "fp8"), PairCase("llamagen-l-256", 256, "fp8")]


@lru_cache(maxsize=1)
def _prepared(name: str, precision: str, device: torch.device) -> Teacher:
    teacher = random_teacher(name, torch.bfloat16, device)
    teacher.prepare(precision, release=True)
    return teacher


def measure_case(case: PairCase, ceilings: Ceilings, device: torch.device) -> Figures:
    """A case's figures, on a GPU; a ``note`` in their place where the GPU is too old or too small for it."""
    if case.precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return {"name": case.name, "note": "needs an Ada, Hopper or later GPU"}
    teacher = _prepared(case.teacher, case.precision, device)
    try:
        memory.check_batch(
            case.batch, teacher, describe(teacher, teacher.preset("paper"), make_solver(), num=case.batch)
        )
    except UserError as error:
        return {"name": case.name, "note": str(error)}
    work = count_work(TEACHERS[case.teacher].config)
    return {"name": case.name} | measure_pairs(teacher, work, "paper", case.batch, ceilings, precision=case.precision)


def measure_pairs(
    teacher: Teacher, work: Work, preset: str, batch: int, ceilings: Ceilings, *, precision: str, batches: int = BATCHES
) -> Figures:
    """Make pairs as ``ddfast pairs`` does, in a folder that is then gone; rates from the end of the first batch on."""
    solver, sampling = make_solver(), teacher.preset(preset)
    manifest = describe(teacher, sampling, solver, num=batch * batches, shard_size=2 * batch)
    marks: list[float] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), manifest, range(manifest.num_shards))
        execute(plan, teacher, batch, lambda n: marks.append(time.perf_counter()), precision=precision)
        end = time.perf_counter()
    rate = batch * (batches - 1) / (end - marks[0])
    read = work.read_bytes(batch, teacher.dtype.itemsize, 1 if precision == "fp8" else None)
    return {
        "teacher": teacher.name,
        "preset": preset,
        "guidance": sampling.guidance,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "solver": solver.describe(),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "precision": precision,
        "batch": batch,
        "pairs": batch * (batches - 1),
        "pairs_per_s": rate,
        "s_before_second_batch": marks[0] - begin,
        "gflop_per_pair": work.flop / 1e9,
        "read_gb_per_pair": read / 1e9,
        "share_of_matmul_peak": rate * work.flop / ceilings.bf16_flop_per_s,
        "share_of_copy_bandwidth": rate * read / ceilings.copy_bytes_per_s,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if teacher.device.type == "cuda" else None,
        "ceilings": {
            "copy_gb_per_s": ceilings.copy_bytes_per_s / 1e9,
            "bf16_tflop_per_s": ceilings.bf16_flop_per_s / 1e12,
        },
    }


def line(row: Figures) -> str:
    """A case as a line of the table."""
    if "pairs_per_s" not in row:
        return f"{row['name']:42} {row.get('problem', row.get('note', '')).partition(chr(10))[0][:80]}"
    peak, bandwidth = (100 * row[share] for share in BARS)
    return (
        f"{row['name']:42} {row['pairs_per_s']:10.4g} pairs/s {peak:6.1f}% of the matmul peak "
        f"{bandwidth:6.1f}% of the copy bandwidth"
    )


def bars(rows: Sequence[Figures]) -> list[Figures]:
    """What is asked of each teacher's best batch in bf16, and whether it holds. A miss is no failure."""
    found = []
    for teacher, figure in (("var-d16", "share_of_matmul_peak"), ("llamagen-l-256", "share_of_copy_bandwidth")):
        native = [r for r in rows if r.get("teacher") == teacher and r["precision"] == "native"]
        if native:
            best = max(native, key=lambda row: row[figure])
            bar = BARS[figure]
            value = best[figure]
            found.append({"name": f"{best['name']}: {figure}", "value": value, "at least": bar, "held": value >= bar})
    return found
