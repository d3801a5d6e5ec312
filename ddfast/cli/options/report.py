"""``ddfast report``: the paper's tables and curves for a teacher and its students, on one page."""

from __future__ import annotations

from pathlib import Path

from .common import SEED, add_reference_arguments, add_teacher_sampling
from .parser import Parser

DESCRIPTION = """\
Put every row of the paper's tables side by side: the teacher, the student in one and more steps (Alg. 3), with the
teacher in between (Alg. 4), and the baselines skip-n and onestep*; and the curves: quality against passes, measured
time, training, and the number of pairs. The page is report.html (one file), with report.md, report.json and figures/.

`ddfast report digits` does all of it from nothing: pairs, students of both bundled teachers, samples, figures; about a
quarter of an hour on two cores with one seed. What is made stays in --out, so the same command goes on where it was
interrupted.

For any other teacher, give it with its students, each of another seed and alike but for that; their runs' checkpoints
make the curve over training."""

EPILOG = """\
examples:
  ddfast report digits --out report/
  ddfast report digits --teachers digits-var --seeds 3 --out report/
  ddfast report --teacher digits-var --student runs/digits-var --pairs pairs/ --digits --out report/
  ddfast report --teacher var-d16 --student var-dd-d16 --pairs pairs/ --num 50000 --out report/ \\
    --reference VIRTUAL_imagenet256_labeled.npz --inception weights-inception-2015-12-05-6726825d.pth
"""


def make_parser() -> Parser:
    parser = Parser("report", DESCRIPTION, EPILOG, "report:run")
    parser.add_argument("what", nargs="?", choices=["digits"], help="digits: both bundled teachers, from nothing")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the page")
    own = parser.add_argument_group("report digits")
    own.add_argument("--teachers", metavar="LIST", help="default: digits-var,digits-llamagen")
    own.add_argument("--seeds", type=int, metavar="N", help="students of each teacher (default: 1)")
    own.add_argument("--num-pairs", type=int, metavar="N", help="pairs they train on (default: 20000)")
    own.add_argument("--steps-scale", type=float, metavar="X", help="multiplies the recipe's steps (default: 1)")
    other = parser.add_argument_group("any teacher")
    other.add_argument("--teacher", metavar="NAME|PATH", help="a teacher of `ddfast info`, or a bundle.safetensors")
    other.add_argument("--teacher-weights", type=Path, metavar="FILE", help="its released checkpoint")
    other.add_argument("--student", action="append", metavar="NAME|DIR|FILE", help="its student; one for each seed")
    other.add_argument("--weights", type=Path, metavar="FILE", help="the student's released checkpoint")
    other.add_argument("--tokenizer", type=Path, metavar="FILE", help="the tokenizer's checkpoint, for both")
    other.add_argument("--pairs", type=Path, metavar="DIR", help="the teacher's pairs, for onestep*")
    other.add_argument(
        "--by-pairs",
        action="append",
        type=Path,
        metavar="RUN",
        help="a run on another number of pairs, for that curve; repeat it",
    )
    add_reference_arguments(other)
    how = parser.add_argument_group("how it is measured")
    how.add_argument("-n", "--num", type=int, metavar="N", help="samples a figure (default: 5000)")
    how.add_argument(
        "--teacher-num",
        type=int,
        metavar="N",
        help="samples of the teacher behind FD_T (default: --num, of digits four times that)",
    )
    how.add_argument("--teacher-groups", action="append", metavar="A:B", help="of Alg. 4; repeat it (default: four)")
    how.add_argument("--skip", action="append", type=int, metavar="N", help="of skip-n; repeat it (default: two)")
    how.add_argument("--time-batches", default="1,64", metavar="LIST", help="batches that are timed (default: 1,64)")
    how.add_argument("--batch", type=int, metavar="B", help="images drawn together (default: 500 digits, else 16)")
    how.add_argument("--seed", type=int, default=SEED, help="of the noise (default: 1; that of pairs is 0)")
    how.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add_teacher_sampling(parser)
    parser.set_defaults(ordinary=False, released_prefix=False, copy="ema", split=None)
    return parser
