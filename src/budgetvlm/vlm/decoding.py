"""Greedy decoding from embeddings, with a cache of keys and values. Shapes: B rows, T tokens, C channels.

A skipped block never writes to the cache. Blocks keep their own place in it (`layer_idx`); Transformers'
`DynamicCache` makes places as they are needed, and an unused one stays empty. The first block always runs, and it is
the one that is asked for the length. So nothing has to be renumbered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import DynamicCache

from budgetvlm.vlm.families.base import Guide
from budgetvlm.vlm.protocol import Deadline

MARGIN = 1.1  # a next token may take this many times as long as the slowest before it


class Decoder:
    """A decoder-only language model and its head.

    Args:
        model: embeddings ``[B, T, C]`` -> hidden states.
        head: hidden states -> logits.
        end_ids: ids that end an answer.
        new_cache: makes an empty cache of keys and values.
    """

    def __init__(
        self, model: Any, head: Any, end_ids: Collection[int], new_cache: Callable[[], Any] = DynamicCache
    ) -> None:
        self.new_cache = new_cache
        self.model = model
        self.head = head
        self.end_ids = frozenset(end_ids)

    def prefill(self, embeddings: torch.Tensor, **where: Any) -> tuple[Any, torch.Tensor]:
        """Read a prompt ``[B, T, C]``; returns the cache and the first token of each answer ``[B]``."""
        cache = self.new_cache()
        return cache, self._step(embeddings, cache, **where)

    def decode(
        self,
        cache: Any,
        first: torch.Tensor,
        max_new_tokens: int,
        deadline: Deadline | None = None,
        guide: Guide | None = None,
    ) -> list[int]:
        """The answer of a batch of one, from its first token ``[1]`` on; the end token included if it came.

        With a deadline it stops before a token that would not be there in time; what is there is the answer.

        Args:
            guide: the one that told `prefill` about the prompt; None for a prompt that needs telling nothing.
        """
        token, ids = first, [int(first)]
        step_s = MARGIN * deadline.step_ms / 1e3 if deadline else 0.0
        started = time.perf_counter()
        while len(ids) < max_new_tokens and ids[-1] not in self.end_ids:
            if deadline and started + step_s > deadline.at_s:
                break
            token = self._step(self.embed(token[:, None]), cache, **(guide.step(token) if guide else {}))
            ids.append(int(token))
            now = time.perf_counter()
            step_s, started = max(step_s, MARGIN * (now - started)), now
        return ids

    def decode_batch(self, guide: Guide, max_new_tokens: int) -> list[list[int]]:
        """The answers to the guide's prompts, of any lengths; shorter ones are padded on the left and masked."""
        cache, token = self.prefill(guide.pad([row.embeddings for row in guide.rows]), **guide.prefill())
        steps = [token]
        done = self._ended(token)
        while len(steps) < max_new_tokens and not done.all():
            token = self._step(self.embed(token[:, None]), cache, **guide.step(token))
            steps.append(token)
            done |= self._ended(token)
        return [self._until_end(row) for row in torch.stack(steps, dim=1).tolist()]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings ``[..., C]``."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, embeddings: torch.Tensor, cache: Any = None, **where: Any) -> torch.Tensor:
        """Logits of the last token ``[B, V]``."""
        return self.head(self.hidden(embeddings, cache, **where)[:, -1])

    def hidden(self, embeddings: torch.Tensor, cache: Any = None, **where: Any) -> torch.Tensor:
        """Hidden states that the head reads ``[B, T, C]``."""
        return self.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None, **where)[0]

    def _step(self, embeddings: torch.Tensor, cache: Any, **where: Any) -> torch.Tensor:
        return self.logits(embeddings, cache, **where).argmax(-1)

    def _ended(self, token: torch.Tensor) -> torch.Tensor:
        return torch.isin(token, torch.tensor(sorted(self.end_ids), device=token.device))

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        return ids[: end + 1]
