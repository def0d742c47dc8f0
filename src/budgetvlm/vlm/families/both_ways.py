"""Masks of models in which the tokens of an image see each other in both directions when the prompt is read."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, ClassVar

import torch

from budgetvlm.vlm.prompt import DecoderInputs


class BothWaysInputs(DecoderInputs):
    """Visual tokens that stand together see each other.

    Masks are made by the model's own function, ``module:name``: windows and runs of visual tokens combine differently
    in each generation.
    """

    create_masks: ClassVar[str]

    def prefill(self) -> dict[str, Any]:
        masks = resolve_name(self.create_masks)(
            config=self.model.config.get_text_config(),
            inputs_embeds=self.embeddings(),
            attention_mask=self.mask if self.padded else None,
            past_key_values=None,
            position_ids=self.positions if self.padded else None,
            block_sequence_ids=self._runs(),
        )
        return {**super().prefill(), "attention_mask": masks}

    def _runs(self) -> torch.Tensor:
        """Return the number of the run of visual tokens that each token belongs to, -1 for text, ``[B, T]``."""
        visual = self.pad([prompt.visual_mask() for prompt in self.prompts])
        begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        return torch.where(visual, begins.long().cumsum(1) - 1, -1)
