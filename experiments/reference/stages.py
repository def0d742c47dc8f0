"""The four lessons of the bundled model. Each takes the model and leaves it better; all randomness is seeded.

    1. language   the language model on perfect vision: each visual token is a linear map of its true dense labels.
                  Sequences are short and need no pictures, so looking-up, arithmetic and facts are learnt cheaply.
    2. vision     the tower on dense labels (what lies under each position), on crowded scenes.
    3. projector  the projector learns to produce the very embeddings that the language model was taught with.
    4. joint      everything together on pictures, the tower at a smaller rate.

In 1 and 4 the number of tiles, of experts and of blocks is drawn anew at each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from budgetvlm.tasks import signs

from . import vision
from .batches import Batch, pack
from .build import KNOB_SPACE, NUM_BLOCKS
from .forward import (
    QUICK,
    answer_logits,
    answer_loss,
    dense_experts,
    question_hits,
    router_logits,
    router_loss,
    set_top_k,
)
from .labels import one_hot, tile_labels

CONTENT = 168
# Lookup must come before what builds on it, and hard kinds get more practice.
FIRST_KINDS = ("read", "read", "shape")
ALL_KINDS = ("shape", *["read"] * 3, *["price"] * 2, *["origin"] * 2, *["digits"] * 2, *["sum"] * 4, *["largest"] * 3)
CROPS = (1, 1, 1, 1, 1, 4, 4, 4, 12, 12)
# Reduced settings get few steps: after many they answer as well as the full one, and knobs would not matter.
EXPERTS = (*[12] * 14, 4, 4, 4, 1)
DEPTHS = (2, 3, 4, 4, 6, 6)
READABLE = {1: ("large",), 4: ("large", "medium"), 12: ("large", "medium", "small")}
FULL_TOP_K = max(KNOB_SPACE["top_k"])

LEARNT_TO_LOOK_UP = 0.2  # nats; guessing costs about 2
CHECKED = 40

Content = Callable[[Sequence[signs.Scene], int], torch.Tensor]
Visual = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Log:
    """Prints what happened and keeps it, for the log and for the learning curve."""

    records: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def add(self, stage: str, step: int, **values: Any) -> None:
        record = {"stage": stage, "step": step, "minutes": round((time.monotonic() - self.start) / 60, 1), **values}
        self.records.append(record)
        tqdm.write(" ".join(f"{k}={v}" for k, v in record.items()))


def adamw(modules: dict[float, list[nn.Module]]) -> torch.optim.AdamW:
    """AdamW over modules by learning rate; vectors are not decayed."""
    groups = []
    for lr, members in modules.items():
        params = list({id(p): p for m in members for p in m.parameters() if p.requires_grad}.values())
        groups.append({"params": [p for p in params if p.dim() > 1], "peak": lr, "weight_decay": 0.02})
        groups.append({"params": [p for p in params if p.dim() < 2], "peak": lr, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def step_with(optimizer: torch.optim.Optimizer, loss: torch.Tensor, share: float) -> None:
    """One clipped step at ``share`` of each group's peak learning rate."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    optimizer.step()


def schedule(step: int, steps: int, warm_up: int = 100, hold: float = 0.4) -> float:
    """Linear warm-up, constant, then linear decay to a fiftieth, as a share of the peak."""
    decay = 1 - max(0.0, (step / steps - hold) / (1 - hold))
    return min(1.0, (step + 1) / warm_up) * max(0.02, decay)


