"""Greedy decoding from embeddings, with a cache of keys and values. Shapes: B rows, T tokens, C channels.

A skipped block never writes to the cache. Blocks keep their own place in it (`layer_idx`); Transformers'
`DynamicCache` makes places as they are needed, and an unused one stays empty. The first block always runs, and it is
the one that is asked for the length. So nothing has to be renumbered.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache

from budgetvlm.knobs import Setting
from budgetvlm.vlm.families.base import Guide
from budgetvlm.vlm.protocol import VLM, Deadline

MARGIN = 1.1  # a next token may take this many times as long as the slowest before it
LEAST_MS = 1e-3  # of a step, so that nothing is divided by 0
LONG_AGO_S = -math.inf


class Pace:
    """At which setting each block reads the prompt and each token of an answer is made, so that it is there in time.

    Reading is hurried where the rest of it would leave no time for the tokens, all made as quickly as they can be.

    Attributes:
        rung: 0: the answer's own setting; n: the nth of the deadline's hurried ones.
        hurried, saved_ms: see `Generation`.
        block_ms, steps_ms: what reading by a block and another token are expected to take, at each rung.
        clock: see `Deadline`.
        in_time_s: until when a block reads with no hurry, on that clock: earlier nothing changes, and `reads` need not
            be asked, which takes longer than to look at a clock. Blocks that are not in it always ask.

    Args:
        blocks: which run at each rung, ascending; only reading asks for them.
    """

    def __init__(self, deadline: Deadline, blocks: Sequence[Sequence[int]] = ()) -> None:
        self._deadline, self.blocks, self.clock = deadline, blocks, deadline.clock
        self.steps_ms = [max(ms, LEAST_MS) for ms in (deadline.step_ms, *[q.step_ms for q in deadline.hurried])]
        reads_ms = deadline.read_ms, *[quicker.read_ms for quicker in deadline.hurried]
        self.block_ms = [ms / len(run) for ms, run in zip(reads_ms, blocks, strict=False)]
        self._slowness = MARGIN
        self._since_s = self._expected_ms = 0.0
        self.in_time_s: dict[int, float] = {}
        self.rung = 0
        self.hurried: list[Setting] = []
        self.saved_ms: dict[str, float] = {}

    @classmethod
    def of(cls, vlm: VLM, setting: Setting, deadline: Deadline) -> Pace:
        """The pace of an answer that a model is to make at this setting."""
        most = vlm.num_total_blocks
        depths = [int(one.get("num_active_blocks", most)) for one in (setting, *deadline.settings)]
        return cls(deadline, [vlm.active_blocks(depth) for depth in depths])

    def reads(self, now_s: float, block: int) -> bool:
        """Whether this block, the next of those of the answer's own setting, reads the prompt; `rung` then says how."""
        if self.rung == 0:
            self._expected_ms = bisect_left(self.blocks[0], block) * self.block_ms[0]
        if self._expected_ms:
            took_ms = (now_s - self._since_s) * 1e3
            self._slowness = max(MARGIN, MARGIN * took_ms / self._expected_ms)
        else:
            self._since_s = now_s
        left_ms = (self._deadline.at_s - now_s) * 1e3 / self._slowness - self._tokens_ms
        last = len(self.block_ms) - 1
        while self.rung < last and self._rest_ms(block) > left_ms:
            self.rung += 1
        runs = block in self.blocks[self.rung]
        if self.rung:
            self.in_time_s.clear()
            self._expected_ms += runs * self.block_ms[self.rung]
            self._save("prefill", self.block_ms[0] - runs * self.block_ms[self.rung])
        elif not self.in_time_s:
            self.in_time_s = self._when_in_time()
        return runs

    def _when_in_time(self) -> dict[int, float]:
        """`in_time_s`, of all blocks but the first.

        With n blocks of b ms read, t ms since the first began and c ms needed for the rest, `reads` changes nothing
        while c <= (d - t) / s, where the deadline is d ms after the first began, and s the margin m or m t / (n b),
        whichever is more. So t is at most d - m c, and at most d n b / (n b + m c).
        """
        blocks, block_ms, at_s, out = self.blocks[0], self.block_ms[0], self._deadline.at_s, {}
        for read in range(1, len(blocks)):
            needed_ms = MARGIN * ((len(blocks) - read) * block_ms + self._tokens_ms)
            share = read * block_ms / (read * block_ms + needed_ms)
            out[blocks[read]] = min(at_s - needed_ms / 1e3, self._since_s + share * (at_s - self._since_s))
        return out if len(self.block_ms) > 1 else dict.fromkeys(out, math.inf)

    @property
    def _tokens_ms(self) -> float:
        """What the tokens after the first one take as quickly as they can be made."""
        return (self._deadline.tokens - 1) * self.steps_ms[-1]

    def _rest_ms(self, block: int) -> float:
        """What reading takes from this block on, as it goes now."""
        blocks = self.blocks[self.rung]
        return (len(blocks) - bisect_left(blocks, block)) * self.block_ms[self.rung]

    def has_read(self) -> None:
        """The first token is there."""
        self._slowness = MARGIN
        if self.rung:
            self._note()

    def next(self, now_s: float, made: int) -> bool:
        """Whether another token is to be made, after ``made`` ones, the last of them just now; `rung` then says how."""
        rung = self.rung
        if made > 1:
            took_ms = (now_s - self._since_s) * 1e3
            self._slowness = max(self._slowness, MARGIN * took_ms / self.steps_ms[rung])
        self._since_s = now_s
        left_ms = (self._deadline.at_s - now_s) * 1e3 / self._slowness
        wanted = max(self._deadline.tokens - made, 1)
        last = len(self.steps_ms) - 1
        while rung < last and wanted * self.steps_ms[rung] > left_ms:
            rung += 1
        self.rung = rung
        if self._deadline.cut and self.steps_ms[rung] > left_ms:
            return False
        if rung:
            self._save("decode", self.steps_ms[0] - self.steps_ms[rung])
            self._note()
        return True

    @property
    def setting(self) -> Setting | None:
        """That of a hurried token; None: the answer's own."""
        return self._deadline.hurried[self.rung - 1].setting if self.rung else None

    def _note(self) -> None:
        self.hurried.append(self._deadline.hurried[self.rung - 1].setting)

    def _save(self, stage: str, ms: float) -> None:
        self.saved_ms[stage] = self.saved_ms.get(stage, 0.0) + ms


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
        now_s = pace.clock() if pace else 0.0
        while len(ids) < max_new_tokens and ids[-1] not in self.end_ids:
            if pace and not pace.next(now_s, len(ids)):
                break
            hurried = pace.setting if pace and pace.rung else None
            with apply(hurried) if apply and hurried else nullcontext():
                token = self._step(self.embed(token[:, None]), cache, **(guide.step(token) if guide else {}))
            ids.append(int(token))
            if pace:
                now_s = pace.clock()
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
