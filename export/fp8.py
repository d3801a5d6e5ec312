"""fp8 in a graph: a trunk's linear layers between QuantizeLinear and DequantizeLinear, where a calibration holds.

    x ~ s_x q(x / s_x),  W ~ s_W q(W / s_W),  s = max |.| / 448, rounded up to float16,  q: to e4m3, the nearest

One scale a tensor, as TensorRT's fp8 products take it.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ddfast.ops import nearest_code
from ddfast.sampling import few_step, sample_noise

if TYPE_CHECKING:
    from .build import Job

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16
"""fp8 products take sizes that are multiples of it."""
BAR = 0.05
"""Largest relative error of a layer's output. Two factors of independent rounding, each 2.6% of its rms, make 3.7%."""
LEAST = 0.93
"""Share of tokens that fp8 may not change."""
IMAGES, BATCH, SEED = 8, 4, 0


@dataclass
class Layer:
    """One linear layer's calibration.

    Attributes:
        x_scale, w_scale: s_x and s_W.
        error: of the layer's output, relative to its norm, x and W rounded.
        fp8: whether it holds, and the graph has it in fp8.
    """

    x_scale: float
    w_scale: float
    error: float = 0.0
    fp8: bool = False

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(rounded(x, self.x_scale), rounded(weight, self.w_scale), bias)


def scale_of(largest: float) -> float:
    """That with which ``largest`` just fits, in float16."""
    scale = np.float16(largest / LARGEST)
    return float(scale if float(scale) * LARGEST >= largest else np.nextafter(scale, np.float16(np.inf)))


