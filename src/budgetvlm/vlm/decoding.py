"""Greedy decoding from embeddings, with a cache of keys and values. Shapes: B rows, T tokens, C channels.

A skipped block never writes to the cache. Blocks keep their own place in it (`layer_idx`); Transformers'
`DynamicCache` makes places as they are needed, and an unused one stays empty. The first block always runs, and it is
the one that is asked for the length. So nothing has to be renumbered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from budgetvlm.knobs import Setting
from budgetvlm.vlm.families.base import Guide
from budgetvlm.vlm.protocol import Deadline

MARGIN = 1.1  # a next token may take this many times as long as the slowest before it
LEAST_MS = 1e-3  # of a step, so that nothing is divided by 0


class Pace:
    """At which setting each token of an answer is made, so that the answer is there in time.

    Attributes:
        rung: 0: the answer's own setting; n: the nth of the deadline's hurried ones.
        hurried: the settings of the tokens that were made at another than the answer's.
    """

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._steps_ms = [max(ms, LEAST_MS) for ms in (deadline.step_ms, *(ms for _, ms in deadline.hurried))]
        self._slowness = MARGIN
        self.rung = 0
        self.hurried: list[Setting] = []

    def next(self, now_s: float, made: int) -> bool:
        """Whether another token is to be made, after ``made`` ones; `rung` then says how."""
        left_ms = (self._deadline.at_s - now_s) * 1e3 / self._slowness
        wanted = max(self._deadline.tokens - made, 1)
        last = len(self._steps_ms) - 1
        while self.rung < last and wanted * self._steps_ms[self.rung] > left_ms:
            self.rung += 1
        return not self._deadline.cut or self._steps_ms[self.rung] <= left_ms

    @property
    def setting(self) -> Setting | None:
        """That of a hurried token; None: the answer's own."""
        return self._deadline.hurried[self.rung - 1][0] if self.rung else None

    def took(self, ms: float) -> None:
        """Learn what a token took."""
        self._slowness = max(self._slowness, MARGIN * ms / self._steps_ms[self.rung])
        if self.setting is not None:
            self.hurried.append(self.setting)


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
        pace: Pace | None = None,
        guide: Guide | None = None,
        apply: Callable[[Setting], AbstractContextManager[None]] | None = None,
    ) -> list[int]:
        """The answer of a batch of one, from its first token ``[1]`` on; the end token included if it came.

        Args:
            pace: hurries where the answer would be late, and stops before a token that would be; what is there by then
                is the answer.
            guide: the one that told `prefill` about the prompt; None for a prompt that needs telling nothing.
            apply: applies the setting of a hurried token; None: there are none.
        """
        token, ids = first, [int(first)]
        started = time.perf_counter()
        while len(ids) < max_new_tokens and ids[-1] not in self.end_ids:
            if pace and not pace.next(started, len(ids)):
                break
            other = pace.setting if pace else None
            with apply(other) if apply and other else nullcontext():
                token = self._step(self.embed(token[:, None]), cache, **(guide.step(token) if guide else {}))
            ids.append(int(token))
            now = time.perf_counter()
            if pace:
                pace.took((now - started) * 1e3)
            started = now
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
