"""The command line: `budgetvlm COMMAND ...`.

Only the module of the command that was chosen is imported, so that help and mistakes cost no waiting.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from budgetvlm._version import __version__
from budgetvlm.commands.catalogue import COMMANDS, EXAMPLES, command_parser
from budgetvlm.commands.parser import Parser
from budgetvlm.errors import BudgetVLMError, warnings_as_notes


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
        # `| head` closed the pipe, and the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def top_parser() -> Parser:
    """The parser of `budgetvlm` itself: its flags and the name of a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    examples = [f"  {example}" for name in COMMANDS for example in EXAMPLES[name]]
    parser = Parser(
        prog="budgetvlm",
        words=COMMANDS,
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
    with warnings_as_notes():
        return int(args.run(args) or 0)


if __name__ == "__main__":
    sys.exit(main())
