"""Exported folders that hold programs: they run where this user made them on this machine, elsewhere only if told to.

A compiled package or an engine can do all that its user can. Which ones were made here is kept, as the checksums of
their manifests, in ``~/.local/state/ddfast`` (or ``$XDG_STATE_HOME/ddfast``): a folder that is sent or altered is not
among them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from ddfast.errors import UserError
from ddfast.files import home, is_file

from .manifest import Manifest

FILE = "made-here"
PROGRAMS = {"aoti": "a compiled library", "tensorrt": "a TensorRT engine", "tensorrt-rtx": "a TensorRT-RTX engine"}


def program_in(manifest: Manifest) -> str | None:
    """What a folder would run as a program; None for a graph, which is data."""
    target = manifest.target
    if target == "triton-server" and manifest.built.get("backend") == "tensorrt":
        target = "tensorrt"
    return PROGRAMS.get(target)


def register() -> Path | None:
    """Where it is kept what was made here; None without a home."""
    folder = home(".local/state", "ddfast", variable="XDG_STATE_HOME")
    return None if folder is None else folder / FILE


def remember(manifest: Manifest) -> None:
    """Note that a folder was made here, if it needs to be known."""
    path = register()
    if program_in(manifest) is None:
        return
    try:
        if path is None:
            raise OSError("there is no home")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(descriptor, "a") as file:
            file.write(f"{manifest.checksum}\n")
    except OSError as error:
        logging.getLogger("ddfast").warning(
            f"it cannot be kept that this folder was made here ({error}): running it will ask for --trust"
        )


def made_here(manifest: Manifest) -> bool:
    path = register()
    try:
        return path is not None and is_file(path) and manifest.checksum in path.read_text(errors="replace").split()
    except OSError:
        return False


def check_trusted(folder: Path, manifest: Manifest, trust: bool) -> None:
    """Say that a folder runs as a program. Raises UserError where it was not made here and ``trust`` is False."""
    what = program_in(manifest)
    if what is None:
        return
    here = made_here(manifest)
    if not here and not trust:
        raise UserError(
            f"{folder} holds {what}: a program, which can do all that you can, and it was not made by you on this "
            "machine. Export the student again here, or add --trust if you trust who made it"
        )
    logging.getLogger("ddfast").warning(
        f"{folder} runs {what}, {'made on this machine' if here else 'trusted as told'}"
    )
