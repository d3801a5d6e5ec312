"""What a folder of pairs holds: one frozen record that decides every token in it, stored as ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import create_once
from ..flow import Solver
from ..models import Sampling, Teacher
from ..records import differences

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """Everything that decides the pairs of a folder, apart from rounding.

    Attributes:
        teacher: its name; ``weights`` are the content hashes of its parts.
        groups, vocab_size, channels, num_classes: the teacher's shape; L tokens an image is the sum of ``groups``.
        num: pairs in the folder.
        shard_size: pairs in a shard (fewer in the last).
        seed: of the noise (:mod:`ddfast.noise`).
        labels: pair i has class ``labels[i % len(labels)]``; None stands for all classes in turn.
        sampling: guidance, temperature, top-k and top-p, see :class:`ddfast.models.Sampling`.
        filter_rule: which family's definition of top-k and top-p.
        solver: ``Solver.to_dict()``.
        store_noise: whether shards hold their noise too.
        format: version of this layout.
    """

    teacher: str
    weights: dict[str, str]
    groups: tuple[int, ...]
    vocab_size: int
    channels: int
    num_classes: int
    num: int
    shard_size: int
    seed: int
    labels: tuple[int, ...] | None
    sampling: dict[str, Any]
    filter_rule: str
    solver: dict[str, Any]
    store_noise: bool = False
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("num", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must lie in [0, 2^64)")
        if self.vocab_size > 2**16:
            raise UserError(f"a codebook of {self.vocab_size} entries does not fit in 16-bit tokens")
        if self.labels is not None:
            if not self.labels:
                raise UserError("labels is empty; name at least one class, or leave it out for all")
            for label in self.labels:
                if not 0 <= label < self.num_classes:
                    raise UserError(f"label {label} is not a class of {self.teacher}; use 0 to {self.num_classes - 1}")

    @property
    def num_tokens(self) -> int:
        """L"""
        return sum(self.groups)

    @property
    def num_shards(self) -> int:
        return -(-self.num // self.shard_size)

    def shard_range(self, shard: int) -> range:
        """Indices of the pairs in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num))

    def pair_labels(self, pairs: Tensor) -> Tensor:
        """Class of each pair: int64, shaped like ``pairs``."""
        if self.labels is None:
            return pairs % self.num_classes
        return torch.tensor(self.labels, device=pairs.device)[pairs % len(self.labels)]

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's tensors."""
        noise = 4 * self.channels * self.num_tokens if self.store_noise else 0
        return len(self.shard_range(shard)) * (4 + 2 * self.num_tokens + noise)

    def to_json(self) -> str:
        """Readable JSON that carries its own checksum."""
        return json.dumps(asdict(self) | {"checksum": self.checksum}, indent=1, sort_keys=True) + "\n"

    @property
    def checksum(self) -> str:
        """SHA-256 of the canonical JSON of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def describe(
    teacher: Teacher,
    sampling: Sampling,
    solver: Solver,
    *,
    num: int,
    seed: int = 0,
    shard_size: int = 1024,
    labels: tuple[int, ...] | None = None,
    store_noise: bool = False,
) -> Manifest:
    """The manifest of pairs to be made by ``teacher``; UserError for values that cannot work."""
    teacher.check_sampling(sampling)
    return Manifest(
        teacher=teacher.name,
        weights=dict(teacher.weights_sha256),
        groups=tuple(teacher.groups),
        vocab_size=teacher.codebook.shape[0],
        channels=teacher.codebook.shape[1],
        num_classes=teacher.num_classes,
        num=num,
        shard_size=shard_size,
        seed=seed,
        labels=labels,
        sampling=asdict(sampling),
        filter_rule=teacher.filter_rule,
        solver=solver.to_dict(),
        store_noise=store_noise,
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; UserError when it is missing, damaged or of another format version."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no pairs: there is no {FILE}; make them with `ddfast pairs --out {folder}`")
    try:
        values = json.loads(path.read_bytes())
        checksum = values.pop("checksum")
        if values["format"] != FORMAT:
            raise UserError(f"{path} has format {values['format']}; this version of ddfast reads {FORMAT}")
        if set(values) != {f.name for f in fields(Manifest)}:
            raise KeyError("fields")
        fixed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        manifest = Manifest(**fixed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged ({error}); restore it, or make the pairs anew in another folder") from error
    if manifest.checksum != checksum:
        raise UserError(f"{path} was changed: its checksum does not match; restore it, or make the pairs anew")
    return manifest


def claim(folder: Path, manifest: Manifest) -> None:
    """Make ``folder`` the home of ``manifest``, or check that it already is; safe between processes.

    Raises UserError naming every field that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if create_once(folder / FILE, manifest.to_json().encode()):
        return
    require_same(folder, read_manifest(folder), manifest)


def require_same(folder: Path, there: Manifest, wanted: Manifest) -> None:
    """UserError naming every field in which a folder's manifest differs from the wanted one."""
    lines = differences(asdict(there), asdict(wanted))
    if lines:
        raise UserError(
            f"{folder} holds other pairs: " + "; ".join(lines) + ". Choose another --out, or the same settings"
        )
