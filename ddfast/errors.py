"""The one exception that means "the user can fix this"."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the value and the fix; the command line prints it and exits with code 2."""
