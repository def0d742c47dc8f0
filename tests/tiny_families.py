"""Tiny models of every family, random weights, written to a directory as `save_pretrained` does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast

WORDS = ["what", "is", "the", "red", "sign", "code", "A", "B", "C", "1", "2", "3", "sum", "of", "both", "colour", ":"]
WORDS += "Here original image and here are some crops to help you see better".split()
MARKS = {
    "start": "<start>", "image": "<image>", "end": "<end>", "video": "<video>", "fake": "<fake_token_around_image>",
    "global": "<global-img>", "answer": "<a>",
}  # fmt: skip
ROWS = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
SPECIAL = ["<pad>", "<unk>", "</s>", *MARKS.values(), *ROWS]
LLAMA4 = [
    f"<|{mark}|>" for mark in ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
]
MOLMO2 = [f"<{mark}>" for mark in ("im_patch", "im_col", "im_start", "low_res_im_start", "im_end")]
FOUND_MARKS = [f"<IMG_{name}>" for name in ("START", "ATOM", "GRID", "COL", "ROW", "END")]
FOUND_MARKS += ["<slice>", "</slice>", "<image_id>", "</image_id>", "<break>", "<thumbnail>"]
VOCABULARY = SPECIAL + WORDS + LLAMA4 + MOLMO2 + FOUND_MARKS
ID = {word: i for i, word in enumerate(VOCABULARY)}
NAMED = {  # what processors ask the tokenizer for
    "boi_token": "<start>", "eoi_token": "<end>", "image_token": "<image>", "video_token": "<video>",
    "img_line_break_token": "<video>", "image_break_token": "<video>", "image_end_token": "<end>",
}  # fmt: skip
OMNI = {
    "vision_bos_token": "<start>", "vision_eos_token": "<end>", "audio_token": "<global-img>",
    "audio_bos_token": "<start>", "audio_eos_token": "<end>",
}  # fmt: skip
NAMES = {
    "internvl": {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"},
    "paligemma": {"bos_token": "<start>"}, "paligemma2": {"bos_token": "<start>"},
    "gemma4": {"boa_token": "<start>", "eoa_token": "<end>"},
    "qianfan": {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"},
    "gemma3n": {
        "boa_token": "<start>", "eoa_token": "<end>", "audio_token": "<global-img>", "eoi_token": VOCABULARY[-2],
    },
    "qwen2": OMNI, "qwen3": OMNI,
    "ernie4": {"image_start_token": "<start>", "image_end_token": "<end>", "video_start_token": "<start>",
               "video_end_token": "<end>"},
}  # fmt: skip
PIXTRAL = {"image_token": "<image>", "image_break_token": "<video>", "image_end_token": "<end>"}
OWN = {  # settings of the model's own processor
    "llava_next": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava_onevision": {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    },
    "idefics3": {"image_seq_len": 4},
    "smolvlm": {"image_seq_len": 4},
    "internvl": {"image_seq_length": 4},
    "gemma3": {"image_seq_length": 4},
    "aria": {"size_conversion": {"490": 6}},
    "llama4": {"patch_size": 8, "pixel_shuffle_ratio": 0.5},
    "qianfan_ocr": {"image_seq_length": 4},
    "llava": {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    "llava_next_granite": {"patch_size": 8, "vision_feature_select_strategy": "full"},
    "mistral3": {"patch_size": 4, "spatial_merge_size": 2} | PIXTRAL,
    "pixtral": {"patch_size": 8, "processor_class": "PixtralProcessor"} | PIXTRAL,
    "lighton_ocr": {"patch_size": 4, "spatial_merge_size": 2},
    "idefics2": {"image_seq_len": 3},
    "gemma3n": {"image_seq_length": 16},
    "perception_lm": {"patch_size": 8, "pooling_ratio": 2},
}
OWN["llava_next_video"] = OWN["llava_next"]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {
    **SMALL, "vocab_size": len(VOCABULARY), "intermediate_size": 48, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "norm_topk_prob": True}
VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**VIT, "patch_size": 8, "image_size": 32}
ROPE = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]}
BUILDERS: dict[str, Callable[[], tuple[Any, Any, str, dict[str, Any]]]] = {}


def family(build: Callable[[], tuple[Any, Any, str, dict[str, Any]]]) -> Callable[[], Any]:
    """Register a builder: configuration, image processor, what stands for the image in a prompt, knobs.json."""
    BUILDERS[build.__name__] = build
    return build


def write_tiny_family(which: str, directory: Path) -> Path:
    """Save one model; weights large enough that every knob changes the logits."""
    first = which.partition("_")[0]
    own = OWN.get(first if first == "internvl" else which, {})
    write_tiny(*BUILDERS[which](), directory, NAMES.get(first, {}), own)
    return directory


def write_tiny(
    config: Any, processor: Any, place: str, knobs: Any, directory: Path, names: Any = None, own: Any = None
) -> None:
    """Save a model of this configuration.

    Args:
        processor: of images, or a function from a tokenizer to the model's own processor.
        names: special tokens that the model's own processor asks the tokenizer for.
        own: settings of the model's own processor.
    """
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 1.0 / (p.shape[-1] if "experts" in name else p[0].numel()) ** 0.5)
    model.save_pretrained(directory)
    write = write_byte_tokenizer if config.model_type.startswith("qwen3_5") else write_tokenizer
    write(directory, place, **(names or {}))
    if callable(processor) and not hasattr(processor, "save_pretrained"):
        processor = processor(AutoTokenizer.from_pretrained(directory))
    processor.save_pretrained(directory)
    if own is not None:
        path = directory / "processor_config.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | own))
    (directory / "knobs.json").write_text(json.dumps(knobs))


def write_tokenizer(directory: Path, place: str, **names: str) -> None:
    """Save a tokenizer; ``names`` are special tokens that the model's own processor asks it for."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*SPECIAL, *LLAMA4, *MOLMO2, *FOUND_MARKS])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_named(place, names)).save_pretrained(directory)


