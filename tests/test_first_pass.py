"""The first pass as a benchmark: what is left after it, what it costs, where it is worth starting with one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from budgetvlm.controller.training_options import GRPOConfig, TrainingConfig
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.features import Features
from budgetvlm.guard.static import StaticGuard
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import first_pass  # noqa: E402
from confidences import COMMON, confidences, listening  # noqa: E402
from two_steps import DECISION_MS, Material, rest_of, start_where, two_steps  # noqa: E402


def table_of(count: int, crops: tuple[int, ...] = (1, 4)) -> ProfileTable:
    """Image 5 or 15 ms (prepared in 1 of them), language 4 or 20 ms, half of it decoding."""
    space = KnobSpace({"max_crops": crops, "num_active_blocks": [2, 8]})
    image, language = np.array([5.0, 5.0, 15.0, 15.0]), np.array([4.0, 20.0, 4.0, 20.0])
    stages = {"preprocess": image * 0 + 1, "vision": image - 1, "prefill": language / 2, "decode": language / 2}
    stages = {name: np.tile(values, (count, 1)) for name, values in stages.items()}
    right = np.tile([0.0, 1.0, 0.0, 1.0], (count, 1))
    sides = ["train", "train", "validation", "test"]
    return ProfileTable.from_arrays(
        space, range(count), right, sum(stages.values()), stages_ms=stages,
        split=[sides[row % 4] for row in range(count)],
        groups={"image_id": range(count), "kind": ["a"] * count, "difficulty": ["b"] * count},
    )  # fmt: skip


def test_the_overview_is_encoded_once_and_the_language_model_runs_twice() -> None:
    rest = rest_of(table_of(4), 0)
    assert rest.latency_ms[0] == pytest.approx(np.array([0, 20, 10 + 4, 10 + 20]) + DECISION_MS)


def test_all_tiles_are_reused_where_the_second_pass_sees_the_same() -> None:
    rest = rest_of(table_of(4), 2)  # 15 ms image, 4 ms language
    assert rest.latency_ms[0] == pytest.approx(np.array([4, 20, 0, 20]) + DECISION_MS)


def test_without_an_overview_another_tiling_is_encoded_anew() -> None:
    rest = rest_of(table_of(4, crops=(2, 4)), 0)
    assert rest.latency_ms[0] == pytest.approx(np.array([0, 20, 15 + 4, 15 + 20]) + DECISION_MS)


def material(count: int, budget_shares: tuple[float, ...] = (1.0,), directory: Path = Path("unused")) -> Material:
    table = table_of(count)
    features = Features(table.sample_ids, np.ones((count, 1)), np.arange(count)[:, None])
    options = EvaluationOptions(budget_shares=budget_shares, prices=(0.0,))
    return Material(table, 0, features, features, features, options, directory)


def test_both_ways_are_charged_in_full() -> None:
    both = material(4).both
    answered, gone_on = 9 + DECISION_MS, 9 + 20 + DECISION_MS
    assert both.latency_ms[0, [0, 1]] == pytest.approx([answered, gone_on])
    assert both.latency_ms[0, 4:].tolist() == [9, 25, 19, 35]
    assert both.accuracy[0].tolist() == [0, 1, 0, 1] * 2


def test_folds_part_the_training_images_alone() -> None:
    work = material(24)
    assert set(work.fold[work.split("train")]) == {0, 1, 2}
    assert set(work.fold[~work.split("train")]) == {-1}


def always_choosing(setting: int, table: ProfileTable) -> Any:
    """A step that chooses one setting, whatever it is asked."""
    return SimpleNamespace(
        choose=lambda budget_ms, price: np.full(len(table), setting),
        values=lambda budget_ms, price: np.ones((len(table), 4)),
        guard=StaticGuard.fit_table(table),
    )


def test_a_pass_is_started_where_it_pays_and_the_budget_allows_it() -> None:
    work = material(40, budget_shares=(9 / 35, 1.0))
    wrong_at_once, right_in_the_end = always_choosing(2, work.table), always_choosing(1, work.rest)
    some, always = two_steps(work, wrong_at_once, right_in_the_end)
    tight, wide = (context for context in work.contexts if context[1] == work.options.price)
    assert set(some[wide]) == set(always[wide]) == {1}
    assert set(some[tight]) == set(always[tight]) == {4 + 2}  # 9 ms leave no time to decide again


def test_a_pass_that_gains_nothing_is_not_started() -> None:
    work = material(40)
    some, always = two_steps(work, always_choosing(1, work.table), always_choosing(1, work.rest))
    assert set(some[work.contexts[0]]) == {4 + 1} and set(always[work.contexts[0]]) == {1}


def test_a_start_is_picked_by_what_it_gains() -> None:
    seen, half = np.linspace(-1, 1, 400)[:, None], np.arange(400) % 2 == 0
    assert not start_where(np.full(400, -0.1), seen, half, half).any()
    assert start_where(np.full(400, 0.1), seen, half, half).all()
    assert start_where(seen[:, 0], seen, half, half).tolist() == (seen[:, 0] > 0).tolist()


def test_confidences_of_two_answers_worked_out_by_hand() -> None:
    sure = {"steps": [[-0.5, 2.0, 1.0], [-0.25, 3.0, 0.5]], "token_ids": [7, 2]}
    short = {"steps": [[-1.0, 0.5, 2.0]], "token_ids": [2]}
    found = confidences([sure] * COMMON + [short], np.ones(COMMON + 1, dtype=bool))
    log_probs, probabilities = [-0.5, -0.25, 0, 0], [np.exp(-0.5), np.exp(-0.25), 0, 0]
    margins, entropies, whole = [2, 3, 0, 0], [1, 0.5, 0, 0], [-0.375, -0.5, np.exp(-0.5), 1, 2]
    answer = [1, 1, 1, 1]  # token 7 first, token 2 second, nothing third, nothing fourth: each common in its place
    assert found[0] == pytest.approx([*log_probs, *probabilities, *margins, *entropies, *whole, *answer])
    assert found[-1][-4:].tolist() == [0, 0, 1, 1]


def test_the_head_is_listened_to_and_put_back() -> None:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden.log()

    vlm = SimpleNamespace(decoder=SimpleNamespace(head=head))
    with listening(vlm) as listener:
        vlm.decoder.head(torch.tensor([[0.5, 0.25, 0.25]]))
    assert vlm.decoder.head is head
    entropy = 0.5 * np.log(2) + 0.5 * np.log(4)
    assert listener.steps[0][0].tolist() == pytest.approx([np.log(0.5), np.log(2), entropy])


def test_where_going_straight_is_always_right_no_pass_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = partial(TrainingConfig, teachers=0, grpo=GRPOConfig(num_epochs=1))
    monkeypatch.setattr("two_steps.TrainingConfig", short)
    work = material(24, (0.3, 1.0), tmp_path)
    found = first_pass.compare(work, [0])
    rows = {row["name"]: row for row in found["rows"]}
    one, two, always = (rows[name] for name in (first_pass.ONE, first_pass.TWO, first_pass.ALWAYS))
    assert [at.value for at in one["accuracy"]] == [at.value for at in two["accuracy"]] == [0, 1]
    assert two["passes"] == [0, 0] and always["passes"] == [1, 1] and always["kept"] == [1, 0]
    assert two["versus"][first_pass.ONE]["points"].value == 0
    json.dumps(found, default=asdict, allow_nan=False)
    first_pass.show(found, Console(width=120))
    assert first_pass.ALWAYS in capsys.readouterr().out
