"""Whether an engine shows images as its model would: told by the prompt's tokens that it counts.

An engine may accept an option and ignore it, so nothing is offered that the count of tokens has not shown to work.
"""

from __future__ import annotations

import warnings

from PIL import Image

from budgetvlm.engines.endpoint import Ask, Endpoint
from budgetvlm.engines.engine_client import Reply
from budgetvlm.engines.payload import Size
from budgetvlm.errors import BudgetVLMWarning, ConfigError, EngineChangedError, EngineError
from budgetvlm.knobs import Value

PROBE_SIZES: tuple[Size, ...] = (640, 480), (480, 1200), (1600, 900)  # of images whose tokens tell values apart
MORE_TEXT = 64  # tokens around a question, more than the model's own, that an engine's chat template may have
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
    ask, reply = reading(endpoint, first, own)
    counted = (reply.usage or {}).get("prompt_tokens")
    if counted is None:
        _without_counts(endpoint, own, strict)
        return
    endpoint.more_text = 0
    more_text = counted - sum(endpoint.prompt_size(ask))
    if abs(more_text) > MORE_TEXT:
        endpoint.check(ask, reply, f"an image of {first[0]} x {first[1]}")
    endpoint.more_text = more_text
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


def reading(endpoint: Endpoint, size: Size, max_crops: Value) -> tuple[Ask, Reply]:
    """Ask an engine about a grey image, for one token."""
    image = Image.new("RGB", size, "grey")
    ask = Ask([image], QUESTION, endpoint.smallest({"max_crops": max_crops}), 1)
    return ask, endpoint.client.chat(endpoint.body(ask))


def _require_right(endpoint: Endpoint, size: Size, value: Value) -> None:
    ask, reply = reading(endpoint, size, value)
    endpoint.check(ask, reply, f"an image of {size[0]} x {size[1]} at max_crops={value}")


def _steer_otherwise(endpoint: Endpoint, own: Value, error: ConfigError) -> None:
    """Go on by pixels, or not at all, where an engine takes no options."""
    scales = endpoint.sketch.scales
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
