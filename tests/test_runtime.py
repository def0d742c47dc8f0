"""Requests with a budget on a tiny model: what the controller chooses, what is reported, what is refused."""

import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image
from tiny_vlm import KNOBS, write_tiny_model

from budgetvlm._io import open_image
from budgetvlm.cli import main
from budgetvlm.commands.ask import describe
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.price_curve import AtPrice, PriceCurve
from budgetvlm.errors import BudgetVLMWarning, CheckpointError, ConfigError, InputError, KnobSpaceError
from budgetvlm.guard.fixed import FixedGuard
from budgetvlm.guard.rule import Rule
from budgetvlm.knobs import KnobSpace
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm import load_vlm

SPACE = KnobSpace(KNOBS)
QUESTION = "what is the red sign"
BOUNDS = [1000.0 * (k + 1) for k in range(len(SPACE))]  # far above what the tiny model takes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vlm(directory):
    return load_vlm(str(directory))


@pytest.fixture(scope="module")
def picture():
    return Image.linear_gradient("L").resize((256, 192)).convert("RGB")


def controller(bounds=BOUNDS, best=None, **changes):
    """Prefers one setting (default: the full one) whatever the state, within its bounds."""
    made = GRPOController(
        **{
            "image_feat_dim": 64,
            "lang_feat_dim": 32,
            "knob_values": KNOBS,
            "bounds_ms": bounds,
            "hidden_dim": 8,
            **changes,
        }
    )
    size = made.num_settings
    accuracy = [k / size for k in range(size)]
    accuracy[size - 1 if best is None else best] = 2.0
    made.start_from(accuracy)
    return made


@pytest.fixture(scope="module")
def model(vlm):
    return AdaptiveVLM(vlm, controller())


def test_ample_budget_takes_the_best_setting_and_says_what_it_cost(model, vlm, picture):
    answer = model.generate(picture, QUESTION, budget_ms=1e6, max_new_tokens=3)
    alone = vlm.generate(picture, QUESTION, SPACE.full, max_new_tokens=3)
    assert answer.setting == SPACE.full
    assert (answer.answer, answer.num_vision_tokens) == (alone.text, alone.num_vision_tokens)
    assert (answer.feasible, answer.best_effort, answer.budget_met) == (True, False, True)
    assert list(answer.stages_ms) == ["preprocess", "vision", "controller", "prefill", "decode"]
    assert 0 < answer.controller_ms < answer.latency_ms
    assert sum(answer.stages_ms.values()) <= answer.latency_ms
    assert answer.predicted_ms == pytest.approx(BOUNDS[-1] + model.guard.own_ms)


class FrozenGuard(FixedGuard):
    """One that would do everything beside the bounds, and must not be told of a setting that its caller chose."""

    def __init__(self):
        super().__init__(SPACE, np.array(BOUNDS))
        self.rule = Rule()

    def update(self, *lesson):
        raise AssertionError("nothing is to be learnt")


def test_a_setting_of_the_callers_is_answered_whatever_the_controller_would_choose(vlm, picture, monkeypatch):
    model = AdaptiveVLM(vlm, controller(), rehearsals=0)
    model.guard = FrozenGuard()
    monkeypatch.setattr(vlm, "encode_overview", lambda image: pytest.fail("no controller reads it"))
    for given in ({"max_crops": 1}, {"top_k": 2, "num_active_blocks": 3}, {}):
        setting = SPACE.setting(**{**SPACE.full, **given})
        answer = model.generate(picture, QUESTION, setting=given, max_new_tokens=4)
        alone = vlm.generate(picture, QUESTION, setting, max_new_tokens=4)
        assert (answer.setting, answer.answer) == (setting, alone.text)
        assert (answer.predicted_ms, answer.controller_ms, answer.budget_met) == (None, 0.0, True)
    short = model.generate(picture, QUESTION, setting={"max_crops": 1}, budget_ms=1e-3, max_new_tokens=4)
    assert (short.finish_reason, short.num_output_tokens, short.feasible) == ("budget", 1, False)
    late = model.generate(picture, QUESTION, setting={}, budget_ms=1e-3, max_new_tokens=2, cut="always")
    assert (late.num_hurried_tokens, late.budget_met) == (0, False)


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ({"max_crops": 3}, KnobSpaceError, "max_crops=3 is outside the knob space; allowed: 1, 2, 4"),
        ({"crops": 1}, KnobSpaceError, "given: max_crops, top_k, num_active_blocks, crops"),
        ("max_crops=1", InputError, "setting='max_crops=1' is no mapping"),
    ],
)
def test_settings_that_the_model_does_not_have(model, picture, setting, error, says):
    with pytest.raises(error, match=says):
        model.generate(picture, QUESTION, setting=setting)
    with pytest.raises(error, match=says):
        model.generate(picture, QUESTION, setting=setting, stream=True)
    with pytest.raises(InputError, match=f"request 1 of the batch cannot be answered: .*{says}"):
        model.generate_batch([{"image": picture, "question": QUESTION, "setting": s} for s in ({}, setting)])


