"""``ddfast digits``: train the bundled digits teachers from nothing, or measure their weights."""

from __future__ import annotations

from pathlib import Path

from .parser import Parser, command_list

DESCRIPTION = """\
The digits teachers that ship with ddfast are trained by ddfast, on scikit-learn's 1797 handwritten digits.

train makes all three files (classifier, digits-var, digits-llamagen) from nothing, in minutes on two cores; eval
measures the files. Both need scikit-learn: pip install 'ddfast[digits]'."""

EPILOG = """\
examples:
  ddfast digits train --out digits/
  ddfast digits train --out digits/ --only var --seed 1
  ddfast digits eval                        # the weights that ship with ddfast
  ddfast digits eval digits/
  ddfast digits eval --student runs/digits-var   # what `ddfast train` made, beside the teacher
  ddfast pairs --teacher digits/digits-var.safetensors --num 2000 --out pairs/
"""
ACTIONS = {
    "train": "train tokenizers, teachers and the classifier; then measure them",
    "eval": "measure the weights: accuracy, Frechet distance, PSNR",
}
ONLY = ("classifier", "var", "llamagen")


def make_parser() -> Parser:
    return Parser(
        "digits",
        f"{DESCRIPTION}\n\nwhat to do (each has a --help of its own):\n{command_list(ACTIONS)}",
        EPILOG,
        actions={"train": train_parser, "eval": eval_parser},
    )


def train_parser() -> Parser:
    parser = Parser(
        "digits train", ACTIONS["train"], "example: ddfast digits train --out digits/", "digits:train_command"
    )
    parser.add_argument("--out", type=Path, default=Path("digits"), metavar="DIR", help="folder to fill (digits)")
    parser.add_argument("--only", choices=ONLY, help="train one file (default: all three)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    parser.add_argument("--steps-scale", type=float, default=1.0, metavar="X", help="multiplies all steps (default: 1)")
    return parser


def eval_parser() -> Parser:
    parser = Parser(
        "digits eval", ACTIONS["eval"], "example: ddfast digits eval --student runs/digits-var", "digits:eval_command"
    )
    parser.add_argument("folder", type=Path, nargs="?", help="default: ddfast's own weights")
    parser.add_argument("--only", choices=ONLY, help="measure one file (default: all three)")
    parser.add_argument(
        "--student",
        type=Path,
        action="append",
        metavar="RUN",
        help="a student, measured beside its teacher; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser
