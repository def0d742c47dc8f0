"""The parser of every command: flags with underscores or hyphens, and a suggestion for a misspelt name."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the name that was probably meant, and never guesses one.

    A flag is written with underscores in the help, and may be given with hyphens as well.

    Args:
        words: other words that the user may have meant, such as the names of commands.
    """

    def __init__(self, *args: object, words: Iterable[str] = (), **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options["allow_abbrev"] = False
        self.words, self.given = tuple(words), tuple[str, ...]()
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and keep the flags as given: where one is missing, another may be a misspelt it.

        The values get the names of the flags that stand among the words as ``given``; see `flags.forget_defaults`.
        """
        words = list(sys.argv[1:] if args is None else args)
        self.given = tuple(word for word in words if word.startswith("--"))
        known = [self._with_underscores(word) for word in words]
        flags = [word.partition("=")[0] for word in known if word.startswith("--")]
        self._require_once(flags)
        parsed, rest = super().parse_known_args(known, namespace)
        parsed.given = frozenset(flag.removeprefix("--").replace("-", "_") for flag in flags)
        return parsed, rest

    def _require_once(self, flags: Sequence[str]) -> None:
        """End with an error where a flag has several values, of which only the last would count."""
        for flag, times in Counter(flags).items():
            action = self._option_string_actions.get(flag)
            if times > 1 and action and action.nargs != 0 and not isinstance(action, argparse._AppendAction):
                twice = f"error: {flag} is given {times} times, and only one of them can count. Give it once."
                self.exit(2, f"{twice}\nSee: {self.prog} --help\n")

    def _with_underscores(self, word: str) -> str:
        """A flag of this parser as the help writes it; any other word as it is."""
        name, equals, value = word.partition("=")
        known = "--" + name[2:].replace("-", "_")
        return known + equals + value if name.startswith("--") and known in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion and where the help is; exit with 2."""
        lines = [
            f"error: {message}",
            *_suggestions([*message.split(), *self.given], _names(self)),
            f"See: {self.prog} --help",
        ]
        self.exit(2, "\n".join(lines) + "\n")


def _names(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag and sub-command that the parser and those below it know."""
    names = set(getattr(parser, "words", ()))
    for action in parser._actions:
        choices = action.choices or ()
        names |= {*action.option_strings, *map(str, choices)}
        if isinstance(choices, dict):  # sub-commands and their parsers
            names = names.union(*map(_names, choices.values()))
    return names


def _suggestions(words: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    """One line, for the first word that is nearly, but not quite, a known name."""
    known = sorted(set(names))
    for word in (word.partition("=")[0].strip("',:") for word in words):
        if word in known or len(word) < 3:
            continue
        # A flag is compared as written with underscores, so that both ways of joining words find it.
        close = difflib.get_close_matches(_plain(word), [_plain(n) for n in known], n=1, cutoff=0.75)
        meant = [n for n in known if close and _plain(n) == close[0] and n.startswith("-") == word.startswith("-")]
        if meant:
            yield f"Did you mean {meant[0]}?"
            return


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
