"""The command line: `budgetvlm COMMAND ...`.

Only the module of the command that was chosen is imported, so that help and mistakes cost no waiting.
A command is a module with a docstring, `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn

from budgetvlm._version import __version__
from budgetvlm.errors import BudgetVLMError

COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("budgetvlm.commands.quickstart", "all of the below with the bundled model and task, in minutes"),
    "profile": ("budgetvlm.commands.profile", "measure accuracy or latency of every setting of the knobs"),
    "prepare": ("budgetvlm.commands.prepare", "join both profiles into a table and extract the features"),
    "import": ("budgetvlm.commands.import_results", "make a table from results of other programs"),
    "train": ("budgetvlm.commands.train", "train a controller with GRPO on a table and its features"),
    "calibrate": ("budgetvlm.commands.calibrate", "fit the guard to this machine from a few requests"),
    "evaluate": ("budgetvlm.commands.evaluate", "compare the controller with simple policies on held-out samples"),
    "compare": ("budgetvlm.commands.compare", "compare every policy, simple and strong, on one table"),
    "report": ("budgetvlm.commands.report", "one HTML file about what was measured, learnt and chosen"),
    "explain": ("budgetvlm.commands.explain", "why a setting is chosen for an image, a question and a budget"),
    "ask": ("budgetvlm.commands.ask", "answer a question about an image within a budget"),
    "bench": ("budgetvlm.commands.bench", "measure this project's speed claims on your machine"),
    "check-model": ("budgetvlm.commands.check_model", "list the knobs of a model and prove that they work"),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "quickstart": ("budgetvlm quickstart",),
    "profile": (
        "budgetvlm profile accuracy --model_path reference --dataset_name signs --split train,validation,test \\\n"
        "      --num_samples 1500 --output_dir ./results/profiling/exp5_accuracy",
        "budgetvlm profile latency --model_path reference --dataset_name signs --split train,validation,test \\\n"
        "      --num_samples 60 --output_dir ./results/profiling/exp6_latency",
    ),
    "prepare": (
        "budgetvlm prepare --model_path reference --dataset_name signs \\\n"
        "      --exp5_dir ./results/profiling/exp5_accuracy --exp6_dir ./results/profiling/exp6_latency \\\n"
        "      --output_data_path ./data/controller_training_data.json",
    ),
    "import": (
        "budgetvlm import lmms --run 'max_crops=4,top_k=8,num_active_blocks=16=logs/a' \\\n"
        "      --run 'max_crops=12,top_k=8,num_active_blocks=16=logs/b' --metric exact_match --output ./data/T.parquet",
        "budgetvlm import table --input results.csv --column score=accuracy --column latency_ms=time \\\n"
        "      --latency_unit s --features F.npz --output ./data/T.parquet",
        "budgetvlm import profiles --exp5_dir ./results/exp5 --exp6_dir ./results/exp6 --dataset_name text_vqa \\\n"
        "      --features F.npz --output ./data/T.parquet",
    ),
    "train": (
        "budgetvlm train --data ./data/controller_training_data.json --output_dir ./checkpoints/controller",
        "budgetvlm train --table T.parquet --features F.safetensors --output_dir ./checkpoints/controller",
    ),
    "calibrate": (
        "budgetvlm calibrate --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json \\\n"
        "      --samples 50 --alpha 0.05",
    ),
    "evaluate": (
        "budgetvlm evaluate --data ./data/controller_training_data.json --checkpoint ./checkpoints/controller",
        "budgetvlm evaluate --table T.parquet --features F.safetensors --checkpoint ./checkpoints/controller --json",
        "budgetvlm evaluate --live --checkpoint ./checkpoints/controller --num_requests 1500",
    ),
    "compare": (
        "budgetvlm compare --data ./data/controller_training_data.json --output_dir ./results/compare",
        "budgetvlm compare --table T.parquet --quick",
    ),
    "report": (
        "budgetvlm report --data ./data/controller_training_data.json --checkpoint ./checkpoints/controller \\\n"
        "      --output report.html",
    ),
    "explain": (
        'budgetvlm explain --image photo.png --question "read the sign in red" --budget-ms 40 \\\n'
        "      --checkpoint ./checkpoints/controller --data ./data/controller_training_data.json",
    ),
    "ask": (
        'budgetvlm ask --image photo.png --question "read the sign in red" --budget-ms 40 \\\n'
        "      --checkpoint ./checkpoints/controller",
    ),
    "bench": (
        "budgetvlm bench --quick",
        "budgetvlm bench --sections decision overhead --data ./data/controller_training_data.json \\\n"
        "      --checkpoint ./checkpoints/controller --json",
    ),
    "check-model": (
        "budgetvlm check-model reference",
        "budgetvlm check-model ./models/llava-v1.6-mistral-7b --device cuda --quick",
    ),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests the name that was probably meant, and never guesses one."""

    def __init__(self, *args: object, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options["allow_abbrev"] = False
        self.given: tuple[str, ...] = ()
        super().__init__(*args, **options)  # type: ignore[arg-type]

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and keep the flags as given: where one is missing, another may be a misspelt it."""
        self.given = tuple(word for word in (sys.argv[1:] if args is None else args) if word.startswith("--"))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message with a suggestion and where the help is; exit with 2."""
        lines = [
            f"error: {message}",
            *_suggestions([*message.split(), *self.given], _names(self)),
            f"See: {self.prog} --help",
        ]
        self.exit(2, "\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after the program's name; None takes those of the process.

    Returns:
        The exit code: 0 done, 2 a mistake that the user can mend, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # `| head` closed it: the flush at exit must not fail
        return 0


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; imports that command's module and no other."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = Parser(prog=f"budgetvlm {name}", description=(module.__doc__ or "").strip(), epilog=_examples(name))
    module.add_arguments(parser)
    parser.set_defaults(run=parser.get_default("run") or module.run)
    return parser


def top_parser() -> argparse.ArgumentParser:
    """The parser of `budgetvlm` itself: its flags and the name of a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    examples = [f"  {example}" for name in COMMANDS for example in EXAMPLES[name]]
    parser = Parser(
        prog="budgetvlm",
        usage="budgetvlm [-h] [--version] COMMAND ...",
        description="Answer within a latency budget: choose a vision-language model's knobs for each request.",
        epilog="\n".join(
            ["commands:", *lines, "", "examples:", *examples, "", "Flags of a command: budgetvlm COMMAND --help"]
        ),
    )
    parser.add_argument("--version", action="version", version=f"budgetvlm {__version__}")
    return parser


def _dispatch(words: list[str]) -> int:
    if not words:
        top_parser().print_help()
        return 0
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "--version"):
        top_parser().parse_args([name])
    if name.startswith("-"):
        top_parser().error(f"a command comes before its flags, but the first word is {name}")
    if name not in COMMANDS:
        top_parser().error(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    args = command_parser(name).parse_args(rest)
    return int(args.run(args) or 0)


def _examples(name: str) -> str:
    return "\n".join(["examples:" if len(EXAMPLES[name]) > 1 else "example:", *(f"  {e}" for e in EXAMPLES[name])])


def _names(parser: argparse.ArgumentParser) -> set[str]:
    """Every flag and sub-command that the parser and those below it know."""
    names = set(COMMANDS) if parser.prog == "budgetvlm" else set()
    for action in parser._actions:
        names.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                names |= {name} | _names(child)
        else:
            names.update(str(choice) for choice in action.choices or ())
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


if __name__ == "__main__":
    sys.exit(main())
