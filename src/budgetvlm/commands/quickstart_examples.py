"""The three decisions at the end of the quickstart: what a controller does with a tight and with an ample budget.

The samples are the first ones of the test split whose profile shows the point, and the budgets are multiples of what
the guard says right now that this machine takes. So the three show the same on a fast and on a busy machine.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from budgetvlm._io import time_text
from budgetvlm.commands.quickstart_steps import Options, Places

if TYPE_CHECKING:
    from budgetvlm.knobs import KnobSpace
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.table import ProfileTable
    from budgetvlm.tasks import Sample, Task

TASK = "signs"
TIGHT = 1.3  # x the bound of the cheapest setting
AMPLE = 2.0  # x the bound of the full setting


# What each request shows, the size of its print, and whether there is time for the full setting: otherwise there is
# little more than the cheapest one takes.
EXAMPLES = (
    ("large print, little time: few tiles are enough", "large", False),
    ("small print, ample time: many tiles, because only they show the print", "small", True),
    ("the same small print, little time: the budget is kept, and the answer may be wrong", "small", False),
)


def decisions(model_path: str, places: Places) -> Iterator[str]:
    """Ask the adaptive model about the examples; the lines to print."""
    from budgetvlm.commands.ask import describe
    from budgetvlm.profiling.prepare.prepared_data import load_prepared
    from budgetvlm.runtime import AdaptiveVLM
    from budgetvlm.tasks import load_task

    task, table = load_task(TASK), load_prepared(places.data).table
    model = AdaptiveVLM.from_pretrained(model_path, controller=places.controller)
    for number, (title, difficulty, ample) in enumerate(EXAMPLES, 1):
        sample, why = find_sample(task, table, difficulty)
        image, path = sample.load_image(), places.root / f"example_{difficulty}.png"
        image.save(path)
        budget_ms, of_what = budget(model, sample, ample)
        answer = model.generate(image, sample.question, budget_ms=budget_ms, max_new_tokens=task.max_new_tokens)
        yield f"\n{number}. {title}"
        yield f"   image    {path} ({why})"
        yield f"   question {sample.question} (right: {sample.answers[0]})"
        yield f"   time     {time_text(budget_ms)}, {of_what}"
        yield textwrap.indent(describe(answer), "   ")
    words = ["--image", str(path), "--question", "which sign has the largest number", "--budget_ms", f"{budget_ms:.0f}"]
    words += ["--checkpoint", str(places.controller)]
    words += [] if model_path == Options.model_path else ["--model_path", model_path]
    yield f"\nAsk your own: budgetvlm ask {shlex.join(words)}"


def find_sample(task: Task, table: ProfileTable, difficulty: str) -> tuple[Sample, str]:
    """The first profiled test sample whose accuracies show what the size of its print means, and why it was taken.

    Large print is read with one tile by every setting; small print is read at the full setting, and with one tile by
    none. Where no profiled sample is like that, it is the first of the split with this print.
    """
    wanted = {"kind": "read", "difficulty": difficulty}.items()
    samples = {s.sample_id: s for s in task.samples("test", None) if wanted <= s.groups.items()}
    for sample_id, accuracy in zip(table.sample_ids, table.accuracy, strict=True):
        if sample_id in samples and _shows(accuracy, table.knob_space, difficulty):
            needs = "one tile is enough" if difficulty == "large" else "one tile is too few, and all tiles are enough"
            return samples[sample_id], f"the first profiled test sample with {difficulty} print where {needs}"
    return next(iter(samples.values())), f"the first test sample with {difficulty} print"


def _shows(accuracy: np.ndarray, space: KnobSpace, difficulty: str) -> bool:
    """Whether a sample's accuracies ``[K]`` are right with one tile (large print), or only with many (small print)."""
    tiles = np.array([setting.get("max_crops", 1) for setting in space.settings])
    fewest, right = tiles == tiles.min(), np.nan_to_num(accuracy) > 0.5
    if difficulty == "large":
        return bool(right[fewest].all())
    return bool(right[-1] and not right[fewest].any())


def budget(model: AdaptiveVLM, sample: Sample, ample: bool) -> tuple[float, str]:
    """A budget in ms from what the guard says of this request now, and how it was made."""
    bounds_ms = model.bounds(sample.load_image(), sample.question).bounds_ms
    known = bounds_ms[np.isfinite(bounds_ms) & (bounds_ms > 0)]
    factor, ms, which = (AMPLE, bounds_ms[-1], "full") if ample else (TIGHT, known.min(), "cheapest")
    allowed = f"the {time_text(float(ms))} that the guard allows the {which} setting now"
    return round(factor * float(ms), 1), f"{factor:g} x {allowed}"