@dataclass
class Stream:
    """Endless scenes with what is needed to make their visual tokens. Each scene is used ``reuse`` times on average.

    Args:
        content: scenes, max_crops -> ``[B, tiles, ...]``: true labels or pixels.
        name: names the seeds; streams of different names share no scene.
        keep: number of scenes of a kind to choose old ones from.
    """

    content: Content
    name: str
    reuse: float = 2.0
    keep: int = 200
    drawn: int = 0
    kept: dict[tuple[int, str], list[tuple[signs.Scene, torch.Tensor]]] = field(default_factory=dict)

    def draw(
        self, rng: np.random.Generator, max_crops: int, difficulty: str, count: int
    ) -> tuple[list[signs.Scene], torch.Tensor]:
        kept = self.kept.setdefault((max_crops, difficulty), [])
        fresh = max(count - len(kept), int(count / self.reuse + rng.random()))
        old = [kept[i] for i in rng.choice(len(kept), count - fresh, replace=False)] if fresh < count else []
        scenes = [signs.make_scene(signs.scene_seed(self.name, self.drawn + i), difficulty) for i in range(fresh)]
        self.drawn += fresh
        new = list(zip(scenes, self.content(scenes, max_crops), strict=True)) if scenes else []
        kept.extend(new)
        del kept[: -self.keep]
        return [scene for scene, _ in new + old], torch.stack([content for _, content in new + old])


def true_labels(scenes: Sequence[signs.Scene], max_crops: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([tile_labels(scene, max_crops) for scene in scenes]))


def pictures(scenes: Sequence[signs.Scene], max_crops: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([vision.pixels(signs.draw(scene), max_crops) for scene in scenes]))


def perfect_tokens(perfect: nn.Linear) -> Visual:
    return lambda labels: perfect(one_hot(labels)).flatten(1, 2)


def seen_tokens(model: nn.Module) -> Visual:
    """Pixels ``[B, tiles, 3, 64, 64]`` -> visual tokens ``[B, tokens, H]``; the tower runs in `forward.QUICK`."""

    def visual(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=QUICK is torch.bfloat16):
            hidden = model.model.vision_tower(pixels.flatten(0, 1)).last_hidden_state
        return project(model, hidden).unflatten(0, pixels.shape[:2]).flatten(1, 2)

    return visual


