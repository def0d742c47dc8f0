"""The picture of an evaluation: accuracy under a budget on the left, mean latency at equal accuracy on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from budgetvlm.evaluation.picture_canvas import INK, clean_axes, new_canvas, write_canvas
from budgetvlm.evaluation.policy_styles import DASHES, GREY, MARKERS, POLICY_STYLES, WITH_INTERVAL, PolicyStyle
from budgetvlm.evaluation.records import AtAccuracy, EvaluationReport, PolicyResult

SIZE = (17.0, 8.6)  # inches
THICKER = 1.3  # lines of this large picture, compared with those of the page
BEHIND, IN_FRONT = 1.0, 20.0  # drawing order; the policies' lines are between them, in the order of their styles
LABELS = {  # in the order of the legend
    "controller": "controller",
    "predict + argmax": "predict accuracy, then argmax",
    "lookup table": "one setting for all inputs: lookup table (left), best blind mix (right)",
    "group lookup": "group lookup (bound: knows kind and difficulty)",
    "oracle": "oracle (bound: knows the outcome)",
}


def plot_evaluation(report: EvaluationReport, path: str | Path) -> None:
    """Draw both panels into a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    canvas = new_canvas(*SIZE)
    left, right = canvas.subplots(1, 2)
    canvas.subplots_adjust(left=0.055, right=0.985, top=0.875, bottom=0.2, wspace=0.16)
    for axes in (left, right):
        clean_axes(axes)
        axes.tick_params(labelsize=13, colors=INK, length=4, color=GREY)
        axes.set_ylabel("accuracy (%)", fontsize=13)
    _draw_under_budget(left, report)
    _draw_at_equal_accuracy(right, report)
    _add_legend(canvas, report)
    write_canvas(canvas, path)


def _draw_under_budget(axes: Any, report: EvaluationReport) -> None:
    for order, name in enumerate(POLICY_STYLES, 2):
        result = report.policy(name)
        if result is not None and result.at_budget:
            _draw_budget_line(axes, result, order)
    _draw_full_accuracy(axes, report)
    shares = [at.budget_share for at in report.policies[0].at_budget]
    budgets = [at.budget_ms for at in report.policies[0].at_budget]
    axes.set_xticks(budgets, [f"{ms:.3g}\n{share:g}×" for ms, share in zip(budgets, shares, strict=True)])
    axes.set_xlabel("budget for each request (ms, and as a share of the full setting's median latency)", fontsize=13)
    _add_title(axes, "Accuracy under a latency budget", _gain_text(report))
    axes.margins(x=0.03)


def _draw_budget_line(axes: Any, result: PolicyResult, order: float) -> None:
    style, x = POLICY_STYLES[result.name], [at.budget_ms for at in result.at_budget]
    if result.name in WITH_INTERVAL:
        low, high = zip(*((100 * at.accuracy.low, 100 * at.accuracy.high) for at in result.at_budget), strict=True)
        axes.fill_between(x, low, high, color=style.colour, alpha=0.15, linewidth=0, zorder=order - 0.5)
    _draw_line(axes, x, [100 * at.accuracy.value for at in result.at_budget], style, order)


def _draw_line(axes: Any, x: Sequence[float], y: Sequence[float], style: PolicyStyle, order: float) -> None:
    """Draw a line, and its markers in front of all lines."""
    axes.plot(x, y, color=style.colour, linestyle=DASHES[style.dash], linewidth=THICKER * style.width, zorder=order)
    if style.marker:
        axes.scatter(x, y, s=75, marker=MARKERS[style.marker], color=style.colour, edgecolor="white", linewidth=1,
                     zorder=10 + order)  # fmt: skip


def _draw_full_accuracy(axes: Any, report: EvaluationReport) -> None:
    level = 100 * report.full_accuracy
    axes.axhline(level, color=GREY, linewidth=1.2, zorder=BEHIND)
    axes.annotate(
        "full setting, whatever the budget", (0.005, level), xycoords=("axes fraction", "data"), xytext=(0, 5),
        textcoords="offset points", fontsize=12, color="#666666", zorder=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # the oracle's line may pass behind it
    )  # fmt: skip


