"""int8 in OpenVINO graphs: a trunk's linear layers by scales taken as it runs, a decoder's convolutions by calibration.

Weights have a scale for every output channel. A linear layer's input has one for every ``GROUP`` numbers of a row,
which OpenVINO takes when it runs; a convolution's input has a fixed range, that of the calibration's images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ddfast.models import Distilled
from ddfast.sampling import few_step, sample_noise

from .int8 import SMALLEST, quantize

GROUP = 128
IMAGES, SEED = 4, 0
LEAST_CHANNELS = 64
"""In or out, for a convolution to be int8: the first, the last, and those of the residual quantizer stay."""


def quantize_linears(model: Any) -> int:
    """Store the weights of every product with constants as int8 and scales; returns how many there were.

    Products of constants alone stay: OpenVINO computes them when it loads the graph, and cannot from int8.
    """
    from openvino import opset13 as ops

    found = 0
    for product in model.get_ordered_ops():
        if product.get_type_name() != "MatMul" or product.get_input_partial_shape(0).is_static:
            continue
        node = product.input_value(1).get_node()
        if node.get_type_name() != "Constant" or len(node.get_output_shape(0)) != 2:
            continue
        weight, axis = node.get_data(), 0 if product.get_attributes()["transpose_b"] else 1
        if weight.size < SMALLEST:
            continue
        codes, scale = quantize(weight, axis)
        shape = [-1 if i == axis else 1 for i in range(2)]
        undone = ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scale.reshape(shape)))
        product.input(1).replace_source_output(undone.output(0))
        found += 1
    return found


@torch.inference_mode()
def calibration(model: Distilled, timesteps: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Embeddings [B, L, C] of some images, by torch."""
    student, samples = model.student, torch.arange(IMAGES, device=model.device)
    noise = sample_noise(SEED, samples, student.num_tokens, student.channels)
    labels = samples % student.num_classes
    return few_step(student, labels, noise, model.codebook, timesteps, model.split).cpu().numpy()


def quantize_convolutions(model: Any, ranges: dict[str, tuple[float, float]]) -> int:
    """Round the inputs of the convolutions in ``ranges``, and their weights, to int8; returns how many there were."""
    from openvino import opset13 as ops

    def rounded(value: Any, low: Any, high: Any, levels: int) -> Any:
        ends = [ops.constant(np.asarray(end, np.float32)) for end in (low, high, low, high)]
        return ops.fake_quantize(value, *ends, levels).output(0)

    convolutions = [conv for conv in convolutions_of(model) if conv.get_friendly_name() in ranges]
    for conv in convolutions:
        low, high = (np.full((1, 1, 1, 1), end) for end in ranges[conv.get_friendly_name()])
        conv.input(0).replace_source_output(rounded(conv.input_value(0), low, high, 256))
        weight = conv.input_value(1).get_node().get_data()
        others = (1, 2, 3) if conv.get_type_name() == "Convolution" else (0, 2, 3)  # a transposed one has in, out
        largest = np.maximum(np.abs(weight).max(axis=others, keepdims=True), np.finfo(np.float32).tiny)
        conv.input(1).replace_source_output(rounded(conv.input_value(1), -largest, largest, 255))
    return len(convolutions)


def input_ranges(model: Any, embeddings: np.ndarray[Any, Any]) -> dict[str, tuple[float, float]]:
    """Least and most of every wide convolution's input, 0 included, on ``embeddings``, by the name of its node.

    The graph itself is left as it is.
    """
    import openvino as ov
    from openvino import opset13 as ops

    watched, names = model.clone(), []
    for conv in convolutions_of(watched):
        names.append(conv.get_friendly_name())
        value, every = conv.input_value(0), ops.constant([0, 1, 2, 3])
        watched.add_results([ops.result(reduce(value, every)) for reduce in (ops.reduce_min, ops.reduce_max)])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    run = ov.Core().compile_model(watched, "CPU", settings)
    found = []
    for image in embeddings:
        values = run({0: image[None]})
        found.append([float(values[i]) for i in range(1, 1 + 2 * len(names))])
    least, most = np.minimum(0, np.min(found, axis=0)), np.maximum(0, np.max(found, axis=0))
    return {name: (least[2 * i], most[2 * i + 1]) for i, name in enumerate(names)}


def convolutions_of(model: Any) -> list[Any]:
    """The wide ones, in order."""
    kinds = ("Convolution", "ConvolutionBackpropData")
    every = [op for op in model.get_ordered_ops() if op.get_type_name() in kinds]
    return [op for op in every if min(op.get_input_shape(1)[:2]) >= LEAST_CHANNELS]
