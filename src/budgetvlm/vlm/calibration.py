"""Measuring blocks of a model on calibration prompts, for `budgetvlm.vlm.blocks` to order them.

Both measures run at the model's most tiles and experts. Calibration samples have to be training samples.
Shapes: L blocks, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from budgetvlm.vlm.adapter import InternVLAdapter
from budgetvlm.vlm.blocks import change_by_block


@torch.inference_mode()
def block_changes(vlm: InternVLAdapter, images: Sequence[Image.Image], questions: Sequence[str]) -> list[float]:
    """How much each block changes its input, mean over the prompts, ``[L]``; see `blocks.change_by_block`."""
    per_prompt = [change_by_block(_hidden_states(vlm, prompt)) for prompt in _prompts(vlm, images, questions)]
    return torch.tensor(per_prompt).mean(0).tolist()


def likelihood(
    vlm: InternVLAdapter, images: Sequence[Image.Image], questions: Sequence[str], answers: Sequence[str]
) -> Callable[[tuple[int, ...]], float]:
    """A score for `blocks.order_by_score`: mean log-likelihood of the answers' tokens when only some blocks run."""
    with torch.inference_mode():
        prompts = _prompts(vlm, images, questions)
    answer_ids = [_answer_ids(vlm, answer) for answer in answers]

    @torch.inference_mode()
    def score(active: tuple[int, ...]) -> float:
        with vlm.only_blocks(active):
            values = [_log_likelihood(vlm, p, ids) for p, ids in zip(prompts, answer_ids, strict=True)]
        return sum(values) / len(values)

    return score


def _prompts(vlm: InternVLAdapter, images: Sequence[Image.Image], questions: Sequence[str]) -> list[torch.Tensor]:
    """Embeddings of each prompt ``[T, C]`` at the most tiles."""
    visual = vlm.encode_tiles(images, vlm.most_crops)
    return [vlm.assemble(v, vlm.prompt.question_ids(q)) for v, q in zip(visual, questions, strict=True)]


def _hidden_states(vlm: InternVLAdapter, prompt: torch.Tensor) -> list[torch.Tensor]:
    """The first block's input and every block's output, L + 1 tensors ``[1, T, C]``."""
    seen = [prompt[None]]
    layers = vlm.decoder.model.layers
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, out: seen.append(_first(out))) for layer in layers]
    try:
        vlm.decoder.logits(prompt[None])
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first(out: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def _answer_ids(vlm: InternVLAdapter, answer: str) -> torch.Tensor:
    """Token ids of an answer and its end ``[A]``."""
    tokenizer = vlm.prompt.tokenizer
    ids = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    return torch.tensor(ids, device=vlm.device)


def _log_likelihood(vlm: InternVLAdapter, prompt: torch.Tensor, answer_ids: torch.Tensor) -> float:
    """Mean log-probability of the answer's tokens behind the prompt ``[T, C]``."""
    sequence = torch.cat([prompt, vlm.decoder.embed(answer_ids[:-1])])
    hidden = vlm.decoder.model(inputs_embeds=sequence[None], use_cache=False)[0][0]
    log_probs = vlm.decoder.head(hidden[len(prompt) - 1 :]).float().log_softmax(-1)
    return float(log_probs.gather(1, answer_ids[:, None]).mean())
