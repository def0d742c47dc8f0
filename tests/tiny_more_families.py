"""Tiny models of families that share their classes with others, with the quirks of the public configurations."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_families import (
    BUILDERS,
    CROPS,
    EXPERTS,
    ID,
    PLACE,
    ROPE,
    TEXT,
    VISION,
    VIT,
    VOCABULARY,
    Written,
    config,
    family,
    patches,
    write_tiny_family,
)  # fmt: skip
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

__all__ = ["BUILDERS", "write_tiny_family"]

QWEN2_5_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "window_size": 16, "fullatt_block_indexes": [1],
}  # fmt: skip
QWEN3_VISION = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
GLM_VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "image_size": 32,
}  # fmt: skip
GLM_TEXT = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}


def glm_patches(module: str, name: str, **options: Any) -> Any:
    from importlib import import_module

    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 2 * 64}
    processor = getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)
    return processor(patch_size=4, size=size, **options)


@family
def glm46v():
    made = config("glm46v", text_config={"model_type": "glm4v_text", **GLM_TEXT}, vision_config=GLM_VISION)
    return made, glm_patches("glm46v", "Glm46VImageProcessorPil"), PLACE, CROPS


@family
def glmga():
    """Sizes are rounded to two merged patches."""
    made = config("glmga", text_config={"model_type": "glm4v_text", **GLM_TEXT}, vision_config=GLM_VISION)
    return made, glm_patches("glmga", "GlmgaImageProcessorPil", patch_expand_factor=2), PLACE, CROPS


@family
def glm_ocr():
    """Tied word embeddings."""
    made = config("glm_ocr", text_config=GLM_TEXT, vision_config=GLM_VISION, tie_word_embeddings=True)
    return made, glm_patches("glm46v", "Glm46VImageProcessorPil"), PLACE, CROPS


@family
def cosmos3_omni():
    text = {"model_type": "qwen3_vl_text", **TEXT, "rope_parameters": ROPE}
    return config("cosmos3_omni", text_config=text, vision_config=dict(QWEN3_VISION)), patches(), PLACE, CROPS


@family
def exaone4_5():
    """Full and sliding attention by turns; the window is shorter than the prompt."""
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text = {"model_type": "exaone4", **TEXT, "layer_types": kinds, "sliding_window": 6, "rope_parameters": None}
    vision = {**QWEN2_5_VISION, "num_key_value_heads": 1}
    return config("exaone4_5", text_config=text, vision_config=vision), patches(), PLACE, CROPS


class Within:
    """An image processor of a model whose configuration lies in that of another model, as in public checkpoints."""

    def __init__(self, processor: Any, outer: str, part: str) -> None:
        self.processor, self.outer, self.part = processor, outer, part

    def save_pretrained(self, directory: Path) -> None:
        self.processor.save_pretrained(directory)
        path = directory / "config.json"
        inner = json.loads(path.read_text())
        path.write_text(json.dumps({"model_type": self.outer, "architectures": ["Outer"], self.part: inner}))


AUDIO = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16, "output_dim": 32,
         "num_mel_bins": 8, "max_source_positions": 20, "n_window": 4}  # fmt: skip
OMNI = {"video_token_id": ID["<video>"], "audio_token_id": ID["<global-img>"], "vision_start_token_id": ID["<start>"]}


@family
def qwen2_5_omni():
    made = config(
        "qwen2_5_omni_thinker", text_config={**TEXT, "rope_parameters": ROPE}, vision_config=QWEN2_5_VISION,
        audio_config=AUDIO, **OMNI,
    )  # fmt: skip
    return made, Within(patches(), "qwen2_5_omni", "thinker_config"), PLACE, CROPS


@family
def qwen3_omni_moe():
    text = {**TEXT, **EXPERTS, "rope_parameters": ROPE}
    made = config(
        "qwen3_omni_moe_thinker", text_config=text, vision_config=QWEN3_VISION,
        audio_config={**AUDIO, "downsample_hidden_size": 8, "n_window_infer": 8}, **OMNI,
    )  # fmt: skip
    return made, Within(patches(), "qwen3_omni_moe", "thinker_config"), PLACE, CROPS


@family
def qianfan_ocr():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    made = config(
        "qianfan_ocr", text_config={"model_type": "qwen3", **TEXT}, image_seq_length=4, downsample_ratio=0.5,
        vision_config={**VIT, "patch_size": [8, 8], "image_size": [32, 32]},
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    tiles = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4)
    return made, tiles, "<image>", {}


def anyres(points: list[list[int]]) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = {"height": 32, "width": 32}
    return LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=points)


POINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
CLIP = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}


@family
def llava_next_video():
    made = config(
        "llava_next_video", text_config={"model_type": "llama", **TEXT}, vision_feature_select_strategy="default",
        vision_config=CLIP, vision_feature_layer=-2, image_grid_pinpoints=POINTS, video_token_id=ID["<video>"],
    )  # fmt: skip
    return made, anyres(POINTS), "<image>", {}


@family
def llava_next_granite():
    """As Granite Vision: features of several depths of the vision tower, scaled embeddings, tied word embeddings."""
    text = {"model_type": "granite", **TEXT, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
    made = config(
        "llava_next", text_config=text, vision_feature_select_strategy="full", vision_config=SIGLIP,
        vision_feature_layer=[-2, -1], image_grid_pinpoints=POINTS, tie_word_embeddings=True,
    )  # fmt: skip
    return made, anyres(POINTS), "<image>", {}


PIXTRAL_TOWER = {"model_type": "pixtral", **VIT, "head_dim": 8, "patch_size": 4, "image_size": 64}


def sized(patch: int) -> Any:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    return PixtralImageProcessorPil(patch_size={"height": patch, "width": patch}, size={"longest_edge": 64})


@family
def mistral3():
    text = {"model_type": "mistral", **TEXT, "sliding_window": None}
    made = config(
        "mistral3", text_config=text, vision_config=PIXTRAL_TOWER, spatial_merge_size=2, vision_feature_layer=-1
    )
    return made, sized(4), "<image>", CROPS


@family
def pixtral():
    """A model of type LLaVA whose vision tower is Pixtral's."""
    text = {"model_type": "mistral", **TEXT, "sliding_window": 6}
    made = config(
        "llava", text_config=text, vision_config={**PIXTRAL_TOWER, "patch_size": 8}, vision_feature_layer=-1,
        vision_feature_select_strategy="full", image_seq_length=1,
    )  # fmt: skip
    return made, sized(8), "<image>", CROPS


