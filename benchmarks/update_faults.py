"""Whether anything is lost when processes are killed during feedback, updates and promotions.

    python benchmarks/update_faults.py [--moments 50] [--seed 0] [--json FILE]

One process keeps requests and their scores; beside it another one either updates the controller (`budgetvlm update`) or
promotes versions and takes them back, over and over. Both are killed (SIGKILL) at a random moment, and what they left
is looked at before the next ones go on from there: the store opens and is sound, it has each score that was
acknowledged, and the controller that serves is one whole version. The exit code is 1 where something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm import cli
from budgetvlm._io import write_json
from budgetvlm.controller.checkpoint import BEST, controller_document, load_controller
from budgetvlm.controller.checkpoint_files import write_checkpoint
from budgetvlm.controller.network import GRPOController
from budgetvlm.controller.versions import keep_version, promote, rollback, standing, version_path, versions_of
from budgetvlm.feedback.request_store import Decided, RequestStore

KNOBS = {"max_crops": [1, 4], "top_k": [2, 8]}
EXPECTED = (0.5, 0.55, 0.6, 0.65)  # accuracy of each setting, by the controller
TIMES_MS, BOUNDS_MS = (10.0, 20.0, 30.0, 40.0), (15.0, 25.0, 35.0, 45.0)
TRUE = (0.9, 0.5, 0.5, 0.5)
DI, DL, SCORED = 3, 2, 300
LONGEST_S = {"update": 3.0, "promotion": 0.5}  # before both are killed


class Places(NamedTuple):
    """Where the controller, another one and the store are."""

    controller: Path
    other: Path
    store: Path


def planted(directory: Path) -> Places:
    """A controller that expects the wrong settings to be good, one that expects nothing, and scores that say so."""
    places = Places(directory / "controller", directory / "other", directory / "requests.sqlite")
    for place, expected in ((places.controller, EXPECTED), (places.other, (0.5,) * 4)):
        made = GRPOController(DI, DL, 4, 8, KNOBS, 40.0, TIMES_MS, BOUNDS_MS, default_price=0.01)
        made.start_from(expected)
        place.mkdir()
        write_checkpoint(place / BEST, controller_document(made))
        made.save_pretrained(place)
    store = RequestStore(places.store, 16)
    keep_scores(store, np.random.default_rng(0), SCORED, "planted", lambda name, score: None)
    store.close()
    return places


def keep_scores(
    store: RequestStore, rng: np.random.Generator, most: int | None, name: str, said: Callable[[str, float], None]
) -> None:
    """Keep requests whose settings were drawn evenly, and their scores; say each that was acknowledged."""
    even = np.full(4, 0.25, np.float32).tobytes()
    for number in count() if most is None else range(most):
        image, language = (rng.normal(size=size).astype(np.float16).tobytes() for size in (DI, DL))
        chosen, one = int(rng.integers(4)), f"{name}-{number}"
        allowed = np.packbits(np.ones(4, bool)).tobytes()
        seen = one, "planted", json.dumps(KNOBS), image, language, 50.0, 0.01, allowed, chosen, even, chosen
        store.add(partial(Decided, *seen, budget_ms=None, latency_ms=9.0))
        score = float(rng.random() < TRUE[chosen])
        if store.feedback(one, score).result(10):
            said(one, score)


def updates(places: Places) -> None:
    """Update the controller over and over."""
    words = ["update", "--json", "--requests", str(places.store), "--checkpoint", str(places.controller)]
    while cli.main(words) == 0:
        pass


def promotions(places: Places) -> None:
    """Keep a version, let it serve, and take it back, over and over."""
    while True:
        promote(places.controller, keep_version(places.controller, places.other, {}))
        rollback(places.controller)


def in_child(work: Callable[[], None]) -> int:
    """Run something in a process of its own that says nothing; its number."""
    child = os.fork()
    if not child:
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            work()
        finally:
            os._exit(1)
    return child


def round_of(places: Places, kind: str, name: str, rng: random.Random) -> tuple[dict[str, float], bool]:
    """Kill both processes at a random moment: the scores that were acknowledged, and whether the second one still ran.

    Args:
        kind: "update" or "promotion". name: of this round, for its requests.
    """
    reading, writing = os.pipe()

    def feedback() -> None:
        store, seed = RequestStore(places.store, 16), rng.randrange(1 << 30)
        say = lambda one, score: os.write(writing, f"{one} {score}\n".encode())  # noqa: E731
        keep_scores(store, np.random.default_rng(seed), None, name, say)

    children = [in_child(feedback), in_child(lambda: (updates if kind == "update" else promotions)(places))]
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = [file.readline()]  # from the first score on
        time.sleep(rng.uniform(0.0, LONGEST_S[kind]))
        ran = os.waitpid(children[1], os.WNOHANG)[0] == 0
        for child in children if ran else children[:1]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        lines += file
    said = [line.split() for line in lines if line.endswith("\n")]
    return {one: float(score) for one, score in said}, ran


def faults(places: Places, acknowledged: dict[str, float]) -> list[str]:
    """What is wrong with what was left, in words."""
    found = []
    RequestStore(places.store, 16).close()
    with closing(sqlite3.connect(places.store)) as connection:
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            found.append("the store is damaged")
        kept = dict(connection.execute("SELECT id, score FROM scores"))
    lost = [one for one, score in acknowledged.items() if kept.get(one) != score]
    if lost:
        found.append(f"{len(lost)} scores were acknowledged and are not kept, such as {lost[0]}")
    now = standing(places.controller)["serving"]
    numbers = [version.number for version in versions_of(places.controller)]
    held = {number: tensors(version_path(places.controller, number)) for number in numbers}
    if numbers and (now is None or tensors(places.controller) != held[now]):
        found.append(f"what serves is not version {now} of {numbers}")
    return found


def tensors(controller: Path) -> bytes:
    """All of a controller's numbers, which both forms of its files have to agree about."""
    both = load_controller(controller), GRPOController.from_pretrained(controller)
    one, other = (b"".join(tensor.numpy().tobytes() for tensor in form.state_dict().values()) for form in both)
    assert one == other, f"the files in {controller} are not of one controller"
    return one


def main() -> int:
    """Kill, look, and say what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=50, metavar="N", help="of each kind (default: 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = tried(planted(Path(directory)), args.moments, random.Random(args.seed))
    print(json.dumps(report, indent=1))
    if args.json:
        write_json(args.json, report)
    return int(bool(report["faults"]))


def tried(places: Places, moments: int, rng: random.Random) -> dict[str, object]:
    """Some moments of each kind: how many processes were killed at work, what was acknowledged, what is wrong."""
    acknowledged: dict[str, float] = {}
    found: list[str] = []
    killed = {"update": 0, "promotion": 0}
    for number in range(moments):
        for kind in killed:
            said, ran = round_of(places, kind, f"{kind}{number}", rng)
            acknowledged |= said
            killed[kind] += ran
            found += [f"{kind} {number}: {fault}" for fault in faults(places, acknowledged)]
    versions = max((version.number for version in versions_of(places.controller)), default=0)
    return {
        "moments": moments, "killed": killed, "acknowledged": len(acknowledged), "versions": versions, "faults": found
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
