"""Step 1 of the guide: from profiles to training data, as a class and as a script.

    python experiments/controller/data_preparation.py --dataset_name signs --model_path reference \\
        --exp5_dir ./results/profiling/exp5_accuracy --exp6_dir ./results/profiling/exp6_latency \\
        --output_data_path ./data/controller_training_data.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budgetvlm.commands import prepare as command
from budgetvlm.commands.parser import Parser
from budgetvlm.errors import BudgetVLMError
from budgetvlm.profiling.prepare.preparation import prepare
from budgetvlm.profiling.prepare.prepare_options import PrepareOptions
from budgetvlm.profiling.prepare.prepared_data import PreparedData, load_prepared
from budgetvlm.tasks import TaskOptions

__all__ = ["ControllerDataPreparation", "PreparedData", "load_prepared", "main", "prepare"]


@dataclass(frozen=True)
class ControllerDataPreparation:
    """The profiles of one model on one data set, and where their training data goes.

    See `budgetvlm.profiling.prepare.prepare_options.PrepareOptions` for the arguments and the errors.
    """

    exp5_dir: str | Path
    exp6_dir: str | Path
    dataset_name: str
    model_path: str
    output_data_path: str | Path
    train_split: float = 0.8
    test_split: float | None = None
    seed: int = 0

    def prepare(self, force_recompute: bool = False) -> PreparedData:
        """Make the data, or take what is there."""
        options = PrepareOptions(
            Path(self.exp5_dir),
            Path(self.exp6_dir),
            TaskOptions(self.dataset_name),
            self.model_path,
            Path(self.output_data_path),
            train_split=self.train_split,
            test_split=self.test_split,
            seed=self.seed,
        )
        return prepare(options, force_recompute=force_recompute)

    def load(self) -> PreparedData:
        """The data that was made before."""
        return load_prepared(self.output_data_path)


def parser() -> Parser:
    """The flags of `budgetvlm prepare`."""
    result = Parser(prog="data_preparation.py", description=command.__doc__)
    command.add_arguments(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code, 2 for a mistake that the user can mend."""
    try:
        return command.run(parser().parse_args(argv))
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
