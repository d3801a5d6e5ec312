"""The parser of every command: messages that know what may have been meant, and actions such as `pairs show`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser with a text as it was written below the options.

    Args:
        name: of the command, "pairs show".
        description, epilog: as they are to be printed.
        work: "module:function" in ``ddfast.cli`` that does the work; None where an action does.
        actions: parsers for a first word that is one of theirs.
    """

    def __init__(
        self,
        name: str,
        description: str,
        epilog: str = "",
        work: str | None = None,
        actions: Mapping[str, Callable[[], Parser]] | None = None,
    ) -> None:
        super().__init__(
            prog=f"ddfast {name}".strip(),
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.actions = dict(actions or {})
        self.set_defaults(work=work, interrupted=None)

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The options in ``words``; leaves with a message, code 2, where they are none."""
        if words and words[0] in self.actions:
            return self.actions[words[0]]().read(words[1:])
        namespace, unknown = self.parse_known_args(list(words))
        if unknown:
            self.error(self.unknown(unknown))
        return namespace

    def unknown(self, words: Sequence[str]) -> str:
        """What to say of words that belong to no option."""
        word = words[0]
        if word.startswith("-"):
            known = [option for option in self._option_string_actions if option.startswith("--")]
            near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)
        else:
            near = difflib.get_close_matches(word, list(self.actions), n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        return f"unrecognized arguments: {' '.join(words)}{hint}"

    def error(self, message: str) -> NoReturn:
        """The message and where more is said; the usage of so many options would bury it."""
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more\n")


def command_list(commands: Mapping[str, str]) -> str:
    """Commands or actions with a line each, for a description."""
    width = max(map(len, commands))
    return "\n".join(f"  {name:{width}s}  {line}" for name, line in commands.items())
