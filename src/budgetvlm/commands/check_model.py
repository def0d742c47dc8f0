"""List the knobs of a model and prove that they do what they say, on your own machine or behind an engine.

Exit codes: 0 all checks hold, 1 one does not, 2 the model cannot be checked (missing, gated, of unknown family, ...).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from budgetvlm.commands.flags import add_json_flag, add_model_flags
from budgetvlm.errors import ConfigError

if TYPE_CHECKING:
    from budgetvlm.knobs import Setting
    from budgetvlm.vlm.adapter import Adapter
    from budgetvlm.vlm.conformance import Check

FAILED = 1
QUESTIONS = ("What does the sign in the middle say?", "Count the squares.")
SIZES = ((1280, 960), (500, 900))  # of the made-up images: large enough that more crops show more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `budgetvlm check-model`."""
    add = parser.add_argument
    add(
        "model",
        metavar="ID_OR_DIR",
        nargs="?",
        help="model directory, hub name (organisation/name), 'reference', or as --engine",
    )
    add("--engine", metavar="URL_OR_YAML", help="check the engine at this address, or those of a fleet's file")
    add("--model_path", metavar="DIR", help="of an engine: its model's configuration, tokenizer, image processor")
    add("--image", metavar="FILE", help="image to check with (default: one that is made up)")
    add("--question", metavar="TEXT", help="question to check with")
    add("--quick", action="store_true", help="settings that differ in one knob, instead of all")
    add("--repeats", type=int, default=3, metavar="N", help="timed requests at each setting; 0: none (default: 3)")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the model")
    add_model_flags(parser, "num_threads", "device")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Open the model, or speak to the engines, check, time and report."""
    from budgetvlm.engines.opening import is_engine

    if args.repeats < 0:
        raise ConfigError(f"repeats={args.repeats} cannot be timed; give 0 for no timing, or a positive number")
    if engine := args.engine or (args.model and is_engine(args.model) and args.model):
        return _run_engine(args, engine)
    if args.model is None:
        raise ConfigError("name a model (its directory, hub name, or reference), or an engine with --engine")
    return _run_model(args)


def _run_engine(args: argparse.Namespace, engine: str) -> int:
    from budgetvlm.commands.check_engine import check_fleet, fleet_text

    found = check_fleet(engine, args.model_path, _say, repeats=args.repeats, trust_remote_code=args.trust_remote_code)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        suggested = Text(f"\nAs a fleet's file (engines.yaml):\n\n{fleet_text(found['fleet'])}")
        Console(highlight=False).print(*map(page, found["engines"]), suggested, sep="\n")
    return 0 if found["passed"] else FAILED


def _run_model(args: argparse.Namespace) -> int:
    from budgetvlm.vlm.conformance import check, time_settings
    from budgetvlm.vlm.loading import load
    from budgetvlm.vlm.probe import Probe, one_knob_at_a_time

    images, questions = _asked(args)
    vlm = load(args.model, device=args.device, num_threads=args.num_threads, trust_remote_code=args.trust_remote_code)
    settings = one_knob_at_a_time(vlm.knob_space) if args.quick else None
    probe = Probe(vlm, images, questions, settings)
    checks = check(probe, _say)
    times = {}
    if args.repeats > 0 and checks[-1].passed:
        _say("time per setting")
        times = time_settings(probe, repeats=args.repeats)
    found = document(vlm, probe, checks, times)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        Console(highlight=False).print(page(found))
    return FAILED if any(one.passed is False for one in checks) else 0


def _asked(args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """Return two images and questions of different lengths: a batch of them has to be padded."""
    from budgetvlm._io import open_image

    images = [made_up_image(size) for size in SIZES]
    if args.image:
        images[0] = open_image(args.image)
    return images, [args.question or QUESTIONS[0], QUESTIONS[1]]


def made_up_image(size: tuple[int, int]) -> Any:
    """Draw coloured squares of many sizes: something to see at every resolution."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse, fine = (
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
        for side in (7, 61)
    )
    return Image.blend(coarse, fine, 0.5)


def _say(line: str) -> None:
    print(f"... {line}", file=sys.stderr, flush=True)