def write_byte_tokenizer(directory: Path, place: str, **names: str) -> None:
    """Save a tokenizer as Transformers makes it for Qwen3.5 whatever the directory says: bytes, and whole words."""
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    tokenizer = Qwen3_5Tokenizer(vocab=ID, merges=[], **_named(place, names))
    tokenizer.add_tokens([*SPECIAL, *LLAMA4, *MOLMO2, *FOUND_MARKS], special_tokens=True)
    tokenizer.add_tokens(WORDS)
    tokenizer.save_pretrained(directory)


def _named(place: str, names: dict[str, str]) -> dict[str, Any]:
    first = names.pop("bos_token", None)
    return {
        "pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "bos_token": first,
        "chat_template": TEMPLATE.replace("PLACE", place) if place else None, "extra_special_tokens": NAMED | names,
    }  # fmt: skip


def config(model_type: str, **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, image_token_id=ID["<image>"], **fields)


@family
def llava_next():
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    points = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    made = config(
        "llava_next", text_config={"model_type": "llama", **TEXT}, vision_feature_select_strategy="default",
        vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16}, vision_feature_layer=-2,
        image_grid_pinpoints=points,
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return (
        made,
        LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=side, image_grid_pinpoints=points),
        "<image>",
        {},
    )


@family
def llava_onevision():
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    points = [[32 * r, 32 * c] for r in (1, 2, 3) for c in (1, 2, 3)]
    made = config(
        "llava_onevision", text_config={"model_type": "qwen2", **TEXT}, vision_feature_select_strategy="full",
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        vision_feature_layer=-1, image_grid_pinpoints=points, vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    side = {"height": 32, "width": 32}
    return made, LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=points), "<image>", {}


def patches(**options):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 64}
    return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size, **options)


CROPS = {"tokens_per_crop": 16}
PLACE = "<start><image><end>"


@family
def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
    made = config("qwen2_5_vl", text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)
    return made, patches(), PLACE, CROPS


@family
def qwen3_vl():
    made = config("qwen3_vl", text_config={**TEXT, "rope_parameters": ROPE}, vision_config=_qwen3_vision())
    return made, patches(), PLACE, CROPS


@family
def qwen3_vl_moe():
    text = {**TEXT, **EXPERTS, "rope_parameters": ROPE, "decoder_sparse_step": 1}
    return config("qwen3_vl_moe", text_config=text, vision_config=_qwen3_vision()), patches(), PLACE, CROPS


def _qwen3_vision():
    return {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}  # fmt: skip


