"""Served requests as arrays: what each decision saw, with which probability it chose, and the score of what it chose.

Shapes: N requests, K settings, Di and Dl features of image and question.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError, DataError
from budgetvlm.features import Features
from budgetvlm.feedback.off_policy import ScoredLog
from budgetvlm.feedback.request_store import APPLICATION, SCHEMA
from budgetvlm.knobs import KnobSpace

Source = Literal["feedback", "shadow"]
MOST_READ = 20_000  # of the newest requests
_SELECT = (
    "SELECT r.id, c.digest, r.at_s, r.image, r.language, r.seen_ms, r.price, r.allowed, "
    "COALESCE(s.setting, r.chosen), r.probabilities, s.score FROM requests AS r "
    "JOIN controllers AS c ON r.controller = c.number LEFT JOIN scores AS s ON s.id = r.id AND s.source = ? "
    "WHERE c.knobs = ? ORDER BY r.number DESC LIMIT ?"
)


@dataclass(frozen=True, eq=False)
class ServedLog:
    """N requests in the order in which they were kept.

    Attributes:
        ids, controllers: of the request, and the digest of the controller that decided, ``[N]`` strings.
        at_s: when each was kept, seconds since 1970, ``[N]``.
        image, language: float32 ``[N, Di]`` and ``[N, Dl]``.
        seen_ms, price: as the controller was told, ``[N]``.
        allowed: settings that the budget allowed, bool ``[N, K]``.
        chosen: the setting that was scored, int64 ``[N]``: by feedback the one chosen, by shadow answers the one drawn.
        probabilities: with which each setting would have been, ``[N, K]``.
        scores: 0..1, NaN where none is known, ``[N]``.
    """

    ids: np.ndarray
    controllers: np.ndarray
    at_s: np.ndarray
    image: np.ndarray
    language: np.ndarray
    seen_ms: np.ndarray
    price: np.ndarray
    allowed: np.ndarray
    chosen: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray

    @classmethod
    def read(
        cls, file: Path, controller: GRPOController, source: Source = "feedback",
        say: Callable[[str], None] = lambda text: None,
    ) -> ServedLog:  # fmt: skip
        """Read the newest requests of a store that were decided by a controller's knobs, whichever controller it was.

        A request of which nothing was allowed is left out: nothing was chosen. So is one whose features are not finite,
        which would spoil what is learnt of all others.

        Args:
            source: "shadow" takes the scores of settings that were drawn evenly from the allowed ones, which say how
                far they agree with the full setting.
            say: told how many are left out.

        Raises:
            ConfigError: no store, or none of this version. DataError: no request of these knobs, or other features.
        """
        if source not in get_args(Source):
            raise ConfigError(f"source={source!r} is unknown; choose from {', '.join(get_args(Source))}")
        space = controller.knob_space
        rows = _rows(Path(file), space, "drawn" if source == "shadow" else source)
        log = _of_rows(rows, space, _widths(controller), Path(file))
        log = log.rows(_usable(log, say))
        if source == "shadow":
            even = log.allowed / log.allowed.sum(axis=1, keepdims=True)
            log = replace(log, probabilities=even)
        return log

    @classmethod
    def unserved(cls, features: Features, controller: GRPOController) -> ServedLog:
        """Samples as if they had been asked for without a budget: nothing was chosen or scored."""
        count, settings = features.num_samples, controller.num_settings
        ones = np.ones(count)
        return cls(
            np.array(features.sample_ids), np.full(count, ""), 0 * ones, features.image, features.language,
            np.inf * ones, float(controller.default_price) * ones, np.ones((count, settings), dtype=bool),
            np.zeros(count, dtype=np.int64), np.zeros((count, settings)), np.nan * ones,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, which: np.ndarray) -> ServedLog:
        """Some of the requests, by a mask or by numbers, in the order given."""
        return ServedLog(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @property
    def is_scored(self) -> np.ndarray:
        """Which requests have a score, bool ``[N]``."""
        out: np.ndarray = ~np.isnan(self.scores)
        return out

    @property
    def scored(self) -> ServedLog:
        """The requests that have one."""
        return self.rows(self.is_scored)

    @property
    def as_scored_log(self) -> ScoredLog:
        """What the estimators of `budgetvlm.feedback.off_policy` read; all requests have to have a score."""
        return ScoredLog(self.scores, self.chosen, self.probabilities)

    @torch.no_grad()
    def values_by(self, controller: GRPOController) -> np.ndarray:
        """The accuracy that a controller expects of each setting, without the price, float64 ``[N, K]``."""
        arrays = (self.image, self.language, self.seen_ms, self.price)
        image, language, budget, price = (torch.from_numpy(array.astype(np.float32)) for array in arrays)
        logits = controller.eval().setting_logits(controller(image, language, budget, price))
        values: np.ndarray = ((logits - controller.price_term(price)) / controller.logit_scale).double().numpy()
        return values

    def choices_by(self, controller: GRPOController) -> np.ndarray:
        """What a controller chooses among the settings that were allowed, as probabilities 0 and 1, ``[N, K]``."""
        share = (controller.latency_ms / controller.latency_reference_ms).double().numpy()
        values = self.values_by(controller) - self.price[:, None] * share
        best = np.where(self.allowed, values, -np.inf).argmax(axis=1)
        return np.eye(self.allowed.shape[1])[best]


def _widths(controller: GRPOController) -> tuple[int, int]:
    return controller.image_input.in_dim, controller.lang_input.in_dim


def _rows(file: Path, space: KnobSpace, source: str) -> list[tuple[Any, ...]]:
    """Requests and their scores, the oldest first."""
    if file.is_dir():
        raise ConfigError(f"--requests {file} is a directory; give the file in it that --log_requests named")
    if not file.is_file():
        raise ConfigError(f"--requests {file} does not exist; `budgetvlm serve --log_requests {file}` makes it")
    knobs = json.dumps(space.to_dict())
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            known = tuple(
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if known != (APPLICATION, SCHEMA):
                raise ConfigError(f"--requests {file} is no store of requests that this version reads; give another")
            found = connection.execute(_SELECT, (source, knobs, MOST_READ)).fetchall()
            others = [text for (text,) in connection.execute("SELECT knobs FROM controllers") if text != knobs]
    except sqlite3.Error as error:
        raise ConfigError(f"--requests {file} cannot be read: {error}") from None
    if not found:
        why = f"its requests were decided by controllers of other knobs ({others[0]})" if others else "it is empty"
        raise DataError(f"{file} holds no request of this controller's knobs ({knobs}): {why}; give its own store")
    return found[::-1]


def _of_rows(rows: list[tuple[Any, ...]], space: KnobSpace, widths: tuple[int, int], file: Path) -> ServedLog:
    columns = list(zip(*rows, strict=True))
    image, language = ([np.frombuffer(blob, np.float16) for blob in column] for column in columns[3:5])
    lengths = 4 * len(space), -(-len(space) // 8)  # bytes of float32, and of bits
    damaged = sum((len(p), len(a)) != lengths for p, a in zip(columns[9], columns[7], strict=True))
    if damaged:
        raise DataError(f"{damaged} of {len(rows)} requests in {file} are damaged; give another store")
    wrong = sum((len(i), len(q)) != widths for i, q in zip(image, language, strict=True))
    if wrong:
        raise DataError(
            f"{wrong} of {len(rows)} requests in {file} have other features than the {widths[0]} of the image and "
            f"{widths[1]} of the question that this controller reads; give the store of its own model"
        )
    bits = np.stack([np.frombuffer(blob, np.uint8) for blob in columns[7]])
    return ServedLog(
        ids=np.array(columns[0]), controllers=np.array(columns[1]), at_s=np.array(columns[2], dtype=np.float64),
        image=np.stack(image).astype(np.float32), language=np.stack(language).astype(np.float32),
        seen_ms=np.array(columns[5], dtype=np.float64), price=np.array(columns[6], dtype=np.float64),
        allowed=np.unpackbits(bits, axis=1, count=len(space)).astype(bool),
        chosen=np.array(columns[8], dtype=np.int64),
        probabilities=np.stack([np.frombuffer(blob, np.float32) for blob in columns[9]]).astype(np.float64),
        scores=np.array([np.nan if score is None else score for score in columns[10]], dtype=np.float64),
    )  # fmt: skip


def _usable(log: ServedLog, say: Callable[[str], None]) -> np.ndarray:
    """Which requests can be learnt from, bool ``[N]``."""
    finite = np.isfinite(log.image).all(axis=1) & np.isfinite(log.language).all(axis=1)
    decided = log.allowed[np.arange(len(log)), log.chosen]
    for count, why in (
        (int((~decided).sum()), "no setting was sure to keep their budget, so nothing was chosen"),
        (int((decided & ~finite).sum()), "their features are no numbers"),
    ):
        if count:
            say(f"{count} of {len(log)} requests are left out: {why}")
    usable: np.ndarray = decided & finite
    return usable
