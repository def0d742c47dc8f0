"""The versions of a controller: whole ones below its directory, of which one serves.

``DIR/versions/0002`` holds the files of a controller and ``version.json``, which says what it was trained on and what
came of it. Once a version is kept, the files in ``DIR`` itself are links through ``versions/serving`` to the version
that serves. So whatever reads ``DIR`` needs to know nothing of versions, and another one begins to serve at the moment
at which a single link is replaced: whatever ends the process, the whole old or the whole new controller is there.

``guard.json`` and ``extractor.json`` stay in ``DIR`` and count for every version. The guard's times are those of the
model on this machine, whatever chooses; its factor was calibrated with the choice of one controller in the loop, and
where another one chooses differently the margin that follows each request keeps the rate (docs/guarantee.md).
"""

from __future__ import annotations

import filecmp
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from budgetvlm._io import atomic_directory, read_json, write_json
from budgetvlm.controller.checkpoint import BEST, GUARD, PRICES, load_controller
from budgetvlm.controller.checkpoint_files import WEIGHTS
from budgetvlm.controller.provenance import CONFIG
from budgetvlm.controller.run_directory import METRICS, VERSIONS
from budgetvlm.errors import CheckpointError, ConfigError, DataError, OutputError
from budgetvlm.features.cheap import EXTRACTOR

try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two from changing the versions at once
    fcntl = None  # type: ignore[assignment]

Status = Literal["candidate", "serving", "replaced", "refused"]
SERVING, ABOUT, LOCK = "serving", "version.json", ".lock"
FILES = (BEST, CONFIG, WEIGHTS, PRICES, METRICS)  # those of them that a controller has
SHARED = (GUARD, EXTRACTOR)
WIDTHS = "image_feat_dim", "lang_feat_dim"  # in a configuration
SCHEMA_VERSION = 1
MOST_REFUSED = 10  # that are kept; candidates come and go
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Version:
    """What is known of a version.

    Attributes:
        made_at: when it was kept, in seconds since 1970.
        parent: the version that served then; None: it is what was there before versions were kept, or made by hand.
        trained_on: of what the log gave beside the profile; empty for a training.
        judged: the last verdict on it; None: there is none yet.
        why: of its status, in one sentence.
        replaces: the version that served before it; None: it never was promoted.
    """

    number: int
    made_at: float
    parent: int | None = None
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    judged: Mapping[str, Any] | None = None
    status: Status = "candidate"
    why: str = ""
    replaces: int | None = None


def versions_of(directory: Path) -> list[Version]:
    """All versions that are kept, the oldest first. Raises DataError: one's description is damaged."""
    now = serving_version(directory)
    return [_as_linked(_stored(directory, number), now) for number in _numbers(directory)]


def serving_version(directory: Path) -> int | None:
    """The version that serves; None where what lies in the directory is no version (yet)."""
    number = _linked(directory)
    return number if number is not None and _equals(directory, number) else None


def candidate_of(directory: Path) -> Version | None:
    """The candidate that is to prove itself: the newest version, if it is one."""
    found = versions_of(directory)
    return found[-1] if found and found[-1].status == "candidate" else None


def standing(directory: Path) -> dict[str, int | None]:
    """The numbers of the version that serves and of the one that is to prove itself."""
    candidate = candidate_of(directory)
    return {"serving": serving_version(directory), "candidate": candidate.number if candidate else None}


def require_directory(directory: Path) -> None:
    """Raise ConfigError where a path is no directory that may keep versions: a file, without one, a version itself."""
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory; give the directory of the controller that serves")
    if not any((directory / name).exists() for name in (BEST, CONFIG, VERSIONS)):
        raise ConfigError(f"{directory} holds no controller; give the directory of the one that serves")
    if directory.resolve().parent.name == VERSIONS and (directory / ABOUT).exists():
        owner = directory.resolve().parents[1]
        raise ConfigError(f"{directory} is a version, which keeps none of its own; give {owner}")


