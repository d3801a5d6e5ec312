"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...evaluation.names import DIGITS, INCEPTION_FILE
from ...flow.names import DEFAULT_NFE, DEFAULT_SOLVER, SOLVER_NAMES

DTYPES = ("float32", "bfloat16", "float16")
SEED = 1  # pairs have 0: a student is not shown the noise that it was trained on
SEED_HELP = "of the noise: sample i starts from that of pair i of this seed (default: 1; that of pairs is 0)"
TRUST_HELP = (
    "run a folder of aoti, tensorrt or tensorrt-rtx, which is a program, though it was not made on this machine"
)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Who draws, by which plan, and how the teacher is sampled."""
    who = parser.add_argument_group("who draws")
    who.add_argument(
        "--student", metavar="NAME|DIR|FILE", help="a student of `ddfast info`, a run of `ddfast train`, or a file"
    )
    who.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    who.add_argument(
        "--copy", choices=["ema", "raw"], default="ema", help="its moving average (default) or raw weights"
    )
    who.add_argument(
        "--teacher",
        metavar="NAME|PATH",
        help="the teacher alone, or with --student the one of --teacher-groups (default: the student's own)",
    )
    who.add_argument("--teacher-weights", type=Path, metavar="FILE", help="the teacher's released checkpoint")
    who.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's checkpoint, for both")
    plan = parser.add_argument_group("by which plan (one of these; default: --steps 1, and the whole teacher)")
    plan.add_argument("--steps", type=int, metavar="N", help="the student's first N timesteps (Alg. 3)")
    plan.add_argument("--timesteps", metavar="LIST", help="these groups as timesteps, e.g. 0,5 (Alg. 3)")
    plan.add_argument(
        "--teacher-groups",
        metavar="A:B",
        help="student, teacher in groups A to B - 1, student (Alg. 4); 3:5 is the paper's pre-trained-4-6",
    )
    plan.add_argument("--skip", type=int, metavar="N", help="the teacher without its last N groups (baseline skip-n)")
    plan.add_argument(
        "--onestep",
        type=Path,
        metavar="PAIRS",
        help="every token by its frequency in this folder of pairs of the class (baseline onestep*, Prop. 3.1)",
    )
    plan.add_argument(
        "--split", type=int, metavar="N", help="groups before it from logits, the others embeddings (the student's)"
    )
    how = add_teacher_sampling(parser)
    how.add_argument(
        "--ordinary", action="store_true", help="draw the teacher's tokens by their probabilities, without the flow"
    )
    how.add_argument(
        "--released-prefix",
        action="store_true",
        help="VAR: run the teacher's prefix without a mask, as the released code does",
    )


def add_sample_arguments(parser: argparse.ArgumentParser, num: str, batch: str) -> None:
    """Which samples, and how they are computed; ``num`` and ``batch`` tell the defaults."""
    what = parser.add_argument_group("which samples")
    what.add_argument(
        "--classes", metavar="LIST", help="in turn: numbers, ranges or names, e.g. 207,3-5,goldfish (default: all)"
    )
    what.add_argument("-n", "--num", type=int, metavar="N", help=f"number of samples (default: {num})")
    what.add_argument("--seed", type=int, default=SEED, help=SEED_HELP)
    run = parser.add_argument_group("how it runs (decides only rounding)")
    run.add_argument("--batch", type=int, metavar="B", help=batch)
    run.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, else float32")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_teacher_sampling(parser: argparse.ArgumentParser) -> Any:
    """The options that decide a teacher's distribution and the flow; returns their group."""
    how = parser.add_argument_group("how the teacher is sampled (default: its preset)")
    how.add_argument("--preset", metavar="NAME", help="paper or release; see `ddfast info`")
    how.add_argument("--guidance", type=float, metavar="S", help="classifier-free guidance scale, the family's own")
    how.add_argument("--guidance-interval", type=int, metavar="N", help="LlamaGen's cfg_interval; -1 is off")
    how.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    how.add_argument("--top-p", type=float, metavar="P", help="off is 0 for VAR and 1 for LlamaGen, as in their code")
    how.add_argument("--temperature", type=float, metavar="T")
    defaults = ", ".join(f"{name} {nfe}" for name, nfe in DEFAULT_NFE.items())
    how.add_argument("--solver", choices=SOLVER_NAMES, default=DEFAULT_SOLVER, help=f"of the flow ({DEFAULT_SOLVER})")
    how.add_argument(
        "--nfe", type=int, metavar="N", help=f"its most evaluations of the field a token (default: {defaults})"
    )
    return how


def add_written(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("what is written")
    out.add_argument("--out", type=Path, required=True, metavar="FILE|DIR", help="a picture, an .npz, or a folder")
    out.add_argument("--columns", type=int, default=10, metavar="N", help="images in a grid's row (default: 10)")


def add_reference_arguments(parser: Any) -> None:
    """What samples are compared with, and by which network. For a parser or a group of one."""
    parser.add_argument(
        "--reference", metavar="REF", help=f"a folder, an .npz, or {DIGITS}: the real digits (with --digits: default)"
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--inception", type=Path, metavar="FILE", help=f"{INCEPTION_FILE}")
    network.add_argument("--digits", action="store_true", help="16x16 digits: the bundled classifier, no Inception")
