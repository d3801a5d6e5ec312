"""``ddfast export``: a student as ONNX, an engine, or a package for another runtime."""

from __future__ import annotations

from pathlib import Path

from ...export.targets import LAYOUTS, MIN_AGREEMENT, TARGETS
from .common import SEED
from .parser import Parser

DESCRIPTION = """\
Write a student and its decoder as one graph: class and noise in, pixels out. The noise/data mask of every timestep, the
resampling of the tokenizer and the choice of heads are baked in; --steps 2 unrolls two forward passes (Alg. 3).

  onnx           label int64 [B], noise float32 [B, L, C] -> image float32 [B, 3, H, W] in [0, 1]; runs in onnxruntime
  tensorrt       an engine for this NVIDIA GPU (TensorRT 11); with --script, the commands that build it elsewhere
  tensorrt-rtx   an engine for RTX GPUs, built without one
  openvino       the fastest on CPUs: a float32 trunk, a bfloat16 decoder
  aoti           a compiled package for C++ and Python (AOTInductor)
  triton-server  a model repository that NVIDIA's Triton Inference Server loads as it is

An aoti folder and the engines of TensorRT are programs: `ddfast run` asks for --trust where they were not made on the
machine. ONNX and OpenVINO folders are data.

Every export ends by running it: its tokens and pixels are compared with those of torch, and what was found is written
to manifest.json. Too few equal tokens (--min-agreement) fail, and leave nothing behind. `ddfast run` draws images with
the folder, `ddfast bench` times it, `ddfast eval` measures its images."""

TRT = ("tensorrt", "tensorrt-rtx")
OPTIONS = {
    "script": ("tensorrt",),
    "timing_cache": ("tensorrt",),
    "workspace": TRT,
    "compute_capabilities": ("tensorrt-rtx",),
    "fp8_bar": TRT,
    "fp8_images": TRT,
    "backend": ("triton-server",),
    "instance": ("triton-server",),
}
"""Options of single targets, and whose they are."""

EPILOG = """\
examples:
  ddfast export --student runs/digits-var --to onnx --out engine/
  ddfast export --student runs/digits-var --to onnx --precision fp16 --steps 2 --out two-steps/
  ddfast export --student runs/digits-var --to onnx --noise-in-graph --batches 4 --out seeded/
  ddfast export --student runs/digits-var --to openvino --out cpu/
  ddfast export --student var-dd-d16 --weights var-d16.pth --tokenizer vae_ch160v4096z32.pth \\
    --to tensorrt --precision fp16 --batches 1,8,64 --out engine/
  ddfast export --student runs/digits-var --to tensorrt --script --out build-there/    # needs no GPU
  ddfast run engine/ --classes 3,7 --seed 0 --out grid.png
"""


def make_parser() -> Parser:
    parser = Parser("export", DESCRIPTION, EPILOG, "export:run")
    parser.set_defaults(interrupted="nothing of it stays at --out")
    who = parser.add_argument_group("what is exported")
    who.add_argument(
        "--student",
        required=True,
        metavar="NAME|DIR|FILE",
        help="a student of `ddfast info`, a run of `ddfast train`, or a file",
    )
    who.add_argument("--weights", type=Path, metavar="FILE", help="its released checkpoint, if not in a weight folder")
    who.add_argument("--tokenizer", type=Path, metavar="FILE", help="its tokenizer's checkpoint, likewise")
    who.add_argument(
        "--copy", choices=["ema", "raw"], default="ema", help="its moving average (default) or raw weights"
    )
    steps = who.add_mutually_exclusive_group()
    steps.add_argument("--steps", type=int, metavar="N", help="its first N timesteps, unrolled (default: 1)")
    steps.add_argument("--timesteps", metavar="LIST", help="these groups as timesteps, e.g. 0,5")
    graph = parser.add_argument_group("the graph")
    graph.add_argument("--to", required=True, choices=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    graph.add_argument(
        "--precision",
        choices=list(MIN_AGREEMENT),
        metavar="P",
        help="fp32, fp16, bf16, int8 (onnx: weights alone), fp8, or mixed (fp32 trunk, bf16 decoder); by default the "
        "first of a target's: fp32, for openvino mixed, for tensorrt fp16",
    )
    graph.add_argument(
        "--layout", choices=LAYOUTS, help="one graph (whole), or trunk and decoder in files of their own (pair)"
    )
    graph.add_argument(
        "--batches",
        metavar="LIST",
        help="least, best and most images at once, e.g. 1,8,64 (default); one number fixes the batch",
    )
    graph.add_argument(
        "--noise-in-graph",
        action="store_true",
        help="take seed int64 [1] and sample int64 [B] in place of noise: the graph makes the noise of that pair",
    )
    parity = parser.add_argument_group("comparison with torch")
    parity.add_argument(
        "--min-agreement", type=float, metavar="A", help="least share of equal tokens, 0 to 1 (default: by precision)"
    )
    parity.add_argument("--parity-images", type=int, metavar="N", help="images compared (default: 2 to 64, by size)")
    parity.add_argument("--seed", type=int, default=SEED, help=f"of their noise (default: {SEED})")
    parity.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N: where torch and the export run")
    own = parser.add_argument_group("options of one target")
    own.add_argument(
        "--script",
        action="store_true",
        default=None,
        help="tensorrt: write the graph and the commands that build its engine on another machine",
    )
    own.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="tensorrt: kernels' timings to take and add to (default: in ~/.cache/ddfast, by GPU and version)",
    )
    own.add_argument("--workspace", type=int, metavar="MIB", help="TensorRT: most memory of its kernels")
    own.add_argument(
        "--compute-capabilities",
        metavar="LIST",
        help="tensorrt-rtx: GPUs to build for, e.g. 8.9,12.0 (default: 8.0,8.6,8.9,12.0)",
    )
    own.add_argument(
        "--fp8-bar", type=float, metavar="E", help="TensorRT: largest relative error of an fp8 layer (default: 0.05)"
    )
    own.add_argument("--fp8-images", type=int, metavar="N", help="TensorRT: images of fp8's calibration (default: 8)")
    own.add_argument(
        "--backend", choices=["onnxruntime", "tensorrt"], help="triton-server: what runs the model (onnxruntime)"
    )
    own.add_argument("--instance", choices=["auto", "cpu", "gpu"], help="triton-server: where it runs (auto)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    return parser
