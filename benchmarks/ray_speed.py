"""How fast accuracy sweeps are with several workers, and what a driver costs.

    python benchmarks/ray_speed.py real        # the bundled model: two workers of one thread against one
    python benchmarks/ray_speed.py ray         # 32 workers on Ray that sleep: their share of the time at work
    python benchmarks/ray_speed.py driver      # a million samples, 32 sleeping workers: the driver's time and memory

Times are taken between the first and the last piece of work that comes back, so that starting Ray does not count.
Each prints one JSON document.
"""

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.sleeping_model import SPACE, NumberedTask, SleepingVLM, opened
from budgetvlm.cluster.cluster_options import ClusterOptions
from budgetvlm.cluster.hand_out import News, hand_out
from budgetvlm.profiling.measure.accuracy_sweep import profile_accuracy
from budgetvlm.profiling.measure.answering import Answers
from budgetvlm.profiling.measure.elsewhere import Elsewhere
from budgetvlm.profiling.measure.sweep_options import SweepOptions
from budgetvlm.profiling.results.measurements import AccuracyRecord
from budgetvlm.tasks import load_task
from budgetvlm.tasks.options import TaskOptions
from budgetvlm.vlm import load_vlm


class Watched:
    """A crew that begins when all of its workers are there, and whose pieces are counted and timed."""

    def __init__(self, crew: Any, workers: int) -> None:
        self.crew, self.times, self.memory = crew, [], []
        self.give, self.replace = crew.give, crew.replace
        self.ready = [crew.hear() for _ in range(workers)]
        self.started = time.perf_counter()

    def hear(self) -> News:
        if self.ready:
            return self.ready.pop()
        news = self.crew.hear()
        if news.what == "piece":
            self.times.append(time.perf_counter() - self.started)
            if len(self.times) % 100 == 1:
                self.memory.append(resident_mb())
        return news

    @property
    def rate(self) -> float:
        """Pieces a second."""
        return len(self.times) / self.times[-1]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@contextmanager
def watched(crew: Any, workers: int, into: list[Watched], *given: Any) -> Iterator[Watched]:
    with crew(*given) as own:
        into.append(Watched(own, workers))
        yield into[-1]


def real(workers: int, samples: int) -> float:
    """Batches a second of the bundled model with workers of one thread each."""
    from budgetvlm.cluster.on_ray import ray_crew

    def opening() -> tuple[Any, Any]:
        return load_vlm("reference", num_threads=1), load_task(TaskOptions("signs"))

    crews: list[Watched] = []
    model, task = load_vlm("reference", device="meta"), load_task(TaskOptions("signs"))
    settings = [setting for setting in model.knob_space.settings if setting["max_crops"] == 4]
    with tempfile.TemporaryDirectory() as directory:
        options = SweepOptions(("test",), Path(directory), num_samples=(samples,))
        elsewhere = Elsewhere(
            partial(watched, partial(ray_crew, ClusterOptions(workers=workers)), workers, crews), opening
        )
        profile_accuracy(model, task, settings, options, batch_size=16, elsewhere=elsewhere)
    return crews[0].rate


class Sleeper:
    """A worker that sleeps."""

    def __init__(self, say: Any) -> None: ...

    def work(self, message: float) -> Iterator[int]:
        time.sleep(message)
        yield 0

    def close(self) -> None: ...


class Nap:
    """A job for a `Sleeper`."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.done = seconds, False

    def left(self) -> float | None:
        return None if self.done else self.seconds

    def take(self, piece: int) -> None:
        self.done = True

    def end(self) -> None: ...


def on_ray(workers: int, jobs: int, seconds: float) -> float:
    """The share of the time that workers on Ray were at work."""
    from budgetvlm.cluster.on_ray import ray_crew

    with ray_crew(ClusterOptions(workers=workers), Sleeper, print) as crew:
        own = Watched(crew, workers)
        hand_out((Nap(seconds) for _ in range(jobs)), own, print)
    return jobs * seconds / (workers * own.times[-1])


class SleepingAnswerer:
    """Answers as `budgetvlm.profiling.measure.answering.Answerer` does, with a pause for each batch."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def work(self, message: dict) -> Iterator[Any]:
        for setting, rows in message.items():
            time.sleep(self.pause_s)
            yield Answers(setting, rows, [AccuracyRecord(f"test-{row}", 1.0, str(row), (str(row),)) for row in rows])


class ThreadCrew:
    """Workers in threads."""

    def __init__(self, count: int, pause_s: float) -> None:
        self.queue, self.inboxes = SimpleQueue[News](), [SimpleQueue[Any]() for _ in range(count)]
        for worker in range(count):
            threading.Thread(target=self._run, args=(worker, SleepingAnswerer(pause_s)), daemon=True).start()

    def _run(self, worker: int, own: Any) -> None:
        self.queue.put(News(worker, "ready"))
        while True:
            for piece in own.work(self.inboxes[worker].get()):
                self.queue.put(News(worker, "piece", piece))
            self.queue.put(News(worker, "done"))

    def give(self, worker: int, message: Any) -> None:
        self.inboxes[worker].put(message)

    def hear(self) -> News:
        return self.queue.get()

    def replace(self, worker: int) -> None:
        raise RuntimeError(f"thread {worker} died")


def driver(workers: int, samples: int, batch: int, pause_s: float) -> dict[str, float]:
    """What a driver costs: the workers' share of the time at work, and its memory in MB."""
    crews: list[Watched] = []
    crew = contextmanager(lambda build, say: iter([ThreadCrew(workers, pause_s)]))
    with tempfile.TemporaryDirectory() as directory:
        options = SweepOptions(("test",), Path(directory))
        elsewhere = Elsewhere(partial(watched, crew, workers, crews), lambda: opened(0, None, samples))
        model, task, started = SleepingVLM(0.0), NumberedTask(samples), time.perf_counter()
        profile_accuracy(model, task, SPACE.settings[:1], options, batch_size=batch, elsewhere=elsewhere)
        total_s = time.perf_counter() - started
    own = crews[0]
    return {
        "efficiency": len(own.times) * pause_s / (workers * own.times[-1]),
        "answers a second": samples / own.times[-1],
        "seconds in all": total_s,
        "memory at the first batch": own.memory[0],
        "memory in the middle": own.memory[len(own.memory) // 2],
        "memory at the last batch": own.memory[-1],
        "memory at the end": resident_mb(),
        "largest": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "ray", "driver"])
    parser.add_argument("--workers", type=int, default=32, metavar="N", help="of ray and driver (default: 32)")
    parser.add_argument("--samples", type=int, metavar="N", help="default: 96 of the real model, a million otherwise")
    args = parser.parse_args()
    if args.what == "real":
        rates = [(workers, real(workers, args.samples or 96)) for workers in (1, 2, 1, 2)]
        best = {workers: max(rate for own, rate in rates if own == workers) for workers in (1, 2)}
        found: dict[str, Any] = {"workers, batches a second": rates, "ratio of the best": best[2] / best[1]}
    elif args.what == "ray":
        found = {"efficiency": on_ray(args.workers, 10 * args.workers, 2.0)}
    else:
        found = driver(args.workers, args.samples or 1_000_000, 250, 2.0)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
