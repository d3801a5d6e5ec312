"""Writing safetensors files a tensor at a time, with no copy of all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], note: str) -> None:
    """Write ``tensors``, on any device, in the safetensors format: widest types first, so that each is aligned.

    ``note`` becomes the metadata entry ``ddfast``, the only one, so that the bytes are a function of the input.
    """
    header: dict[str, object] = {"__metadata__": {"ddfast": note}}
    names, stop = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)), 0
    for name in names:
        t = tensors[name]
        start, stop = stop, stop + t.numel() * t.element_size()
        header[name] = {"dtype": _TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        t = tensors[name].detach().cpu().contiguous()
        file.write(t.reshape(-1).view(torch.uint8).numpy().data)
