"""The values in NumPy are the controller's."""

import math

import numpy as np
import pytest
import torch

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.value_network import ValueNetwork
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
    network = ValueNetwork(made)
    generator = torch.Generator().manual_seed(2)
    chosen = set()
    for budget in (5.0, 12.0, 25.0, 43.0, 300.0, 1e6, math.inf):
        for price in (None, 0.0, 0.03, 2.0, 1e4):
            image, language = 4 * torch.randn(6, generator=generator), 4 * torch.randn(5, generator=generator)
            with torch.no_grad():
                logits = made(image, language, budget, price)
                wanted = int(made.sample_actions(logits, deterministic=True)["setting_index"])
            values = network.values(image.numpy(), language.numpy(), budget, price)
            wanted_values = made.setting_logits(logits)[0].detach().numpy() / made.logit_scale
            np.testing.assert_allclose(values, wanted_values, rtol=1e-4, atol=1e-4)
            allowed = made.allowed(logits["feasible"])[0].numpy()
            assert np.where(allowed, values, -np.inf).argmax() == wanted
            chosen.add(wanted)
    assert len(chosen) > 1


def test_features_of_another_width_are_named():
    with pytest.raises(InputError, match=r"language feature has shape \[4\].*built for 5"):
        ValueNetwork(trained(4)).values(np.ones(6, np.float32), np.ones(4, np.float32), 50.0, None)
