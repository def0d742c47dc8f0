"""Say why a setting is chosen for an image, a question and a budget; the model does not answer.

Shown are the choice and its rivals, what a fifth more or less time would change, and which part of the input mattered;
with --data also the nearest training cases, and with --tree a small tree that imitates the whole policy.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.controller.network import GRPOController
    from budgetvlm.explanation.explainer import Explanation, Option
    from budgetvlm.explanation.surrogate import Surrogate
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
    add("--model_path", default="reference", metavar="DIR", help="model directory, or 'reference' (default)")
    add("--price", type=float, metavar="X", help="accuracy given for one latency of the full setting")
    add("--num_threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--json", action="store_true", help="one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Explain a request, the policy, or both; what is wrong is found before a model is opened."""
    asked = _check(args)
    from budgetvlm.controller.checkpoint import load_controller

    controller = load_controller(args.checkpoint)
    data = _read_data(args.data, controller) if args.data else None
    explanation = _explain(args, controller, data) if asked else None
    tree = _tree(controller, data) if args.tree and data is not None else None
    if args.json:
        from dataclasses import asdict

        document: dict[str, Any] = explanation.to_dict() if explanation is not None else {}
        print(json.dumps(document | ({"tree": asdict(tree)} if tree is not None else {}), ensure_ascii=False))
        return 0
    parts = [describe(explanation)] if explanation is not None else []
    print("\n\n".join([*parts, *([describe_tree(tree)] if tree is not None else [])]))
    return 0


def _check(args: argparse.Namespace) -> bool:
    """Whether a request is to be explained. Raises ConfigError, InputError."""
    from budgetvlm._extras import require
    from budgetvlm.answer import check_request

    given = [args.image is not None, args.question is not None, args.budget_ms is not None]
    if args.tree and args.data is None:
        raise ConfigError(
            "--tree imitates the controller on measured samples; give --data controller_training_data.json"
        )
    if not all(given) and (any(given) or not args.tree):
        raise ConfigError("a request needs --image, --question and --budget_ms; without all three only --tree is left")
    if args.tree:
        require("sklearn", "explain", "surrogate tree")
    if any(given):
        require("captum", "explain", "attribution")
        check_request(args.question, args.budget_ms, args.price)
    return any(given)


def _read_data(path: Path, controller: GRPOController) -> tuple[ProfileTable, Features]:
    """Raises KnobSpaceError where the controller is of another space."""
    from budgetvlm.profiling.prepare.preparation import load_prepared

    prepared = load_prepared(path)
    controller.knob_space.require_equal(prepared.table.knob_space, str(path))
    return prepared.table, prepared.features


def _explain(
    args: argparse.Namespace, controller: GRPOController, data: tuple[ProfileTable, Features] | None
) -> Explanation:
    """Look at the request as `budgetvlm ask` would, without an answer."""
    from budgetvlm._io import open_image
    from budgetvlm.explanation.explainer import Explainer, Situation, explain
    from budgetvlm.runtime import AdaptiveVLM, load_guard

    image = open_image(args.image)
    model = AdaptiveVLM.from_pretrained(
        args.model_path, controller, guard=load_guard(args.checkpoint), device=args.device, num_threads=args.num_threads
    )

    def situation(budget_ms: float) -> Situation:
        bounds = model.look(image, args.question, budget_ms).bounds
        return Situation(budget_ms, model.seen_budget_ms(bounds, budget_ms), bounds.bounds_ms)

    overview = model.vlm.encode_overview(image)
    language = model.vlm.question_feature(args.question)
    explainer = Explainer(controller, overview.feature, language, args.price)
    situations = {factor: situation(factor * args.budget_ms) for factor in FACTORS}
    return explain(explainer, situations, situation(math.inf), data)


def _tree(controller: GRPOController, data: tuple[ProfileTable, Features]) -> Surrogate:
    from budgetvlm.explanation.surrogate import surrogate

    return surrogate(controller, *data)


def describe(found: Explanation) -> str:
    """A page for people."""
    choice = found.choice
    kept = f"{found.allowed} of {found.settings} settings are expected to keep it"
    lines = [
        f"budget       {found.budget_ms:g} ms; {kept if found.feasible else 'no setting is expected to keep it'}",
        f"choice       {_option(choice)}" + ("" if found.feasible else " (the fastest)"),
        *(f"next best    {_option(option)}" for option in found.next_best),
    ]
    for factor, option in found.budgets.items():
        name = f"{abs(factor - 1):.0%} {'less' if factor < 1 else 'more'}"
        lines.append(f"{name:12} {_other(choice, option)}")
    lines += ["", *_what_mattered(found)]
    if found.nearest:
        lines += ["", "nearest training cases (mean cosine of the standardised features)"]
        lines += [f"  {line}" for line in _cases(found)]
    return "\n".join(lines)


def _option(option: Option) -> str:
    bound = "" if option.bound_ms is None else f", at most {option.bound_ms:.1f} ms"
    like = "" if option.measured_accuracy is None else f" (measured on like cases: {option.measured_accuracy:.0%})"
    return f"{_short(option.setting)}: predicted accuracy {option.predicted_accuracy:.0%}{like}{bound}"


def _short(setting: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in setting.items())


def _other(choice: Option, option: Option) -> str:
    """What another budget would change."""
    if not option.allowed:
        return f"no setting is expected to keep it; the fastest is {_short(option.setting)}"
    if option.index == choice.index:
        return "the same setting"
    points = 100 * (option.predicted_accuracy - choice.predicted_accuracy)
    return f"{_option(option)} ({points:+.1f} points)"


def _what_mattered(found: Explanation) -> list[str]:
    if found.parts is None:
        which = "one setting" if found.allowed == 1 else "no setting"
        lines = [f"what mattered: the budget alone, which leaves {which}"]
    else:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found.parts.shares.items())
        signed = f"{100 * found.parts.image:+.1f}, {100 * found.parts.question:+.1f}, {100 * found.parts.budget:+.1f}"
        lines = [
            f"what mattered among the settings that the budget allows: {shares}",
            f"  points by which they set the choice apart from the others: {signed}; {100 * found.parts.baseline:+.1f} "
            "for an average input",
        ]
    for name, option in found.without.items():
        same = "the same setting" if option.index == found.choice.index else _short(option.setting)
        lines.append(f"  with {name}: {same}")
    return lines


def _cases(found: Explanation) -> list[str]:
    lines = []
    for case in found.nearest:
        labels = ", ".join(case.labels.values())
        right = (
            "right at no setting" if case.cheapest_right is None else f"cheapest right: {_short(case.cheapest_right)}"
        )
        here = "not measured" if case.accuracy is None else f"{case.accuracy:.0%} right"
        lines.append(f"{case.similarity:+.2f}  {case.sample_id}  {labels}  {right}; the choice: {here}")
    return lines


def describe_tree(tree: Surrogate) -> str:
    """The tree and what it is worth."""
    return "\n".join(
        [
            f"a tree of {tree.leaves} leaves that imitates the policy; budgets as shares of the full setting's time",
            tree.text,
            f"on the {tree.split} samples it chooses the controller's own setting for {tree.fidelity:.0%} of the "
            f"requests (the most frequent setting of each budget: {tree.one_setting:.0%});",
            f"accuracy {tree.accuracy:.1%}, the controller's {tree.controller_accuracy:.1%}",
        ]
    )
