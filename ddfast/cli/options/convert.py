"""``ddfast convert``: a released checkpoint to a ddfast safetensors file."""

from __future__ import annotations

from pathlib import Path

from .parser import Parser

DESCRIPTION = """\
Convert a released .pth, .pt or .safetensors checkpoint to safetensors with its configuration in the metadata.

The model is recognised by the names and shapes of its weights, all of which must fit. Sizes that share every shape
(LlamaGen's 256 and 384 pixel versions) are told apart by the released file's name, or with --model. Of a student's two
copies, the moving average of its weights is taken, or with --copy raw the weights themselves."""

EPILOG = """\
examples:
  ddfast convert var_d16.pth --out var-d16.safetensors
  ddfast convert c2i_B_384.pt --model llamagen-b-384 --out llamagen-b-384.safetensors
  ddfast convert var-d16.pth --out var-dd-d16.safetensors
"""


def make_parser() -> Parser:
    parser = Parser("convert", DESCRIPTION, EPILOG, "convert:run")
    parser.add_argument("file", type=Path, help="the checkpoint, as released")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, NAME.safetensors")
    parser.add_argument("--model", metavar="NAME", help="which model it is, where the shapes leave a choice")
    parser.add_argument("--copy", choices=("raw", "ema"), help="which copy of a student's weights (default: ema)")
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    return parser
