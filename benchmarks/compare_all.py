"""Compare the controller with every rival on your table: `budgetvlm compare` with some 20 policies more.

    python benchmarks/compare_all.py --data data/controller_training_data.json [--output_dir DIR --resume]
    python benchmarks/compare_all.py --table T.parquet --features F.safetensors --policies grpo ppo dpo grpo_8
    python benchmarks/compare_all.py --policies help

All flags are those of `budgetvlm compare`. On two cores it takes about half an hour for 4,000 samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from budgetvlm.commands import compare  # noqa: E402
from budgetvlm.errors import BudgetVLMError  # noqa: E402


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compare.add_arguments(parser)
    args = parser.parse_args(words)
    from benchmarks.rivals.entries import RIVALS

    try:
        return compare.run(args, RIVALS)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept in --output_dir", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
