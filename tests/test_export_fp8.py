"""fp8 in exported graphs, against torch by the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_student
from torch import Tensor, nn

from ddfast.models import load_student

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

from ddfast.export import fp8  # noqa: E402
from ddfast.export.build import Job  # noqa: E402


class Perceptron(nn.Module):
    """A product by MatMul and one by Gemm, as the exporter writes them, of the same x."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).half().float() / 4

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x[:, 0], self.first.weight, self.first.bias), self.last(x)


def test_fp8_in_a_graph_is_fp8_in_torch(tmp_path: Path) -> None:
    import onnx

    module, x = (
        Perceptron().eval().requires_grad_(False),
        torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).half(),
    )
    x[0, 0, 0] = 50  # saturates
    layers = {
        f"{name}.weight": fp8.Layer(
            fp8.scale_of(4.0), fp8.scale_of(getattr(module, name).weight.abs().max().item()), fp8=True
        )
        for name in ("first", "last")
    }
    program = torch.onnx.export(module.half(), (x,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    assert sorted(fp8.insert(program.model, module, layers)) == sorted(layers)
    path = tmp_path / "model.onnx"
    program.save(str(path))
    onnx.checker.check_model(str(path), full_check=True)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("DequantizeLinear") == 4
    assert {"MatMul", "Gemm"} <= set(kinds)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    for name, part, got in zip(("first", "last"), (x[:, 0], x), found, strict=True):
        layer, linear = layers[f"{name}.weight"], getattr(module, name).float()
        want = F.linear(
            fp8.rounded(part.float(), layer.x_scale), fp8.rounded(linear.weight, layer.w_scale), linear.bias
        )
        plain = F.linear(part.float(), linear.weight, linear.bias)
        assert np.abs(got - want.numpy()).max() < 0.02 < np.abs(got - plain.numpy()).max()


def test_a_layer_that_fp8_does_not_hold_stays_float16(bundles: dict[str, Path], tmp_path: Path) -> None:
    student = load_student(tiny_student(tmp_path / "student.safetensors", str(bundles["var"]), "var"))
    job = Job(student, "tensorrt", "fp8", (0,), options={"fp8_images": 4})
    layers, agreement = fp8.calibrate(job, 0.05, least=0)
    none, whole = fp8.calibrate(job, 1e-4, least=0)
    assert set(layers) == set(none) and not any(layer.fp8 for layer in none.values())
    assert agreement < whole == 1
    assert all(layer.fp8 == (layer.error <= 0.05) for layer in layers.values())
    some, better = fp8.calibrate(job, 0.05, least=(1 + agreement) / 2)
    kept, dropped = ([layer.error for layer in some.values() if layer.fp8 == fp8] for fp8 in (True, False))
    assert better >= (1 + agreement) / 2 and max(kept, default=0) <= min(dropped)
    sizes = dict(student.student.named_parameters())
    assert all(size % 16 == 0 for name in layers for size in sizes[name].shape)
    assert sum(layer.fp8 for layer in layers.values()) >= 4
    assert all(1e-4 < layer.error for layer in layers.values())


@pytest.mark.parametrize("largest", [3e-4, 0.1, 1.0, 447.0, 2000.0])
def test_a_scale_is_float16_and_just_covers(largest: float) -> None:
    scale = fp8.scale_of(largest)
    assert float(np.float16(scale)) == scale and largest <= 448 * scale < largest * 1.1 + 448 * 6e-8