@family
def glm4v_moe():
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "n_routed_experts": 6,
            "num_experts_per_tok": 4, "n_group": 1,
            "moe_intermediate_size": 16, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 32, "image_size": 32}  # fmt: skip
    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 2 * 64}
    return (
        config("glm4v_moe", text_config=text, vision_config=vision),
        Glm4vImageProcessorPil(patch_size=4, size=size),
        PLACE,
        CROPS,
    )


@family
def ernie4_5_vl_moe():
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeImageProcessorPil,
    )

    text = {**TEXT, **EXPERTS, "moe_intermediate_size": [16, 8], "moe_k": 4, "moe_num_shared_experts": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "rope_parameters": ROPE}  # fmt: skip
    text.pop("norm_topk_prob")
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    made = config(
        "ernie4_5_vl_moe", text_config=text, vision_config=vision, image_start_token_id=ID["<start>"],
        image_end_token_id=ID["<end>"], video_token_id=ID["<video>"],
    )  # fmt: skip
    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 64}
    return made, Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size=size), PLACE, CROPS


def _idefics3(model_type, image_processor):
    made = config(
        model_type, text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
    return made, image_processor(**sizes), "<image>", {}


@family
def idefics3():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return _idefics3("idefics3", Idefics3ImageProcessorPil)


@family
def smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    return _idefics3("smolvlm", SmolVLMImageProcessorPil)


@family
def aria():
    from transformers.models.aria.image_processing_pil_aria import AriaImageProcessorPil

    text = {**TEXT, "moe_num_experts": 6, "moe_topk": 4, "moe_num_shared_experts": 1, "intermediate_size": 16}
    vision = {**VIT, "model_type": "idefics3_vision", "patch_size": 70, "image_size": 490}
    made = AutoConfig.for_model(
        "aria", text_config=text, vision_config=vision, image_token_index=ID["<image>"],
        projector_patch_to_query_dict={49: 6},
    )  # fmt: skip
    sizes = [[490, 980], [980, 490], [980, 980]]
    return made, AriaImageProcessorPil(max_image_size=490, split_resolutions=sizes), PLACE, {}


@family
def gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "num_hidden_layers": 5, "layer_types": kinds, "sliding_window": 6, "query_pre_attn_scalar": 8}
    made = AutoConfig.for_model(
        "gemma3", text_config=text,
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=ID["<image>"], boi_token_index=ID["<start>"], eoi_token_index=ID["<end>"],
        mm_tokens_per_image=4, tie_word_embeddings=False,
    )  # fmt: skip
    scan = {"pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    return made, Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **scan), "<start>", {}


@family
def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    made = config("qwen2_vl", text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision)
    return made, patches(), PLACE, CROPS


@family
def glm4v():
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 32, "image_size": 32}  # fmt: skip
    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
    size = {"shortest_edge": 8 * 8, "longest_edge": 8 * 8 * 2 * 64}
    return (
        config("glm4v", text_config=text, vision_config=vision),
        Glm4vImageProcessorPil(patch_size=4, size=size),
        PLACE,
        CROPS,
    )


