"""Open a model: the bundled one by name, or a directory that Transformers wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from budgetvlm._io import read_json
from budgetvlm.errors import CheckpointError, ConfigError, DataError, KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.vlm import blocks
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.families import FAMILIES, supported
from budgetvlm.vlm.families.base import ATTENTION_KINDS, Family, Images, attention_kinds, fractions
from budgetvlm.vlm.prompt import Prompt, chat_template

BUNDLED = "reference"
SUPPORTED = f"This version runs {supported()}, and the bundled model, named {BUNDLED!r}."


def load(model_path: str, *, device: str = "cpu", num_threads: int | None = None) -> Adapter:
    """Open "reference" or a directory with `config.json`, `model.safetensors`, tokenizer and preprocessor files.

    A `knobs.json` beside them may hold "knob_space", "block_order" and "prompt"; what it lacks is derived from the
    model: powers of two of tiles, fractions of experts and blocks, blocks from early to late, the chat template.

    Raises:
        ConfigError: the directory is missing, of an unknown family, or its knobs do not fit it.
        CheckpointError: the weights are damaged or incomplete.
    """
    directory = model_directory(model_path)
    family = read_family(directory)
    if num_threads is not None:
        if num_threads < 1:
            raise ConfigError(f"num_threads={num_threads} cannot run; give at least 1")
        torch.set_num_threads(num_threads)
    model = _load_model(family, directory, _device(device))
    tokenizer, processor = _load_processors(family, directory)
    return _adapt(model_path, family, directory, model, tokenizer, processor)


def model_directory(model_path: str) -> Path:
    """The directory of a model.

    Raises:
        ConfigError: there is none.
    """
    bundled = Path(str(resources.files("budgetvlm.vlm") / BUNDLED))
    directory = bundled if str(model_path) == BUNDLED else Path(model_path)
    if not (directory / "config.json").is_file():
        what = "has no config.json" if directory.is_dir() else "is not a directory"
        raise ConfigError(
            f"model_path={str(model_path)!r}: {directory} {what}. Give the directory of a model in Transformers' "
            f"layout; nothing is downloaded. {SUPPORTED}"
        )
    return directory


def read_family(directory: Path) -> Family:
    """The family of a model's directory.

    Raises:
        ConfigError: its config.json cannot be read, or is of a family that this version does not know.
    """
    try:
        config = read_json(directory / "config.json")
    except DataError as error:
        raise ConfigError(f"the model's configuration cannot be used: {error}") from None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in FAMILIES:
        raise ConfigError(
            f"{directory / 'config.json'} is of model_type {model_type!r}, which cannot be steered. {SUPPORTED}"
        )
    return FAMILIES[model_type]


def _device(device: str) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}. Try cpu.") from None


def _load_model(family: Family, directory: Path, device: torch.device) -> Any:
    try:
        with _quiet():
            model, info = family.load(
                directory,
                dtype=torch.float32 if device.type == "cpu" else "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                # at batch 1 on a CPU a plain loop over the experts that were hit beats grouped products
                experts_implementation="eager",
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"the model in {directory} cannot be read: {error}. Copy or make it again.") from error
    wrong = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"the weights in {directory} do not fit its config.json: {len(wrong)} are missing or of another shape, "
            f"for example {wrong[0]}. Copy or make the model again."
        )
    return model.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Transformers' own progress bar, which is over before it can be read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_processors(family: Family, directory: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        processor = family.load_processor(directory)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the tokenizer or image processor in {directory} cannot be read: {error}. The directory needs "
            "tokenizer.json, tokenizer_config.json and preprocessor_config.json."
        ) from error
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = _older_chat_template(directory)
    return tokenizer, processor


def _older_chat_template(directory: Path) -> str | None:
    """The template of models saved before it moved to chat_template.jinja."""
    path = directory / "chat_template.json"
    return read_json(path).get("chat_template") if path.is_file() else None


def _adapt(name: str, family: Family, directory: Path, model: Any, tokenizer: Any, processor: Any) -> Adapter:
    knobs = _read_knobs(directory / "knobs.json")
    images = family.images(model, processor, tokenizer, knobs)
    holder, list_name = family.blocks(model)
    num_blocks = len(getattr(holder, list_name))
    template = knobs.get("prompt") or chat_template(tokenizer, family.placeholder(model, tokenizer))
    return Adapter(
        name=str(name),
        family=family,
        model=model,
        images=images,
        prompt=Prompt.from_template(tokenizer, template),
        knob_space=_knob_space(knobs, directory) or derive_knob_space(family, model, images),
        block_order=knobs.get("block_order") or blocks.default_order(num_blocks, family.fixed_blocks(model)),
        end_ids=_end_ids(model, tokenizer),
    )


def derive_knob_space(family: Family, model: Any, images: Images) -> KnobSpace:
    """A knob space for a model that brings none: powers and the most of crops, shares of experts and of blocks.

    A knob that the model lacks is left out; so is one that could take one value only, unless none would be left.
    """
    holder, list_name = family.blocks(model)
    num_blocks = len(getattr(holder, list_name))
    knobs: dict[str, list[int]] = {"max_crops": images.crop_values()}
    dials = family.dials(model)
    if dials:
        knobs["top_k"] = fractions(min(dial.get() for dial in dials), (0.25, 0.5, 1.0), least=1)
    if attention_kinds(family.language(model)) <= ATTENTION_KINDS:
        least = blocks.least_depth(num_blocks, family.fixed_blocks(model))
        knobs["num_active_blocks"] = fractions(num_blocks, (0.5, 0.75, 1.0), least=least)
    useful = {name: values for name, values in knobs.items() if len(values) > 1}
    return KnobSpace(useful or {"max_crops": knobs["max_crops"]})


def _read_knobs(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        knobs = read_json(path)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(knobs, dict):
        raise ConfigError(
            f"{path} holds {type(knobs).__name__} instead of an object with knob_space, block_order, prompt"
        )
    return knobs


def _knob_space(knobs: dict[str, Any], directory: Path) -> KnobSpace | None:
    if "knob_space" not in knobs:
        return None
    try:
        return KnobSpace(knobs["knob_space"])
    except (KnobSpaceError, AttributeError, TypeError) as error:
        raise ConfigError(f"knob_space in {directory / 'knobs.json'} cannot be used: {error}") from None


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    found = {int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise ConfigError(
            "the tokenizer has no end token (eos_token), so that no answer would end; name one in its config"
        )
    return sorted(found)
