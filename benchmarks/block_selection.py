"""Which blocks should stay when only some may run: does measuring beat running the first ones?

    python benchmarks/block_selection.py [--num_samples 1000] [--calibration_samples 200] [--json]

The first and the last block always run (see budgetvlm.vlm.blocks). The orders differ in the blocks between them:

    prefix        from early to late, with nothing measured
    similarity    how much a block turns its input, mean 1 - cosine over the prompts (ShortGPT); needs no labels
    accuracy      how much accuracy is lost when that block alone is skipped, at the full setting; needs labels
    likelihood    blocks added one by one for the likelihood of the reference answers; needs labels
    random        several orders drawn: their mean, and below it the worst and the best of them

Similarity, accuracy and likelihood are measured on training samples, all accuracies on the test split, at the depths
of the model's knob space and at two widths: the other knobs at their most, and at their least. Differences to prefix
are paired, in points, with 95% bootstrap intervals over images. The bundled model was trained to stop early, which
favours prefix; a model that was not may answer otherwise, so run it on yours before trusting either. Writes no file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from block_orders import block_changes, likelihood, order_by_addition, order_by_importance
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from budgetvlm.commands.task_arguments import add_task_arguments, open_task
from budgetvlm.errors import BudgetVLMError, ConfigError
from budgetvlm.evaluation.intervals import Bootstrap
from budgetvlm.knobs import KnobSpace
from budgetvlm.tasks import Sample, Task
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.blocks import active_blocks, default_order

BATCH = 32
DEPTH = "num_active_blocks"
Active = tuple[int, ...]
Width = dict[str, float]


def with_order(vlm: Adapter, order: Sequence[int]) -> Adapter:
    """The same model with another order of blocks, able to run at every depth that keeps the blocks it must."""
    always = {0, vlm.num_total_blocks - 1, *vlm.family.fixed_blocks(vlm.model)}
    values = vlm.knob_space.to_dict() | {DEPTH: list(range(max(2, len(always)), vlm.num_total_blocks + 1))}
    in_front = sorted(order, key=lambda block: block not in always)
    return Adapter(
        vlm.name, vlm.family, vlm.model, vlm.images, vlm.prompt, KnobSpace(values), in_front, vlm.decoder.end_ids
    )


def scores(
    vlm: Adapter, task: Task, samples: Sequence[Sample], actives: Sequence[Active], widths: Sequence[Width], what: str
) -> np.ndarray:
    """Scores when just these blocks run, ``[widths, actives, samples]``."""
    every = range(vlm.num_total_blocks)
    models = [with_order(vlm, [*active, *(b for b in every if b not in active)]) for active in actives]
    found = np.empty((len(widths), len(actives), len(samples)))
    with tqdm(total=found.size, desc=what, unit="answer", disable=None, file=sys.stderr, leave=False) as bar:
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            images, questions = [s.load_image() for s in batch], [s.question for s in batch]
            for w, width in enumerate(widths):
                visual = vlm.encode_tiles(images, int(width.get("max_crops", vlm.most_crops)))
                for a, (active, model) in enumerate(zip(actives, models, strict=True)):
                    setting = model.knob_space.setting(**width, **{DEPTH: len(active)})
                    answers = model.generate_batch(
                        images, questions, setting, max_new_tokens=task.max_new_tokens, visual=visual
                    )
                    pairs = zip(answers, batch, strict=True)
                    found[w, a, start : start + BATCH] = [task.score(answer.text, s) for answer, s in pairs]
                    bar.update(len(batch))
    return found


def orders(vlm: Adapter, task: Task, args: argparse.Namespace) -> dict[str, list[tuple[int, ...]]]:
    """The orders that compete; all but "random" are one."""
    count, rng = vlm.num_total_blocks, np.random.default_rng(args.seed)
    samples = list(task.samples("train", args.calibration_samples, args.seed))
    seen = [s.load_image() for s in samples], [s.question for s in samples]
    whole = tuple(range(count))
    skipping = [tuple(b for b in whole if b != skipped) for skipped in whole[1:-1]]
    full = {name: values[-1] for name, values in vlm.knob_space.knobs if name != DEPTH}
    lost = -scores(vlm, task, samples, skipping, [full], "one block skipped")[0].mean(axis=1)
    score = likelihood(vlm, *seen, [s.answers[0] for s in samples])
    return {
        "prefix": [default_order(count, vlm.family.fixed_blocks(vlm.model))],
        "similarity": [order_by_importance(block_changes(vlm, *seen))],
        "accuracy": [order_by_importance([0.0, *lost.tolist(), 0.0])],
        "likelihood": [order_by_addition(count, score)],
        "random": [order_by_importance(rng.random(count).tolist()) for _ in range(args.random_orders)],
    }


def rows(vlm: Adapter, task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One for each width, depth and way to order, with the accuracy and its difference to prefix."""
    competing = {name: [with_order(vlm, o).block_order for o in some] for name, some in orders(vlm, task, args).items()}
    depths = [int(n) for n in vlm.knob_space.values(DEPTH) if n < vlm.num_total_blocks]
    samples = list(task.samples("test", args.num_samples, args.seed))
    others = [(name, values) for name, values in vlm.knob_space.knobs if name != DEPTH]
    widths = [{name: values[at] for name, values in others} for at in (-1, 0)]
    whole = tuple(range(vlm.num_total_blocks))
    actives = sorted({active_blocks(o, n) for some in competing.values() for o in some for n in depths} | {whole})
    found = scores(vlm, task, samples, actives, widths, "test")
    drawn = Bootstrap.draw([s.image_id for s in samples], seed=args.seed)
    made = []
    for w, width in enumerate(widths):
        made.append({**width, DEPTH: len(whole), "order": "all blocks", **_mean(drawn, found[w, actives.index(whole)])})
        for depth in depths:
            prefix = found[w, actives.index(active_blocks(competing["prefix"][0], depth))]
            for name, some in competing.items():
                chosen = [active_blocks(order, depth) for order in some]
                each = found[w, [actives.index(active) for active in chosen]]
                row = {**width, DEPTH: depth, "order": name, "blocks": chosen, **_mean(drawn, each.mean(axis=0))}
                row["over_prefix"] = _mean(drawn, each.mean(axis=0) - prefix)
                row["span"] = [float(v) for v in (each.mean(axis=1).min(), each.mean(axis=1).max())]
                made.append(row)
    return made


