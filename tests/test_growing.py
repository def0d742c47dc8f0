"""Profiles of a share of the cells, and profiles that grow: what is new is measured, the rest is kept."""

from dataclasses import replace

import numpy as np
import pytest
from test_sweeps import SPACE, FakeTask, FakeVLM, Stopped, StopsAfter, accuracy, latency, list_results

from budgetvlm.errors import ConfigError, OutputError
from budgetvlm.knobs import KnobSpace, Setting, is_drawn
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.cell_selection import CellSelection, measured_in_full, stages_of
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.tasks import Sample, SplitSample

K = len(SPACE)


def cells_of(directory, kind="accuracy"):
    """(setting, sample id) -> record of all result files."""
    read = list_results(directory, "fake_task", kind)
    return {
        (str(Setting(tuple(result.knobs.items()))), record.sample_id): record
        for result in read
        for record in result.records
    }


def places(count, split="train", per_image=1):
    return [
        SplitSample(Sample(f"{split}-{i}", f"{split} image {i // per_image}", "q", ("1",), None, {}), split)
        for i in range(count)
    ]


def test_test_samples_are_measured_in_full_and_a_share_of_the_others(tmp_path):
    vlm, said = FakeVLM(), []
    accuracy(tmp_path, vlm, cells=0.3, say=said.append)
    found = cells_of(tmp_path)
    assert len(found) == len(vlm.calls)
    tested = [cell for cell in found if cell[1].startswith("test")]
    assert len(tested) == 6 * K
    assert len(found) - len(tested) == pytest.approx(0.3 * 10 * K, abs=2)
    assert {setting for setting, name in found if name.startswith("train")} == set(map(str, SPACE.settings))
    assert any("all of 6 test samples" in line and "30% of 10 others" in line for line in said)
    whole = tmp_path / "whole"
    accuracy(whole)
    assert all(cells_of(whole)[cell] == record for cell, record in found.items())


