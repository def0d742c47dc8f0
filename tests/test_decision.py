"""A quick decision is the controller's decision."""

import math

import numpy as np
import pytest
import torch

from budgetvlm.controller.decision import Decider
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import InputError

KNOBS = {"max_crops": [1, 4], "top_k": [2, 8], "num_active_blocks": [2, 3, 5]}
LATENCY = [10.0 + 3.0 * k for k in range(12)]


def trained(seed: int, **options) -> GRPOController:
    """A controller with random weights and feature statistics."""
    torch.manual_seed(seed)
    given = {"knob_values": KNOBS, "latency_reference_ms": 43.0, "latency_ms": LATENCY, "bounds_ms": LATENCY, **options}
    made = GRPOController(6, 5, budget_dim=4, hidden_dim=16, **given).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    made.fit_features(3.0 * torch.randn(40, 6) + 1.0, torch.randn(40, 5))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_dim": 3},
        {"num_hidden_layers": 3},
        {"bounds_ms": None},
        {"latency_ms": None},
        {"bounds_ms": [*LATENCY[:-1], None]},
    ],
)
def test_values_and_choices_are_the_networks(options):
    made = trained(1, **options)
    decider = Decider(made)
    generator = torch.Generator().manual_seed(2)
    chosen = set()
    for budget in (5.0, 12.0, 25.0, 43.0, 300.0, 1e6, math.inf):
        for price in (None, 0.0, 0.03, 2.0, 1e4):
            image, language = 4 * torch.randn(6, generator=generator), 4 * torch.randn(5, generator=generator)
            with torch.no_grad():
                logits = made(image, language, budget, price)
                wanted = int(made.sample_actions(logits, deterministic=True)["setting_index"])
            values = decider.values(image.numpy(), language.numpy(), budget, price)
            wanted_values = made.setting_logits(logits)[0].detach().numpy() / made.logit_scale
            np.testing.assert_allclose(values, wanted_values, rtol=1e-4, atol=1e-4)
            assert decider.feasible(budget).tolist() == logits["feasible"][0].tolist()
            assert decider.choose(image.numpy(), language.numpy(), budget, price) == wanted
            chosen.add(wanted)
    assert len(chosen) > 1


def test_a_mask_that_is_given_rules_and_an_empty_one_means_the_smallest_bound():
    decider = Decider(trained(3))
    image, language = np.ones(6, np.float32), np.ones(5, np.float32)
    only = np.zeros(12, dtype=bool)
    only[7] = True
    assert decider.choose(image, language, 1.0, feasible=only) == 7
    assert decider.choose(image, language, 1e6, feasible=np.zeros(12, dtype=bool)) == 0


def test_features_of_another_width_are_named():
    with pytest.raises(InputError, match=r"language feature has shape \[4\].*built for 5"):
        Decider(trained(4)).choose(np.ones(6, np.float32), np.ones(4, np.float32), 50.0)