def test_the_choice_keeps_its_bound_within_the_budget(model, picture):
    """The bound of setting k is 1000 (k + 1) ms; of those allowed the last is thought the most accurate."""
    for budget_ms, expected in ((10_500, 9), (5_900, 4), (1_900, 0)):
        choice = model.choose(picture, QUESTION, budget_ms)
        assert SPACE.index(choice.setting) == expected
        assert choice.feasible and choice.predicted_ms <= budget_ms


def test_the_controllers_own_time_is_taken_off_the_budget(vlm, picture):
    model = AdaptiveVLM(vlm, controller())
    model.guard.own_ms = 600.0
    choice = model.choose(picture, QUESTION, 5_500)
    assert SPACE.index(choice.setting) == 3
    assert choice.predicted_ms == pytest.approx(4_600)


def test_a_budget_below_every_bound_is_a_best_effort_that_says_so(model, picture):
    answer = model.generate(picture, QUESTION, budget_ms=0.01)
    assert answer.setting == SPACE.cheapest
    assert (answer.feasible, answer.best_effort, answer.budget_met) == (False, True, False)
    assert "best effort" in str(answer) and "missed" in str(answer)
    assert answer.to_dict()["best_effort"] is True


def test_the_best_effort_is_the_smallest_bound_not_the_first_setting(vlm, picture):
    bounds = [*BOUNDS[:5], 10.0, *BOUNDS[6:]]
    answer = AdaptiveVLM(vlm, controller(bounds)).generate(picture, QUESTION, budget_ms=0.01)
    assert SPACE.index(answer.setting) == 5


def test_settings_never_measured_are_never_chosen(vlm, picture):
    bounds = [*BOUNDS[:-1], None]
    answer = AdaptiveVLM(vlm, controller(bounds)).generate(picture, QUESTION, budget_ms=1e6)
    assert answer.setting == SPACE.settings[-2]


def test_without_bounds_nothing_is_predicted(vlm, picture):
    answer = AdaptiveVLM(vlm, controller(None)).generate(picture, QUESTION, budget_ms=5)
    assert answer.predicted_ms is None and answer.feasible and answer.setting == SPACE.full


def test_a_high_price_buys_less_time(vlm, picture):
    latency = [float(k + 1) for k in range(len(SPACE))]
    model = AdaptiveVLM(vlm, controller(latency_ms=latency, latency_reference_ms=27.0))
    cheap = model.choose(picture, QUESTION, 1e6, price=100.0)
    assert cheap.setting == SPACE.cheapest
    assert model.choose(picture, QUESTION, 1e6, price=0.0).setting == SPACE.full


def test_the_controller_sees_this_requests_features(vlm, picture, monkeypatch):
    model, seen = AdaptiveVLM(vlm, controller()), []
    values = model.network.values
    monkeypatch.setattr(model.network, "values", lambda *args: seen.append(args) or values(*args))
    model.generate(picture, QUESTION, budget_ms=5e4, price=0.5)
    image, language, budget_ms, price = seen[0]
    assert np.array_equal(image, vlm.encode_overview(picture).feature)
    assert np.array_equal(language, vlm.question_feature(QUESTION))
    assert budget_ms == pytest.approx(5e4 - model.guard.own_ms) and price == 0.5


def test_the_overview_is_encoded_once(vlm, picture, monkeypatch):
    model, tiles = AdaptiveVLM(vlm, controller()), []
    encode = vlm.images.encode
    monkeypatch.setattr(
        vlm.images, "encode", lambda pixels, where: tiles.append(len(pixels[0])) or encode(pixels, where)
    )
    model.generate(picture, QUESTION, budget_ms=1e6)
    assert tiles == [1, 4]


