"""Knobs, knob spaces and settings: the one place where knob values exist.

Shapes: K settings, N knobs. Settings are numbered in row-major order: the last knob varies fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from budgetvlm.errors import KnobSpaceError

Value = int | float
MODEL = "model"  # which of several models answers: a number for each, say its billions of parameters
KNOBS = ("max_crops", "top_k", "num_active_blocks")  # of the models that the project runs; a space may have others


@dataclass(frozen=True)
class Setting(Mapping[str, Value]):
    """One value for each knob, in the order of the knob space. Hashable; ``setting["top_k"]`` reads a value."""

    items_: tuple[tuple[str, Value], ...]

    def __getitem__(self, name: str) -> Value:
        for key, value in self.items_:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.items_)


@dataclass(frozen=True, init=False)
class KnobSpace:
    """The ordered knobs of one model, each with its allowed values, from cheapest to most expensive.

    Args:
        knobs: knob name -> allowed values, strictly increasing positive numbers.

    Raises:
        KnobSpaceError: no knob, an empty list, values that are not positive, increasing numbers.
    """

    knobs: tuple[tuple[str, tuple[Value, ...]], ...]

    def __init__(self, knobs: Mapping[str, Sequence[Value]]):
        problems = list(_problems(knobs))
        if problems:
            raise KnobSpaceError("not a knob space: " + "; ".join(problems))
        object.__setattr__(self, "knobs", tuple((name, tuple(values)) for name, values in knobs.items()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.knobs)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each knob, ``[N]``."""
        return tuple(len(values) for _, values in self.knobs)

    @property
    def num_settings(self) -> int:
        """K, the number of settings."""
        return math.prod(self.sizes)

    def __len__(self) -> int:
        return self.num_settings

    def values(self, name: str) -> tuple[Value, ...]:
        """Return the allowed values of one knob."""
        for knob, values in self.knobs:
            if knob == name:
                return values
        raise KnobSpaceError(f"no knob {name!r} in this space; its knobs are {', '.join(self.names)}")

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """All K settings in order."""
        product = itertools.product(*(values for _, values in self.knobs))
        return tuple(Setting(tuple(zip(self.names, values, strict=True))) for values in product)

    @cached_property
    def _numbers(self) -> dict[Setting, int]:
        """The number of each of ``settings``."""
        return {setting: number for number, setting in enumerate(self.settings)}

    @cached_property
    def value_indices(self) -> np.ndarray:
        """Index of each setting's value within its knob, int64 ``[K, N]``."""
        return np.array(list(itertools.product(*(range(n) for n in self.sizes))), dtype=np.int64)

    @cached_property
    def value_matrix(self) -> np.ndarray:
        """Knob values of each setting, float64 ``[K, N]``."""
        return np.array([[float(v) for v in s.values()] for s in self.settings])

    @cached_property
    def complexity(self) -> np.ndarray:
        """Mean over the knobs of value / largest value, float64 ``[K]`` in (0, 1]."""
        return (self.value_matrix / self.value_matrix.max(axis=0)).mean(axis=1)

    @property
    def full(self) -> Setting:
        """Every knob at its largest value."""
        return self.settings[-1]

    @property
    def cheapest(self) -> Setting:
        """Every knob at its smallest value."""
        return self.settings[0]

    def setting(self, **values: Value) -> Setting:
        """Return the setting with these values, one for each knob.

        Raises:
            KnobSpaceError: a knob is missing or unknown, or a value is outside the space.
        """
        return self.settings[self.index(values)]

    def completed(self, values: Mapping[str, Any]) -> Setting:
        """Return the setting with these values, and the largest one of each other knob. Raises KnobSpaceError."""
        return self.settings[self.index({**self.full, **values})]

    def index(self, setting: Mapping[str, Any]) -> int:
        """Return the number of a setting, 0 to K - 1.

        Raises:
            KnobSpaceError: a knob is missing or unknown, or a value is outside the space; never a nearest match.
        """
        known = self._numbers.get(setting) if isinstance(setting, Setting) else None
        if known is not None:
            return known
        if set(setting) != set(self.names):
            given = ", ".join(map(str, setting)) or "none"
            raise KnobSpaceError(f"a setting needs exactly the knobs {', '.join(self.names)}; given: {given}")
        number = 0
        for name, values in self.knobs:
            if setting[name] not in values or isinstance(setting[name], bool):  # True equals 1, and is no value
                raise KnobSpaceError(
                    f"{name}={setting[name]!r} is outside the knob space; allowed: {', '.join(map(str, values))}"
                )
            number = number * len(values) + values.index(setting[name])
        return number

    def require_equal(self, other: KnobSpace, what: str) -> None:
        """Raise `KnobSpaceError` unless ``other`` (named ``what``) is this very space."""
        if self != other:
            raise KnobSpaceError(f"{what} has another knob space: {other} instead of {self}")

    def require_contains(self, other: KnobSpace, what: str) -> None:
        """Raise `KnobSpaceError` unless every setting of a controller's space is one of this space of ``what``."""
        if self.names != other.names or any(set(other.values(n)) - set(self.values(n)) for n in self.names):
            raise KnobSpaceError(
                f"the controller chooses among {other}, but {what} has {self}. Use the controller that was trained on "
                "this model's profiles, or train one."
            )

    def to_dict(self) -> dict[str, list[Value]]:
        """Return knob name -> values; `KnobSpace` takes it back."""
        return {name: list(values) for name, values in self.knobs}

    def __str__(self) -> str:
        return "; ".join(f"{name} in {list(values)}" for name, values in self.knobs)


def _problems(knobs: Mapping[str, Sequence[Value]]) -> Iterator[str]:
    if not knobs:
        yield "it has no knobs"
    for name, values in knobs.items():
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf]
        if not values:
            yield f"{name} has no values"
        elif len(numbers) != len(values):
            yield f"{name} has values that are not positive numbers: {list(values)}"
        elif any(b <= a for a, b in itertools.pairwise(numbers)):
            yield f"{name} is not strictly increasing: {list(values)}"
