"""Versions of a controller: what is kept, which one serves, and that no end of a process leaves half of one."""

import json
import os
import re
import shutil
import sys

import pytest

from budgetvlm import cli
from budgetvlm._io import read_json, write_json
from budgetvlm.controller import versions
from budgetvlm.controller.checkpoint import BEST, GUARD, controller_document, load_controller, set_default_price
from budgetvlm.controller.checkpoint_files import write_checkpoint
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import AtPrice, PriceCurve, load_price_curve
from budgetvlm.controller.run_directory import open_output
from budgetvlm.controller.versions import (
    candidate_of,
    keep_version,
    note_version,
    promote,
    rollback,
    serving_version,
    version_path,
    versions_of,
)  # fmt: skip
from budgetvlm.errors import CheckpointError, ConfigError, KnobSpaceError, OutputError
from budgetvlm.vlm.loading import bundled_controller

KNOBS = {"max_crops": [1, 4], "top_k": [2, 8]}


def written(directory, price, *, curve=True, checkpoint=True, knobs=KNOBS):
    """A controller that is known by its price, with all files or without some."""
    made = GRPOController(3, 2, budget_dim=4, hidden_dim=8, knob_values=knobs, default_price=price)
    directory.mkdir(exist_ok=True)
    if checkpoint:
        write_checkpoint(directory / BEST, controller_document(made))
    made.save_pretrained(directory)
    if curve:
        PriceCurve((AtPrice(price, 9.0, 0.1, 0.5, 0.01),), 10).save(directory)
    return directory


@pytest.fixture
def directory(tmp_path):
    made = written(tmp_path / "controller", 0.25)
    write_json(made / GUARD, {"planted": True})
    return made


@pytest.fixture
def better(tmp_path):
    return written(tmp_path / "better", 0.5)


def price_of(directory):
    return float(load_controller(directory).default_price)


def told(directory):
    return [(version.number, version.status, version.parent, version.replaces) for version in versions_of(directory)]


def test_what_serves_is_kept_with_the_first_candidate_and_goes_on_serving(directory, better):
    assert (versions_of(directory), serving_version(directory), candidate_of(directory)) == ([], None, None)
    assert keep_version(directory, better, {"trained_on": {"scores": 300}, "why": "first"}) == 2
    assert told(directory) == [(1, "serving", None, None), (2, "candidate", 1, None)]
    assert (price_of(directory), price_of(version_path(directory, 1)), price_of(version_path(directory, 2))) == (
        0.25, 0.25, 0.5,
    )  # fmt: skip
    candidate = candidate_of(directory)
    assert (candidate.number, candidate.trained_on, candidate.why) == (2, {"scores": 300}, "first")
    assert read_json(version_path(directory, 2) / GUARD) == {"planted": True}, "a version is a whole controller"


def test_promoted_and_taken_back(directory, better):
    keep_version(directory, better, {})
    note_version(directory, 2, judged={"gain": 0.02})
    promote(directory, 2, "it gains 0.02")
    assert told(directory) == [(1, "replaced", None, None), (2, "serving", 1, 1)]
    assert (price_of(directory), load_price_curve(directory).points[0].price) == (0.5, 0.5)
    assert versions_of(directory)[1].why == "it gains 0.02" and versions_of(directory)[1].judged == {"gain": 0.02}
    assert rollback(directory) == 1
    assert told(directory) == [(1, "serving", None, None), (2, "refused", 1, 1)]
    assert (price_of(directory), load_price_curve(directory).points[0].price) == (0.25, 0.25)
    with pytest.raises(ConfigError, match="nothing before it"):
        rollback(directory)
    assert keep_version(directory, better, {}) == 3
    promote(directory, 3)
    assert [version.replaces for version in versions_of(directory)] == [None, 1, 1]
    assert read_json(directory / GUARD) == {"planted": True}


def test_controllers_with_other_files_take_each_others_place(directory, tmp_path):
    bare = written(tmp_path / "bare", 0.75, curve=False, checkpoint=False)
    keep_version(directory, bare, {})
    promote(directory, 2)
    assert price_of(directory) == 0.75 and load_price_curve(directory) is None
    assert serving_version(directory) == 2
    assert all(path.exists() for path in directory.rglob("*")), "a link leads nowhere"
    rollback(directory)
    assert price_of(directory) == 0.25 and load_price_curve(directory) is not None
    keep_version(bare, directory, {})
    promote(bare, 2)
    assert price_of(bare) == 0.25 and load_price_curve(bare) is not None


