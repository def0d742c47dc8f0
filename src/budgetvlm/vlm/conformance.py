"""Checks that a model's knobs do what they say: for users on their own model, and for the tests of every family.

A check is a function from a `Probe` to one line of detail; it raises `Broken` where the model does not hold what it
must. Shapes: B prompts, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from budgetvlm._io import time_text
from budgetvlm.errors import BudgetVLMError, InputError
from budgetvlm.knobs import Setting
from budgetvlm.vlm.conversation import about, text_part
from budgetvlm.vlm.knob_limits import distinct_crops
from budgetvlm.vlm.own_processor import NoReference
from budgetvlm.vlm.probe import (
    STEPS,
    Broken,
    Probe,
    TopKRecorder,
    fastest,
    own_values,
    setting_with,
    small_image,
    state_of,
)
from budgetvlm.vlm.prompt import IMAGE, EmbeddedPrompt
from budgetvlm.vlm.protocol import Conversation, Deadline

ODD_SIZES = ((64, 64), (90, 61), (47, 130))
ODD_QUESTIONS = ("  what is this", "what\n\nis\tthis \n", "\nwhat is this?")


def prompt_is_the_processors(probe: Probe) -> str:
    """Token ids are those of the model's own processor: several sizes and crops, odd questions, conversations."""
    missing, cases, _ = [], list(_prompts(probe)), probe.own_processor
    for said, crops, plain in cases:
        try:
            probe.same_ids(said, crops, plain=plain)
        except (NoReference, InputError) as reason:
            missing.append(str(reason))
    if len(missing) == len(cases):
        raise NoReference(missing[0])
    note = f"; {len(missing)} more have nothing to be compared with ({missing[0]})" if missing else ""
    return f"{len(cases) - len(missing)} prompts alike{note}"


def _prompts(probe: Probe) -> Iterator[tuple[Conversation, int, bool]]:
    """Yield what is said, crops, and whether it holds the name of a special token."""
    image, question, most = probe.images[0], probe.questions[0], probe.crops(probe.space.full)
    tokenizer, edges = probe.vlm.prompt.tokenizer, probe.vlm.images.edges()
    said = about(image, question)
    yield from ((said, crops, False) for crops in sorted({probe.crops(s) for s in probe.space.settings}))
    yield from ((about(other, question), most, False) for other in probe.images[1:])
    yield from ((about(Image.new("RGB", size), question), most, False) for size in ODD_SIZES)
    yield from ((about(image, odd), most, False) for odd in ODD_QUESTIONS)
    names = {*tokenizer.convert_ids_to_tokens(edges), tokenizer.eos_token or ""}
    yield from ((about(image, f"what is {name} here"), most, True) for name in sorted(names - {""}))
    # a second question, and one about a second image
    turns = *said.turns, {"role": "assistant", "content": [text_part(question)]}
    yield Conversation((*turns, {"role": "user", "content": [text_part(question)]}), (image,), question), most, False
    if not probe.vlm.family.one_image:
        last = {"role": "user", "content": [text_part("what"), IMAGE, text_part(question)]}
        yield (
            Conversation((*turns, last), (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), question),
            most,
            False,
        )


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
        if got != layout.num_visual or count != probe.vlm.prompt.num_image_tokens(layout):
            raise Broken(f"max_crops={value}: {got} visual tokens encoded, {layout.num_visual} promised")
    if sorted(counts) != counts or counts[0] == counts[-1]:
        raise Broken(f"tokens do not grow with max_crops: {counts}; a larger image may be needed to see it")
    seen = ", ".join(f"{value:g}: {count}" for value, count in zip(crops, counts, strict=True)) + " tokens"
    same = sorted({*crops} - {*distinct_crops(probe.vlm.images, [int(value) for value in crops])})
    named = ", ".join(f"{value:g}" for value in same)
    return f"{seen}; max_crops={named} shows ordinary images as a value before, and may be left out" if same else seen


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
    moved = {}
    for name in probe.space.names:
        largest = probe.space.full if name == "max_crops" else small_image(probe.space)
        full = probe.logits_at(largest)
        small = probe.logits_at(probe.space.setting(**{**largest, name: probe.space.values(name)[0]}))
        moved[name] = float((small.float() - full.float()).abs().max() / full.float().std())
        if len(probe.space.values(name)) > 1 and moved[name] <= probe.tolerance:
            raise Broken(f"{name} changes nothing: logits at its smallest value are those of the full setting")
    return ", ".join(f"{name} {value:.2g}" for name, value in moved.items()) + " standard deviations"


def cached_is_uncached(probe: Probe) -> str:
    """At every setting each step's logits from the cache are those of reading everything at once."""
    worst = 0.0
    for setting in probe.settings:
        cached, ids = probe.decoded(setting)
        uncached = probe.read_at_once(setting, ids)
        for step in range(1 + STEPS):
            where = f"{setting}, step {step}, cached against uncached"
            worst = max(worst, probe.same(cached[step], uncached[step], where))
    return f"{len(probe.settings)} settings, {STEPS} steps: logits differ by at most {worst:.1e} standard deviations"


