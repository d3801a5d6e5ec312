"""``ddfast pairs``: make noise-token pairs with a teacher; ``show`` and ``verify`` a folder of them."""

from __future__ import annotations

from pathlib import Path

from .common import DTYPES, add_teacher_sampling
from .parser import Parser, command_list

DESCRIPTION = """\
Make (noise, token) pairs: each image's Gaussian noise is mapped to the teacher's tokens by flow matching over the
codebook, token after token (Distilled Decoding, Alg. 1). The noise itself is a function of the seed and the pair's
index, so only tokens and labels are stored.

Stop it at any time: the same command finishes the folder, to the same bytes as an undisturbed run. Under torchrun the
shards are shared out by rank; several machines, or the tasks of a Slurm array with --shards, can fill one folder.
docs/throughput.md has the recipes, and what they cost."""

EPILOG = """\
examples:
  ddfast pairs --teacher digits-var --num 20000 --out pairs/
  ddfast pairs --teacher var-d16 --weights var_d16.pth --tokenizer vae_ch160v4096z32.pth --num 1200000 --out pairs/
  ddfast pairs --teacher digits-llamagen --labels 3,7 --guidance 1 --num 1000 --out sevens/
  torchrun --nproc-per-node 8 -m ddfast pairs --teacher var-d16 -n 1200000 --out pairs/
  ddfast pairs --teacher var-d16 --num 1200000 --out pairs/ --shards 0:100       # one of twelve jobs
  ddfast pairs --teacher var-d16 --num 1200000 --out pairs/ --precision fp8      # on Hopper and later
  ddfast pairs show pairs/ --out grid.png
  ddfast pairs verify pairs/
"""
ACTIONS = {
    "show": "decode pairs to a labelled grid of images",
    "verify": "check every shard: checksum, shape, range, manifest",
}


def make_parser() -> Parser:
    parser = Parser(
        "pairs",
        f"{DESCRIPTION}\n\non a folder of pairs (each has a --help of its own):\n{command_list(ACTIONS)}",
        EPILOG,
        "pairs:make",
        {"show": show_parser, "verify": verify_parser},
    )
    what = parser.add_argument_group("what to make")
    what.add_argument("--teacher", metavar="NAME|PATH", help="a teacher of `ddfast info`, or a bundle.safetensors")
    what.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    what.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer's checkpoint, likewise")
    what.add_argument("-n", "--num", type=int, metavar="N", help="number of pairs (torchrun needs the short -n)")
    what.add_argument("--out", type=Path, metavar="DIR", help="folder to fill")
    what.add_argument(
        "--labels", metavar="LIST", help="classes in turn: numbers, ranges or names, e.g. 3,7 or 0-9 (default: all)"
    )
    what.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    what.add_argument("--shard-size", type=int, default=1024, metavar="N", help="pairs in a file (default: 1024)")
    what.add_argument("--store-noise", action="store_true", help="store the noise too, for use outside ddfast (large)")
    add_teacher_sampling(parser)
    run = parser.add_argument_group("how it runs (decides only rounding; recorded with each shard)")
    run.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="pairs decoded together (default: as many as help and fit in half a CPU's free memory or 80%% of a GPU's)",
    )
    run.add_argument(
        "--shards",
        metavar="A:B",
        help="make only shards A to B - 1; either may be left out, and a B past the last shard means the last "
        "(default: all)",
    )
    run.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on a GPU, else float32")
    run.add_argument(
        "--precision",
        choices=["native", "int8", "fp8"],
        default="native",
        help="of the matrix products: native is --dtype; int8 on a CPU and fp8 on a GPU are faster and change the "
        "teacher's distribution a little (docs/throughput.md)",
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (torchrun: one GPU a local rank)")
    return parser


def show_parser() -> Parser:
    parser = Parser(
        "pairs show", ACTIONS["show"], "example: ddfast pairs show pairs/ --out grid.png", "pairs:show_pairs"
    )
    parser.add_argument("folder", type=Path, help="made by `ddfast pairs`")
    parser.add_argument("--out", type=Path, required=True, help="the picture to write, e.g. grid.png")
    parser.add_argument(
        "--count", type=int, default=60, metavar="N", help="pairs to show, the first ones (default: 60)"
    )
    parser.add_argument("--columns", type=int, default=10, metavar="N", help="images in a row (default: 10)")
    parser.add_argument("--teacher", metavar="NAME|PATH", help="the teacher's bundle, if it is not in the zoo")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer, if not in a weight folder")
    return parser


def verify_parser() -> Parser:
    parser = Parser("pairs verify", ACTIONS["verify"], "example: ddfast pairs verify pairs/", "pairs:verify_pairs")
    parser.add_argument("folder", type=Path, help="made by `ddfast pairs`")
    return parser
