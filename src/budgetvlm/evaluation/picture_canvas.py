"""An empty picture drawn by Matplotlib on white, without a display, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budgetvlm._io import atomic_path
from budgetvlm.evaluation.policy_styles import GREY

INK = "#222222"
DPI = 150


def new_canvas(width: float, height: float, **options: Any) -> Any:
    """A figure of Matplotlib; sizes in inches. Further options are those of `matplotlib.figure.Figure`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(canvas)
    return canvas


def clean_axes(axes: Any, grid: str = "y") -> None:
    """Leave two thin axes and a faint grid across one of them, or none for ""."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, color="#e6e6e6", linewidth=1)


def write_canvas(canvas: Any, path: str | Path, kind: str = "png") -> None:
    """Write the file, whole or not at all, without its date. Raises OutputError."""
    with atomic_path(path) as temporary:
        canvas.savefig(temporary, format=kind, metadata={"Date": None} if kind == "svg" else None)