def document(vlm: Adapter, probe: Any, checks: list[Check], times: dict[Setting, dict[str, float]]) -> dict[str, Any]:
    """Return everything as plain values."""
    tokens, _ = vlm.prompt_size(probe.images[0], probe.questions[0])
    promised = dict(zip(vlm.knob_space.settings, tokens.tolist(), strict=True))
    return {
        "schema_version": 1,
        "model": vlm.name,
        "family": vlm.family.name,
        "class": type(vlm.model).__name__,
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        "device": str(vlm.model.device),
        "image": list(probe.images[0].size),
        "knob_space": vlm.knob_space.to_dict(),
        "found": found(vlm),
        "blocks_in_order_of_importance": list(vlm.block_order),
        "passed": all(one.passed is not False for one in checks),
        "checks": [asdict(one) for one in checks],
        "times_ms": [
            {**setting, "visual_tokens": promised[setting], **{name: round(ms, 3) for name, ms in stages.items()}}
            for setting, stages in times.items()
        ],
    }


def found(vlm: Adapter) -> dict[str, str]:
    """Say of each knob where it lives, or why there is none."""
    names = {id(module): name for name, module in vlm.model.named_modules()}
    holder, list_name = vlm.family.blocks(vlm.model)
    depth = f"{names.get(id(holder), type(holder).__name__)}.{list_name}, {vlm.num_total_blocks} blocks"
    experts = "none: no router was found, the language model is dense"
    if vlm.dials:
        first, others = vlm.dials[0], len(vlm.dials) - 1
        owner = names.get(id(first.owner), type(first.owner).__name__)
        experts = (
            f"{owner}.{first.name}{f' and {others} more' if others else ''}; {first.get()} of {first.most} experts"
        )
    kept = list(vlm.family.fixed_blocks(vlm.model))
    return {
        "max_crops": f"{vlm.family.crop_meaning}; at most {vlm.images.most_crops}",
        "top_k": experts,
        "num_active_blocks": depth
        + ("; a skipped block leaves a stand-in" if vlm.family.goes_by_place(vlm.model) else "")
        + (f"; always run: {kept}" if kept else ""),
    }


def page(found: dict[str, Any]) -> RenderableType:
    """Return the document as one page for people."""
    names = ("url", "kind") if "url" in found else ("class", "dtype", "device")
    head = f"{found['model']}: {found['family']}, {', '.join(found[name] for name in names)}\n"
    knobs, values = _table("Knobs", "knob", "values", "where it lives"), found["knob_space"]
    for name, place in found["found"].items():
        knobs.add_row(name, ", ".join(f"{v:g}" for v in values[name]) if name in values else "-", Text(place))
    checks = _table("Checks", "", "check", "seen")
    words = {True: "[green]holds[/]", False: "[red]BROKEN[/]", None: "-"}
    for one in found["checks"]:
        checks.add_row(words[one["passed"]], one["name"], Text(one["detail"]))
    failed = sum(one["passed"] is False for one in found["checks"])
    verdict = f"{failed} checks do not hold: do not steer this model" if failed else "All checks hold."
    times = [_times_table(found["times_ms"], list(values))] if found["times_ms"] else []
    return Group(Text(head), knobs, checks, *times, Text(verdict, style="red" if failed else "green"))


def _times_table(times: list[dict[str, Any]], knobs: list[str]) -> Table:
    """One row for each setting: its knobs, its visual tokens and the time of each stage."""
    titles = {name: "\n_".join(name.rsplit("_", 1)) for name in knobs if len(name) > 8}  # to fit into 80 characters
    titles["visual_tokens"] = "visual\ntokens"
    columns = [titles.get(name, name) for name in times[0]]
    table = _table("Time per setting, the fastest of a few requests (ms)", *columns, justify="right")
    whole = {*knobs, "visual_tokens"}
    for row in times:
        table.add_row(*(f"{value:g}" if name in whole else f"{value:.1f}" for name, value in row.items()))
    return table


def _table(title: str, *columns: str, justify: Literal["left", "right"] = "left") -> Table:
    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", collapse_padding=True, pad_edge=False
    )
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    return table
