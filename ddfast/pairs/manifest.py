"""What a folder of pairs holds: one frozen record that decides every token in it, stored as ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import create_once
from ..flow import Solver
from ..models import Sampling, Teacher
from ..records import check_name, check_signature, checksum, differences, read_json, restore, signed

FORMAT = 1
FILE = "manifest.json"
MOST = 2**48  # pairs in a folder, and in a shard


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
            value, option = getattr(self, name), name.replace("_", "-")
            if value < 1:
                raise UserError(f"{option} is {value}; it must be at least 1")
            if value > MOST:
                raise UserError(f"{option} is {value}; it must be at most 2^48, about {MOST:.1e}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must lie in [0, 2^64)")
        if min(self.vocab_size, self.channels, self.num_classes, *self.groups) < 1 or not self.groups:
            raise UserError("a teacher has at least one group, code, channel and class")
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
        return json.dumps(signed(asdict(self)), indent=1, sort_keys=True) + "\n"

    @property
    def checksum(self) -> str:
        """SHA-256 of the canonical JSON of all fields."""
        return checksum(asdict(self))


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
    if teacher.filter(sampling).keeps_one:
        raise UserError(
            "top-k is 1: every pair of a class would have the same tokens, whatever its noise; use 0 for all"
        )
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
    path, fix = folder / FILE, "restore it, or make the pairs anew in another folder"
    if not path.exists():
        raise UserError(f"{folder} holds no pairs: there is no {FILE}; make them with `ddfast pairs --out {folder}`")
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from None
    if not isinstance(values, dict) or "groups" not in values:
        raise UserError(f"{path} is no manifest of pairs: it is damaged, or belongs to something else; {fix}")
    if values.get("format") != FORMAT:
        raise UserError(f"{path} has format {values.get('format')}; this version of ddfast reads {FORMAT}")
    check_signature(values, path, fix)
    manifest: Manifest = restore(Manifest, {k: v for k, v in values.items() if k != "checksum"}, str(path))
    check_name(manifest.teacher, path)
    return manifest


class Shape(NamedTuple):
    """What a teacher and its students have in common."""

    groups: Sequence[int]
    vocab_size: int
    channels: int
    num_classes: int

    @staticmethod
    def of(groups: Sequence[int], codebook_VC: Tensor, num_classes: int) -> Shape:
        return Shape(groups, codebook_VC.shape[0], codebook_VC.shape[1], num_classes)


def check_origin(folder: Path, manifest: Manifest, name: str, weights: Mapping[str, str | None], shape: Shape) -> None:
    """Raise UserError unless pairs are those of one teacher, naming what differs.

    Args:
        folder, manifest: of the pairs.
        name: of the teacher they are to be of.
        weights: content hashes of its parts ``transformer`` and ``tokenizer``; what is None is not known, and without
            the transformer's hash the names must agree.
        shape: its groups, codebook entries, channels and classes.
    """
    lines = []
    for label, sha256 in weights.items():
        theirs = manifest.weights.get(label, "")
        if sha256 is not None and theirs != sha256:
            what = "codebook and tokenizer" if label == "tokenizer" else label
            lines.append(f"their {what} has the hash {theirs[:16] or 'of nothing'}…, {name} has {sha256[:16]}…")
    if weights.get("transformer") is None and manifest.teacher != name:
        lines.append(f"it is called {manifest.teacher}")
    if manifest.groups != tuple(shape.groups):
        lines.append(f"their images have {len(manifest.groups)} groups, not {len(shape.groups)}")
    for field in ("vocab_size", "channels", "num_classes"):
        if getattr(manifest, field) != getattr(shape, field):
            lines.append(f"their {field} is {getattr(manifest, field)}, not {getattr(shape, field)}")
    if lines:
        raise UserError(
            f"the pairs in {folder} were made by {manifest.teacher}, another teacher than {name}: "
            + "; ".join(lines)
            + ". Name theirs with --teacher, --weights and --tokenizer, or other pairs"
        )


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
