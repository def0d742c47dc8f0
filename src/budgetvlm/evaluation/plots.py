"""The picture of an evaluation: accuracy under a budget on the left, mean latency at equal accuracy on the right.

Colours are those of Okabe and Ito, told apart with colour-blind eyes; lines also differ in width, dash and marker.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetvlm._io import atomic_path
from budgetvlm.evaluation.records import AtAccuracy, EvaluationReport, PolicyResult

INK, QUIET = "#222222", "#8a8a8a"
ARROW = "-|>,head_width=0.35,head_length=0.7"
BACKDROP = {"facecolor": "white", "edgecolor": "none", "pad": 2.0}
SIZE, DPI = (17.0, 8.6), 150


@dataclass(frozen=True)
class Look:
    """How one policy is drawn; ``order`` is from back to front, dashes over solid lines so that both stay visible."""

    colour: str
    line: Any
    width: float
    marker: str
    order: float
    band: bool = False


LOOKS = {
    "oracle": Look(QUIET, (0, (1, 1.6)), 2.2, "", 2),
    "group lookup": Look("#009E73", (0, (4, 2)), 2.2, "", 6.5),
    "lookup table": Look(INK, "-", 2.6, "o", 4, band=True),
    "best blind mix": Look(INK, "-", 2.6, "o", 4),
    "controller": Look("#D55E00", "-", 4.8, "D", 5, band=True),
    "predict + argmax": Look("#0072B2", (0, (5, 1.5, 1.2, 1.5)), 2.0, "^", 6),
}
LABELS = {
    "oracle": "oracle (bound: knows the outcome)",
    "group lookup": "group lookup (bound: knows kind and difficulty)",
    "lookup table": "one setting for all inputs: lookup table (left), best blind mix (right)",
    "predict + argmax": "predict accuracy, then argmax",
    "controller": "controller",
}


def plot_evaluation(report: EvaluationReport, path: str | Path) -> None:
    """Draw both faces into a PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.985, top=0.875, bottom=0.2, wspace=0.16)
    for axes in (left, right):
        _clean(axes)
    _draw_budget_face(left, report)
    _draw_price_face(right, report)
    _legend(figure, left, report)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(labelsize=13, colors=INK, length=4, color=QUIET)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=1)
    axes.set_axisbelow(True)


def _draw_budget_face(axes: Any, report: EvaluationReport) -> None:
    for name, look in LOOKS.items():
        result = report.policy(name)
        if result is not None and result.at_budget:
            _budget_line(axes, result, look)
    _full_line(axes, report, "full setting, whatever the budget")
    shares = [at.budget_share for at in report.policies[0].at_budget]
    budgets = [at.budget_ms for at in report.policies[0].at_budget]
    axes.set_xticks(budgets, [f"{ms:.3g}\n{share:g}×" for ms, share in zip(budgets, shares, strict=True)])
    axes.set_xlabel("budget for each request (ms, and as a share of the full setting's median latency)", fontsize=13)
    axes.set_ylabel("accuracy (%)", fontsize=13)
    _title(axes, "Accuracy under a latency budget", _budget_subtitle(report))
    axes.margins(x=0.03)


def _budget_line(axes: Any, result: PolicyResult, look: Look) -> None:
    x = [at.budget_ms for at in result.at_budget]
    if look.band:
        low = [100 * at.accuracy.low for at in result.at_budget]
        high = [100 * at.accuracy.high for at in result.at_budget]
        axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0, zorder=look.order - 0.5)
    y = [100 * at.accuracy.value for at in result.at_budget]
    _line(axes, x, y, _without_markers(look))
    if look.marker:
        axes.scatter(
            x, y, s=75, marker=look.marker, color=look.colour, edgecolor="white", linewidth=1, zorder=8 + look.order
        )


def _line(axes: Any, x: Any, y: Any, look: Look) -> None:
    axes.plot(
        x,
        y,
        color=look.colour,
        linestyle=look.line,
        linewidth=look.width,
        marker=look.marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=1,
        zorder=look.order,
    )


def _full_line(axes: Any, report: EvaluationReport, text: str) -> None:
    level = 100 * report.full_accuracy
    axes.axhline(level, color=QUIET, linewidth=1.2, zorder=1)
    axes.annotate(
        text, (0.005, level), xycoords=("axes fraction", "data"), xytext=(0, 5), textcoords="offset points",
        fontsize=12, color="#666666", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},  # the oracle's line may pass behind it
    )  # fmt: skip


