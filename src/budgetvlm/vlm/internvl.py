"""Where the knobs of the InternVL family live in Transformers' `InternVLForConditionalGeneration`.

    max_crops          an argument of the image processor, given at each call
    top_k              the attribute of every router of a mixture-of-experts language model
    num_active_blocks  which decoder layers the language model's list holds

Any language model that Transformers' InternVL can hold will do: one without experts has no `top_k` knob.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import KnobSpace

MODEL_TYPE = "internvl"


def language_model(model: Any) -> Any:
    """The decoder, with `layers`, `embed_tokens` and a forward from embeddings to hidden states."""
    return model.model.language_model


def routers(model: Any) -> list[Any]:
    """Every module that sends tokens to experts, in the order of the blocks; none in a dense model."""
    found = language_model(model).modules()
    return [m for m in found if isinstance(getattr(m, "top_k", None), int) and hasattr(m, "num_experts")]


def check_blocks(model: Any) -> None:
    """Skipping blocks needs blocks of one kind: decoders look a layer's kind of attention up by its place in the list.

    Raises:
        ConfigError: the language model mixes kinds of attention.
    """
    kinds = set(getattr(language_model(model).config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ConfigError(
            f"this language model mixes kinds of attention ({', '.join(sorted(kinds))}), so that skipping blocks would "
            "give a block another's mask; this version supports models with one kind"
        )


def encode(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Projected visual tokens of tiles ``[n, 3, H, W]`` -> ``[n, T, C]``."""
    return model.get_image_features(pixel_values=pixel_values).pooler_output


def derive_knob_space(model: Any, max_patches: int) -> KnobSpace:
    """A knob space for a model that brings none: powers of two and the most tiles, half and whole of the rest."""
    num_blocks = len(language_model(model).layers)
    knobs: dict[str, list[int]] = {"max_crops": sorted({n for n in (1, 2, 4, 8) if n < max_patches} | {max_patches})}
    found = routers(model)
    if found:
        knobs["top_k"] = _fractions(int(found[0].top_k), (0.25, 0.5, 1.0), least=1)
    knobs["num_active_blocks"] = _fractions(num_blocks, (0.5, 0.75, 1.0), least=2)
    return KnobSpace(knobs)


def _fractions(whole: int, fractions: tuple[float, ...], least: int) -> list[int]:
    return sorted({max(least, math.ceil(f * whole)) for f in fractions})
