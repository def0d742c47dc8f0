"""Every family on a tiny model of it: the checks of `budgetvlm check-model`, and each family's own arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import BUILDERS, ID, write_tiny_family, write_tokenizer
from tiny_molmo import ImageProcessor, TinyMolmo, Tokenizer
from transformers import AutoTokenizer

from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.conformance import CHECKS, Probe, check
from budgetvlm.vlm.families.molmo import Molmo, MolmoImages
from budgetvlm.vlm.loading import derive_knob_space
from budgetvlm.vlm.prompt import Prompt

QUESTIONS = ["what is the red sign", "sum of both"]
SIZES = [(150, 96), (40, 100)]


def picture(seed=0, size=(150, 96)):
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


@pytest.fixture(scope="module")
def molmo(tmp_path_factory):
    words = tmp_path_factory.mktemp("words")
    write_tokenizer(words, "<image>")
    tokenizer = AutoTokenizer.from_pretrained(words)
    family, model = Molmo(), TinyMolmo()
    images = MolmoImages(model, ImageProcessor(), Tokenizer())
    return Adapter(
        "tiny", family, model, images, Prompt.from_template(tokenizer, "</s>{image} : {question} <a>"),
        derive_knob_space(family, model, images), [0, 3, 2, 1], [ID["</s>"]],
    )  # fmt: skip


def test_molmo_with_its_caches_of_pairs_holds_all_checks(molmo):
    outcomes = check(Probe(molmo, [picture(i, size) for i, size in enumerate(SIZES)], QUESTIONS))
    assert [f"{o.name}: {o.detail}" for o in outcomes if not o.passed] == []
    assert molmo.knob_space.to_dict() == {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]}


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (150, 96), (40, 100)])
def test_molmos_overview_is_reused_where_the_mask_allows_it(molmo, size):
    """The processor gives the overview the first tile's mask: padded in one tiling, it may be whole in another."""
    image, left = picture(3, size), []
    overview = molmo.encode_overview(image)
    for crops in (1, 2, 4):
        with torch.inference_mode():
            assert torch.allclose(molmo.visual(image, crops, overview), molmo.visual(image, crops), atol=1e-6)
        left.append(len(molmo.images.all(image, crops)) - len(molmo.images.beside(image, crops)))
    assert left[0] == 1 and set(left) <= {0, 1}


def test_a_pair_cache_is_as_long_as_the_model_insists(molmo):
    cache = molmo.decoder.new_cache()
    assert cache.padded(4) is None and cache.get_seq_length() == 0
    cache.pairs = ["first", "last"]
    assert cache.padded(4) == ["first", "last", "last", "last"]