def test_without_a_test_split_some_images_are_measured_in_full(tmp_path):
    accuracy(tmp_path, cells=0.3, splits=("train",))
    found = [name for _, name in cells_of(tmp_path)]
    in_full = {name for name in found if found.count(name) == K}
    assert in_full == {"train-8", "train-9"} or len(in_full) == 2  # both questions of one image in five
    assert len({int(name.split("-")[1]) // 2 for name in in_full}) == 1


@pytest.mark.parametrize("calls", [3, 40, 70])
def test_a_stopped_sweep_of_a_share_goes_on_and_measures_as_many_cells(tmp_path, calls):
    second, whole = FakeVLM(), FakeVLM()
    with pytest.raises(Stopped):
        accuracy(tmp_path / "cut", StopsAfter(calls), cells=0.3)
    accuracy(tmp_path / "cut", second, cells=0.3)
    accuracy(tmp_path / "whole", whole, cells=0.3)
    found = cells_of(tmp_path / "cut")
    assert len(found) == pytest.approx(len(whole.calls), abs=2)
    assert len(found) - calls <= len(second.calls) <= len(found) - calls + 4  # the batch that was under way


GROWTH = {
    "more samples": ({"num_samples": (4, 2)}, {"num_samples": (8, 5)}),
    "all samples": ({"num_samples": (4, 2)}, {}),
    "more splits": ({"splits": ("train",)}, {"splits": ("train", "test")}),
    "more settings": ({"settings": SPACE.settings[:3]}, {}),
    "more of both": ({"num_samples": (4, 2), "settings": SPACE.settings[2:5]}, {"num_samples": (8, 5)}),
    "more cells": ({"cells": 0.3}, {"cells": 0.6}),
    "all cells": ({"cells": 0.3}, {}),
    "more cells of more": ({"cells": 0.3, "num_samples": (5, 2)}, {"cells": 0.6}),
}


@pytest.mark.parametrize("kind", ["accuracy", "latency"])
@pytest.mark.parametrize("growth", GROWTH)
def test_a_profile_grows_by_what_is_new(tmp_path, kind, growth):
    sweep = {"accuracy": accuracy, "latency": latency}[kind]
    before, after = GROWTH[growth]
    more = {"repeats": 1} if kind == "latency" else {}
    sweep(tmp_path / "grown", **before, **more)
    earlier = cells_of(tmp_path / "grown", kind)
    vlm, said = FakeVLM(), []
    sweep(tmp_path / "grown", vlm, say=said.append, **after, **more)
    sweep(tmp_path / "fresh", **after, **more)
    grown, fresh = cells_of(tmp_path / "grown", kind), cells_of(tmp_path / "fresh", kind)
    assert earlier.items() <= grown.items()
    assert len(vlm.calls) == len(grown) - len(earlier)
    assert len(grown) == pytest.approx(len(fresh), abs=3 if "cells" in after else 0)
    assert any("keeping" in line for line in said) or growth == "more settings"
    again = FakeVLM()
    sweep(tmp_path / "grown", again, **after, **more)
    assert again.calls == []


def test_a_profile_that_grew_is_the_profile_that_was_made_at_once(tmp_path):
    accuracy(tmp_path / "grown", num_samples=(4, 2), settings=SPACE.settings[1:4])
    accuracy(tmp_path / "grown")
    accuracy(tmp_path / "fresh")
    files = sorted(path.relative_to(tmp_path / "fresh") for path in (tmp_path / "fresh").rglob("*.json"))
    assert all((tmp_path / "grown" / f).read_bytes() == (tmp_path / "fresh" / f).read_bytes() for f in files)


def test_more_repeats_are_measured_and_the_median_is_of_all(tmp_path):
    latency(tmp_path, repeats=1)
    first = cells_of(tmp_path, "latency")
    vlm = FakeVLM()
    latency(tmp_path, vlm, repeats=3)
    assert len(vlm.calls) == 2 * len(first)
    for cell, record in cells_of(tmp_path, "latency").items():
        totals = [run["T_total_ms"] for run in record.runs]
        assert len(totals) == 3 and totals[0] == first[cell].T_total_ms
        assert record.T_total_ms == sorted(totals)[1]


def test_growth_that_was_stopped_goes_on(tmp_path):
    accuracy(tmp_path, num_samples=(4, 2))
    with pytest.raises(Stopped):
        accuracy(tmp_path, StopsAfter(30))
    vlm = FakeVLM()
    accuracy(tmp_path, vlm)
    assert len(vlm.calls) <= 16 * K - 6 * K - 26
    assert len(cells_of(tmp_path)) == 16 * K


def test_an_unfinished_sweep_grows(tmp_path):
    with pytest.raises(Stopped):
        accuracy(tmp_path, StopsAfter(30), num_samples=(4, 2))
    vlm = FakeVLM()
    accuracy(tmp_path, vlm)
    assert len(vlm.calls) <= 16 * K - 26
    assert len(cells_of(tmp_path)) == 16 * K


class OtherQuestions(FakeTask):
    """The same ids with other questions."""

    def samples(self, split, num_samples=None, seed=0):
        for sample in super().samples(split, num_samples, seed):
            yield replace(sample, question=f"other {sample.question}")


@pytest.mark.parametrize("finished", [True, False])
def test_what_was_measured_of_other_samples_is_not_kept(tmp_path, finished):
    few = SweepOptions(("train",), tmp_path, (4,))
    if finished:
        profile_accuracy(FakeVLM(), FakeTask(), SPACE.settings, few, say=lambda line: None)
    else:
        with pytest.raises(Stopped):
            profile_accuracy(StopsAfter(9), FakeTask(), SPACE.settings, few, batch_size=2, say=lambda line: None)
    with pytest.raises(OutputError, match="made with other"):
        profile_accuracy(FakeVLM(), OtherQuestions(), SPACE.settings, replace(few, num_samples=None))


@pytest.mark.parametrize(
    ("sweep", "more", "less", "named"),
    [
        (accuracy, {"num_samples": (8, 4)}, {"num_samples": (4, 2)}, "num_samples"),
        (accuracy, {}, {"cells": 0.5}, "cells"),
        (latency, {"repeats": 3}, {"repeats": 2}, "repeats"),
    ],
)
def test_a_profile_does_not_shrink(tmp_path, sweep, more, less, named):
    sweep(tmp_path, **more)
    with pytest.raises(OutputError, match=f"other .*{named}"):
        sweep(tmp_path, **less)


@pytest.mark.parametrize(
    ("cells", "message"),
    [(0.0, "above 0"), (1.2, "above 0"), (0.05, r"leaves some settings without a measurement\. Give 0\.1 or more")],
)
def test_a_share_of_cells_that_cannot_work(tmp_path, cells, message):
    with pytest.raises(ConfigError, match=message):
        accuracy(tmp_path, cells=cells)
    assert not list(tmp_path.iterdir())


LINE = KnobSpace({"max_crops": [1, 2, 3, 4, 5]})


def chosen_of(scores, stages, cells):
    """What is chosen of samples with these scores at the last stage, without the random part."""
    samples, known = [*places(len(scores)), *places(1, "test")], np.vstack([scores, [np.nan] * 5])
    selection = CellSelection(LINE, samples, known, cells, stages)
    selection.drawn[:] = False
    return selection.choose(list(range(len(scores))), len(stages) - 1)


def test_between_outcomes_that_differ_more_is_measured_than_between_those_that_agree():
    nan = np.nan
    scores = np.array([[0, nan, nan, nan, 1], [1, nan, nan, nan, 1], [0, nan, nan, nan, 0]] * 20)
    chosen = chosen_of(scores, [[0, 4], [1, 2, 3]], cells=0.6)
    per_kind = chosen.reshape(20, 3, 5).sum(axis=(0, 2))
    assert chosen.sum() == 60
    assert per_kind[0] > 1.3 * per_kind[1] and per_kind[0] > 1.3 * per_kind[2]


def test_settings_are_taken_about_equally_often_and_nothing_twice():
    scores = np.full((60, 5), np.nan)
    scores[:, 2] = np.arange(60) % 2
    chosen = chosen_of(scores, [[0, 1, 2, 3, 4]], cells=0.4)
    taken = chosen.sum(axis=0)
    assert taken[2] == 0 and chosen.sum() == 60
    assert taken[[0, 1, 3, 4]].min() >= 10


def test_the_random_part_is_random_and_always_the_same():
    names = [f"sample {i}" for i in range(20_000)]
    drawn = [is_drawn(name, "max_crops=1") for name in names]
    assert np.mean(drawn) == pytest.approx(0.03, abs=0.005)
    assert drawn == [is_drawn(name, "max_crops=1") for name in names]
    assert drawn != [is_drawn(name, "max_crops=2") for name in names]


def test_which_samples_are_measured_in_full():
    assert measured_in_full([*places(4), *places(2, "test")]).tolist() == [False] * 4 + [True] * 2
    alone = measured_in_full(places(40, per_image=2))
    assert alone.sum() == 8 and (alone[::2] == alone[1::2]).all()
    both = measured_in_full([*places(10), *places(10, "validation")])
    assert not both[:10].any() and both[10:].sum() == 5


def test_stages_share_their_tiles_or_follow_the_complexity():
    by_tiles = stages_of(SPACE, SPACE.settings, 0.2)
    assert [{setting["max_crops"] for setting in stage} for stage in by_tiles] == [{1}, {4}]
    assert stages_of(SPACE, SPACE.settings, 1.0) == by_tiles
    plain = KnobSpace({"num_active_blocks": [1, 2, 4, 8]})
    parts = stages_of(plain, plain.settings[::-1], 0.5)
    assert [[setting["num_active_blocks"] for setting in stage] for stage in parts] == [[1, 2], [4], [8]]
    assert len(stages_of(plain, plain.settings, 1.0)) == 1
