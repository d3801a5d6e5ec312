"""Entries of ``ddfast.ops`` for what a cached transformer does between its matrix products.

Arguments are checked here, then C++ (``ddfast._C``) runs on a CPU, CUDA on a GPU, and the torch twin of
``ddfast.layers`` where neither is there or for float64 and, on a CPU, float16. All work in place or into ``out``,
allocate nothing that they keep and wait for no device, so that a CUDA graph can hold them. They serve inference and
have no gradient.

Axes: R rows of a batch, n positions of a call, D width, H heads, Hk heads of keys and values, d head width, L positions
a cache holds, V codebook size, C codebook channels, S positions of the latent map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _library, layers
from .errors import UserError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and modulations are kept in beside a model of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _refuse(name: str, why: str) -> None:
    raise UserError(f"{name} {why}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Shape, dtype and device of an argument, and that its last dimension is dense."""
    if tuple(tensor.shape) != shape:
        _refuse(name, f"must be {list(shape)}, not {list(tensor.shape)}")
    if tensor.dtype != dtype:
        _refuse(name, f"must be {dtype}, not {tensor.dtype}: convert it")
    if tensor.device != like.device:
        _refuse(name, f"is on {tensor.device} but the others on {like.device}: move one of them")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        _refuse(name, f"must have stride 1 in its last dimension, not {tensor.stride(-1)}: use .contiguous()")


