"""Whether an engine shows images as its model would: told by the prompt's tokens that it counts.

An engine may accept an option and ignore it, so nothing is offered that the count of tokens has not shown to work.
"""

from __future__ import annotations

import warnings

from PIL import Image

from budgetvlm.engines.endpoint import Endpoint
from budgetvlm.errors import BudgetVLMWarning, ConfigError, EngineChangedError, EngineError
from budgetvlm.knobs import Value

Size = tuple[int, int]
PROBE_SIZES: tuple[Size, ...] = (640, 480), (480, 1200), (1600, 900)  # of images whose tokens tell values apart
QUESTION = "what is in this image"


def verify(endpoint: Endpoint, *, strict: bool = False) -> None:
    """Show an engine an image at each `max_crops`, one after another, and keep the values whose tokens are right.

    Args:
        strict: the values were asked for, so that one that does not work is an error.

    Raises:
        EngineError: the engine shows images in another way than its model would.
        ConfigError: it takes no options, and they were asked for.
    """
    own, first = endpoint.max_crops({}), PROBE_SIZES[0]
    counted = num_prompt_tokens(endpoint, first, own)
    if counted is None:
        _without_counts(endpoint, own, strict)
        return
    text = endpoint.sketch.num_text_tokens(QUESTION)
    endpoint.more_text = counted - text - endpoint.sketch.num_image_tokens(first, own)
    _require_right(endpoint, PROBE_SIZES[1], own)
    kept: list[Value] = []
    for value in endpoint.values["max_crops"]:
        try:
            _require_right(endpoint, telling_size(endpoint, value, own), value)
            kept.append(value)
        except (EngineChangedError, ConfigError) as error:
            if strict:
                raise
            if isinstance(error, ConfigError) and endpoint.steer == "kwargs":
                _steer_otherwise(endpoint, own, error)
                return
            warnings.warn(f"{error}; it is not offered", BudgetVLMWarning, stacklevel=2)
    endpoint.values["max_crops"] = tuple(kept) or (own,)


def telling_size(endpoint: Endpoint, value: Value, own: Value) -> Size:
    """Return the size of an image that shows whether a value is heeded or the model's own one stays."""
    tokens = endpoint.sketch.num_image_tokens
    return next((size for size in PROBE_SIZES if tokens(size, value) != tokens(size, own)), PROBE_SIZES[0])


def num_prompt_tokens(endpoint: Endpoint, size: Size, max_crops: Value) -> int | None:
    """Ask about a grey image and return the prompt's tokens that the engine counts; None: it counts none."""
    setting = endpoint.smallest({"max_crops": max_crops})
    body = endpoint.body([Image.new("RGB", size, "grey")], QUESTION, setting, 1, (), fresh=False)
    counted = (endpoint.client.chat(body).usage or {}).get("prompt_tokens")
    return None if counted is None else int(counted)


def _require_right(endpoint: Endpoint, size: Size, value: Value) -> None:
    counted = num_prompt_tokens(endpoint, size, value)
    sketch = endpoint.sketch
    right = sketch.num_image_tokens(size, value) + sketch.num_text_tokens(QUESTION) + endpoint.more_text
    if counted != right:
        raise EngineChangedError(
            f"the engine at {endpoint.client.spec.url} reads an image of {size[0]} x {size[1]} at max_crops={value} "
            f"as a prompt of {counted} tokens where the model of {sketch.vlm.name} has {right}"
        )


def _steer_otherwise(endpoint: Endpoint, own: Value, error: ConfigError) -> None:
    """Go on by pixels, or not at all, where an engine takes no options."""
    scales = endpoint.sketch.scaled_size(Image.new("RGB", PROBE_SIZES[0]), 1) is not None
    endpoint.steer = "pixels" if scales else "none"
    warnings.warn(f"{error}; going on with steer: {endpoint.steer}", BudgetVLMWarning, stacklevel=3)
    if scales:
        verify(endpoint)
    else:
        endpoint.values["max_crops"] = (own,)


def _without_counts(endpoint: Endpoint, own: Value, strict: bool) -> None:
    said = f"the engine at {endpoint.client.spec.url} counts no tokens, so that no way to steer images can be verified"
    if strict and endpoint.values["max_crops"] != (own,):
        raise EngineError(f"{said}; leave max_crops and steer out of the fleet's file")
    warnings.warn(f"{said}; images are shown as it shows them", BudgetVLMWarning, stacklevel=3)
    endpoint.values["max_crops"] = (own,)
