"""``ddfast sample``: images of a student, a teacher, both together, or a baseline."""

from __future__ import annotations

from .common import add_model_arguments, add_sample_arguments, add_written
from .parser import Parser

DESCRIPTION = """\
Draw images with a student in one or a few forward passes (Distilled Decoding, Alg. 3), with its teacher in between
(Alg. 4), with the teacher alone, or by one of the paper's baselines. Sample i starts from the noise of pair i of the
seed, whoever draws it: so the same command with another plan shows what becomes of the same noise, and --compare puts
the teacher's, the few-step and the one-step images of it above one another.

--out decides the form by its ending: a labelled grid (.png, .jpg, .webp), an .npz as `ddfast eval` and OpenAI's ADM
evaluator read it, or else a folder of single PNGs. A folder can be interrupted: the same command finishes it, and under
torchrun the ranks share it."""

EPILOG = """\
examples:
  ddfast sample --student runs/digits-var --out grid.png
  ddfast sample --student runs/digits-var --compare --classes 0-9 --out compare.png
  ddfast sample --student runs/digits-var --steps 2 --classes 3,seven --num 10 --out two-steps.png
  ddfast sample --student runs/digits-var --teacher-groups 1:3 --out with-teacher.png
  ddfast sample --teacher digits-var --skip 1 --out skip-1.png
  ddfast sample --student runs/digits-var --onestep pairs/ --out onestep.png
  ddfast sample --student var-dd-d16 --weights var-d16.pth --tokenizer vae_ch160v4096z32.pth \\
    --classes "golden retriever,goldfish,88" --num 12 --out images.png
  torchrun --nproc-per-node 8 -m ddfast sample --student var-dd-d16 --steps 2 -n 50000 --out samples/
"""


def make_parser() -> Parser:
    parser = Parser("sample", DESCRIPTION, EPILOG, "sample:run")
    add_model_arguments(parser)
    parser.add_argument(
        "--compare", action="store_true", help="rows of the same noise: the teacher if it is at hand, few steps, one"
    )
    add_sample_arguments(
        parser,
        "one a class named, else 20",
        "images drawn together (default: 500 small ones, 24 of 680 tokens on a CPU)",
    )
    add_written(parser)
    return parser
