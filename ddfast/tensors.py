"""Files of tensors: safetensors written a tensor at a time, and one strict reader of each container.

Reading runs no code from a file. What is damaged, or no weights at all, is a UserError that names the file and what to
do; an OSError (no permission, no file handles left, an I/O error) passes through, since the file may be sound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import UserError, reason
from .files import file_sha256, is_text, of_the_system, require_readable
from .records import parse_json

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
_NAME_WITH_HASH = re.compile(r".*-([0-9a-f]{8,64})\.pth?")
HEAD = 256  # bytes that tell text from weights


class _Beside:
    """Stands for a NumPy number that rides along beside weights, a best FID or an epoch: it is nothing, and nothing of
    NumPy's is called, which crashes of a damaged file."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


BESIDE: list[Any] = [
    argparse.Namespace,  # training arguments
    *((_Beside, f"numpy.{name}") for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")),
]


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


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of every tensor in order of name: the same for any container."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{t.dtype}|{list(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise UserError for weights of which any is NaN or infinite, naming the first: a model of them draws one image
    from every noise."""
    for key, t in tensors.items():
        if t.is_floating_point() and t.numel() and not all(bool(end.isfinite()) for end in t.aminmax()):
            bad = int((~t.isfinite()).sum())
            raise UserError(
                f"{source} holds weights that are not finite: {bad} of the {t.numel()} in {key}. It is damaged, or its "
                "training or a conversion to a narrower type overflowed; bring another copy"
            )


# --- safetensors


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file, memory-mapped where the file system can; UserError when it is
    damaged."""
    require_readable(path)
    if not is_text(path):
        return _unmapped(path)
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}
    except SafetensorError as error:
        raise UserError(
            _not_weights(path) or f"{path} is damaged or cut short ({reason(error)}); copy it again"
        ) from error
    except OSError:  # no mapping there
        return _unmapped(path)


def _unmapped(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The same, read into memory."""
    data = path.read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        size = int.from_bytes(data[:8], "little")
        return parse_json(data[8 : 8 + size], path).get("__metadata__", {}), tensors
    except SafetensorError as error:
        raise UserError(
            _not_weights(path) or f"{path} is damaged or cut short ({reason(error)}); copy it again"
        ) from error


def read_note(path: Path, metadata: Mapping[str, str], what: str) -> dict[str, Any]:
    """The JSON object in the metadata entry ``ddfast``; UserError where there is none, naming ``what`` is missing."""
    if "ddfast" not in metadata:
        raise UserError(f"{path} is no {what}")
    note = parse_json(metadata["ddfast"], f"the header of {path}")
    if not isinstance(note, dict):
        raise UserError(f"the header of {path} is damaged: it is no object; copy the file again")
    return note


# --- PyTorch's own containers


def read_checkpoint(path: Path) -> Any:
    """What a .pth or .pt file holds, memory-mapped where it can be, without running code from it.

    Every record of a zip archive is compared with its checksum first. Older files have none: where the name ends in a
    hash, as torchvision's do, that is compared, and a difference told. Beside tensors and plain Python, NumPy's numbers
    and training arguments (argparse) may ride along.

    Raises UserError where the file is damaged, no checkpoint, or holds other objects.
    """
    require_readable(path)
    try:
        mapped = _check_archive(path) if zipfile.is_zipfile(path) else _check_name(path)
        with torch.serialization.safe_globals(BESIDE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own formats
            if is_text(path):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the unpickler
        if of_the_system(error):
            raise
        raise UserError(_why_unread(path, error)) from error


def _check_archive(path: Path) -> bool:
    """Whether an archive's records can be mapped: those that are compressed cannot. UserError for damage."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path} is damaged: the checksum of {damaged} differs; copy it again")
        return all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())


def _check_name(path: Path) -> bool:
    """Tell of an older file whose hash is not that of its name. Such files are not mapped: False."""
    named = _NAME_WITH_HASH.fullmatch(path.name)
    if named and not file_sha256(path).startswith(named[1]):
        logging.getLogger("ddfast").warning(
            f"{path} is not the published file, or it is damaged: its SHA-256 begins otherwise than its name says"
        )
    return False


def _why_unread(path: Path, error: Exception) -> str:
    """The sentence for a checkpoint that cannot be read. What torch says would have safety switched off."""
    text = str(error)
    refused = re.search(r"(?:GLOBAL|class|type) ([\w.]+)", text)
    if "weights_only" in text and refused:
        return (
            f"{path} holds more than weights: objects of {refused[1].rstrip('.')}, which would run as a program, and "
            "ddfast runs none. Ask its maker for the weights alone: torch.save(model.state_dict(), path)"
        )
    return (
        _not_weights(path)
        or f"{path} cannot be read as a PyTorch checkpoint: it is damaged or cut short; copy it again"
    )


def _not_weights(path: Path) -> str | None:
    """What a file is that was to hold weights and holds text: the page of an error, a pointer to the real file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not size:
        return f"{path} is empty; copy or download it again"
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or size <= HEAD:  # not merely a character cut in half
            return None
        text = head[: error.start].decode()
    if not all(c.isprintable() or c.isspace() for c in text):
        return None
    if text.startswith("version https://git-lfs"):
        return f"{path} is a Git LFS pointer, {size} bytes, in place of the file: run `git lfs pull`, or download it"
    first = text.strip().splitlines()[0][:60] if text.strip() else ""
    page = "a web page" if first.startswith("<") else "text"
    return f"{path} holds {page} in place of weights, {size} bytes that begin with {first!r}; download it again"


def is_plain(t: object) -> bool:
    """Whether something is a dense tensor with values on the CPU: what a state dict is made of."""
    return (
        isinstance(t, Tensor)
        and type(t) in (Tensor, nn.Parameter)
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and not (t.is_quantized or t.is_nested or t.is_conj() or t.is_neg())
    )