def rounded(x: Tensor, scale: float) -> Tensor:
    """``x`` through e4m3 and back, saturating."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(FP8).to(x.dtype) * scale


class _Linears(TorchFunctionMode, ABC):
    """Gives every linear layer's call to ``meet``, by the name of its weight."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in student.named_parameters() if weight.ndim == 2}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.names.get(args[1].data_ptr()) if func is F.linear else None
        if name is None:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            return self.meet(name, args[0], args[1], *args[2:], **(kwargs or {}))

    @abstractmethod
    def meet(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output."""


class _Largest(_Linears):
    """Largest numbers of every layer's x and W."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.x: dict[str, float] = {}
        self.w: dict[str, float] = {}

    def meet(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.x[name] = max(self.x.get(name, 0.0), x.abs().max().item())
        self.w[name] = weight.abs().max().item()
        return F.linear(x, weight, bias)


class _Errors(_Linears):
    """Sums of squares of every layer's error and product."""

    def __init__(self, student: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__(student)
        self.layers, self.sums = layers, {name: [0.0, 0.0] for name in layers}

    def meet(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight)
        if layer := self.layers.get(name):
            off = layer.product(x, weight) - y
            for place, value in enumerate((off, y)):
                self.sums[name][place] += value.double().square().sum().item()
        return y if bias is None else y + bias


class _Rounded(_Linears):
    """Every layer that is to be fp8 in fp8's numbers."""

    def __init__(self, student: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__(student)
        self.layers = layers

    def meet(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = self.layers.get(name)
        return layer.product(x, weight, bias) if layer and layer.fp8 else F.linear(x, weight, bias)


class Fp8:
    """A job's calibration; called with its trunk's graph, it puts it in.

    Options: ``fp8_bar`` (default ``BAR``), ``fp8_images`` (``IMAGES``).
    """

    def __init__(self, job: Job) -> None:
        job.progress("fp8 calibration")
        self.bar = float(job.options.get("fp8_bar") or BAR)
        self.student = job.model.student
        self.layers, self.agreement = calibrate(job, self.bar)

    def __call__(self, model: Any) -> None:
        found = insert(model, self.student, self.layers)
        for name, layer in self.layers.items():
            layer.fp8 = name in found

    def record(self) -> dict[str, Any]:
        layers = {name: asdict(layer) for name, layer in self.layers.items()}
        return {"bar": self.bar, "agreement": self.agreement, "layers": layers}


@torch.inference_mode()
def calibrate(job: Job, bar: float, least: float = LEAST) -> tuple[dict[str, Layer], float]:
    """Scales and errors of the student's linear layers, by their weights' names, on the noise of some images.

    A layer whose output errs by more than ``bar``, or whose sizes do not fit, stays float16. So do the worst of the
    others, until ``least`` of the images' tokens are those of the student as it is.

    Returns:
        The layers, and the share of equal tokens, both as torch says by fp8's numbers.
    """
    model, images = job.model, int(job.options.get("fp8_images") or IMAGES)
    student = model.student

    def tokens() -> Tensor:
        parts = []
        for part in torch.arange(images, device=model.device).split(BATCH):
            noise = sample_noise(SEED, part, student.num_tokens, student.channels)
            x = few_step(student, part % student.num_classes, noise, model.codebook, job.timesteps, model.split)
            parts.append(nearest_code(x, model.codebook))
        return torch.cat(parts)

    with _Largest(student) as largest:
        want = tokens()
    weights = dict(student.named_parameters())
    layers = {
        name: Layer(scale_of(most), scale_of(largest.w[name]))
        for name, most in largest.x.items()
        if most > 0 and largest.w[name] > 0 and not any(size % MULTIPLE for size in weights[name].shape)
    }
    with _Errors(student, layers) as errors:
        tokens()
    for name, layer in layers.items():
        off, whole = errors.sums[name]
        layer.error = (off / max(whole, 1e-30)) ** 0.5
        layer.fp8 = layer.error <= bar
    while True:
        with _Rounded(student, layers):
            agreement = (tokens() == want).double().mean().item()
        held = sorted((layer for layer in layers.values() if layer.fp8), key=lambda layer: -layer.error)
        if agreement >= least or not held:
            return layers, agreement
        for layer in held[: -(-len(held) // 4)]:
            layer.fp8 = False


def insert(model: Any, student: nn.Module, layers: Mapping[str, Layer]) -> list[str]:
    """Put QuantizeLinear and DequantizeLinear around the products of a float16 graph (an ``onnx_ir.Model``) that hold.

    The exporter renames and transposes weights: they are found by their values. Returns the names of those found.
    """
    import onnx_ir as ir

    def digest(weight_KN: np.ndarray[Any, Any]) -> bytes:
        return hashlib.sha256(repr(weight_KN.shape).encode() + np.ascontiguousarray(weight_KN).tobytes()).digest()

    names: dict[bytes, list[str]] = {}
    for name, weight in student.named_parameters():
        if name in layers and layers[name].fp8:
            names.setdefault(digest(weight.detach().half().cpu().numpy().T), []).append(name)
    graph, found = model.graph, []
    done: dict[tuple[str, float], Any] = {}  # activations that are rounded already

    def constant(name: str, array: np.ndarray[Any, Any]) -> Any:
        if name not in graph.initializers:
            tensor = ir.tensor(array, name=name)
            graph.initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
            )
        return graph.initializers[name]

    def node(kind: str, inputs: list[Any], like: Any, dtype: Any, before: Any) -> Any:
        made = ir.node(kind, inputs)
        made.outputs[0].name = f"{inputs[0].name}_{kind}"
        made.outputs[0].dtype, made.outputs[0].shape = dtype, like.shape
        graph.insert_before(before, made)
        return made.outputs[0]

    zero = numpy_fp8(torch.zeros((), dtype=FP8))
    for product in list(graph):
        if product.op_type not in ("MatMul", "Gemm") or product.inputs[1].const_value is None:
            continue
        x, w = product.inputs[:2]
        if x.const_value is not None or len(w.shape) != 2:
            continue
        turned = product.op_type == "Gemm" and bool(product.attributes.get_int("transB", 0))
        weight = w.const_value.numpy()
        same = names.get(digest(weight.T if turned else weight), [])
        if len(same) != 1:  # two weights that are equal have two calibrations
            continue
        name, layer = same[0], layers[same[0]]
        zero_point = constant("fp8_zero", zero)
        x_scale, w_scale = (constant(f"{name}_{k}", np.array(getattr(layer, k), np.float16)) for k in SCALES)
        key = (x.name, layer.x_scale)
        if key not in done:
            q = node("QuantizeLinear", [x, x_scale, zero_point], x, ir.DataType.FLOAT8E4M3FN, product)
            q.name = f"{x.name}_{len(done)}_fp8"
            done[key] = node("DequantizeLinear", [q, x_scale, zero_point], x, x.dtype, product)
        codes = constant(f"{w.name}_fp8", codes_of(weight, layer.w_scale))
        product.replace_input_with(0, done[key])
        product.replace_input_with(1, node("DequantizeLinear", [codes, w_scale, zero_point], w, w.dtype, product))
        if not w.uses():
            graph.initializers.pop(w.name)
        found.append(name)
    return found


SCALES = ("x_scale", "w_scale")


def codes_of(weight: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    w = torch.from_numpy(weight.astype(np.float32)) / scale
    return numpy_fp8(w.clamp(-LARGEST, LARGEST).to(FP8))


def numpy_fp8(codes: Tensor) -> np.ndarray[Any, Any]:
    import ml_dtypes

    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
