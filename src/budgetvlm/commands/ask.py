"""Answer a question about an image within a budget in milliseconds.

The controller chooses tiles, experts and blocks for this image, this question and this budget.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from budgetvlm.commands.flags import add_cut_flag, add_json_flag
from budgetvlm.commands.origins import BUNDLED, add_opened_model, complete
from budgetvlm.commands.verdicts import NO_GUARD, UNCALIBRATED
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.answer import Answer
    from budgetvlm.runtime import AdaptiveVLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm ask`."""
    add = parser.add_argument
    add("--image", required=True, metavar="FILE", help="image file")
    add("--question", required=True, metavar="TEXT", help="what to ask")
    add("--budget_ms", type=float, metavar="N", help="time for the whole request, in ms")
    add(
        "--mean_budget_ms", type=float, metavar="N",
        help="time that requests may take on average, in ms; in place of --budget_ms or beside it",
    )  # fmt: skip
    add("--checkpoint", metavar="DIR", help="trained controller (default: the one that comes with the model)")
    add(
        "--price", type=float, metavar="X", help="accuracy given for one latency of the full setting; 0: use the budget"
    )
    add(
        "--when_infeasible", default="fastest", choices=["fastest", "reject", "best_effort"],
        help="where no setting is expected to keep the budget: take the fastest (default), refuse, or take one that "
        "keeps it on average",
    )  # fmt: skip
    add(
        "--max_new_tokens",
        type=int,
        default=16,
        metavar="N",
        help="longest answer (default: 16, or what the controller was trained with)",
    )
    add_cut_flag(parser)
    add_opened_model(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Ask once; what is wrong with the request is found before a model is opened."""
    gc.disable()  # importing makes a million objects, and all of them stay
    try:
        from budgetvlm._io import open_image
        from budgetvlm.decide import Terms, check_request

        _check_budgets(args)
        args.budget_ms = math.inf if args.budget_ms is None else args.budget_ms
        check_request(args.question, Terms(args.budget_ms, args.price))
        complete(args)
        image, model = open_image(args.image), open_model(args)
    finally:
        gc.freeze()
        gc.enable()
    if notice := notice_of_calibration(args, model):
        print(f"note: {notice}", file=sys.stderr)
    held = "" if args.mean_budget_ms is None else describe_mean(args.mean_budget_ms, model)
    answer = model.generate(
        image, args.question, budget_ms=args.budget_ms, price=args.price, max_new_tokens=args.max_new_tokens,
        when_infeasible=args.when_infeasible, cut=args.cut,
    )  # fmt: skip
    print(json.dumps(answer.to_dict(), ensure_ascii=False) if args.json else describe(answer) + held)
    return 0


def _check_budgets(args: argparse.Namespace) -> None:
    """Raise ConfigError where there is no budget at all, a mean budget that is none, or two prices."""
    from budgetvlm.guard.spending import require_mean_budget

    if args.mean_budget_ms is None and args.budget_ms is None:
        raise ConfigError(
            "there is no budget; give --budget_ms N, what this request may take, or --mean_budget_ms N, what requests "
            "may take on average, or both"
        )
    if args.mean_budget_ms is None:
        return
    require_mean_budget(args.mean_budget_ms)
    if args.price is not None:
        raise ConfigError("--mean_budget_ms says which price is paid, and --price gives another; leave one out")


def open_model(args: argparse.Namespace) -> AdaptiveVLM:
    """The model with its controller; for the bundled model nothing is imported that it does not use."""
    from budgetvlm.vlm.lean_imports import lean_imports

    with lean_imports() if args.model_path == BUNDLED else nullcontext():
        from budgetvlm.runtime import AdaptiveVLM

        return AdaptiveVLM.from_pretrained(
            args.model_path, args.checkpoint, device=args.device, num_threads=args.num_threads,
            rehearsals=1, compiled=False,  # one answer is there before the loops would be
            allow_other_model=args.allow_other_model, mean_budget_ms=args.mean_budget_ms,
        )  # fmt: skip


def notice_of_calibration(args: argparse.Namespace, model: AdaptiveVLM) -> str | None:
    """One line where the guard promises nothing, or its promise is that of another machine."""
    from budgetvlm.guard.adaptive import AdaptiveGuard
    from budgetvlm.guard.saved import is_from_elsewhere
    from budgetvlm.runtime import bundled_controller

    checkpoint = f" --checkpoint {shlex.quote(args.checkpoint)}" if args.checkpoint else ""
    if not isinstance(model.guard, AdaptiveGuard):
        return NO_GUARD
    if not model.guard.calibrated_on:
        return f"{UNCALIBRATED} (`budgetvlm calibrate{checkpoint}`)"
    if not is_from_elsewhere(Path(args.checkpoint or bundled_controller(args.model_path))):
        return None
    return (
        "the guard was calibrated on another machine and follows this one from request to request; "
        f"`budgetvlm calibrate{checkpoint}` fits it to this one"
    )


def describe_mean(mean_budget_ms: float, model: AdaptiveVLM) -> str:
    """A line about the price that stands for a mean budget in a single request."""
    from budgetvlm._io import time_text

    default = f"{model.controller.default_price.item():.3g}"
    without = f"price {default}, the controller's default: it has no price curve (training again writes one)"
    begun = f"{model.solved}, as profiled" if model.solved else without
    return f"\nmean     {time_text(mean_budget_ms)} on this machine: {begun}"


def describe(answer: Answer) -> str:
    """A few lines for people."""
    from budgetvlm._io import time_numbers, time_text

    (whole, *parts), unit = time_numbers(answer.latency_ms, *answer.stages_ms.values())
    stages = ", ".join(f"{name} {part}" for name, part in zip(answer.stages_ms, parts, strict=True))
    bound = "" if answer.predicted_ms is None else f", expected at most {time_text(answer.predicted_ms)}"
    lines = [
        f"answer   {answer.answer}",
        f"setting  {answer.setting}",
        f"latency  {whole} {unit} ({stages}){bound}",
        f"budget   {answer.verdict}",
    ]
    hurried = f"{answer.num_hurried_tokens} of {answer.num_output_tokens} tokens"
    cut = answer.finish_reason == "budget"
    tokens = "1 token" if answer.num_output_tokens == 1 else f"{answer.num_output_tokens} tokens"
    where = f"after {tokens}" if answer.answer else "before it said anything"
    sooner = (
        "no setting"
        if answer.predicted_ms is None
        else f"not even this setting, which may take {time_text(answer.predicted_ms)},"
    )
    notes = {
        "no setting was sure to keep this budget: best effort": answer.best_effort,
        "preparing the image took most of the time: a smaller image is answered sooner": (
            answer.stages_ms["preprocess"] > answer.latency_ms / 2
        ),
        "this budget or price lies beyond what the controller was trained on: it chooses as at the nearest that it "
        "knows, and the guard keeps the true one": answer.extrapolated,
        "the answer was cut at max_new_tokens": answer.finish_reason == "length",
        f"to be in time, the last {hurried} were made with fewer experts or blocks": answer.num_hurried_tokens > 0,
        f"{sooner} fits into the budget, so the answer was cut {where}; give more time, or --cut needed for a late "
        "answer in place of a cut one": cut and answer.best_effort,
        f"the answer was cut {where}, where the budget would not have held another token": cut
        and not answer.best_effort,
    }
    return "\n".join([*lines, *(f"note     {text}" for text, holds in notes.items() if holds)])
