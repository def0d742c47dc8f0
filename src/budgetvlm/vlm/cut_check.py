"""Whether a model that was written without some blocks is the model that skips them: by its parts, by its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from budgetvlm.errors import ConfigError
from budgetvlm.knobs import Setting
from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.cut_weights import KeptBlocks
from budgetvlm.vlm.families.base import COUNTS_PER_TOKEN
from budgetvlm.vlm.probe import Probe

QUESTION = "What does this image show?"
SIZE = (640, 480)  # of the made-up image
PLACES = ("layer_idx", "layer_index", "block_idx")  # what attributes that hold a block's number end in


def check_parts(vlm: Adapter, model: Any, kept: KeptBlocks, top_k: int | None) -> None:
    """Check that a model has just the kept blocks of another, with experts a token. Raises ConfigError.

    Every block has the same weights and settings as before. Positions, kinds of attention and experts are among them,
    so that a configuration that cannot say which blocks are kept is found out.
    """
    holder, list_name = vlm.family.blocks(model)
    blocks = getattr(holder, list_name)
    wrong = [] if len(blocks) == len(kept.numbers) else [f"it has {len(blocks)} blocks"]
    for place, number in enumerate(kept.numbers):
        if not wrong:
            seen = _differences(vlm.layers[number], blocks[place], kept)
            wrong = [f"block {number}: {one}" for one in seen]
    counts = {dial.get() for dial in vlm.family.dials(model)}
    if top_k is not None and counts != {top_k}:
        wrong.append(f"its routers choose {sorted(counts)} experts")
    if wrong:
        raise ConfigError(
            f"the configuration of {vlm.name} cannot say which blocks are kept and how many experts are chosen: a "
            f"model that is made from it differs ({'; '.join(wrong[:3])}). Choose another setting"
        )


def _differences(block: nn.Module, copied: nn.Module, kept: KeptBlocks) -> Iterator[str]:
    """Yield how a block differs from what it was."""
    shapes, copies = ({k: v.shape for k, v in one.state_dict().items()} for one in (block, copied))
    if shapes != copies:
        names = sorted(name for name in {*shapes, *copies} if shapes.get(name) != copies.get(name))
        yield f"other weights, {names[0]} for example"
        return
    for (name, module), other in zip(block.named_modules(), copied.modules(), strict=True):
        before, after = _settings(module), _settings(other)
        for key in before.keys() | after.keys():
            was, became = before.get(key), after.get(key)
            moved = key.endswith(PLACES) and isinstance(was, int) and kept.place(was) == became
            if was != became and not moved:
                yield f"{name}.{key} is {became} instead of {was}".lstrip(".")


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return the plain values among a module's attributes, without those that a setting changes."""
    plain = (bool, int, float, str, tuple, list, type(None))
    ours = {"training", *COUNTS_PER_TOKEN}
    return {k: v for k, v in vars(module).items() if isinstance(v, plain) and k not in ours and k[0] != "_"}


class LogitsOfOneImage:
    """The logits of a model behind one prompt, to be compared with those of the model that was made from it."""

    def __init__(self, vlm: Adapter, setting: Setting) -> None:
        with torch.inference_mode():
            self.wanted = self._probe(vlm).logits_at(setting).cpu()

    def apart_from(self, exported: Adapter) -> float:
        """Return how far the logits of an exported model's own forward are apart, in standard deviations.

        Raises ConfigError: further than the type of its numbers allows.
        """
        probe = self._probe(exported)
        with torch.inference_mode():
            got = probe.untouched(exported.most_crops).cpu().float()
        apart = float((got - self.wanted.float()).abs().max() / self.wanted.float().std())
        if not apart <= probe.tolerance:
            raise ConfigError(
                f"a model that was made of these blocks differs from the model that skips the others: logits by "
                f"{apart:.2g} standard deviations. It was not kept. Choose another setting"
            )
        return apart

    def _probe(self, vlm: Adapter) -> Probe:
        squares = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        return Probe(vlm, [Image.fromarray(squares).resize(SIZE, Image.Resampling.NEAREST)], [QUESTION])
