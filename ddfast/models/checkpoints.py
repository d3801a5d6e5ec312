"""Reading released checkpoints strictly, and ddfast's own safetensors bundles.

A bundle is one safetensors file with one or more *parts* (``transformer``, ``student``, ``tokenizer``); its tensors are
named ``part.key``. The metadata entry ``ddfast`` is a JSON object: ``format``, ``name``, for each part its ``kind``,
``config`` and ``sha256`` (see :func:`content_hash`), so that a damaged file is noticed on loading, and ``extra`` where
the file says more than its parts.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import UserError
from ..files import writing
from ..tensors import write_tensors
from .digits import DigitsTokenizer, DigitsTokenizerConfig
from .llamagen import LlamaGenConfig, LlamaGenTransformer
from .llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from .llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from .var import VARConfig, VARTransformer
from .var_student import VARStudent, VARStudentConfig
from .var_vqvae import VARTokenizer, VARTokenizerConfig

FORMAT = 1
PLACES: dict[str, tuple[tuple[str, ...], ...]] = {  # where official scripts look for each copy, in their order
    "raw": (("model",), ("module",), ("state_dict",), ("trainer", "var_wo_ddp"), ()),  # () is the file itself
    "ema": (("trainer", "ema_parameters"), ("ema",)),
}
KINDS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "var-transformer": (VARConfig, VARTransformer),
    "var-tokenizer": (VARTokenizerConfig, VARTokenizer),
    "llamagen-transformer": (LlamaGenConfig, LlamaGenTransformer),
    "llamagen-tokenizer": (LlamaGenTokenizerConfig, LlamaGenTokenizer),
    "var-student": (VARStudentConfig, VARStudent),
    "llamagen-student": (LlamaGenStudentConfig, LlamaGenStudent),
    "digits-tokenizer": (DigitsTokenizerConfig, DigitsTokenizer),
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Weights of one module with what is needed to build it.

    Attributes:
        kind: a key of ``KINDS``.
        config: the kind's config dataclass.
        tensors: state dict in the file's dtypes, optional entries left out.
        sha256: :func:`content_hash` of ``tensors``.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    sha256: str

    def build(self, dtype: torch.dtype, device: torch.device | str, copy: bool = False) -> nn.Module:
        """The module in eval mode, its floating-point weights cast to ``dtype``.

        ``copy``: into memory of its own, so that a file that was mapped is let go, even where nothing is cast.
        """
        with torch.device("meta"):
            module = KINDS[self.kind][1](self.config)
        cast = {
            k: t.to(device=device, dtype=dtype if t.is_floating_point() else None, copy=copy)
            for k, t in self.tensors.items()
        }
        module.load_state_dict(cast, assign=True)
        for name, buffer in list(module.named_buffers()):  # constants that no file holds, built on the CPU
            if name not in cast:
                owner = module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], buffer.to(device))
        return module.requires_grad_(False).eval()


@functools.cache
def expected_shapes(kind: str, config: Any) -> dict[str, Shape]:
    """Required state-dict entries of a kind, name to shape; costs no memory."""
    with torch.device("meta"):
        module = KINDS[kind][1](config)
    return {key: tuple(t.shape) for key, t in module.state_dict().items()}


def optional_shapes(kind: str, config: Any) -> dict[str, Shape]:
    """Entries that a released file may hold and that are rebuilt rather than read, name to shape."""
    method = getattr(KINDS[kind][1], "optional_keys", None)
    return {} if method is None else dict(method(config))


def differences(got: Mapping[str, Shape], kind: str, config: Any) -> list[str]:
    """What keeps a state dict of these shapes from being ``kind`` with ``config``: one line a key, empty if it fits.

    Long lists are cut, each sort of difference on its own.
    """
    want, optional = expected_shapes(kind, config), optional_shapes(kind, config)
    both = want | optional
    missing = [f"missing {key} {list(want[key])}" for key in want if key not in got]
    unexpected = [f"unexpected {key} {list(got[key])}" for key in got if key not in both]
    misshapen = [
        f"{key} has shape {list(got[key])} instead of {list(both[key])}"
        for key in got
        if key in both and got[key] != both[key]
    ]
    return [line for lines in (missing, unexpected, misshapen) for line in shortened(lines)]


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, shape, bytes) of every tensor in order of name: the same for any container."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}|{t.dtype}|{list(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_part(kind: str, config: Any, tensors: Mapping[str, Tensor], source: str) -> Part:
    """Check a state dict strictly and drop its optional entries; UserError lists every difference."""
    lines = differences({k: tuple(t.shape) for k, t in tensors.items()}, kind, config)
    if lines:
        raise UserError(f"{source} is not a {kind} of this configuration:\n  " + "\n  ".join(lines))
    kept = {k: t for k, t in tensors.items() if k in expected_shapes(kind, config)}
    return Part(kind, config, kept, content_hash(kept))


def shortened(lines: list[str], limit: int = 8) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"… and {len(lines) - limit} more"]


def read_tensors(path: Path, copy: str = "raw") -> dict[str, Tensor]:
    """One of :func:`read_copies`; UserError where the file does not hold it."""
    copies = read_copies(path)
    require_copy(copies, copy, path)
    return copies[copy]


def read_copies(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a released .pth/.pt/.safetensors file, memory-mapped, by copy: "raw" is what was trained,
    "ema" its moving average, which students' files hold.

    Raises UserError when the file is missing, damaged, or holds no state dict.
    """
    require_file(path)
    if path.suffix == ".safetensors":
        return {"raw": read_safetensors(path)[1]}
    try:
        loaded = load_pickle(path)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint; is it complete? ({reason})") from error
    copies = {}
    for copy, places in PLACES.items():
        found = next((inside for place in places if (inside := _inside(loaded, place)) is not None), None)
        if found and all(isinstance(v, Tensor) for v in found.values()):
            copies[copy] = found
    if not copies:
        named = ", ".join(".".join(place) for places in PLACES.values() for place in places if place)
        raise UserError(f"{path} holds no state dict, neither itself nor under {named}")
    return copies


