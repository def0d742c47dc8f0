"""Which knobs of a model of an unknown family work: all are tried at once with every check; if one fails, each.

Trying takes many passes of the model, so what came out is kept in the user's cache, by a digest of the model's files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from budgetvlm._io import read_json, write_json
from budgetvlm._version import __version__
from budgetvlm.errors import BudgetVLMError, ConfigError
from budgetvlm.knobs import KnobSpace
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.conformance import check
from budgetvlm.vlm.fingerprint import model_fingerprint
from budgetvlm.vlm.probe import Probe, one_knob_at_a_time

SIZES = ((900, 600), (300, 500))  # of the images that a model is tried with
QUESTIONS = ("What is the colour of the sign in the middle?", "Count the squares.")


def working_knobs(directory: Path, space: KnobSpace, adapt: Callable[[KnobSpace], Adapter]) -> KnobSpace:
    """Return the knobs of a space that pass all checks. Raises ConfigError: none does, with what each failed."""
    kept = _kept_file(directory, space)
    if kept.is_file():
        return KnobSpace(read_json(kept)["knob_space"])
    found = space if not _failures(space, adapt) else _one_by_one(space, adapt)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"knob_space": found.to_dict()})
    except (OSError, BudgetVLMError):
        pass  # it is tried anew next time
    return found


def _one_by_one(space: KnobSpace, adapt: Callable[[KnobSpace], Adapter]) -> KnobSpace:
    """Return the knobs that pass all checks alone, and then together. Raises ConfigError, see `working_knobs`."""
    failed = {name: _failures(KnobSpace({name: space.values(name)}), adapt) for name in space.names}
    works = {name: space.values(name) for name in space.names if not failed[name]}
    together = _failures(KnobSpace(works), adapt) if len(works) > 1 else []
    if not works or together:
        seen = [f"{name}: {'; '.join(why)}" for name, why in failed.items() if why] + together
        raise ConfigError(f"no knob of this model was found to work. Tried: {'. '.join(seen)}")
    return KnobSpace(works)


def _failures(space: KnobSpace, adapt: Callable[[KnobSpace], Adapter]) -> list[str]:
    """Return what a model with these knobs does not hold."""
    vlm = adapt(space)
    probe = Probe(vlm, list(_images()), QUESTIONS, one_knob_at_a_time(space))
    return [f"{one.name} ({one.detail})" for one in check(probe) if one.passed is False]


def _images() -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        squares = rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
        yield Image.fromarray(squares).resize((width, height))


def _kept_file(directory: Path, space: KnobSpace) -> Path:
    """Return where it is kept what works: by the model, what may work, and our version."""
    import transformers

    parts = __version__, transformers.__version__, space.to_dict(), model_fingerprint(directory)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "budgetvlm" / "knobs" / f"{digest}.json"
