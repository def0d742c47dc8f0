"""The colour, dash and marker of each policy, the same in every picture and on the report's page.

The hues are those of Okabe and Ito, which colour-blind readers can tell apart, on paper and on a dark screen. Lines
also differ in dash and marker. Dashes and markers have Plotly's names; `DASHES` and `MARKERS` give Matplotlib's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GREY = "#8a8a8a"
ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY = "#D55E00", "#2C7FB8", "#009E73", "#B8679A", "#C98A00", "#4AA8DC"
COLOUR_CYCLE = (ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY)
ROLE_COLOURS = {"controller": ORANGE, "variant": AMBER, "baseline": BLUE, "labels": GREEN, "bound": GREY}

DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (4, 2)), "dot": (0, (1, 1.6)), "dashdot": (0, (5, 1.5, 1.2, 1.5))}
MARKERS = {"circle": "o", "diamond": "D", "triangle-up": "^", "star": "*", "": ""}


@dataclass(frozen=True)
class PolicyStyle:
    """How one policy's line is drawn; ``width`` is in points, and an empty ``marker`` draws none."""

    colour: str
    dash: str = "solid"
    width: float = 2.0
    marker: str = ""


# In the order from back to front, so that dashed lines stay visible over solid ones.
POLICY_STYLES = {
    "oracle": PolicyStyle(GREY, "dot"),
    "lookup table": PolicyStyle(PURPLE, "solid", 2.5, "circle"),
    "best single setting": PolicyStyle(GREY, "dash", 1.5, "circle"),
    "best blind mix": PolicyStyle(PURPLE, "solid", 2.5, "circle"),
    "controller": PolicyStyle(ORANGE, "solid", 3.5, "diamond"),
    "predict + argmax": PolicyStyle(BLUE, "dashdot", 2.0, "triangle-up"),
    "group lookup": PolicyStyle(GREEN, "dash"),
}
WITH_INTERVAL = ("controller", "lookup table")  # policies whose interval is drawn as a band
