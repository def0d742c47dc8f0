"""docs/serving.md says what is true: its examples run, and its flags, codes and metrics are the server's."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from budgetvlm.serving import api_errors
from budgetvlm.serving.serve_options import ServeOptions
from tests.server_process import ServerProcess
from tests.test_deploy import samples  # noqa: F401 (a fixture)

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```(python|sh)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PROGRAMS = {"python": [sys.executable, "-c"], "sh": ["sh", "-c"]}


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as running:
        yield running


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_run(server, number):
    language, example = EXAMPLES[number]
    assert "http://127.0.0.1:8000" in example
    example = example.replace("http://127.0.0.1:8000", server.address).replace("500ms", "60000ms")
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [*PROGRAMS[language], example],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "X85" in done.stdout


def test_there_are_examples_of_each_client():
    assert [language for language, _ in EXAMPLES].count("sh") == 1
    assert {name for _, text in EXAMPLES for name in re.findall(r"openai|httpx|curl|stream=True", text)} == {
        "openai", "httpx", "curl", "stream=True",
    }  # fmt: skip


def test_the_flags_exist():
    named = set(re.findall(r"--(\w+)", TEXT)) - {"help", "fail", "compressed"}  # the last two are of curl
    assert named <= {field.name for field in fields(ServeOptions)}


def test_the_table_of_errors_has_each_code_that_the_server_says_and_no_other():
    table = TEXT.partition("## Errors")[2].partition("## Operations")[0]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
    told = {code: int(row[1]) for row in rows for code in re.findall(r"`(\w+)`", row[2])}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "src/budgetvlm/serving").glob("*.py")]
    quoted = {word for text in sources for word in re.findall(r'"([a-z_]+)"', text)}
    assert set(told) <= quoted
    assert {code: told.get(code) for code in api_errors.CODES.values()} == {
        code: status for status, code in api_errors.CODES.items()
    }
    given = {code for text in sources for code in re.findall(r'code="(\w+)"', text)}
    assert given <= set(told)


def test_the_table_of_metrics_is_that_of_the_server(samples):  # noqa: F811 (a fixture)
    told = set(re.findall(r"`(budgetvlm_\w+)`", TEXT))
    has = {re.sub(r"_(bucket|sum|count)$", "", name) for name in samples if name.startswith("budgetvlm_")}
    assert told == has
