"""Every teacher, tokenizer and student that ddfast knows by name, and where their weights are looked for.

Sampling presets: ``paper`` is what Distilled Decoding used to involve the teacher (guidance 2.0; its release does not
say how its training pairs were sampled), ``release`` is what the family's authors report their FID with.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import home, is_file, require_readable, say_once
from ..tensors import read_safetensors
from .base import Sampling, Teacher
from .checkpoints import (
    KINDS,
    Part,
    differences,
    expected_shapes,
    load_bundle,
    make_part,
    read_copies,
    read_extra,
    read_header,
    require_copy,
)
from .llamagen import LlamaGenConfig
from .llamagen_student import LlamaGenStudentConfig
from .llamagen_teacher import LlamaGenTeacher
from .llamagen_vq import LlamaGenTokenizerConfig
from .var import VARConfig
from .var_student import VARStudentConfig
from .var_teacher import VARTeacher
from .var_vqvae import VARTokenizerConfig

WEIGHTS_VARIABLE = "DDFAST_WEIGHTS"
TEACHER_CLASSES: dict[str, Any] = {"var-transformer": VARTeacher, "llamagen-transformer": LlamaGenTeacher}
BUNDLED = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class ZooTokenizer:
    """A released tokenizer. Its config is the one for 256 pixels; a teacher may ask for another grid."""

    name: str
    kind: str
    config: Any
    file: str
    origin: str


@dataclass(frozen=True)
class ZooTeacher:
    """A teacher known by name.

    Attributes:
        family: the paper it comes from, for people.
        kind, config: of its transformer; None for a bundled one, whose file says.
        tokenizer: name of its tokenizer in ``TOKENIZERS``; None for a bundled one.
        tokenizer_config: that tokenizer's config for this teacher's grid.
        file: name of the released file, or of the bundled one.
        origin: who published it where.
        presets: named sampling settings; the first is the default.
        recipe: name of its students' training settings (``ddfast.training.RECIPES``).
    """

    name: str
    family: str
    kind: str | None
    config: Any
    tokenizer: str | None
    tokenizer_config: Any
    file: str
    origin: str
    presets: Mapping[str, Sampling]
    recipe: str

    @property
    def bundled(self) -> bool:
        return self.tokenizer is None


@dataclass(frozen=True)
class ZooStudent:
    """A released student.

    Attributes:
        kind, config: of its part ``student``.
        teacher: name of its teacher in ``TEACHERS``, whose tokenizer it uses.
        file, origin: the released file, and who published it where.
        timesteps, split: its published two-step sampling (see :func:`ddfast.sampling.few_step`).
    """

    name: str
    kind: str
    config: Any
    teacher: str
    file: str
    origin: str
    timesteps: tuple[int, ...]
    split: int


ZooEntry = ZooTeacher | ZooTokenizer | ZooStudent
VAR_ORIGIN = "FoundationVision/var on Hugging Face"
LLAMAGEN_ORIGIN = "FoundationVision/LlamaGen on Hugging Face"
STUDENT_ORIGIN = "microsoft/distilled_decoding on Hugging Face"
TOKENIZERS = {
    t.name: t
    for t in (
        ZooTokenizer("var-vqvae", "var-tokenizer", VARTokenizerConfig(), "vae_ch160v4096z32.pth", VAR_ORIGIN),
        ZooTokenizer(
            "llamagen-vq-16", "llamagen-tokenizer", LlamaGenTokenizerConfig(), "vq_ds16_c2i.pt", LLAMAGEN_ORIGIN
        ),
        ZooTokenizer(
            "llamagen-vq-8",
            "llamagen-tokenizer",
            LlamaGenTokenizerConfig(ch_mult=(1, 2, 2, 4), grid=32),
            "vq_ds8_c2i.pt",
            LLAMAGEN_ORIGIN,
        ),
    )
}
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _var(name: str, depth: int, file: str, **changes: Any) -> ZooTeacher:
    config = VARConfig(depth=depth, embed_dim=64 * depth, num_heads=depth, **changes)
    presets = {
        "paper": Sampling(guidance=2.0, top_k=900, top_p=0.95),
        "release": Sampling(guidance=1.5, top_k=900, top_p=0.96),
    }
    tokenizer = replace(TOKENIZERS["var-vqvae"].config, patch_nums=config.patch_nums)
    return ZooTeacher(
        name, "VAR", "var-transformer", config, "var-vqvae", tokenizer, file, VAR_ORIGIN, presets, "paper-var"
    )


def _llamagen(size: str, side: int, layers: int, heads: int, dim: int, guidance: float) -> ZooTeacher:
    grid = side // 16
    config = LlamaGenConfig(n_layer=layers, n_head=heads, dim=dim, block_size=grid * grid)
    presets = {
        "paper": Sampling(guidance=2.0, top_k=8000, top_p=1.0),
        "release": Sampling(guidance=guidance, top_k=0, top_p=1.0),
    }
    tokenizer = replace(TOKENIZERS["llamagen-vq-16"].config, grid=grid)
    name, file = f"llamagen-{size.lower()}-{side}", f"c2i_{size}_{side}.pt"
    return ZooTeacher(
        name,
        "LlamaGen",
        "llamagen-transformer",
        config,
        "llamagen-vq-16",
        tokenizer,
        file,
        LLAMAGEN_ORIGIN,
        presets,
        "paper-llamagen",
    )


def _digits(family: str, guidance: float, top_p: float) -> ZooTeacher:
    name = f"digits-{family.lower()}"
    presets = {"release": Sampling(guidance=guidance, top_k=0, top_p=top_p)}
    return ZooTeacher(
        name, family, None, None, None, None, f"{name}.safetensors", "ships with ddfast", presets, "digits"
    )


TEACHERS = {
    t.name: t
    for t in (
        _digits("VAR", guidance=0.5, top_p=0.0),
        _digits("LlamaGen", guidance=1.25, top_p=1.0),
        _var("var-d16", 16, "var_d16.pth"),
        _var("var-d20", 20, "var_d20.pth"),
        _var("var-d24", 24, "var_d24.pth"),
        _var("var-d30", 30, "var_d30.pth"),
        _var("var-d36-512", 36, "var_d36.pth", patch_nums=PATCH_NUMS_512, shared_aln=True),
        _llamagen("B", 256, 12, 12, 768, guidance=2.0),
        _llamagen("L", 256, 24, 16, 1024, guidance=2.0),
        _llamagen("B", 384, 12, 12, 768, guidance=2.0),
        _llamagen("L", 384, 24, 16, 1024, guidance=2.0),
        _llamagen("XL", 384, 36, 20, 1280, guidance=1.75),
        _llamagen("XXL", 384, 48, 24, 1536, guidance=1.75),
        _llamagen("3B", 384, 24, 32, 3200, guidance=1.65),
    )
}


def _var_student(depth: int, switch: int, split: int) -> ZooStudent:
    name, teacher = f"var-dd-d{depth}", f"var-d{depth}"
    config = VARStudentConfig(**asdict(TEACHERS[teacher].config))
    return ZooStudent(name, "var-student", config, teacher, f"{teacher}.pth", STUDENT_ORIGIN, (0, switch), split)


def _llamagen_student(size: str, switch: int, split: int) -> ZooStudent:
    name, teacher, file = f"llamagen-dd-{size.lower()}", f"llamagen-{size.lower()}-256", f"llamagen-{size}.pt"
    config = LlamaGenStudentConfig(**asdict(TEACHERS[teacher].config))
    return ZooStudent(name, "llamagen-student", config, teacher, file, STUDENT_ORIGIN, (0, switch), split)


STUDENTS = {
    s.name: s
    for s in (
        _var_student(16, switch=5, split=5),
        _var_student(20, switch=4, split=4),
        _var_student(24, switch=4, split=4),
        _llamagen_student("B", switch=80, split=80),
        _llamagen_student("L", switch=80, split=130),
    )
}


def weight_folders() -> list[Path]:
    """Folders searched for weights, in order: those of $DDFAST_WEIGHTS, ./weights, and ~/.cache/ddfast where there is
    a home."""
    named = [Path(p) for p in os.environ.get(WEIGHTS_VARIABLE, "").split(os.pathsep) if p]
    cache = home(".cache", "ddfast")
    return [*named, Path("weights"), *([] if cache is None else [cache])]


def find_weights(entry: ZooEntry) -> Path | None:
    """The file of a zoo entry: bundled, or under its released or its ddfast name in a weight folder; else None."""
    if isinstance(entry, ZooTeacher) and entry.bundled:
        return BUNDLED / entry.file
    candidates = (folder / name for folder in weight_folders() for name in (f"{entry.name}.safetensors", entry.file))
    return next((path for path in candidates if is_file(path)), None)


def models() -> dict[str, tuple[str, Any]]:
    """(kind, config) of every released model: teachers' transformers, tokenizers and students, by zoo name."""
    return {entry.name: (entry.kind, entry.config) for entry in everything() if entry.kind is not None}


