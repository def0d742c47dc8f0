"""Open a model: the bundled one by name, a directory that Transformers wrote, or a repository of the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from budgetvlm._io import read_json
from budgetvlm.errors import BudgetVLMError, CheckpointError, ConfigError, DataError, KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.vlm import blocks
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.families import FAMILIES, supported
from budgetvlm.vlm.families.base import Family
from budgetvlm.vlm.families.generic import Found
from budgetvlm.vlm.knob_limits import derive_knob_space
from budgetvlm.vlm.prompt import Prompt, template_writer
from budgetvlm.vlm.repositories import fetch, is_hub_name

BUNDLED = "reference"
TRUST = "BUDGETVLM_TRUST_REMOTE_CODE"  # "1" is as good as the flag, for commands that have none
SUPPORTED = f"This version runs {supported()}, and the bundled model, named {BUNDLED!r}."

HINTS = {"internvl_chat": "InternVL's repositories whose names end in -HF need no such code and are supported. "}


def load(
    model_path: str, *, device: str = "cpu", num_threads: int | None = None, trust_remote_code: bool = False
) -> Adapter:
    """Open "reference", a hub name, or a directory with `config.json`, `model.safetensors`, tokenizer and preprocessor.

    A `knobs.json` beside them may hold "knob_space", "block_order" and "prompt"; what it lacks is derived from the
    model: powers of two of tiles, fractions of experts and blocks, blocks from early to late, the chat template. On the
    device "meta" the model has no weights, and the directory needs none: it can be looked at, and not run.

    Raises:
        ConfigError: the directory is missing, of an unknown family, or its knobs do not fit it.
        CheckpointError: the weights are damaged or incomplete.
    """
    trust_remote_code = trust_remote_code or os.environ.get(TRUST) == "1"
    directory = model_directory(model_path, trust_remote_code=trust_remote_code)
    family = read_family(directory, trust_remote_code=trust_remote_code)
    if num_threads is not None:
        if num_threads < 1:
            raise ConfigError(f"num_threads={num_threads} cannot run; give at least 1")
        torch.set_num_threads(num_threads)
    if device == "meta":
        model = skeleton(family, directory)
    else:
        check_weights(directory)
        model = _load_model(family, directory, _device(device))
    tokenizer, processor = _load_processors(family, directory)
    return _adapt(model_path, family, directory, model, tokenizer, processor)


def model_directory(model_path: str, *, trust_remote_code: bool = False) -> Path:
    """Find the directory of a model; a repository of the hub is fetched. Raises ConfigError: there is none."""
    if is_hub_name(str(model_path)):
        return fetch(str(model_path), trust_remote_code=trust_remote_code)
    bundled = Path(str(resources.files("budgetvlm.vlm") / BUNDLED))
    directory = bundled if str(model_path) == BUNDLED else Path(model_path)
    if not (directory / "config.json").is_file():
        what = "has no config.json" if directory.is_dir() else "is not a directory"
        raise ConfigError(
            f"model_path={str(model_path)!r}: {directory} {what}. Give the directory of a model in Transformers' "
            f"layout, its hub name, organisation/name, {BUNDLED!r} for the bundled one, or an engine's address, which "
            "begins with http://."
        )
    return directory


def bundled_controller(model_path: str) -> Path:
    """Find the directory of the controller that a model brings. Raises ConfigError."""
    directory = model_directory(model_path) / "controller"
    if not directory.is_dir():
        raise ConfigError(
            f"no controller was given, and the model {model_path!r} brings none. Train one: `budgetvlm quickstart`, or "
            "`budgetvlm profile`, `prepare` and `train --output_dir DIR`; then give DIR (--checkpoint DIR)"
        )
    return directory


def read_family(directory: Path, *, trust_remote_code: bool = False) -> Family:
    """Return the family of a model's directory.

    Raises:
        ConfigError: its config.json cannot be read, it needs remote code that is not trusted, it sees no images, or it
            is of a family that this version does not know; then the message lists what was found of its structure.
    """
    try:
        config = read_json(directory / "config.json")
    except DataError as error:
        raise ConfigError(f"the model's configuration cannot be used: {error}") from None
    config = config if isinstance(config, dict) else {}
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is not None and (trust_remote_code or not family.remote_code):
        return family
    where = f"{directory / 'config.json'} is of model_type {model_type!r}"
    if config.get("auto_map") and not trust_remote_code:
        raise ConfigError(
            f"{where}, which comes with Python code of its own ({', '.join(sorted(config['auto_map']))}). Read that "
            f"code; if you trust it, add --trust_remote_code, or set {TRUST}=1. "
            f"{HINTS.get(str(model_type), '')}".rstrip()
        )
    if not any(word in key for key in _keys(config) for word in ("vision", "visual", "image", "vit")):
        raise ConfigError(f"{where}, a model of text alone: there is no image to choose a resolution for. {SUPPORTED}")
    from budgetvlm.vlm.detect import can_be_tried, describe_structure

    if can_be_tried(str(model_type)):
        return Found(str(model_type))
    found = describe_structure(directory, trust_remote_code=trust_remote_code)
    raise ConfigError(
        f"{where}, which cannot be steered. Looking at its structure gave: {found}. docs/families.md says how to add a "
        f"family. {HINTS.get(str(model_type), '')}{SUPPORTED}"
    )


def _keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Return the keys of a configuration and of those in it, at any depth."""
    for key, value in config.items():
        yield key
        if isinstance(value, Mapping):
            yield from _keys(value)