def test_files_are_opened_upright_and_in_colour(model, picture, tmp_path):
    turned = picture.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == picture.size
    picture.convert("RGBA").save(tmp_path / "plain.png")
    from_file = model.generate(str(tmp_path / "plain.png"), QUESTION, budget_ms=1e6)
    assert from_file.answer == model.generate(picture, QUESTION, budget_ms=1e6).answer
    assert open_image(picture) is picture  # copying a large one takes longer than answering
    picture.save(tmp_path / "opened.png")
    with Image.open(tmp_path / "opened.png") as opened:
        assert open_image(opened).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.png", None, "does not exist"),
        ("text.png", b"not an image", "not an image that Pillow knows"),
        ("empty.png", b"", "not an image that Pillow knows"),
    ],
)
def test_files_that_are_no_images(model, tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        model.generate(tmp_path / name, QUESTION, budget_ms=50)


def test_truncated_directories_and_bombs(model, picture, tmp_path, monkeypatch):
    picture.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.png"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(InputError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="given int"):
        model.generate(3, QUESTION, budget_ms=50)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings(), pytest.raises(InputError, match="too large"):
        warnings.simplefilter("ignore")
        open_image(tmp_path / "whole.png")


@pytest.mark.parametrize("budget", [0, -5, math.nan, -math.inf, "40", None, True])
def test_budgets_that_are_none(model, picture, budget):
    with pytest.raises(InputError, match="not a positive number of milliseconds"):
        model.generate(picture, QUESTION, budget_ms=budget)


def test_without_a_budget_nothing_is_late_and_nothing_is_unsure(model, picture):
    answer = model.generate(picture, QUESTION, budget_ms=math.inf, max_new_tokens=2)
    assert answer.setting == SPACE.full and answer.budget_met and answer.feasible
    assert "budget none of its own;" in str(answer) and "budget   none of its own" in describe(answer)
    assert answer.to_dict()["budget_ms"] is None and json.loads(json.dumps(answer.to_dict())) == answer.to_dict()


def test_a_mean_budget_moves_the_price_and_with_it_the_setting(vlm, picture):
    """Answers take longer than the mean budget, so that time becomes dear until the cheapest setting is taken."""
    model = AdaptiveVLM(vlm, controller(latency_ms=BOUNDS, default_price=0.01), mean_budget_ms=1e-3)
    first = model.generate(picture, QUESTION, budget_ms=math.inf, max_new_tokens=1)
    assert first.setting == SPACE.full and model.spending.debt > 0
    for _ in range(4):
        last = model.generate(picture, QUESTION, budget_ms=math.inf, max_new_tokens=1)
    assert last.setting == SPACE.cheapest and model.spending.price > 1
    own = model.generate(picture, QUESTION, budget_ms=math.inf, price=0.0, max_new_tokens=1)
    assert own.setting == SPACE.full  # a price of its own comes first


# at prices below .5 the full setting is worth its time; the means are those of the profiled machine
CURVE = PriceCurve((AtPrice(0.01, 9e5, 0, 0.9, 0), AtPrice(0.4, 5e5, 0, 0.9, 0), AtPrice(4.0, 1e3, 0, 0.3, 0)), 9)


def test_the_first_request_of_a_mean_budget_has_the_solved_price(vlm, picture):
    """The guard's bounds are fixed, so the machine counts as the profiled one."""
    model = AdaptiveVLM(vlm, controller(latency_ms=BOUNDS), mean_budget_ms=1.1e3, price_curve=CURVE)
    assert model.spending.price == model.solved.price > 3
    cheap = model.generate(picture, QUESTION, budget_ms=math.inf, max_new_tokens=1)
    assert cheap.setting == SPACE.cheapest
    assert model.spending.debt == pytest.approx(cheap.latency_ms / 1.1e3 - 1)


def test_a_ceiling_masks_settings_beside_a_mean_budget(vlm, picture):
    """Both are given: the price would allow the full setting, and the ceiling does not."""
    model = AdaptiveVLM(vlm, controller(latency_ms=BOUNDS), mean_budget_ms=8e5, price_curve=CURVE)
    assert model.generate(picture, QUESTION, budget_ms=math.inf, max_new_tokens=1).setting == SPACE.full
    assert model.generate(picture, QUESTION, budget_ms=1500.0, max_new_tokens=1).setting == SPACE.settings[0]


def test_mean_budgets_beyond_the_ends_of_the_curve(vlm):
    with pytest.raises(ConfigError, match=r"900 ms cannot be met: even the cheapest setting takes 1.00 s"):
        AdaptiveVLM(vlm, controller(), mean_budget_ms=900, price_curve=CURVE)
    with pytest.warns(BudgetVLMWarning, match=r"1000 s is more than this controller makes use of \(900 s"):
        assert AdaptiveVLM(vlm, controller(), mean_budget_ms=1e6, price_curve=CURVE).spending.price == 0.01


@pytest.mark.parametrize("price", [-0.1, math.nan, "1"])
def test_prices_that_are_none(model, picture, price):
    with pytest.raises(InputError, match="price="):
        model.generate(picture, QUESTION, budget_ms=50, price=price)


def test_all_that_is_wrong_is_said_at_once(model, picture):
    with pytest.raises(InputError, match=r"question is empty.*budget_ms=0.*price=-1"):
        model.generate(picture, " ", budget_ms=0, price=-1)


def test_a_controller_of_another_space_or_other_features(vlm):
    with pytest.raises(KnobSpaceError, match="trained on this model's profiles"):
        AdaptiveVLM(vlm, controller(None, knob_values={**KNOBS, "top_k": [1, 3]}))
    with pytest.raises(KnobSpaceError):
        AdaptiveVLM(vlm, controller(None, knob_values={"max_crops": [1, 2]}))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        AdaptiveVLM(vlm, controller(image_feat_dim=63))


def test_a_controller_of_a_part_of_the_space_is_welcome(vlm, picture):
    part = controller(None, knob_values={"max_crops": [1, 4], "top_k": [4], "num_active_blocks": [2, 4]})
    answer = AdaptiveVLM(vlm, part).generate(picture, QUESTION, budget_ms=1e6)
    assert answer.setting == SPACE.full


def test_no_controller_says_how_to_train_one(directory):
    with pytest.raises(ConfigError, match="budgetvlm quickstart"):
        AdaptiveVLM.from_pretrained(str(directory))


def test_the_command_answers_in_text_and_in_json(directory, picture, tmp_path, capsys):
    controller().save_pretrained(tmp_path / "controller")
    picture.save(tmp_path / "photo.png")
    words = ["ask", "--image", str(tmp_path / "photo.png"), "--question", QUESTION, "--model_path", str(directory)]
    words += ["--checkpoint", str(tmp_path / "controller")]
    assert main([*words, "--budget-ms", "100000", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["setting"] == dict(SPACE.full) and document["budget_met"] is True
    assert document["stages_ms"]["controller"] > 0
    assert main([*words, "--budget-ms", "1"]) == 0
    assert "best effort" in capsys.readouterr().out


def test_the_command_says_what_a_mean_budget_means_for_one_request(directory, picture, tmp_path, capsys):
    """With a curve its price is used and what it gave is said; without one the default price is, and that is said."""
    controller(latency_ms=BOUNDS).save_pretrained(tmp_path / "controller")
    picture.save(tmp_path / "photo.png")
    words = ["ask", "--image", str(tmp_path / "photo.png"), "--question", QUESTION, "--model_path", str(directory)]
    words += ["--checkpoint", str(tmp_path / "controller"), "--mean_budget_ms", "1100"]
    assert main(words) == 0
    assert "mean     1.10 s on this machine: price 0.01, the controller's default" in capsys.readouterr().out
    CURVE.save(tmp_path / "controller")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"setting  {SPACE.cheapest}" in said and "mean     1.10 s on this machine: price" in said
    assert main([*words, "--budget_ms", "1", "--json"]) == 0  # a ceiling of its own beside it
    assert json.loads(capsys.readouterr().out)["budget_met"] is False


def test_an_image_that_takes_most_of_the_time_is_said_to(model, picture):
    answer = model.generate(picture, QUESTION, budget_ms=1e6)
    slow = answer._replace(latency_ms=100.0, stages_ms=dict(answer.stages_ms, preprocess=60.0))
    assert "smaller image" in describe(slow)
    assert "smaller image" not in describe(slow._replace(latency_ms=200.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--image": "nowhere.png"}, "'nowhere.png' does not exist"),
        ({"--question": ""}, "the question is empty"),
        ({"--budget-ms": "-3"}, "budget_ms=-3.0 is not a positive number"),
        ({"--budget-ms": "nan"}, "budget_ms=nan is not a positive number"),
        ({"--budget-ms": None}, "there is no budget; give --budget_ms N"),
        ({"--mean-budget-ms": "0"}, "mean_budget_ms=0.0 is not a positive number"),
        ({"--mean-budget-ms": "9", "--price": "1"}, "leave one out"),
        ({"--checkpoint": "nowhere"}, "nowhere"),
        ({}, "brings none"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(directory, picture, tmp_path, capsys, changes, message):
    picture.save(tmp_path / "photo.png")
    flags = {"--image": str(tmp_path / "photo.png"), "--question": "what", "--budget-ms": "40", **changes}
    assert (
        main(
            [
                "ask",
                "--model_path",
                str(directory),
                *(f"{n}={value}" for n, value in flags.items() if value is not None),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
