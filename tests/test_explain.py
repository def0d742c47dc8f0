"""Explanations: a controller whose reasons are known, the tree that imitates it, and the command on a tiny model."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from planted_tables import planted
from tiny_vlm import write_tiny_model

from budgetvlm import _extras as extras
from budgetvlm._io import write_json
from budgetvlm.cli import main
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import DataError
from budgetvlm.explanation.explainer import Explainer, explain
from budgetvlm.explanation.explanation_records import BudgetContext
from budgetvlm.explanation.nearest_cases import nearest_cases
from budgetvlm.explanation.surrogate import surrogate
from budgetvlm.features import Features
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.prepare.document import to_document
from budgetvlm.profiling.prepare.prepared_data import features_path
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"max_crops": [1, 4], "num_active_blocks": [2, 4]})
BOUNDS = [10.0, 20.0, 30.0, 40.0]
EVERYTHING = BudgetContext(100.0, 100.0, np.array(BOUNDS))


def controller(image=3, language=2, **changes):
    """Untrained: its values are the means it starts from, whatever the input."""
    made = GRPOController(
        image, language, hidden_dim=4, budget_dim=4, knob_values=SPACE.to_dict(), latency_reference_ms=40.0,
        latency_ms=BOUNDS, bounds_ms=BOUNDS, default_price=0.0, **changes,
    )  # fmt: skip
    made.start_from([0.2, 0.4, 0.6, 0.9])
    return made.eval()


@torch.no_grad()
def looks_at_the_image():
    """The dearest setting is worth more, the larger the first number of the image feature is; nothing else counts."""
    made = controller()
    made.feature_layer.weight.zero_()
    made.feature_layer.bias.zero_()
    made.feature_layer.weight[0, 0] = 1.0
    made.trunk[-3].weight.zero_()
    made.trunk[-3].bias.zero_()
    made.trunk[-3].weight[0, 0] = 1.0
    made.heads.weight[-1, 0] = 1.0
    return made


def test_the_choice_comes_first_then_its_rivals_then_what_is_not_allowed():
    explainer = Explainer(controller(), np.zeros(3), np.zeros(2))
    options = explainer.ranked(BudgetContext(35.0, 35.0, np.array(BOUNDS)))
    assert [option.index for option in options] == [2, 1, 0, 3]
    assert [option.allowed for option in options] == [True, True, True, False]
    assert options[0].predicted_accuracy == pytest.approx(0.6, abs=1e-6)
    assert options[0].bound_ms == 30.0 and options[0].setting == {"max_crops": 4, "num_active_blocks": 2}


def test_where_nothing_is_allowed_the_fastest_is_first():
    explainer = Explainer(controller(), np.zeros(3), np.zeros(2))
    found = explain(
        explainer, {f: BudgetContext(5.0 * f, 5.0 * f, np.array(BOUNDS)) for f in (0.8, 1.0, 1.2)}, EVERYTHING
    )
    assert (found.choice.index, found.feasible, found.allowed, found.next_best) == (0, False, 0, ())
    assert found.parts is None and found.without["no limit"].index == 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_other_budgets_change_what_they_change():
    explainer = Explainer(controller(), np.zeros(3), np.zeros(2))
    situations = {f: BudgetContext(35.0 * f, 35.0 * f, np.array(BOUNDS)) for f in (0.8, 1.0, 1.2)}
    found = explain(explainer, situations, EVERYTHING)
    assert {f: option.index for f, option in found.budgets.items()} == {0.8: 1, 1.2: 3}
    assert [b["budget_ms"] for b in found.to_dict()["budgets"]] == pytest.approx([28.0, 42.0])


def test_the_part_that_the_controller_looks_at_is_the_one_that_mattered():
    explainer = Explainer(looks_at_the_image(), np.array([2.0, 1.0, 0.0]), np.ones(2))
    parts = explainer.attribution(EVERYTHING)
    assert parts.shares == pytest.approx({"image": 1.0, "question": 0.0, "budget": 0.0}, abs=1e-4)
    assert parts.image > 0 and abs(parts.gap) < 1e-3
    assert parts.baseline == pytest.approx(0.9 - (0.2 + 0.4 + 0.6) / 3, abs=1e-5)


def test_without_a_part_the_choice_may_be_another():
    made = looks_at_the_image()
    made.start_from([0.2, 0.4, 0.95, 0.9])
    explainer = Explainer(made, np.array([2.0, 0.0, 0.0]), np.zeros(2))
    assert explainer.ranked(EVERYTHING)[0].index == 3
    without = explainer.without(EVERYTHING, EVERYTHING)
    assert [without[f"an average {part}"].index for part in ("image", "question")] == [2, 3]


def table_of(features, accuracy, split):
    return ProfileTable.from_arrays(
        SPACE, features.sample_ids, accuracy, np.tile(BOUNDS, (len(features), 1)), split=split,
        groups={"kind": ["a", "b"] * (len(features) // 2)},
    )  # fmt: skip


def test_the_nearest_training_case_is_the_same_input():
    rng = np.random.default_rng(0)
    features = Features([f"s{i}" for i in range(20)], rng.normal(size=(20, 3)), rng.normal(size=(20, 2)))
    table = table_of(features, np.tile([0.0, 1.0, 0.0, 1.0], (20, 1)), ["train"] * 10 + ["validation"] * 10)
    first, *others = nearest_cases(table, features, features.image[4], features.language[4], chosen=3)
    assert first.sample_id == "s4" and first.similarity == pytest.approx(1.0, abs=1e-5)
    assert first.labels == {"kind": "a"} and first.accuracy == 1.0
    assert first.cheapest_right == {"max_crops": 1, "num_active_blocks": 4}
    assert len(others) == 4 and all(case.sample_id in {f"s{i}" for i in range(10)} for case in others)
    with pytest.raises(DataError, match="the data has 3 image and 2 language features"):
        nearest_cases(table, features, np.zeros(5), np.zeros(2), 0)


def test_a_prediction_is_held_against_what_was_measured():
    """The controller promises 0.9 at the dearest setting; half of the validation samples were right there."""
    features = Features([f"s{i}" for i in range(40)], np.zeros((40, 3)), np.zeros((40, 2)))
    accuracy = np.tile([[0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], (20, 1))
    table = table_of(features, accuracy, ["train"] * 20 + ["validation"] * 20)
    explainer = Explainer(controller(), np.zeros(3), np.zeros(2))
    option = explainer.ranked(EVERYTHING)[0]
    assert option.measured_accuracy is None
    assert explainer.checked(option, EVERYTHING, (table, features)).measured_accuracy == 0.5


def test_the_tree_of_a_lookup_policy_is_exact():
    """An untrained controller chooses by the budget alone, which a tree can say."""
    made = planted(120, 40, 60, width=8)
    full = GRPOController(8, 8, hidden_dim=4, knob_values=made.table.knob_space.to_dict(), latency_reference_ms=100.0)
    full.start_from(made.table.subset("train").accuracy.mean(axis=0).tolist())
    tree = surrogate(full.eval(), made.table, made.features)
    assert tree.fidelity == tree.one_setting == 1.0 and tree.accuracy == tree.controller_accuracy
    assert tree.split == "test" and "kind=0" in tree.inputs and "budget" in tree.text


def test_without_labels_the_tree_sees_components():
    rng = np.random.default_rng(0)
    features = Features([f"s{i}" for i in range(60)], rng.normal(size=(60, 3)), rng.normal(size=(60, 2)))
    table = ProfileTable.from_arrays(
        SPACE, features.sample_ids, rng.random((60, 4)), np.tile(BOUNDS, (60, 1)), split=["train"] * 30 + ["test"] * 30
    )
    tree = surrogate(controller(), table, features)
    assert tree.inputs == ("budget (× full)", *(f"image component {i}" for i in (1, 2, 3)),
                           "language component 1", "language component 2")  # fmt: skip
    with pytest.raises(DataError, match="no test or validation split"):
        surrogate(controller(), ProfileTable.from_arrays(SPACE, ["a"], [[1] * 4], [BOUNDS]), features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, a controller for it, an image, and prepared data."""
    root = tmp_path_factory.mktemp("explain")
    write_tiny_model(root / "model")
    space = KnobSpace({"max_crops": [1, 4], "top_k": [4], "num_active_blocks": [2, 4]})
    made = GRPOController(
        64, 32, hidden_dim=4, knob_values=space.to_dict(), latency_reference_ms=40.0, bounds_ms=[1, 2, 3, 1e5]
    )
    made.start_from([0.2, 0.4, 0.6, 0.9])
    made.save_pretrained(root / "controller")
    Image.new("RGB", (80, 60), "red").save(root / "a.png")
    rng, ids = np.random.default_rng(0), [f"s{i}" for i in range(40)]
    split = ["train"] * 20 + ["validation"] * 10 + ["test"] * 10
    table = ProfileTable.from_arrays(space, ids, rng.random((40, 4)), np.tile(BOUNDS, (40, 1)), split=split)
    write_json(root / "data.json", to_document(table, {"features_key": "k"}))
    Features(ids, rng.normal(size=(40, 64)), rng.normal(size=(40, 32)), {"key": "k"}).save(
        features_path(root / "data.json")
    )
    return root


