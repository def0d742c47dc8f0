"""A tiny model with the interface of MolmoE-1B's own code: tuple caches, added features, shifted masks. Random weights.

None of that code is here; this is the least that has the same names, arguments and habits.
"""

import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_families import VOCABULARY, write_tokenizer
from torch import nn
from torch.nn import functional as F

SIDE, PATCH = 16, 4  # a tile has 4 x 4 patches, pooled to 2 x 2 tokens
WIDTH, HEADS, BLOCKS, EXPERTS, TOP_K, MAX_CROPS = 32, 2, 4, 6, 4, 4


class ImageProcessor:
    max_crops = MAX_CROPS

    def preprocess(self, image, patch_id, col_id, start_id, end_id, max_crops=None):
        height, width = image.shape[:2]
        rows, columns = min(
            ((r, c) for r in range(1, 5) for c in range(1, 5) if r * c <= (max_crops or self.max_crops)),
            key=lambda rc: (abs(np.log(rc[0] * width / (rc[1] * height))), -rc[0] * rc[1]),
        )
        overview, _ = fitted(image, SIDE, SIDE)
        whole, share = fitted(image, rows * SIDE, columns * SIDE)
        tiles = [(i * SIDE, j * SIDE) for i in range(rows) for j in range(columns)]
        crops = np.stack([patches(overview), *(patches(whole[y : y + SIDE, x : x + SIDE]) for y, x in tiles)])
        shares = np.stack([patches(share[y : y + SIDE, x : x + SIDE, None]).mean(-1) for y, x in tiles])
        masks = np.pad(shares, [[0, 1], [0, 0]], constant_values=-1)  # shifted by one tile, as the original does it

        def lines(tall, wide):
            return [start_id, *([patch_id] * wide + [col_id]) * tall, end_id]

        tokens = np.array(lines(2, 2) + lines(2 * rows, 2 * columns))
        spots = np.flatnonzero(tokens == patch_id)
        grid = spots[4:].reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
        return crops, tokens, np.concatenate([spots[None, :4], grid]), masks


def fitted(image, height, width):
    """Shrunk to fit, black on the right and below, 0..1; and where there is image."""
    scale = min(height / image.shape[0], width / image.shape[1])
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    small = np.asarray(Image.fromarray(image).resize(size), np.float32) / 255
    padding = [[0, height - size[1]], [0, width - size[0]]]
    return np.pad(small, [*padding, [0, 0]]), np.pad(np.ones(size[::-1], np.float32), padding)


def patches(tile):
    cells = tile.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH, -1).swapaxes(1, 2)
    return cells.reshape((SIDE // PATCH) ** 2, -1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.top_k = EXPERTS, TOP_K
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x):
        weights, chosen = torch.topk(self.gate(x).softmax(-1), self.top_k, dim=-1)
        every = torch.stack([torch.tanh(expert(x)) for expert in self.experts], dim=-2)
        picked = every.gather(-2, chosen[..., None].expand(*chosen.shape, WIDTH))
        return (weights[..., None] * picked).sum(-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Experts()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, bias, positions, layer_past, use_cache):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        q, k = turn(q, positions), turn(k, positions)
        if layer_past is not None:
            k, v = torch.cat([layer_past[0], k], dim=2), torch.cat([layer_past[1], v], dim=2)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, -q.shape[2] :])
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x)), (k, v) if use_cache else None


def turn(x, positions):
    """Rotary positions of half the channels with the other half."""
    a, b = x.chunk(2, dim=-1)
    angle = positions[:, None, :, None] / 10.0 ** torch.arange(a.shape[-1])
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.padding = nn.Linear(PATCH * PATCH * 3, WIDTH), nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, images, masks):
        found = torch.tanh(self.project(images))
        found = (
            found + self.padding[0] * (masks == 0)[..., None] + self.padding[1] * ((masks > 0) & (masks < 1))[..., None]
        )
        cells = found.unflatten(2, (2, 2, 2, 2)).mean(dim=(3, 5))  # rows, in a cell, columns, in a cell
        return cells.flatten(2, 3), None


class TinyMolmo(nn.Module):
    def __init__(self, seed=0, num_blocks=BLOCKS):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(len(VOCABULARY), WIDTH), "blocks": nn.ModuleList(Block() for _ in range(num_blocks)),
             "ln_f": nn.LayerNorm(WIDTH)}
        )  # fmt: skip
        self.model.vision_backbone = Vision()
        self.lm_head = nn.Linear(WIDTH, len(VOCABULARY))
        self.config = SimpleNamespace(n_layers=num_blocks)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(
        self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, images=None, image_masks=None,
        image_input_idx=None, past_key_values=None, use_cache=False,
    ):  # fmt: skip
        inner = self.model.transformer
        if past_key_values:
            assert len(past_key_values) == self.config.n_layers
        x = inner.wte(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        if attention_mask is None:
            attention_mask = input_ids != -1
        if position_ids is None:
            position_ids = attention_mask.long().cumsum(-1) - 1
        if images is not None:
            features = self.model.vision_backbone(images, image_masks)[0].flatten(1, 2)
            places = image_input_idx.flatten(1)[0]
            x = x.clone()
            x[0, places[places >= 0]] += features[0, places >= 0]
        length = past + x.shape[1]
        lowest = torch.finfo(x.dtype).min
        bias = torch.full((length, length), lowest).triu(1)[None, None]
        bias = (bias + (1 - attention_mask[:, None, None, :length].to(x.dtype)) * lowest).clamp(min=lowest)
        pairs = []
        for i, block in enumerate(inner.blocks):
            x, pair = block(x, bias, position_ids, past_key_values[i] if past_key_values else None, use_cache)
            pairs.append(pair)
        logits = self.lm_head(inner.ln_f(x))
        return SimpleNamespace(logits=logits, past_key_values=pairs if use_cache else None)


CODE = '''
from tiny_molmo import ImageProcessor, TinyMolmo
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel


class Config(PreTrainedConfig):
    model_type = "molmo"


class Processor(ImageProcessor, BaseImageProcessor):
    pass


class Model(PreTrainedModel):
    """As code of its time: without `post_init`, which `from_pretrained` of today needs."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        tiny = TinyMolmo(seed=1, num_blocks=config.n_layers)
        self.model, self.lm_head = tiny.model, tiny.lm_head

    forward = TinyMolmo.forward
'''


def write_tiny_molmo(directory):
    """Code, weights in two files, processor and tokenizer, as such a model's repository holds them."""
    (directory / "tiny_code.py").write_text(CODE)
    classes = {"AutoConfig": "tiny_code.Config", "AutoModelForCausalLM": "tiny_code.Model"}
    config = {"model_type": "molmo", "auto_map": classes, "n_layers": BLOCKS, "vision_backbone": {}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "tiny_code.Processor"}})
    )
    weights = list(TinyMolmo().state_dict().items())
    for i in (1, 2):
        save_file(dict(weights[i - 1 :: 2]), directory / f"model-{i}.safetensors")
    write_tokenizer(directory, "<image>")
    return directory
