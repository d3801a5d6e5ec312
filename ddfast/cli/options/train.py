"""``ddfast train``: a student from a teacher and its noise-token pairs."""

from __future__ import annotations

from pathlib import Path

from ...training.config import PRECISIONS, RECIPES, SCHEDULES, WAYS
from .parser import Parser

DESCRIPTION = """\
Train a student on the pairs of a folder, or with --online on pairs that the teacher makes as they are needed. The
student starts from the teacher's weights, or from another student's with --start, and learns to go from noise, or from
data up to a timestep, to all tokens in one pass (Distilled Decoding, Sec. 3.3).

Stop it at any time: the same command goes on from the newest checkpoint, with the same losses, bit for bit on one
process. Under torchrun the batch is shared by the ranks. --out receives student.safetensors (the moving average, with
its tokenizer), checkpoints/, metrics.jsonl, samples/ (the teacher's images above the student's one-step images of the
same noise) and, where tensorboard is installed, tensorboard/."""

EPILOG = """\
examples:
  ddfast pairs --teacher digits-var --num 20000 --out pairs/
  ddfast train --pairs pairs/ --teacher digits-var --out runs/digits-var
  ddfast train --online --teacher digits-llamagen --steps 300 --out runs/online
  ddfast train --start runs/digits-var --pairs pairs/ --teacher digits-var --timesteps 0 --out runs/longer
  ddfast train --pairs pairs/ --teacher digits-var --steps 400 --batch 256 --lr 3e-3 --out runs/other
  torchrun --nproc-per-node 8 -m ddfast train --pairs pairs/ --teacher var-d16 --lpips-weights vgg16-397923af.pth \\
    --out runs/d16
  torchrun --nproc-per-node 8 -m ddfast train --pairs pairs/ --teacher var-d24 --distance l2 --parallel fsdp \\
    --out runs/d24
  tensorboard --logdir runs/
"""


def make_parser() -> Parser:
    parser = Parser("train", DESCRIPTION, EPILOG, "train:train")
    what = parser.add_argument_group("what to train")
    what.add_argument("--teacher", required=True, metavar="NAME|PATH", help="the pairs' teacher, as in `ddfast pairs`")
    what.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    what.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer's checkpoint, likewise")
    what.add_argument("--pairs", type=Path, metavar="DIR", help="a folder made by `ddfast pairs`")
    what.add_argument(
        "--online", action="store_true", help="no folder: the teacher makes each batch's pairs, at its preset"
    )
    what.add_argument(
        "--start", metavar="NAME|DIR|FILE", help="a student to start from: a released one, a run, or a student's file"
    )
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the run")
    how = parser.add_argument_group("how it learns (default: the recipe's)")
    how.add_argument("--recipe", choices=list(RECIPES), help="default: digits or paper-*, by the teacher")
    how.add_argument("--steps", type=int, metavar="N", help="optimiser steps")
    how.add_argument("--batch", type=int, metavar="B", help="pairs a step, over all ranks")
    how.add_argument(
        "--timesteps",
        metavar="LIST",
        help="groups trained on, from 0, e.g. 0,5 (default: the released student's, or 0)",
    )
    how.add_argument("--lr", type=float, metavar="LR", help="peak learning rate for a batch of 256; scaled to --batch")
    how.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate, after the warm-up")
    how.add_argument("--warmup", type=int, metavar="N", help="steps of linear warm-up")
    how.add_argument("--final-lr-ratio", type=float, metavar="X", help="share of the peak at which a cosine ends")
    how.add_argument("--weight-decay", type=float, metavar="X", help="of matrices")
    how.add_argument("--clip-grad-norm", type=float, metavar="X", help="largest gradient norm")
    how.add_argument("--ema", type=float, metavar="X", help="decay of the moving average a step")
    how.add_argument(
        "--distance", choices=["lpips", "l2", "features"], help="lpips and features compare decoded images"
    )
    how.add_argument("--lpips-weights", type=Path, metavar="FILE", help="vgg16-397923af.pth, for --distance lpips")
    how.add_argument(
        "--features",
        metavar="NAME|FILE",
        help="for --distance features: digits-classifier, or a .pt2 file, which is a program: use only your own",
    )
    how.add_argument("--distance-weight", type=float, metavar="X", help="of the distance in the loss")
    how.add_argument("--ce-weight", type=float, metavar="X", help="of the cross entropy in the loss")
    how.add_argument(
        "--split", type=int, metavar="N", help="sampling takes groups before it from logits (default: all)"
    )
    how.add_argument("--holdout", type=int, metavar="N", help="pairs that are measured instead of trained on")
    how.add_argument("--seed", type=int, metavar="N", help="of new weights, order and timesteps (default: 0)")
    how.add_argument(
        "--no-layerwise",
        dest="layerwise",
        action="store_false",
        default=None,
        help="VAR: one noise/data embedding for all blocks",
    )
    run = parser.add_argument_group("how it runs (decides rounding and speed)")
    run.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="auto: bfloat16 where the hardware multiplies it, else float32",
    )
    run.add_argument("--micro-batch", type=int, metavar="B", help="pairs in one pass of a rank; gradients accumulate")
    run.add_argument(
        "--parallel", choices=WAYS, default="ddp", help="with several ranks: ddp, or fsdp for what does not fit"
    )
    run.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on a GPU")
    run.add_argument(
        "--activation-checkpointing", action="store_true", help="computes activations again: less memory, more work"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (torchrun: one GPU a local rank)")
    run.add_argument(
        "--log-every", type=int, default=50, metavar="N", help="steps between lines of figures (default: 50)"
    )
    run.add_argument(
        "--eval-every", type=int, metavar="N", help="steps between measurements (default: a fifth of all, at most 5000)"
    )
    run.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: likewise)")
    run.add_argument("--keep", type=int, default=2, metavar="N", help="newest checkpoints that stay (default: 2)")
    run.add_argument("--samples", type=int, default=16, metavar="N", help="pictures in a grid (default: 16)")
    return parser
