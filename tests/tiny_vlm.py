"""A tiny InternVL with a FocalNet tower and an OLMoE language model, random weights, in a directory of its own."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    FocalNetConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    OlmoeConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

SPECIAL = ["<pad>", "<unk>", "</s>", "<img>", "</img>", "<IMG_CONTEXT>", "<a>"]
WORDS = ["what", "is", "the", "red", "sign", "code", "A", "B", "C", "1", "2", "3", "sum", "of", "both", "colour"]
KNOBS = {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]}
ORDER = [0, 3, 2, 1]
PROMPT = "<img>{image}</img>{question}<a>"
TOKENS_PER_TILE = 4


def write_tiny_model(directory: Path, *, seed: int = 0) -> Path:
    """Save model, tokenizer, image processor and knobs; weights large enough that every knob changes the logits."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(_config())
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 1.0 / p[0].numel() ** 0.5)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, crop_to_patches=True, min_patches=1, max_patches=4
    ).save_pretrained(directory)
    knobs = {"knob_space": KNOBS, "block_order": ORDER, "prompt": PROMPT}
    (directory / "knobs.json").write_text(json.dumps(knobs))
    return directory


def _config() -> InternVLConfig:
    vision = FocalNetConfig(
        image_size=64, patch_size=8, embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3],
        hidden_size=16,
    )  # fmt: skip
    text = OlmoeConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, intermediate_size=16, num_hidden_layers=len(ORDER),
        num_attention_heads=2, num_key_value_heads=2, num_experts=6, num_experts_per_tok=4, norm_topk_prob=True,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=5, image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5, vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=True,
    )  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        additional_special_tokens=["<img>", "</img>", "<IMG_CONTEXT>", "<a>"],
    )  # fmt: skip