def version_path(directory: Path, number: int) -> Path:
    """Where a version lies. Raises ConfigError: there is none of this number."""
    path = directory / VERSIONS / f"{number:04d}"
    if not path.is_dir():
        known = ", ".join(map(str, _numbers(directory))) or "none"
        raise ConfigError(f"{directory} keeps no version {number}; it keeps {known} (`budgetvlm versions list`)")
    return path


def keep_version(directory: Path, made: Path, about: Mapping[str, Any]) -> int:
    """Keep a controller as a candidate; what serves now is kept too, if it is no version yet.

    Args:
        directory: of the controller that serves.
        made: directory of the new one, for example of a training; its files are copied.
        about: "trained_on", "judged" and "why" of `Version`, those that are known.

    Returns:
        Its number.

    Raises:
        CheckpointError, KnobSpaceError: it cannot be opened, or its settings are others. OutputError.
    """
    present, controller = load_controller(directory), load_controller(made)
    present.knob_space.require_equal(controller.knob_space, f"the controller in {made}")
    widths = [tuple(one.config[name] for name in WIDTHS) for one in (present, controller)]
    if widths[0] != widths[1]:
        raise CheckpointError(
            f"the controller in {made} reads {widths[1]} features of image and question and the one that serves "
            f"{widths[0]}; train it on the same features"
        )
    with _changing(directory):
        parent, older = _adopted(directory), candidate_of(directory)
        number = _kept(directory, made, Version(0, time.time(), parent, **about))
        if older:
            _note(directory, older.number, status="refused", why=f"version {number} came before it had proved itself")
        _forget_refused(directory)
        return number


def promote(directory: Path, number: int, why: str = "") -> None:
    """Let a version serve. Raises ConfigError: there is none of this number. CheckpointError: it cannot be opened."""
    load_controller(version_path(directory, number))
    with _changing(directory):
        present = _adopted(directory)
        if number != present:
            _note(directory, number, replaces=present, why=why)
            _switch(directory, present, number, why=f"version {number} took its place")


def rollback(directory: Path, why: str = "") -> int:
    """Let the version serve again that the present one replaced; the present one is refused. Returns its number.

    Raises:
        ConfigError: the present one replaced none.
    """
    if not _numbers(directory):
        raise ConfigError(f"{directory} keeps no versions yet, so there is nothing before what serves")
    with _changing(directory):
        present = _adopted(directory)
        before = _stored(directory, present).replaces
        if before is None:
            raise ConfigError(
                f"version {present} of {directory} took the place of no other; there is nothing before it"
            )
        load_controller(version_path(directory, before))
        _switch(directory, present, before, status="refused", why=why or f"taken back; version {before} serves again")
        _note(directory, before, why=f"it serves again, since version {present} was taken back")
        return before


def note_version(directory: Path, number: int, **known: Any) -> None:
    """Note what is known of a version now, for example ``judged``, or ``status="refused"`` and ``why``."""
    version_path(directory, number)
    with _changing(directory):
        _note(directory, number, **known)


# ---- reading


def _numbers(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / VERSIONS).glob("[0-9]*") if path.name.isdigit())


def _linked(directory: Path) -> int | None:
    try:
        return int(os.readlink(directory / VERSIONS / SERVING))
    except (OSError, ValueError):
        return None


def _equals(directory: Path, number: int) -> bool:
    """Whether the controller in the directory is this version."""
    place = directory / VERSIONS / f"{number:04d}"
    return place.is_dir() and all(_same(directory / name, place / name) for name in FILES)


def _same(one: Path, other: Path) -> bool:
    if not (one.exists() and other.exists()):
        return one.exists() == other.exists()
    return one.samefile(other) or filecmp.cmp(one, other, shallow=False)


def _stored(directory: Path, number: int) -> Version:
    """A version's description as it was written."""
    path = directory / VERSIONS / f"{number:04d}" / ABOUT
    document = read_json(path)
    try:
        if document.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("of another schema version")
        return Version(**document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} describes no version that this one of budgetvlm reads ({error})") from None