def _mean(drawn: Bootstrap, values: np.ndarray) -> dict[str, float]:
    low, high = drawn.interval(drawn.means(values))
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def show(found: list[dict[str, Any]], names: Sequence[str]) -> Table:
    """One line a row."""
    table = Table(box=SIMPLE_HEAD, title="Accuracy, and points over prefix, with 95% intervals", title_justify="left")
    for title in (*names, "order", "blocks that run", "accuracy %", "points over prefix"):
        table.add_column(title, justify="left" if title in ("order", "blocks that run") else "right", no_wrap=True)
    for row in found:
        several = len(row.get("blocks", ())) > 1
        low, high = (100 * v for v in row.get("span", (0, 0)))
        blocks = f"{low:.1f} to {high:.1f} %" if several else " ".join(map(str, row.get("blocks", [["all"]])[0]))
        gain = row["over_prefix"] if "over_prefix" in row and row["order"] != "prefix" else None
        table.add_row(*(f"{row[name]:g}" for name in names), row["order"], blocks, _percent(row), _percent(gain, "+"))
    return table


def _percent(one: dict[str, float] | None, sign: str = "") -> str:
    if one is None:
        return "-"
    return f"{100 * one['mean']:{sign}.1f} [{100 * one['low']:{sign}.1f}, {100 * one['high']:{sign}.1f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_path", default="reference", metavar="DIR", help="model directory, or the bundled 'reference'")
    add_task_arguments(parser)
    add("--num_samples", type=int, default=1000, metavar="N", help="of the test split (default: 1000)")
    add("--calibration_samples", type=int, default=200, metavar="N", help="of the train split (default: 200)")
    add("--random_orders", type=int, default=8, metavar="N", help="how many are drawn (default: 8)")
    add("--seed", type=int, default=0, metavar="N", help="draws samples, orders, resamples (default: 0)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--num_threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    add("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        if min(args.num_samples, args.calibration_samples, args.random_orders) < 1:
            raise ConfigError("num_samples, calibration_samples and random_orders have to be 1 at least")
        task, vlm = open_task(args), load_vlm(args.model_path, device=args.device, num_threads=args.num_threads)
        if DEPTH not in vlm.knob_space.names:
            raise ConfigError(f"{args.model_path} has no knob {DEPTH}, so that no block can be skipped")
        found = rows(vlm, task, args)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps({"model": vlm.name, "task": task.name, **vars(args), "rows": found}, allow_nan=False))
        return 0
    console = Console()
    console.width = max(console.width, 120)
    console.print(show(found, vlm.knob_space.names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
