"""Train the bundled vision-language model from scratch, from a seed, on a CPU in about an hour and a half.

    python -m experiments.reference.train_reference --output_dir build/reference --threads 2

Every lesson is saved when it ends, and the joint lesson every 500 steps; a second call goes on after the last lesson
that was finished. The first two lessons need nothing from each other: ``--lessons language --threads 1`` and
``--lessons vision --threads 1`` side by side, then the rest, take less time than all in turn. ``--export`` writes the
model directory that the package ships: bfloat16 weights, tokenizer, image processor, knob space and the order in which
blocks stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.block_orders import best_order, likelihood, order_by_addition, order_by_score
from budgetvlm._io import atomic_path, write_json
from budgetvlm.errors import BudgetVLMError, ConfigError
from budgetvlm.tasks import signs
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.blocks import default_order

from . import stages
from .build import KNOB_SPACE, PROMPT, build_image_processor, build_model, build_tokenizer

LESSONS = ("language", "vision", "joint")
# What each saved file holds; the joint lesson saves everything.
PARTS = {
    "language": ("model.language_model.", "lm_head."),
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "joint": ("",),
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run(args)
    except BudgetVLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where the lessons are saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--lessons", nargs="+", choices=LESSONS, default=list(LESSONS), help="default: all, in order")
    parser.add_argument("--language_steps", type=int, default=1600)
    parser.add_argument("--vision_steps", type=int, default=2200)
    parser.add_argument("--projector_steps", type=int, default=500)
    parser.add_argument("--joint_steps", type=int, default=1700)
    parser.add_argument("--export", type=Path, help="write the newest lesson as a model here and stop")
    parser.add_argument("--order_scenes", type=int, default=64, help="--export: scenes to measure the blocks on")
    return parser


def run(args: argparse.Namespace) -> None:
    out = args.output_dir
    model = build_model(args.seed)
    if args.export:
        export(model, newest(out), args.export, args.order_scenes)
        return
    log = stages.Log()
    if "language" in args.lessons:
        _language(model, log, out, args)
    if "vision" in args.lessons:
        _vision(model, log, out, args)
    if "joint" in args.lessons:
        _joint(model, log, out, args)


def _language(model: torch.nn.Module, log: stages.Log, out: Path, args: argparse.Namespace) -> None:
    if not _load(model, out, "language"):
        perfect = stages.learn_language(model, log, steps=args.language_steps, seed=args.seed)
        save_file(perfect.state_dict(), out / "perfect.safetensors")
        _save(model, out, "language", log)


def _vision(model: torch.nn.Module, log: stages.Log, out: Path, args: argparse.Namespace) -> None:
    if not _load(model, out, "vision"):
        stages.learn_vision(model, log, steps=args.vision_steps, seed=args.seed)
        _save(model, out, "vision", log)


def _joint(model: torch.nn.Module, log: stages.Log, out: Path, args: argparse.Namespace) -> None:
    for needed in ("language", "vision"):
        if not _load(model, out, needed):
            raise ConfigError(f"{out} holds no lesson {needed!r}, which the joint lesson needs; run --lessons {needed}")
    perfect = torch.nn.Linear(stages.CONTENT, model.config.text_config.hidden_size, bias=False)
    perfect.load_state_dict(load_file(out / "perfect.safetensors"))
    if not _load(model, out, "projector"):
        stages.learn_projector(model, perfect, log, steps=args.projector_steps, seed=args.seed)
        _save(model, out, "projector", log)
    for _ in stages.learn_joint(model, log, steps=args.joint_steps, seed=args.seed + 1):
        _save(model, out, "joint", log)


def _load(model: torch.nn.Module, out: Path, lesson: str) -> bool:
    path = out / f"{lesson}.safetensors"
    if not path.exists():
        return False
    model.load_state_dict(load_file(path), strict=False)
    return True


def _save(model: torch.nn.Module, out: Path, lesson: str, log: stages.Log) -> None:
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(PARTS[lesson])}
    with atomic_path(out / f"{lesson}.safetensors") as temporary:
        save_file(weights, temporary)
    write_json(out / f"{lesson}.log.json", log.records)


def newest(out: Path) -> Path:
    """The last lesson that was saved. Raises ConfigError if there is none."""
    for name in ("joint", "projector", "vision", "language"):
        if (out / f"{name}.safetensors").exists():
            return out / f"{name}.safetensors"
    raise ConfigError(f"{out} holds no saved lesson; train first, without --export")


def export(model: Any, weights: Path, target: Path, order_scenes: int) -> None:
    """Write the directory that `budgetvlm.vlm.load_vlm` opens; the order of the blocks is measured on it."""
    model.load_state_dict(load_file(weights), strict=False)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    build_tokenizer().save_pretrained(target)
    build_image_processor().save_pretrained(target)
    document: dict[str, Any] = {"knob_space": KNOB_SPACE, "prompt": PROMPT}
    _write_knobs(target, document)
    document["block_order"] = list(measured_order(load_vlm(str(target)), order_scenes))
    _write_knobs(target, document)
    print(f"wrote {target}; blocks, most important first: {document['block_order']}")


def _write_knobs(target: Path, document: dict[str, Any]) -> None:
    (target / "knobs.json").write_text(json.dumps(document) + "\n")


def measured_order(vlm: Any, num_scenes: int) -> tuple[int, ...]:
    """The best of three orders of the blocks, by the likelihood of answers to questions about training scenes."""
    scenes = [signs.make_scene(signs.scene_seed("pretrain", i)) for i in range(num_scenes)]
    questions = [signs.ask(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    images = [signs.draw(scene) for scene in scenes]
    score = likelihood(vlm, images, [q.text for q in questions], [q.answer for q in questions])
    count = vlm.num_total_blocks
    orders = (default_order(count), order_by_score(count, score), order_by_addition(count, score))
    return best_order(orders, KNOB_SPACE["num_active_blocks"], score)


if __name__ == "__main__":
    sys.exit(main())
