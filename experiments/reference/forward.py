"""The language model's training pass: one packed sequence, several depths at once, any number of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from .batches import IGNORE, Batch
from .build import NUM_BLOCKS

LAST = NUM_BLOCKS - 1
# With AVX-512 and its kin bfloat16 products are three times as fast as float32 ones; without, far slower.
QUICK = torch.bfloat16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else torch.float32


def _dense_experts(
    experts: nn.Module, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    count, double, width = experts.gate_up_proj.shape
    gate_up = F.linear(hidden.to(QUICK), experts.gate_up_proj.reshape(count * double, width).to(QUICK)).float()
    gate, up = gate_up.view(-1, count, double).chunk(2, dim=-1)
    weights = torch.zeros(len(hidden), count).scatter(1, top_k_index, top_k_weights)
    inner = (F.silu(gate) * up * weights[..., None]).flatten(1).to(QUICK)
    return (inner @ experts.down_proj.transpose(1, 2).reshape(count * double // 2, width).to(QUICK)).float()


@contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """Compute all experts at once, the unchosen ones with weight 0: the same sum as Transformers' loop over experts.

    With half of the small experts chosen, three large products (in bfloat16) cost half of 24 small ones with gathers.
    """
    experts = [layer.mlp.experts for layer in model.model.language_model.layers]
    try:
        for module in experts:
            module.forward = partial(_dense_experts, module)
        yield
    finally:
        for module in experts:
            vars(module).pop("forward", None)


def set_top_k(model: nn.Module, top_k: int) -> None:
    for layer in model.model.language_model.layers:
        layer.mlp.gate.top_k = top_k


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect every router's logits during a pass."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: seen.append(out[0]))
        for layer in model.model.language_model.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def answer_logits(
    model: nn.Module, batch: Batch, visual: torch.Tensor, depths: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Logits at the answer positions for each depth: depth n runs blocks 0..n-2 and the last one.

    Args:
        visual: projected visual tokens ``[B, tokens, C]``.

    Returns:
        depth -> ``[A, V]``, A the number of answer positions.
    """
    lm = model.model.language_model
    hidden = lm.embed_tokens(batch.ids)
    hidden = torch.cat([hidden[:, :1], visual.to(hidden.dtype), hidden[:, 1 + visual.shape[1] :]], dim=1)
    mask = torch.zeros(batch.allowed.shape).masked_fill_(~batch.allowed, torch.finfo(torch.float32).min)
    rotary = lm.rotary_emb(hidden, batch.positions)
    at = batch.targets != IGNORE

    def run(block: int, hidden: torch.Tensor) -> torch.Tensor:
        return lm.layers[block](hidden, attention_mask=mask, position_embeddings=rotary, position_ids=batch.positions)

    def answers(hidden: torch.Tensor) -> torch.Tensor:
        """The last block, whose feed-forward layer is needed at the answer positions only."""
        last = lm.layers[LAST]
        attended = last.self_attn(
            last.input_layernorm(hidden),
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=batch.positions,
        )
        hidden = (hidden + attended[0])[at]
        return hidden + last.mlp(last.post_attention_layernorm(hidden)[None])[0]

    logits = {}
    for depth in range(1, NUM_BLOCKS):
        hidden = run(depth - 1, hidden)
        if depth + 1 in depths:
            logits[depth + 1] = model.lm_head(lm.norm(answers(hidden)))
    return logits


def router_loss(logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """Load balancing (Switch Transformer, eqs. 4-6) with weight 0.01 and z-loss (ST-MoE) with weight 0.001."""
    balance = z = torch.zeros(())
    for layer in logits:
        probs = layer.softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
        balance = balance + layer.shape[-1] * (chosen.mean(0) / top_k * probs.mean(0)).sum()
        z = z + layer.logsumexp(-1).square().mean()
    return (0.01 * balance + 0.001 * z) / len(logits)


def answer_loss(logits: torch.Tensor, batch: Batch, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy of answer tokens, weighted by kind ``[num_kinds]`` if weights are given."""
    at = batch.targets != IGNORE
    losses = F.cross_entropy(logits, batch.targets[at], reduction="none")
    if weights is None:
        return losses.mean()
    w = weights[batch.kinds[at]]
    return (losses * w).sum() / w.sum().clamp(min=1.0)


@torch.no_grad()
def question_hits(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether all answer tokens of each question are right under teacher forcing, and the question's kind.

    Greedy decoding is right exactly when every teacher-forced token is.
    """
    at = batch.targets != IGNORE
    right = (logits.argmax(-1) == batch.targets[at]).float()
    # positions are consecutive within a segment, so a new question starts where they jump
    row = torch.arange(at.shape[0])[:, None].expand_as(at)[at]
    column = torch.arange(at.shape[1])[None].expand_as(at)[at]
    new = torch.ones_like(row, dtype=torch.bool)
    new[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1] + 1)
    question = new.cumsum(0) - 1
    wrong = torch.zeros(int(question[-1]) + 1).index_add_(0, question, 1 - right)
    return wrong == 0, batch.kinds[at][new]
