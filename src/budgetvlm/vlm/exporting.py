"""A setting of a model as a checkpoint of its own, without the skipped blocks, for any program that loads such models.

In it are the kept blocks' weights under new numbers, all other weights as they were, the configuration with what
changes, and tokenizer, processor, chat template, generation's settings and code as they were. `max_crops` is chosen for
each request and is no part of it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from budgetvlm._io import atomic_directory, first_few, read_json, write_json
from budgetvlm._version import __version__
from budgetvlm.errors import ConfigError, OutputError
from budgetvlm.knobs import Setting
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.cut_check import LogitsOfOneImage, check_parts
from budgetvlm.vlm.cut_config import changes, write_config
from budgetvlm.vlm.cut_weights import KeptBlocks, cut_weights
from budgetvlm.vlm.families.generic import Found
from budgetvlm.vlm.fingerprint import model_fingerprint
from budgetvlm.vlm.loading import check_weights, load, model_directory, read_family, skeleton
from budgetvlm.vlm.probe import setting_with

NOTE = "budgetvlm_export.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"
LEFT = ("config.json", "params.json", "knobs.json", NOTE)  # written anew, or of another layout of the same model
CARRIED = "`max_crops` is no part of a checkpoint: it is chosen for each request, by the image processor's own limit."


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and where to.

    Attributes:
        model_path: model directory or hub name.
        output: the directory that is made.
        num_active_blocks: blocks that are kept; the most of the knob space if not given.
        top_k: experts a token; the most of the knob space if not given.
        overwrite: replace an earlier export.
        copy: write the model also where the setting changes nothing of it.
        verify: load both models and compare their logits; without, no weights are held in memory. A type of model that
            no family is written for is always verified.
        device: PyTorch device for that.
        trust_remote_code: run the Python code that comes with the model.
    """

    model_path: str
    output: Path
    num_active_blocks: int | None = None
    top_k: int | None = None
    overwrite: bool = False
    copy: bool = False
    verify: bool = True
    device: str = "cpu"
    trust_remote_code: bool = False


def export(options: ExportOptions) -> dict[str, Any]:
    """Write a setting of a model as a checkpoint; return its note.

    Raises:
        KnobSpaceError: a value is outside the model's knob space.
        ConfigError: the setting is the whole model, or a checkpoint cannot hold it.
        CheckpointError: the weights are damaged.
        OutputError: the output exists already, lies within the model, or cannot be written.
    """
    directory = model_directory(options.model_path, trust_remote_code=options.trust_remote_code)
    _check_output(options.output, directory, options.overwrite)
    check_weights(directory)
    family = read_family(directory, trust_remote_code=options.trust_remote_code)
    verify = options.verify or isinstance(family, Found)  # nothing but trying shows how that works
    opened = partial(load, trust_remote_code=options.trust_remote_code)
    vlm = opened(options.model_path, device=options.device if verify else "meta")
    setting, kept = _chosen(vlm, options)
    with atomic_directory(options.output) as made:
        _write_small_files(vlm, setting, kept, directory, made)
        check_parts(vlm, skeleton(vlm.family, made), kept, _experts(setting))
        wanted = LogitsOfOneImage(vlm, setting) if verify else None
        note = _note(vlm, setting, kept, directory)
        del vlm  # one model in memory at a time
        cut_weights(directory, made, kept, partial(tqdm, desc="weights", unit="B", unit_scale=True, mininterval=0.5))
        if wanted:
            note["apart"] = wanted.apart_from(opened(str(made), device=options.device))
        note["files"] = sorted({*(path.name for path in made.iterdir()), NOTE})
        write_json(made / NOTE, note)
    return note