@family
def lighton_ocr():
    text = {"model_type": "qwen3", **TEXT}
    made = config("lighton_ocr", text_config=text, vision_config=PIXTRAL_TOWER, spatial_merge_size=2)
    return made, sized(8), "<image>", CROPS


@family
def llava():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    made = config(
        "llava", text_config={"model_type": "llama", **TEXT}, vision_config=CLIP, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return made, CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side), "<image>", {}


def squares() -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)


@family
def paligemma():
    text = {"model_type": "gemma", **TEXT, "bos_token_id": ID["<start>"]}
    made = config("paligemma", text_config=text, vision_config=SIGLIP, projection_dim=32, hidden_size=32)
    return made, squares(), "", {}


@family
def paligemma2():
    """Full and sliding attention by turns, bounded logits."""
    text = {"model_type": "gemma2", **TEXT, "sliding_window": 6, "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0}  # fmt: skip
    made = config("paligemma", text_config=text, vision_config=SIGLIP, projection_dim=32, hidden_size=32)
    return made, squares(), "", {}


class Tower(PreTrainedModel):
    """Stands in for the vision tower of Gemma 3n, which is timm's."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, 8, 8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        return BaseModelOutputWithPooling(last_hidden_state=self.patches(pixel_values).tanh())


AutoModel.register(Gemma3nVisionConfig, Tower, exist_ok=True)


@family
def gemma3n():
    """Late blocks read the keys and values of blocks 2 and 3; another table has the mark behind an image."""
    kinds = ["sliding_attention", "full_attention"] * 3
    words = len(VOCABULARY)
    text = {
        **TEXT, "num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 6, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": words - 2, "hidden_size_per_layer_input": 4, "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 4, "laurel_rank": 4, "altup_num_inputs": 2,
        "final_logit_softcapping": 5.0,
    }  # fmt: skip
    audio = {"hidden_size": 8, "vocab_size": 4, "vocab_offset": words, "conf_num_attention_heads": 2,
             "conf_num_hidden_layers": 1, "input_feat_size": 8, "sscp_conv_channel_size": [4, 4]}  # fmt: skip
    made = config(
        "gemma3n", text_config=text, vision_soft_tokens_per_image=16, audio_token_id=words + 3, audio_config=audio,
        vision_config={"hidden_size": 16, "vocab_size": 2, "vocab_offset": words - 2},
        boi_token_id=ID["<start>"], eoi_token_id=words - 2,
    )  # fmt: skip
    return made, squares(), "<image>", {}


@family
def idefics2():
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    perceiver = {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2,
                 "resampler_head_dim": 8, "num_key_value_heads": 1}  # fmt: skip
    made = config(
        "idefics2", text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        vision_config={**VIT, "patch_size": 8, "image_size": 64}, perceiver_config=perceiver, pad_token_id=0,
    )  # fmt: skip
    return made, Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 64}), "<image>", {}


@family
def cohere2_vision():
    """Sliding attention without positions by turns."""
    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    text = {"model_type": "cohere2", **TEXT, "layer_types": kinds, "sliding_window": 6, "logit_scale": 1.0}
    made = config(
        "cohere2_vision", text_config=text, vision_config=SIGLIP, downsample_factor=2,
        alignment_intermediate_size=24, tie_word_embeddings=True,
    )  # fmt: skip
    settings = {"image_processor_type": "Cohere2VisionImageProcessor", "size": {"height": 32, "width": 32},
                "max_patches": 6}  # fmt: skip
    return made, Written("preprocessor_config.json", settings), "<image>", {}


@family
def perception_lm():
    """A vision tower that is not timm's."""
    vision = {**SIGLIP, "model_args": {"embed_dim": 16}}
    made = config(
        "perception_lm", text_config={"model_type": "llama", **TEXT}, vision_config=vision, vision_use_cls_token=False,
        projector_pooling_ratio=2, video_token_id=ID["<video>"],
    )  # fmt: skip
    settings = {"image_processor_type": "PerceptionLMImageProcessor", "tile_size": 32, "max_num_tiles": 4,
                "patch_size": 8}  # fmt: skip
    return made, Written("preprocessor_config.json", settings), "<image>", {}
