"""The quickstart on a tiny model: all six steps, three decisions, and a second run that measures nothing again."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tiny_vlm import write_tiny_model

from budgetvlm import cli
from budgetvlm.commands.catalogue import command_parser
from budgetvlm.commands.quickstart_examples import find_sample
from budgetvlm.commands.quickstart_steps import Options, Places, steps
from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_tiny_model(tmp_path_factory.mktemp("model"))
    knobs = json.loads((directory / "knobs.json").read_text())
    knobs["knob_space"] = {"max_crops": [1, 4], "top_k": [2, 4], "num_active_blocks": [2, 4]}
    (directory / "knobs.json").write_text(json.dumps(knobs))
    return directory


def test_from_nothing_to_a_picture_and_again(model, tmp_path, capsys):
    output = tmp_path / "quickstart"
    words = ["quickstart", "--model_path", str(model), "--output_dir", str(output)]
    small = ["--num_samples", "36", "--num_timed", "24", "--num_epochs", "1", "--num_calibrated", "28"]

    assert cli.main([*words, *small]) == 0
    first = capsys.readouterr().out
    assert [f"[{n}/6]" in first for n in range(1, 7)] == [True] * 6
    assert "Accuracy under a budget" in first
    assert first.count("   answer   ") == first.count("   budget   ") == 3
    assert first.rstrip().endswith(f"Picture: {output / 'evaluation.png'}")
    assert (output / "evaluation.png").read_bytes().startswith(b"\x89PNG")

    measured = {path: path.stat().st_mtime_ns for path in output.glob("exp*/**/*.json")}
    assert len(measured) == 2 * 8
    assert cli.main([*words, *small]) == 0
    second = capsys.readouterr().out
    assert "8 of 8 settings are finished already" in second and "it is calibrated already" in second
    assert {path: path.stat().st_mtime_ns for path in output.glob("exp*/**/*.json")} == measured

    trained = output / "controller/last_checkpoint.pt"
    kept = trained.stat().st_mtime_ns
    (output / "data/controller_training_data.json").touch()  # as if it had been made anew
    assert cli.main([*words, *small]) == 0
    assert trained.stat().st_mtime_ns > kept

    assert cli.main([*words, "--num_samples", "40", *small[2:]]) == 2
    assert "other options" in capsys.readouterr().err


def test_all_numbers_that_cannot_work_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        Options(num_samples=3, num_timed=8, num_epochs=0)
    assert all(name in str(error.value) for name in ("num_samples=3", "num_timed=8 is more", "num_epochs=0"))


def parsed(words: list[str]) -> dict[str, object]:
    """What a command's flags say, whichever way they are written."""
    return {"command": words[0], **vars(command_parser(words[0]).parse_args(words[1:]))}


def test_the_readme_shows_the_steps_of_the_quickstart_in_their_order():
    """So both end with the same controller: a flag in one and not in the other fails here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "budgetvlm"]
    todo = [list(step.words) for step in steps(Options(), Places())]
    names = {words[0] for words in todo}
    assert [parsed(words) for words in shown if words[0] in names] == [parsed(words) for words in todo]


def test_options_of_ones_own_reach_every_step_that_they_concern():
    todo = steps(Options("my model", 50, 30, 3, 30, seed=7), Places(Path("out")))
    flags = {step.words[0] + step.words[1] * (step.words[0] == "profile"): step.command for step in todo}
    assert all("'my model'" in flags[name] for name in ("profileaccuracy", "profilelatency", "prepare", "calibrate"))
    assert all("--seed 7" in flags[name] for name in ("profileaccuracy", "profilelatency", "train", "calibrate"))
    assert "--num_epochs 3" in flags["train"] and "--samples 30" in flags["calibrate"]


@dataclass
class OneSample:
    sample_id: str
    groups: dict[str, str]


class SmallTask:
    def samples(self, split, count):
        labels = [("a", "large"), ("b", "small"), ("c", "small"), ("d", "large")]
        return [OneSample(name, {"kind": "read", "difficulty": size}) for name, size in labels]


@pytest.mark.parametrize(
    ("difficulty", "accuracy", "found"),
    [
        ("small", {"b": [1, 1], "c": [0, 1]}, "c"),  # b is right with one tile already
        ("large", {"a": [0, 1], "d": [1, 1]}, "d"),  # a needs more than one tile
        ("small", {"b": [0, 0], "c": [np.nan, np.nan]}, "b"),  # none shows it: the first one
    ],
)
def test_examples_are_the_first_samples_whose_profile_shows_the_point(difficulty, accuracy, found):
    space = KnobSpace({"max_crops": [1, 12]})
    values = np.array(list(accuracy.values()), dtype=float)
    table = ProfileTable.from_arrays(space, tuple(accuracy), values, np.full(values.shape, 10.0))
    sample, why = find_sample(SmallTask(), table, difficulty)
    assert sample.sample_id == found
    assert ("profiled" in why) == (found != "b")
