import json
import math

import numpy as np
import pytest
import torch

from budgetvlm.controller.checkpoint import load_controller, save_pretrained
from budgetvlm.controller.checkpoint_files import read_checkpoint
from budgetvlm.controller.layers import Standardiser
from budgetvlm.controller.network import GUIDE_KNOBS, GRPOController
from budgetvlm.errors import CheckpointError, ConfigError, InputError, KnobSpaceError, OutputError

KNOBS = {"max_crops": [1, 4], "top_k": [2, 8]}
LATENCY = [10.0, 20.0, 30.0, 40.0]


def controller(seed: int = 0, random: bool = True, **options) -> GRPOController:
    """A small controller; heads and context layer are random unless told otherwise, as if it had been trained."""
    torch.manual_seed(seed)
    given = {"knob_values": KNOBS, "latency_reference_ms": 40.0, "latency_ms": LATENCY, "bounds_ms": LATENCY, **options}
    made = GRPOController(3, 2, budget_dim=4, hidden_dim=8, **given).eval()
    if random:
        torch.nn.init.normal_(made.heads.weight)
        torch.nn.init.normal_(made.context_layer.weight)
    return made


def features(batch: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, generator=generator), torch.randn(batch, 2, generator=generator)


def test_the_guides_snippet():
    made = GRPOController(image_feat_dim=3, lang_feat_dim=2)
    image, language = features(1)
    with torch.no_grad():
        logits = made(image, language, torch.tensor([40.0]))
        actions = made.sample_actions(logits, deterministic=True)
    assert {name: list(logits[name].shape) for name in (*GUIDE_KNOBS, "joint")} == {
        "max_crops": [1, 6],
        "top_k": [1, 3],
        "num_active_blocks": [1, 5],
        "joint": [1, 90],
    }
    for name, values in GUIDE_KNOBS.items():
        assert actions[name].item() in values
        assert isinstance(actions[name].item(), int)


def test_budgets_and_features_of_every_allowed_shape_mean_the_same():
    made = controller()
    image, language = features(1)
    wanted = made(image, language, torch.tensor([25.0]))["joint"]
    for budget in (25, 25.0, torch.tensor(25.0), torch.tensor([[25.0]]), torch.tensor([25], dtype=torch.int64)):
        torch.testing.assert_close(made(image, language, budget)["joint"], wanted)
    torch.testing.assert_close(made(image[0], language[0].double(), 25.0)["joint"], wanted)


def test_one_budget_serves_a_batch_and_rows_do_not_depend_on_each_other():
    made = controller()
    image, language = features()
    budgets = torch.tensor([10.0, 20.0, 25.0, 40.0, 90.0])
    together = made.setting_logits(made(image, language, budgets))
    for row in range(5):
        alone = made.setting_logits(made(image[row], language[row], budgets[row]))
        torch.testing.assert_close(together[row : row + 1], alone)
    torch.testing.assert_close(made(image, language, 25.0)["joint"][2], made(image, language, budgets)["joint"][2])


def test_setting_logits_are_the_heads_of_the_settings_values_plus_the_joint_term():
    made = controller()
    logits = {
        "max_crops": torch.tensor([[1.0, 2.0]]),
        "top_k": torch.tensor([[10.0, 20.0]]),
        "joint": torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
    }
    # settings in order: (1, 2), (1, 8), (4, 2), (4, 8)
    torch.testing.assert_close(made.setting_logits(logits), torch.tensor([[11.1, 21.2, 12.3, 22.4]]))


def test_log_probs_are_those_of_the_settings_and_sum_to_one_over_the_allowed():
    made = controller()
    logits = made(*features(), torch.tensor([10.0, 20.0, 25.0, 40.0, 90.0]))
    every = torch.arange(4).expand(5, 4)
    wide = made.log_probs(logits, every)
    torch.testing.assert_close(wide.exp().sum(dim=1), torch.ones(5))
    torch.testing.assert_close(made.log_probs(logits, torch.tensor([0, 1, 1, 3, 2])), wide[range(5), [0, 1, 1, 3, 2]])
    assert wide[1].isinf().tolist() == [False, False, True, True]
    free = made.log_probs(logits, every, feasible=torch.ones(5, 4, dtype=torch.bool))
    torch.testing.assert_close(free, made.setting_logits(logits).log_softmax(dim=1))


