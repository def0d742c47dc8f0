"""What a comparison compares, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from budgetvlm.comparison.roster import ROSTER
from budgetvlm.controller.training_options import LARGEST_SEED
from budgetvlm.errors import ConfigError
from budgetvlm.evaluation.evaluation_options import EvaluationOptions

SECTIONS = ("policies", "knobs", "features", "samples")
SIZES = (100, 200, 400, 800, 1600)


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
        evaluation: split, budgets, prices, labels, guard and resamples, see `EvaluationOptions`.
        policies: keys of `ROSTER`; the lookup table, the blind mix and the bounds are always compared.
        seeds: a policy that is learnt at random is learnt once for each of them.
        sections: "policies" compares the policies as they are; "knobs", "features" and "samples" leave
            some of these out.
        sizes: numbers of training and validation samples in the section "samples", as far as the table has them.
        members: number of controllers in an ensemble.
        num_epochs: most epochs of any policy that the trainer learns.

    Raises:
        ConfigError: some options cannot work; the message lists all of them.
    """

    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    policies: tuple[str, ...] = tuple(ROSTER)
    seeds: tuple[int, ...] = (0, 1, 2)
    sections: tuple[str, ...] = SECTIONS
    sizes: tuple[int, ...] = SIZES
    members: int = 5
    num_epochs: int = 100

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ConfigError("this comparison cannot be done: " + "; ".join(problems))


def _problems(options: CompareOptions) -> Iterator[str]:
    unknown = [name for name in options.policies if name not in ROSTER]
    if unknown:
        yield f"there is no policy {', '.join(unknown)}; choose from {', '.join(ROSTER)}"
    in_range = all(0 <= seed <= LARGEST_SEED for seed in options.seeds)
    if not options.seeds or not in_range or len(set(options.seeds)) != len(options.seeds):
        yield f"seeds {list(options.seeds)} must be different whole numbers from 0 to 2**62, one at least"
    strange = [name for name in options.sections if name not in SECTIONS]
    if strange or not options.sections:
        yield f"sections {list(options.sections)} must be some of {', '.join(SECTIONS)}"
    if not options.sizes or min(options.sizes) < 10:
        yield f"sizes {list(options.sizes)} must be numbers of samples of at least 10"
    for name in ("members", "num_epochs"):
        if getattr(options, name) < 1:
            yield f"{name}={getattr(options, name)} must be at least 1"
