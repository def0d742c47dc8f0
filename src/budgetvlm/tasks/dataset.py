"""A data set of images, questions and reference answers behind the `Task` protocol, read row by row.

Sample ids are ``<split>-<id>``: the data set's own id, or the number of the row where it has none. Image ids are the
data set's own, or a hash of the image's bytes (of its file). A row without a question, an answer or a readable image
is a sample whose image cannot be loaded: its user decides whether to skip it or to stop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from budgetvlm.errors import ConfigError, DataError, InputError
from budgetvlm.tasks.choices import letters
from budgetvlm.tasks.cider import Cider
from budgetvlm.tasks.layouts import LETTER, REQUIRED, SHORT, DatasetLayout
from budgetvlm.tasks.metrics import METRICS, Metric
from budgetvlm.tasks.sources import Row, Source, TextSource
from budgetvlm.tasks.task import Sample
from budgetvlm.tasks.values import as_label, as_list, as_texts, first_value, image_file, joined_id, right_letter

_ASKED = ("question", "answers", "kind")  # roles of each entry where a row is a list of questions
_OTHER_IMAGE = re.compile(r"<image (?!1>)\d+>")


@dataclass(frozen=True)
class _Split:
    """A split opened: its rows, the columns that each role takes, how many samples each row makes ``[rows]``."""

    source: Source
    columns: dict[str, tuple[str, ...]]
    counts: np.ndarray

    @property
    def text_columns(self) -> list[str]:
        """What is read of each row: all but the image, unless that is only a file's name."""
        roles = [role for role in self.columns if role != "image" or isinstance(self.source, TextSource)]
        return list(dict.fromkeys(name for role in roles for name in self.columns[role]))


