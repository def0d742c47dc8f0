"""Checks that a model's knobs do what they say: for users on their own model, and for the tests of every family.

A check is a function from a `Probe` to one line of detail; it raises `Broken` where the model does not hold what it
must. Shapes: B prompts, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from budgetvlm.errors import BudgetVLMError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm.probe import Broken, Probe, TopKRecorder, own_values, setting_with, state_of
from budgetvlm.vlm.prompt import EmbeddedPrompt
from budgetvlm.vlm.protocol import Deadline

STEPS = 3  # tokens decoded in a check


def full_is_untouched(probe: Probe) -> str:
    """At the full setting the logits are those of the model's own forward."""
    full = probe.space.full
    wanted = probe.untouched(probe.crops(full))
    own = own_values(probe.vlm)
    lower = [f"{name}={full[name]:g} of {own[name]}" for name in full if full[name] < own[name]]
    if lower:
        with probe.vlm.apply(full):
            wanted = probe.untouched(probe.crops(full))
    apart = probe.same(probe.logits_at(full), wanted, "full setting against the model's own forward")
    note = f"; the knob space stops below the model's own ({', '.join(lower)})" if lower else ""
    return f"logits differ by {apart:.1e} standard deviations{note}"


def visual_tokens_fall(probe: Probe) -> str:
    """Fewer crops give fewer visual tokens, and as many as `prompt_size` says."""
    crops = list(probe.space.values("max_crops"))
    promised, _ = probe.vlm.prompt_size(probe.images[0], probe.questions[0])
    by_setting = dict(zip(probe.space.settings, promised.tolist(), strict=True))
    counts = [int(by_setting[setting_with(probe.space, max_crops=value)]) for value in crops]
    for value, count in zip(crops, counts, strict=True):
        layout, got = probe.layout(int(value)), len(probe.visual(int(value)))
        if got != layout.num_visual or count != len(layout.ids):
            raise Broken(f"max_crops={value}: {got} visual tokens encoded, {layout.num_visual} promised")
    if sorted(counts) != counts or counts[0] == counts[-1]:
        raise Broken(f"tokens do not grow with max_crops: {counts}; a larger image may be needed to see it")
    return ", ".join(f"{value:g}: {count}" for value, count in zip(crops, counts, strict=True)) + " tokens"


def experts_fall(probe: Probe) -> str:
    """The number of experts asked for per token and layer is the setting's."""
    values = [int(value) for value in probe.space.values("top_k")]
    prompt, own = probe.prompt(probe.crops(probe.space.cheapest)), own_values(probe.vlm)["top_k"]
    asked, missed = [], 0
    for value in values:
        with probe.vlm.apply(setting_with(probe.space, top_k=value)), TopKRecorder(probe.vlm.dials[0].most) as watch:
            probe.logits(prompt)
        asked.append(sum(watch.chosen))
        # some routers choose groups by their two best experts first, whatever top_k is
        missed = max(missed, watch.chosen.count(own) if own not in (value, 2) else 0)
    steps = [(b - a) / (y - x) for a, b, x, y in zip(asked, asked[1:], values, values[1:], strict=False)]
    layers = steps[0] if steps else 0
    if layers < 1 or any(step != layers for step in steps):
        raise Broken(f"top_k={values} asks the routers for {asked} experts in all; the knob does not reach them")
    if missed:
        raise Broken(f"{missed} routers still choose {own} experts: the knob reaches only {layers:g} of them")
    return f"{', '.join(map(str, values))} a token in each of {layers:g} layers"


def fewer_blocks_run(probe: Probe) -> str:
    """At each depth just the active blocks run."""
    prompt = probe.prompt(probe.crops(probe.space.cheapest))
    depths = [int(value) for value in probe.space.values("num_active_blocks")]
    for depth in depths:
        ran = _blocks_that_run(probe, setting_with(probe.space, num_active_blocks=depth), prompt)
        if tuple(ran) != probe.vlm.active_blocks(depth):
            raise Broken(f"num_active_blocks={depth}: blocks {ran} ran, not {list(probe.vlm.active_blocks(depth))}")
    return f"{', '.join(map(str, depths))} of {probe.vlm.num_total_blocks}"


