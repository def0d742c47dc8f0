"""What can be seen of a model of an unknown family: blocks, routers, limits of its image processor.

Nothing is run and no weight is read: the model is built from its configuration on torch's "meta" device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from budgetvlm.vlm.attention import unknown_kinds
from budgetvlm.vlm.families.base import COUNTS_PER_TOKEN

_NOT_LANGUAGE = (
    "vision", "visual", "vit", "image", "audio", "encoder", "resampler", "perceiver", "projector", "talker",
)  # fmt: skip
_LIMITS = (
    "max_crops", "max_patches", "max_num_tiles", "max_dynamic_patch", "image_grid_pinpoints", "split_resolutions",
    "pan_and_scan_max_num_crops", "max_soft_tokens", "max_pixels", "max_image_size", "max_slice_nums", "size",
)  # fmt: skip


def describe_structure(directory: Path, *, trust_remote_code: bool = False) -> str:
    """Say of each knob what was found in a model, and why something could not be looked at."""
    from transformers import AutoConfig, AutoImageProcessor

    problems: list[str] = []
    local = partial(_attempt, problems, trust_remote_code=trust_remote_code, local_files_only=True)
    config = local("its configuration cannot be read", AutoConfig.from_pretrained, directory)
    model = _attempt(problems, "Transformers cannot build it", _build, config, trust_remote_code) if config else None
    read_processor = partial(AutoImageProcessor.from_pretrained, backend="pil")
    processor = local("its image processor cannot be read", read_processor, directory)
    blocks, routers = (find_blocks(model), find_routers(model)) if model is not None else (None, {})
    first = next((f"the first {name} = {value}" for name, value in routers.items()), "")
    bounds = ", ".join(f"{name}={str(value)[:60]}" for name, value in limits(processor).items())
    parts = [
        f"num_active_blocks: {blocks or 'no list of decoder blocks'}",
        f"top_k: {len(routers)} places, {first}" if routers else "top_k: no router with a top_k",
        f"max_crops: {bounds or 'no limit found'}",
    ]
    return "; ".join([*parts, *problems])


def can_be_tried(model_type: str) -> bool:
    """Tell whether Transformers itself opens this type as a model that answers questions about images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def find_blocks(model: nn.Module) -> str | None:
    """Find the longest list of blocks with attention, outside of what sees or hears, as "model.layers (32)"."""
    found = [
        (len(module), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and is_language(name) and _has_attention(module[0])
    ]
    longest = max(found, key=lambda one: one[0], default=None)
    if longest is None:
        return None
    foreign = unknown_kinds(model.get_submodule(longest[1].rpartition(".")[0]))
    cannot = f", which cannot be skipped: of {', '.join(foreign)} no cache is known" if foreign else ""
    return f"{longest[1]} ({longest[0]}){cannot}"


def find_routers(model: nn.Module) -> dict[str, int]:
    """Find attributes of modules that hold a number of experts per token, or else fields of the configuration."""
    held = {
        f"{name}.{count}": int(vars(module)[count])
        for name, module in model.named_modules()
        for count in COUNTS_PER_TOKEN
        if is_language(name) and isinstance(vars(module).get(count), int)
    }
    config: Any = getattr(model, "config", None)
    text = config and config.get_text_config()
    told = {f"config.{count}": getattr(text, count, None) for count in COUNTS_PER_TOKEN}
    return held or {name: value for name, value in told.items() if isinstance(value, int)}


def limits(processor: Any) -> dict[str, Any]:
    """Return what bounds an image's size or number of parts."""
    return {name: value for name in _LIMITS if (value := getattr(processor, name, None)) is not None}


def _build(config: Any, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with torch.device("meta"):
        try:
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
        except Exception:  # remote code may raise anything
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _attempt(problems: list[str], problem: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return what a call returns; None where it fails, which is noted as a problem."""
    try:
        return call(*args, **options)
    except Exception as error:  # remote code may raise anything
        problems.append(f"{problem} ({next(iter(str(error).strip().splitlines()), type(error).__name__)})")
        return None


def is_language(name: str) -> bool:
    """Tell whether a module or weight of this name is the language model's, as far as names tell."""
    return not any(word in part for part in name.lower().split(".") for word in _NOT_LANGUAGE)


def _has_attention(block: nn.Module) -> bool:
    return any("att" in name.lower() for name, _ in block.named_modules())
