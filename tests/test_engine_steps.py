"""The guide's steps for a model that an engine serves: profile, prepare, train, calibrate, evaluate --live, ask."""

import hashlib
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fake_engine import FakeEngine

from budgetvlm.cli import main
from budgetvlm.engines.opening import open_model
from budgetvlm.errors import ConfigError
from budgetvlm.features import Features
from budgetvlm.features.cheap import EXTRACTOR
from budgetvlm.guard.rule import Rule
from budgetvlm.knobs import KnobSpace
from budgetvlm.profiling.measure.setting_sampling import served_settings
from budgetvlm.profiling.prepare.columns import read_accuracy, read_sweep
from budgetvlm.profiling.prepare.preparation import features_path
from budgetvlm.profiling.results.places import default_directory
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import load_task
from budgetvlm.vlm.loading import load

COUNTS = {"train": 32, "validation": 16, "test": 16}
EASY = "what"  # a question with this word is answered right at any setting, others at the largest


def samples():
    return [one for split, count in COUNTS.items() for one in load_task("signs").samples(split, count)]


@pytest.fixture(scope="module")
def engine():
    """Answers samples as a model does that sees enough of the image; says what it was asked beside what it knows."""
    known = {FakeEngine.digest(one.load_image(), one.question): one.answers[0] for one in samples()}

    def answer(image, question, crops, knobs):
        sees = EASY in question or crops == 4
        return known.get(FakeEngine.digest(image, question), "0") if sees else "none"

    sketch = load("reference", device="meta")
    with FakeEngine(sketch, answer=answer, first_ms=1.0, image_token_ms=0.05) as engine:
        yield engine


@pytest.fixture(scope="module")
def place(tmp_path_factory, engine):
    """What the steps left, and what the engine was asked while times were measured."""
    place = tmp_path_factory.mktemp("engine")
    fleet = {"model_path": "reference", "knobs": {"max_crops": [1, 4]}, "replicas": [{"url": engine.url}]}
    (place / "engines.yaml").write_text(yaml.safe_dump(fleet))
    model = ["--model_path", place / "engines.yaml", "--dataset_name", "signs", "--split", ",".join(COUNTS)]
    number = ",".join(map(str, COUNTS.values()))
    run("profile", "accuracy", *model, "--num_samples", number, "--output_dir", place / "exp5")
    before = len(engine.asked)
    run("profile", "latency", *model, "--num_samples", "4,2,2", "--repeats", "1", "--warmup", "0", "--concurrency", "2",
        "--output_dir", place / "exp6")  # fmt: skip
    timed = engine.asked[before:]
    where = ["--exp5_dir", place / "exp5", "--exp6_dir", place / "exp6", "--output_data_path", place / "d.json"]
    run("prepare", *model[:4], *where)
    run("train", "--data", place / "d.json", "--output_dir", place / "c", "--num_epochs", "2")
    run("calibrate", "--checkpoint", place / "c", "--samples", "9", "--alpha", "0.3", "--concurrency", "3")
    return SimpleNamespace(path=place, timed=timed)


def run(*words):
    assert main(list(map(str, words))) == 0


def test_each_setting_scores_what_the_engine_knows_at_it(place):
    sweep = read_accuracy(place.path / "exp5", "signs")
    question = {one.sample_id: one.question for one in samples()}
    easy = [EASY in question[name] for name in sweep.sample_ids]
    assert len(easy) == sum(COUNTS.values()) and 0 < sum(easy) < len(easy)
    np.testing.assert_array_equal(sweep.values["score"], np.stack([easy, np.ones(len(easy))], axis=1))


def test_no_cache_is_timed_and_the_number_in_flight_is_noted(place):
    asked = [{part["type"]: part for part in body["messages"][-1]["content"]} for body in place.timed]
    questions = {one.question for one in samples()}  # others are what the fleet is opened with
    urls = [parts["image_url"]["image_url"]["url"] for parts in asked if parts["text"]["text"] in questions]
    assert len({hashlib.sha256(url.encode()).digest() for url in urls}) == len(urls) == 2 * 8
    sweep = read_sweep(place.path / "exp6", "signs", "latency")
    assert sweep.config["concurrency"] == 2
    large, small = (sweep.values["num_vision_tokens"][:, column].mean() for column in (1, 0))
    assert large > small


