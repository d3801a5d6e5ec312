"""Weights as int8 in an ONNX graph, a scale for every output channel; products stay in float32.

w ~ scale round(w / scale), scale = max |w| / 127 over the channel. A ``DequantizeLinear`` node stands where the weight
was: runtimes that multiply int8 weights fuse it, others undo it when they load the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SMALLEST = 1 << 10
"""Weights with fewer elements stay as they are."""


def quantize_weights(model: Any) -> int:
    """Replace the weights of MatMul, Gemm and Conv in an ``onnx_ir.Model``; returns how many were."""
    import onnx_ir as ir

    made: dict[str, Any] = {}
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            continue
        weight = node.inputs[1]
        if weight.const_value is None or not weight.is_initializer() or weight.const_value.size < SMALLEST:
            continue
        if weight.name not in made:
            array = weight.const_value.numpy()
            axis = 0 if node.op_type == "Conv" or _transposed(node) else array.ndim - 1
            whole, scale = quantize(array, axis)
            parts = [
                _initializer(model, f"{weight.name}.int8", whole),
                _initializer(model, f"{weight.name}.scale", scale),
            ]
            undo = ir.node("DequantizeLinear", parts, {"axis": axis}, name=f"{weight.name}.dequantize")
            undo.outputs[0].name = f"{weight.name}.float"
            undo.outputs[0].dtype, undo.outputs[0].shape = weight.dtype, weight.shape
            model.graph.insert_before(node, undo)
            made[weight.name] = undo.outputs[0]
        node.replace_input_with(1, made[weight.name])
    for name in made:
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    return len(made)


def quantize(weight: np.ndarray[Any, Any], axis: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """int8 of the weight's shape, and a float32 scale for every index of ``axis``."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others), np.finfo(np.float32).tiny) / 127
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale.astype(np.float32)


def _transposed(node: Any) -> bool:
    return "transB" in node.attributes and bool(node.attributes["transB"].as_int())


def _initializer(model: Any, name: str, array: np.ndarray[Any, Any]) -> Any:
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers[name] = value
    return value
