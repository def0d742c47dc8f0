"""What a report is made of: text, tables, charts, pictures. Plain data; how it is drawn is decided elsewhere.

Numbers are as they are shown: shares are already in %, times in ms. None is "not known".
"""

from __future__ import annotations

from dataclasses import dataclass

from budgetvlm.html_report.looks import Look

Number = float | None


@dataclass(frozen=True)
class Series:
    """One line, or points where ``look.line`` is "". ``low`` and ``high`` make a band around it, or nothing."""

    name: str
    x: tuple[Number, ...]
    y: tuple[Number, ...]
    look: Look
    low: tuple[Number, ...] = ()
    high: tuple[Number, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis. ``key`` names its files and its place in the page."""

    key: str
    title: str
    note: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    level: float | None = None
    level_name: str = ""


@dataclass(frozen=True)
class BarChart:
    """Bars over names, with ``whiskers`` (low, high) where given; ``stacked`` ones add up, ``flat`` ones lie down."""

    key: str
    title: str
    note: str
    x_label: str
    y_label: str
    names: tuple[str, ...]
    series: tuple[Bars, ...]
    stacked: bool = False
    flat: bool = False
    level: float | None = None
    level_name: str = ""


@dataclass(frozen=True)
class Bars:
    """One colour of a bar chart: a height for each name."""

    name: str
    heights: tuple[Number, ...]
    colour: str
    low: tuple[Number, ...] = ()
    high: tuple[Number, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """A number for each pair; ``cells[row][column]``. ``digits`` after the point; ``upside``: larger is better."""

    key: str
    title: str
    note: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Number, ...], ...]
    unit: str
    digits: int = 1
    upside: bool = True


Chart = LineChart | BarChart | HeatMap


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class DataTable:
    """A table; the first column holds names, ``strong`` the rows to mark."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[int, ...] = ()


@dataclass(frozen=True)
class Example:
    """One sample: its picture (a data URI, "" where there is none) and lines about it."""

    picture: str
    title: str
    question: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """Samples side by side."""

    caption: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Tiles:
    """A few figures in large print: (figure, what it is)."""

    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Row:
    """Charts that stand side by side where there is room."""

    charts: tuple[Chart, ...]


Block = Text | Tiles | DataTable | Gallery | Row | LineChart | BarChart | HeatMap


@dataclass(frozen=True)
class Section:
    """A chapter. ``key`` is its anchor."""

    key: str
    title: str
    blocks: tuple[Block, ...]

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts, in order."""
        found: list[Chart] = []
        for block in self.blocks:
            if isinstance(block, Row):
                found += block.charts
            elif isinstance(block, Chart):
                found.append(block)
        return tuple(found)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text; "–" where it is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def milliseconds(value: float | None) -> str:
    """A time as text."""
    return "–" if value is None else f"{value:.3g} ms" if value < 1 else f"{value:.1f} ms"
