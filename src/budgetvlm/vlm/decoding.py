"""Greedy decoding from embeddings with a cache of keys and values, as fast as a deadline needs it.

A skipped block never writes to the cache. Blocks keep their own place in it (`layer_idx`), and an unused one stays
empty. The block that is asked for the length always runs, see `attention`. So nothing has to be renumbered.
Shapes: B prompts, T tokens, C channels, V words of the vocabulary.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from budgetvlm.knobs import Setting
from budgetvlm.vlm.prompt import DecoderInputs
from budgetvlm.vlm.protocol import Deadline

MARGIN = 1.1  # a next token may take this many times as long as the slowest before it
LEAST_MS = 1e-3  # of a step, so that nothing is divided by 0
LONG_AGO_S = -math.inf


class Pace:
    """Chooses the setting at which each block reads the prompt and each token is made, so that a deadline is kept.

    Reading is hurried where the rest of it would leave no time for the tokens, all made as fast as they can be.

    Attributes:
        level: 0: the answer's own setting; n: the nth of the deadline's hurried ones.
        hurried, saved_ms: see `Generation`.
        block_ms, steps_ms: expected time of reading by one block and of one more token, at each level.
        clock: see `Deadline`.
        in_time_s: until when, on that clock, each block reads without hurry. Earlier, `reads` would change nothing and
            need not be called, which takes longer than to read a clock. For blocks that are not in it, call it.

    Args:
        blocks: which run at each level, ascending; only reading needs them.
    """

    def __init__(self, deadline: Deadline, blocks: Sequence[Sequence[int]] = ()) -> None:
        self._deadline, self.blocks, self.clock = deadline, blocks, deadline.clock
        self.steps_ms = [max(ms, LEAST_MS) for ms in (deadline.step_ms, *[q.step_ms for q in deadline.hurried])]
        reads_ms = deadline.read_ms, *[quicker.read_ms for quicker in deadline.hurried]
        self.block_ms = [ms / len(run) for ms, run in zip(reads_ms, blocks, strict=False)]
        self._slowness = MARGIN
        self._since_s = self._expected_ms = 0.0
        self.in_time_s: dict[int, float] = {}
        self.level = 0
        self.hurried: list[Setting] = []
        self.saved_ms: dict[str, float] = {}

    def reads(self, now_s: float, block: int) -> bool:
        """Decide whether this block, the next one of the answer's own setting, reads the prompt; may raise `level`."""
        # how long reading has taken, against what was expected
        if self.level == 0:
            self._expected_ms = bisect_left(self.blocks[0], block) * self.block_ms[0]
        if self._expected_ms:
            took_ms = (now_s - self._since_s) * 1e3
            self._slowness = max(MARGIN, MARGIN * took_ms / self._expected_ms)
        else:
            self._since_s = now_s
        # hurry until the rest fits into what is left
        left_ms = (self._deadline.at_s - now_s) * 1e3 / self._slowness - self._tokens_ms
        while self.level < len(self.block_ms) - 1 and self._rest_ms(block) > left_ms:
            self.level += 1
        runs = block in self.blocks[self.level]
        # note what was saved, or until when the next blocks are in time
        if self.level:
            self.in_time_s.clear()
            self._expected_ms += runs * self.block_ms[self.level]
            self._save("prefill", self.block_ms[0] - runs * self.block_ms[self.level])
        elif not self.in_time_s:
            self.in_time_s = self._when_in_time()
        return runs

    def _when_in_time(self) -> dict[int, float]:
        """Compute `in_time_s` of all blocks but the first.

        With n blocks of b ms read, t ms since the first began and c ms needed for the rest, `reads` changes nothing
        while c <= (d - t) / s, where the deadline is d ms after the first began, and s the margin m or m t / (n b),
        whichever is more. So t is at most d - m c, and at most d n b / (n b + m c).
        """
        blocks, block_ms, at_s, out = self.blocks[0], self.block_ms[0], self._deadline.at_s, {}
        for read in range(1, len(blocks)):
            needed_ms = MARGIN * ((len(blocks) - read) * block_ms + self._tokens_ms)
            share = read * block_ms / (read * block_ms + needed_ms)
            out[blocks[read]] = min(at_s - needed_ms / 1e3, self._since_s + share * (at_s - self._since_s))
        return out

    @property
    def _tokens_ms(self) -> float:
        """Time of the tokens after the first one, made as fast as they can be."""
        return (self._deadline.tokens - 1) * self.steps_ms[-1]

    def _rest_ms(self, block: int) -> float:
        """Time of reading from this block on, at the present level."""
        blocks = self.blocks[self.level]
        return (len(blocks) - bisect_left(blocks, block)) * self.block_ms[self.level]

    def has_read(self) -> None:
        """Note that the prompt is read and the first token is there."""
        self._slowness = MARGIN
        if self.level:
            self._note()

    def next(self, now_s: float, made: int) -> bool:
        """Decide whether to make another token after ``made`` ones, the last of them just now; may raise `level`."""
        if made > 1:
            took_ms = (now_s - self._since_s) * 1e3
            self._slowness = max(self._slowness, MARGIN * took_ms / self.steps_ms[self.level])
        self._since_s = now_s
        left_ms = (self._deadline.at_s - now_s) * 1e3 / self._slowness
        wanted = max(self._deadline.tokens - made, 1)
        while self.level < len(self.steps_ms) - 1 and wanted * self.steps_ms[self.level] > left_ms:
            self.level += 1
        if self._deadline.cut and self.steps_ms[self.level] > left_ms:
            return False
        if self.level:
            self._save("decode", self.steps_ms[0] - self.steps_ms[self.level])
            self._note()
        return True

    @property
    def setting(self) -> Setting | None:
        """The setting of a hurried block or token; None: the answer's own."""
        return self._deadline.hurried[self.level - 1].setting if self.level else None

    def _note(self) -> None:
        self.hurried.append(self._deadline.hurried[self.level - 1].setting)

    def _save(self, stage: str, ms: float) -> None:
        self.saved_ms[stage] = self.saved_ms.get(stage, 0.0) + ms


