"""The quickstart on a tiny model: all six steps, three decisions, and a second run that measures nothing again."""

import json

import pytest
from tiny_vlm import write_tiny_model

from budgetvlm import cli
from budgetvlm.commands.quickstart import Options
from budgetvlm.errors import ConfigError


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
    small = ["--num_samples", "36", "--num_timed", "9", "--num_epochs", "1", "--num_calibrated", "28"]

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

    trained = [output / "controller/members" / str(n) / "last_checkpoint.pt" for n in range(5)]
    kept = [path.stat().st_mtime_ns for path in trained]
    (output / "data/controller_training_data.json").touch()  # as if it had been made anew
    assert cli.main([*words, *small]) == 0
    assert all(path.stat().st_mtime_ns > before for path, before in zip(trained, kept, strict=True))

    assert cli.main([*words, "--num_samples", "40", *small[2:]]) == 2
    assert "other options" in capsys.readouterr().err


def test_all_numbers_that_cannot_work_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        Options(num_samples=3, num_timed=8, num_epochs=0)
    assert all(name in str(error.value) for name in ("num_samples=3", "num_timed=8 is more", "num_epochs=0"))
