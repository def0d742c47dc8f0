"""Every family on a tiny model of it: the checks that `budgetvlm check-model` runs, and each family's own arithmetic."""

import numpy as np
import pytest
from PIL import Image
from tiny_families import BUILDERS, write_tiny_family

from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.conformance import CHECKS, Probe, check

QUESTIONS = ["what is the red sign", "sum of both"]
SIZES = [(128, 96), (40, 100)]


def picture(seed=0, size=(128, 96)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each family's model, made when it is first asked for."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = load_vlm(str(write_tiny_family(name, tmp_path_factory.mktemp(name))))
        return made[name]

    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_of_every_family_holds_all_checks(models, name):
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    outcomes = check(Probe(models(name), images, QUESTIONS))
    assert [o.name for o in outcomes] == list(CHECKS)
    assert [f"{o.name}: {o.detail}" for o in outcomes if o.passed is False] == []