class SkippedBlock(nn.Module):
    """Stands in a skipped block's place and hands the hidden states on; other attributes are those of the block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # no child of this module, whose parameters are not its own

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states


def waiting_for(tensor: torch.Tensor) -> Callable[[], None] | None:
    """Return what waits until a tensor's device has done all that was asked of it; None: a CPU needs no waiting."""
    device = tensor.device
    if device.type == "cuda":
        return partial(torch.cuda.synchronize, device)
    return torch.mps.synchronize if device.type == "mps" else None


def stopwatch(wait: Callable[[], None] | None) -> Callable[[], float]:
    """Return a function that returns the ms since its last call, or since now; it first waits for the device."""
    last_s = 0.0

    def lap() -> float:
        nonlocal last_s
        if wait:
            wait()
        before_s, last_s = last_s, time.perf_counter()
        return (last_s - before_s) * 1e3

    lap()
    return lap


class PacedReading:
    """Asks the `pace` of the answer under way before each block that reads; shared by all `PacedBlock`s of a model.

    Args:
        wait: see `waiting_for`; called before the clock is read.
        set_top_k: changes the experts per token of the blocks to come.
    """

    def __init__(self, wait: Callable[[], None] | None, set_top_k: Callable[[int], None]) -> None:
        self.pace: Pace | None = None
        self._wait, self._set_top_k = wait, set_top_k

    def runs(self, block: int) -> bool:
        """Decide whether this block runs; where it is in more of a hurry, set its experts per token."""
        if self._wait:
            self._wait()
        pace = self.pace
        assert pace is not None
        now_s = pace.clock()
        if now_s <= pace.in_time_s.get(block, LONG_AGO_S):
            return True
        before = pace.level
        runs = pace.reads(now_s, block)
        if pace.level != before and pace.setting and (top_k := pace.setting.get("top_k")):
            self._set_top_k(int(top_k))
        return runs


class PacedBlock(SkippedBlock):
    """Stands in front of a block and runs it, or returns what a skipped one would, see `Family.skipped_output`."""

    def __init__(
        self, block: nn.Module, number: int, reading: PacedReading, skipped: Callable[[torch.Tensor], Any]
    ) -> None:
        super().__init__(block)
        vars(self).update(number=number, reading=reading, skipped=skipped)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        if own["reading"].runs(own["number"]):
            return own["block"](hidden_states, *args, **kwargs)
        return own["skipped"](hidden_states)

    __call__ = forward  # without the hooks of `nn.Module.__call__`, which each request would pay for


