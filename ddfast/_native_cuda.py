"""The CUDA kernels of ``ddfast.layer_ops`` in the extension ``ddfast._C``: typed wrappers that pass addresses.

Work joins the current stream of the tensors' device. Tensors on the CPU go to the kernels' bodies, run by one thread of
the host, for tests. ``ddfast.layer_ops`` checks at its door; here, only what these kernels in particular cannot do.
"""

from __future__ import annotations

import contextlib
from functools import cache

import torch
from torch import Tensor

from .errors import UserError

with contextlib.suppress(ModuleNotFoundError):  # ddfast._native says what its absence means
    import ddfast._C as _C

_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_WIDTH, _PART_HEAD = 256, 2  # of csrc/core/layers_attention.h
_PACK_BYTES = 16  # the most that a kernel reads at once


def _run(name: str, like: Tensor, *arguments: float) -> None:
    """Call ``_C.NAME_cuda`` on the current stream, or for the CPU ``_C.NAME_host``."""
    if not like.is_cuda:
        getattr(_C, name + "_host")(*arguments)
        return
    with torch.cuda.device(like.device):
        getattr(_C, name + "_cuda")(*arguments, torch.cuda.current_stream().cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_pairs(**named: Tensor) -> None:
    """UserError for a tensor whose pairs of numbers, which are read at once, do not lie at even places."""
    for name, tensor in named.items():
        odd = any(stride % 2 for size, stride in zip(tensor.shape[:-1], tensor.stride(), strict=False) if size > 1)
        if odd or tensor.data_ptr() % (2 * tensor.element_size()):
            raise UserError(f"{name} begins, or has strides, at odd numbers of entries: use .clone()")


def add_layer_norm(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, out: Tensor
) -> None:
    _run(
        "add_layer_norm",
        out,
        x.data_ptr(),
        _address(branch),
        _address(gate),
        0 if gate is None else gate.stride(0),
        scale.data_ptr(),
        scale.stride(0),
        shift.data_ptr(),
        shift.stride(0),
        eps,
        *out.shape,
        out.data_ptr(),
        _NUMBERS[out.dtype],
    )


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    no_rows = (0, 0)  # address and stride
    numbers = (x.data_ptr(), _address(branch), *no_rows, weight.data_ptr(), 0, *no_rows, eps)
    _run("add_rms_norm", out, *numbers, *out.shape, out.data_ptr(), _NUMBERS[out.dtype])


def append_normed(qkv: Tensor, scale: Tensor | None, cache: Tensor, length: Tensor) -> None:
    rows, n, _, heads, width = qkv.shape
    _run(
        "append_normed",
        qkv,
        qkv.data_ptr(),
        _address(scale),
        0,
        rows,
        n,
        heads,
        heads,
        width,
        cache.data_ptr(),
        *cache.stride()[:3],
        cache.shape[3],
        length.data_ptr(),
        _NUMBERS[qkv.dtype],
    )


def append_rotated(qkv: Tensor, heads: int, rope: Tensor, cache: Tensor, length: Tensor) -> None:
    rows, n, _, width = qkv.shape
    _check_pairs(qkv=qkv, cache=cache)
    if rope.data_ptr() % _PACK_BYTES:
        rope = rope.clone()
    _run(
        "append_rotated",
        qkv,
        qkv.data_ptr(),
        0,
        rope.data_ptr(),
        rows,
        n,
        heads,
        cache.shape[2],
        width,
        cache.data_ptr(),
        *cache.stride()[:3],
        cache.shape[3],
        length.data_ptr(),
        _NUMBERS[qkv.dtype],
    )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _splits(q: Tensor, cache: Tensor) -> int:
    """Over how many blocks the keys of one head go: as many as fill the device, each with no fewer than 64 of them."""
    if not q.is_cuda:
        return 1
    blocks = max(1, cache.shape[1] * cache.shape[2])
    return max(1, min(2 * _processors(q.device) // blocks, cache.shape[3] // 64))


@cache
def _parts(device: torch.device, stream: int, count: int) -> Tensor:
    """Scratch for what the splits leave to be joined; kept for good, since captured graphs hold its address.

    Each stream has its own, so that streams do not disturb each other. Graphs captured on one stream share it: replay
    one after the other.
    """
    return torch.empty(count, dtype=torch.float32, device=device)


def decode_attention(
    q: Tensor, cache: Tensor, length: Tensor, scale: float, out: Tensor, splits: int | None = None
) -> None:
    rows, heads, width = q.shape
    _, _, kv_heads, positions, _ = cache.shape
    if width % 2 or width > _MOST_WIDTH:
        raise UserError(
            f"q has heads of width {width}: the CUDA kernel takes even ones up to {_MOST_WIDTH}; for others, use "
            'ddfast.ops.forced("torch")'
        )
    _check_pairs(q=q, cache=cache)
    splits = splits or _splits(q, cache)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    count = rows * heads * splits * (width + _PART_HEAD)
    parts = None if splits == 1 else _parts(q.device, stream, 1 << (count - 1).bit_length())
    _run(
        "decode_attention",
        q,
        q.data_ptr(),
        *q.stride()[:2],
        cache.data_ptr(),
        *cache.stride()[:3],
        rows,
        heads,
        kv_heads,
        positions,
        width,
        length.data_ptr(),
        scale,
        splits,
        _address(parts),
        out.data_ptr(),
        _NUMBERS[q.dtype],
    )


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    hidden = out.shape[-1]
    rows = out.numel() // hidden if hidden else 0
    _run("swiglu", out, gate_up.data_ptr(), rows, hidden, out.data_ptr(), _NUMBERS[out.dtype])


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
    batch, n = tokens.shape
    _, size, channels = f_hat.shape
    _run(
        "quantizer_step",
        f_hat,
        tokens.data_ptr(),
        codebook.data_ptr(),
        _address(up),
        taps.data_ptr(),
        round(len(taps) ** 0.5),
        bias.data_ptr(),
        ratio,
        batch,
        n,
        round(size**0.5),
        channels,
        f_hat.data_ptr(),
        _address(down),
        0 if down is None else len(down),
        _address(out),
    )


def quantize_rows(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    _run(
        "quantize_rows",
        x,
        x.data_ptr(),
        scale.numel(),
        x.shape[-1],
        codes.data_ptr(),
        codes.dtype == torch.float8_e4m3fn,
        scale.data_ptr(),
        _NUMBERS[x.dtype],
    )
