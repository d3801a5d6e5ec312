"""The kinds of models, their state dicts read strictly, and ddfast's own safetensors bundles.

A bundle is one safetensors file with one or more *parts* (``transformer``, ``student``, ``tokenizer``); its tensors are
named ``part.key``. The metadata entry ``ddfast`` is a JSON object: ``format``, ``name``, for each part its ``kind``,
``config`` and ``sha256`` (:func:`ddfast.tensors.content_hash`), ``extra`` where the file says more than its parts, and
since format 2 a ``checksum`` of all of that.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, reason
from ..files import replacing
from ..records import check_name, check_signature, restore, signed
from ..tensors import check_finite, content_hash, is_plain, read_checkpoint, read_note, read_safetensors, write_tensors
from .digits import DigitsTokenizer, DigitsTokenizerConfig
from .llamagen import LlamaGenConfig, LlamaGenTransformer
from .llamagen_student import LlamaGenStudent, LlamaGenStudentConfig
from .llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from .var import VARConfig, VARTransformer
from .var_student import VARStudent, VARStudentConfig
from .var_vqvae import VARTokenizer, VARTokenizerConfig

FORMAT = 2
UNSIGNED = 1  # the format before the note had a checksum
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
REPEATED = ("depth", "n_layer", "num_res_blocks", "share_phi")  # config fields that count modules
MOST_INT, MOST_FLOAT, LONGEST, SCALE = 1 << 17, 1e6, 64, 256  # of a config's values, and of a token grid's side
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Part:
    """Weights of one module with what is needed to build it.

    Attributes:
        kind: a key of ``KINDS``.
        config: the kind's config dataclass.
        tensors: state dict in the file's dtypes, optional entries left out.
        sha256: :func:`ddfast.tensors.content_hash` of ``tensors``.
        source: where it comes from, for messages.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    sha256: str
    source: str = "this model"

    def build(self, dtype: torch.dtype, device: torch.device | str, copy: bool = False) -> nn.Module:
        """The module in eval mode, its floating-point weights cast to ``dtype``.

        ``copy``: into memory of its own, so that a file that was mapped is let go, even where nothing is cast.

        Raises UserError for weights that are not finite, or are not in ``dtype``.
        """
        check_finite(self.tensors, self.source)
        with torch.device("meta"):
            module = KINDS[self.kind][1](self.config)
        cast = {
            k: t.to(device=device, dtype=dtype if t.is_floating_point() else None, copy=copy)
            for k, t in self.tensors.items()
        }
        if dtype == torch.float16:  # whose range is narrower than the others'
            check_finite(cast, f"{self.source}, in float16,")
        module.load_state_dict(cast, assign=True)
        for name, buffer in list(module.named_buffers()):  # constants that no file holds, built on the CPU
            if name not in cast:
                owner = module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], buffer.to(device))
        return module.requires_grad_(False).eval()


@functools.cache
def expected(kind: str, config: Any) -> dict[str, Tensor]:
    """Required state-dict entries of a kind, on the meta device: they cost no memory."""
    with torch.device("meta"):
        return dict(KINDS[kind][1](config).state_dict())


@functools.cache
def expected_shapes(kind: str, config: Any) -> dict[str, Shape]:
    """The same, name to shape."""
    return {key: tuple(t.shape) for key, t in expected(kind, config).items()}


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


def make_part(kind: str, config: Any, tensors: Mapping[str, Tensor], source: str) -> Part:
    """Check a state dict strictly and drop its optional entries; UserError lists every difference.

    ``source`` is what it comes from, for messages. Values are looked at when a model is built of them.
    """
    lines = differences({k: tuple(t.shape) for k, t in tensors.items()}, kind, config)
    wanted = expected(kind, config)
    lines += shortened(
        [
            f"{key} is {str(t.dtype).removeprefix('torch.')}, no floating-point number"
            for key, t in tensors.items()
            if key in wanted and wanted[key].is_floating_point() and t.dtype not in FLOATS
        ]
    )
    if lines:
        raise UserError(f"{source} is not a {kind} of this configuration:\n  " + "\n  ".join(lines))
    kept = {k: t for k, t in tensors.items() if k in wanted}
    return Part(kind, config, kept, content_hash(kept), source)


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
    if path.suffix == ".safetensors":
        return {"raw": read_safetensors(path)[1]}
    loaded, copies = read_checkpoint(path), {}
    for copy, places in PLACES.items():
        found = next((inside for place in places if (inside := _inside(loaded, place)) is not None), None)
        if found and all(isinstance(key, str) and isinstance(v, Tensor) for key, v in found.items()):
            other = next((key for key, v in found.items() if not is_plain(v)), None)
            if other is not None:
                raise UserError(
                    f"{path} is no state dict that can be read: {other} is a sparse, quantised or empty (meta) tensor; "
                    "save dense weights"
                )
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


