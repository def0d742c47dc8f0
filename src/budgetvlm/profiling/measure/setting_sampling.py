"""Which settings a sweep measures, and on which samples. Shapes: S samples, K settings, n settings asked for.

Every strategy for settings holds the cheapest and the full setting, because budgets and prices relate to them; the rest
is drawn with a seed. The result is in the order of the knob space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from budgetvlm._io import first_few
from budgetvlm.errors import ConfigError, KnobSpaceError
from budgetvlm.knobs import KnobSpace, Setting
from budgetvlm.vlm import VLM

_LHS_ROUNDS = 50


def choose_settings(
    space: KnobSpace, strategy: str = "full", num_settings: int | None = None, seed: int = 0
) -> tuple[Setting, ...]:
    """Choose settings by one of `STRATEGIES`.

    ``num_settings``: how many, cheapest and full included; None: all for "full" and else about a third, 8 at least.
    Raises ConfigError: an unknown strategy, or a number of settings that it cannot give.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"sampling_strategy={strategy!r} is unknown; choose from {', '.join(STRATEGIES)}")
    default = len(space) if strategy == "full" else min(len(space), max(8, len(space) // 3))
    wanted = default if num_settings is None else num_settings
    least = len({0, len(space) - 1})
    if not least <= wanted <= len(space):
        raise ConfigError(
            f"num_settings={wanted} cannot be drawn from a space of {len(space)}, the cheapest and the full one among "
            f"them; choose {least} to {len(space)}"
        )
    if strategy == "full" and wanted != len(space):
        raise ConfigError(
            f"num_settings={wanted} with sampling_strategy 'full', which is all {len(space)}; leave num_settings out, "
            "or choose balanced, stratified, boundary or lhs"
        )
    chosen = STRATEGIES[strategy](space, wanted, np.random.default_rng(seed))
    return tuple(space.settings[i] for i in sorted(chosen))


def served_settings(vlm: VLM, settings: Sequence[Setting], say: Callable[[str], None] = print) -> tuple[Setting, ...]:
    """Leave out the settings that no engine of a fleet answers, with a word. Raises ConfigError: the full one is."""
    served = frozenset(getattr(vlm, "served", settings))
    left_out = [setting for setting in settings if setting not in served]
    if vlm.knob_space.full in left_out:
        raise ConfigError(
            f"no engine of {vlm.name} answers the full setting ({vlm.knob_space.full}), and budgets and prices are "
            "relative to its time. Add an engine that was started with it, or offer fewer values (knobs: in the file)"
        )
    if left_out:
        say(f"{len(left_out)} settings are left out, because no engine answers them: {first_few(map(str, left_out))}")
    return tuple(setting for setting in settings if setting in served)


def parse_settings(space: KnobSpace, text: str) -> tuple[Setting, ...]:
    """Read a list such as "1,8,8;12,2,4": values in the order of the knobs, settings separated by semicolons.

    The cheapest and the full setting are added where the list lacks them.

    Raises:
        KnobSpaceError: something that is no setting of this space.
    """
    indices = {0, len(space) - 1}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        values = [_number(word, part) for word in part.split(",")]
        if len(values) != len(space.names):
            example = ",".join(str(value) for value in space.full.values())
            raise KnobSpaceError(f"{part!r} is no setting: give {','.join(space.names)}, for example {example}")
        indices.add(space.index(dict(zip(space.names, values, strict=True))))
    return tuple(space.settings[i] for i in sorted(indices))


def draw_cells(
    num_samples: int, num_settings: int, cells: float, seed: int, known: np.ndarray | None = None
) -> np.ndarray:
    """Draw the cells to measure, bool ``[S, K]``: equally many of each sample, and of each setting up to one.

    At random, the settings that were taken least first. They are drawn for the whole space, so that settings which are
    measured later change nothing for the others.

    ``cells``: share of the settings that each sample gets; of a share of a setting it gets none. ``known``: cells that
    are measured already, bool ``[S, K]``; they are kept and count. Raises ConfigError: a
    share that cannot be, or one that leaves a sample or a setting without a measurement.
    """
    if not 0 < cells <= 1:
        raise ConfigError(f"cells={cells:g} is no share of the cells; give a number above 0 and up to 1, like 0.25")
    each = int(cells * num_settings + 1e-9)
    if each < 1 or each * num_samples < num_settings:
        raise ConfigError(
            f"cells={cells:g} of {num_settings} settings x {num_samples} samples leaves some without a measurement. "
            f"Give {max(1.0, num_settings / num_samples) / num_settings:.2g} or more, or time more samples."
        )
    plan = np.zeros((num_samples, num_settings), dtype=bool) if known is None else known.copy()
    rng, taken = np.random.default_rng(seed), plan.sum(axis=0)
    for row in plan:
        chosen = np.lexsort((rng.random(num_settings), taken, row))[: max(0, each - int(row.sum()))]
        row[chosen] = True
        taken[chosen] += 1
    return plan


def full(space: KnobSpace, n: int, rng: np.random.Generator) -> set[int]:
    """Return all K settings."""
    return set(range(len(space)))


def balanced(space: KnobSpace, n: int, rng: np.random.Generator) -> set[int]:
    """Choose each value of each knob about equally often: always add a setting whose values were taken least."""
    chosen = {0, len(space) - 1}
    while len(chosen) < n:
        taken: Counter[tuple[str, float]] = Counter(item for i in chosen for item in space.settings[i].items_)
        left = rng.permutation([i for i in range(len(space)) if i not in chosen])
        chosen.add(int(min(left, key=lambda i: sum(taken[item] for item in space.settings[i].items_))))
    return chosen


def stratified(space: KnobSpace, n: int, rng: np.random.Generator) -> set[int]:
    """Choose evenly from cheap to expensive: cut the settings, sorted by complexity, into strata; draw one of each."""
    order = np.argsort(space.complexity, kind="stable")
    inner = order[(order != 0) & (order != len(space) - 1)]
    strata = np.array_split(inner, max(1, n - 2))
    return {0, len(space) - 1, *(int(rng.choice(stratum)) for stratum in strata[: n - 2])}


def boundary(space: KnobSpace, n: int, rng: np.random.Generator) -> set[int]:
    """Choose the corners first (every knob at its smallest or largest value), then edges and faces, then the inside."""
    extreme = (space.value_indices == 0) | (space.value_indices == np.array(space.sizes) - 1)
    shuffled = rng.permutation(len(space))
    order = sorted(shuffled, key=lambda i: (i not in (0, len(space) - 1), -int(extreme[i].sum())))
    return {int(i) for i in order[:n]}


def lhs(space: KnobSpace, n: int, rng: np.random.Generator) -> set[int]:
    """Draw a Latin hypercube (McKay, Beckman and Conover, 1979): cut each knob's range into n slices, use each once.

    On a grid several points fall on one setting; cubes are drawn until there are n settings, and what is then still
    missing is drawn at random. Cheapest and full replace points of the first cube.
    """
    chosen = {0, len(space) - 1}
    for _ in range(_LHS_ROUNDS):
        points = np.stack([(rng.permutation(n) + rng.random(n)) / n for _ in space.sizes], axis=1)
        indices = (points * np.array(space.sizes)).astype(int)
        for row in np.ravel_multi_index(tuple(indices.T), space.sizes):
            if len(chosen) == n:
                return chosen
            chosen.add(int(row))
    left = [i for i in range(len(space)) if i not in chosen]
    return chosen | {int(i) for i in rng.permutation(left)[: n - len(chosen)]}


STRATEGIES: dict[str, Callable[[KnobSpace, int, np.random.Generator], set[int]]] = {
    "full": full,
    "balanced": balanced,
    "stratified": stratified,
    "boundary": boundary,
    "lhs": lhs,
}


def _number(word: str, part: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise KnobSpaceError(f"{word.strip()!r} in the setting {part!r} is not a number") from None