def _as_linked(version: Version, now: int | None) -> Version:
    """Which version serves says the link alone, because it changes at once and descriptions only after it."""
    if version.number == now:
        return replace(version, status="serving")
    return replace(version, status="replaced") if version.status == "serving" else version


# ---- writing, each step such that the process may end after it


@contextmanager
def _changing(directory: Path) -> Iterator[None]:
    """Be the only one that changes the versions, and remove what one left that was killed meanwhile."""
    if directory.resolve().is_relative_to(PACKAGE):
        raise OutputError(
            f"{directory} belongs to this package, in which nothing is written; copy it (cp -r) and give the copy as "
            "--checkpoint"
        )
    place = directory / VERSIONS
    try:
        place.mkdir(exist_ok=True)
        with open(place / LOCK, "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in place.glob(".*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise OutputError(f"the versions in {place} cannot be changed: {error}; make it writable") from error


def _adopted(directory: Path) -> int:
    """The number of the version that serves; what lies in the directory is kept first where it is none yet."""
    linked = _linked(directory)
    known = [number for number in _numbers(directory)[::-1] if _equals(directory, number)]
    number = linked if linked in known else known[0] if known else None
    if number is None:
        load_controller(directory)
        about = Version(0, time.time(), status="serving", why="it was there already")
        number = _kept(directory, directory, about)
    _link(directory / VERSIONS / SERVING, f"{number:04d}")
    _link_files(directory, number)  # each holds the same before and after
    return number


def _link_files(directory: Path, number: int) -> None:
    """Have a link for each file that a version has, and none that leads nowhere now."""
    for name in FILES:
        if (directory / VERSIONS / f"{number:04d}" / name).exists():
            _link(directory / name, f"{VERSIONS}/{SERVING}/{name}")
        elif (directory / name).is_symlink() and not (directory / name).exists():
            (directory / name).unlink()


def _kept(directory: Path, made: Path, version: Version) -> int:
    """Copy a controller under the next number."""
    number = max(_numbers(directory), default=0) + 1
    with atomic_directory(directory / VERSIONS / f"{number:04d}") as place:
        for name in FILES:
            if (made / name).exists():
                shutil.copyfile(made / name, place / name)
                _flush(place / name)
        for name in SHARED:
            if (directory / name).exists():
                os.symlink(f"../../{name}", place / name)
        _write(place, replace(version, number=number))
    _flush(directory / VERSIONS)
    return number


def _switch(directory: Path, present: int, number: int, **known: Any) -> None:
    """Replace the link; ``known``: of the present one, afterwards."""
    _note(directory, present, status="serving")  # as it is read once another serves: replaced
    _link_files(directory, number)
    _link(directory / VERSIONS / SERVING, f"{number:04d}")
    _link_files(directory, number)
    _note(directory, present, **{"status": "replaced", **known})
    _note(directory, number, status="serving")


def _note(directory: Path, number: int, **known: Any) -> None:
    version = _stored(directory, number)
    if (changed := replace(version, **known)) != version:
        _write(directory / VERSIONS / f"{number:04d}", changed)


def _write(place: Path, version: Version) -> None:
    write_json(place / ABOUT, {"schema_version": SCHEMA_VERSION, **asdict(version)})


def _link(path: Path, target: str) -> None:
    """Make a link at once in the place of whatever is there; nothing changes where it is there already."""
    if path.is_symlink() and os.readlink(path) == target:
        return
    aside = path.with_name(f".{path.name}.link")
    aside.unlink(missing_ok=True)
    os.symlink(target, aside)
    os.replace(aside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have a file or a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget_refused(directory: Path) -> None:
    """Remove the oldest refused versions but for some; numbers are not given twice, because the newest one stays."""
    found = versions_of(directory)
    needed = {version.replaces for version in found}
    refused = [version.number for version in found[:-1] if version.status == "refused"]
    for number in refused[:-MOST_REFUSED]:
        if number not in needed:
            aside = directory / VERSIONS / f".{number:04d}.tmp"
            os.replace(version_path(directory, number), aside)  # half of one is none
            shutil.rmtree(aside, ignore_errors=True)
