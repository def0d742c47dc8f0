"""Checks of one engine: which knobs it heeds, what its caches, its streams and its clock are like, how much it takes.

All requests but those of the last check are sent one after another, and none after one on which the engine failed: a
wrong option can end an engine for everybody.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from budgetvlm._io import time_text
from budgetvlm.engines.engine_probe import SOME_TOKENS, EngineProbe, NotTold, picture
from budgetvlm.engines.payload import fresh_data_url
from budgetvlm.engines.token_counts import PROBE_SIZES
from budgetvlm.errors import BudgetVLMError, EngineError
from budgetvlm.vlm.conformance import Check
from budgetvlm.vlm.probe import Broken

ESSAY = "Describe all that you see in this image, part by part, in as much detail as you can."
ESSAY_TOKENS = 128
REPEATS = 3
LEAST_S, LOOK_S = 0.25, 0.01  # an essay written faster tells nothing of leaving; how often it is looked what runs
GROWTH = 1.1  # of throughput, below which more requests in flight are not worth their waiting
MOST_IN_FLIGHT = 64
UNSTEERED = "no option of its image processor is known to be heeded with a request, and scaling images changes nothing"


def prompts_are_the_models(probe: EngineProbe) -> str:
    """Prompts with images of several sizes have the tokens of the model whose directory is known."""
    endpoint = probe.endpoint
    endpoint.more_text = 0
    for number, size in enumerate(PROBE_SIZES):
        counted = probe.ask(picture(size), probe.own).counted
        if counted is None:
            raise Broken("its streams count no tokens (stream_options.include_usage), so that nothing can be verified")
        if number == 0:
            endpoint.more_text = counted - probe.right(size, probe.own)
        elif counted != (right := probe.right(size, probe.own)):
            raise Broken(
                f"an image of {size[0]} x {size[1]} is read as {counted} tokens, where the model in "
                f"{endpoint.sketch.vlm.name} has {right}: it serves another model, or was started with other options "
                "of the image processor"
            )
    more = f"; its text around a question is longer by {endpoint.more_text} tokens" if endpoint.more_text else ""
    return f"{len(PROBE_SIZES)} sizes of images alike{more}"


def crops_are_heeded(probe: EngineProbe) -> str:
    """Each value of `max_crops` that is offered gives the tokens that the model has at it."""
    endpoint, wanted, instead = probe.endpoint, probe.endpoint.values["max_crops"], ""
    probe.try_values(wanted)
    first = next(iter(probe.why_not.values()), "")
    if first and len(probe.tokens) < 2 and endpoint.steer == "kwargs" and endpoint.sketch.scales:
        endpoint.steer, instead = "pixels", f"; by scaling images, because its options do not work ({first})"
        probe.try_values(wanted)
    endpoint.values["max_crops"] = tuple(probe.tokens) or (probe.own,)
    if len(endpoint.values["max_crops"]) == 1:
        endpoint.steer = "none" if first else endpoint.steer
        why = "it was started so" if "max_crops" in endpoint.client.spec.knobs else UNSTEERED
        raise NotTold(first or f"images are shown at max_crops={probe.own:g} alone: {why}")
    offered = ", ".join(f"{value:g}: {' / '.join(map(str, tokens))}" for value, tokens in probe.tokens.items())
    sizes = " / ".join(f"{width} x {height}" for width, height in PROBE_SIZES)
    left_out = "".join(f"; {value:g} is not offered, {why}" for value, why in probe.why_not.items())
    return f"image tokens of {sizes}: {offered}{left_out}{instead}"


def settings_are_heeded(probe: EngineProbe) -> str:
    """Of an engine that is told whole settings, answers say that they were made there."""
    endpoint, tried = probe.endpoint, 0
    if not endpoint.dialect.takes_setting:
        raise NotTold("experts and depth are chosen when it is started; another number of them is another engine")
    for name in endpoint.dialect.knobs:
        for value in endpoint.values[name] if name != "max_crops" and endpoint.takes(name) else ():
            reply = probe.ask(picture(PROBE_SIZES[0]), probe.own, knobs={name: value}).reply
            said = (reply.more.get("budgetvlm") or {}).get("setting", {}).get(name)
            if said != value:
                raise Broken(f"asked for {name}={value:g}, it answered at {said}")
            tried += 1
    return f"{tried} values of other knobs, as the answers say"


def caches_are_not_confused(probe: EngineProbe) -> str:
    """The same image shown in two ways, in turns, is read and answered as each of them."""
    pairs = [(size, tokens) for size, tokens in zip(PROBE_SIZES, zip(*probe.tokens.values(), strict=True), strict=True)]
    size = next((size for size, tokens in pairs if tokens[0] != tokens[-1]), None)
    if size is None:
        raise NotTold("there is one way to show an image")
    values = list(probe.tokens)
    turns = [values[0], values[-1], values[0]]
    heard = [probe.ask(picture(size), value, most=SOME_TOKENS) for value in turns]
    for value, one in zip(turns, heard, strict=True):
        if why := probe.wrong(size, value, one.counted):
            raise Broken(f"after the same image at another max_crops, {value:g} is {why}")
    before, other, after = (one.reply.text for one in heard)
    if before != other == after:
        raise Broken(f"after the same image at another max_crops it gives that one's answer, {other!r}, not {before!r}")
    return f"the same image at {values[0]:g}, {values[-1]:g} and {values[0]:g} again: tokens of each" + (
        ", the same answer again" if before == after else f"; answers vary ({before!r}, then {after!r})"
    )


def repeats_are_known(probe: EngineProbe) -> str:
    """Whether a repeated image is quicker, and whether one that is drawn anew is new to the caches."""
    image = picture(PROBE_SIZES[0])
    fresh = [probe.ask(image, probe.own, write=fresh_data_url) for _ in range(1 + REPEATS)][1:]
    known = [probe.ask(image, probe.own) for _ in range(1 + REPEATS)][1:]
    image_tokens = probe.endpoint.sketch.num_image_tokens(image.size, probe.own)
    cached = [one[-1].details.get("cached_tokens") for one in (fresh, known)]
    if cached[0] is not None and cached[0] > (fresh[-1].counted or 0) - image_tokens:
        raise Broken(f"{cached[0]} tokens of an image that was drawn anew come from a cache: no time can be measured")
    share = statistics.median(one.first_ms for one in known) / statistics.median(one.first_ms for one in fresh)
    counted = "" if cached[1] is None else f", {cached[1]} of its {known[-1].counted} tokens from a cache"
    quicker = f"the first token of a repeat takes {share:.0%} of the time" if share < 1 else "a repeat is not quicker"
    return f"{quicker}{counted}; sweeps draw each image anew"


def answers_are_streamed(probe: EngineProbe) -> str:
    """An answer of several tokens comes in several pieces."""
    pieces: list[str] = []
    heard = probe.ask(picture(PROBE_SIZES[0]), probe.own, question=ESSAY, most=SOME_TOKENS, on_text=pieces.append)
    tokens = (heard.reply.usage or {}).get("completion_tokens", 0)
    if len(pieces) < 2 and tokens > 1:
        raise Broken(f"an answer of {tokens} tokens came in one piece, so that no deadline could cut it")
    if len(pieces) < 2:
        raise NotTold(f"the answer, {heard.reply.text!r}, is too short to tell")
    return f"{tokens} tokens in {len(pieces)} pieces, the first after {time_text(heard.first_ms)}"


def leaving_ends_the_work(probe: EngineProbe) -> str:
    """A request whose client leaves is not worked on any more, much sooner than its answer would have ended."""
    if probe.load()[0]:
        raise NotTold("it works for others as well")
    essay = partial(
        probe.ask, picture(PROBE_SIZES[0]), probe.own, question=ESSAY, most=ESSAY_TOKENS, write=fresh_data_url
    )
    whole_s = essay().total_ms / 1e3
    if whole_s < LEAST_S:
        raise NotTold(f"its answers are too short to tell ({time_text(whole_s * 1e3)})")
    essay(on_text=lambda piece: False)
    began_s = time.perf_counter()
    while probe.load()[0]:
        if time.perf_counter() - began_s > whole_s / 2:
            raise Broken(f"{time_text(whole_s * 500)} after its client left, it still works on the request")
        time.sleep(LOOK_S)
    after = time_text((time.perf_counter() - began_s) * 1e3)
    return f"nothing runs {after} after the client left; the whole answer takes {time_text(whole_s * 1e3)}"


def tokens_are_told_apart(probe: EngineProbe) -> str:
    """Whether an answer says which of the prompt's tokens are the image's, and which came from a cache."""
    details = probe.last.details if probe.last else {}
    if not details:
        raise NotTold("one count for the whole prompt; vLLM says more with --enable-prompt-tokens-details")
    return ", ".join(f"{name}: {value}" for name, value in details.items() if value is not None)


def times_are_told(probe: EngineProbe) -> str:
    """Whether an answer says what the engine took for it."""
    metrics = probe.last.reply.more.get("metrics") if probe.last else None
    if not metrics:
        raise NotTold("none; vLLM tells them with --enable-per-request-metrics. This side's clock is what counts")
    return ", ".join(f"{name}: {value:.3g}" for name, value in metrics.items() if value is not None)


def load_is_told(probe: EngineProbe) -> str:
    """Whether the engine says how much it has to do."""
    return " and ".join(f"{number:g}" for number in probe.load()) + " requests run and wait"


def several_at_once(probe: EngineProbe) -> str:
    """How many answers a second the engine gives with 1, 2, 4, ... requests in flight, until it is no more."""
    in_flight, best, said = 1, 0.0, ""
    while in_flight <= MOST_IN_FLIGHT:
        try:
            probe.throughput[in_flight] = now = probe.answers_per_s(in_flight)
        except EngineError as error:
            said = f"; {in_flight}: {error}"
            break
        if now < GROWTH * best:
            break
        best, in_flight = now, 2 * in_flight
    rates = ", ".join(f"{number}: {rate:.3g}" for number, rate in probe.throughput.items())
    return f"answers a second by requests in flight: {rates}{said}"


ENGINE_CHECKS: dict[str, Callable[[EngineProbe], str]] = {
    "prompts are the model's": prompts_are_the_models,
    "max_crops is heeded": crops_are_heeded,
    "other knobs are heeded": settings_are_heeded,
    "caches are not confused": caches_are_not_confused,
    "repeats": repeats_are_known,
    "answers are streamed": answers_are_streamed,
    "leaving ends the work": leaving_ends_the_work,
    "tokens are told apart": tokens_are_told_apart,
    "times are told": times_are_told,
    "load is told": load_is_told,
    "several requests at once": several_at_once,
}


def best_in_flight(throughput: dict[int, float]) -> int:
    """Return the fewest requests in flight with about the best throughput."""
    best = max(throughput.values(), default=0.0)
    return next((number for number, rate in throughput.items() if GROWTH * rate >= best), 1)


def check_engine(probe: EngineProbe, say: Callable[[str], None] = lambda line: None) -> list[Check]:
    """Run all checks; ``say`` is told each verdict as it falls."""
    done: list[Check] = []
    failed = ""
    for name, run in ENGINE_CHECKS.items():
        try:
            done.append(Check(name, None, failed) if failed else Check(name, True, run(probe)))
        except NotTold as reason:
            done.append(Check(name, None, str(reason)))
        except (Broken, BudgetVLMError) as error:
            done.append(Check(name, False, str(error)))
            failed = "not tried, because the engine failed before" if isinstance(error, EngineError) else ""
        verdict = {True: "holds", False: "BROKEN", None: "left out"}[done[-1].passed]
        say(f"{verdict}: {name}: {done[-1].detail}")
    return done
