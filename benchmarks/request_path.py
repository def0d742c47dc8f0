"""How far a request travels through the package: which files it enters, and how often it goes from one to another.

    python -m benchmarks.request_path [--list] [--json]

Somebody who wants to know how a request is answered has to read these files, in this order. Requests to the bundled
model, with an untrained controller, a guard and an ample budget, are traced; the median one counts (the first for an
image of a new size goes further, because its layout is not yet remembered). A change of file is a call into another
file of the package, or the return from it, also where PyTorch or Transformers lies between both. Compiled loops (Numba)
are not seen. Exit code 1 where there are more files or changes than the project allows itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import budgetvlm
from benchmarks.speed.bench_data import BenchOptions, Material
from budgetvlm import decide

MOST_FILES, MOST_CHANGES = 12, 120
WARM_UP, TRACED = 3, 5  # requests
AMPLE_MS = 1e6  # nothing is hurried, so that the way does not depend on how busy the machine is


def changes_of_file(call: Callable[[], Any], package: Path) -> list[str]:
    """Return the package's files between which control goes during a call, each as often as it is entered."""
    visited: list[str] = []
    running: list[tuple[FrameType, str]] = []  # the package's frames that have not returned

    def watch(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(package):
            return
        if event == "call":
            running.append((frame, str(path.relative_to(package))))
        elif running and running[-1][0] is frame:
            running.pop()
        if running and visited[-1:] != [running[-1][1]]:
            visited.append(running[-1][1])

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return visited


def usual_way() -> list[str]:
    """Return the files that the median of some requests goes through; see `changes_of_file`."""
    material = Material(BenchOptions(quick=True, num_threads=1))
    system, package = material.system, Path(budgetvlm.__file__).parent
    ways = []
    for number, sample in enumerate(material.samples(WARM_UP + TRACED)):
        image, question = sample.load_image(), sample.question
        if number == WARM_UP:
            decide.wait_for_compiled()
        way = changes_of_file(lambda: system.generate(image, question, budget_ms=AMPLE_MS), package)  # noqa: B023
        if number >= WARM_UP:
            ways.append(way)
    return sorted(ways, key=len)[len(ways) // 2]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the way, file by file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    way = usual_way()
    files, changes = list(dict.fromkeys(way)), len(way) - 1
    if args.json:
        print(json.dumps({"files": files, "num_files": len(files), "changes": changes, "way": way}))
    else:
        print(f"one request: {len(files)} files (at most {MOST_FILES}), {changes} changes (at most {MOST_CHANGES})")
        print("\n".join(way if args.list else files))
    return int(len(files) > MOST_FILES or changes > MOST_CHANGES)


if __name__ == "__main__":
    sys.exit(main())
