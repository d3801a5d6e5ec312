"""What is said to the user instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the value and the fix; the command line prints it and exits with code 2."""


class WorkError(RuntimeError):
    """Work that had begun cannot go on. The command line prints the message and exits with code 1."""