def test_drawn_settings_follow_the_probabilities():
    made = controller(random=False)
    with torch.no_grad():
        made.heads.bias[-4:] = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4])) / made.logit_scale
    image, language = features(1)
    logits = made(image.expand(20_000, -1), language.expand(20_000, -1), 40.0, price=0.0)
    drawn = made.sample_actions(logits, generator=torch.Generator().manual_seed(0))["setting_index"]
    assert np.bincount(drawn, minlength=4) / 20_000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.015)


def test_actions_hold_values_indices_and_number_of_the_same_setting():
    made = controller()
    actions = made.sample_actions(made(*features(), math.inf))
    for row, index in enumerate(actions["setting_index"].tolist()):
        setting = made.knob_space.settings[index]
        assert {name: actions[name][row].item() for name in KNOBS} == dict(setting)
        assert [KNOBS[name][actions["indices"][name][row]] for name in KNOBS] == list(setting.values())


def test_only_settings_within_the_budget_are_chosen_and_the_cheapest_where_there_is_none():
    made = controller(random=False)
    made.start_from([0.1, 0.2, 0.9, 0.8])
    image, language = features(1)

    def chosen(budget, **given):
        actions = made.sample_actions(made(image, language, budget), deterministic=True, **given)
        return actions["setting_index"].item()

    assert [chosen(b) for b in (5.0, 10.0, 29.9, 30.0, 1000.0)] == [0, 0, 1, 2, 2]
    assert chosen(1000.0, feasible=torch.tensor([[True, True, False, False]])) == 1
    assert chosen(1000.0, feasible=torch.tensor([[False] * 4])) == 0


def test_the_untrained_controller_is_the_lookup_table_at_every_price():
    made = controller(random=False)
    accuracy = np.array([0.50, 0.60, 0.80, 0.85])
    made.start_from(accuracy.tolist())
    for price in (0.0, 0.1, 0.3, 1.0, 5.0):
        actions = made.sample_actions(made(*features(3), math.inf, price), deterministic=True)
        assert actions["setting_index"].tolist() == [int((accuracy - price * np.array(LATENCY) / 40.0).argmax())] * 3


def test_a_budget_beyond_the_largest_bound_looks_like_no_limit():
    made = controller()
    image, language = features()
    unlimited = made.setting_logits(made(image, language, math.inf))
    assert torch.equal(unlimited, made.setting_logits(made(image, language, 40.0)))
    assert not torch.equal(unlimited, made.setting_logits(made(image, language, 39.0)))


def test_a_setting_that_was_not_measured_is_never_allowed():
    made = controller(latency_ms=[10.0, 20.0, 30.0, None], bounds_ms=[10.0, 20.0, 30.0, None])
    logits = made(*features(), math.inf)
    assert logits["feasible"].tolist() == [[True, True, True, False]] * 5
    assert torch.isfinite(made.setting_logits(logits)).all()
    assert made.config["bounds_ms"] == [10.0, 20.0, 30.0, None]
    assert made.config["latency_ms"] == [10.0, 20.0, 30.0, None]


def test_without_bounds_everything_is_allowed():
    made = GRPOController(3, 2, knob_values=KNOBS)
    assert made.config["bounds_ms"] is None
    assert made(*features(), 0.001)["feasible"].all()


@pytest.mark.parametrize("budget", [0.0, -5.0, math.nan, [10.0, 20.0]])
def test_a_budget_that_is_no_positive_number_is_refused(budget):
    with pytest.raises(InputError, match="budget"):
        controller()(*features(), torch.tensor(budget))


@pytest.mark.parametrize("price", [-0.1, math.nan])
def test_a_negative_price_is_refused(price):
    with pytest.raises(InputError, match="price"):
        controller()(*features(), 10.0, price)


def test_features_that_do_not_fit_are_named_with_both_widths():
    image, language = features()
    with pytest.raises(InputError, match=r"image feature has shape \[5, 2\].*built for 3"):
        controller()(image[:, :2], language, 10.0)
    with pytest.raises(InputError, match=r"language feature has shape \[5, 3\].*built for 2"):
        controller()(image, image, 10.0)
    with pytest.raises(InputError, match="5 image features but 4"):
        controller()(image, language[:4], 10.0)


def test_all_that_is_wrong_with_the_arguments_is_reported_at_once():
    with pytest.raises(ConfigError, match=r"image_feat_dim=0.*dropout=1\.5.*bounds_ms must be 4"):
        GRPOController(0, 2, knob_values=KNOBS, dropout=1.5, bounds_ms=[1.0])
    with pytest.raises(KnobSpaceError, match="'joint'"):
        GRPOController(3, 2, knob_values={"joint": [1, 2]})


