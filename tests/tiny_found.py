"""Tiny models of types that no family is written for: their whole processor is saved, which the generic family uses."""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

from tiny_families import EXPERTS, HYBRID, ID, ROPE, TEXT, VISION, VIT, config

FOUND_TOKENS = {  # what processors ask the tokenizer for
    "image_start_token": "<start>", "image_end_token": "<end>", "slice_start_token": "<slice>",
    "slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
    "img_line_break_token": "<break>", "image_thumbnail": "<thumbnail>",
}  # fmt: skip
FOUND: dict[str, Callable[[], tuple[Any, Any, str, dict[str, Any]]]] = {}
NEED_TORCHVISION = ("kimi_k25", "lfm2_vl")
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
SIDE = {"height": 32, "width": 32}
AYA_KNOBS = {"knob_space": {"max_crops": [1, 2, 4], "num_active_blocks": [2, 3, 4]}}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}


def found(build: Callable[[], tuple[Any, Any, str, dict[str, Any]]]) -> Callable[[], Any]:
    """Register a builder: configuration, from tokenizer to processor, what stands for the image, knobs.json."""
    if HAS_TORCHVISION or build.__name__ not in NEED_TORCHVISION:
        FOUND[build.__name__] = build
    return build


@found
def ovis2():
    from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
    from transformers.models.ovis2.processing_ovis2 import Ovis2Processor

    marks = [ID[f"<IMG_{name}>"] for name in ("START", "GRID", "COL", "ROW", "END")]
    made = config(
        "ovis2", text_config={"model_type": "qwen2", **TEXT}, hidden_size=32, vocab_size=len(ID),
        vision_config={**VIT, "image_size": 32, "patch_size": 8, "vocab_size": 24, "hidden_stride": 2},
        visual_indicator_token_ids=marks, tie_word_embeddings=False,
    )  # fmt: skip
    made.image_token_id = ID["<IMG_ATOM>"]
    tiles = Ovis2ImageProcessorPil(size=SIDE, crop_to_patches=True, max_patches=4)
    return made, lambda t: Ovis2Processor(tiles, t, image_seq_length=4), "<image>", {}