class DataSetTask:
    """A data set with its metric.

    Args:
        name: of the data set.
        layout: how its columns are called, how it is asked and scored.
        open_split: opens the rows of one of our splits.
        splits: ours that there are.
        columns: role -> names, in place of the layout's.
        prompt: in place of the layout's.

    Raises:
        ConfigError: an unknown metric, or a prompt without the question.
    """

    def __init__(
        self,
        name: str,
        layout: DatasetLayout,
        open_split: Callable[[str], Source],
        splits: Sequence[str],
        *,
        columns: Mapping[str, str] | None = None,
        prompt: str | None = None,
    ) -> None:
        if layout.metric not in (*METRICS, "cider"):
            raise ConfigError(f"metric={layout.metric!r} is unknown; choose from {', '.join((*METRICS, 'cider'))}")
        if prompt is not None and "{question}" not in prompt and "{question}" in layout.prompt:
            raise ConfigError(f"prompt={prompt!r} has no {{question}}; say where the question goes")
        self.name = name
        self.max_new_tokens = layout.max_new_tokens
        self.splits = tuple(splits)
        self._layout, self._open_split, self._prompt = layout, open_split, prompt
        self._given = dict(columns or {})
        self._wanted = {**layout.columns, **self._given}
        self._opened: dict[str, _Split] = {}
        self._metrics: dict[str, Metric] = {}

    def num_samples(self, split: str) -> int:
        return int(self._open(split).counts.sum())

    def samples(self, split: str, num_samples: int | None = None, seed: int = 0) -> Iterator[Sample]:
        """Stream a split in its order, or a part drawn with ``seed``; fewer are always among more."""
        opened = self._open(split)
        total = self.num_samples(split)
        if num_samples is not None and not 1 <= num_samples <= total:
            raise ConfigError(f"{num_samples} samples asked of {self.name}/{split}, which has {total}")
        chosen = None
        if num_samples is not None and num_samples < total:
            order = np.random.default_rng([seed, *split.encode()]).permutation(total)
            chosen = np.sort(order[:num_samples])
        yield from self._stream(opened, split, chosen)

    def score(self, prediction: str, sample: Sample) -> float:
        """Return the data set's metric, 0 to 1."""
        split = sample.sample_id.partition("-")[0]
        return self._metric(split)(prediction, sample.answers, sample.options)

    def _open(self, split: str) -> _Split:
        if split not in self.splits:
            raise ConfigError(
                f"{self.name} has no split {split!r} with answers; it has {', '.join(self.splits) or 'none'}. Give "
                "--split one of these; where there is only one, prepare draws the others from it, by image."
            )
        if split not in self._opened:
            source = self._open_split(split)
            columns = self._find_columns(source)
            counts = self._count(source, columns)
            if not counts.sum():
                raise DataError(f"{source.name} holds no samples of {self.name}/{split} that can be asked")
            self._opened[split] = _Split(source, columns, counts)
        return self._opened[split]

    def _find_columns(self, source: Source) -> dict[str, tuple[str, ...]]:
        """Find the columns of each role. Raises DataError for one that is missing."""
        nested = _ASKED if "list" in self._wanted else ()
        found: dict[str, tuple[str, ...]] = {}
        missing = []
        for role, names in self._wanted.items():
            if role in nested:
                continue
            fitting = _fitting(names, source.columns)
            if fitting:
                found[role] = fitting
            elif role in (*self._required, "list") or role in self._given:
                missing.append(f"{role} ({names.replace('|', ' or ')})")
        if missing:
            raise DataError(
                f"{source.name}: no column for {', '.join(missing)}. It has {', '.join(source.columns) or 'none'}. Say "
                f"which is which with --columns, for example {missing[0].split()[0]}={_first(source.columns)}."
            )
        return found

    @property
    def _required(self) -> tuple[str, ...]:
        """The roles that have to be there; one prompt for all samples needs no question."""
        asks = "{question}" in (self._prompt or self._layout.prompt)
        return tuple(role for role in REQUIRED if asks or role != "question")

    def _count(self, source: Source, columns: Mapping[str, tuple[str, ...]]) -> np.ndarray:
        """Count the samples of each row: one, unless it is a list of questions, or mentions more images."""
        if "list" in columns:
            name = columns["list"][0]
            counts: list[int] = []
            for _, row in source.rows([name]):
                entries = row[name] or ()
                if entries and not any(counts):
                    self._check_nested(source, name, entries[0])
                counts.append(len(entries))
            return np.array(counts, dtype=np.int64)
        if self._layout.one_image:
            names = [columns[role][0] for role in ("question", "options") if role in columns]
            texts = (" ".join(str(row[name]) for name in names) for _, row in source.rows(names))
            return np.array([not _OTHER_IMAGE.search(text) for text in texts], dtype=np.int64)
        return np.ones(len(source), dtype=np.int64)

    def _stream(self, opened: _Split, split: str, chosen: np.ndarray | None) -> Iterator[Sample]:
        """Yield the samples with the ``chosen`` numbers (sorted), or all."""
        starts = np.concatenate([[0], np.cumsum(opened.counts)])
        numbers = np.arange(starts[-1]) if chosen is None else chosen
        rows = np.searchsorted(starts, numbers, side="right") - 1
        wanted = np.unique(rows)
        columns = opened.text_columns
        if "image_id" not in opened.columns:
            columns = list(dict.fromkeys([*columns, *opened.columns["image"]]))
        for row, values in opened.source.rows(columns, wanted):
            image_id = self._image_id(opened, row, values)
            low, high = np.searchsorted(rows, [row, row + 1])
            for entry in (numbers[low:high] - starts[row]).tolist():
                yield self._sample(opened, split, row, values, entry, image_id)

    def _sample(self, opened: _Split, split: str, row: int, values: Row, entry: int, image_id: str) -> Sample:
        columns = opened.columns
        name = joined_id(values, columns.get("sample_id")) or str(row)
        if "list" in columns:
            name, fields = f"{name}-{entry}", self._nested(values[columns["list"][0]][entry])
        else:
            fields = {role: first_value(values, columns.get(role)) for role in _ASKED}
        options = as_texts(first_value(values, columns.get("options")))
        question = str(fields["question"] or "").strip()
        answers = self._answers(fields["answers"], options)
        context = str(first_value(values, columns.get("context")) or "").strip()
        kind = as_label(fields["kind"])
        sample_id = f"{split}-{name}"
        eager = values.get(columns["image"][0]) if isinstance(opened.source, TextSource) else None
        problem = "" if question or "question" not in self._required else "it has no question"
        problem = problem or ("" if answers else "it has no answer")
        return Sample(
            sample_id=sample_id,
            image_id=image_id,
            question=self._ask(question, options, context),
            answers=answers,
            load_image=lambda: _load_image(opened, row, eager, f"sample {sample_id} of {self.name}", problem),
            groups={"kind": self._layout.kinds.get(kind, kind)} if kind else {},
            options=options,
        )

    def _nested(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {role: first_value(fields, _fitting(self._wanted.get(role, ""), fields)) for role in _ASKED}

    def _check_nested(self, source: Source, name: str, fields: Mapping[str, Any]) -> None:
        found = self._nested(fields)
        missing = [role for role in ("question", "answers") if found[role] is None]
        if missing:
            raise DataError(
                f"{source.name}: the entries of {name} have {', '.join(fields)}, none for {', '.join(missing)}. Say "
                f"which is which with --columns, for example {missing[0]}={_first(list(fields))}."
            )

    def _answers(self, value: Any, options: Sequence[str]) -> tuple[str, ...]:
        if not options or self._layout.metric != "multiple_choice":
            return as_texts(value)
        found = (right_letter(answer, options, self._layout.index_answers) for answer in as_list(value))
        return tuple(letter for letter in found if letter)

    def _ask(self, question: str, options: Sequence[str], context: str) -> str:
        template = self._prompt or self._layout.prompt
        if self._prompt is None and self._layout.metric == "multiple_choice":
            template = LETTER if options else SHORT
        listed = "\n".join(f"{name}. {text}" for name, text in zip(letters(len(options)), options, strict=True))
        if context:
            question = f"{context}\n{question}"
        return template.replace("{options}", listed).replace("{question}", question)

    def _image_id(self, opened: _Split, row: int, values: Row) -> str:
        own = joined_id(values, opened.columns.get("image_id"))
        if own:
            return self._layout.image_name(own) if self._layout.image_name else f"{self.name}-{own}"
        column = opened.columns["image"][0]
        image = values[column] if column in values else opened.source.value(row, column)
        data, path = image_file(image)
        if data is None and path is not None:
            with suppress(OSError):  # loading the image will tell
                data = ((opened.source.folder(row) or Path()) / path).read_bytes()
        return f"{self.name}-{path or row}" if data is None else f"sha256-{hashlib.sha256(data).hexdigest()[:24]}"

    def _metric(self, split: str) -> Metric:
        if self._layout.metric != "cider":
            return METRICS[self._layout.metric]
        if split not in self._metrics:
            self._metrics[split] = Cider(self._references(self._open(split)))
        return self._metrics[split]

    def _references(self, opened: _Split) -> Iterator[tuple[str, ...]]:
        names = opened.columns.get("list") or opened.columns["answers"]
        for _, row in opened.source.rows(names):
            value = first_value(row, names)
            entries = [self._nested(one)["answers"] for one in value or ()] if "list" in opened.columns else [value]
            yield from map(as_texts, entries)


def _load_image(opened: _Split, row: int, eager: Any, name: str, problem: str) -> Image.Image:
    """Load and decode the image. Raises InputError for whatever is wrong with the sample."""
    from budgetvlm._io import open_image

    if problem:
        raise InputError(f"{name} cannot be used: {problem}")
    try:
        value = eager if eager is not None else opened.source.value(row, opened.columns["image"][0])
        if isinstance(value, Image.Image):
            return open_image(value)
        data, path = image_file(value)
        if data is None and path is None:
            raise InputError("it has no image")
        return open_image(data if data is not None else (opened.source.folder(row) or Path()) / str(path))
    except (InputError, DataError) as error:
        raise InputError(f"{name} cannot be used: {error}") from None


def _fitting(names: str, columns: Collection[str]) -> tuple[str, ...] | None:
    """Return the first of "a|b+c" whose columns are all there; None: none is."""
    options = (tuple(option.split("+")) for option in names.split("|"))
    return next((option for option in options if set(option) <= set(columns)), None)


def _first(columns: Sequence[str]) -> str:
    return columns[0] if columns else "NAME"