def _check_dense(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        _refuse(name, f"must be contiguous, not of strides {tensor.stride()}: use .contiguous()")


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        _refuse(name, f"must be one of {', '.join(map(str, _DTYPES))}, not {tensor.dtype}")


def _check_length(length: Tensor, new: int, cache: Tensor) -> None:
    """``length`` is int32 [1] beside the cache, and ``new`` more positions fit. On a GPU its value is not looked at: a
    kernel writes nothing past the end, and :class:`ddfast.kv_cache.KVCache` counts along on the host."""
    if length.dtype != torch.int32 or length.numel() != 1 or length.device != cache.device:
        _refuse(
            "length", f"must be int32 [1] on {cache.device}, not {length.dtype} {list(length.shape)} on {length.device}"
        )
    if not length.is_cuda and not 0 <= int(length) <= cache.shape[3] - new:
        _refuse("cache", f"holds {cache.shape[3]} positions: {new} more do not fit at length {int(length)}")


def _run(operation: _library.Operation, twin: Callable[..., None], like: Tensor, arguments: tuple[Any, ...]) -> None:
    path = _library.backend(like.device, operation)
    small = like.dtype in (torch.float32, torch.bfloat16) or (like.is_cuda and like.dtype == torch.float16)
    if path == "torch" or not small:
        twin(*arguments)
    else:
        _library.kernel(operation, path, like.device)(*arguments)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: Tensor
) -> None:
    """Close a residual branch and open the next: x += gate * branch; out = layer_norm(x) * (1 + scale) + shift.

    Args:
        x: float32 [R, n, D], contiguous, updated in place: the residual stream is kept in float32.
        branch: what the last branch gave, [R, n, D] contiguous of out's dtype; None for none, then gate is None too.
        gate, scale, shift: float32 [R, D], of any row stride.
        eps: added to the variance.
        out: [R, n, D] contiguous, the model's dtype. Where that is float64, everything is.

    Raises:
        UserError: naming the argument whose shape, dtype, stride or device does not fit.
    """
    _check_dtype("out", out)
    if out.ndim != 3:
        _refuse("out", f"must be [R, n, D], not {list(out.shape)}")
    shape, wide = tuple(out.shape), _wide(out.dtype)
    _check("x", x, shape, wide, out)
    if (branch is None) != (gate is None):
        _refuse("gate", "goes with branch: give both or neither")
    if branch is not None:
        _check("branch", branch, shape, out.dtype, out)
        _check_dense("branch", branch)
    for name, tensor in (("gate", gate), ("scale", scale), ("shift", shift)):
        if tensor is not None:
            _check(name, tensor, (shape[0], shape[2]), wide, out)
    _check_dense("x", x)
    _check_dense("out", out)
    _run("add_layer_norm", layers.add_layer_norm, out, (x, branch, gate, scale, shift, eps, out))


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    """Close a residual branch and open the next: x += branch; out = x / sqrt(mean(x^2) + eps) * weight.

    Shapes as for :func:`add_layer_norm`; ``weight`` float32 [D].

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("out", out)
    if out.ndim != 3:
        _refuse("out", f"must be [R, n, D], not {list(out.shape)}")
    shape, wide = tuple(out.shape), _wide(out.dtype)
    _check("x", x, shape, wide, out)
    if branch is not None:
        _check("branch", branch, shape, out.dtype, out)
        _check_dense("branch", branch)
    _check("weight", weight, shape[2:], wide, out)
    _check_dense("x", x)
    _check_dense("out", out)
    _run("add_rms_norm", layers.add_rms_norm, out, (x, branch, weight, eps, out))


def _check_cache(cache: Tensor, rows: int, heads: int | None, width: int, like: Tensor) -> None:
    if cache.ndim != 5 or cache.shape[0] != 2:
        _refuse("cache", f"must be [2, R, Hk, L, d], not {list(cache.shape)}")
    if cache.shape[1] != rows:
        _refuse("cache", f"is of a batch of {cache.shape[1]} rows, but {rows} are given")
    _check("cache", cache, (2, rows, heads or cache.shape[2], cache.shape[3], width), like.dtype, like)
    if cache.is_cuda and cache.stride(3) != width:
        _refuse("cache", f"must have its positions one after another (stride {width}), not {cache.stride(3)} apart")


def append_normed(qkv: Tensor, scale: Tensor | None, cache: Tensor, length: Tensor) -> None:
    """Write a call's keys and values to the cache; with ``scale``, l2-normalise queries and keys (VAR's attn_l2_norm).

    Args:
        qkv: [R, n, 3, H, d] contiguous. Queries are changed in place: q = q / |q| * scale.
        scale: float32 [H], or None for no normalisation.
        cache: [2, R, H, L, d], one layer's keys and values; written from position ``length`` on.
        length: int32 [1] on the cache's device: the positions it holds already. Not changed.

    Raises:
        UserError: naming the argument that does not fit: a cache that is full, of another batch, dtype or stride.
    """
    _check_dtype("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        _refuse("qkv", f"must be [R, n, 3, H, d], not {list(qkv.shape)}")
    _check_dense("qkv", qkv)
    rows, new, _, heads, width = qkv.shape
    if scale is not None:
        _check("scale", scale, (heads,), _wide(qkv.dtype), qkv)
    _check_cache(cache, rows, heads, width, qkv)
    _check_length(length, new, cache)
    _run("append_normed", layers.append_normed, qkv, (qkv, scale, cache, length))


def append_rotated(qkv: Tensor, heads: int, rope: Tensor, cache: Tensor, length: Tensor) -> None:
    """Turn queries and keys by their position (RoPE) and write keys and values to the cache.

    Args:
        qkv: [R, n, H + 2 Hk, d] contiguous: queries, turned in place, keys, values.
        heads: H.
        rope: float32 [T, d/2, 2], T >= L: cos and sin by which position t turns the pair (2j, 2j + 1).
        cache, length: as for :func:`append_normed`, with Hk heads.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("qkv", qkv)
    if qkv.ndim != 4 or cache.ndim != 5 or qkv.shape[2] != heads + 2 * cache.shape[2]:
        _refuse("qkv", f"must be [R, n, {heads} + 2 Hk, d] beside cache [2, R, Hk, L, d], not {list(qkv.shape)}")
    _check_dense("qkv", qkv)
    rows, new, _, width = qkv.shape
    if width % 2:
        _refuse("qkv", f"has heads of width {width}, but RoPE turns pairs: use an even one")
    _check_cache(cache, rows, None, width, qkv)
    if rope.ndim != 3 or rope.shape[0] < cache.shape[3]:
        _refuse(
            "rope", f"must be [T, d/2, 2] with T >= {cache.shape[3]}, the cache's positions, not {list(rope.shape)}"
        )
    _check("rope", rope, (rope.shape[0], width // 2, 2), _wide(qkv.dtype), qkv)
    _check_dense("rope", rope)
    _check_length(length, new, cache)
    _run("append_rotated", layers.append_rotated, qkv, (qkv, heads, rope, cache, length))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """out = softmax(scale q k^T) v over all keys, scores and softmax in float32. Query head h reads key head h Hk / H.

    On a GPU this is torch's scaled_dot_product_attention.

    Args:
        q: [R, n, H, d], any strides but 1 in the last dimension, such as a part of qkv.
        k, v: [R, Hk, S, d] likewise, such as the filled part of a cache.
        scale: what scores are multiplied by.
        out: [R, n, H, d] contiguous.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("q", q)
    if q.ndim != 4 or k.ndim != 4:
        _refuse("q", f"must be [R, n, H, d] beside k [R, Hk, S, d], not {list(q.shape)} beside {list(k.shape)}")
    rows, n, heads, width = q.shape
    if k.shape[1] == 0 or heads % k.shape[1] or k.shape[2] == 0:
        _refuse("k", f"must be [R, Hk, S, d] with S > 0 and Hk a divisor of the {heads} heads, not {list(k.shape)}")
    _check("q", q, (rows, n, heads, width), q.dtype, q)
    _check("k", k, (rows, k.shape[1], k.shape[2], width), q.dtype, q)
    _check("v", v, tuple(k.shape), q.dtype, q)
    _check("out", out, (rows, n, heads, width), q.dtype, q)
    _check_dense("out", out)
    _run("attention", layers.attention, q, (q, k, v, scale, out))


def decode_attention(q: Tensor, cache: Tensor, length: Tensor, scale: float, out: Tensor) -> None:
    """:func:`attention` of one query a row to positions 0..length of a cache, the last of them just written.

    The length is read where it lies, so that one captured CUDA graph serves every step.

    Args:
        q: [R, H, d], any strides but 1 in the last dimension.
        cache: [2, R, Hk, L, d], one layer.
        length: int32 [1] on the cache's device: positions held before this call's one.
        scale: what scores are multiplied by.
        out: [R, H, d] contiguous.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("q", q)
    if q.ndim != 3 or cache.ndim != 5:
        _refuse("q", f"must be [R, H, d] beside cache [2, R, Hk, L, d], not {list(q.shape)} beside {list(cache.shape)}")
    rows, heads, width = q.shape
    _check("q", q, (rows, heads, width), q.dtype, q)
    _check_cache(cache, rows, None, width, q)
    if cache.shape[2] == 0 or heads % cache.shape[2]:
        _refuse("cache", f"has {cache.shape[2]} heads, which do not divide the {heads} of q")
    _check("out", out, (rows, heads, width), q.dtype, q)
    _check_dense("out", out)
    _check_length(length, 1, cache)
    _run("decode_attention", layers.decode_attention, q, (q, cache, length, scale, out))


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out [..., F] = silu(gate) * up, of gate and up side by side in gate_up [..., 2F]; contiguous, of one dtype.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("gate_up", gate_up)
    _check("out", out, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up.dtype, gate_up)
    if gate_up.shape[-1] % 2:
        _refuse("gate_up", f"must have an even last dimension, not {list(gate_up.shape)}")
    _check_dense("gate_up", gate_up)
    _check_dense("out", out)
    _run("swiglu", layers.swiglu, gate_up, (gate_up, out))


def quantizer_step(
    tokens: Tensor,
    codebook: Tensor,
    up: Tensor | None,
    taps: Tensor,
    bias: Tensor,
    ratio: float,
    f_hat: Tensor,
    down: Tensor | None,
    out: Tensor | None,
) -> None:
    """Add one scale's codes to VAR's latent map and give the next scale its input.

        h = up codebook[tokens];  f_hat += (1 - ratio) h + ratio (conv(h) + bias);  out = down f_hat

    Bicubic and area resampling between fixed sizes are constant matrices (``MultiScaleQuantizer.matrices``).

    Args:
        tokens: int64 [B, n], contiguous, in [0, V) (not checked).
        codebook: float32 [V, C], contiguous; all that follow are float32 (or float64) and contiguous too.
        up: [S, n]; None for the identity, then n = S.
        taps: [k*k, C in, C out], k odd: a k x k convolution over the map, zeros outside of it.
        bias: [C].
        ratio: how much of the convolution is mixed in.
        f_hat: [B, S, C], the square latent map in raster order, updated in place.
        down: [m, S]; None for no output.
        out: [B, m, C]; None with down.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("codebook", codebook)
    if tokens.dtype != torch.int64 or tokens.ndim != 2:
        _refuse("tokens", f"must be int64 [B, n], not {tokens.dtype} {list(tokens.shape)}")
    if f_hat.ndim != 3 or round(f_hat.shape[1] ** 0.5) ** 2 != f_hat.shape[1]:
        _refuse("f_hat", f"must be [B, S, C] with S a square, not {list(f_hat.shape)}")
    batch, n = tokens.shape
    size, channels, dtype = f_hat.shape[1], codebook.shape[-1], _wide(codebook.dtype)
    kernel = round(taps.shape[0] ** 0.5)
    if kernel % 2 == 0:
        _refuse("taps", f"must be [k*k, C, C] with k odd, not {list(taps.shape)}")
    if (down is None) != (out is None):
        _refuse("out", "goes with down: give both or neither")
    if up is None and n != size:
        _refuse("up", f"may be None only where tokens fill the map: {n} tokens, {size} positions")
    named: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "codebook": (codebook, (codebook.shape[0], channels)),
        "up": (up, (size, n)),
        "taps": (taps, (kernel * kernel, channels, channels)),
        "bias": (bias, (channels,)),
        "f_hat": (f_hat, (batch, size, channels)),
        "down": (down, (0 if down is None else down.shape[0], size)),
        "out": (out, (batch, 0 if down is None else down.shape[0], channels)),
    }
    for name, (tensor, shape) in named.items():
        if tensor is not None:
            _check(name, tensor, shape, dtype, f_hat)
            _check_dense(name, tensor)
    if tokens.device != f_hat.device:
        _refuse("tokens", f"is on {tokens.device} but the others on {f_hat.device}: move one of them")
    _check_dense("tokens", tokens)
    _run("quantizer_step", layers.quantizer_step, f_hat, (tokens, codebook, up, taps, bias, ratio, f_hat, down, out))


def quantize_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Give each row whole or 8-bit floating numbers and a scale of its own: scale = max |x| / limit, codes ~ x / scale.

    A row of zeros has scale 2^-126. A row with NaN or infinity has that as its scale, whatever its codes. In C++ the
    row is multiplied by 1 / scale, so codes where x / scale is half-way between two may differ from the twin's.

    Args:
        x: [..., K], contiguous.
        codes: [..., K], contiguous. uint8: x / scale + 128, limit 127; float8_e4m3fn: x / scale, limit 448; both
            rounded to the nearest, ties to even. The latter are made by torch on a CPU.
        scale: float32 [..., 1], contiguous.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        _refuse("x", f"must be [..., K] with K > 0, not {list(x.shape)}")
    if codes.dtype not in layers.CODE_LIMITS:
        _refuse("codes", f"must be one of {', '.join(map(str, layers.CODE_LIMITS))}, not {codes.dtype}")
    _check("codes", codes, tuple(x.shape), codes.dtype, x)
    _check("scale", scale, (*x.shape[:-1], 1), torch.float32, x)
    for name, tensor in (("x", x), ("codes", codes), ("scale", scale)):
        _check_dense(name, tensor)
    if codes.dtype == torch.uint8 or x.is_cuda:
        _run("quantize_rows", layers.quantize_rows, x, (x, codes, scale))
    else:
        layers.quantize_rows(x, codes, scale)


def scale_rows(product: Tensor, scale: Tensor, bias: Tensor, gelu: bool, out: Tensor) -> None:
    """out = product * scale + bias, or gelu's tanh approximation of that: what follows a product of quantised rows.

    Args:
        product: float32 [M, N], contiguous.
        scale: float32 [M, 1], contiguous, as :func:`quantize_rows` gives it.
        bias: float32 [N], contiguous.
        gelu: whether to apply it.
        out: [M, N], contiguous; may be product itself.

    Raises:
        UserError: naming the argument that does not fit.
    """
    _check_dtype("out", out)
    if out.ndim != 2:
        _refuse("out", f"must be [M, N], not {list(out.shape)}")
    wide = _wide(out.dtype)
    _check("product", product, tuple(out.shape), wide, out)
    _check("scale", scale, (out.shape[0], 1), wide, out)
    _check("bias", bias, (out.shape[1],), wide, out)
    for name, tensor in (("product", product), ("scale", scale), ("bias", bias), ("out", out)):
        _check_dense(name, tensor)
    _run("scale_rows", layers.scale_rows, out, (product, scale, bias, gelu, out))
