"""Write a model at one setting as a plain checkpoint, which any engine loads that knows the model's family.

It holds the blocks and the number of experts of the setting, everything else as it was, and our `knobs.json` with the
values that are left. `max_crops` is no part of it: it is chosen for each request.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from budgetvlm.commands.flags import add_json_flag, add_model_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `budgetvlm export`."""
    add = parser.add_argument
    add_model_flags(parser, "model_path")
    add("--num_active_blocks", type=int, metavar="N", help="blocks that are kept (default: the most)")
    add("--top_k", type=int, metavar="N", help="experts a token (default: the most)")
    add("--output", type=Path, required=True, metavar="DIR", help="directory that is made")
    add("--overwrite", action="store_true", help="replace an earlier export")
    add("--copy", action="store_true", help="write the model also where the setting is the whole model")
    add(
        "--no_verify", action="store_false", dest="verify",
        help="do not load both models to compare their logits, which holds one of them in memory at a time",
    )  # fmt: skip
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the model")
    add_model_flags(parser, "device")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Export and say what was written."""
    from budgetvlm.vlm.exporting import CARRIED, ExportOptions, export

    given = {name: value for name, value in vars(args).items() if name in ExportOptions.__dataclass_fields__}
    note = export(ExportOptions(**given))
    if args.json:
        print(json.dumps({"output": str(args.output), **note}, ensure_ascii=False))
        return 0
    setting = ", ".join(f"{name}={value}" for name, value in note["setting"].items())
    apart = note["apart"]
    verdict = "not verified" if apart is None else f"logits within {apart:.1g} standard deviations of the steered model"
    print(f"{args.output}: {note['model']} at {setting}; {verdict}. {CARRIED}")
    return 0