def _inside(loaded: Any, place: tuple[str, ...]) -> dict[str, Any] | None:
    """The dictionary under these keys, or None."""
    for key in place:
        loaded = loaded.get(key) if isinstance(loaded, dict) else None
    return loaded if isinstance(loaded, dict) else None


def require_copy(held: Iterable[str], copy: str, path: Path) -> None:
    """Raise UserError unless ``copy`` is one that ``path`` holds."""
    if copy not in PLACES:
        raise UserError(f"copy is {copy!r}; use one of {', '.join(PLACES)}")
    if copy not in held:
        have = " and ".join(held)
        raise UserError(
            f"{path} holds no {copy} copy of the weights, only {have}; a student is read with --copy {have}"
        )


def load_pickle(path: Path) -> Any:
    """``torch.load`` without running code from the file; every record's checksum is compared first."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise RuntimeError(f"checksum of {damaged} differs")
    with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments ride along in some files
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a safetensors file; UserError when it is damaged."""
    require_file(path)
    try:
        with safe_open(path, "pt") as f:
            return f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors; is it complete? ({error})") from error


def require_file(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_file():
        raise UserError(f"{path} is not a file")


def config_to_json(config: Any) -> dict[str, Any]:
    return asdict(config)


def config_from_json(kind: str, values: Mapping[str, Any]) -> Any:
    """The config dataclass of ``kind``; lists become tuples, unknown fields are an error."""
    cls = KINDS[kind][0]
    unknown = set(values) - {f.name for f in fields(cls)}
    if unknown:
        raise UserError(f"config of {kind} has unknown fields {sorted(unknown)}; was it written by a newer ddfast?")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def save_bundle(
    path: str | os.PathLike[str], name: str, parts: Mapping[str, Part], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a bundle atomically: it appears complete under ``path`` or not at all.

    ``extra`` is what else the file says, as JSON: see :func:`read_extra`.
    """
    described = {
        label: {"kind": p.kind, "config": config_to_json(p.config), "sha256": p.sha256} for label, p in parts.items()
    }
    header: dict[str, Any] = {"format": FORMAT, "name": name, "parts": described}
    if extra is not None:
        header["extra"] = dict(extra)
    tensors = {f"{label}.{key}": t for label, p in parts.items() for key, t in p.tensors.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, os.replace) as file:
        write_tensors(file, tensors, json.dumps(header, sort_keys=True))


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a bundle says besides its parts: the ``extra`` of :func:`save_bundle`, empty if there was none."""
    extra = _header(Path(path), read_safetensors(Path(path))[0]).get("extra", {})
    if not isinstance(extra, dict):
        raise UserError(f"{path} has a damaged header (extra is {extra!r}); convert or copy it again")
    return extra


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object that makes a safetensors file a bundle; UserError where it is missing, damaged or of another
    format."""
    if "ddfast" not in metadata:
        raise UserError(f"{path} is no ddfast bundle; make one with `ddfast convert {path} --out NEW.safetensors`")
    try:
        header = json.loads(metadata["ddfast"])
        if header["format"] != FORMAT:
            raise UserError(f"{path} has bundle format {header['format']}; this version of ddfast reads {FORMAT}")
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} has a damaged header ({error!r}); convert or copy it again") from error
    return dict(header)


def load_bundle(path: str | os.PathLike[str]) -> tuple[str, dict[str, Part]]:
    """Read a bundle: (name, parts). UserError when it is damaged, altered or not a bundle."""
    path = Path(path)
    metadata, tensors = read_safetensors(path)
    header = _header(path, metadata)
    try:
        name = str(header["name"])
        described = {
            label: (p["kind"], config_from_json(p["kind"], p["config"]), p["sha256"])
            for label, p in header["parts"].items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} has a damaged header ({error!r}); convert or copy it again") from error
    parts = {}
    for label, (kind, config, sha256) in described.items():
        own = {k.removeprefix(f"{label}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{label}.")}
        parts[label] = make_part(kind, config, own, f"part {label} of {path}")
        if parts[label].sha256 != sha256:
            raise UserError(f"{path} is damaged: the weights of its {label} do not match their checksum; copy it again")
    if tensors:
        raise UserError(f"{path} holds tensors of no part: {', '.join(shortened(sorted(tensors)))}")
    return name, parts