def test_what_was_changed_by_hand_is_a_version_of_its_own(directory, better):
    keep_version(directory, better, {})
    promote(directory, 2)
    set_default_price(load_controller(directory), 1.0, directory)
    assert serving_version(directory) is None and price_of(version_path(directory, 2)) == 0.5
    keep_version(directory, better, {})
    assert told(directory)[1:] == [(2, "replaced", 1, 1), (3, "serving", None, None), (4, "candidate", 3, None)]
    promote(directory, 4)
    rollback(directory)
    assert price_of(directory) == 1.0


def test_at_most_one_candidate_is_to_prove_itself(directory, better):
    keep_version(directory, better, {})
    keep_version(directory, better, {})
    assert told(directory)[1:] == [(2, "refused", 1, None), (3, "candidate", 1, None)]
    note_version(directory, 3, status="refused", why="it loses")
    assert candidate_of(directory) is None
    assert [version.why for version in versions_of(directory)[1:]] == [
        "version 3 came before it had proved itself",
        "it loses",
    ]


def test_refused_versions_make_room_but_those_that_are_needed_stay(directory, better, monkeypatch):
    monkeypatch.setattr(versions, "MOST_REFUSED", 2)
    for _ in range(6):
        keep_version(directory, better, {})
    assert [version.number for version in versions_of(directory)] == [1, 5, 6, 7]
    promote(directory, 7)
    rollback(directory)
    promote(directory, 6)
    for _ in range(4):
        keep_version(directory, better, {})
    assert [version.number for version in versions_of(directory)] == [1, 6, 9, 10, 11]
    assert rollback(directory) == 1


def test_what_cannot_be_is_refused_and_changes_nothing(directory, better, tmp_path):
    with pytest.raises(ConfigError, match="keeps no versions yet"):
        rollback(directory)
    with pytest.raises(ConfigError, match="keeps no version 3; it keeps none"):
        promote(directory, 3)
    with pytest.raises(KnobSpaceError, match="other"):
        keep_version(directory, written(tmp_path / "other", 0.5, knobs={"top_k": [2, 8]}), {})
    with pytest.raises(CheckpointError):
        keep_version(directory, tmp_path, {})
    assert not (directory / "versions").exists()
    keep_version(directory, better, {})
    (version_path(directory, 2) / BEST).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        promote(directory, 2)
    assert serving_version(directory) == 1 and price_of(directory) == 0.25
    with pytest.raises(OutputError, match="belongs to this package"):
        keep_version(bundled_controller("reference"), bundled_controller("reference"), {})


def test_training_anew_forgets_the_versions_of_what_was_there(directory, better):
    keep_version(directory, better, {})
    promote(directory, 2)
    open_output(directory, overwrite=True)
    assert not (directory / "versions").exists() and not (directory / BEST).is_symlink()


def test_a_copy_of_the_directory_is_the_controller_too(directory, better, tmp_path):
    keep_version(directory, better, {})
    promote(directory, 2)
    for number, links in enumerate((True, False)):
        copy = shutil.copytree(directory, tmp_path / f"copy{number}", symlinks=links)
        shutil.rmtree(copy / "versions" / "0001")
        assert price_of(copy) == 0.5


# ---- ends of the process


STEP = 5  # operations; one finds no more and takes five times as long


def changes(directory, better):
    """Everything that changes what serves."""
    keep_version(directory, better, {})
    promote(directory, 2)
    rollback(directory)


def in_child(work):
    """Run something in a process of its own and return its number."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def is_whole(directory):
    """One of both controllers serves, with its own curve, and the versions go on from there."""
    price = price_of(directory)
    assert price in (0.25, 0.5) and load_price_curve(directory).points[0].price == price
    found = versions_of(directory)
    assert [version.status for version in found].count("serving") <= 1
    for version in found:
        load_controller(version_path(directory, version.number))
    return price


def test_killed_before_an_operation_on_files_the_old_or_the_new_one_is_whole(directory, better, tmp_path, monkeypatch):
    """Each run gets some operations further; prices that served are the old, the new and again the old one's."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # the machine goes on
    served, last = [], False
    while not last:
        place = shutil.copytree(directory, tmp_path / "run", symlinks=True)
        pipe, least = os.pipe(), STEP * len(served)

        def work(place=place, pipe=pipe, least=least):
            count = 0

            def ends(event, given):
                nonlocal count
                if event.startswith(("os.", "shutil.")) or (event == "open" and "w" in str(given[1])):
                    if count == least:
                        os._exit(9)
                    count += 1

            sys.addaudithook(ends)
            changes(place, better)
            os.write(pipe[1], b"done")

        os.waitpid(in_child(work), 0)
        os.close(pipe[1])
        last = os.read(pipe[0], 4) == b"done"
        os.close(pipe[0])
        served.append(is_whole(place))
        keep_version(place, better, {})
        promote(place, versions_of(place)[-1].number)
        assert price_of(place) == 0.5 and not list((place / "versions").glob(".*.tmp"))
        shutil.rmtree(place)
    assert STEP * len(served) > 80
    assert [price for n, price in enumerate(served) if not n or served[n - 1] != price] == [0.25, 0.5, 0.25]


