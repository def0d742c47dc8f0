"""Everything once, with the bundled task and model: profile, prepare, train, evaluate, calibrate, three decisions.

Each step is one of the other commands, shown as it could be typed. A second run uses what the first one finished.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from budgetvlm._io import read_json, write_json
from budgetvlm.commands.flags import OptionFlags
from budgetvlm.commands.quickstart_steps import Options, Places, steps
from budgetvlm.errors import OutputError

OPTIONS_FILE = "quickstart.json"
FLAGS = OptionFlags(Options, *Options.__dataclass_fields__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `budgetvlm quickstart`."""
    parser.add_argument(
        "--output_dir", type=Path, default=Places.root, metavar="DIR", help=f"where all goes (default: {Places.root})"
    )
    FLAGS.add(parser)


def run(args: argparse.Namespace) -> int:
    """Run the steps, then show three decisions and where the picture is."""
    from budgetvlm.commands.catalogue import command_parser
    from budgetvlm.commands.quickstart_examples import decisions
    from budgetvlm.controller.checkpoint import GUARD

    options, places = Options(**FLAGS.read(args)), Places(args.output_dir)
    _require_same_options(options, places.root)
    started = time.monotonic()
    todo = steps(options, places)
    for number, step in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {step.title}", flush=True)
        name, *words = step.words
        if name == "calibrate" and read_json(places.controller / GUARD).get("calibrated_on"):
            print("it is calibrated already")
            continue
        print(f"$ {step.command}", flush=True)
        earlier = {"train": [_earlier_run(places)], "evaluate": ["--overwrite"]}.get(name, [])
        step_args = command_parser(name).parse_args([*words, *earlier])
        step_args.run(step_args)
    print("\nThree decisions")
    for line in decisions(options.model_path, places):
        print(line, flush=True)
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. Picture: {places.picture}")
    return 0


def _earlier_run(places: Places) -> str:
    """What training does with an earlier run: it replaces one that is older than the data, and goes on with others."""
    from budgetvlm.controller.checkpoint import LAST

    last = places.controller / LAST
    return "--overwrite" if last.exists() and last.stat().st_mtime < places.data.stat().st_mtime else "--resume"


def _require_same_options(options: Options, root: Path) -> None:
    """Note the options of a first run, or raise OutputError where the directory holds a run with other options."""
    path = root / OPTIONS_FILE
    if not path.exists():
        write_json(path, asdict(options))
    elif (found := read_json(path)) != asdict(options):
        raise OutputError(
            f"{root} holds a quickstart with other options ({found}, now {asdict(options)}). "
            f"Choose another --output_dir, or remove {root}."
        )
