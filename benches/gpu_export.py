"""What ``make gpu`` times of exports: one-step images, class and noise in, pixels out, by each runtime that is there.

Torch with and without a CUDA graph, onnxruntime, and TensorRT, again with and without one. Weights are random. A time
is that of a whole call, the device having been waited for; a ceiling is the time to do the arithmetic of trunk and
decoder at the rate of a bfloat16 product, or to read the weights once, whichever is longer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from _common import free
from full_size import random_teacher
from gpu_cases import Ceilings
from gpu_sample import TIMESTEPS
from torch.utils.flop_counter import FlopCounterMode

from ddfast.errors import UserError
from ddfast.export.bench import latency
from ddfast.export.build import Job, check, export_student, open_engine, usual_device
from ddfast.export.engine import Engine, Stage, Tensors
from ddfast.export.manifest import Batch
from ddfast.models import Distilled, load_teacher
from ddfast.models.base import Tokenizer
from ddfast.training.monitor import flops_a_pair

Figures = dict[str, Any]
Opened = Callable[[Job, Path, torch.device], Engine]
_SECONDS = 0.4  # of calls at one batch


@dataclass(frozen=True)
class ExportCase:
    """One line of the report: a teacher's student, and the batches that it is run at."""

    teacher: str
    batches: tuple[int, ...] = (1, 8, 64)

    @property
    def name(self) -> str:
        return f"export {self.teacher}"


def export_cases() -> list[ExportCase]:
    return [ExportCase("digits-var"), ExportCase("var-d16"), ExportCase("llamagen-b-256")]


def random_student(name: str, device: torch.device) -> Distilled:
    """A student as it starts from its teacher, in float32."""
    digits = name.startswith("digits")
    teacher = load_teacher(name, device=device) if digits else random_teacher(name, torch.float32, device)
    student = teacher.new_student(torch.Generator().manual_seed(0)).to(device).requires_grad_(False).eval()
    return Distilled("random", student, teacher.tokenizer, name, TIMESTEPS[name], TIMESTEPS[name][-1], "", "")


class TorchStage(Stage):
    """What is exported, in torch."""

    def __init__(self, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        module: torch.nn.Module = job.module("whole", dtype)
        self.module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.runtime = device, "torch"

    @torch.inference_mode()
    def __call__(self, feeds: Tensors) -> Tensors:
        return dict(zip(("image", "embeddings"), self.module(feeds["label"], feeds["noise"]), strict=True))


class Graphed(Stage):
    """A stage replayed from a CUDA graph, one for each batch, fed by copies of its inputs."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device, self.runtime = stage, stage.device, f"{stage.runtime}, CUDA graph"
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensors, Tensors]] = {}

    def __call__(self, feeds: Tensors) -> Tensors:
        batch = len(feeds["label"])
        if batch not in self.graphs:
            self.graphs[batch] = self.captured(feeds)
        graph, own, outputs = self.graphs[batch]
        for name, value in own.items():
            value.copy_(feeds[name])
        graph.replay()
        return outputs

    def captured(self, feeds: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensors]:
        own = {name: value.clone() for name, value in feeds.items()}
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):  # what is compiled or allocated at first
                self.stage(own)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.stage(own)
        return graph, own, outputs


def in_torch(job: Job, folder: Path, device: torch.device) -> Engine:
    return Engine(job.manifest(), {"whole": TorchStage(job, device, torch.bfloat16)})


def exported(target: str) -> Opened:
    def opened(job: Job, folder: Path, device: torch.device) -> Engine:
        precision = "fp16" if device.type == "cuda" else "fp32"
        own = replace(job, target=target, precision=precision)
        check(own)
        if usual_device(own.manifest()).type != device.type:
            raise UserError(f"{target} does not run on {device.type} here")
        export_student(own, folder / target, min_agreement=0.0, num=2)
        return open_engine(folder / target, device)

    return opened


WAYS: dict[str, Opened] = {
    "torch bf16": in_torch,
    "onnxruntime": exported("onnx"),
    "TensorRT": exported("tensorrt"),
}
GRAPHED = ("torch bf16", "TensorRT")  # onnxruntime waits for the device


def measure_case(case: ExportCase, ceilings: Ceilings, device: torch.device) -> Figures:
    """Milliseconds a call at every batch, by every way; ``missing``: why the others are not there."""
    model = random_student(case.teacher, device)
    ms: dict[str, dict[int, float]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        job = Job(model, "onnx", "fp32", (0,), Batch(1, min(8, case.batches[-1]), case.batches[-1]), progress=print)
        for way, make in WAYS.items():
            free(device)
            try:
                engine = make(job, Path(name), device)
            except UserError as error:
                missing[way] = str(error)
                continue
            ms[way] = times(engine, case.batches)
            if device.type == "cuda" and way in GRAPHED:
                (stage,) = engine.stages.values()
                ms[f"{way}, graph"] = times(Engine(engine.manifest, {"whole": Graphed(stage)}), case.batches)
            del engine
    flop, weights = work(model)
    ceiling = {
        n: 1e3 * max(n * flop / ceilings.bf16_flop_per_s, 2 * weights / ceilings.copy_bytes_per_s) for n in case.batches
    }
    return {
        "name": case.name,
        "teacher": case.teacher,
        "dtype": "torch bfloat16, others float16" if device.type == "cuda" else "torch bfloat16, others float32",
        "ms": {way: {str(n): value for n, value in found.items()} for way, found in ms.items()},
        "ceiling_ms": {str(n): value for n, value in ceiling.items()},
        "times_ceiling": {way: {str(n): v / ceiling[n] for n, v in found.items()} for way, found in ms.items()},
        "gflop_per_image": flop / 1e9,
        "missing": missing,
    }


def times(engine: Engine, batches: Sequence[int]) -> dict[int, float]:
    return {batch: latency(engine, batch, _SECONDS).median_ms for batch in batches}


def work(model: Distilled) -> tuple[float, int]:
    """Floating-point operations of an image, and numbers of trunk and decoder."""
    tokenizer, student = cast(Tokenizer, model.tokenizer), model.student
    x = torch.zeros(1, student.num_tokens, student.channels, device=model.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.decode_embeddings(x)
    weights = sum(p.numel() for p in (*student.parameters(), *decoder_parameters(model)))
    return flops_a_pair(student) / 3 + counter.get_total_flops(), weights


def decoder_parameters(model: Distilled) -> Iterator[torch.nn.Parameter]:
    """Those of the tokenizer that decoding reads."""
    return (p for name, p in model.tokenizer.named_parameters() if not name.startswith(("encoder", "quant_conv")))


def line(row: Figures) -> str:
    """A case as a line of the table."""
    if "ms" not in row:
        return f"{row['name']:42} {row.get('problem', '').partition(chr(10))[0][:80]}"
    told = [
        f"{way} {'/'.join(f'{ms:.3g}' for ms in found.values())} ms ("
        f"{'/'.join(f'{x:.1f}' for x in row['times_ceiling'][way].values())} x ceiling)"
        for way, found in row["ms"].items()
    ]
    batches = "/".join(row["ceiling_ms"])
    missing = f"   without {', '.join(row['missing'])}" if row["missing"] else ""
    return f"{row['name'] + ' batch ' + batches:42} {'   '.join(told)}{missing}"


def bars(rows: Sequence[Figures]) -> list[Figures]:
    """Nothing is asked."""
    return []
