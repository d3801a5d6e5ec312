"""Linear layers for inference: the weights of a transformer, packed or quantised for the device that runs them.

Axes: M rows, K input channels, N output channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import UserError

PRECISIONS = ("native", "int8", "fp8")
EMULATED = "fp8-emulated"
"""The numbers of fp8 by plain torch on any device, slowly: to measure what fp8 does without a GPU that has it."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INT8_ZERO = 128
_FP8_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16
_QUANTISED_ROWS = 512  # quantised at a time on a CPU: larger temporaries cost more in page faults than in arithmetic


class Linear(ABC):
    """x [..., K] to x W^T + b [..., N], in x's dtype; with ``gelu``, its tanh approximation applied to that.

    Attributes:
        shape: (N, K).
    """

    def __init__(self, weight_NK: Tensor, gelu: bool) -> None:
        self.shape = (weight_NK.shape[0], weight_NK.shape[1])
        self.gelu = gelu

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def _activate(self, y: Tensor) -> Tensor:
        return F.gelu(y, approximate="tanh") if self.gelu else y

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that weights and bias take (oneDNN's padding of odd sizes not counted)."""


class PlainLinear(Linear):
    """The weights as they are. On a GPU, cuBLASLt adds bias and gelu as it writes the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__(weight, gelu)
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self.gelu and self.bias is not None and x.is_cuda:  # tanh's gelu on CUDA alone: erf's on a CPU
            y = torch._addmm_activation(self.bias, x.reshape(-1, x.shape[-1]), self.weight.t(), use_gelu=True)
            return y.view(*x.shape[:-1], self.shape[0])
        return self._activate(F.linear(x, self.weight, self.bias))

    @property
    def nbytes(self) -> int:
        return _bytes(self.weight, self.bias)


class PackedLinear(Linear):
    """float32 or bfloat16 weights in oneDNN's blocked layout, one for every M; gelu fused behind the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__(weight, gelu)
        self.packed, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias
        self._after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *self._after)
        return y

    @property
    def nbytes(self) -> int:
        return _bytes(self.packed, self.bias)


class QuantisedLinear(Linear):
    """What the quantised layers share: they take x as a matrix, with at least one row."""

    def __call__(self, x: Tensor) -> Tensor:
        n, k = self.shape
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], n)
        return self._apply(x.reshape(-1, k)).view(*x.shape[:-1], n)

    @abstractmethod
    def _apply(self, x_MK: Tensor) -> Tensor: ...


class Int8Linear(QuantisedLinear):
    """int8 weights with a scale for each output channel, activations quantised as they come, each row by its own range.

        W ~ s_N w,  x ~ t_M (u - 128),  y = t_M (s_N sum_k (u - 128) w) + b,  |w| <= 127, 1 <= u <= 255

    A row's result does not depend on the other rows. x may be float32, bfloat16 or float16; summed in int32, the rest
    in float32.
    """

    # Measured on Zen 4 at M = 32 to 2048 and 1024 x 4096, in units of the packed bfloat16 product: this product
    # 0.4-0.5, 0.5-0.6 with what is around it (0.7-0.9 by plain torch), 0.7-0.9 at M = 2 (0.9-1.0); torch._int_mm 0.5,
    # but 2.3 at M = 2 and with both scales left to further passes; F.linear 1.1-2.2. One scale for all of x would fuse
    # bias and gelu too, but then images depend on their batch. quantized::linear_dynamic is being removed from torch;
    # onednn's signed activations are not optimised.

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__(weight, gelu)
        codes, scale_N1 = _quantised(weight, torch.uint8)
        self.packed = torch.ops.onednn.qlinear_prepack(codes.bitwise_xor_(_INT8_ZERO).view(torch.int8), None)
        self.scale_N = scale_N1.flatten()
        self.zero_N = torch.zeros(weight.shape[0], dtype=torch.int32)
        self.bias = (torch.zeros(weight.shape[0]) if bias is None else bias).float()

    def _apply(self, x_MK: Tensor) -> Tensor:
        out_MN = x_MK.new_empty(x_MK.shape[0], self.shape[0])
        for x, out in zip(x_MK.split(_QUANTISED_ROWS), out_MN.split(_QUANTISED_ROWS), strict=True):
            codes, scale_M1 = _quantised(x, torch.uint8)
            ops.scale_rows(self._product(codes), scale_M1, self.bias, self.gelu, out)
        return out_MN

    def _product(self, codes: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, _INT8_ZERO, self.packed, self.scale_N, self.zero_N, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    @property
    def nbytes(self) -> int:
        return _bytes(self.packed, self.scale_N, self.zero_N, self.bias)


class Fp8Linear(QuantisedLinear):
    """e4m3 weights with a scale for each output channel, activations quantised as they come, each row by its own range.

        W ~ s_N w,  x ~ t_M v,  y = t_M s_N sum_k v w + b,  |v|, |w| <= 448

    bfloat16 in and out, on CUDA devices of capability 8.9 and later; K and N are multiples of 16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__(weight, gelu)
        self.weight, scale = _quantised(weight, torch.float8_e4m3fn)
        self.scale_1N, self.bias = scale.t().contiguous(), bias

    def _apply(self, x_MK: Tensor) -> Tensor:
        codes, scale_M1 = _quantised(x_MK, torch.float8_e4m3fn)
        y = torch._scaled_mm(
            codes,
            self.weight.t(),
            scale_a=scale_M1,
            scale_b=self.scale_1N,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return self._activate(y)

    @property
    def nbytes(self) -> int:
        return _bytes(self.weight, self.scale_1N, self.bias)


class EmulatedFp8Linear(QuantisedLinear):
    """The readable twin of :class:`Fp8Linear`: both factors rounded to e4m3 and back, multiplied in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool) -> None:
        super().__init__(weight, gelu)
        codes, scale_N1 = _quantised(weight, torch.float8_e4m3fn)
        self.inner = _native(codes.float() * scale_N1, None if bias is None else bias.float(), gelu)

    def _apply(self, x_MK: Tensor) -> Tensor:
        codes, scale_M1 = _quantised(x_MK, torch.float8_e4m3fn)
        return self.inner(codes.float() * scale_M1).to(x_MK.dtype)

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes


