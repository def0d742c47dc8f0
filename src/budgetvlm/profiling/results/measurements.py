"""What one result file says of one sample, checked field by field. Field names are those of the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Self

from budgetvlm.errors import DataError

TOKEN_KINDS = ("vision", "language", "output")
TOKEN_COUNTS = tuple(f"num_{kind}_tokens" for kind in TOKEN_KINDS)
STAGE_FIELDS = {
    "preprocess": "T_preprocess_ms",
    "vision": "T_vision_ms",
    "prefill": "T_prefill_ms",
    "decode": "T_decode_ms",
}
TIMES = ("T_total_ms", *STAGE_FIELDS.values())
# how fields that are texts are read, whatever another tool wrote
_TEXTS: dict[str, Callable[[Any], Any]] = {
    "sample_id": str,
    "pred": str,
    "machine": str,
    "answers": lambda given: tuple(map(str, given if isinstance(given, list | tuple) else [given])),
    "groups": lambda given: {str(name): str(label) for name, label in given.items()},
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One sample of a result file; what is None by default may be missing. Raises DataError, naming all problems."""

    sample_id: str

    def __post_init__(self) -> None:
        optional = {column.name for column in fields(self) if column.default is None}
        values = {name: getattr(self, name) for name in self.__match_args__}
        problems = [_problem(name, v) for name, v in values.items() if not (v is None and name in optional)]
        if any(problems):
            raise DataError(f"sample {self.sample_id}: " + "; ".join(filter(None, problems)))

    def to_dict(self) -> dict[str, Any]:
        """Return it as the file holds it; what is not known is left out."""
        values = {name: getattr(self, name) for name in self.__match_args__}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        """Check and take one sample; unknown fields are ignored. Raises DataError: a field is missing or cannot be."""
        if not isinstance(raw, Mapping):
            raise DataError(f"a sample has to be an object with named fields, not {raw!r}")
        sample_id = raw.get("sample_id")
        if isinstance(sample_id, bool) or not isinstance(sample_id, str | int) or sample_id == "":
            raise DataError(f"field sample_id is {sample_id!r}; it has to be a text or a whole number")
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        missing = [name for name in needed if raw.get(name) is None]
        if missing:
            raise DataError(f"sample {sample_id}: missing field {', '.join(missing)}")
        if not isinstance(raw.get("groups", {}), Mapping):
            raise DataError(f"sample {sample_id}: groups is {raw['groups']!r}; it has to be an object of labels")
        known = {name: raw[name] for name in cls.__match_args__ if name in raw}
        return cls(**{name: _TEXTS[name](value) if name in _TEXTS else value for name, value in known.items()})


@dataclass(frozen=True, slots=True)
class AccuracyRecord(Measurement):
    """One sample of an exp5 file.

    Attributes:
        sample_id: the task's id of the sample.
        score: the task's metric, 0 to 1.
        pred: the model's answer.
        answers: the reference answers; empty where the file has none.
        num_vision_tokens, num_language_tokens, num_output_tokens: counts; None in files of tools without them.
        groups: visible labels, for example {"image_id": "7", "kind": "read", "split": "train"}.
    """

    score: float
    pred: str
    answers: tuple[str, ...] = ()
    num_vision_tokens: int | None = None
    num_language_tokens: int | None = None
    num_output_tokens: int | None = None
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LatencyRecord(Measurement):
    """One sample of an exp6 file; times in ms at batch 1, the median over the repeats.

    Attributes:
        sample_id: the task's id of the sample.
        T_total_ms: end to end, above 0.
        T_prefill_ms, T_decode_ms: stages, 0 or more.
        num_vision_tokens, num_language_tokens, num_output_tokens: counts.
        accuracy: the task's metric on the answer that was timed, 0 to 1.
        T_preprocess_ms, T_vision_ms: stages, 0 or more; None in files of tools that do not separate them.
        runs: all repeats, as records; this one is the median of them. None in files of other tools.
        machine: name of the machine that was timed, where a sweep used several.
    """

    T_total_ms: float
    T_prefill_ms: float
    T_decode_ms: float
    num_vision_tokens: int
    num_language_tokens: int
    num_output_tokens: int
    accuracy: float
    T_preprocess_ms: float | None = None
    T_vision_ms: float | None = None
    runs: list[dict[str, Any]] | None = None
    machine: str | None = None


def _problem(name: str, value: Any) -> str | None:
    """Say why a field cannot have a value; None where it can, and for fields that are no numbers."""
    if name in TOKEN_COUNTS:
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return None if whole else f"{name} is {value!r}; it has to be a whole number, 0 or more"
    if name not in (*TIMES, "score", "accuracy"):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return f"{name} is {value!r}, which is no finite number"
    if name == "T_total_ms":
        return None if value > 0 else f"{name} is {value!r}; it has to be above 0"
    if name in TIMES:
        return None if value >= 0 else f"{name} is {value!r}; it has to be 0 or more"
    return None if 0 <= value <= 1 else f"{name} is {value!r}; it has to be between 0 and 1"