def test_a_version_that_is_half_removed_is_none(directory, better, monkeypatch):
    monkeypatch.setattr(versions, "MOST_REFUSED", 1)
    for _ in range(3):
        keep_version(directory, better, {})

    def half(path, **options):
        if (path / versions.ABOUT).exists():
            (path / versions.ABOUT).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        keep_version(directory, better, {})
    monkeypatch.undo()
    assert [number for number, *_ in told(directory)] == [1, 4, 5]
    keep_version(directory, better, {})
    assert not list((directory / "versions").glob(".*.tmp"))


def test_two_that_change_the_versions_take_turns(directory, better):
    children = [in_child(lambda: [keep_version(directory, better, {}) for _ in range(3)]) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert [version.number for version in versions_of(directory)] == [*range(1, 8)]
    assert [version.status for version in versions_of(directory)].count("candidate") == 1


# ---- the command


def test_the_command_lists_promotes_and_takes_back(directory, better, capsys):
    def versions_command(*words):
        assert cli.main(["versions", *words, "--checkpoint", str(directory)]) == 0
        return capsys.readouterr().out

    assert "no version is kept yet" in versions_command("list")
    keep_version(directory, better, {"trained_on": {"scores": 300}})
    assert "version 1 serves" in versions_command("list")
    assert "version 2 serves" in versions_command("promote", "2")
    document = json.loads(versions_command("list", "--json"))
    assert document["serving"] == 2 and [one["why"] for one in document["versions"]][1] == "by hand"
    text = versions_command("compare", "1", "2")
    assert "trained on 300 scores" in text and text.count("budgetvlm evaluate") == 2
    text = versions_command("rollback", "--why", "it was slower")
    assert "version 1 serves" in text and "reads the controller anew" in text
    assert [version.why for version in versions_of(directory)] == [
        "it serves again, since version 2 was taken back", "it was slower",
    ]  # fmt: skip
    assert "it was slower" in versions_command("list")
    assert cli.main(["versions", "promote", "7", "--checkpoint", str(directory)]) == 2
    assert "keeps no version 7; it keeps 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("versions", "list"), ("update", "--requests", "requests.sqlite")])
@pytest.mark.parametrize(
    ("place", "said"),
    [("nowhere", "does not exist|is no directory"), (BEST, "is no directory"), ("versions/0002", "is a version")],
)
def test_what_can_keep_no_versions_is_refused_before_anything_is_done(directory, better, capsys, command, place, said):
    keep_version(directory, better, {})
    assert cli.main([*command, "--checkpoint", str(directory / place)]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (directory / "versions" / "0002" / "versions").exists()


def test_a_place_without_a_controller_has_no_versions(tmp_path, capsys):
    assert cli.main(["versions", "list", "--checkpoint", str(tmp_path)]) == 2
    assert "holds no controller" in capsys.readouterr().err


def test_a_version_says_what_it_learnt_from_and_how_it_was_judged(directory, better, capsys):
    known = {"scores": 30, "source": "feedback", "requests": 40, "first_at_s": 0.0, "last_at_s": 86400.0}
    judged = {"scores": 80, "gain": 0.1, "low": -0.05, "high": 0.25}
    keep_version(directory, better, {"trained_on": known, "judged": judged})
    assert cli.main(["versions", "list", "--checkpoint", str(directory)]) == 0
    said = capsys.readouterr().out
    assert "trained on 30 scores (feedback) of 40 requests, 1970-01-0" in said
    assert "judged by 80 scores of its trial: gain +10.0 points [-5.0, +25.0]" in said
