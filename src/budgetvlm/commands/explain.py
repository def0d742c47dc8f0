"""Say why a setting is chosen for an image, a question and a budget; the model does not answer.

It shows the choice and its rivals, what a fifth more or less time would change, and which part of the input mattered;
with --data also the nearest training cases, and with --tree a small tree that imitates the whole policy.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.commands.flags import add_json_flag
from budgetvlm.commands.origins import add_opened_model, complete
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.explanation.explanation_records import Explanation
    from budgetvlm.features import Features
    from budgetvlm.table import ProfileTable

FACTORS = (0.8, 1.0, 1.2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm explain`."""
    add = parser.add_argument
    add("--image", metavar="FILE", help="image file")
    add("--question", metavar="TEXT", help="what to ask")
    add("--budget_ms", type=float, metavar="N", help="time for the whole request, in ms")
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="trained controller")
    add("--data", type=Path, metavar="FILE", help="controller_training_data.json, for nearest cases and the tree")
    add("--tree", action="store_true", help="a small decision tree that imitates the policy (needs --data)")
    add("--price", type=float, metavar="X", help="accuracy given for one latency of the full setting")
    add_opened_model(parser)
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Explain a request, the policy, or both; what is wrong is found before a model is opened."""
    asked = _check(args)
    complete(args)
    from budgetvlm.controller.checkpoint import load_controller
    from budgetvlm.explanation.surrogate import surrogate

    controller = load_controller(args.checkpoint)
    data = None
    if args.data:
        from budgetvlm.profiling.prepare.prepared_data import load_prepared

        prepared = load_prepared(args.data)
        controller.knob_space.require_equal(prepared.table.knob_space, str(args.data))
        data = prepared.table, prepared.features
    explanation = _explain(args, controller, data) if asked else None
    tree = surrogate(controller, *data) if args.tree and data is not None else None
    if args.json:
        from dataclasses import asdict

        document: dict[str, Any] = explanation.to_dict() if explanation is not None else {}
        print(json.dumps(document | ({"tree": asdict(tree)} if tree is not None else {}), ensure_ascii=False))
        return 0
    from budgetvlm.explanation.explanation_text import explanation_text, tree_text

    parts = [explanation_text(explanation)] if explanation is not None else []
    print("\n\n".join([*parts, *([tree_text(tree)] if tree is not None else [])]))
    return 0


def _check(args: argparse.Namespace) -> bool:
    """Whether a request is to be explained. Raises ConfigError, InputError."""
    from budgetvlm._extras import require
    from budgetvlm.decide import Terms, check_request

    given = [args.image is not None, args.question is not None, args.budget_ms is not None]
    if args.tree and args.data is None:
        raise ConfigError(
            "--tree imitates the controller on measured samples; give --data controller_training_data.json"
        )
    if not all(given) and (any(given) or not args.tree):
        raise ConfigError("a request needs --image, --question and --budget_ms; without all three only --tree is left")
    if any(given):
        require("captum", "explain", "attribution")
        check_request(args.question, Terms(args.budget_ms, args.price))
    return any(given)


def _explain(
    args: argparse.Namespace, controller: GRPOController, data: tuple[ProfileTable, Features] | None
) -> Explanation:
    """Look at the request as `budgetvlm ask` would, without an answer."""
    from budgetvlm._io import open_image
    from budgetvlm.decide import seen_budget_ms
    from budgetvlm.engines.request_features import extractor_beside
    from budgetvlm.explanation.explainer import Explainer, explain
    from budgetvlm.explanation.explanation_records import BudgetContext
    from budgetvlm.guard.saved import load_guard
    from budgetvlm.runtime import AdaptiveVLM

    image = open_image(args.image)
    model = AdaptiveVLM.from_pretrained(
        args.model_path, controller, guard=load_guard(args.checkpoint),
        extractor=extractor_beside(args.checkpoint, args.device), device=args.device,
        num_threads=args.num_threads, allow_other_model=args.allow_other_model,
    )  # fmt: skip

    def context(budget_ms: float) -> BudgetContext:
        bounds = model.bounds(image, args.question, budget_ms)
        seen_ms = seen_budget_ms(budget_ms, model.guard.own_ms, bounds.slowdown)
        return BudgetContext(budget_ms, seen_ms, bounds.bounds_ms)

    overview = model.vlm.encode_overview(image)
    language = model.vlm.question_feature(args.question)
    explainer = Explainer(controller, overview.feature, language, args.price)
    contexts = {factor: context(factor * args.budget_ms) for factor in FACTORS}
    return explain(explainer, contexts, context(math.inf), data)
