"""The four lessons of the bundled model. Each takes the model and leaves it better; all randomness is seeded.

    1. language   the language model on perfect vision: each visual token is a linear map of its true dense labels.
                  Sequences are short and need no pictures, so looking-up, arithmetic and facts are learnt cheaply.
    2. vision     the tower on dense labels (what lies under each position), on crowded scenes.
    3. projector  the projector learns to produce the very embeddings that the language model was taught with.
    4. joint      projector and language model together on the frozen tower's features of real pictures.

In 1 and 4 the number of tiles, of experts and of blocks is drawn anew at each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from budgetvlm.tasks import signs

from . import vision
from .batches import Batch, Pool, pack
from .build import KNOB_SPACE, NUM_BLOCKS
from .forward import answer_logits, answer_loss, question_hits, router_logits, router_loss, set_top_k
from .labels import one_hot

CONTENT = 168
# Lookup must come before what builds on it, and hard kinds get more practice.
FIRST_KINDS = ("read", "read", "shape")
ALL_KINDS = ("shape", *["read"] * 3, *["price"] * 3, *["origin"] * 2, *["digits"] * 2, *["sum"] * 3, *["largest"] * 2)
BY_CODE_SHARE = 0.4
CROPS = (1, 1, 1, 1, 1, 4, 4, 4, 12, 12)
EXPERTS = (8, 8, 8, 8, 8, 8, 8, 3, 3, 1)
DEPTHS = (2, 2, 3, 4, 4, 6)
READABLE = {1: ("large",), 4: ("large", "medium"), 12: ("large", "medium", "small")}
FULL_TOP_K = max(KNOB_SPACE["top_k"])

Visual = Callable[[Batch], torch.Tensor]


@dataclass
class Log:
    """Prints and keeps what happened, for LOG.md and for the curve."""

    records: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    def add(self, stage: str, step: int, **values: Any) -> None:
        record = {"stage": stage, "step": step, "minutes": round((time.monotonic() - self.start) / 60, 1), **values}
        self.records.append(record)
        tqdm.write(" ".join(f"{k}={v}" for k, v in record.items()))


def adamw(modules: list[nn.Module], lr: float) -> torch.optim.AdamW:
    params = list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())
    matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def step_with(optimizer: torch.optim.Optimizer, loss: torch.Tensor, lr: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def schedule(lr: float, step: int, steps: int, warm_up: int = 100, hold: float = 0.4) -> float:
    """Linear warm-up, constant, then linear decay to a fiftieth."""
    decay = 1 - max(0.0, (step / steps - hold) / (1 - hold))
    return lr * min(1.0, (step + 1) / warm_up) * max(0.02, decay)


def draw_batch(pool: Pool, rng: np.random.Generator, size: int, first: bool) -> Batch:
    """A packed batch at a random tiling, mostly of scenes that can be read at it."""
    crops = 1 if first else int(rng.choice(CROPS))
    difficulty = READABLE[crops][rng.integers(len(READABLE[crops]))]
    if rng.random() < 0.08 and not first:
        difficulty = signs.DIFFICULTIES[rng.integers(3)]
    count = {1: size, 4: size * 2 // 3, 12: size // 3}[crops]
    chosen = rng.choice(pool.by_difficulty(difficulty), count)
    if first:
        return pack(pool, chosen, crops, rng, 8, FIRST_KINDS)
    return pack(pool, chosen, crops, rng, 10, ALL_KINDS, BY_CODE_SHARE)


def language_steps(
    model: nn.Module,
    visual: Visual,
    extra: nn.Module,
    pool: Pool,
    *,
    steps: int,
    first: int,
    lr: float,
    seed: int,
    size: int,
) -> Iterator[tuple[int, float]]:
    """Train the language model and ``extra`` (what makes the visual tokens); yields (step, full-depth loss).

    Every step trains the full depth and one reduced depth, as in slimmable networks' sandwich rule.
    """
    rng = np.random.default_rng(seed)
    optimizer = adamw([model.model.language_model, extra], lr)
    for step in tqdm(range(steps), desc="language", mininterval=5):
        batch = draw_batch(pool, rng, size, step < first)
        top_k = FULL_TOP_K if step < first else int(rng.choice(EXPERTS))
        depth = int(rng.choice(DEPTHS))
        set_top_k(model, top_k)
        with router_logits(model) as routed:
            logits = answer_logits(model, batch, visual(batch), (depth, NUM_BLOCKS))
        full = answer_loss(logits[NUM_BLOCKS], batch)
        loss = full + 0.5 * answer_loss(logits[depth], batch) + router_loss(routed, top_k)
        step_with(optimizer, loss, schedule(lr, step, steps))
        yield step, full.item()
    set_top_k(model, FULL_TOP_K)


@torch.no_grad()
def accuracy(
    model: nn.Module, visual: Visual, pool: Pool, crops: int, difficulty: str, top_k: int, by_code: float = 0.0
) -> dict[int, list[float]]:
    """Accuracy of whole answers by kind, and over the task's own shares (last), for each depth of the knob space."""
    chosen = pool.by_difficulty(difficulty)[:60]
    batch = pack(pool, chosen, crops, np.random.default_rng(1), 14, signs.KINDS, by_code)
    set_top_k(model, top_k)
    out = {}
    shares = np.array(signs.KIND_SHARES[difficulty])
    for depth, logits in answer_logits(model, batch, visual(batch), KNOB_SPACE["num_active_blocks"]).items():
        hits, kinds = question_hits(logits, batch)
        by_kind = [float(hits[kinds == i].float().mean()) for i in range(len(signs.KINDS))]
        out[depth] = [round(v, 2) for v in (*by_kind, float(np.dot(by_kind, shares)))]
    set_top_k(model, FULL_TOP_K)
    return out