def batch_is_single(probe: Probe) -> str:
    """A prompt in one padded batch with shorter ones has the logits that it has alone, also a token later, as they."""
    worst, count, least = 0.0, len(probe.images), probe.crops(probe.space.cheapest)
    for setting in probe.settings:
        others = [probe.prompt(least, i) for i in range(1, count)]
        with probe.vlm.apply(setting):
            alone = [probe.decoded(setting)[0][:2], *(torch.cat(_two_steps(probe, [prompt])) for prompt in others)]
            tokens = [int(steps[0].argmax()) for steps in alone]
            together = _two_steps(probe, [probe.prompt(probe.crops(setting)), *others], tokens)
            for step in (0, 1):
                for i in range(count):
                    where = f"{setting}, prompt {i + 1}, step {step + 1}, batch against single"
                    worst = max(worst, probe.same(together[step][i], alone[i][step], where))
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
    with probe.memory.anew():
        overview = probe.vlm.encode_overview(probe.images[0])
    crops, saved, worst = sorted({probe.crops(s) for s in probe.space.settings}), [], 0.0
    for value in crops:
        visual = probe.vlm.images.visual_tokens(probe.images[0], value, overview.tokens)
        if not torch.equal(visual, probe.visual(value)):
            prompt = probe.vlm.embed_prompt(visual, probe.question_ids[0], probe.layout(value))
            where = f"max_crops={value}, reused overview against none"
            worst = max(worst, probe.same(probe.logits(prompt), probe.logits(probe.prompt(value)), where))
        left = len(probe.vlm.images.beside(probe.images[0], value))
        if left < len(probe.vlm.images.all(probe.images[0], value)):
            saved.append(value)
    cost = time_text(overview.preprocess_ms + overview.vision_ms)
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
    """An answer with all experts and blocks goes on with the least of them from its second token on."""
    full, quickest = small_image(probe.space), probe.space.cheapest
    one = probe.answer(full, 1)
    if one.finish_reason == "stop":
        return "the answer is a single token"
    hurried = probe.answer(full, 1 + STEPS, Deadline.at_once(quickest))
    if hurried.token_ids[:1] != one.token_ids or len(hurried.hurried) != hurried.num_output_tokens - 1:
        raise Broken(f"hurried answers begin with {hurried.token_ids[:1]}, the setting's own with {one.token_ids}")
    return f"{hurried.text!r}, {len(hurried.hurried)} tokens of it at {quickest}"


def reading_may_be_hurried(probe: Probe) -> str:
    """A prompt of all experts and blocks, read in a hurry from its first block on, is read as at the least setting."""
    full, quickest = small_image(probe.space), probe.space.cheapest
    least = probe.answer(quickest, STEPS)
    hurried = probe.answer(full, STEPS, Deadline.over(quickest))
    if hurried.token_ids != least.token_ids or len(hurried.hurried) != hurried.num_output_tokens:
        raise Broken(f"read in a hurry, the answer is {hurried.token_ids}, at {quickest} it is {least.token_ids}")
    return f"{hurried.text!r}, as at {quickest}"


CHECKS: dict[str, tuple[str | None, Callable[[Probe], str]]] = {
    "prompt is the processor's": (None, prompt_is_the_processors),
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
    """The outcome of one check: whether it holds (None: it does not apply to this model), and what was seen."""

    name: str
    passed: bool | None
    detail: str


@torch.inference_mode()
def check(probe: Probe, say: Callable[[str], None] = lambda name: None) -> list[Check]:
    """Run all checks; ``say`` is told how long it may take, and each verdict as it falls."""
    done = []
    with probe.memory:
        say(f"about {probe.seconds() / 60:.1f} minutes for {len(CHECKS)} checks at {len(probe.settings)} settings")
        for name, (knob, run) in CHECKS.items():
            lacks = knob and (knob not in probe.space.names or len(probe.space.values(knob)) < 2)
            done.append(Check(name, None, f"the model has no knob {knob}") if lacks else _one(name, run, probe))
            verdict = {True: "holds", False: "BROKEN", None: "left out"}[done[-1].passed]
            say(f"{verdict}: {name}: {done[-1].detail}")
    return done


def _one(name: str, run: Callable[[Probe], str], probe: Probe) -> Check:
    try:
        return Check(name, True, run(probe))
    except NoReference as reason:
        return Check(name, None, f"nothing to compare with: {reason}")
    except (Broken, BudgetVLMError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever the model's own code raises is a finding, not an end
        return Check(name, False, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


@torch.inference_mode()
def time_settings(probe: Probe, *, repeats: int = 3, max_new_tokens: int = 4) -> dict[Setting, dict[str, float]]:
    """Time requests at each setting; return the stages of the fastest one, and "total", in ms.

    An image is encoded for each number of crops, not for each setting.
    """
    times = {}
    with probe.memory:
        for setting in probe.settings:
            stages = fastest(partial(_text_ms, probe, setting, max_new_tokens), repeats)
            times[setting] = {**probe.image_ms(probe.crops(setting), repeats), **stages}
            times[setting]["total"] = sum(times[setting].values())
    return times


def _text_ms(probe: Probe, setting: Setting, max_new_tokens: int) -> dict[str, float]:
    stages = probe.answer(setting, max_new_tokens).stages_ms
    return {name: ms for name, ms in stages.items() if name not in ("preprocess", "vision")}