def config_to_json(config: Any) -> dict[str, Any]:
    return asdict(config)


def config_from_json(kind: str, values: Any, where: str, tensors: int | None = None) -> Any:
    """The config dataclass of ``kind`` from what a file says.

    ``tensors``: how many the file has for it, so that nothing is built for hours of a number that is none.

    Raises UserError, naming ``where``, for unknown kinds and fields, values of another type or out of all range, and
    configs of which no model can be built.
    """
    if kind not in KINDS:
        raise UserError(f"{where} is of the unknown kind {kind!r}; was it written by a newer ddfast?")
    config = restore(KINDS[kind][0], values, f"{where}: config")
    for name, value in asdict(config).items():
        most = tensors if name in REPEATED and tensors is not None else MOST_INT
        numbers = value if isinstance(value, tuple) else (value,)
        fine = all(0 <= n <= (most if isinstance(n, int) else MOST_FLOAT) for n in numbers if n is not None)
        if not fine or len(numbers) > LONGEST or name == "patch_nums" and max(numbers, default=0) > SCALE:
            raise UserError(f"{where}: config.{name} is {value}, which no {kind} has; copy the file again")
    try:
        expected(kind, config)
    except Exception as error:  # whatever torch makes of sizes that do not go together
        raise UserError(f"{where}: no {kind} can be built of its config ({reason(error)}); copy it again") from error
    return config


def save_bundle(
    path: str | os.PathLike[str], name: str, parts: Mapping[str, Part], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a bundle atomically: it appears complete under ``path`` or not at all.

    ``name`` is one printable line. ``extra`` is what else the file says, as JSON: see :func:`read_extra`.
    """
    described = {
        label: {"kind": p.kind, "config": config_to_json(p.config), "sha256": p.sha256} for label, p in parts.items()
    }
    header: dict[str, Any] = {"format": FORMAT, "name": check_name(name, path), "parts": described}
    if extra is not None:
        header["extra"] = dict(extra)
    tensors = {f"{label}.{key}": t for label, p in parts.items() for key, t in p.tensors.items()}
    with replacing(Path(path)) as file:
        write_tensors(file, tensors, json.dumps(signed(header), sort_keys=True))


def read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object that makes a safetensors file a bundle; UserError where it is missing, changed or of another
    format."""
    fix = f"bundle; make one with `ddfast convert {path} --out NEW.safetensors`"
    header = read_note(path, metadata, f"ddfast {fix}")
    if header.get("format") not in (UNSIGNED, FORMAT):
        raise UserError(f"{path} has bundle format {header.get('format')}; this version of ddfast reads {FORMAT}")
    if header["format"] != UNSIGNED or "checksum" in header:
        check_signature(header, f"the header of {path}", "convert or copy it again")
    check_name(header.get("name"), f"the header of {path}")
    return header


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a bundle says besides its parts: the ``extra`` of :func:`save_bundle`, empty if there was none."""
    extra = read_header(Path(path), read_safetensors(Path(path))[0]).get("extra", {})
    return restore(dict[str, Any], extra, f"the header of {path}: extra")


@dataclass(frozen=True)
class Described:
    """What a bundle's header says of a part."""

    kind: str
    config: Any
    sha256: str


def load_bundle(path: str | os.PathLike[str]) -> tuple[str, dict[str, Part]]:
    """Read a bundle: (name, parts). UserError when it is damaged, altered or not a bundle."""
    path = Path(path)
    metadata, tensors = read_safetensors(path)
    header = read_header(path, metadata)
    described = restore(dict[str, Described], header.get("parts"), f"the header of {path}: parts")
    parts = {}
    for label, part in described.items():
        own = {k.removeprefix(f"{label}."): tensors.pop(k) for k in list(tensors) if k.startswith(f"{label}.")}
        source = f"part {label} of {path}"
        config = config_from_json(part.kind, part.config, source, len(own))
        parts[label] = make_part(part.kind, config, own, source)
        if parts[label].sha256 != part.sha256:
            raise UserError(f"{path} is damaged: the weights of its {label} do not match their checksum; copy it again")
    if tensors:
        raise UserError(f"{path} holds tensors of no part: {', '.join(shortened(sorted(tensors)))}")
    return str(header["name"]), parts
