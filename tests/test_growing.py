"""Profiles of a share of the cells, and profiles that grow: what is new is measured, the rest is kept."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sweeps import SPACE, FakeTask, FakeVLM, Stopped, StopsAfter, accuracy, latency, list_results

from budgetvlm.errors import ConfigError, OutputError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.profiling.measure import accuracy_sweep
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.cell_selection import Work, by_tiling, chances, measured_in_full, plan_cells
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
    others = len(found) - len(tested)
    assert 0.2 * 10 * K < others < 0.5 * 10 * K
    assert {setting for setting, name in found if name.startswith("train")} == set(map(str, SPACE.settings))
    (line,) = [line for line in said if "measuring" in line]
    assert f"all {K} settings of 6 test samples" in line and f"{others} of {10 * K} cells (sample, setting)" in line
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
def test_a_stopped_sweep_of_a_share_goes_on_and_measures_the_same_cells(tmp_path, calls):
    second = FakeVLM()
    with pytest.raises(Stopped):
        accuracy(tmp_path / "cut", StopsAfter(calls), cells=0.3)
    accuracy(tmp_path / "cut", second, cells=0.3)
    accuracy(tmp_path / "whole", cells=0.3)
    found = cells_of(tmp_path / "cut")
    assert found == cells_of(tmp_path / "whole")
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
    assert grown.keys() == fresh.keys() if kind == "accuracy" else len(grown) == pytest.approx(len(fresh), abs=3)
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
    [(0.0, "above 0"), (1.2, "above 0"), (0.05, r"leaves some settings without a measurement\. Give 0\.\d+ or more")],
)
def test_a_share_of_cells_that_cannot_work(tmp_path, cells, message):
    with pytest.raises(ConfigError, match=message):
        accuracy(tmp_path, cells=cells)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_the_least_share_that_is_named_works(tmp_path, splits):
    with pytest.raises(ConfigError) as refused:
        accuracy(tmp_path, cells=0.01, splits=splits)
    accuracy(tmp_path, cells=float(re.search(r"Give (\S+) or more", str(refused.value))[1]), splits=splits)


def work(encoding, answers):
    return Work(np.array(encoding, dtype=float), np.array(answers, dtype=float))


def test_settings_that_share_nothing_are_drawn_by_the_root_of_their_cost():
    """By hand: 2x of the setting that costs 1 and x of the one that costs 4 are 6x, and 0.3 of all is 1.5."""
    tilings, answers = chances(0.3, [np.array([0]), np.array([1])], work([0, 0], [1, 4]))
    np.testing.assert_allclose(tilings * answers, [0.5, 0.25], rtol=1e-5)
    tilings, answers = chances(0.8, [np.array([0]), np.array([1])], work([0, 0], [1, 4]))
    np.testing.assert_allclose(tilings * answers, [1, 0.75], rtol=1e-5)


def test_where_answers_cost_next_to_nothing_a_share_of_the_samples_is_answered_at_all_settings():
    tilings, answers = chances(0.2, [np.arange(3)], work([100] * 3, [1e-6] * 3))
    np.testing.assert_allclose(tilings, 0.2, rtol=1e-4)
    np.testing.assert_allclose(answers, 1)


GRID = KnobSpace({"max_crops": [1, 4, 12], "top_k": [1, 2], "num_active_blocks": [2, 4, 8]})
TILES = GRID.value_matrix[:, 0]
GRID_WORK = work(16 * TILES, (16 * TILES + 20) * GRID.value_matrix[:, 2] / 8)


@pytest.mark.parametrize("cells", [0.05, 0.2, 0.6, 0.9])
def test_a_share_of_the_cells_is_that_share_of_the_work(cells):
    samples = places(4000)
    plan = plan_cells([*samples, *places(1, "test")], GRID.settings, cells, GRID_WORK)
    assert plan[-1].all()
    cost = (plan[:-1] * GRID_WORK.answers).sum()
    for group in by_tiling(GRID.settings):
        cost += plan[:-1][:, group].any(axis=1).sum() * GRID_WORK.encoding[group[0]]
    whole = GRID_WORK.answers.sum() + 16 * (1 + 4 + 12)
    assert cost / len(samples) / whole == pytest.approx(cells, rel=0.1 if cells < 0.1 else 0.03)
    drawn, expected = plan[:-1].mean(axis=0), np.prod(chances(cells, by_tiling(GRID.settings), GRID_WORK), axis=0)
    np.testing.assert_allclose(drawn, expected, atol=4 * 0.5 / len(samples) ** 0.5)
    assert (np.diff(drawn.reshape(3, -1), axis=0) <= 0.03).all()  # the dearer the tiling, the fewer


def test_a_tiling_that_is_encoded_is_asked_at_several_settings():
    plan = plan_cells([*places(500), *places(1, "test")], GRID.settings, 0.2, GRID_WORK)[:-1]
    of_dearest = plan[:, by_tiling(GRID.settings)[-1]].sum(axis=1)
    assert of_dearest[of_dearest > 0].mean() > 2 and (of_dearest == 0).mean() > 0.4


@pytest.mark.parametrize("count", [8, 12, 20, 40])
def test_chance_leaves_no_setting_out_and_a_larger_share_holds_a_smaller_one(count):
    samples = [*places(count), *places(1, "test")]
    plans = [plan_cells(samples, SPACE.settings, cells, work([0] * K, range(1, K + 1))) for cells in (0.2, 0.3, 0.7)]
    assert all(plan[:-1].any(axis=0).all() for plan in plans)
    assert (plans[0] <= plans[1]).all() and (plans[1] <= plans[2]).all()


def test_draws_depend_on_names_alone():
    some, more = places(50), [*places(10, "test"), *places(80)]
    few = plan_cells([*some, *places(1, "test")], GRID.settings, 0.2, GRID_WORK)[:-1]
    many = plan_cells(more, GRID.settings, 0.2, GRID_WORK)[10:60]
    np.testing.assert_array_equal(few, many)


class EncodingVLM(FakeVLM):
    """Can part encoding from answering; every encoded image is written down."""

    encoded: list[tuple[int, int]]

    def encode_tiles(self, images, max_crops=None):
        self.encoded = [*getattr(self, "encoded", ()), *((max_crops, image.getpixel((0, 0))[0]) for image in images)]
        return [torch.zeros(1)] * len(images)

    def generate_batch(self, *asked, visual, **more):
        assert len(visual) == len(asked[0])
        return super().generate_batch(*asked, **more)


def test_images_are_encoded_at_the_tilings_that_their_samples_are_asked_at_and_once(tmp_path):
    vlm = EncodingVLM()
    accuracy(tmp_path, vlm, cells=0.3, splits=("train",))
    asked = {(SPACE.setting(**dict(result.knobs))["max_crops"], int(record.sample_id.split("-")[1]))
             for result in list_results(tmp_path, "fake_task", "accuracy") for record in result.records}  # fmt: skip
    assert len(vlm.encoded) == len(set(vlm.encoded)) and set(vlm.encoded) == asked
    assert sum(crops == 4 for crops, _ in asked) < sum(crops == 1 for crops, _ in asked)


@pytest.mark.parametrize("cells", [0.3, 1.0])
def test_the_bar_ends_at_its_total(tmp_path, monkeypatch, cells):
    bars = []

    class Bar(accuracy_sweep.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            bars.append(self)

    monkeypatch.setattr(accuracy_sweep, "tqdm", Bar)
    accuracy(tmp_path, num_samples=(5, 2), cells=0.3)
    with pytest.raises(Stopped):
        accuracy(tmp_path, StopsAfter(25), cells=cells)
    accuracy(tmp_path, cells=cells)
    assert [bar.n == bar.total for bar in bars] == [True, False, True]
    assert bars[1].initial > 0 and bars[2].initial > 0


def test_groups_that_are_named_are_measured_in_full_together_also_later(tmp_path):
    accuracy(tmp_path, cells=0.3, splits=("train",))
    earlier = cells_of(tmp_path)
    accuracy(tmp_path, cells=0.3, splits=("train",), groups="kind")
    assert earlier.items() <= cells_of(tmp_path).items()
    found = [name for _, name in cells_of(tmp_path)]
    in_full = {name for name in found if found.count(name) == K}
    assert in_full >= {f"train-{i}" for i in range(0, 10, 2)} or in_full >= {f"train-{i}" for i in range(1, 10, 2)}
    with pytest.raises(ConfigError, match="cannot be grouped by 'page': the labels are kind, image_id, split"):
        accuracy(tmp_path / "other", cells=0.3, splits=("train",), groups="page")


def test_which_samples_are_measured_in_full():
    assert measured_in_full([*places(4), *places(2, "test")]).tolist() == [False] * 4 + [True] * 2
    alone = measured_in_full(places(40, per_image=2))
    assert alone.sum() == 8 and (alone[::2] == alone[1::2]).all()
    both = measured_in_full([*places(10), *places(10, "validation")])
    assert not both[:10].any() and both[10:].sum() == 5


def test_settings_are_parted_by_their_tiles():
    assert [{SPACE.settings[k]["max_crops"] for k in group} for group in by_tiling(SPACE.settings)] == [{1}, {4}]
    assert [group.tolist() for group in by_tiling(KnobSpace({"num_active_blocks": [1, 2, 4]}).settings)] == [[0, 1, 2]]
