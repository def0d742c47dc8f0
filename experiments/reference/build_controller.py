"""Make the controller, the guard and the example image that come with the bundled model.

    python experiments/reference/build_controller.py --work_dir results/reference_controller

The steps are those of `make quickstart`, and what is measured already is not measured again. Run it on a quiet machine
when the bundled model, the controller or the guard has changed; the results are committed.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from budgetvlm.commands.catalogue import command_parser
from budgetvlm.commands.quickstart_steps import Options, Places, steps
from budgetvlm.controller.checkpoint import GUARD, PRICES, load_controller, save_pretrained
from budgetvlm.tasks import load_task
from budgetvlm.vlm.loading import model_directory

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "signs.png"
EXAMPLE_SAMPLE = "test-00650-0"  # "read the sign in red", in large print, so that little time is enough


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="where profiles and training go")
    parser.add_argument("--data", type=Path, help="controller_training_data.json that is there already")
    parser.add_argument(
        "--num_samples", type=int, default=Options.num_samples, help="samples whose accuracy is measured"
    )
    parser.add_argument("--num_timed", type=int, default=Options.num_timed, help="samples whose latency is measured")
    args = parser.parse_args(argv)
    places = Places(args.work_dir)
    options = Options(num_samples=args.num_samples, num_timed=args.num_timed)
    for step in steps(options, places):
        name, words = step.words[0], list(step.words[1:])
        if name == "evaluate" or (args.data and name in ("profile", "prepare")):
            continue
        if args.data and "--data" in words:
            words[words.index("--data") + 1] = str(args.data)
        parsed = command_parser(name).parse_args([*words, *(["--overwrite"] if name == "train" else [])])
        parsed.run(parsed)
    install(places.controller, model_directory(Options.model_path) / "controller")
    write_example(EXAMPLE)


def install(trained: Path, target: Path) -> None:
    """Put the controller (without what only training needs), its prices and its calibrated guard beside the model."""
    save_pretrained(load_controller(trained), target)
    for name in (GUARD, PRICES):
        shutil.copy(trained / name, target / name)
    print(f"wrote {target}")


def write_example(path: Path) -> None:
    """Draw the example image."""
    samples = load_task("signs").samples("test")
    sample = next(sample for sample in samples if sample.sample_id == EXAMPLE_SAMPLE)
    path.parent.mkdir(exist_ok=True)
    sample.load_image().save(path, optimize=True)
    print(f"wrote {path}: {sample.question}? {sample.answers[0]}")


if __name__ == "__main__":
    main()