def words(folder, *more):
    return [
        "explain",
        "--checkpoint",
        str(folder / "controller"),
        "--model_path",
        str(folder / "model"),
        *map(str, more),
    ]


def request(folder, budget_ms=500):
    return ["--image", str(folder / "a.png"), "--question", "what is the sign", "--budget-ms", str(budget_ms)]


def test_the_command_explains_a_request(folder, capsys):
    assert main(words(folder, *request(folder), "--data", folder / "data.json", "--tree")) == 0
    out = capsys.readouterr().out
    for part in ("choice       max_crops=4, top_k=4, num_active_blocks=2: predicted accuracy 60%", "next best",
                 "20% less     the same setting", "what mattered", "with an average image", "nearest training cases",
                 "a tree of", "on the test samples it chooses"):  # fmt: skip
        assert part in out, out
    assert main(words(folder, *request(folder), "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["choice"]["setting"] == {"max_crops": 4, "top_k": 4, "num_active_blocks": 2}
    assert len(document["budgets"]) == 2 and document["nearest"] == [] and "tree" not in document
    assert math.isclose(sum(document["parts"]["shares"].values()), 1.0) or not any(document["parts"]["shares"].values())


def test_a_budget_that_nothing_keeps_is_said(folder, capsys):
    assert main(words(folder, *request(folder, 0.01))) == 0
    out = capsys.readouterr().out
    assert "no setting is expected to keep it" in out and "(the fastest)" in out and "the budget alone" in out


def test_bad_input_is_refused_with_what_to_do(folder, tmp_path, capsys, monkeypatch):
    def refused(*more):
        assert main(words(folder, *more)) == 2
        return capsys.readouterr().err

    assert "a request needs --image, --question and --budget_ms" in refused("--image", folder / "a.png")
    assert "a request needs" in refused()
    assert "give --data" in refused("--tree")
    assert "not a positive number" in refused(*request(folder, -1))
    assert "question is empty" in refused("--image", folder / "a.png", "--question", " ", "--budget-ms", 5)
    assert "does not exist" in refused(*request(folder), "--data", tmp_path / "none.json")
    other = KnobSpace({"max_crops": [1, 2], "top_k": [4], "num_active_blocks": [2, 4]})
    table = ProfileTable.from_arrays(other, ["a"], [[1] * 4], [BOUNDS], split=["train"])
    write_json(tmp_path / "other.json", to_document(table, {"features_key": "k"}))
    Features(["a"], np.zeros((1, 64)), np.zeros((1, 32)), {"key": "k"}).save(features_path(tmp_path / "other.json"))
    assert "has another knob space" in refused(*request(folder), "--data", tmp_path / "other.json")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'budgetvlm[explain]'" in refused(*request(folder))
