"""What one result file says of one sample, checked field by field. Field names are those of the files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from budgetvlm.errors import DataError

TOKEN_KINDS = ("vision", "language", "output")
TOKEN_COUNTS = tuple(f"num_{kind}_tokens" for kind in TOKEN_KINDS)
STAGE_FIELDS = {
    "preprocess": "T_preprocess_ms",
    "vision": "T_vision_ms",
    "prefill": "T_prefill_ms",
    "decode": "T_decode_ms",
}


@dataclass(frozen=True, slots=True)
class AccuracyRecord:
    """One sample of an exp5 file.

    Attributes:
        sample_id: the task's id of the sample.
        score: the task's metric, 0 to 1.
        pred: the model's answer.
        answers: the reference answers; empty where the file has none.
        num_vision_tokens, num_language_tokens, num_output_tokens: counts; None in files of tools without them.
        groups: visible labels, for example {"image_id": "7", "kind": "read", "split": "train"}.

    Raises:
        DataError: a value that cannot be.
    """

    sample_id: str
    score: float
    pred: str
    answers: tuple[str, ...] = ()
    num_vision_tokens: int | None = None
    num_language_tokens: int | None = None
    num_output_tokens: int | None = None
    groups: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [*_number("score", self.score, high=1.0), *_counts(self, optional=True)]
        _complain(self.sample_id, problems)

    def to_dict(self) -> dict[str, Any]:
        """Return it as the file holds it; counts that are None are left out."""
        document = {"sample_id": self.sample_id, "score": self.score, "pred": self.pred, "answers": list(self.answers)}
        return document | _given(self, TOKEN_COUNTS) | ({"groups": self.groups} if self.groups else {})

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> AccuracyRecord:
        """Check and take one entry of ``all_samples``; unknown fields are ignored.

        Raises:
            DataError: a missing field, or a value that cannot be.
        """
        sample_id = _sample_id(raw)
        _require(sample_id, raw, ("score", "pred"))
        answers = raw.get("answers", ())
        groups = raw.get("groups", {})
        if not isinstance(groups, Mapping):
            raise DataError(f"sample {sample_id}: groups is {groups!r}; it has to be an object of labels")
        return cls(
            sample_id=sample_id,
            score=raw["score"],
            pred=str(raw["pred"]),
            answers=tuple(map(str, answers)) if isinstance(answers, list | tuple) else (str(answers),),
            groups={str(name): str(label) for name, label in groups.items()},
            **{name: raw[name] for name in TOKEN_COUNTS if name in raw},
        )


@dataclass(frozen=True, slots=True)
class LatencyRecord:
    """One sample of an exp6 file; times in ms at batch 1, the median over the repeats.

    Attributes:
        sample_id: the task's id of the sample.
        T_total_ms: end to end, above 0.
        T_prefill_ms, T_decode_ms: stages, 0 or more.
        num_vision_tokens, num_language_tokens, num_output_tokens: counts.
        accuracy: the task's metric on the answer that was timed, 0 to 1.
        T_preprocess_ms, T_vision_ms: stages, 0 or more; None in files of tools that do not separate them.

    Raises:
        DataError: a value that cannot be.
    """

    sample_id: str
    T_total_ms: float
    T_prefill_ms: float
    T_decode_ms: float
    num_vision_tokens: int
    num_language_tokens: int
    num_output_tokens: int
    accuracy: float
    T_preprocess_ms: float | None = None
    T_vision_ms: float | None = None

    def __post_init__(self) -> None:
        problems = [*_number("T_total_ms", self.T_total_ms, above=True)]
        for name in STAGE_FIELDS.values():
            problems += _number(name, getattr(self, name), optional=name in ("T_preprocess_ms", "T_vision_ms"))
        problems += [*_counts(self), *_number("accuracy", self.accuracy, high=1.0)]
        _complain(self.sample_id, problems)

    def to_dict(self) -> dict[str, Any]:
        """Return it as the file holds it; stages that are None are left out."""
        return _given(self, tuple(column.name for column in fields(self)))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LatencyRecord:
        """Check and take one entry of ``per_sample_latencies``; unknown fields are ignored.

        Raises:
            DataError: a missing field, or a value that cannot be.
        """
        sample_id = _sample_id(raw)
        _require(sample_id, raw, ("T_total_ms", "T_prefill_ms", "T_decode_ms", *TOKEN_COUNTS, "accuracy"))
        taken = {column.name: raw[column.name] for column in fields(cls) if column.name in raw}
        return cls(**(taken | {"sample_id": sample_id}))


Record = AccuracyRecord | LatencyRecord


def _sample_id(raw: Mapping[str, Any]) -> str:
    if not isinstance(raw, Mapping):
        raise DataError(f"a sample has to be an object with named fields, not {raw!r}")
    name = raw.get("sample_id")
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"field sample_id is {name!r}; it has to be a text or a whole number")
    return str(name)


def _require(sample_id: str, raw: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if raw.get(name) is None]
    if missing:
        raise DataError(f"sample {sample_id}: missing field {', '.join(missing)}")


def _number(
    name: str, value: Any, *, high: float = math.inf, above: bool = False, optional: bool = False
) -> Iterator[str]:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        yield f"{name} is {value!r}, which is no finite number"
    elif value < 0 or value > high or (above and value == 0):
        allowed = "above 0" if above else f"between 0 and {high:g}" if high < math.inf else "0 or more"
        yield f"{name} is {value!r}; it has to be {allowed}"


def _counts(record: Any, optional: bool = False) -> Iterator[str]:
    for name in TOKEN_COUNTS:
        value = getattr(record, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (optional and value is None):
            yield f"{name} is {value!r}; it has to be a whole number, 0 or more"


def _complain(sample_id: str, problems: list[str]) -> None:
    if problems:
        raise DataError(f"sample {sample_id}: " + "; ".join(problems))


def _given(record: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names if getattr(record, name) is not None}
