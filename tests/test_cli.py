"""The command line: quick to start, helpful when a word is wrong, one message and exit code 2 for a mistake."""

import shlex
import subprocess
import sys
import types

import pytest

from budgetvlm import __version__, cli
from budgetvlm.errors import DataError

HEAVY = ("torch", "numpy", "transformers", "matplotlib", "pyarrow", "PIL", "rich")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["qickstart"], []])
def test_help_and_mistakes_import_nothing_heavy(words):
    code = (
        "import sys\nfrom budgetvlm import cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "LOADED []"


def test_version(run_cli):
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"budgetvlm {__version__}\n")


def test_help_names_every_command_and_shows_an_example_of_each(run_cli):
    text = run_cli("--help").stdout
    for name in cli.COMMANDS:
        assert f"  {name} " in text
        assert f"  budgetvlm {name}" in text
    assert run_cli().stdout == text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_the_help_are_accepted_by_the_parser(name):
    for example in cli.EXAMPLES[name]:
        program, command, *words = shlex.split(example.replace("\\\n", " "))
        assert (program, command) == ("budgetvlm", name)
        assert callable(cli.command_parser(name).parse_args(words).run)


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["evalute"], "Did you mean evaluate?"),
        (["--versoin"], "Did you mean --version?"),
        (["quickstart", "--ouput-dir", "x"], "Did you mean --output_dir?"),
        (["profile", "acuracy"], "Did you mean accuracy?"),
        (["profile", "latency", "--num_sampels", "3"], "Did you mean --num_samples?"),
        (["ask", "--budgetms", "3"], "Did you mean --budget_ms?"),
        (["zzzzzz"], None),
    ],
)
def test_a_wrong_word_gets_exit_code_2_and_the_name_that_was_meant(words, suggestion, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert "--help" in message
    assert (suggestion in message) if suggestion else ("Did you mean" not in message)


def _with_command(monkeypatch, error):
    """Put one command in place of all that raises ``error``."""

    def run(args):
        raise error

    module = types.ModuleType("stub", "A stub.")
    module.add_arguments = lambda parser: None
    module.run = run
    monkeypatch.setitem(sys.modules, "stub", module)
    monkeypatch.setitem(cli.COMMANDS, "stub", ("stub", "a stub"))
    monkeypatch.setitem(cli.EXAMPLES, "stub", ("budgetvlm stub",))


def test_a_mistake_of_the_user_is_one_message_without_a_traceback(monkeypatch, capsys):
    _with_command(monkeypatch, DataError("x.json does not exist; make it with budgetvlm prepare"))
    assert cli.main(["stub"]) == 2
    assert capsys.readouterr().err == "error: x.json does not exist; make it with budgetvlm prepare\n"


def test_an_interrupt_gives_130(monkeypatch, capsys):
    _with_command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["stub"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    _with_command(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["stub"])


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["ask", "--image", "a.png", "--image", "b.png", "--question", "q?", "--budget_ms", "9"], "--image"),
        (["ask", "--image=a.png", "--question", "q?", "--budget_ms", "9", "--budget-ms=8"], "--budget_ms"),
        (["import", "table", "--input", "a.csv", "--input", "b.csv", "--output", "t.parquet"], "--input"),
    ],
)
def test_a_flag_with_two_values_is_an_error(words, flag, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert f"error: {flag} is given 2 times, and only one of them can count" in capsys.readouterr().err