def _chosen(vlm: Adapter, options: ExportOptions) -> tuple[Setting, KeptBlocks]:
    """Return the full setting with the values given, and its blocks. Raises KnobSpaceError, ConfigError."""
    values = {"num_active_blocks": options.num_active_blocks, "top_k": options.top_k}
    given = {name: value for name, value in values.items() if value is not None}
    missing = [name for name in given if name not in vlm.knob_space.names]
    if missing:
        raise ConfigError(
            f"{vlm.name} has no knob {' and no knob '.join(missing)}; its knobs are {vlm.knob_space}. `budgetvlm "
            "check-model` says why"
        )
    setting = setting_with(vlm.knob_space, **given)
    kept = KeptBlocks(vlm.active_blocks(int(setting.get("num_active_blocks", whole := vlm.num_total_blocks))), whole)
    experts = {dial.get() for dial in vlm.dials} if "top_k" in setting else set()
    if len(kept.numbers) == whole and experts <= {setting.get("top_k")} and not options.copy:
        raise ConfigError(
            f"this setting is the whole model {vlm.name}, with all of its {whole} blocks and experts: what is written "
            "would be a copy. Give fewer with --num_active_blocks or --top_k, or ask for the copy with --copy"
        )
    _check_features(vlm, kept)
    return setting, kept


def _experts(setting: Setting) -> int | None:
    return int(setting["top_k"]) if "top_k" in setting else None


def _check_features(vlm: Adapter, kept: KeptBlocks) -> None:
    """Check that the blocks behind which visual features are added (deepstack) are kept. Raises ConfigError."""
    levels = vlm.family.deepstack_levels(vlm.model)
    if kept.numbers[:levels] != tuple(range(levels)):
        raise ConfigError(
            f"{vlm.name} adds visual features behind each of its first {levels} blocks, and this setting keeps only "
            f"{list(kept.numbers)}. A checkpoint cannot say so: it would add them elsewhere. Choose a setting that "
            f"keeps the blocks 0 to {levels - 1}, or put them in front in block_order of knobs.json"
        )


def _write_small_files(vlm: Adapter, setting: Setting, kept: KeptBlocks, directory: Path, made: Path) -> None:
    """Write all but the weights and the note."""
    for path in (path for pattern in COPIED for path in directory.glob(pattern)):
        if path.is_file() and path.name not in LEFT and not path.name.endswith(".index.json"):
            shutil.copyfile(path, made / path.name)
    if (directory / TEMPLATES).is_dir():
        shutil.copytree(directory / TEMPLATES, made / TEMPLATES)
    text = vlm.model.config.get_text_config()
    changed = changes(text, kept, _experts(setting), {dial.get() for dial in vlm.dials})
    write_config(directory / "config.json", made / "config.json", text, changed)
    own = read_json(directory / "knobs.json") if (directory / "knobs.json").is_file() else {}
    order = [kept.place(i) for i in vlm.block_order if i in kept.numbers]
    write_json(made / "knobs.json", {**own, "knob_space": _remaining(vlm, setting), "block_order": order})


def _remaining(vlm: Adapter, setting: Setting) -> dict[str, list[Any]]:
    """Return the values that the exported model still has a choice of."""
    most = {name: value for name, value in setting.items() if name != "max_crops"}
    space = vlm.knob_space.to_dict()
    return {name: [value for value in values if value <= most.get(name, value)] for name, values in space.items()}


def _note(vlm: Adapter, setting: Setting, kept: KeptBlocks, directory: Path) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "what": f"{vlm.name} without the blocks that a setting skips. {CARRIED}",
        "model": vlm.name,
        "fingerprint": model_fingerprint(directory),
        "family": vlm.family.name,
        "setting": {name: value for name, value in setting.items() if name != "max_crops"},
        "blocks_kept": list(kept.numbers),
        "blocks_of_the_model": kept.whole,
        "budgetvlm": __version__,
        "apart": None,
    }


def _check_output(output: Path, directory: Path, overwrite: bool) -> None:
    """Check that an output may be written. Raises OutputError: something of the user's is or would be there."""
    place = output.resolve()
    if directory.resolve() in (place, *place.parents) or place in directory.resolve().parents:
        raise OutputError(f"{output} lies within the model's directory or holds it; give another one as --output")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / NOTE).is_file():
        raise OutputError(f"{output} exists and is no earlier export; nothing of yours is replaced. Give another one")
    if not overwrite:
        raise OutputError(f"{output} holds an earlier export. Add --overwrite to replace it, or give another one")
    others = {path.name for path in output.iterdir()} - set(read_json(output / NOTE).get("files", ()))
    if others:
        raise OutputError(
            f"{output} holds {first_few(others)} beside what was exported, which would be lost. Move it, or give "
            "another directory as --output"
        )
