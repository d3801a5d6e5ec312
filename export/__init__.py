"""A student outside Python: ONNX, TensorRT, OpenVINO, AOTInductor, and what runs them."""
