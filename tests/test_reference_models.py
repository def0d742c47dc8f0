"""A setting of every family against a model that really has fewer blocks and really chooses fewer experts."""

import pytest
import torch
from test_families import QUESTIONS, SIZES, picture
from tiny_more_families import BUILDERS

from budgetvlm.vlm.probe import Probe, setting_with

EXPERTS_CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
LISTS_OF_BLOCKS = (
    "moe_layers",
    "mlp_only_layers",
    "rope_scaling_layers",
)  # by index; other lists have a place for each
CLOSE = 1e-5  # standard deviations of the logits


def smaller_config(config, active, top_k):
    """The configuration of just these blocks, with this number of experts a token."""
    fields = config.to_dict()
    text = fields["text_config"]
    whole, places = text["num_hidden_layers"], {old: new for new, old in enumerate(active)}
    if "per_layer_config" in text:
        kept = ((int(i), layer) for i, layer in text["per_layer_config"].items())
        text["per_layer_config"] = {places[i]: layer for i, layer in kept if i in places}
    for name, value in text.items():
        if name in LISTS_OF_BLOCKS and value is not None:
            text[name] = [places[i] for i in value if i in places]
        elif isinstance(value, list) and len(value) == whole:
            text[name] = [value[i] for i in active]
    if text.get("num_kv_shared_layers"):
        text["num_kv_shared_layers"] = sum(i >= whole - text["num_kv_shared_layers"] for i in active)
    text |= {"num_hidden_layers": len(active)} | {name: top_k for name in EXPERTS_CHOSEN if top_k and name in text}
    return type(config).from_dict(fields)


def smaller_weights(vlm, active):
    """The weights of just these blocks, under the names that they have in a model of their own."""
    holder, list_name = vlm.family.blocks(vlm.model)
    prefix = next(name for name, module in vlm.model.named_modules() if module is holder)
    weights, whole = {}, len(vlm.layers)
    for name, value in vlm.model.state_dict().items():
        head, behind, tail = name.partition(f"{prefix}.{list_name}.")
        if behind and not head:
            index, _, rest = tail.partition(".")
            if int(index) in active:
                weights[f"{behind}{active.index(int(index))}.{rest}"] = value
        elif "embed_tokens_per_layer" in name:
            weights[name] = value.unflatten(1, (whole, -1))[:, list(active)].flatten(1)
        elif "per_layer_model_projection" in name:
            weights[name] = value.unflatten(0, (whole, -1))[list(active)].flatten(0, 1)
        else:
            weights[name] = value
    return weights


@pytest.mark.parametrize("name", BUILDERS)
@torch.inference_mode()
def test_a_setting_is_a_model_of_its_blocks_and_experts(models, name):
    """One block less: where features are added behind the first blocks, those stay."""
    vlm = models(name)
    probe = Probe(vlm, [picture(0, SIZES[0])], QUESTIONS[:1])
    small = {"num_active_blocks": vlm.knob_space.values("num_active_blocks")[-2]}
    if vlm.dials:
        small["top_k"] = vlm.knob_space.values("top_k")[0]
    setting = setting_with(vlm.knob_space, **small)
    active = vlm.active_blocks(int(setting["num_active_blocks"]))
    assert len(active) < vlm.num_total_blocks

    reference = type(vlm.model)(smaller_config(vlm.model.config, active, int(setting.get("top_k", 0))))
    reference.load_state_dict(smaller_weights(vlm, active))
    prompt, crops = probe.prompt(probe.crops(setting)), probe.crops(setting)
    told = vlm.images.plain(probe.images[0], crops) | vlm.family.plain_arguments(prompt, vlm.model)
    wanted = vlm.family.untouched_logits(reference.eval(), prompt, told)
    got = probe.logits_at(setting)
    assert float((got - wanted).abs().max() / wanted.std()) < CLOSE
    whole = probe.logits_at(vlm.knob_space.full)
    assert float((whole - wanted).abs().max() / wanted.std()) > 100 * CLOSE
