"""Models of types that no family is written for: which knobs are found, and that what fails is not offered."""

from functools import lru_cache

import pytest
import torch
from test_families import QUESTIONS, SIZES, picture
from test_hybrid import reference
from test_several_images import FIRST, chat, prompt_of
from tiny_families import write_tiny
from tiny_found import FOUND, FOUND_TOKENS

from budgetvlm.errors import ConfigError, InputError
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.conformance import check
from budgetvlm.vlm.families.generic import FoundInputs
from budgetvlm.vlm.probe import Probe, one_knob_at_a_time, setting_with

KNOBS = {
    "ovis2": {"max_crops": [1, 2, 4], "num_active_blocks": [2, 3, 4]},
    "minicpmv4_6": {"max_crops": [1, 2, 4], "num_active_blocks": [3, 5, 6]},
    "deepseek_ocr2": {"top_k": [1, 4], "num_active_blocks": [2, 4]},
    "aya_vision": {"max_crops": [1, 2, 4], "num_active_blocks": [2, 3, 4]},
    "vipllava": {"top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]},
    "kimi_k25": {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]},
    "lfm2_vl": {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [3, 5, 6]},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = {}

    def directory(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            write_tiny(*FOUND[name](), made[name], FOUND_TOKENS)
        return made[name]

    return directory


@pytest.fixture(scope="module")
def vlms(directories):
    return lru_cache(None)(lambda name: load_vlm(str(directories(name))))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "budgetvlm" / "knobs"


@pytest.mark.parametrize("name", FOUND)
def test_knobs_of_an_unknown_type_are_found_and_hold_all_checks(vlms, name):
    vlm = vlms(name)
    assert vlm.knob_space.to_dict() == KNOBS[name]
    assert "found by trying and not written by hand" in vlm.family.name
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    outcomes = check(Probe(vlm, images, QUESTIONS, one_knob_at_a_time(vlm.knob_space)))
    assert [f"{one.name}: {one.detail}" for one in outcomes if one.passed is False] == []


@pytest.mark.parametrize("name", FOUND)
@torch.inference_mode()
def test_a_setting_of_what_was_found_is_a_model_that_was_made_so(directories, vlms, name):
    """Fewest blocks and experts against a model that has no others, with its own processor's pixels and ids."""
    vlm, image, question = vlms(name), picture(), QUESTIONS[0]
    least = {k: vlm.knob_space.values(k)[0] for k in vlm.knob_space.names if k != "max_crops"}
    probe = Probe(vlm, [image], [question])
    prompt = probe.prompt(vlm.most_crops)
    inputs = vlm.images.plain(image, vlm.most_crops) | vlm.family.plain_arguments(prompt, vlm.model)
    kept = list(vlm.active_blocks(int(least["num_active_blocks"])))
    model = reference(vlm, directories(name), kept, int(least.get("top_k", 0)))
    wanted = model(input_ids=torch.tensor([prompt.token_ids]), use_cache=False, **inputs).logits[0, -1]
    got = probe.logits_at(setting_with(vlm.knob_space, **least))
    assert float((got - wanted).abs().max() / wanted.std()) <= 1e-5


def test_what_works_is_tried_once(directories, cache, monkeypatch):
    directory = directories("vipllava")
    first = load_vlm(str(directory)).knob_space
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("budgetvlm.vlm.finding.check", lambda probe: pytest.fail("tried again"))
    assert load_vlm(str(directory)).knob_space == first


def test_a_knob_that_fails_is_not_offered(directories, monkeypatch):
    """A router that asks its configuration, not its attribute: turning the attribute changes nothing."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    def stubborn(self, hidden_states):
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        weights, chosen = torch.topk(logits.softmax(-1), 4, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(MixtralTopKRouter, "forward", stubborn)
    assert load_vlm(str(directories("vipllava"))).knob_space.names == ("num_active_blocks",)


def test_where_nothing_works_the_message_says_what_was_tried(directories, monkeypatch):
    monkeypatch.setattr(FoundInputs, "step", lambda self, token: {"position_ids": torch.zeros(1, 1, dtype=torch.long)})
    with pytest.raises(ConfigError, match=r"no knob .* found to work.*num_active_blocks: .*cached decoding"):
        load_vlm(str(directories("vipllava")))


@pytest.mark.parametrize("name", FOUND)
@torch.inference_mode()
def test_several_turns_and_text_alone_are_read_as_by_the_models_own_forward(vlms, name):
    vlm, crops = vlms(name), vlms(name).most_crops
    for conversation in (chat(FIRST), chat()):
        prompt = prompt_of(vlm, conversation, crops)
        got = vlm.decoder.logits(prompt.embeddings[None], **vlm.decoder_inputs([prompt]).prefill())[0]
        inputs = vlm.images.plain(FIRST, crops) if conversation.images else {}
        wanted = vlm.family.untouched_logits(vlm.model, prompt, inputs | vlm.family.plain_arguments(prompt, vlm.model))
        assert float((got - wanted).abs().max() / wanted.std()) < 1e-3
        made = vlm.generate(None, conversation, vlm.knob_space.full, max_new_tokens=2)
        assert made.token_ids[0] == int(got.argmax())
    with pytest.raises(InputError, match="takes one image, given 2"):
        vlm.prompt_size(None, chat(FIRST, FIRST))