def _draw_at_equal_accuracy(axes: Any, report: EvaluationReport) -> None:
    x, y = zip(*((p.latency_ms, 100 * p.accuracy) for p in report.statics), strict=True)
    axes.scatter(x, y, s=26, color="#c4c4c4", linewidth=0, zorder=BEHIND)
    for order, (name, style) in enumerate(POLICY_STYLES.items(), 2):
        result = report.policy(name)
        if result is not None and result.frontier:
            x, y = zip(*((p.latency_ms, 100 * p.accuracy) for p in result.vertices), strict=True)
            _draw_line(axes, x, y, style if name == "best blind mix" else replace(style, marker=""), order)
    _mark_full_setting(axes, report)
    _draw_saving(axes, report)
    axes.set_xlabel("mean latency (ms)", fontsize=13)
    axes.set_xlim(left=0)
    subtitle = "no budget; the price of a millisecond varies along each line; grey dots: settings"
    _add_title(axes, "Mean latency at equal accuracy", subtitle)


def _draw_saving(axes: Any, report: EvaluationReport) -> None:
    """Draw an arrow from the blind mix to the controller at the first accuracy, and say what is saved there."""
    mine, blind = _first_target(report, "controller"), _first_target(report, "best blind mix")
    if mine is None or blind is None or not mine.latency_ms or not blind.latency_ms or not mine.saved:
        return
    level = 100 * mine.target_accuracy
    arrow = {"arrowstyle": "-|>,head_width=0.35,head_length=0.7", "color": INK, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (mine.latency_ms.value, level), (blind.latency_ms.value, level), arrowprops=arrow,
                  zorder=IN_FRONT)  # fmt: skip
    share, low, high = (100 * number for number in (mine.saved.value, mine.saved.low, mine.saved.high))
    place = {"xycoords": "axes fraction", "ha": "right", "color": INK, "zorder": IN_FRONT,
             "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 2.0}}  # fmt: skip
    saving = f"← {abs(share):.0f}% {'less' if share >= 0 else 'more'} time"
    axes.annotate(saving, (0.98, 0.22), fontsize=19, weight="bold", **place)
    explanation = (
        f"at {100 * mine.accuracy_share:g}% of the full setting's accuracy: "
        f"{blind.latency_ms.value:.1f} → {mine.latency_ms.value:.1f} ms\n"
        f"{100 * report.options['level']:.0f}% interval of the saving: {low:.0f} to {high:.0f}%"
    )
    axes.annotate(explanation, (0.98, 0.13), fontsize=13, **place)


def _mark_full_setting(axes: Any, report: EvaluationReport) -> None:
    """Mark the full setting, which is the last of the single settings."""
    full = report.statics[-1]
    x, y = full.latency_ms, 100 * full.accuracy
    axes.scatter([x], [y], marker="*", s=330, color=INK, edgecolor="white", linewidth=1.2, zorder=IN_FRONT)
    axes.annotate("full setting", (x, y), (6, 12), textcoords="offset points", ha="right", fontsize=13, color=INK)


def _first_target(report: EvaluationReport, name: str) -> AtAccuracy | None:
    result = report.policy(name)
    return result.at_accuracy[0] if result is not None and result.at_accuracy else None


def _gain_text(report: EvaluationReport) -> str:
    """The controller's gain, or the number of samples where no controller was evaluated."""
    result = report.policy("controller")
    if result is None or result.room is None:
        return f"{report.counts['evaluated_samples']} held-out samples"
    gain = result.room.accuracy_gain
    shares = report.room_budget_shares
    return (
        f"controller over lookup table, mean at {min(shares):g} to {max(shares):g}×: {100 * gain.value:+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] ({100 * report.options['level']:.0f}% intervals)"
    )


def _add_title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=19, fontweight="bold", color=INK, pad=34)
    axes.annotate(subtitle, (0, 1), (0, 14), xycoords="axes fraction", textcoords="offset points", fontsize=12,
                  color="#555555")  # fmt: skip


def _add_legend(canvas: Any, report: EvaluationReport) -> None:
    """Add one legend below both panels."""
    from matplotlib.lines import Line2D

    shown = {label: POLICY_STYLES[name] for name, label in LABELS.items() if report.policy(name) is not None}
    handles = [
        Line2D([], [], color=style.colour, linestyle=DASHES[style.dash], linewidth=THICKER * style.width,
               marker=MARKERS[style.marker], markersize=8, markeredgecolor="white")
        for style in shown.values()
    ]  # fmt: skip
    canvas.legend(
        handles, list(shown), loc="lower center", ncols=3, frameon=False, fontsize=13, handlelength=3.2,
        columnspacing=2.5, bbox_to_anchor=(0.5, 0.01),
    )  # fmt: skip
