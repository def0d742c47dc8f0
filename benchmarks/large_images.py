"""Photos among small images: are budgets kept where preparing an image takes much longer than any profile knows?

    python benchmarks/large_images.py --checkpoint DIR [--times 5 10] [--num_requests 400] [--json]

The bundled model answers questions about test images of `signs`; half of them, drawn at random, are enlarged.
Budgets are 0.5 to 1 times the full setting's time; only requests for which a setting was expected to keep its budget
count.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm.errors import BudgetVLMError
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.tasks import load_task

SHARES = 0.5, 1.0


def measure(checkpoint: Path, times: float, num_requests: int, seed: int) -> dict[str, Any]:
    """Shares of the requests, by the size of their images."""
    model = AdaptiveVLM.from_pretrained("reference", checkpoint)
    rng, reference_ms = np.random.default_rng(seed), float(model.controller.latency_reference_ms)
    answers: dict[str, list[Any]] = {"as they are": [], "enlarged": []}
    for sample in load_task("signs").samples("test", num_requests, seed):
        image, large = sample.load_image(), bool(rng.random() < 0.5)
        if large:
            image = image.resize((round(image.width * times), round(image.height * times)))
        budget_ms = reference_ms * rng.uniform(*SHARES)
        answers["enlarged" if large else "as they are"].append(
            model.generate(image, sample.question, budget_ms=budget_ms)
        )
    return {"times": times, **{size: _summary(found) for size, found in answers.items()}}


def _summary(answers: list[Any]) -> dict[str, float]:
    promised = [answer for answer in answers if answer.feasible]
    return {
        "requests": len(answers),
        "promised": len(promised),
        "late": float(np.mean([not answer.budget_met for answer in promised])),
        "cut": float(np.mean([answer.finish_reason == "budget" for answer in promised])),
        "preprocess_ms": float(np.median([answer.stages_ms["preprocess"] for answer in answers])),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a calibrated controller")
    parser.add_argument("--times", type=float, nargs="+", default=[5.0, 10.0], metavar="N", help="as high and wide")
    parser.add_argument("--num_requests", type=int, default=400, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    args = parser.parse_args()
    try:
        found = [measure(args.checkpoint, times, args.num_requests, args.seed) for times in args.times]
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(found))
        return 0
    for one in found:
        for size in ("as they are", "enlarged"):
            row = one[size]
            print(
                f"{one['times']:g} times, {size:11}  {row['requests']:4} requests, {row['promised']:4} promised: "
                f"{row['late']:5.1%} late, {row['cut']:5.1%} cut; preprocessing {row['preprocess_ms']:.1f} ms"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
