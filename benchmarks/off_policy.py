"""Whether estimates of another policy hold the truth: on a table all outcomes are known, in a log only the chosen ones.

    python benchmarks/off_policy.py --data DATA [--seeds 200] [--requests 2000] [--explore 0.02 0.1 0.3] [--json FILE]

Each seed draws a log: requests of held-out samples at the usual budgets, answered by a present policy of which a share
is drawn as in service. A candidate, which knows more, is valued from the log alone and compared with its true value.
"holds" is the share of seeds whose 95% interval (for a bound: its one side) holds the truth, "width" half the
interval's length, in points. "found" is the share of seeds in which the candidate is proven better than the present
policy. Where Open Bandit Pipeline can be imported (`pip install obp`), its estimates are compared with these.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.decide import CLEARLY_WORSE
from budgetvlm.errors import BudgetVLMError
from budgetvlm.evaluation.evaluation_data import EvaluationData
from budgetvlm.evaluation.evaluation_options import EvaluationOptions
from budgetvlm.feedback.confidence_bounds import lower_bound, normal_interval, value_interval
from budgetvlm.feedback.off_policy import ScoredLog, doubly_robust, floored, gain, ips, snips
from budgetvlm.policies.budget_grid import BUDGET_SHARES
from budgetvlm.policies.ridge import Ridge
from budgetvlm.policies.states import States
from budgetvlm.profiling.prepare.preparation import load_prepared

PRICE = 0.01
FEW = 150  # training samples that the present policy knows
CLIP = 20.0  # largest weight of the clipped estimates


class World(NamedTuple):
    """Requests whose outcomes are all known: what each setting scores, what is allowed, and two policies' values."""

    truth: np.ndarray
    allowed: np.ndarray
    present: np.ndarray
    candidate: np.ndarray


def world(path: Path) -> World:
    """The test samples of prepared data at the usual budgets, and policies from few and from all training samples."""
    prepared = load_prepared(path)
    data = EvaluationData.of(prepared.table, prepared.features, EvaluationOptions(resamples=1))
    train = prepared.table.subset("train")
    few = train.subset(np.arange(min(FEW, train.num_samples)))
    states = States.joined(data.under_budgets(BUDGET_SHARES, PRICE))
    values = []
    for part in (few, train):
        ridge = Ridge.fit(part, prepared.features.aligned(part.sample_ids), checked=False)
        values.append(states.by_sample(ridge.predict) - PRICE * data.means.latency_share)
    return World(data.test.accuracy[states.sample_index], states.feasible, *values)


def logged(world: World, requests: int, explore: float, seed: int) -> tuple[ScoredLog, np.ndarray, np.ndarray]:
    """Draw a log; with what the policies choose in its requests, ``[N, K]`` each.

    The candidate keeps to what was tried: elsewhere it chooses as the present policy does.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(world.truth), requests)
    allowed, values = world.allowed[rows], np.where(world.allowed, world.present, -np.inf)[rows]
    tried = allowed & (values >= values.max(axis=1, keepdims=True) - CLEARLY_WORSE)
    present = _one_hot(values)
    probabilities = explore * tried / tried.sum(axis=1, keepdims=True) + (1 - explore) * present
    chosen = (probabilities.cumsum(axis=1) > rng.random((requests, 1))).argmax(axis=1)
    scores = world.truth[rows, chosen]
    return ScoredLog(scores, chosen, probabilities), present, _one_hot(np.where(tried, world.candidate[rows], -np.inf))


def _one_hot(values: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.eye(values.shape[1])[values.argmax(axis=1)]
    return out


def true_values(world: World) -> tuple[float, float]:
    """What the present policy and the candidate are worth."""
    values = np.where(world.allowed, world.present, -np.inf)
    tried = world.allowed & (values >= values.max(axis=1, keepdims=True) - CLEARLY_WORSE)
    candidate = np.where(tried, world.candidate, -np.inf)
    return tuple(float((world.truth * _one_hot(one)).sum(axis=1).mean()) for one in (values, candidate))  # type: ignore[return-value]


def one_seed(world: World, requests: int, explore: float, seed: int) -> dict[str, tuple[float, float, float]]:
    """Estimate and interval by each method."""
    log, present, candidate = logged(world, requests, explore, seed)
    predicted = _baseline(log)
    found = {}
    for name, outcomes in (
        ("IPS", ips(log, candidate)), ("IPS, clipped", ips(log, candidate, CLIP)), ("SNIPS", snips(log, candidate)),
        ("doubly robust", doubly_robust(log, candidate, predicted)),
        ("doubly robust, clipped", doubly_robust(log, candidate, predicted, CLIP)),
    ):  # fmt: skip
        found[name] = (float(outcomes.mean()), *normal_interval(outcomes))
    outcomes, _ = floored(log, candidate, predicted)
    found["any time"] = (float(outcomes.mean()), *value_interval(log, candidate, predicted))
    outcomes, least = gain(log, candidate, present, predicted)
    found["gain"] = (float(outcomes.mean()), *normal_interval(outcomes))
    found["gain, any time"] = (float(outcomes.mean()), lower_bound(outcomes, least), 1.0)
    return found


def _baseline(log: ScoredLog) -> np.ndarray:
    """A predictor's stand-in that needs no training: every setting scores what was scored on average."""
    return np.full(log.probabilities.shape, float(log.scores.mean()))


