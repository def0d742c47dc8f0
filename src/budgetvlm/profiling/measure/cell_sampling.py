"""Which cells of (sample, setting) a latency sweep measures, where it does not measure all.

Shapes: S samples, K settings of the model's whole knob space.
"""

from __future__ import annotations

import numpy as np

from budgetvlm.errors import ConfigError


def draw_cells(num_samples: int, num_settings: int, cells: float, seed: int) -> np.ndarray:
    """Draw the cells to measure, bool ``[S, K]``: equally many of each sample, and of each setting up to one.

    At random, the settings that were taken least first. They are drawn for the whole space, so that settings which are
    measured later change nothing for the others.

    Args:
        cells: share of the settings that each sample gets; of a share of a setting it gets none.

    Raises:
        ConfigError: a share that cannot be, or one that leaves a sample or a setting without a measurement.
    """
    if not 0 < cells <= 1:
        raise ConfigError(f"cells={cells:g} is no share of the cells; give a number above 0 and up to 1, like 0.25")
    each = int(cells * num_settings + 1e-9)
    if each < 1 or each * num_samples < num_settings:
        raise ConfigError(
            f"cells={cells:g} of {num_settings} settings x {num_samples} samples leaves some without a measurement. "
            f"Give {max(1.0, num_settings / num_samples) / num_settings:.2g} or more, or time more samples."
        )
    rng, taken = np.random.default_rng(seed), np.zeros(num_settings, dtype=int)
    plan = np.zeros((num_samples, num_settings), dtype=bool)
    for row in plan:
        chosen = np.lexsort((rng.random(num_settings), taken))[:each]
        row[chosen] = True
        taken[chosen] += 1
    return plan
