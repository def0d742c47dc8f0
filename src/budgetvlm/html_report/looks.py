"""How policies look: colours that are told apart with colour-blind eyes, on paper and on a dark screen.

The hues are those of Okabe and Ito; lines also differ in dash and marker.
"""

from __future__ import annotations

from dataclasses import dataclass

QUIET = "#8a8a8a"
ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY = "#D55E00", "#2C7FB8", "#009E73", "#B8679A", "#C98A00", "#4AA8DC"
WHEEL = (ORANGE, BLUE, GREEN, PURPLE, AMBER, SKY)
# From cheap to dear, for the values of a knob: light to dark, readable on white and on black.
LADDER = ("#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5")
# Both ends of a heat map; dark text is readable on all between: (larger is better, smaller is better).
HEAT = {True: ("#f4f9fe", "#62a9d8"), False: ("#fff7ee", "#fa9a50")}
DARK = "#1f2328"


@dataclass(frozen=True)
class Look:
    """``line`` is a dash of Plotly's ("solid", "dash", "dot", "dashdot"), "" for points alone."""

    colour: str
    line: str = "solid"
    width: float = 2.0
    marker: str = ""


LOOKS = {
    "controller": Look(ORANGE, "solid", 3.5, "diamond"),
    "predict + argmax": Look(BLUE, "dashdot", 2.0, "triangle-up"),
    "lookup table": Look(PURPLE, "solid", 2.5, "circle"),
    "best blind mix": Look(PURPLE, "solid", 2.5, "circle"),
    "group lookup": Look(GREEN, "dash", 2.0),
    "oracle": Look(QUIET, "dot", 2.0),
    "full setting": Look(QUIET, "solid", 1.2),
}


def look(name: str, number: int = 0) -> Look:
    """That of a policy known by name, or the next of the wheel."""
    return LOOKS.get(name, Look(WHEEL[number % len(WHEEL)], "solid", 2.0))


def ladder(count: int) -> tuple[str, ...]:
    """``count`` shades from light to dark."""
    if count == 1:
        return (LADDER[2],)
    return tuple(LADDER[round(i * (len(LADDER) - 1) / (count - 1))] for i in range(count))