def draw_batch(
    stream: Stream, rng: np.random.Generator, size: int, by_code: float | None
) -> tuple[Batch, torch.Tensor]:
    """A packed batch at a random tiling, mostly of scenes that can be read at it; ``by_code`` None: the first steps."""
    crops = 1 if by_code is None else int(rng.choice(CROPS))
    difficulty = READABLE[crops][rng.integers(len(READABLE[crops]))]
    if rng.random() < 0.08 and by_code is not None:
        difficulty = signs.DIFFICULTIES[rng.integers(3)]
    scenes, content = stream.draw(rng, crops, difficulty, {1: size, 4: size * 2 // 3, 12: size // 3}[crops])
    if by_code is None:
        return pack(scenes, crops, rng, 8, FIRST_KINDS), content
    return pack(scenes, crops, rng, 10, ALL_KINDS, by_code), content


def language_steps(
    model: nn.Module,
    visual: Visual,
    content: Content,
    optimizer: torch.optim.Optimizer,
    log: Log,
    name: str,
    *,
    steps: int,
    first: int,
    by_code: tuple[float, float],
    seed: int,
    check_every: int,
    size: int = 20,
) -> Iterator[int]:
    """Train the language model and what makes its visual tokens; yields the step after each check.

    Every step trains the full depth and one reduced depth, as in slimmable networks' sandwich rule. At most ``first``
    steps ask for reading alone; they end as soon as it has been learnt. The share of questions by code goes linearly
    from one number to the other.
    """
    rng = np.random.default_rng(seed)
    stream, held_out = Stream(content, "pretrain"), Stream(content, "pretrain-check", reuse=np.inf, keep=CHECKED)
    recent = 1.0
    with dense_experts(model):
        for step in tqdm(range(steps), desc=name, mininterval=5):
            first = step if recent < LEARNT_TO_LOOK_UP else first
            by_code_now = by_code[0] + (by_code[1] - by_code[0]) * step / steps
            batch, seen = draw_batch(stream, rng, size, None if step < first else by_code_now)
            top_k = FULL_TOP_K if step < first else int(rng.choice(EXPERTS))
            depth = int(rng.choice(DEPTHS))
            set_top_k(model, top_k)
            with router_logits(model) as routed:
                logits = answer_logits(model, batch, visual(seen), (depth, NUM_BLOCKS))
            full = answer_loss(logits[NUM_BLOCKS], batch)
            loss = full + 0.5 * answer_loss(logits[depth], batch) + router_loss(routed, top_k)
            step_with(optimizer, loss, schedule(step, steps))
            recent = 0.95 * recent + 0.05 * full.item()
            if (step + 1) % check_every == 0 or step + 1 == steps:
                set_top_k(model, FULL_TOP_K)
                report(model, visual, held_out, log, name, step + 1, recent)
                yield step + 1


@torch.no_grad()
def accuracy(
    model: nn.Module, visual: Visual, held_out: Stream, crops: int, difficulty: str, top_k: int, by_code: float = 0.0
) -> dict[int, list[float]]:
    """Accuracy of whole answers by kind, and over the task's own shares (last), for each depth of the knob space."""
    rng = np.random.default_rng(1)
    scenes, content = held_out.draw(rng, crops, difficulty, CHECKED)
    batch = pack(scenes, crops, rng, 14, signs.KINDS, by_code)
    set_top_k(model, top_k)
    out = {}
    shares = np.array(signs.KIND_SHARES[difficulty])
    logits_at = answer_logits(model, batch, visual(content), KNOB_SPACE["num_active_blocks"])
    for depth, logits in logits_at.items():
        hits, kinds = question_hits(logits, batch)
        by_kind = [float(hits[kinds == i].float().mean()) for i in range(len(signs.KINDS))]
        out[depth] = [round(v, 2) for v in (*by_kind, float(np.dot(by_kind, shares)))]
    set_top_k(model, FULL_TOP_K)
    return out


def report(model: nn.Module, visual: Visual, held_out: Stream, log: Log, stage: str, step: int, loss: float) -> None:
    """Log accuracy at the corners that matter."""
    told = accuracy(model, visual, held_out, 1, "large", FULL_TOP_K, by_code=1.0)
    log.add(stage, step, loss=round(loss, 3), by_code={n: [told[n][i] for i in (2, 3, 4, 5)] for n in told})
    for crops, difficulty in ((1, "large"), (4, "medium"), (12, "large"), (12, "small")):
        for top_k in KNOB_SPACE["top_k"]:
            by_depth = accuracy(model, visual, held_out, crops, difficulty, top_k)
            depths = by_depth if top_k == FULL_TOP_K else {NUM_BLOCKS: by_depth[NUM_BLOCKS]}
            for depth, values in depths.items():
                log.add(
                    stage, step, loss=round(loss, 3), setting=(crops, top_k, depth), scenes=difficulty, right=values
                )


def learn_language(model: nn.Module, log: Log, *, steps: int, seed: int) -> nn.Linear:
    """Lesson 1. Returns the map from true labels to visual tokens, for lesson 3."""
    torch.manual_seed(seed)
    perfect = nn.Linear(CONTENT, model.config.text_config.hidden_size, bias=False)
    nn.init.normal_(perfect.weight, 0, 0.3)
    optimizer = adamw({2e-3: [model.model.language_model, model.lm_head, perfect]})
    how = {"steps": steps, "first": steps // 2, "by_code": (0.4, 0.4), "seed": seed, "check_every": 400}
    for _ in language_steps(model, perfect_tokens(perfect), true_labels, optimizer, log, "language", **how):
        pass
    return perfect


def learn_vision(model: nn.Module, log: Log, *, steps: int, seed: int, batch: int = 48) -> None:
    """Lesson 2: the tower learns to tell what lies under each position."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tower = model.model.vision_tower
    heads = vision.DenseHeads(tower.config.embed_dim * 2 ** (len(tower.config.depths) - 1))
    optimizer = adamw({2.5e-3: [tower, heads]})
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in tqdm(range(steps), desc="vision", mininterval=5):
        if step % 2 == 0 or len(seen) < 12:
            # drawing costs as much as half a step: every second batch is an old one, cut anew
            seen = [*seen[-149:], vision.lesson(rng, 2 * batch)]
        pixels, labels = seen[-1 if step % 2 == 0 else int(rng.integers(len(seen)))]
        part = torch.from_numpy(rng.permutation(len(pixels))[:batch])
        loss = vision.dense_loss(heads(tower(pixels[part]).last_hidden_state), labels[part])
        step_with(optimizer, loss, schedule(step, steps))
        if (step + 1) % 400 == 0 or step + 1 == steps:
            log.add("vision", step + 1, loss=round(loss.item(), 3), right=_check_vision(tower, heads))


@torch.no_grad()
def _check_vision(tower: nn.Module, heads: nn.Module) -> dict[str, list[float]]:
    """Share of non-empty positions right, by label, on scenes where they can just be read."""
    out = {}
    for difficulty, crops in (("large", 1), ("medium", 4), ("small", 12)):
        scenes = [signs.make_scene(signs.scene_seed("pretrain-check", i), difficulty) for i in range(CHECKED)]
        pixels = torch.from_numpy(np.concatenate([vision.pixels(signs.draw(s), crops) for s in scenes]))
        labels = torch.from_numpy(np.concatenate([vision.tile_labels(s, crops) for s in scenes]))
        right = vision.dense_accuracy(heads(tower(pixels).last_hidden_state), labels)
        out[difficulty] = [round(v, 3) for v in right]
    return out


def project(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Tower output ``[..., 64, C]`` -> visual tokens ``[..., 16, H]``, as InternVL's `get_image_features` does it."""
    lead, (positions, width) = hidden.shape[:-2], hidden.shape[-2:]
    side = int(positions**0.5)
    grid = hidden.reshape(-1, side, side, width).float()
    grid = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return model.model.multi_modal_projector(grid.reshape(*lead, positions // 4, 4 * width))


def learn_projector(model: nn.Module, perfect: nn.Linear, log: Log, *, steps: int, seed: int) -> None:
    """Lesson 3: regress the perfect tokens from what the tower sees."""
    rng = np.random.default_rng(seed)
    optimizer = adamw({2e-3: [model.model.multi_modal_projector]})
    visual = seen_tokens(model)
    stream = Stream(pictures, "pretrain-projector", reuse=4)
    for step in tqdm(range(steps), desc="projector", mininterval=5):
        crops = int(rng.choice((1, 4, 12)))
        difficulty = READABLE[crops][rng.integers(len(READABLE[crops]))]
        scenes, pixels = stream.draw(rng, crops, difficulty, {1: 60, 4: 16, 12: 8}[crops])
        with torch.no_grad():
            wanted = perfect_tokens(perfect)(true_labels(scenes, crops))
        got = visual(pixels)
        busy = (wanted.abs().sum(-1, keepdim=True) > 0).float() + 0.1
        loss = ((got - wanted).square() * busy).mean() / wanted.square().mul(busy).mean()
        step_with(optimizer, loss, schedule(step, steps, hold=0.3))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log.add("projector", step + 1, unexplained=round(loss.item(), 3))


def learn_joint(model: nn.Module, log: Log, *, steps: int, seed: int) -> Iterator[int]:
    """Lesson 4: everything, on pictures. Yields after each check, so that the caller can save."""
    language = [model.model.language_model, model.lm_head, model.model.multi_modal_projector]
    optimizer = adamw({1.5e-3: language, 4e-4: [model.model.vision_tower]})
    how = {"steps": steps, "first": 0, "by_code": (0.4, 0.1), "seed": seed, "check_every": 500}
    yield from language_steps(model, seen_tokens(model), pictures, optimizer, log, "joint", **how)
