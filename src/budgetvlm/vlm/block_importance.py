"""Measuring blocks of a model on calibration prompts, for `budgetvlm.vlm.blocks` to order them.

Both measures run at the model's most tiles and experts. Calibration samples have to be training samples.
Shapes: L blocks, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.blocks import change_by_block
from budgetvlm.vlm.prompt import EmbeddedPrompt, ImageLayout


@torch.inference_mode()
def block_changes(vlm: Adapter, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
    """Measure how much each block changes its input, mean over the prompts, ``[L]``; see `blocks.change_by_block`."""
    per_prompt = [change_by_block(_hidden_states(vlm, prompt)) for prompt in _prompts(vlm, images, questions)]
    return torch.tensor(per_prompt).mean(0).tolist()


def likelihood(
    vlm: Adapter, images: Sequence[Image.Image], questions: Sequence[str], answers: Sequence[str]
) -> Callable[[tuple[int, ...]], float]:
    """Return a score for `blocks.order_by_score`: mean log-likelihood of the answers' tokens when some blocks run."""
    with torch.inference_mode():
        visual = vlm.encode_tiles(images)
    asked = [
        (v, vlm.prompt.question_ids(question), _layout(vlm, image), _answer_ids(vlm, answer))
        for v, image, question, answer in zip(visual, images, questions, answers, strict=True)
    ]

    @torch.inference_mode()
    def score(active: tuple[int, ...]) -> float:
        with vlm.only_blocks(active):
            values = [_log_likelihood(vlm, *parts) for parts in asked]
        return sum(values) / len(values)

    return score


def _layout(vlm: Adapter, image: Image.Image) -> ImageLayout:
    return vlm.encoder.layout(image, vlm.most_crops)


def _prompts(vlm: Adapter, images: Sequence[Image.Image], questions: Sequence[str]) -> list[EmbeddedPrompt]:
    """Return each prompt at the most tiles."""
    asked = zip(vlm.encode_tiles(images), images, questions, strict=True)
    return [vlm.embed_prompt(v, vlm.prompt.question_ids(question), _layout(vlm, image)) for v, image, question in asked]


def _hidden_states(vlm: Adapter, prompt: EmbeddedPrompt) -> list[torch.Tensor]:
    """Return the first block's input and every block's output, L + 1 tensors ``[1, T, C]``."""
    seen = [prompt.embeddings[None]]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(_first(out))) for layer in vlm.layers]
    try:
        vlm.decoder.logits(seen[0], **vlm.decoder_inputs([prompt]).prefill())
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _answer_ids(vlm: Adapter, answer: str) -> list[int]:
    """Return token ids of an answer and its end."""
    tokenizer = vlm.prompt.tokenizer
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def _log_likelihood(
    vlm: Adapter, visual: torch.Tensor, question_ids: np.ndarray, layout: ImageLayout, answer_ids: list[int]
) -> float:
    """Return mean log-probability of the answer's tokens behind the prompt."""
    prompt = vlm.embed_prompt(visual, question_ids, layout, answer_ids[:-1])
    hidden = vlm.decoder.hidden(prompt.embeddings[None], **vlm.decoder_inputs([prompt]).prefill())[0]
    log_probs = vlm.decoder.head(hidden[-len(answer_ids) :]).float().log_softmax(-1)
    return float(log_probs.gather(1, torch.tensor(answer_ids, device=log_probs.device)[:, None]).mean())