def _internvl(text):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    made = config(
        "internvl", text_config={**TEXT, **text}, image_seq_length=4, downsample_ratio=0.5,
        vision_config={**VIT, "model_type": "internvl_vision", "patch_size": [8, 8], "image_size": [32, 32]},
    )  # fmt: skip
    tiles = GotOcr2ImageProcessorPil(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return made, tiles, "<image>", {}


@family
def internvl_dense():
    return _internvl({"model_type": "qwen3"})


@family
def internvl_qwen3_moe():
    return _internvl({"model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [1]})


@family
def internvl_gpt_oss():
    """Full and sliding attention by turns; the window is shorter than the prompt."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return _internvl(
        {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 4, "sliding_window": 6,
         "layer_types": kinds}
    )  # fmt: skip


def _gemma4(**text):
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    kinds = ["sliding_attention", "full_attention"] * 3
    made = config(
        "gemma4", boi_token_id=ID["<start>"], eoi_token_id=ID["<end>"], video_token_id=ID["<video>"],
        text_config={
            **TEXT, "num_hidden_layers": 6, "layer_types": kinds, "sliding_window": 6, "global_head_dim": 16,
            "vocab_size_per_layer_input": len(VOCABULARY), "hidden_size_per_layer_input": 0, **text,
        },
        vision_config={**VIT, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
                       "position_embedding_size": 512},
        audio_config=None, audio_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return made, Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=140), "<image>", {}


@family
def gemma4_shared():
    """As the small sizes: late blocks read the keys and values of blocks 2 and 3; embeddings for each block."""
    return _gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=4, final_logit_softcapping=5.0)


@family
def gemma4_moe():
    return _gemma4(
        enable_moe_block=True, num_experts=6, top_k_experts=4, moe_intermediate_size=16,
        use_bidirectional_attention="vision",
    )  # fmt: skip


class Written:
    """An image processor's file, of a class that Transformers has for torchvision alone."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings

    def save_pretrained(self, directory: Path) -> None:
        (directory / self.name).write_text(json.dumps(self.settings))


@family
def llama4():
    """Chunks shorter than the prompt; a block in between without experts and without positions."""
    text = {
        **TEXT, "intermediate_size_mlp": 48, "num_local_experts": 6, "num_experts_per_tok": 4, "moe_layers": [0, 1, 3],
        "attention_chunk_size": 16, "no_rope_layers": [1, 1, 0, 1],
    }  # fmt: skip
    vision = {**VISION, "projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24,
              "intermediate_size": 64}  # fmt: skip
    made = AutoConfig.for_model(
        "llama4", text_config=text, vision_config=vision, image_token_index=ID["<|patch|>"],
        boi_token_index=ID["<|image_start|>"], eoi_token_index=ID["<|image_end|>"],
    )  # fmt: skip
    settings = {"image_processor_type": "Llama4ImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,
                "max_patches": 4, "resize_to_max_canvas": False, "rescale_factor": 1 / 255,
                "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    return made, Written("preprocessor_config.json", settings), "<|image|>", {}


@family
def molmo2():
    """Scaled positions in some blocks; embeddings beyond the head's vocabulary; an odd number of patches."""
    half = {"num_key_value_heads": 2, "head_dim": 8}
    rope = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    made = AutoConfig.for_model(
        "molmo2", image_patch_id=ID["<im_patch>"], image_start_token_id=ID["<im_start>"],
        low_res_image_start_token_id=ID["<low_res_im_start>"], image_end_token_id=ID["<im_end>"],
        text_config={**TEXT, "additional_vocab_size": 4, "rope_parameters": rope, "rope_scaling_layers": [0, 2]},
        vision_config={**VIT, **half, "num_hidden_layers": 3, "patch_size": 4, "image_size": [20, 20]},
        adapter_config={**half, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24,
                        "text_hidden_size": 32, "vision_feature_layer": [2, 0]},
    )  # fmt: skip
    images = {"image_processor_type": "Molmo2ImageProcessor", "size": {"height": 20, "width": 20}, "max_crops": 4,
              "overlap_margins": [1, 1], "patch_size": 4, "pooling_size": [2, 2], "image_mean": [0.5] * 3,
              "image_std": [0.5] * 3}  # fmt: skip
    settings = {"image_processor": images, "image_use_col_tokens": True, "use_single_crop_col_tokens": False}
    return made, Written("processor_config.json", settings), "<image>", {}


HYBRID = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip


def _qwen3_5(model_type, **text):
    """As the public ones: the last of every few blocks has full attention, which is why block 0 knows no length."""
    rope = {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True}
    text = {**TEXT, **HYBRID, "num_hidden_layers": 6, "full_attention_interval": 3, "rope_parameters": rope, **text}
    vision = {name: value for name, value in _qwen3_vision().items() if name != "deepstack_visual_indexes"}
    made = config(
        model_type, text_config=text, vision_config=vision, vision_start_token_id=ID["<start>"],
        vision_end_token_id=ID["<end>"], video_token_id=ID["<video>"],
    )  # fmt: skip
    return made, patches(), PLACE, CROPS


@family
def qwen3_5():
    return _qwen3_5("qwen3_5", tie_word_embeddings=True)


@family
def qwen3_5_moe():
    experts = {name: value for name, value in EXPERTS.items() if name != "norm_topk_prob"}
    return _qwen3_5("qwen3_5_moe", **experts, shared_expert_intermediate_size=16)
