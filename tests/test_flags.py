"""Flags: names and defaults stay, one spelling in the help and two that are accepted, and one place that says them."""

import argparse
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from budgetvlm.commands.catalogue import COMMANDS, command_parser
from budgetvlm.commands.flags import OptionFlags, described_attributes
from budgetvlm.commands.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
# Flags and defaults that users know. A flag may be added to the commands without being listed in this file.
KNOWN = json.loads((ROOT / "tests/data/flags.json").read_text(encoding="utf-8"))


def script_parser(name: str) -> argparse.ArgumentParser:
    return importlib.import_module(f"experiments.controller.{name}").parser()


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command ("train"), of one of its kinds ("profile accuracy") or of a script of the guide."""
    if command.endswith(".py"):
        return script_parser(command.removesuffix(".py"))
    name, _, kind = command.partition(" ")
    parser = command_parser(name)
    if not kind:
        return parser
    (kinds,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return kinds.choices[kind]


def plain(value: object) -> object:
    """A default as JSON has it; a path without what does not matter."""
    if isinstance(value, tuple | list):
        return list(value)
    return os.path.normpath(value) if isinstance(value, str | Path) else value


@pytest.mark.parametrize("command", KNOWN)
def test_known_flags_keep_their_names_defaults_and_choices(command):
    actions = {(action.option_strings or [action.dest])[0]: action for action in parser_of(command)._actions}
    for flag, known in KNOWN[command].items():
        assert flag in actions, f"{command} lost {flag}"
        action = actions[flag]
        assert plain(action.default) == plain(known["default"]), (command, flag)
        assert list(action.choices or []) == known.get("choices", []), (command, flag)
        assert (action.nargs or None) == known.get("nargs"), (command, flag)
        assert action.required <= known.get("required", False), f"{command} asks for {flag}, which could be left out"


def every_parser() -> list[argparse.ArgumentParser]:
    return [parser_of(command) for command in KNOWN] + [command_parser(name) for name in COMMANDS]


def test_flags_are_written_with_underscores():
    flags = {flag for parser in every_parser() for action in parser._actions for flag in action.option_strings}
    assert {flag for flag in flags if "-" in flag.removeprefix("--").removeprefix("-")} == set()
    assert len(flags) > 100


def test_every_flag_is_explained():
    bare = {
        (parser.prog, action.dest)
        for parser in every_parser()
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    }
    assert bare == set()


@pytest.mark.parametrize("words", [["--budget_ms", "40"], ["--budget-ms", "40"], ["--budget-ms=40"]])
def test_hyphens_are_as_good_as_underscores(words):
    args = command_parser("ask").parse_args([*words, "--image", "my-image.png", "--question", "what-is"])
    assert (args.budget_ms, args.image, args.question) == (40.0, "my-image.png", "what-is")


def test_hyphens_are_accepted_below_a_sub_command_and_in_the_scripts():
    args = command_parser("profile").parse_args(["accuracy", "--num-samples", "7", "--output-dir=a-b"])
    assert (args.num_samples, args.output_dir) == ("7", "a-b")
    args = script_parser("train_controller").parse_args(["--batch-size", "32", "--reward-alpha", "2"])
    assert (args.batch_size, args.reward_alpha) == (32, 2.0)


@dataclass(frozen=True)
class Options:
    """Options of a test.

    Attributes:
        size: number of things,
            counted in 100% of the cases.
        way: how it is done.
        shares: parts of the whole.
        limit: largest number; None: none.
        loud: whether it says so.

    Raises:
        Nothing.
    """

    size: int = 3
    way: Literal["up", "down"] = "up"
    shares: tuple[float, ...] = (0.5, 1.0)
    limit: int | None = None
    loud: bool = False


FLAGS = OptionFlags(Options, "size", "way", "shares", "loud", limit="most")


def test_an_options_class_says_its_flags_and_reads_them_back(capsys):
    parser = Parser(prog="x")
    FLAGS.add(parser)
    assert Options(**FLAGS.read(parser.parse_args([]))) == Options()
    words = ["--size", "4", "--way", "down", "--shares", "0.1", "0.1", "0.2", "--most", "9", "--loud"]
    assert Options(**FLAGS.read(parser.parse_args(words))) == Options(4, "down", (0.1, 0.2), 9, True)
    text = " ".join(parser.format_help().split())
    assert "--size N number of things, counted in 100% of the cases (default: 3)" in text
    assert "parts of the whole (default: 0.5 1)" in text and "largest number; None: none --" not in text
    with pytest.raises(SystemExit):
        parser.parse_args(["--way", "sideways"])


def test_a_default_of_none_leaves_the_choice_to_the_class_and_still_shows_it():
    parser = Parser(prog="x")
    FLAGS.add(parser, size=None)
    args = parser.parse_args([])
    assert args.size is None and "size" not in FLAGS.read(args)
    assert "(default: 3)" in parser.format_help()


def test_descriptions_end_where_the_section_ends():
    assert list(described_attributes(Options)) == ["size", "way", "shares", "limit", "loud"]
