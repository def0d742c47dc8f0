"""What a process does in a latency sweep: it answers one request after the other, and times every stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from budgetvlm.errors import InputError
from budgetvlm.knobs import Setting
from budgetvlm.profiling.measure.shared_cores import Interruptions
from budgetvlm.profiling.measure.sweep import Unusable, load_image
from budgetvlm.profiling.results.measurements import STAGE_FIELDS, TOKEN_COUNTS, LatencyRecord
from budgetvlm.tasks import SplitSample, Task
from budgetvlm.vlm import VLM, Generation


@dataclass(frozen=True)
class Timed:
    """A sample's runs: str(setting) -> record, as a dictionary. ``hardware``: of the machine, where it has a name."""

    runs: Mapping[str, dict[str, Any]]
    hardware: Mapping[str, Any] | None = None


class Timekeeper:
    """Times requests.

    Args:
        samples: all of the sweep, known by their places.
        say: takes lines for the user.
        warmup: untimed requests at each of the ``settings`` before all others.
        machine: gives name and hardware of the machine; None where there is only one, which the results describe.
    """

    def __init__(
        self,
        vlm: VLM,
        task: Task,
        samples: Sequence[SplitSample],
        say: Callable[[str], None],
        *,
        max_new_tokens: int,
        warmup: int,
        settings: Sequence[Setting],
        machine: Callable[[], tuple[str, dict[str, Any]]] | None = None,
    ) -> None:
        self.vlm, self.task, self.samples, self.say = vlm, task, samples, say
        self.max_new_tokens = max_new_tokens
        self.name: str | None = None
        self.hardware: dict[str, Any] | None = None
        if machine is not None:
            self.name, self.hardware = machine()
        self._warm_up(settings, warmup)
        self.watch = Interruptions()

    def work(self, message: tuple[int, Sequence[Setting]]) -> Iterator[Timed | Unusable]:
        """Time a sample (by place) once at each of these settings, in their order."""
        row, settings = message
        place = self.samples[row]
        try:
            image = load_image(place)
            runs = {s: request(self.vlm, image, place.sample.question, s, self.max_new_tokens) for s in settings}
        except InputError as error:
            yield Unusable(row, str(error))
        else:
            yield Timed({str(s): self._record(place, run).to_dict() for s, run in runs.items()}, self.hardware)

    def close(self) -> None:
        """Say whether other work disturbed the times."""
        if warning := self.watch.warning():
            self.say(f"{self.name}: {warning}" if self.name else warning)

    def _warm_up(self, settings: Sequence[Setting], times: int) -> None:
        """Run untimed requests on the first sample that can be used: the first are slower, as memory is taken."""
        for place in self.samples:
            with contextlib.suppress(InputError):
                image = load_image(place)
                for _ in range(times):
                    for setting in settings:
                        request(self.vlm, image, place.sample.question, setting, self.max_new_tokens)
                return

    def _record(self, place: SplitSample, run: Generation) -> LatencyRecord:
        stages: dict[str, Any] = {field: run.stages_ms[stage] for stage, field in STAGE_FIELDS.items()}
        counts = {field: getattr(run, field) for field in TOKEN_COUNTS}
        accuracy = float(self.task.score(run.text, place.sample))
        record = LatencyRecord(place.sample.sample_id, T_total_ms=run.total_ms, accuracy=accuracy, **stages, **counts)
        return replace(record, machine=self.name)


def request(vlm: VLM, image: Any, question: str, setting: Setting, max_new_tokens: int) -> Generation:
    """Run one request as a user's: the overview first, then the answer."""
    overview = vlm.encode_overview(image)
    return vlm.generate(image, question, setting, max_new_tokens=max_new_tokens, overview=overview)
