"""What is said to the user instead of a traceback."""

from __future__ import annotations

SHOWN = 400  # characters of what a library says


def reason(error: BaseException) -> str:
    """What a library's error says, for a sentence: its first line, if that is not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class UserError(ValueError):
    """Bad input. The message names the value and the fix; the command line prints it and exits with code 2."""


class WorkError(RuntimeError):
    """Work that had begun cannot go on. The command line prints the message and exits with code 1."""
