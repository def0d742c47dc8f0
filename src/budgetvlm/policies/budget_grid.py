"""The budgets that policies are compared at, as shares of the full setting's time, and where they leave a choice.

Shapes: P budgets, S samples (or a single row, where bounds are the same for all), K settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from budgetvlm.guard.input_bounds import BUDGET_SHARES

SOME = 0.005  # a smaller share of the samples is called none


def share_with_choice(bounds_ms: np.ndarray, budgets_ms: Sequence[float]) -> np.ndarray:
    """The share of the samples with at least 0, 1 and 2 allowed settings at each budget, ``[P, 3]``.

    ``bounds_ms``: ``[S, K]``; infinity: never allowed.
    """
    allowed = np.stack([(bounds_ms <= budget).sum(axis=1) for budget in budgets_ms])
    return np.stack([(allowed >= least).mean(axis=1) for least in range(3)], axis=1)


def grid_and_notes(
    shares: tuple[float, ...], bounds_ms: np.ndarray, reference_ms: float
) -> tuple[tuple[float, ...], list[str]]:
    """The grid of `grid_with_choice`, and sentences about a choice that is missing and what was done about it."""
    said, grid = said_of_choice(shares, bounds_ms, reference_ms), grid_with_choice(shares, bounds_ms, reference_ms)
    notes = [] if said is None else [said]
    if grid != shares:
        notes.append(f"Budgets from the bounds are taken instead: {', '.join(f'{share:.3g}' for share in grid)} x.")
    return grid, notes


def grid_with_choice(shares: tuple[float, ...], bounds_ms: np.ndarray, reference_ms: float) -> tuple[float, ...]:
    """The shares, or as many others where they are the usual ones and leave no choice at all.

    The others go from the second smallest bound, above which there is a choice, to the largest; medians over samples.
    """
    budgets_ms = [share * reference_ms for share in shares]
    ordered = np.sort(bounds_ms, axis=1)
    usable = int(np.isfinite(ordered).all(axis=0).sum())
    if shares != BUDGET_SHARES or usable < 2 or (share_with_choice(bounds_ms, budgets_ms)[:, 2] >= SOME).any():
        return shares
    low, high = np.median(ordered[:, [1, usable - 1]], axis=0) / reference_ms
    found = np.ceil(1000 * np.linspace(low, high, len(shares))) / 1000
    return tuple(dict.fromkeys(found.tolist()))


def said_of_choice(shares: Sequence[float], bounds_ms: np.ndarray, reference_ms: float) -> str | None:
    """A sentence that says at which budgets no setting, one or several are allowed; None where all leave a choice."""
    found = share_with_choice(bounds_ms, [share * reference_ms for share in shares])
    if (found[:, 2] > 1 - SOME).all():
        return None
    none, alone, some = list[str](), list[str](), list[str]()
    for share, (_, any_allowed, choice) in zip(shares, found.tolist(), strict=True):
        which = some if choice >= SOME else alone if any_allowed >= 0.5 else none
        part = f" (for {choice:.0%} of the samples)" if SOME <= choice <= 1 - SOME else ""
        which.append(f"{share:.3g}{part}")
    parts = (
        (none, "no setting's bound is within the budget, so every request gets the cheapest setting"),
        (alone, "one setting alone is allowed"),
        (some, "there is a choice"),
    )
    said = [f"at {', '.join(at)} {what}" for at, what in parts if at] + ([] if some else ["no budget leaves a choice"])
    return f"Budgets as shares of the full setting's time: {'; '.join(said)}."
