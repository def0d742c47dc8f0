"""How long `budgetvlm check-model --quick` takes on a model of SmolVLM-256M's real size, with random weights.

    python benchmarks/checking.py DIR
    python benchmarks/checking.py DIR --build ../another/src

The model is written to DIR if it is not there. With `--build`, another build's sources check it as well, afterwards.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIAL = [
    "<|im_start|>", "<end_of_utterance>", "<|endoftext|>", "<fake_token_around_image>", "<image>", "<global-img>",
    *ROWS,
]  # fmt: skip
TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def write_model(directory: Path) -> None:
    """Write the model, its image processor and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    bytes_ = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"}, chat_template=TEMPLATE,
    ).save_pretrained(directory)  # fmt: skip
    text = {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49280, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "pad_token_id": 2, "eos_token_id": tokenizer.token_to_id("<end_of_utterance>"),
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "patch_size": 16, "image_size": 512,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "smolvlm", text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=True, pad_token_id=2,
        image_token_id=tokenizer.token_to_id("<image>"),
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)
    SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}).save_pretrained(
        directory
    )
    (directory / "processor_config.json").write_text('{"image_seq_len": 64}')
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters written to {directory}", flush=True)


def check(directory: Path, sources: Path | None, *, num_threads: int, limit_s: float) -> tuple[float, int | None]:
    """Return the seconds of one check and its exit code; None: it was stopped."""
    environment = {**os.environ, **({"PYTHONPATH": str(sources)} if sources else {})}
    words = ["-c", "from budgetvlm.cli import main; raise SystemExit(main())", "check-model", str(directory), "--quick"]
    began_s = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *words, "--num_threads", str(num_threads)], env=environment, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return time.perf_counter() - began_s, None
    return time.perf_counter() - began_s, done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--build", type=Path, metavar="SRC", help="sources of another build, to compare with")
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--limit_s", type=float, default=3600.0, help="a check that takes longer is stopped")
    args = parser.parse_args()
    if not (args.directory / "config.json").is_file():
        args.directory.mkdir(parents=True, exist_ok=True)
        write_model(args.directory)
    for name, sources in {"this build": None, "the other build": args.build}.items():
        if name == "this build" or sources:
            seconds, code = check(args.directory, sources, num_threads=args.num_threads, limit_s=args.limit_s)
            print(f"{name}: {seconds:.0f} s, {'stopped' if code is None else f'exit code {code}'}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