def block_of(layer: nn.Module) -> nn.Module:
    """Return the block behind a stand-in; a block is returned as it is."""
    block: nn.Module = vars(layer)["block"] if isinstance(layer, SkippedBlock) else layer
    return block


class Decoder:
    """A decoder-only language model, its head, the ids that end an answer, and what makes an empty cache."""

    def __init__(
        self, model: Any, head: Any, end_ids: Collection[int], new_cache: Callable[[], Any] = DynamicCache
    ) -> None:
        self.model, self.head, self.new_cache = model, head, new_cache
        self.end_ids = frozenset(end_ids)

    def prefill(self, embeddings: torch.Tensor, **arguments: Any) -> tuple[Any, torch.Tensor]:
        """Read prompts ``[B, T, C]``; return the cache and the first token of each answer ``[B]``."""
        cache = self.new_cache()
        return cache, self._step(embeddings, cache, **arguments)

    def decode(
        self,
        cache: Any,
        first: torch.Tensor,
        max_new_tokens: int,
        pace: Pace | None = None,
        inputs: DecoderInputs | None = None,
        apply: Callable[[Setting], AbstractContextManager[None]] | None = None,
        on_token: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[int]:
        """Make the answer of a batch of one, from its first token ``[1]`` on; an end token is part of it.

        Args:
            pace: hurries where the answer would be late, and stops before a token that would be; what is there by then
                is the answer.
            inputs: those that `prefill` was given arguments of; None for a prompt that needs none.
            apply: applies the setting of a hurried token; None: there are none.
            on_token: called with all tokens after each one, the last included; False ends the answer.
        """
        token, ids = first, [int(first)]
        goes_on = on_token is None or on_token(ids)
        now_s = pace.clock() if pace else 0.0
        while goes_on and len(ids) < max_new_tokens and ids[-1] not in self.end_ids:
            if pace and not pace.next(now_s, len(ids)):
                break
            hurried = pace.setting if pace and pace.level else None
            with apply(hurried) if apply and hurried else nullcontext():
                token = self._step(self.embed(token[:, None]), cache, **(inputs.step(token) if inputs else {}))
            ids.append(int(token))
            goes_on = on_token is None or on_token(ids)
            if pace:
                now_s = pace.clock()
        return ids

    def decode_batch(self, inputs: DecoderInputs, max_new_tokens: int) -> list[list[int]]:
        """Answer prompts of any lengths; shorter ones are padded on the left and masked."""
        cache, token = self.prefill(inputs.embeddings(), **inputs.prefill())
        steps = [token]
        done = self._ended(token)
        while len(steps) < max_new_tokens and not done.all():
            token = self._step(self.embed(token[:, None]), cache, **inputs.step(token))
            steps.append(token)
            done |= self._ended(token)
        return [self._until_end(answer) for answer in torch.stack(steps, dim=1).tolist()]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings ``[..., C]``."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, embeddings: torch.Tensor, cache: Any = None, **arguments: Any) -> torch.Tensor:
        """Return logits of the token after the last one ``[B, V]``."""
        return self.head(self.hidden(embeddings, cache, **arguments)[:, -1])

    def hidden(self, embeddings: torch.Tensor, cache: Any = None, **arguments: Any) -> torch.Tensor:
        """Return the hidden states that the head reads ``[B, T, C]``."""
        return self.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=cache is not None, **arguments)[0]

    def _step(self, embeddings: torch.Tensor, cache: Any, **arguments: Any) -> torch.Tensor:
        return self.logits(embeddings, cache, **arguments).argmax(-1)

    def _ended(self, token: torch.Tensor) -> torch.Tensor:
        return torch.isin(token, torch.tensor(sorted(self.end_ids), device=token.device))

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        return ids[: end + 1]


def mean_embedder(table: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from ids, int64 ``[T]``, to the mean of their rows of a frozen table, float32 ``[C]``."""
    weight = next(table.parameters())
    if type(table) is nn.Embedding and weight.is_cpu and weight.dtype is torch.float32:
        rows = weight.numpy()  # looked up without PyTorch, which takes three times as long for a handful of words
        return lambda ids: np.add.reduce(rows[ids]) / np.float32(len(ids))
    return lambda ids: table(torch.tensor(ids, device=weight.device)).float().mean(0).cpu().numpy()
