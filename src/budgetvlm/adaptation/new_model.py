"""A profile of a model that was hardly profiled: from earlier tables of related models and a few labelled samples.

The samples of the earlier tables get the accuracies that `related_accuracy` expects of the new model, and their own
latencies moved to what the few samples took; the few keep what was measured. What comes out is a table like any other.
Shapes: M earlier tables, S samples, N labelled ones, K settings of the new model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from budgetvlm.adaptation.earlier_table import EarlierTable
from budgetvlm.adaptation.related_accuracy import Posterior, Prior, held_out_errors, likeness
from budgetvlm.errors import DataError
from budgetvlm.features import Features
from budgetvlm.table import UNIT, ProfileTable

LEAST_LABELLED = 20
SAME = 0.5  # mean correlation of two models' features of the same samples, below which they are other features


@dataclass(frozen=True, eq=False)
class NewModel:
    """A new model's profile, most of it expected.

    Attributes:
        table: with splits; a test sample is one of the labelled table alone. features: of its samples.
        posterior: what was learnt of the accuracies.
        labelled: number of labelled samples. shared: of these, how many an earlier table has too.
        errors: see `held_out_errors`, ``[3]``.
    """

    table: ProfileTable
    features: Features
    posterior: Posterior
    labelled: int
    shared: int
    errors: np.ndarray

    @classmethod
    def of(
        cls, earlier: Sequence[tuple[ProfileTable, Features]], few: ProfileTable, features: Features, seed: int = 0
    ) -> NewModel:
        """Carry over what earlier models scored.

        Args:
            earlier: tables with splits, and features of their samples.
            few: what was measured of the new model; its test samples, if there are any, are not learnt from.
            features: of these samples, in any order.

        Raises:
            DataError: too few labels, no latency, or other features than the earlier ones. KnobSpaceError: other knobs.
        """
        features = features.aligned(few.sample_ids)
        known = _labelled(few)
        for _, others in earlier:
            _require_same_kind(others, features)
        learnt = [EarlierTable.of(*one, few.knob_space, seed) for one in earlier]
        rest, rest_features = _union(learnt, few)
        labels, own = known.accuracy.astype(np.float64), features.aligned(known.sample_ids)
        of_rest, of_few = (np.stack([one.accuracy(f) for one in learnt]) for f in (rest_features, own))
        surprise = np.stack([one.surprise(known.sample_ids) for one in learnt])
        open_, noise = np.min([one.left_open for one in learnt], axis=0), np.mean([one.noise for one in learnt], axis=0)
        prior = Prior.of(of_rest, likeness(few.knob_space, few.knob_space), open_, noise)
        posterior = Posterior.of(prior, labels, of_few, surprise)
        rest = replace(rest, accuracy=posterior.accuracy(of_rest).astype(np.float32))
        return cls(
            _joined(rest, few),
            Features(
                (*rest.sample_ids, *few.sample_ids),
                np.concatenate([rest_features.image, features.image]),
                np.concatenate([rest_features.language, features.language]),
                features.metadata,
            ),
            posterior,
            len(known),
            int((surprise != 0).any(axis=(0, 2)).sum()),
            held_out_errors(posterior, labels, of_few, surprise),
        )

    @property
    def report(self) -> dict[str, Any]:
        """What is known, and how surely, JSON-able."""
        own, unchanged, alone = np.sqrt(self.errors).tolist()
        means = np.nanmean(self.table.accuracy, axis=0).tolist()
        known = zip(self.table.knob_space.settings, means, self.posterior.half_widths.tolist(), strict=True)
        return {
            "labelled": self.labelled,
            "shared": self.shared,
            "samples": self.table.num_samples,
            "carried_over": self.posterior.weights.tolist(),
            "error": {"carried_over": own, "unchanged": unchanged, "labels_alone": alone},
            "settings": [{"setting": dict(one), "accuracy": mean, "half_width": half} for one, mean, half in known],
        }


def _labelled(few: ProfileTable) -> ProfileTable:
    """The samples to learn from. Raises DataError."""
    rows = np.isfinite(few.accuracy).any(axis=1) & (np.array(few.split or [""] * len(few)) != "test")
    if rows.sum() < LEAST_LABELLED:
        raise DataError(
            f"{rows.sum()} samples of the new model are labelled; {LEAST_LABELLED} are the least, and 100 are enough"
        )
    if not np.isfinite(few.latency_ms).any():
        raise DataError("no latency of the new model was measured; profile it (exp6) on some samples and prepare again")
    return few.subset(rows)


def _require_same_kind(earlier: Features, features: Features) -> None:
    """Raise DataError unless equal numbers mean the same, as far as can be seen."""
    widths = [(part.image.shape[1], part.language.shape[1]) for part in (earlier, features)]
    remedy = "Extract both in one way: budgetvlm prepare with the same --encoder, or import with the same features."
    if widths[0] != widths[1]:
        raise DataError(
            f"the earlier features are {widths[0][0]} of the image and {widths[0][1]} of the question, the new model's "
            f"{widths[1][0]} and {widths[1][1]}. {remedy}"
        )
    both = sorted(set(earlier.sample_ids) & set(features.sample_ids))
    if len(both) < LEAST_LABELLED:
        return
    pairs = [
        (getattr(earlier.aligned(both), side), getattr(features.aligned(both), side)) for side in ("image", "language")
    ]
    first, other = (np.concatenate([pair[place] for pair in pairs], axis=1) for place in (0, 1))
    varies = (first.std(axis=0) > 1e-6) & (other.std(axis=0) > 1e-6)
    first, other = (part[:, varies] - part[:, varies].mean(axis=0) for part in (first, other))
    alike = float(((first * other).mean(axis=0) / (first.std(axis=0) * other.std(axis=0))).mean())
    if alike < SAME:
        raise DataError(
            f"the features of {len(both)} samples that both have are correlated by {alike:.2f} only, so the models see "
            f"them in different ways. {remedy}"
        )


def _union(learnt: Sequence[EarlierTable], few: ProfileTable) -> tuple[ProfileTable, Features]:
    """The earlier tables' samples, each once and without those few, at the new model's settings."""
    seen, tables, kept = set(few.sample_ids), [], []
    for one in learnt:
        rows = np.flatnonzero([name not in seen for name in one.table.sample_ids])
        if len(rows):
            tables.append(one.moved(few).subset(rows))
            kept.append(one.features.aligned(tables[-1].sample_ids))
            seen.update(tables[-1].sample_ids)
    if not tables:
        raise DataError("the earlier tables have no other samples than the new model's; train on these alone")
    features = Features(
        tuple(name for part in kept for name in part.sample_ids),
        np.concatenate([part.image for part in kept]),
        np.concatenate([part.language for part in kept]),
    )
    return _below(tables), features


def _joined(rest: ProfileTable, few: ProfileTable) -> ProfileTable:
    """Both tables; the few train, but those of a unit that the others have go to its side."""
    side_of = dict(zip(rest.units, rest.split or (), strict=True)) if rest.unit == few.unit else {}
    own = few.split or ("train",) * len(few)
    sides = tuple(
        side_of.get(unit, "test" if side == "test" else "train") for unit, side in zip(few.units, own, strict=True)
    )
    below = _below([rest, replace(few, split=sides)])
    return replace(below, metadata={**few.metadata, UNIT: below.unit})


def _below(tables: Sequence[ProfileTable]) -> ProfileTable:
    """One table below the other, with the stages, counts and labels that all have."""
    first = tables[0]

    def stacked(name: str) -> dict[str, np.ndarray]:
        parts = [getattr(table, name) for table in tables]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if all(key in p for p in parts)}

    shared = [label for label in first.groups if all(label in table.groups for table in tables)]
    return ProfileTable.from_arrays(
        first.knob_space,
        [name for table in tables for name in table.sample_ids],
        np.concatenate([table.accuracy for table in tables]),
        np.concatenate([table.latency_ms for table in tables]),
        stages_ms=stacked("stages_ms"),
        tokens=stacked("tokens"),
        groups={label: [one for table in tables for one in table.groups[label]] for label in shared},
        split=[side for table in tables for side in table.split or ()],
        metadata={UNIT: first.unit} if first.unit in shared else {},
    )
