"""Orders of a model's blocks by importance, measured on calibration prompts.

Both measures run at the model's most tiles and experts. Calibration samples have to be training samples.
Shapes: L blocks, S samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from budgetvlm.vlm.adapter import Adapter
from budgetvlm.vlm.blocks import active_blocks
from budgetvlm.vlm.image_layout import ImageLayout
from budgetvlm.vlm.prompt import EmbeddedPrompt


def order_by_importance(importance: Sequence[float]) -> tuple[int, ...]:
    """Order blocks by importance ``[L]``: first and last, then the others, most important first."""
    last = len(importance) - 1
    inner = sorted(range(1, last), key=lambda block: (-importance[block], block))
    return tuple(dict.fromkeys([0, last, *inner]))


def change_by_block(hidden_states: Sequence[torch.Tensor]) -> list[float]:
    """Return how much each block changes its input: 1 - mean cosine of input and output over the tokens, ``[L]``.

    The "block influence" of ShortGPT (Men et al., 2024, arXiv:2403.03853, eq. 1). A block that hardly turns its input
    can be skipped at little cost.

    Args:
        hidden_states: L + 1 tensors ``[..., C]``: the input of the first block and the output of every block.
    """
    pairs = itertools.pairwise(hidden_states)
    return [1 - float(torch.cosine_similarity(a.float(), b.float(), dim=-1).mean()) for a, b in pairs]


def order_by_score(num_total_blocks: int, score: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Eliminate greedily: skip, one after the other, the inner block whose absence leaves the best score.

    Needs about L² / 2 scores. A block skipped early is unimportant, so the order is that of elimination reversed.

    Args:
        score: quality with only these blocks running (ascending indices), larger is better: accuracy, or minus the
            negative log-likelihood, on a calibration set that is neither validation nor test.
    """
    left = list(range(num_total_blocks))
    skipped: list[int] = []
    while len(left) > 2:
        block = max(left[1:-1], key=lambda b: score(tuple(i for i in left if i != b)))
        left.remove(block)
        skipped.append(block)
    return (*left, *reversed(skipped))


def order_by_addition(num_total_blocks: int, score: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Add greedily: from the first and the last block on, add the one whose presence gives the best score.

    Elimination judges small depths by what little is lost near the full depth; addition starts from them. For a model
    trained to run at few blocks the two can differ much, see `best_order`. Needs about L² / 2 scores.
    """
    order = [0, num_total_blocks - 1]
    while len(order) < num_total_blocks:
        rest = [b for b in range(num_total_blocks) if b not in order]
        order.append(max(rest, key=lambda b: score(tuple(sorted([*order, b])))))
    return tuple(order)


def best_order(
    orders: Sequence[Sequence[int]], depths: Sequence[int], score: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """Return the order with the best mean score over the depths that will be used; the first of equals."""

    def total(order: Sequence[int]) -> float:
        return sum(score(active_blocks(order, depth)) for depth in depths)

    best = max(orders, key=total)
    return tuple(best)


@torch.inference_mode()
def block_changes(vlm: Adapter, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
    """Measure how much each block changes its input, mean over the prompts, ``[L]``; see `change_by_block`."""
    per_prompt = [change_by_block(_hidden_states(vlm, prompt)) for prompt in _prompts(vlm, images, questions)]
    return torch.tensor(per_prompt).mean(0).tolist()


def likelihood(
    vlm: Adapter, images: Sequence[Image.Image], questions: Sequence[str], answers: Sequence[str]
) -> Callable[[tuple[int, ...]], float]:
    """Return a score for `order_by_score`: mean log-likelihood of the answers' tokens when some blocks run."""
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
    return vlm.images.layout_of(image, vlm.most_crops)


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