def _draw_price_face(axes: Any, report: EvaluationReport) -> None:
    statics = report.statics
    axes.scatter(
        [p.latency_ms for p in statics], [100 * p.accuracy for p in statics],
        s=26, color="#c4c4c4", linewidth=0, zorder=1.5,
    )  # fmt: skip
    for name, look in LOOKS.items():
        result = report.policy(name)
        if result is not None and result.frontier:
            _line(
                axes, [p.latency_ms for p in result.vertices], [100 * p.accuracy for p in result.vertices],
                _without_markers(look) if name != "best blind mix" else look,
            )  # fmt: skip
    _mark_full(axes, report)
    _arrow(axes, report)
    axes.set_xlabel("mean latency (ms)", fontsize=13)
    axes.set_ylabel("accuracy (%)", fontsize=13)
    axes.set_xlim(left=0)
    _title(
        axes,
        "Mean latency at equal accuracy",
        "no budget; the price of a millisecond varies along each line; grey dots: settings",
    )


def _without_markers(look: Look) -> Look:
    return Look(look.colour, look.line, look.width, "", look.order)


def _arrow(axes: Any, report: EvaluationReport) -> None:
    """What the controller saves at the first target, drawn from the blind mix to the controller."""
    mine, blind = _first_target(report, "controller"), _first_target(report, "best blind mix")
    if mine is None or blind is None or not mine.latency_ms or not blind.latency_ms or not mine.saved:
        return
    level = 100 * mine.target_accuracy
    axes.annotate(
        "", (mine.latency_ms.value, level), xytext=(blind.latency_ms.value, level), zorder=7,
        arrowprops={"arrowstyle": ARROW, "color": INK, "lw": 2, "shrinkA": 0, "shrinkB": 0},
    )  # fmt: skip
    share, low, high = (100 * number for number in (mine.saved.value, mine.saved.low, mine.saved.high))
    place = {"xycoords": "axes fraction", "ha": "right", "color": INK, "zorder": 8, "bbox": BACKDROP}
    axes.annotate(
        f"← {abs(share):.0f}% {'less' if share >= 0 else 'more'} time",
        (0.98, 0.22),
        fontsize=19,
        weight="bold",
        **place,
    )
    axes.annotate(
        f"at {100 * mine.accuracy_share:g}% of the full setting's accuracy: "
        f"{blind.latency_ms.value:.1f} → {mine.latency_ms.value:.1f} ms\n"
        f"{100 * report.options['level']:.0f}% interval of the saving: {low:.0f} to {high:.0f}%",
        (0.98, 0.13), fontsize=13, **place,
    )  # fmt: skip


def _mark_full(axes: Any, report: EvaluationReport) -> None:
    """The full setting's own point: the last of the settings."""
    full = report.statics[-1]
    look = {"marker": "*", "s": 330, "color": INK, "edgecolor": "white", "linewidth": 1.2, "zorder": 7}
    axes.scatter([full.latency_ms], [100 * full.accuracy], **look)
    axes.annotate(
        "full setting", (full.latency_ms, 100 * full.accuracy), xytext=(6, 12), textcoords="offset points", ha="right",
        fontsize=13, color=INK,
    )  # fmt: skip


def _first_target(report: EvaluationReport, name: str) -> AtAccuracy | None:
    result = report.policy(name)
    return result.at_accuracy[0] if result is not None and result.at_accuracy else None


def _budget_subtitle(report: EvaluationReport) -> str:
    result = report.policy("controller")
    if result is None or result.room is None:
        return f"{report.counts['evaluated_samples']} held-out samples"
    gain = result.room.accuracy_gain
    shares = report.room_budget_shares
    return (
        f"controller over lookup table, mean at {min(shares):g} to {max(shares):g}×: {100 * gain.value:+.1f} points "
        f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] ({100 * report.options['level']:.0f}% intervals)"
    )


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=19, fontweight="bold", color=INK, pad=34)
    axes.annotate(
        subtitle,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 14),
        textcoords="offset points",
        fontsize=12,
        color="#555555",
    )


def _legend(figure: Any, axes: Any, report: EvaluationReport) -> None:
    """One legend below both panels, front to back."""
    from matplotlib.lines import Line2D

    names = [name for name in reversed(LABELS) if report.policy(name) is not None]
    handles = [
        Line2D(
            [], [], color=LOOKS[n].colour, linestyle=LOOKS[n].line, linewidth=LOOKS[n].width, marker=LOOKS[n].marker,
            markersize=8, markeredgecolor="white",
        )
        for n in names
    ]  # fmt: skip
    figure.legend(
        handles, [LABELS[n] for n in names], loc="lower center", ncols=3, frameon=False, fontsize=13,
        handlelength=3.2, columnspacing=2.5, bbox_to_anchor=(0.5, 0.01),
    )  # fmt: skip
