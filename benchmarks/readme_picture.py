"""Draw the README's picture from the first table of `docs/results.md`: accuracy against the latency budget.

    python benchmarks/readme_picture.py          # writes docs/accuracy.svg

The figures exist once, in the table; after a new measurement edit the table and run this script again. The picture has
no background, and its grey is readable on a light page and on a dark one.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results.md"
PICTURE = ROOT / "docs" / "accuracy.svg"
GREY = "#7d8590"  # contrast of at least 3.8 with white and with GitHub's dark page
ROWS = {  # how the table calls a policy, how the picture does, and its colour
    "oracle (hindsight, a bound)": ("oracle (knows the outcome)", GREY),
    "controller, `--ensemble 5`": ("controller", "#2f81f7"),
    "lookup table (one setting for all inputs)": ("lookup table", "#d9730d"),
}


@dataclass(frozen=True)
class Curves:
    """Budgets as shares of the full setting's latency, and each policy's accuracy (%) at them."""

    budgets: list[float]
    accuracy: dict[str, list[float]]

    def to_json(self) -> str:
        return json.dumps({"budgets": self.budgets, "accuracy": self.accuracy})


def read_curves(text: str) -> Curves:
    """Take the curves from the text of `docs/results.md`.

    Raises:
        ValueError: the table or one of its rows is not there.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header = next((row for row in rows if row[0].startswith("accuracy (%) at a budget")), None)
    if header is None:
        raise ValueError("docs/results.md has no table 'accuracy (%) at a budget of ...'; the picture is drawn from it")
    budgets = [float(cell) for cell in header[1:] if re.fullmatch(r"[\d.]+", cell)]
    named = {row[0]: row for row in reversed(rows)}  # the first table is the one
    if missing := [name for name in ROWS if name not in named]:
        raise ValueError(f"the table of docs/results.md lacks the rows {missing}; the picture is drawn from them")
    return Curves(budgets, {ROWS[name][0]: [float(x) for x in named[name][1 : len(budgets) + 1]] for name in ROWS})


def draw(curves: Curves, path: Path) -> None:
    """Write the picture as SVG, with its figures in the description."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": "budgetvlm", "svg.fonttype": "path", "font.size": 11, "text.color": GREY}
    style |= {f"{part}.color": GREY for part in ("xtick", "ytick")} | {"axes.labelcolor": GREY, "axes.edgecolor": GREY}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
        for (label, values), (_, colour) in zip(curves.accuracy.items(), ROWS.values(), strict=True):
            dashed = "--" if label.startswith("oracle") else "-"
            axes.plot(curves.budgets, values, dashed, color=colour, marker="o", markersize=4, linewidth=2, label=label)
        axes.set_xlabel("latency budget (× the full setting's latency)")
        axes.set_ylabel("right answers (%)")
        axes.grid(color=GREY, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right", labelcolor="linecolor")
        figure.savefig(path, transparent=True, metadata={"Date": None, "Description": curves.to_json()})
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="where to write the SVG")
    options = parser.parse_args(arguments)
    draw(read_curves(RESULTS.read_text(encoding="utf-8")), options.output)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
