"""Flags that several commands share, and flags that are fields of an options class.

An options class says everything about its flags: the annotation of a field gives the type and the choices, its value
the default, and its line in the docstring's section "Attributes" the help.
"""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from budgetvlm.controller.training_options import LARGEST_SEED

METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "model_path": {
        "default": "reference",
        "metavar": "DIR",
        "help": "model directory, hub name, engines.yaml or an engine's address (default: reference)",
    },
    "num_threads": {"type": int, "metavar": "N", "help": "threads of PyTorch (default: PyTorch's own choice)"},
    "device": {"default": "cpu", "metavar": "NAME", "help": "PyTorch device (default: cpu)"},
}


class OptionFlags:
    """Some fields of an options class as flags.

    Args:
        options: a dataclass whose docstring describes its attributes.
        names: fields whose flag has the same name.
        renamed: fields whose flag has another name: field="flag".
    """

    def __init__(self, options: type, *names: str, **renamed: str) -> None:
        self.options = options
        self.flags = {name: name for name in names} | renamed
        self._fields = {field.name: field for field in fields(options)}

    def add(self, parser: Any, **defaults: Any) -> None:
        """Add the flags to a parser or to a group of one.

        Args:
            defaults: by field, in place of the class's own; None leaves the flag out of the parsed values' way, and the
                help still names the class's default.
        """
        hints, texts = get_type_hints(self.options), described_attributes(self.options)
        for name, flag in self.flags.items():
            own = _default(self._fields[name])
            default = defaults.get(name, own)
            shown = default if default is not None else own
            words = {"default": default, "help": _help(texts[name], shown)} | _kind(hints[name])
            if words.get("nargs") and default is not None:
                words["default"] = list(default)
            parser.add_argument(f"--{flag}", **words)

    def read(self, args: argparse.Namespace) -> dict[str, Any]:
        """The parsed values by field, for the class's constructor; fields whose flag is None are left out."""
        given = {name: getattr(args, flag) for name, flag in self.flags.items()}
        return {name: _frozen(value) for name, value in given.items() if value is not None}


def described_attributes(options: type) -> dict[str, str]:
    """What the section "Attributes" of a docstring says of each attribute, on one line each."""
    section = (inspect.getdoc(options) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _kind(hint: Any) -> dict[str, Any]:
    """What `add_argument` has to know about values of an annotated type."""
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {"nargs": "+"} | _kind(get_args(hint)[0])
    if get_origin(hint) in (Union, type(int | None)):
        return _kind(next(one for one in get_args(hint) if one is not type(None)))
    return {"type": hint, "metavar": METAVARS[hint]}


def _help(text: str, default: Any) -> str:
    says_it = "if not given" in text
    if default is None or default is MISSING or default is False or says_it:
        return text.replace("%", "%%")
    words = " ".join(map(_shown, default)) if isinstance(default, tuple | list) else _shown(default)
    return f"{text} (default: {words})".replace("%", "%%")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _frozen(value: Any) -> Any:
    """A list of words as a tuple without repetitions."""
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else value


def add_model_flags(parser: Any, *names: str) -> None:
    """Add the flags of the model under control and of how it runs: those named, or all of them."""
    for name in names or MODEL_FLAGS:
        parser.add_argument(f"--{name}", **MODEL_FLAGS[name])


def forget_defaults(args: argparse.Namespace, *names: str) -> None:
    """Set flags that were not given to None, because what else was given may know better than their defaults.

    Values that no `Parser` made are left as they are.
    """
    if hasattr(args, "given"):
        vars(args).update({name: None for name in names if name not in args.given and hasattr(args, name)})


def add_concurrency_flag(parser: Any) -> None:
    """Add `--concurrency`, which says how many requests are in flight at an engine."""
    parser.add_argument(
        "--concurrency", type=int, default=1, metavar="N",
        help="requests in flight, of a model that engines serve; each is timed by this side's clock (default: 1)",
    )  # fmt: skip


def add_cut_flag(parser: Any) -> None:
    """Add `--cut`, which says when an answer may be cut short."""
    parser.add_argument(
        "--cut", default="always", choices=["always", "needed"],
        help="stop before a token that the budget would not hold: always (default), or only where a late answer would "
        "break the guard's promise",
    )  # fmt: skip


def seed_number(text: str) -> int:
    """Read a seed. Raises ArgumentTypeError: it is no number that PyTorch and NumPy both take."""
    seed = int(text)
    if not 0 <= seed <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is no seed; give a whole number from 0 to 2**62")
    return seed


def add_json_flag(parser: Any) -> None:
    """`--json`, with the same meaning everywhere."""
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