@found
def minicpmv4_6():
    """A hybrid language model, and slices of the image's own shape."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    rope = {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    made = config(
        "minicpmv4_6", video_token_id=ID["<video>"], insert_layer_id=0, image_size=32,
        text_config={"model_type": "qwen3_5_text", **TEXT, **HYBRID, "num_hidden_layers": 6,
                     "full_attention_interval": 3, "rope_parameters": rope},
        vision_config={**VIT, "image_size": 32, "patch_size": 4},
    )  # fmt: skip
    slices = MiniCPMV4_6ImageProcessorPil(max_slice_nums=4, scale_resolution=32, patch_size=4)
    return made, lambda t: _Saved("MiniCPMV4_6Processor", slices, t), "<image>", {}


class _Saved:
    """Parts of a processor that is saved without being made: its class needs torchvision for videos."""

    def __init__(self, processor_class: str, *parts: Any) -> None:
        self.processor_class, self.parts = processor_class, parts

    def save_pretrained(self, directory: Any) -> None:
        for part in self.parts:
            part.save_pretrained(directory)
        (directory / "processor_config.json").write_text(json.dumps({"processor_class": self.processor_class}))


@found
def deepseek_ocr2():
    """A dense first block, shared experts, and half of the image reader made like a language model; long prompts."""
    from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
    from transformers.models.deepseek_ocr2.processing_deepseek_ocr2 import DeepseekOcr2Processor

    sam = {**VIT, "output_channels": 8, "image_size": 256, "patch_size": 4, "window_size": 14,
           "global_attn_indexes": [], "downsample_channels": [8, 16]}  # fmt: skip
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 2, "vocab_size": 8}  # fmt: skip
    text = {
        **TEXT, "n_routed_experts": 6, "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    }  # fmt: skip
    made = config("deepseek_ocr2", text_config=text, vision_config={"sam_config": sam, "encoder_config": encoder})
    images = DeepseekOcr2ImageProcessorPil(size={"height": 256, "width": 256}, tile_size=192, max_patches=2)
    knobs = {"knob_space": {"top_k": [1, 4], "num_active_blocks": [2, 4]}}
    return made, lambda t: DeepseekOcr2Processor(images, t, patch_size=4), "<image>", knobs


@found
def aya_vision():
    """Sliding windows shorter than the prompt, and a head that scales its logits."""
    from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    made = config(
        "aya_vision", text_config=_cohere2(), vision_config=SIGLIP, downsample_factor=2, tie_word_embeddings=True,
    )  # fmt: skip
    made.image_token_index = ID["<IMG_ATOM>"]
    marks = {"patch_size": 8, "downsample_factor": 2, "img_size": 32, "img_patch_token": "<IMG_ATOM>",
             "start_of_img_token": "<start>", "end_of_img_token": "<end>", "tile_token": "<slice>",
             "tile_global_token": "<break>"}  # fmt: skip
    tiles = GotOcr2ImageProcessorPil(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=4)
    return made, lambda t: AyaVisionProcessor(tiles, t, **marks), "<image>", AYA_KNOBS


def _cohere2():
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return {**TEXT, "model_type": "cohere2", "sliding_window": 6, "layer_types": kinds, "logit_scale": 0.25,
            "tie_word_embeddings": True}  # fmt: skip


@found
def vipllava():
    """Images of one size, and a language model whose routers hold the number of experts, not its blocks."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.processing_llava import LlavaProcessor

    experts = {"num_local_experts": 6, "num_experts_per_tok": 4, "sliding_window": None}
    made = config(
        "vipllava", text_config={"model_type": "mixtral", **TEXT, **experts}, vision_feature_layers=[-2, -1],
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
    )  # fmt: skip
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SIDE)
    select = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return made, lambda t: LlavaProcessor(images, t, **select), "<image>", {}


@found
def lfm2_vl():
    """Convolutions beside attention in the language model; images at their own shape in tiles of patches."""
    from transformers.models.lfm2_vl.image_processing_lfm2_vl import Lfm2VlImageProcessor
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    kinds = ["conv", "full_attention", "conv", "conv", "full_attention", "conv"]
    text = {**TEXT, "num_hidden_layers": 6, "model_type": "lfm2_moe", "layer_types": kinds, **EXPERTS,
            "num_dense_layers": 2, "use_expert_bias": True}  # fmt: skip
    text.pop("head_dim")
    made = config(
        "lfm2_vl", text_config=text, downsample_factor=2, projector_hidden_size=32, tie_word_embeddings=False,
        vision_config={**VIT, "model_type": "siglip2_vision_model", "num_patches": 64, "patch_size": 4,
                       "vision_use_head": False},
    )  # fmt: skip
    tiles = Lfm2VlImageProcessor(
        max_tiles=4, min_image_tokens=4, max_image_tokens=16, encoder_patch_size=4, tile_size=32, downsample_factor=2,
        size=SIDE,
    )  # fmt: skip
    return made, lambda t: Lfm2VlProcessor(tiles, t), "<image>", {}


@found
def kimi_k25():
    """Compressed keys and values, a dense first block, a shared expert; a limit of patches instead of tiles."""
    from transformers.models.kimi_k25.image_processing_kimi_k25 import Kimi_K25ImageProcessor

    text = {
        **TEXT, "model_type": "deepseek_v3", "num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    }  # fmt: skip
    text.pop("head_dim")
    made = config(
        "kimi_k25", text_config=text, projection_hidden_size=16, tie_word_embeddings=False,
        video_token_id=ID["<video>"],
        vision_config={**VIT, "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
    )  # fmt: skip
    images = Kimi_K25ImageProcessor(patch_size=4, max_patches=1024)
    return made, lambda t: _Saved("Kimi_K25Processor", images, t), "<image>", {"tokens_per_crop": 64}
