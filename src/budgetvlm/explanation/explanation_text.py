"""An explanation, and the tree that imitates a controller, as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from budgetvlm.explanation.explanation_records import Explanation, NearestCase, RankedSetting
from budgetvlm.explanation.surrogate import Surrogate


def explanation_text(found: Explanation) -> str:
    """The explanation of a request."""
    return "\n".join(_lines(found))


def _lines(found: Explanation) -> Iterator[str]:
    kept = "no setting is expected to keep it"
    if found.feasible:
        kept = f"{found.allowed} of {found.settings} settings are expected to keep it"
    yield f"budget       {found.budget_ms:g} ms; {kept}"
    yield f"choice       {_ranked(found.choice)}" + ("" if found.feasible else " (the fastest)")
    yield from (f"next best    {_ranked(other)}" for other in found.next_best)
    for factor, other in found.budgets.items():
        name = f"{abs(factor - 1):.0%} {'less' if factor < 1 else 'more'}"
        yield f"{name:12} {_other(found.choice, other)}"
    yield ""
    yield from _what_mattered(found)
    for name, other in found.without.items():
        same = other.index == found.choice.index
        yield f"  with {name}: {'the same setting' if same else _short(other.setting)}"
    if found.nearest:
        yield from ("", "nearest training cases (mean cosine of the standardised features)")
        yield from (f"  {_case(case)}" for case in found.nearest)


def _what_mattered(found: Explanation) -> Iterator[str]:
    parts = found.parts
    if parts is None:
        which = "one setting" if found.allowed == 1 else "no setting"
        yield f"what mattered: the budget alone, which leaves {which}"
        return
    shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.shares.items())
    points = ", ".join(f"{100 * part:+.1f}" for part in (parts.image, parts.question, parts.budget))
    yield f"what mattered among the settings that the budget allows: {shares}"
    yield (
        f"  points by which they set the choice apart from the others: {points}; {100 * parts.baseline:+.1f} "
        "for an average input"
    )


def _ranked(ranked: RankedSetting) -> str:
    bound = "" if ranked.bound_ms is None else f", at most {ranked.bound_ms:.1f} ms"
    like = "" if ranked.measured_accuracy is None else f" (measured on like cases: {ranked.measured_accuracy:.0%})"
    return f"{_short(ranked.setting)}: predicted accuracy {ranked.predicted_accuracy:.0%}{like}{bound}"


def _short(setting: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in setting.items())


def _other(choice: RankedSetting, other: RankedSetting) -> str:
    """What another budget would change."""
    if not other.allowed:
        return f"no setting is expected to keep it; the fastest is {_short(other.setting)}"
    if other.index == choice.index:
        return "the same setting"
    points = 100 * (other.predicted_accuracy - choice.predicted_accuracy)
    return f"{_ranked(other)} ({points:+.1f} points)"


def _case(case: NearestCase) -> str:
    labels = ", ".join(case.labels.values())
    right = f"cheapest right: {_short(case.cheapest_right)}" if case.cheapest_right else "right at no setting"
    here = "not measured" if case.accuracy is None else f"{case.accuracy:.0%} right"
    return f"{case.similarity:+.2f}  {case.sample_id}  {labels}  {right}; the choice: {here}"


def tree_text(tree: Surrogate) -> str:
    """The tree, and how faithful it is."""
    return (
        f"a tree of {tree.leaves} leaves that imitates the policy; budgets as shares of the full setting's time\n"
        f"{tree.text}\n"
        f"on the {tree.split} samples it chooses the controller's own setting for {tree.fidelity:.0%} of the requests "
        f"(the most frequent setting of each budget: {tree.one_setting:.0%});\n"
        f"accuracy {tree.accuracy:.1%}, the controller's {tree.controller_accuracy:.1%}"
    )
