"""Small models with random weights that an engine can load, written as public ones are: model, tokenizer, processor.

    python benchmarks/engines/served_models.py idefics3 DIR

They know nothing. What they share with public models is their code, their way from an image to tokens, and that more
tokens take longer. Heads are 32 wide, the least that vLLM's attention takes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

MARKS = ["<pad>", "<s>", "</s>", "<start>", "<image>", "<end>", "<answer>"]
IDEFICS_MARKS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
IDEFICS_MARKS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
NEWLINES = ["\n" * n for n in (1, 2, 3, 4)]  # Gemma's tokenizer has one token for each
SPACE = "▁"
VOCABULARY = [*MARKS, *IDEFICS_MARKS, *NEWLINES, SPACE, *string.digits, *string.ascii_letters, *string.punctuation]
ID = {word: i for i, word in enumerate(VOCABULARY)}

TILE, PATCH = 128, 16  # pixels
TEXT = {
    "vocab_size": len(VOCABULARY), "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 4096,
    "pad_token_id": ID["<pad>"], "bos_token_id": ID["<s>"], "eos_token_id": ID["</s>"], "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "patch_size": PATCH, "image_size": TILE,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}PLACE{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
Parts = tuple[Any, Any, str, dict[str, Any]]


def idefics3() -> Parts:
    """A grid of up to 4 x 4 tiles of 16 tokens, and the whole image as one more."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = AutoConfig.for_model(
        "idefics3", text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2,
        image_token_id=ID["<image>"], pad_token_id=ID["<pad>"], tie_word_embeddings=False,
    )  # fmt: skip
    images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE})
    return config, images, "<image>", {"processor_class": "Idefics3Processor", "image_seq_len": 16}


def gemma3() -> Parts:
    """The whole image in 16 tokens, and up to 4 crops of one that is oblong."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    kinds = ["sliding_attention", "full_attention"] * 3
    text = {**TEXT, "layer_types": kinds, "sliding_window": 1024, "query_pre_attn_scalar": 32}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, mm_tokens_per_image=16, tie_word_embeddings=False,
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=ID["<image>"], boi_token_index=ID["<start>"], eoi_token_index=ID["<end>"],
    )  # fmt: skip
    scan = {"pan_and_scan_min_crop_size": 32, "pan_and_scan_max_num_crops": 4}
    images = Gemma3ImageProcessorPil(
        size={"height": TILE, "width": TILE}, pan_and_scan_min_ratio_to_activate=1.2, do_pan_and_scan=True, **scan
    )
    return config, images, "<start>", {"processor_class": "Gemma3Processor", "image_seq_length": 16}


FAMILIES: dict[str, Callable[[], Parts]] = {"idefics3": idefics3, "gemma3": gemma3}


def write_tokenizer(directory: Path, place: str) -> None:
    """Save a tokenizer of single characters; `place` stands for the image in its chat template."""
    merges = [("\n", "\n"), ("\n\n", "\n"), ("\n\n", "\n\n")]
    tokenizer = Tokenizer(models.BPE(vocab=ID, merges=merges))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([*MARKS, *IDEFICS_MARKS])
    named = {"boi_token": "<start>", "eoi_token": "<end>", "image_token": "<image>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATE.replace("PLACE", place), extra_special_tokens=named, clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)  # fmt: skip


def name_as_published(path: Path) -> None:
    """Give the weights of Gemma 3's vision tower the names that public checkpoints have, and engines know."""
    weights = load_file(path)
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): held for name, held in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


def write_model(family: str, directory: Path, *, seed: int = 0) -> Path:
    """Save one model; its weights are large enough that its answers depend on image and question."""
    config, images, place, own = FAMILIES[family]()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, weights[0].numel() ** -0.5)
    model.save_pretrained(directory)
    name_as_published(directory / "model.safetensors")
    write_tokenizer(directory, place)
    images.save_pretrained(directory)
    path = directory / "processor_config.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | own))
    return directory


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args(argv)
    print(write_model(args.family, args.directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