def _device(device: str) -> torch.device:
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device!r} cannot be used: {str(error).splitlines()[0]}. Try cpu.") from None


def check_weights(directory: Path) -> None:
    """Raise ConfigError where no weights are stored as safetensors."""
    if any(directory.glob("*.safetensors")):
        return
    pickled = next((path.name for path in sorted(directory.glob("*.bin"))), None)
    holds = f"holds {pickled}, a pickle, which can run any code when it is read" if pickled else "holds no weights"
    raise ConfigError(
        f"{directory} {holds}; weights are read from *.safetensors alone. If you trust pytorch_model.bin, convert it "
        'once: python -c "from transformers import AutoModelForImageTextToText as Model; '
        """Model.from_pretrained('DIR').save_pretrained('DIR')", with the directory that holds it for DIR"""
    )


def skeleton(family: Family, directory: Path) -> Any:
    """Return a model without its weights. Raises ConfigError: its configuration does not fit its code."""
    try:
        with torch.device("meta"):
            return family.build(directory)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if isinstance(error, BudgetVLMError):
            raise
        raise ConfigError(f"no model can be built from {directory / 'config.json'}: {error}") from error


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
    except BudgetVLMError:
        raise
    except ImportError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"the model in {directory} needs a package that is not installed: {said}") from error
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
    """Hide Transformers' own progress bar, which is over before it can be read."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_processors(family: Family, directory: Path) -> tuple[Any, Any]:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=family.remote_code
        )
        processor = family.load_processor(directory)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the tokenizer or image processor in {directory} cannot be read: {error}. The directory needs "
            "tokenizer.json, tokenizer_config.json and preprocessor_config.json."
        ) from error
    tokenizer.chat_template = _processors_chat_template(directory) or getattr(tokenizer, "chat_template", None)
    return tokenizer, processor


def _processors_chat_template(directory: Path) -> str | None:
    """Return the chat template in files that only processors read, which come before the tokenizer's own."""
    for name in ("processor_config.json", "chat_template.json"):
        held = read_json(directory / name) if (directory / name).is_file() else {}
        if held.get("chat_template"):
            return held["chat_template"]
    return None


def _adapt(name: str, family: Family, directory: Path, model: Any, tokenizer: Any, processor: Any) -> Adapter:
    knobs, space = _read_knobs(directory / "knobs.json")
    images = family.images_type(model, processor, tokenizer, knobs)
    own = knobs.get("prompt")
    write = template_writer(own, tokenizer.eos_token) if own else family.writer(model, tokenizer)
    prompt = Prompt(tokenizer, write, images.edges(), is_own=bool(own))
    order = knobs.get("block_order") or blocks.default_order(family.num_blocks(model), family.fixed_blocks(model))
    end_ids = _end_ids(model, tokenizer)

    def adapt(knob_space: KnobSpace) -> Adapter:
        return Adapter(str(name), family, model, images, prompt, knob_space, order, end_ids)

    space = space or derive_knob_space(family, model, images)
    if isinstance(family, Found) and "knob_space" not in knobs and model.device.type != "meta":
        from budgetvlm.vlm.finding import working_knobs

        space = working_knobs(directory, space, adapt)
    return adapt(space)


def _read_knobs(path: Path) -> tuple[dict[str, Any], KnobSpace | None]:
    """Return what knobs.json holds, and the knob space in it."""
    if not path.exists():
        return {}, None
    try:
        knobs = read_json(path)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(knobs, dict):
        raise ConfigError(
            f"{path} holds {type(knobs).__name__} instead of an object with knob_space, block_order, prompt"
        )
    try:
        return knobs, KnobSpace(knobs["knob_space"]) if "knob_space" in knobs else None
    except (KnobSpaceError, AttributeError, TypeError) as error:
        raise ConfigError(f"knob_space in {path} cannot be used: {error}") from None


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    found = {int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise ConfigError(
            "the tokenizer has no end token (eos_token), so that no answer would end; name one in its config"
        )
    return sorted(found)
