"""What a controller was trained on: the model's weights and the samples, so that neither is mistaken for another."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from budgetvlm._io import read_json
from budgetvlm.errors import BudgetVLMWarning, CheckpointError, DataError
from budgetvlm.table import DATASET, ProfileTable, first_few

CONFIG = "config.json"  # of a saved controller; its origin is readable without its weights
FITTED = ("train", "validation")  # splits that a controller knows: it learns from one, and the other picks the best
KNOWN = ("model_path", "dataset_name", "task", "max_new_tokens", "split", "calibration_split")


@dataclass(frozen=True)
class TrainedOn:
    """The origin of a controller; empty where it is not known.

    Attributes:
        model: fingerprint of the weights.
        opened: how model and data set were opened, those of `KNOWN` that the table tells.
        samples: split -> digests of its samples and of their images (`digests_of`).
        terms: budgets and prices that it knows (`budgetvlm.controller.known_terms`).
    """

    model: str | None = None
    opened: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, frozenset[str]] = field(default_factory=dict)
    terms: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_table(cls, table: ProfileTable) -> TrainedOn:
        """Return the origin of what is trained on a table."""
        samples: dict[str, set[str]] = {}
        for side, *digests in zip(table.split or (), _digests(table), _ids(table), strict=False):  # or it has no splits
            samples.setdefault(side, set()).update(*digests)
        opened = opened_by(table.metadata)
        model = opened.pop("model_fingerprint", None)
        return cls(model, opened, {side: frozenset(known) for side, known in samples.items()})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> TrainedOn:
        """Return the origin of a `to_dict` document."""
        samples = {side: frozenset(digests) for side, digests in document.get("samples", {}).items()}
        return cls(document.get("model"), document.get("opened", {}), samples, document.get("terms", {}))

    @classmethod
    def read(cls, controller: Path) -> TrainedOn:
        """Return the origin of a saved controller (its directory or a file in it); an empty one of old files."""
        path = (controller if controller.is_dir() else controller.parent) / CONFIG
        document = read_json(path) if path.is_file() else {}
        return cls.from_dict(document.get("trained_on", {}) if isinstance(document, dict) else {})

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able document."""
        samples = {side: sorted(digests) for side, digests in self.samples.items()}
        return {"model": self.model, "opened": dict(self.opened), "samples": samples, "terms": dict(self.terms)}

    def seen(self, sides: Collection[str] = FITTED) -> frozenset[str]:
        """Return the digests of some splits."""
        return frozenset().union(*(self.samples.get(side, frozenset()) for side in sides))

    def with_splits(self, table: ProfileTable, who: str) -> ProfileTable:
        """Return a table with the splits that training used, where it stores none; new samples are test samples.

        A sample of which more or something else was measured since is told by its id, beside others that are known.

        ``who``: names the controller in the message. Raises DataError: none of its samples is known.
        """
        if table.split is not None:
            return table
        side_of = {digest: side for side, known in self.samples.items() for digest in known}
        found, by_id = (
            [next((side_of[one] for one in digests if one in side_of), None) for digests in kind]
            for kind in (_digests(table), _ids(table))
        )
        if not any(found):
            raise DataError(
                f"the table stores no splits, and {who} was trained on none of its samples (or does not say on which), "
                "so nothing tells which are held out. Give the table that it was trained on, or one with splits."
            )
        sides = [*zip(table.units, by_id, strict=True), *zip(table.units, found, strict=True)]
        by_unit = {unit: side for unit, side in sides if side}
        return replace(table, split=tuple(by_unit.get(unit, "test") for unit in table.units))

    def require_unseen(self, table: ProfileTable, split: str, who: str) -> None:
        """Refuse to measure a controller on samples that it was trained on.

        ``split``: the table's split that is measured on. Validation samples only pick the best epoch, so they may be
        reported as what they are, but not as a test. ``who``: names the controller in the message. Raises DataError: a
        sample, or another question about its image, was used.
        """
        known = self.seen(FITTED if split == "test" else ("train",))
        rows = [row for row, side in enumerate(table.split or ()) if side == split]
        digests = _digests(table)
        seen = [table.sample_ids[row] for row in rows if digests[row] & known]
        if seen:
            raise DataError(
                f"{len(seen)} of the {len(rows)} {split} samples, or their images, were used to train {who}: "
                f"{first_few(seen)}. What it does there says nothing about new inputs. Give the data that it was "
                "trained on, whose splits are kept apart, or train on this data."
            )

    def require_model(self, fingerprint: str, model_path: str, guard: Mapping[str, Any]) -> None:
        """Check that a controller and its guard were made for a model's weights; warn where the controller is silent.

        ``fingerprint``: of the model that was opened at ``model_path``. ``guard``: the guard's origin, with its
        "model". Raises CheckpointError: either was made for other weights.
        """
        wrong = {"controller": self.model, "guard": guard.get("model")}
        wrong = {who: made_for for who, made_for in wrong.items() if made_for not in (None, fingerprint)}
        if wrong:
            made_for = " and ".join(f"the {who} was made for other weights ({wrong[who]}" for who in wrong)
            of = f", of {self.opened['model_path']}" if "controller" in wrong and "model_path" in self.opened else ""
            raise CheckpointError(
                f"{made_for}{of}) than those of model_path={model_path} ({fingerprint}), so its choices and bounds "
                "would be wrong without a sign of it. Give the model that it was made for, or train and calibrate on "
                "this one's profiles; to use it all the same, say so: --allow_other_model (allow_other_model=True)."
            )
        if self.model is None:
            warnings.warn(
                "this controller does not say which weights it was trained for, so nobody checks that they are those "
                f"of model_path={model_path}; train again to have it noted",
                BudgetVLMWarning,
                stacklevel=3,
            )


