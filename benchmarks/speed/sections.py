"""The sections of `budgetvlm bench`, in the order in which they run, and one run of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed import decision, memory, overhead, sweeps
from benchmarks.speed import training_speed as training
from benchmarks.speed.bench_data import BenchOptions, Material
from benchmarks.speed.figures import Figure
from budgetvlm._threads import torch_threads

SECTIONS: dict[str, tuple[str, Callable[[Material], list[Figure]]]] = {
    "decision": ("A decision, on one core", decision.measure),
    "overhead": ("What a request pays for being adaptive", overhead.measure),
    "training": ("Training", training.measure),
    "memory": ("Memory of training on a large table", memory.measure),
    "accuracy": ("Accuracy sweep", sweeps.measure_accuracy),
    "latency": ("Latency sweep", sweeps.measure_latency),
}


@dataclass(frozen=True)
class SectionResult:
    """One section's figures and what it took."""

    name: str
    title: str
    figures: tuple[Figure, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        figures = [figure.to_dict() for figure in self.figures]
        return {"name": self.name, "title": self.title, "seconds": round(self.seconds, 1), "figures": figures}

    def __str__(self) -> str:
        return "\n".join([f"{self.title}  ({self.name}, {self.seconds:.0f} s)", *map(str, self.figures)])


def run(options: BenchOptions, names: Sequence[str]) -> Iterator[SectionResult]:
    """Measure these sections, one after the other."""
    material = Material(options)
    with torch_threads(options.num_threads):
        for name in names:
            title, measure = SECTIONS[name]
            start = time.perf_counter()
            figures = tuple(measure(material))
            yield SectionResult(name, title, figures, time.perf_counter() - start)
