"""``ddfast eval``: FID, sFID, Inception Score, precision and recall of images."""

from __future__ import annotations

from pathlib import Path

from ...evaluation.names import INCEPTION_FILE, JSON_FILE, PICTURE_FILE, TABLE_FILE
from .common import TRUST_HELP, add_model_arguments, add_reference_arguments, add_sample_arguments
from .parser import Parser

DESCRIPTION = f"""\
Measure images against a reference: FID, sFID, Inception Score, precision and recall, as OpenAI's ADM evaluator takes
them. Samples are a folder of pictures or an .npz in that evaluator's format (arr_0 uint8 [N, H, W, 3], arr_1 labels).
The reference is a folder or such an .npz, too, or statistics: VIRTUAL_imagenet256_labeled.npz, or mu and sigma of
pytorch-fid. So two folders can be compared. Or the samples are drawn for it from a model, with the options of `ddfast
sample`.

The features are those of FID's InceptionV3, from {INCEPTION_FILE} of torch-fidelity:
bring it and name it with --inception; nothing is downloaded. Needs pip install 'ddfast[eval]'. For digits, the
classifier that ships with ddfast takes Inception's place and the distance is called FD.

Published FIDs are of 50,000 samples, ImageNet's against VIRTUAL_imagenet256_labeled.npz; fewer samples give a larger
FID. Precision and recall need the reference's images, not only its statistics."""

EPILOG = f"""\
examples:
  ddfast eval samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception {INCEPTION_FILE}
  ddfast eval samples/ --reference imagenet/ --inception {INCEPTION_FILE} --out eval/
  ddfast eval samples/ --reference imagenet/ --inception {INCEPTION_FILE} \\
    --save-reference imagenet.npz    # later: --reference imagenet.npz, without precision and recall
  ddfast eval --student var-dd-d16 --steps 2 --num 50000 --inception {INCEPTION_FILE} \\
    --reference VIRTUAL_imagenet256_labeled.npz
  ddfast eval digits.npz --digits    # against the real digits
  ddfast eval --student runs/digits-var --digits
  ddfast eval --teacher digits-var --ordinary --digits
  ddfast eval student/ --reference teacher/ --digits
"""


def make_parser() -> Parser:
    parser = Parser("eval", DESCRIPTION, EPILOG, "eval:run")
    parser.add_argument(
        "samples", type=Path, nargs="?", metavar="SAMPLES", help="a folder of pictures, or an .npz; or else a model"
    )
    parser.add_argument("--trust", action="store_true", help=TRUST_HELP)
    add_reference_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {JSON_FILE}, {TABLE_FILE}, {PICTURE_FILE}")
    parser.add_argument(
        "--save-reference", type=Path, metavar="FILE", help="write the reference's statistics, an .npz for --reference"
    )
    add_model_arguments(parser)
    add_sample_arguments(parser, "5000", "images drawn and measured together (default: 64; of a model, what suits it)")
    return parser