def identify(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the released models whose state dict has exactly these entries (two sizes can share them)."""
    return [name for name, (kind, config) in models().items() if not differences(shapes, kind, config)]


def read_part(path: Path, label: str, kind: str, config: Any, copy: str = "raw", asked: str = "") -> Part:
    """One part from a released file or a bundle; an error about a misfit says which model the file looks like.

    Args:
        label: which part of a bundle.
        copy: which of a file's copies of the weights: "raw", or of a student "ema".
        asked: the name of the zoo that it is to be, where models of one shape are told apart by more than their shapes.
    """
    if is_bundle(path):
        name, parts = load_bundle(path)
        if label not in parts:
            raise UserError(f"{path} ({name}) holds no {label}, only {', '.join(parts)}")
        part = parts[label]
        if part.kind != kind:
            raise UserError(f"{path} holds the {part.kind} {name}, where a {kind} is needed")
        if label == "student":
            require_copy([bundled_copy(path)], copy, path)
        if asked and name != asked and name in alike(asked):
            raise UserError(f"{path} holds {name}, which has the shapes of {asked} but is another model; name {name}")
        return make_part(kind, config, part.tensors, str(path))
    copies = read_copies(path)
    tensors = copies[copy] if copy in copies else next(iter(copies.values()))
    try:
        if copy in copies or differences({k: tuple(t.shape) for k, t in tensors.items()}, kind, config):
            part = make_part(kind, config, tensors, str(path))
        require_copy(copies, copy, path)
    except UserError as error:
        likely = identify({k: tuple(t.shape) for k, t in tensors.items()})
        hint = f"\nThe file looks like {' or '.join(likely)}." if likely and asked not in likely else ""
        raise UserError(f"{error}{hint}") from None
    if asked:
        check_file_name(path, asked)
    return part


def alike(name: str) -> list[str]:
    """Names of the released models of the shapes of ``name``, itself included: no weights tell them apart."""
    kind, config = models()[name]
    shapes = expected_shapes(kind, config)
    return [other for other, (k, c) in models().items() if k == kind and expected_shapes(k, c) == shapes]


def check_file_name(path: Path, asked: str) -> None:
    """Where shapes leave a choice, the released file's name decides: UserError if it is another model's, and a line if
    it is none's."""
    names = alike(asked)
    if len(names) < 2:
        return
    known = {entry.file: entry.name for entry in everything() if entry.name in names}
    named = known.get(path.name)
    if named is None:
        say_once(
            f"{path} has the shapes of {' and of '.join(names)}; it is taken for {asked}, as it was named, and its "
            "weights cannot tell"
        )
    elif named != asked:
        raise UserError(
            f"{path} is by its name the file of {named}, which has the shapes of {asked} but is another model; name "
            f"{named}, or rename the file if it is {asked}'s"
        )


def everything() -> list[ZooEntry]:
    """All teachers, tokenizers and students."""
    return [*TEACHERS.values(), *TOKENIZERS.values(), *STUDENTS.values()]


def blueprint(name: str) -> Teacher:
    """A teacher of the zoo without its weights, on the meta device: its groups, sizes and conventions, at no cost.

    A bundled teacher comes with its weights.
    """
    entry = known_teacher(name)
    if entry.bundled:
        return load_teacher(name)
    assert entry.kind is not None and entry.tokenizer is not None
    with torch.device("meta"):
        transformer = KINDS[entry.kind][1](entry.config)
        tokenizer = KINDS[TOKENIZERS[entry.tokenizer].kind][1](entry.tokenizer_config)
    teacher: Teacher = TEACHER_CLASSES[entry.kind](name, transformer, tokenizer)
    teacher.presets = dict(entry.presets)
    return teacher


def is_bundle(path: Path) -> bool:
    return path.suffix == ".safetensors" and "ddfast" in read_safetensors(path)[0]


def bundled_copy(path: Path) -> str:
    """Which copy of a student's weights a bundle holds: what it says, else "ema"."""
    return str(read_extra(path).get("copy", "ema"))


def known_teacher(name: str) -> ZooTeacher:
    """The zoo entry of a name; UserError with the nearest names otherwise."""
    if name in TEACHERS:
        return TEACHERS[name]
    path = Path(name)
    if path.is_dir() or is_file(path):
        if is_file(path):
            require_readable(path)
        released = next((t.name for t in TEACHERS.values() if t.file == path.name), "NAME")
        raise UserError(
            f"{name} is no teacher of ddfast by itself: give the teacher's name, and a released checkpoint with "
            f"--weights, e.g. --teacher {released} --weights {name}; `ddfast info` lists the names"
        )
    raise UserError(f"no teacher is called {name!r} and no such file exists; {nearest(name, TEACHERS)}")


def nearest(name: str, known: Collection[str], most: int = 24) -> str:
    """The names that someone who wrote ``name`` may have meant, for an error: similar ones, those in which it is a
    word, or else all if they are few."""
    words = [other for other in known if name.casefold() in other.casefold().split()]
    alike = difflib.get_close_matches(name.casefold(), [other.casefold() for other in known], n=3)
    near = words[:5] or [other for other in known if other.casefold() in alike]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(known)}" if len(known) <= most else f"none of the {len(known)} names is like it"