def test_features_are_fitted_without_the_model_and_lie_beside_the_controller(place):
    features = Features.load(features_path(place.path / "d.json"))
    assert json.loads((place.path / "c" / EXTRACTOR).read_text()) == features.metadata["extractor"]
    model = AdaptiveVLM.from_pretrained(str(place.path / "engines.yaml"), place.path / "c", rehearsals=0)
    sample = samples()[0]
    row = features.sample_ids.index(sample.sample_id)
    np.testing.assert_array_equal(model.vlm.encode_overview(sample.load_image()).feature, features.image[row])
    np.testing.assert_array_equal(model.request(sample.load_image(), sample.question).feature, features.language[row])
    assert model.guard.rule == Rule(revises=False, hurries=False) and model.guard.calibrated_on == 9


def test_requests_on_the_clock_are_several_at_a_time(place, engine, capsys):
    capsys.readouterr()
    run("evaluate", "--live", "--checkpoint", place.path / "c", "--num_requests", "8", "--concurrency", "4", "--json",
        "--split", "test")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["concurrency"]) == (8, 4)
    for system in found["systems"].values():
        assert system["all"]["requests"] == 8 and system["all"]["hurried"] == 0


def test_it_answers_and_says_what_it_cost(place, tmp_path, capsys):
    sample = next(one for one in samples() if EASY in one.question)
    sample.load_image().save(tmp_path / "sign.png")
    capsys.readouterr()
    run("ask", "--image", tmp_path / "sign.png", "--question", sample.question, "--budget_ms", "60000", "--checkpoint",
        place.path / "c", "--json")  # fmt: skip
    answer = json.loads(capsys.readouterr().out)
    assert answer["answer"] == sample.answers[0] and answer["budget_met"]
    assert answer["stages_ms"]["vision"] == 0 < answer["stages_ms"]["prefill"]


def test_what_an_engine_does_for_others_counts_as_in_flight(place, engine):
    vlm = open_model(str(place.path / "engines.yaml"))
    assert vlm.in_flight == 0  # and it is asked
    engine.running += 3
    try:
        end_s = time.monotonic() + 10
        while vlm.in_flight != 3 and time.monotonic() < end_s:
            time.sleep(0.05)
        assert vlm.in_flight == 3
    finally:
        engine.running -= 3


def test_without_a_controller_it_says_that_engines_bring_none():
    with pytest.raises(ConfigError, match="bring no controller"):
        AdaptiveVLM.from_pretrained("http://127.0.0.1:9/v1")


def test_settings_that_no_engine_answers_are_left_out_with_a_word():
    space, said = KnobSpace({"max_crops": [1, 4], "top_k": [1, 2]}), []
    vlm = SimpleNamespace(name="fleet.yaml", knob_space=space, served=(space.settings[0], space.full))
    assert served_settings(vlm, space.settings, said.append) == vlm.served
    assert "2 settings are left out" in said[0] and str(space.settings[1]) in said[0]
    vlm.served = space.settings[:3]
    with pytest.raises(ConfigError, match=r"no engine of fleet\.yaml answers the full setting"):
        served_settings(vlm, space.settings)


@pytest.mark.parametrize(
    ("model", "folder"), [("http://127.0.0.1:8000/v1", "127.0.0.1_8000_v1"), ("my/engines.yaml", "engines.yaml")]
)
def test_results_of_an_engine_have_a_place_of_their_own(model, folder):
    assert default_directory("accuracy", model).parts[-2] == folder


def test_a_model_in_this_process_has_one_request_in_flight(capsys):
    words = ["profile", "latency", "--num_samples", "2", "--concurrency", "2", "--settings", "1,1,3"]
    assert main([*words, "--output_dir", "unused"]) == 2
    assert "runs in this process and answers one request at a time" in capsys.readouterr().err