def measure(world: World, requests: int, explore: float, seeds: int) -> list[dict[str, Any]]:
    """Coverage of each method over the seeds."""
    now, then = true_values(world)
    made = [one_seed(world, requests, explore, seed) for seed in range(seeds)]
    rows = []
    for name in made[0]:
        is_gain = name.startswith("gain")
        truth = then - now if is_gain else then
        value, low, high = np.array([one[name] for one in made]).T
        rows.append({
            "explore": explore, "method": name, "truth": truth, "bias": float(value.mean() - truth),
            "error": float(np.sqrt(((value - truth) ** 2).mean())), "width": float(((high - low) / 2).mean()),
            "holds": float(((low <= truth) & (truth <= high)).mean()),
            "found": float((low > 0).mean()) if is_gain else None,
        })  # fmt: skip
    return rows


def difference_to_obp(world: World, requests: int, seed: int = 0) -> float | None:
    """The largest difference to Open Bandit Pipeline's estimates on one log; None: it is not there."""
    try:
        from obp.ope import estimators as obp
    except ImportError:
        return None
    log, _, candidate = logged(world, requests, 0.3, seed)
    predicted = np.random.default_rng(seed).random(candidate.shape)
    asked = {
        "reward": log.scores.astype(float), "action": log.chosen, "pscore": log.of_chosen(log.probabilities),
        "action_dist": candidate[:, :, None], "position": np.zeros(len(log.chosen), dtype=int),
    }  # fmt: skip
    pairs = [
        (ips(log, candidate), obp.InverseProbabilityWeighting().estimate_policy_value(**asked)),
        (snips(log, candidate), obp.SelfNormalizedInverseProbabilityWeighting().estimate_policy_value(**asked)),
        (
            doubly_robust(log, candidate, predicted),
            obp.DoublyRobust().estimate_policy_value(**asked, estimated_rewards_by_reg_model=predicted[:, :, None]),
        ),
    ]
    return max(abs(float(ours.mean()) - float(theirs)) for ours, theirs in pairs)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared data (JSON) whose test split is measured")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--explore", type=float, nargs="+", default=[0.02, 0.1, 0.3])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        planted = world(args.data)
    except BudgetVLMError as error:
        parser.error(str(error))
    rows = [row for share in args.explore for row in measure(planted, args.requests, share, args.seeds)]
    table = Table(*("explore", "method", "truth", "bias", "error", "holds", "width", "found"), box=SIMPLE_HEAD)
    for row in rows:
        points = [f"{100 * row[name]:.2f}" for name in ("truth", "bias", "error")]
        found = "" if row["found"] is None else f"{row['found']:.1%}"
        table.add_row(
            str(row["explore"]), row["method"], *points, f"{row['holds']:.1%}", f"{100 * row['width']:.2f}", found
        )
    Console().print(table)
    difference = difference_to_obp(planted, args.requests)
    print(
        "Open Bandit Pipeline is not installed" if difference is None else f"largest difference to it: {difference:.1e}"
    )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "difference_to_obp": difference}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