def teacher_name(name: str) -> str:
    """The name that a teacher goes by: of the zoo, or what the bundle at the path ``name`` says."""
    if Path(name).suffix != ".safetensors":
        return known_teacher(name).name
    return str(read_header(Path(name), read_safetensors(Path(name))[0])["name"])


def load_teacher(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Teacher:
    """A teacher ready to decode.

    Args:
        name: a name of the zoo (``ddfast info`` lists them) or the path of a bundle that holds a teacher.
        weights: file of its transformer; looked for in :func:`weight_folders` when None.
        tokenizer: file of its tokenizer, likewise.
        dtype: type of the transformer's weights and arithmetic; the tokenizer stays float32.
        device: where it runs.

    Raises:
        UserError: unknown name, missing or damaged file, weights that do not fit.
    """
    if Path(name).suffix == ".safetensors":
        if weights is not None or tokenizer is not None:
            raise UserError(f"{name} holds its own weights; drop --weights and --tokenizer")
        label, parts = load_bundle(name)
        presets: Mapping[str, Sampling] = {}
    else:
        entry = known_teacher(name)
        label, presets = name, entry.presets
        parts = (
            _bundled_parts(entry, weights, tokenizer) if entry.bundled else _released_parts(entry, weights, tokenizer)
        )
    return assemble(label, parts, presets, dtype, device)


def _bundled_parts(
    entry: ZooTeacher, weights: str | os.PathLike[str] | None, tokenizer: str | os.PathLike[str] | None
) -> dict[str, Part]:
    if weights is not None or tokenizer is not None:
        raise UserError(f"{entry.name} ships with its weights; give the path of a bundle as the teacher to use another")
    return load_bundle(BUNDLED / entry.file)[1]


def _released_parts(
    entry: ZooTeacher, weights: str | os.PathLike[str] | None, tokenizer: str | os.PathLike[str] | None
) -> dict[str, Part]:
    assert entry.kind is not None and entry.tokenizer is not None
    vq = TOKENIZERS[entry.tokenizer]
    weights_path = located(entry, weights, "--weights")
    tokenizer_path = located(vq, tokenizer, "--tokenizer")
    return {
        "transformer": read_part(weights_path, "transformer", entry.kind, entry.config, asked=entry.name),
        "tokenizer": read_part(tokenizer_path, "tokenizer", vq.kind, entry.tokenizer_config, asked=vq.name),
    }


def located(entry: ZooEntry, given: str | os.PathLike[str] | None, option: str) -> Path:
    path = find_weights(entry) if given is None else Path(given)
    if path is None:
        folders = ", ".join(str(f) for f in weight_folders())
        raise UserError(
            f"the weights of {entry.name} are not in {folders}; "
            f"bring {entry.file} ({entry.origin}) there or name it with {option}"
        )
    return path


def load_tokenizer(name: str, tokenizer: str | os.PathLike[str] | None = None) -> Part:
    """The tokenizer of a teacher (a name of the zoo or the path of a bundle), without the teacher's transformer."""
    if Path(name).suffix == ".safetensors" or known_teacher(name).bundled:
        path = Path(name) if Path(name).suffix == ".safetensors" else BUNDLED / known_teacher(name).file
        parts = load_bundle(path)[1]
        if "tokenizer" not in parts:
            raise UserError(f"{path} holds no tokenizer")
        return parts["tokenizer"]
    entry = known_teacher(name)
    assert entry.tokenizer is not None
    vq = TOKENIZERS[entry.tokenizer]
    path = located(vq, tokenizer, "--tokenizer")
    return read_part(path, "tokenizer", vq.kind, entry.tokenizer_config, asked=vq.name)


def assemble(
    name: str,
    parts: Mapping[str, Part],
    presets: Mapping[str, Sampling],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Teacher:
    """Build a teacher of its parts ``transformer`` and ``tokenizer``."""
    for label in ("transformer", "tokenizer"):
        if label not in parts:
            advice = (
                f"--teacher {name} --weights FILE --tokenizer FILE" if name in TEACHERS else "both parts in one file"
            )
            raise UserError(f"{name} is no whole teacher: its file holds no {label}; give {advice}")
    kind = parts["transformer"].kind
    if kind not in TEACHER_CLASSES:
        raise UserError(f"{name}: a {kind} cannot be a teacher")
    # copied, so that prepare(release=True) frees what it says
    transformer = parts["transformer"].build(dtype, device, copy=True)
    tokenizer = parts["tokenizer"].build(torch.float32, device, copy=True)
    teacher: Teacher = TEACHER_CLASSES[kind](name, transformer, tokenizer)
    teacher.presets = dict(presets) or {"plain": teacher.plain_sampling()}
    teacher.weights_sha256 = {label: part.sha256 for label, part in parts.items()}
    return teacher.eval()
