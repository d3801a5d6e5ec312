"""What a student can be exported to, without importing what does it."""

from __future__ import annotations

TARGETS = {
    "onnx": "onnx",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "openvino": "openvino",
    "aoti": "aoti",
    "triton-server": "triton_server",
}
"""``--to``, and the module that builds and runs it."""

MIN_AGREEMENT = {"fp32": 0.999, "mixed": 0.999, "fp16": 0.99, "bf16": 0.95, "int8": 0.9, "fp8": 0.9}
"""Of each precision, the least share of tokens equal to torch's that an export usually holds."""

LAYOUTS = ("whole", "pair")
