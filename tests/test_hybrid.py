"""Hybrid language models: the block that counts tokens stays, and answers are those of a model with fewer blocks."""

import re
from types import SimpleNamespace

import pytest
import torch
from test_families import QUESTIONS, picture
from tiny_families import write_tiny_family
from torch import nn
from transformers import AutoConfig

from budgetvlm.vlm import attention, detect, load_vlm
from budgetvlm.vlm.blocks import default_order
from budgetvlm.vlm.probe import Probe, setting_with


def language(*kinds):
    return SimpleNamespace(config=SimpleNamespace(layer_types=list(kinds)))


@pytest.mark.parametrize(
    ("kinds", "counting"),
    [
        ((), ()),
        (("full_attention", "sliding_attention"), ()),  # the first block counts, which always runs
        (("linear_attention", "linear_attention", "full_attention", "full_attention"), (2,)),
        (("conv", "sliding_attention", "full_attention"), (1,)),
    ],
)
def test_the_first_block_with_keys_counts(kinds, counting):
    assert attention.counting_blocks(language(*kinds)) == counting


def test_it_leads_the_order_of_blocks():
    kinds = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 3 + ["full_attention"]
    assert default_order(8, attention.counting_blocks(language(*kinds)))[:4] == (0, 7, 3, 1)


def test_an_unknown_hybrid_is_not_told_that_it_has_blocks_to_skip():
    block = nn.ModuleDict({"attention": nn.Linear(2, 2)})
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([block, block])})})
    model["decoder"].config = SimpleNamespace(layer_types=["full_attention", "strange_attention"])
    assert detect.find_blocks(model) == (
        "decoder.layers (2), which cannot be skipped: of strange_attention no cache is known"
    )


def reference(vlm, directory, kept, top_k):
    """Build a model of these blocks and of so many experts by Transformers alone, with the weights of another."""
    config = AutoConfig.from_pretrained(directory)
    text = config.get_text_config()
    by_block = {k: v for k, v in text.to_dict().items() if isinstance(v, list) and len(v) == text.num_hidden_layers}
    fields = {**text.to_dict(), "num_hidden_layers": len(kept)}
    fields |= {name: [values[i] for i in kept] for name, values in by_block.items()}
    if top_k:
        fields["num_experts_per_tok"] = top_k
    config.text_config = type(text)(**fields)
    model = type(vlm.model)._from_config(config, dtype=torch.float32).eval()
    model.set_experts_implementation("eager")
    places = {str(old): str(new) for new, old in enumerate(kept)}
    weights = {}
    for name, weight in vlm.model.state_dict().items():
        block = re.fullmatch(r"(model\.language_model\.layers\.)(\d+)(\..*)", name)
        if not block or block[2] in places:
            weights[f"{block[1]}{places[block[2]]}{block[3]}" if block else name] = weight
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@torch.inference_mode()
def test_a_setting_of_a_hybrid_is_a_model_that_was_made_so(tmp_path, name):
    """Its logits within 1e-5 standard deviations, and the same answer, which is decoded from a cache of its own."""
    vlm = load_vlm(str(write_tiny_family(name, tmp_path)))
    space, image, question = vlm.knob_space, picture(), QUESTIONS[0]
    few = int(space.values("top_k")[0]) if "top_k" in space.names else None
    probe = Probe(vlm, [image], [question])
    prompt = probe.prompt(crops := int(space.full["max_crops"]))
    inputs = vlm.images.plain(image, crops) | vlm.family.plain_arguments(prompt, vlm.model)
    ids = torch.tensor([prompt.token_ids])
    for depth in space.values("num_active_blocks"):
        kept = list(vlm.active_blocks(int(depth)))
        assert vlm.decoder.model.config.layer_types.index("full_attention") == 2 and 2 in kept
        setting = setting_with(space, num_active_blocks=depth, **({"top_k": few} if few else {}))
        model = reference(vlm, tmp_path, kept, few)
        wanted = model(input_ids=ids, use_cache=False, **inputs).logits[0, -1]
        assert float((probe.logits_at(setting) - wanted).abs().max() / wanted.std()) <= 1e-5
        answer = vlm.generate(image, question, setting, max_new_tokens=6).token_ids
        made = model.generate(input_ids=ids, **inputs, max_new_tokens=6, do_sample=False)
        assert tuple(made[0, len(prompt) :].tolist()) == answer


def test_a_hybrid_without_its_counting_block_would_drift(tmp_path, monkeypatch):
    from budgetvlm.vlm.conformance import check

    directory = write_tiny_family("qwen3_5", tmp_path)
    monkeypatch.setattr("budgetvlm.vlm.families.base.counting_blocks", lambda language: ())
    vlm = load_vlm(str(directory))
    probe = Probe(vlm, [picture(i, size) for i, size in enumerate([(150, 96), (40, 100)])], QUESTIONS)
    failed = {one.name for one in check(probe) if one.passed is False}
    assert "cached decoding is uncached decoding" in failed or "a batch is its members one by one" in failed