def _blocks_that_run(probe: Probe, setting: Setting, prompt: EmbeddedPrompt) -> list[int]:
    """Return indices of blocks in the order in which they run."""
    number = {id(layer): i for i, layer in enumerate(probe.vlm.layers)}
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda module, *_: ran.append(number[id(module)])) for layer in probe.vlm.layers
    ]
    try:
        with probe.vlm.apply(setting):
            probe.logits(prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def every_knob_matters(probe: Probe) -> str:
    """The smallest value of each knob gives other logits than the largest."""
    full = probe.logits_at(probe.space.full)
    moved = {}
    for name in probe.space.names:
        small = probe.logits_at(setting_with(probe.space, **{name: probe.space.values(name)[0]}))
        moved[name] = float((small.float() - full.float()).abs().max() / full.float().std())
        if len(probe.space.values(name)) > 1 and moved[name] <= probe.tolerance:
            raise Broken(f"{name} changes nothing: logits at its smallest value are those of the full setting")
    return ", ".join(f"{name} {value:.2g}" for name, value in moved.items()) + " standard deviations"


def cached_is_uncached(probe: Probe) -> str:
    """At every setting each step's logits from the cache are those of reading everything again."""
    worst = 0.0
    for setting in probe.settings:
        with probe.vlm.apply(setting):
            worst = max(worst, _decode_both_ways(probe, setting))
    return f"{len(probe.settings)} settings, {STEPS} steps: logits differ by at most {worst:.1e} standard deviations"


def _decode_both_ways(probe: Probe, setting: Setting) -> float:
    decoder, crops = probe.vlm.decoder, probe.crops(setting)
    prompt = probe.prompt(crops)
    inputs = probe.vlm.decoder_inputs([prompt])
    cache, token = decoder.prefill(prompt.embeddings[None], **inputs.prefill())
    answer, worst = [int(token)], 0.0
    for step in range(STEPS):
        cached = decoder.logits(decoder.embed(token[:, None]), cache, **inputs.step(token))[0]
        uncached = probe.logits(probe.prompt(crops, answer_ids=answer))
        worst = max(worst, probe.same(cached, uncached, f"{setting}, step {step + 1}, cached against uncached"))
        token = cached.argmax(-1, keepdim=True)
        answer.append(int(token))
    return worst


def batch_is_single(probe: Probe) -> str:
    """Prompts of several lengths in one padded batch have the logits that each has alone, also a token later."""
    worst, count = 0.0, len(probe.images)
    for setting in probe.settings:
        with probe.vlm.apply(setting):
            prompts = [probe.prompt(probe.crops(setting), i) for i in range(count)]
            alone = [_two_steps(probe, [prompt]) for prompt in prompts]
            together = _two_steps(probe, prompts, [int(first.argmax()) for first, _ in alone])
            for step in (0, 1):
                for i in range(count):
                    where = f"{setting}, prompt {i + 1}, step {step + 1}, batch against single"
                    worst = max(worst, probe.same(together[step][i], alone[i][step][0], where))
    return f"{count} prompts, {len(probe.settings)} settings: at most {worst:.1e} standard deviations"


def _two_steps(
    probe: Probe, prompts: Sequence[EmbeddedPrompt], tokens: Sequence[int] | None = None
) -> tuple[torch.Tensor, ...]:
    """Return logits behind the prompts and behind one more token (given, or the likeliest), ``[B, V]`` each."""
    decoder, inputs = probe.vlm.decoder, probe.vlm.decoder_inputs(prompts)
    cache = decoder.new_cache()
    first = decoder.logits(inputs.embeddings(), cache, **inputs.prefill())
    token = first.argmax(-1) if tokens is None else torch.tensor(tokens, device=first.device)
    return first, decoder.logits(decoder.embed(token[:, None]), cache, **inputs.step(token))


def overview_is_reused(probe: Probe) -> str:
    """With the overview encoded before, logits are those of encoding everything; and how often it saves anything."""
    overview = probe.vlm.encode_overview(probe.images[0])
    crops, saved, worst = sorted({probe.crops(s) for s in probe.space.settings}), [], 0.0
    for value in crops:
        visual = probe.vlm.images.visual_tokens(probe.images[0], value, overview.tokens)
        prompt = probe.vlm.embed_prompt(visual, probe.question_ids[0], probe.layout(value))
        where = f"max_crops={value}, reused overview against none"
        worst = max(worst, probe.same(probe.logits(prompt), probe.logits(probe.prompt(value)), where))
        left = len(probe.vlm.images.beside(probe.images[0], value))
        if left < len(probe.vlm.images.all(probe.images[0], value)):
            saved.append(value)
    cost = f"{overview.preprocess_ms + overview.vision_ms:.0f} ms"
    if len(saved) == len(crops):
        return f"part of every setting, so that reading it costs nothing ({cost}); at most {worst:.1e}"
    where = f"reused at max_crops={', '.join(map(str, saved))}" if saved else "never reused"
    return f"the features take {cost} of their own, {where}; at most {worst:.1e}"


def restored_afterwards(probe: Probe) -> str:
    """After all settings, and after an exception within one, the model is as before, to the bit."""
    prompt, before = probe.prompt(probe.crops(probe.space.cheapest)), state_of(probe.vlm)
    logits = probe.logits(prompt)
    for setting in (probe.space.cheapest, probe.space.full):
        try:
            with probe.vlm.apply(setting):
                probe.logits(prompt)
                raise Broken("on purpose")
        except Broken:
            pass
        if state_of(probe.vlm) != before or not torch.equal(probe.logits(prompt), logits):
            raise Broken(f"{setting}: the model is not as before after an exception")
    return "layers, experts and logits as before, also after an exception"


def answers_end(probe: Probe) -> str:
    """`generate` and `generate_batch` answer at the cheapest and at the full setting, alike."""
    texts = []
    for setting in (probe.space.cheapest, probe.space.full):
        single = probe.answer(setting, STEPS)
        batch = probe.vlm.generate_batch(probe.images[:1], probe.questions[:1], setting, max_new_tokens=STEPS)[0]
        if single.token_ids != batch.token_ids:
            raise Broken(f"{setting}: generate says {single.token_ids}, generate_batch {batch.token_ids}")
        texts.append(repr(single.text))
    return " and ".join(texts)


def answers_may_be_hurried(probe: Probe) -> str:
    """An answer of the full setting goes on with the least experts and blocks from its second token on."""
    full, quickest = probe.space.full, _quickest(probe.space)
    one = probe.answer(full, 1)
    if one.finish_reason == "stop":
        return "the answer is a single token"
    hurried = probe.answer(full, 1 + STEPS, Deadline.at_once(quickest))
    if hurried.token_ids[:1] != one.token_ids or len(hurried.hurried) != hurried.num_output_tokens - 1:
        raise Broken(f"hurried answers begin with {hurried.token_ids[:1]}, the setting's own with {one.token_ids}")
    return f"{hurried.text!r}, {len(hurried.hurried)} tokens of it at {quickest}"


def reading_may_be_hurried(probe: Probe) -> str:
    """A prompt of the full setting that is read in a hurry from its first block on is read as at the least setting."""
    full, quickest = probe.space.full, _quickest(probe.space)
    least = probe.answer(quickest, STEPS)
    hurried = probe.answer(full, STEPS, Deadline.over(quickest))
    if hurried.token_ids != least.token_ids or len(hurried.hurried) != hurried.num_output_tokens:
        raise Broken(f"read in a hurry, the answer is {hurried.token_ids}, at {quickest} it is {least.token_ids}")
    return f"{hurried.text!r}, as at {quickest}"


def _quickest(space: KnobSpace) -> Setting:
    """Return the setting with the smallest value of all knobs but the image's."""
    full = space.full
    return space.setting(**{**space.cheapest, **({"max_crops": full["max_crops"]} if "max_crops" in full else {})})


CHECKS: dict[str, tuple[str | None, Callable[[Probe], str]]] = {
    "full setting is the untouched model": (None, full_is_untouched),
    "visual tokens fall with max_crops": ("max_crops", visual_tokens_fall),
    "experts fall with top_k": ("top_k", experts_fall),
    "blocks fall with num_active_blocks": ("num_active_blocks", fewer_blocks_run),
    "every knob changes the logits": (None, every_knob_matters),
    "cached decoding is uncached decoding": (None, cached_is_uncached),
    "a batch is its members one by one": (None, batch_is_single),
    "a reused overview changes nothing": (None, overview_is_reused),
    "restored afterwards": (None, restored_afterwards),
    "answers": (None, answers_end),
    "answers may be hurried": (None, answers_may_be_hurried),
    "reading may be hurried": (None, reading_may_be_hurried),
}


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        passed: whether it holds; None: it does not apply to this model.
        detail: what was seen.
    """

    name: str
    passed: bool | None
    detail: str


@torch.inference_mode()
def check(probe: Probe, say: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Run all checks; one that fails does not stop the others.

    Args:
        say: told the name of each check before it runs.
    """
    done = []
    for name, (knob, run) in CHECKS.items():
        if knob and (knob not in probe.space.names or len(probe.space.values(knob)) < 2):
            done.append(Check(name, None, f"the model has no knob {knob}"))
            continue
        say(name)
        done.append(_one(name, run, probe))
    return done


def _one(name: str, run: Callable[[Probe], str], probe: Probe) -> Check:
    try:
        return Check(name, True, run(probe))
    except (Broken, BudgetVLMError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever the model's own code raises is a finding, not an end
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return Check(name, False, f"{type(error).__name__}: {first}")


def time_settings(probe: Probe, *, repeats: int = 3, max_new_tokens: int = 4) -> dict[Setting, dict[str, float]]:
    """Time requests at each setting; return the stages of the fastest one, and "total", in ms."""
    times = {}
    for setting in probe.settings:
        runs = [probe.answer(setting, max_new_tokens) for _ in range(1 + repeats)]
        best = min(runs[1:], key=lambda run: run.total_ms)  # the first one warms up
        times[setting] = {**best.stages_ms, "total": best.total_ms}
    return times
