"""A data set of images, questions and reference answers behind the `Task` protocol, read row by row.

Sample ids are ``<split>-<id>``: the data set's own id, or the number of the row where it has none. Image ids are the
data set's own, or a hash of the image's bytes (of its file). A row without a question, an answer or a readable image
is a sample whose image cannot be loaded: its user decides whether to skip it or to stop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from budgetvlm._io import shortened
from budgetvlm.errors import ConfigError, DataError, InputError
from budgetvlm.tasks.choices import letters
from budgetvlm.tasks.cider import Cider
from budgetvlm.tasks.found_columns import Columns, find_columns, fitting, require_one_image
from budgetvlm.tasks.layouts import BY_OPTIONS, LAYOUTS, LETTER, REQUIRED, SHORT, DatasetLayout
from budgetvlm.tasks.metrics import METRICS, Metric
from budgetvlm.tasks.opened_split import OpenedSplit
from budgetvlm.tasks.sources import Row, Source, TextSource
from budgetvlm.tasks.task import Sample
from budgetvlm.tasks.values import (
    as_answers,
    as_label,
    as_options,
    as_questions,
    as_text,
    entries,
    is_index,
    joined_id,
    right_letter,
)

_ASKED = ("question", "answers", "kind")  # roles of each entry where a row is a list of questions
_OTHER_IMAGE = re.compile(r"<image (?!1>)\d+>")
OPTION_LETTERS = frozenset("ABCDEFGH")
_SURELY = 0.01  # chance below which numbers without a 0 are taken to count from 1


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
        if layout.metric not in (*METRICS, "cider", BY_OPTIONS):
            raise ConfigError(f"metric={layout.metric!r} is unknown; choose from {', '.join((*METRICS, 'cider'))}")
        if prompt is not None and "{question}" not in prompt and "{question}" in layout.prompt:
            raise ConfigError(f"prompt={prompt!r} has no {{question}}; say where the question goes")
        self.name = name
        self.max_new_tokens = layout.max_new_tokens
        self.splits = tuple(splits)
        self._layout, self._open_split, self._prompt = layout, open_split, prompt
        self._given = dict(columns or {})
        self._known = LAYOUTS.get(name) == layout and not columns  # as others have read it before
        self._wanted = {**layout.columns, **self._given}
        self._opened: dict[str, OpenedSplit] = {}
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
        return self._metric(split, sample.options)(prediction, sample.answers, sample.options)

    def _open(self, split: str) -> OpenedSplit:
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
            opened = OpenedSplit(source, columns, counts)
            if not self._known and "list" not in columns:
                self._check_answers(opened)
            self._opened[split] = opened
        return self._opened[split]

    def _find_columns(self, source: Source) -> Columns:
        """Find the columns of each role. Raises DataError for one that is missing."""
        nested = _ASKED if "list" in self._wanted else ()
        wanted = {role: names for role, names in self._wanted.items() if role not in nested}
        columns = find_columns(source.name, source.columns, wanted, self._given, (*self._required, "list"))
        if not self._known and "image" not in self._given:
            require_one_image(source.name, source.columns, columns)
        return columns

    def _check_answers(self, opened: OpenedSplit) -> None:
        """Read all answers of a split. Raises DataError for one that is not understood, and for numbers from 1 on."""
        columns = [name for role in ("answers", "options") for name in opened.columns.get(role, ())]
        counted_from_1, from_0, any_options = 1.0, False, False
        seen: set[str] = set()
        for row, values in opened.source.rows(columns):
            with _naming(opened.source, row):
                options, answers = self._read_answers(opened, values)
            any_options |= bool(options)
            if len(seen) <= len(OPTION_LETTERS):  # enough to tell that they are others
                seen.update(answers)
            given = values[opened.columns["answers"][0]]
            if options and self._metric_name(options) == "multiple_choice" and not isinstance(given, list | bool):
                number = as_text(given)
                counted_from_1 *= 1 - is_index(number) / len(options)
                from_0 |= number == "0" or (bool(number) and not is_index(number))
        if counted_from_1 < _SURELY and not from_0:
            raise DataError(
                f"{opened.source.name}: the answers are numbers, and none is 0: do they count from 1? The number of an "
                "option counts from 0 here. Write the answers as letters."
            )
        letters_alone = bool(seen) and seen <= OPTION_LETTERS and not any_options
        if letters_alone and self._layout.metric in ("multiple_choice", BY_OPTIONS):
            raise DataError(
                f"{opened.source.name}: the answers are letters of options, and there are none. Say where they are, as "
                "in --columns options=choices or options=A+B+C+D; for letters that are to be read in the image, give "
                "--metric exact_match."
            )

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
            for number, row in source.rows([name]):
                with _naming(source, number):
                    asked = as_questions(row[name])
                if asked and not any(counts):
                    self._check_nested(source, name, asked[0])
                counts.append(len(asked))
            return np.array(counts, dtype=np.int64)
        if self._layout.one_image:
            names = [columns[role][0] for role in ("question", "options") if role in columns]
            texts = (" ".join(str(row[name]) for name in names) for _, row in source.rows(names))
            return np.array([not _OTHER_IMAGE.search(text) for text in texts], dtype=np.int64)
        return np.ones(len(source), dtype=np.int64)

    def _stream(self, opened: OpenedSplit, split: str, chosen: np.ndarray | None) -> Iterator[Sample]:
        """Yield the samples with the ``chosen`` numbers (sorted), or all."""
        starts = np.concatenate([[0], np.cumsum(opened.counts)])
        numbers = np.arange(starts[-1]) if chosen is None else chosen
        rows = np.searchsorted(starts, numbers, side="right") - 1
        wanted = np.unique(rows)
        columns = opened.text_columns
        if "image_id" not in opened.columns or not self._known:
            columns = list(dict.fromkeys([*columns, *opened.columns["image"]]))
        for row, values in opened.source.rows(columns, wanted):
            ids = self._image_ids(opened, row, values)
            low, high = np.searchsorted(rows, [row, row + 1])
            for entry in (numbers[low:high] - starts[row]).tolist():
                with _naming(opened.source, row):
                    sample = self._sample(opened, split, row, values, entry, ids)
                yield sample

    def _sample(
        self, opened: OpenedSplit, split: str, row: int, values: Row, entry: int, ids: tuple[str, str]
    ) -> Sample:
        columns = opened.columns
        name = joined_id(values, columns.get("sample_id")) or (f"row{row}" if "sample_id" in columns else str(row))
        if "list" in columns:
            name, fields = f"{name}-{entry}", self._nested(as_questions(values[columns["list"][0]])[entry])
        else:
            fields = {role: values.get(columns[role][0]) for role in _ASKED if role in columns}
        where = f"sample {split}-{name} of {self.name}"
        options, answers = self._read_answers(opened, values, fields.get("answers"))
        context = as_text(values.get(columns["context"][0])) if "context" in columns else ""
        question, kind = _asked_text(fields.get("question")), as_label(fields.get("kind"))
        eager = values.get(columns["image"][0]) if isinstance(opened.source, TextSource) else None
        problem = self._problem(question, answers, options)
        sample = Sample(
            sample_id=f"{split}-{name}",
            image_id=ids[0],
            question=self._ask(question, options, context),
            answers=answers,
            load_image=lambda: opened.load_image(row, eager, where, problem),
            groups={"kind": self._layout.kinds.get(kind, kind)} if kind else {},
            options=options,
            content=ids[1],
        )
        if not (problem or self._known or self._layout.metric == "cider"):
            self._require_right(sample)
        return sample

    def _problem(self, question: str, answers: Sequence[str], options: Sequence[str]) -> str:
        """Say why a row cannot be asked; empty where it can."""
        if not question and "question" in self._required:
            return "it has no question"
        if not answers:
            return "it has no answer"
        other = _OTHER_IMAGE.search(" ".join((question, *options))) or re.search("<image>(?=.*<image>)", question, re.S)
        return f"it speaks of a second image ({other[0]})" if other else ""

    def _require_right(self, sample: Sample) -> None:
        """Raise DataError where no reference is right by the metric: every score would be 0."""
        if not any(self.score(answer, sample) for answer in sample.answers):
            raise DataError(
                f"its answer {shortened(repr(sample.answers[0]))} scores 0 against itself by the metric "
                f"{self._metric_name(sample.options)}. Give another --metric, or mend the answer"
            )

    def _nested(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        columns = {role: fitting(self._wanted.get(role, ""), fields) for role in _ASKED}
        return {role: fields[names[0]] if names else None for role, names in columns.items()}

    def _check_nested(self, source: Source, name: str, fields: Mapping[str, Any]) -> None:
        found = self._nested(fields)
        missing = [role for role in ("question", "answers") if found[role] is None]
        if missing:
            raise DataError(
                f"{source.name}: the entries of {name} have {', '.join(fields)}, none for {', '.join(missing)}. Say "
                f"which is which with --columns, for example {missing[0]}={next(iter(fields), 'NAME')}."
            )

    def _read_answers(
        self, opened: OpenedSplit, values: Row, answer: Any = None
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return options and right answers (letters of options, or texts) of a row, or of one entry of its list."""
        columns = opened.columns.get("options", ())
        answer = answer if "list" in opened.columns else values[opened.columns["answers"][0]]
        options = as_options(values[columns[0]] if len(columns) == 1 else [values[name] for name in columns])
        metric = self._metric_name(options)
        if metric != "multiple_choice" or not options:
            return options, as_answers(answer, metric)
        how = {"numbered": self._layout.index_answers, "strict": not self._known}
        right = tuple(right_letter(one, options, **how) for one in entries(answer))
        if len(set(right)) > 1 and not self._known:
            raise DataError(
                f"its right options are {', '.join(right)}, and a multiple choice here has one. Leave such questions "
                "out"
            )
        return options, right

    def _metric_name(self, options: Sequence[str]) -> str:
        if self._layout.metric != BY_OPTIONS:
            return self._layout.metric
        return "multiple_choice" if options else "exact_match"

    def _ask(self, question: str, options: Sequence[str], context: str) -> str:
        template = self._prompt or self._layout.prompt
        if self._prompt is None and self._metric_name(options) == "multiple_choice":
            template = LETTER if options else SHORT
        listed = "\n".join(f"{name}. {text}" for name, text in zip(letters(len(options)), options, strict=True))
        if context:
            question = f"{context}\n{question}"
        parts = {"{options}": listed, "{question}": question}
        return re.sub("{options}|{question}", lambda found: parts[found[0]], template)

    def _image_ids(self, opened: OpenedSplit, row: int, values: Row) -> tuple[str, str]:
        """Return the id by which splits keep an image on one side, and one that only equal images have."""
        own = joined_id(values, opened.columns.get("image_id"))
        named = f"{self.name}-{own}" if own else ""
        if own and self._layout.image_name:
            named = self._layout.image_name(own)
        if named and self._known:
            return named, named
        column = opened.columns["image"][0]
        content = f"{self.name}-row-{row}"
        with suppress(OSError, InputError, DataError):  # loading the image will tell
            found = opened.picture(row, values[column] if column in values else opened.source.value(row, column))
            data = found.read_bytes() if isinstance(found, Path) else found
            content = f"sha256-{hashlib.sha256(data).hexdigest()[:24]}" if data else content
        return named or content, content

    def _metric(self, split: str, options: Sequence[str]) -> Metric:
        name = self._metric_name(options)
        if name != "cider":
            return METRICS[name]
        if split not in self._metrics:
            self._metrics[split] = Cider(self._references(self._open(split)))
        return self._metrics[split]

    def _references(self, opened: OpenedSplit) -> Iterator[tuple[str, ...]]:
        names = opened.columns.get("list") or opened.columns["answers"]
        for _, row in opened.source.rows(names):
            value = row[names[0]]
            found = (
                [self._nested(one)["answers"] for one in as_questions(value)] if "list" in opened.columns else [value]
            )
            yield from (as_answers(one, "cider") for one in found)


@contextmanager
def _naming(source: Source, row: int) -> Iterator[None]:
    """Name the row in whatever is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.name}, row {row + 1}: {error}.") from None


def _asked_text(value: Any) -> str:
    """Return a question, without the mark of its image before or behind it; the name of a gap is none."""
    text = as_text(value)
    if text.count("<image>") == 1:  # where LLaVA's files put the image, not what is asked
        text = text.removeprefix("<image>").removesuffix("<image>").strip()
    return "" if text in ("None", "null") else text
