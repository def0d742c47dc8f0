"""Whether a controller that learns in service gets better after a shift, and no worse without one or by a bad update.

    python benchmarks/learning_in_service.py --data DATA [--seeds 20] [--scenarios shift none ...] [--json FILE]

Requests of the bundled task are drawn with replacement from a table, where all outcomes are known: 1,000 with large
signs and some kinds of questions, and 3,000 more, which have smaller signs and other kinds where there is a shift. The
controller knows a profile of the first kind alone. A tenth of the requests is scored, and every `--every` requests a
look is taken as `budgetvlm update` does. Accuracies are those of held-out samples of what comes last, at the usual
budgets: of the old controller, of the one that serves at the end, and of one trained anew on a whole profile of what
comes last. "served" is what the last 3,000 requests got, trials included.

Scenarios:
    shift, none          as they are
    flipped              no shift, and a fifth of the scores is flipped
    flipped_shift        a shift, and the same
    shuffled, constant   no shift; candidates are trained on images' features of others, or all the same, and tried
                         whatever is expected of them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.training import fit_controller
from budgetvlm.controller.training_options import GRPOConfig, StatePlan, TrainingConfig
from budgetvlm.decide import CLEARLY_WORSE
from budgetvlm.errors import BudgetVLMError
from budgetvlm.features import Features
from budgetvlm.feedback.candidate import train_candidate
from budgetvlm.feedback.improvement import Look, OnTrial, look
from budgetvlm.feedback.outcome_model import OutcomeModel
from budgetvlm.feedback.served_log import ServedLog
from budgetvlm.policies.budget_grid import BUDGET_SHARES
from budgetvlm.profiling.prepare.preparation import load_prepared
from budgetvlm.table import ProfileTable

BEFORE = ("large",), ("shape", "price", "origin")
AFTER = ("medium", "small"), ("read", "digits", "largest", "sum")
REQUESTS_BEFORE, REQUESTS_AFTER = 1000, 3000
SCORED, EXPLORED, FLIPPED = 0.1, 0.02, 0.2
PRICE = 0.01
SCENARIOS = ("shift", "none", "flipped", "flipped_shift", "shuffled", "constant")


class Part(NamedTuple):
    """One distribution: its samples with splits, their features in the same order, and a controller trained on them."""

    table: ProfileTable
    features: Features
    controller: GRPOController

    @classmethod
    def of(cls, table: ProfileTable, features: Features, which: Sequence[Sequence[str]], seed: int) -> Part:
        """The samples of some sizes of signs and kinds of questions."""
        labels = zip(table.groups["difficulty"], table.groups["kind"], strict=True)
        own = table.subset(np.array([size in which[0] and kind in which[1] for size, kind in labels]))
        features = features.aligned(own.sample_ids)
        config = TrainingConfig(
            GRPOConfig(num_epochs=20), plan=StatePlan(default_price=PRICE), hidden_dim=128, patience=5, seed=seed
        )
        return cls(own, features, fit_controller(own, features, config))

    def asked(self, rows: np.ndarray, shares: np.ndarray, controller: GRPOController, first: int = 0) -> ServedLog:
        """Requests about these samples at these budgets, bounded by a controller's profile, not decided yet."""
        image, language = self.features.image[rows], self.features.language[rows]
        budget_ms = shares * float(controller.latency_reference_ms)
        with torch.no_grad():
            bounds = controller.bounds_of(torch.from_numpy(image), torch.from_numpy(language))
            allowed = controller.allowed(controller.feasible(torch.from_numpy(budget_ms).float(), bounds)).numpy()
        made = ServedLog.unserved(Features([str(first + i) for i in range(len(rows))], image, language), controller)
        at_s = first + np.arange(len(rows), dtype=np.float64)
        return replace(made, at_s=at_s, seen_ms=budget_ms, allowed=allowed)

    def accuracy(self, controller: GRPOController, bounds_of: GRPOController) -> float:
        """On held-out samples at the usual budgets, among what another controller's bounds allow."""
        rows = np.repeat(self.table.rows_of("test"), len(BUDGET_SHARES))
        shares = np.tile(BUDGET_SHARES, len(rows) // len(BUDGET_SHARES))
        chosen = self.asked(rows, shares, bounds_of).choices_by(controller)
        return float((self.table.accuracy[rows] * chosen).sum(axis=1).mean())


class Service:
    """Requests as a server would answer and keep them."""

    def __init__(self, present: GRPOController, seed: int, flipped: float, trial_share: float) -> None:
        self.present, self.rng, self.flipped, self.share = present, np.random.default_rng(seed), flipped, trial_share
        self.trial: OnTrial | None = None
        self.logs: list[ServedLog] = []
        self.served: list[float] = []

    @property
    def log(self) -> ServedLog:
        """All requests so far."""
        return ServedLog(
            *(np.concatenate(column) for column in zip(*(vars(log).values() for log in self.logs), strict=True))
        )

    def answer(self, part: Part, count: int) -> None:
        """Answer requests of one distribution and keep them."""
        rng, known = self.rng, np.flatnonzero(np.array(part.table.split) != "test")
        rows, shares = rng.choice(known, count), rng.choice(BUDGET_SHARES, count)
        asked = part.asked(rows, shares, self.present, len(self.served))
        probabilities = self._probabilities(asked)
        chosen = (probabilities.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
        scores = part.table.accuracy[rows, chosen].astype(np.float64)
        self.served += scores.tolist()
        scores = np.where(rng.random(count) < self.flipped, 1 - scores, scores)
        scores[rng.random(count) >= SCORED] = np.nan
        self.logs.append(replace(asked, chosen=chosen, probabilities=probabilities, scores=scores))

    def _probabilities(self, asked: ServedLog) -> np.ndarray:
        """With which each setting is chosen: the present controller's choice, one drawn, or the candidate's."""
        present, values = asked.choices_by(self.present), asked.values_by(self.present)
        drawn = asked.allowed & (values >= (values * present).sum(axis=1, keepdims=True) - CLEARLY_WORSE)
        share = self.share if self.trial else 0.0
        candidate = asked.choices_by(self.trial.candidate) if self.trial else present
        explored = drawn / drawn.sum(axis=1, keepdims=True)
        out: np.ndarray = (1 - EXPLORED - share) * present + EXPLORED * explored + share * candidate
        return out


def broken(features: Features, how: str) -> Features:
    """Features of which those of images are another's, or all the same."""
    image = features.image[np.random.default_rng(0).permutation(len(features))]
    return replace(features, image=image if how == "shuffled" else np.broadcast_to(image.mean(axis=0), image.shape))


def bad_candidate(service: Service, part: Part, how: str, seed: int) -> GRPOController:
    """What is learnt from a log and a profile whose images' features are broken."""
    log = service.log
    features = broken(Features(tuple(log.ids), log.image, log.language), how)
    log = replace(log, image=features.image)
    model = OutcomeModel.fit(log, service.present)
    return train_candidate(service.present, log, model, (part.table, broken(part.features, how)), seed)


def simulate(before: Part, after: Part, scenario: str, seed: int, every: int, trial_share: float) -> dict[str, Any]:
    """One seed of one scenario."""
    last = after if scenario.endswith("shift") else before
    service = Service(before.controller, seed, FLIPPED if scenario.startswith("flipped") else 0.0, trial_share)
    tried, tested, steps = 0, 0, list[dict[str, Any]]()
    for start in range(0, REQUESTS_BEFORE + REQUESTS_AFTER, every):
        service.answer(before if start < REQUESTS_BEFORE else last, every)
        found = look(service.log, service.present, service.trial, (before.table, before.features), seed)
        if scenario in ("shuffled", "constant"):
            bad = None if service.trial else bad_candidate(service, before, scenario, seed + tried)
            found = found._replace(fresh=bad)
        if found.verdict and service.trial:
            steps.append({"requests": start + every, **vars(found.verdict)})
            tested += found.verdict.tested and (found.verdict.decision != "wait" or found.fresh is not None)
        _act(service, found)
        if found.fresh is not None:
            tried += 1
            service.trial = OnTrial(found.fresh, tested + 1, float(service.log.at_s[-1]))
            worth = last.accuracy(found.fresh, before.controller)
            steps.append({"requests": start + every, "decision": "try", "expected": found.expected, "accuracy": worth})
    one, now, anew = (
        last.accuracy(c, before.controller) for c in (before.controller, service.present, last.controller)
    )
    return {
        "scenario": scenario, "seed": seed, "old": one, "updated": now, "anew": anew, "tried": tried,
        "promoted": sum(step["decision"] == "promote" for step in steps),
        "served": float(np.mean(service.served[REQUESTS_BEFORE:])), "steps": steps,
    }  # fmt: skip


def _act(service: Service, found: Look) -> None:
    """Promote or refuse the candidate on trial, where that is the verdict."""
    if found.verdict and service.trial and found.verdict.decision != "wait":
        if found.verdict.decision == "promote":
            service.present = service.trial.candidate
        service.trial = None


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table: means over seeds, in points, and how many seeds recovered enough or lost too much."""
    old, updated, anew, served = (
        100 * np.array([row[name] for row in rows]) for name in ("old", "updated", "anew", "served")
    )
    shifted = rows[0]["scenario"].endswith("shift")
    recovered = (updated - old) / (anew - old) if shifted else np.full(len(rows), np.nan)
    return [
        rows[0]["scenario"], *(f"{values.mean():.1f}" for values in (old, updated, anew, served)),
        f"{recovered.mean():.0%} ({recovered.min():.0%} to {recovered.max():.0%})" if shifted else "",
        f"{(recovered >= 0.8).sum()} of {len(rows)}" if shifted else "",
        f"{(updated >= old - 0.3).sum()} of {len(rows)}",
        f"{np.mean([row['tried'] for row in rows]):.1f}", str(sum(row["promoted"] > 0 for row in rows)),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Simulate, print, and write a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared data (JSON) of the bundled task")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--every", type=int, default=125, help="requests between two looks")
    parser.add_argument("--trial", type=float, default=0.5, help="share of the requests that try a candidate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    try:
        prepared = load_prepared(args.data)
    except BudgetVLMError as error:
        parser.error(str(error))
    found: dict[str, list[dict[str, Any]]] = {scenario: [] for scenario in args.scenarios}
    for seed in tqdm(range(args.first_seed, args.first_seed + args.seeds), unit="seed", disable=None):
        before, after = (Part.of(prepared.table, prepared.features, which, seed) for which in (BEFORE, AFTER))
        for scenario, rows in found.items():
            rows.append(simulate(before, after, scenario, seed, args.every, args.trial))
            if args.json:
                args.json.write_text(json.dumps([row for rows in found.values() for row in rows], indent=1))
    columns = ("old", "updated", "anew", "served", "recovered", "80% or more", "lost at most 0.3", "tried", "promoted")
    table = Table("scenario", *columns, box=SIMPLE_HEAD)
    for rows in found.values():
        table.add_row(*summary(rows))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
