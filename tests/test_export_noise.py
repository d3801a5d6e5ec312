"""The noise as a graph against its definition: the same bits in torch, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddfast.export.noise import _MULTIPLIERS, _windows, graph_noise
from ddfast.noise import normal_noise

SEEDS = (0, 1, 2**32 + 5, 2**63 - 1)
SAMPLES = torch.tensor([0, 7, 2**31 - 1, 2**32 + 7, 2**40, 2**63 - 1])
SMALL = torch.tensor([0, 7, 2**24 - 1, 65536, 255])  # what OpenVINO's integers hold
TOKENS, CHANNELS = 680, 5


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize(("tokens", "channels"), [(680, 32), (680, 5), (9, 8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_torch_gives_the_bits_of_the_definition(seed: int, tokens: int, channels: int) -> None:
    got = graph_noise(torch.tensor([seed]), SAMPLES, tokens, channels)
    assert torch.equal(bits(got), bits(normal_noise(seed, SAMPLES, 0, tokens, channels)))


def test_positions_and_quads_beyond_a_byte_count_too() -> None:
    for tokens, channels in ((66_000, 1), (1, 4 * 300)):
        got = graph_noise(torch.tensor([3]), SAMPLES[:2], tokens, channels)
        assert torch.equal(bits(got), bits(normal_noise(3, SAMPLES[:2], 0, tokens, channels)))


def test_products_stay_exact_in_float32_whatever_the_bytes() -> None:
    windows = _windows()  # [column, b, l, w]
    for w, multiplier in enumerate(_MULTIPLIERS):
        for b, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
            digits = windows[:, b, column, w]
            assert sum(int(digit) << 16 * j for j, digit in enumerate(digits)) == multiplier << 8 * b + 16 * column
    for side in (windows.clip(min=0), -windows.clip(max=0)):
        assert (255 * side.sum((1, 2)) + 256).max() <= 2**24  # 256 for the carry


class Noise(nn.Module):
    def forward(self, seed: Tensor, sample: Tensor) -> Tensor:
        return graph_noise(seed, sample, TOKENS, CHANNELS)


@pytest.fixture(scope="module")
def onnx_bytes() -> bytes:
    pytest.importorskip("onnxscript")
    program: Any = torch.onnx.export(
        Noise().eval(),
        (torch.tensor([3]), torch.tensor([1, 2, 3])),
        dynamo=True,
        opset_version=20,
        dynamic_shapes={"seed": None, "sample": {0: torch.export.Dim("batch", min=1, max=64)}},
        verbose=False,
    )
    proto = program.model_proto
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param  # not frozen at 3
    data: bytes = proto.SerializeToString()
    assert len(data) < 2**20
    return data


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[3:4]], ids=["six", "one"])
def test_onnx_runtime_gives_the_bits_of_the_definition(onnx_bytes: bytes, samples: Tensor) -> None:
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
    for seed in SEEDS:
        (got,) = session.run(None, {"seed": torch.tensor([seed]).numpy(), "sample": samples.numpy()})
        assert torch.equal(bits(torch.from_numpy(got)), bits(normal_noise(seed, samples, 0, TOKENS, CHANNELS)))


@pytest.mark.parametrize("samples", [SMALL, SMALL[2:3]], ids=["five", "one"])
def test_openvino_gives_the_noise_of_small_seeds_and_samples(onnx_bytes: bytes, samples: Tensor) -> None:
    """Within the last bits: on some processors it fuses multiplication and addition."""
    core = pytest.importorskip("openvino").Core()
    model = core.compile_model(
        core.read_model(io.BytesIO(onnx_bytes)), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    for seed in (0, 1, 2**24 - 1):
        got = torch.from_numpy(model({"seed": torch.tensor([seed]).numpy(), "sample": samples.numpy()})[0])
        torch.testing.assert_close(got, normal_noise(seed, samples, 0, TOKENS, CHANNELS), rtol=1e-5, atol=1e-6)


def test_tensorrt_parses_the_graph(onnx_bytes: bytes) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(onnx_bytes), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert tuple(network.get_output(0).shape) == (-1, TOKENS, CHANNELS)