def opened_by(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table's metadata tells about model and data set: those of `KNOWN`, and the fingerprint."""
    config = metadata.get("exp5_config")
    told = {**(config if isinstance(config, Mapping) else {}), **metadata}
    return {name: told[name] for name in (*KNOWN, "model_fingerprint") if told.get(name) is not None}


def digests_of(dataset_name: str, sample_id: str, image_id: str | None, label: str | None = None) -> frozenset[str]:
    """Return short digests of a sample and of its image, by which both are known again in another table.

    Args:
        label: the sample's own data set, where several make one task and its id begins with that name.
    """
    own = label if label is not None and sample_id.startswith(f"{label}/") else None
    names = ["sample " + (sample_id if own else f"{dataset_name}/{sample_id}")]
    names += [] if image_id is None else [f"image {own or dataset_name}/{image_id}"]
    return frozenset(map(_digest, names))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _ids(table: ProfileTable) -> list[list[str]]:
    """Digests of the bare ids, ``[S]``; none where the data set's name tells samples from those of others."""
    return [[] if "dataset_name" in table.metadata else [_digest(f"id {name}")] for name in _own_ids(table)]


def _own_ids(table: ProfileTable) -> list[str]:
    """The samples' ids in the tables of their own data sets, ``[S]``."""
    labels = table.groups.get(DATASET, ("",) * table.num_samples)
    return [name.removeprefix(f"{label}/") for name, label in zip(table.sample_ids, labels, strict=True)]


def _digests(table: ProfileTable) -> list[frozenset[str]]:
    """Of each sample, ``[S]``. Without a data set's name equal ids may be of others, so the measurements count too."""
    name = table.metadata.get("dataset_name")
    if name is None:
        rows = zip(_own_ids(table), table.accuracy, table.latency_ms, strict=True)
        return [digests_of(hashlib.sha256(a.tobytes() + ms.tobytes()).hexdigest(), i, None) for i, a, ms in rows]
    unknown = (None,) * table.num_samples
    columns = (table.groups.get(label, unknown) for label in ("image_id", DATASET))
    return [digests_of(str(name), *row) for row in zip(table.sample_ids, *columns, strict=True)]
