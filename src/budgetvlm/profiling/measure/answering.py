"""What a process does in an accuracy sweep: it answers samples at settings, in batches, and scores the answers.

Tiles are encoded once a batch, and shared by all settings with that `max_crops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from budgetvlm.errors import InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.out_of_memory import for_each_batch, in_parts
from budgetvlm.profiling.measure.shared_cores import SharedCores
from budgetvlm.profiling.measure.sweep import Unusable, load_image
from budgetvlm.profiling.results.measurements import TOKEN_COUNTS, AccuracyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation

ENCODED_AT_ONCE = 8  # images; what more of them hold between layers no longer fits into a processor's cache


@dataclass(frozen=True)
class Answers:
    """What some samples were answered at one setting; ``rows`` are their places among all samples."""

    setting: Setting
    rows: Sequence[int]
    records: Sequence[AccuracyRecord]


class Answerer:
    """Answers samples.

    Args:
        samples: all of the sweep, known by their places.
        batch_size: samples answered at once; halved, with a message, whenever memory runs out.
        together: batches whose images are encoded together.
        say: takes lines for the user.
    """

    def __init__(
        self,
        vlm: VLM,
        task: Task,
        samples: Sequence[SplitSample],
        say: Callable[[str], None],
        *,
        max_new_tokens: int,
        batch_size: int,
        together: int,
    ) -> None:
        self.vlm, self.task, self.samples, self.say = vlm, task, samples, say
        self.max_new_tokens, self.batch_size, self.together = max_new_tokens, batch_size, together
        # How many threads work is nobody's concern, because no time is measured; an engine works on cores of its own.
        self.cores = SharedCores(say) if vlm.can_revise else None

    def work(self, message: Mapping[Setting, Sequence[int]]) -> Iterator[Answers | Unusable]:
        """Answer samples (by place) at settings of one tiling, and name those that cannot be used."""
        left = {setting: set(rows) for setting, rows in message.items()}
        rows = sorted(set().union(*left.values()))
        self.batch_size = yield from for_each_batch(
            rows, self.batch_size, partial(self._measure, left), self.say, together=self.together
        )

    def close(self) -> None:
        """Give the threads back."""
        if self.cores:
            self.cores.close()

    def _measure(self, left: Mapping[Setting, set[int]], rows: Sequence[int], size: int) -> Iterator[Any]:
        """Answer what is left of these samples."""
        loaded: dict[int, Image.Image] = {}
        for row in rows:
            if any(row in asked for asked in left.values()):
                try:
                    loaded[row] = load_image(self.samples[row])
                except InputError as error:
                    yield _without(left, row, error)
        yield from self._answer(left, loaded, size)

    def _answer(self, left: Mapping[Setting, set[int]], loaded: Mapping[int, Image.Image], size: int) -> Iterator[Any]:
        """Answer samples; where the model refuses one, answer them one by one, which tells whom to leave out."""
        try:
            if loaded:
                yield from self._answer_batch(left, loaded, size)
        except InputError as error:
            if len(loaded) == 1:
                yield _without(left, next(iter(loaded)), error)
                return
            for row, image in loaded.items():
                yield from self._answer(left, {row: image}, 1)

    def _answer_batch(
        self, left: Mapping[Setting, set[int]], loaded: Mapping[int, Image.Image], size: int
    ) -> Iterator[Answers]:
        """Answer samples at the settings that want them, ``size`` at once."""
        shared = dict[str, dict[int, Any]]()
        encode_tiles = getattr(self.vlm, "encode_tiles", None)  # not every model can part encoding from answering
        if encode_tiles is not None:
            crops = next(iter(left)).get("max_crops")  # the same at all of these settings
            parts = in_parts(list(loaded.values()), min(size, ENCODED_AT_ONCE))
            tokens = [own for part in parts for own in encode_tiles(part, crops)]
            shared["visual"] = dict(zip(loaded, tokens, strict=True))
        for setting, asked in left.items():
            for rows in in_parts([row for row in loaded if row in asked], size):
                answers = self.vlm.generate_batch(
                    [loaded[row] for row in rows],
                    [self.samples[row].sample.question for row in rows],
                    setting,
                    max_new_tokens=self.max_new_tokens,
                    **{name: [values[row] for row in rows] for name, values in shared.items()},
                )
                asked.difference_update(rows)
                records = [self._record(self.samples[r], answer) for r, answer in zip(rows, answers, strict=True)]
                yield Answers(setting, rows, records)
                if self.cores:
                    self.cores.check()

    def _record(self, place: SplitSample, answer: Generation) -> AccuracyRecord:
        return AccuracyRecord(
            sample_id=place.sample.sample_id,
            score=float(self.task.score(answer.text, place.sample)),
            pred=answer.text,
            answers=place.sample.answers,
            groups=place.groups,
            **{field: getattr(answer, field) for field in TOKEN_COUNTS},
        )


def _without(left: Mapping[Setting, set[int]], row: int, error: InputError) -> Unusable:
    """Leave a sample out of what is left, and say so."""
    for asked in left.values():
        asked.discard(row)
    return Unusable(row, str(error))