def test_config_and_state_dict_make_the_same_controller(tmp_path):
    made = controller(feature_dim=2)
    made.fit_features(*features(50))
    again = GRPOController(**json.loads(json.dumps(made.config)))
    again.load_state_dict(made.state_dict())
    expected = made.setting_logits(made(*features(), 33.0))
    assert torch.equal(again.eval().setting_logits(again(*features(), 33.0)), expected)
    made.save_pretrained(tmp_path / "saved")
    saved = GRPOController.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.setting_logits(saved(*features(), 33.0)), expected)
    assert load_controller(tmp_path / "saved").config == made.config


def test_weights_bring_reference_bounds_and_prices_along():
    """The guide builds the network by hand; what it does not mention must not be lost silently."""
    made = controller(default_price=0.2)
    by_hand = GRPOController(3, 2, budget_dim=4, hidden_dim=8, knob_values=KNOBS)
    by_hand.load_state_dict(made.state_dict())
    assert by_hand.config == made.config


def test_weights_of_another_knob_space_or_size_are_refused():
    made = controller()
    other = GRPOController(3, 2, budget_dim=4, hidden_dim=8, knob_values={"max_crops": [1, 6], "top_k": [2, 8]})
    with pytest.raises(KnobSpaceError, match="another knob space"):
        other.load_state_dict(made.state_dict())
    with pytest.raises(CheckpointError, match=r"image_input\.mean has shape \[3\] in the checkpoint but \[4\] here"):
        GRPOController(4, 2, budget_dim=4, hidden_dim=8, knob_values=KNOBS).load_state_dict(made.state_dict())


def test_standardised_training_features_have_mean_0_and_std_1():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50.0, 1e-3, 0.0]) + 9.0
    layer = Standardiser(4)
    layer.fit(x)
    z = layer(x)
    torch.testing.assert_close(z[:, :3].mean(dim=0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(z[:, :3].std(dim=0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert torch.equal(z[:, 3], torch.zeros(200))  # a feature that never varies says nothing
    assert layer(x + 1e9).abs().max() == 8.0


def test_principal_components_keep_what_varies_together():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 2, generator=generator)
    x = hidden @ torch.randn(2, 20, generator=generator) + 0.01 * torch.randn(500, 20, generator=generator)
    layer = Standardiser(20, 2)
    layer.fit(x)
    z = layer(x)
    torch.testing.assert_close(z.T @ z / 500, torch.eye(2), atol=2e-3, rtol=0)
    left = hidden - z @ torch.linalg.lstsq(z, hidden).solution
    assert left.var() < 1e-3  # the two components tell the two hidden numbers


def test_more_components_than_samples_or_features_are_no_error():
    layer = Standardiser(6, 10)
    layer.fit(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    assert layer(torch.randn(2, 6)).shape == (2, 6)
    assert torch.isfinite(layer(torch.randn(2, 6))).all()


def test_files_that_hold_no_controller(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_controller(tmp_path)
    (tmp_path / "best_checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_controller(tmp_path)
    torch.save({"model": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="schema version None"):
        read_checkpoint(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="holds no saved controller"):
        GRPOController.from_pretrained(tmp_path)


def test_a_truncated_weights_file_is_refused(tmp_path):
    save_pretrained(controller(), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="holds no saved controller"):
        GRPOController.from_pretrained(tmp_path)


def test_a_place_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        save_pretrained(controller(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_statistics_are_those_of_the_rows_asked_for_whatever_the_parts(monkeypatch):
    image, language = features(50)
    rows = torch.arange(3, 43)
    alone, within = controller(feature_dim=2), controller(feature_dim=2)
    alone.fit_features(image[rows], language[rows])
    monkeypatch.setattr("budgetvlm.controller.layers.PART", 7)
    within.fit_features(image, language, rows)
    assert torch.allclose(alone.image_input.mean, image[rows].mean(dim=0), atol=1e-6)
    assert torch.allclose(alone.image_input.std, image[rows].std(dim=0, correction=0), atol=1e-6)
    assert torch.allclose(alone.image_input(image), within.image_input(image), atol=1e-5)
    assert torch.allclose(alone.lang_input.std, within.lang_input.std)
    image[42] = float("nan")
    with pytest.raises(ConfigError, match="NaN"):
        within.fit_features(image, language, rows)