def make_linear(weight: Tensor, bias: Tensor | None = None, *, precision: str = "native", gelu: bool = False) -> Linear:
    """A linear layer for inference: ``x [..., K] -> [..., N]`` with its own copy of the weights where it packs them.

    Args:
        weight: [N, K], of any floating dtype; x is of the same one.
        bias: [N], in that dtype.
        precision: "native" multiplies in the weight's dtype; "int8" and "fp8" quantise both factors
            (:class:`Int8Linear`, :class:`Fp8Linear`). fp8 needs N and K to be multiples of 16; others stay native.
        gelu: apply gelu's tanh approximation to the result.

    Raises:
        UserError: shapes or dtypes that do not fit; a precision that :func:`check_precision` refuses.

    >>> fc1 = make_linear(block.ffn.fc1.weight, block.ffn.fc1.bias, gelu=True)
    >>> hidden = fc1(x)  # [R, n, D] to [R, n, 4D]
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise UserError(f"weight must be floating [N, K] with N, K > 0, not {weight.dtype} {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise UserError(
            f"bias must be {weight.dtype} [{weight.shape[0]}] as weight {list(weight.shape)} is, "
            f"not {bias.dtype} {list(bias.shape)}"
        )
    if bias is not None and bias.device != weight.device:
        raise UserError(f"weight is on {weight.device} but bias on {bias.device}: move one of them")
    check_precision(precision, weight.device, weight.dtype)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if precision == "int8":
        return Int8Linear(weight, bias, gelu)
    if precision == "native" or any(size % _FP8_MULTIPLE for size in weight.shape):
        return _native(weight, bias, gelu)
    return (Fp8Linear if precision == "fp8" else EmulatedFp8Linear)(weight, bias, gelu)


def check_precision(precision: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError, saying what is needed, where ``device`` and ``dtype`` do not allow ``precision``."""
    if precision not in (*PRECISIONS, EMULATED):
        raise UserError(f"precision {precision!r} is not known; use {', '.join(PRECISIONS)}")
    if precision == "int8":
        if device.type != "cpu":
            raise UserError(f"precision int8 is for the CPU, not {device}; use fp8 or native there")
        if not _int8_runs():
            raise UserError("precision int8 needs a CPU with AVX512-VNNI and a torch with oneDNN; use native")
        if dtype not in _FLOATS:
            raise UserError(f"precision int8 needs a teacher in float32, bfloat16 or float16, not {dtype}")
    if precision == "fp8":
        if device.type != "cuda":
            raise UserError(f"precision fp8 needs a CUDA device, not {device}; use int8 or native there")
        if dtype != torch.bfloat16:
            raise UserError(f"precision fp8 needs a teacher in bfloat16, not {dtype}: choose --dtype bfloat16")
        have = torch.cuda.get_device_capability(device)
        if have < _FP8_CAPABILITY:
            raise UserError(
                f"precision fp8 needs a GPU of capability 8.9 (Ada, Hopper) or later, and {device} has "
                f"{have[0]}.{have[1]}; use native"
            )


def _native(weight: Tensor, bias: Tensor | None, gelu: bool) -> Linear:
    packs = weight.device.type == "cpu" and _packs(weight.dtype)
    return (PackedLinear if packs else PlainLinear)(weight, bias, gelu)


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of ``dtype`` here; its ops are torch's own, and may change."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    ):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def _int8_runs() -> bool:
    """Whether int8 products are fast and exact: without VNNI their partial sums are cut to 16 bits."""
    ops = torch.ops.onednn
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return bool(vnni()) and all(hasattr(ops, name) for name in ("qlinear_prepack", "qlinear_pointwise"))


def _quantised(x_MK: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [M, K] of that type and a scale float32 [M, 1] for each row: :func:`ddfast.ops.quantize_rows`."""
    x_MK = x_MK.contiguous()
    out_MK, scale_M1 = torch.empty_like(x_MK, dtype=codes), x_MK.new_empty(x_MK.shape[0], 1, dtype=torch.float32)
    ops.quantize_rows(x_MK, out_MK, scale_M1)
    return out_MK, scale_M1


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