def report(model: nn.Module, visual: Visual, pool: Pool, log: Log, stage: str, step: int, loss: float) -> None:
    """Log accuracy at the corners that matter."""
    told = accuracy(model, visual, pool, 1, "large", FULL_TOP_K, by_code=1.0)
    log.add(stage, step, loss=round(loss, 3), by_code={n: [told[n][i] for i in (2, 3, 4, 5)] for n in told})
    for crops, difficulty in ((1, "large"), (4, "medium"), (12, "small")):
        for top_k in KNOB_SPACE["top_k"]:
            by_depth = accuracy(model, visual, pool, crops, difficulty, top_k)
            depths = by_depth if top_k == FULL_TOP_K else {NUM_BLOCKS: by_depth[NUM_BLOCKS]}
            for depth, values in depths.items():
                log.add(
                    stage, step, loss=round(loss, 3), setting=(crops, top_k, depth), scenes=difficulty, right=values
                )


def learn_language(model: nn.Module, log: Log, *, steps: int, scenes: int, seed: int) -> nn.Linear:
    """Lesson 1. Returns the map from true labels to visual tokens, for lesson 3."""
    torch.manual_seed(seed)
    perfect = nn.Linear(CONTENT, model.config.text_config.hidden_size, bias=False)
    nn.init.normal_(perfect.weight, 0, 0.3)
    pool, held_out = Pool.make("pretrain", scenes), Pool.make("pretrain-check", max(24, scenes // 10))

    def visual_of(pool: Pool) -> Visual:
        return lambda b: perfect(one_hot(torch.from_numpy(pool.labels[b.max_crops][b.scenes])).flatten(1, 2))

    recent: list[float] = []
    running = language_steps(
        model, visual_of(pool), perfect, pool, steps=steps, first=min(900, steps // 2), lr=2e-3, seed=seed, size=20
    )
    for step, loss in running:
        recent = [*recent[-49:], loss]
        if (step + 1) % 400 == 0 or step + 1 == steps:
            report(model, visual_of(held_out), held_out, log, "language", step + 1, float(np.mean(recent)))
    return perfect


def learn_vision(model: nn.Module, log: Log, *, steps: int, seed: int, batch: int = 48) -> None:
    """Lesson 2: the tower learns to tell what lies under each position."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tower = model.model.vision_tower
    heads = vision.DenseHeads(tower.config.embed_dim * 2 ** (len(tower.config.depths) - 1))
    optimizer = adamw([tower, heads], 2.5e-3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in tqdm(range(steps), desc="vision", mininterval=5):
        if step % 2 == 0 or len(seen) < 12:
            # drawing costs as much as half a step: every second batch is an old one, cut anew
            seen = [*seen[-149:], vision.lesson(rng, 2 * batch)]
        pixels, labels = seen[-1 if step % 2 == 0 else int(rng.integers(len(seen)))]
        part = torch.from_numpy(rng.permutation(len(pixels))[:batch])
        loss = vision.dense_loss(heads(tower(pixels[part]).last_hidden_state), labels[part])
        step_with(optimizer, loss, schedule(2.5e-3, step, steps))
        if (step + 1) % 400 == 0 or step + 1 == steps:
            log.add("vision", step + 1, loss=round(loss.item(), 3), right=_check_vision(tower, heads))


@torch.no_grad()
def _check_vision(tower: nn.Module, heads: nn.Module) -> dict[str, list[float]]:
    """Share of non-empty positions right, by label, on scenes where they can just be read."""
    out = {}
    for difficulty, crops in (("large", 1), ("medium", 4), ("small", 12)):
        scenes = [signs.make_scene(signs.scene_seed("pretrain-check", i), difficulty) for i in range(30)]
        pixels = torch.from_numpy(np.concatenate([vision.pixels(signs.draw(s), crops) for s in scenes]))
        labels = torch.from_numpy(np.concatenate([vision.tile_labels(s, crops) for s in scenes]))
        right = vision.dense_accuracy(heads(tower(pixels).last_hidden_state), labels)
        out[difficulty] = [round(v, 3) for v in right]
    return out


@dataclass
class SeenPool:
    """A pool with the frozen tower's features of its pictures: float16 ``[S, tiles, 64, C]`` at every tiling."""

    pool: Pool
    features: dict[int, torch.Tensor]

    @classmethod
    @torch.inference_mode()
    def make(cls, model: nn.Module, stream: str, count: int) -> SeenPool:
        pool = Pool.make(stream, count)
        tower = model.model.vision_tower
        features: dict[int, list[torch.Tensor]] = {crops: [] for crops in pool.labels}
        for scene in tqdm(pool.scenes, desc="looking", mininterval=5):
            picture = signs.draw(scene)
            tiles = {crops: torch.from_numpy(vision.pixels(picture, crops)) for crops in features}
            overview = tower(tiles.pop(1)).last_hidden_state.half()
            features[1].append(overview)
            for crops, pixels in tiles.items():
                features[crops].append(torch.cat([tower(pixels[:-1]).last_hidden_state.half(), overview]))
        return cls(pool, {crops: torch.stack(parts) for crops, parts in features.items()})


def project(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Tower output ``[..., 64, C]`` -> visual tokens ``[..., 16, H]``, as InternVL's `get_image_features` does it."""
    lead, (positions, width) = hidden.shape[:-2], hidden.shape[-2:]
    side = int(positions**0.5)
    grid = hidden.reshape(-1, side, side, width).float()
    grid = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return model.model.multi_modal_projector(grid.reshape(*lead, positions // 4, 4 * width))


def learn_projector(model: nn.Module, perfect: nn.Linear, seen: SeenPool, log: Log, *, steps: int, seed: int) -> None:
    """Lesson 3: regress the perfect tokens from what the tower sees."""
    rng = np.random.default_rng(seed)
    projector = model.model.multi_modal_projector
    optimizer = adamw([projector], 2e-3)
    for step in tqdm(range(steps), desc="projector", mininterval=5):
        crops = int(rng.choice((1, 4, 12)))
        chosen = rng.choice(len(seen.pool.scenes), {1: 96, 4: 24, 12: 10}[crops])
        with torch.no_grad():
            wanted = perfect(one_hot(torch.from_numpy(seen.pool.labels[crops][chosen])))
        got = project(model, seen.features[crops][torch.from_numpy(chosen)])
        busy = (wanted.abs().sum(-1, keepdim=True) > 0).float() + 0.1
        loss = ((got - wanted).square() * busy).mean() / wanted.square().mul(busy).mean()
        step_with(optimizer, loss, schedule(2e-3, step, steps, hold=0.3))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log.add("projector", step + 1, unexplained=round(loss.item(), 3))


def learn_joint(
    model: nn.Module, seen: SeenPool, held_out: SeenPool, log: Log, *, steps: int, seed: int, lr: float = 1.5e-3
) -> Iterator[int]:
    """Lesson 4: projector and language model on real features. Yields after each check, so that the caller can save."""

    def visual_of(pool: SeenPool) -> Visual:
        return lambda b: project(model, pool.features[b.max_crops][torch.from_numpy(b.scenes)]).flatten(1, 2)

    recent: list[float] = []
    running = language_steps(
        model,
        visual_of(seen),
        model.model.multi_modal_projector,
        seen.pool,
        steps=steps,
        first=0,
        lr=lr,
        seed=seed,
        size=20,
    )
    for step, loss in running:
        recent = [*recent[-49:], loss]
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with torch.no_grad():
                report(model, visual_of(held_out), held_out.pool, log, "joint", step + 1, float(np.mean(recent)))
            yield step + 1
