"""The bundled model's architecture and tokenizer, from Transformers' own classes."""

from __future__ import annotations

import math

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    FocalNetConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    OlmoeConfig,
    PreTrainedTokenizerFast,
)

from budgetvlm.tasks import signs

TILE = 64
TOKENS_PER_TILE = 16
NUM_BLOCKS = 8
KNOB_SPACE = {"max_crops": [1, 4, 12], "top_k": [1, 2, 12], "num_active_blocks": [3, 4, 8]}
SPECIAL = ["<pad>", "<unk>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<a>"]
PROMPT = "<img>{image}</img>{question}<a>"


def vocabulary() -> list[str]:
    """Special tokens, characters, and every word of the task's questions and answers."""
    words = {word for phrases in signs.PHRASES.values() for phrase in phrases for word in phrase.split()}
    words = {word for word in words if "{" not in word}
    words |= {*signs.COLOURS, *signs.SHAPES, *signs.TOWNS}
    return [*SPECIAL, *"0123456789", *signs.LETTERS, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens; digits and capital letters are tokens of their own."""
    vocab = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Z]|[0-9]|[a-z]+|[^\sA-Za-z0-9]"), "removed", invert=True)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<img>", "</img>", "<IMG_CONTEXT>", "<a>"],
    )


def build_image_processor() -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=max(KNOB_SPACE["max_crops"]),
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )


def build_model(seed: int) -> InternVLForConditionalGeneration:
    """A model with random weights: about 4.3 million parameters."""
    torch.manual_seed(seed)
    vocab = vocabulary()
    vision = FocalNetConfig(
        image_size=TILE,
        patch_size=4,
        embed_dim=64,
        depths=[2, 3],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        use_conv_embed=True,
        hidden_size=128,
    )
    text = OlmoeConfig(
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=32,
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=24,
        num_experts_per_tok=12,
        norm_topk_prob=True,
        max_position_embeddings=512,
        pad_token_id=vocab.index("<pad>"),
        eos_token_id=vocab.index("</s>"),
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocab.index("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    config._experts_implementation = "eager"
    model = InternVLForConditionalGeneration(config)
    _initialise(model)
    return model


@torch.no_grad()
def _initialise(model: InternVLForConditionalGeneration) -> None:
    """Fan-in scaling instead of a fixed 0.02, which starts a small model too quietly."""
    for name, p in model.named_parameters():
        if p.dim() < 2 or "embed_tokens" in name or "lm_head" in name:
            continue
        fan_in = p.shape[-1] if p.dim() != 4 else p[0].numel()
        residual = any(part in name for part in ("o_proj", "down_proj", "fc2", "projection_out"))
        scale = 0.5 if residual else 1.0
        if ".gate.weight" in name:
            scale = 0.3
        p.normal_(0, scale / math.sqrt(fan_in))
    model.get_input_embeddings().weight.normal_(0, 0.5)
    model.lm_head.weight.normal_(0, 0.02)
