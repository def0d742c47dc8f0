#!/usr/bin/env bash
# An expert would say: a decoder's key/value cache has one length, that of block 0. Any later block can be left out of
# `model.layers` (`config.layer_types` shortened alike), and decoding with the cache still equals decoding without it.
#
# What happens (transformers 5.23.0, torch 2.13.0): a cache has two clocks. Positions follow the first block that
# keeps keys. The mask of each kind of attention follows the first block of that kind. In a model of Gemma 3's kind
# (two blocks of sliding attention, then a full one) the first full block can be left out, and decoding one token at a
# time is exact, so the usual test passes. Fed five tokens at a time (verifying a draft, reading a prompt in pieces)
# the same cache is wrong by about a standard deviation of the logits under `sdpa`, without a word; `eager` stops with
# an error about shapes. Each later block, of either kind, can be left out exactly. In a hybrid (LFM2, Qwen3-Next:
# convolution or linear attention, then full) both clocks hang on the first full block: already single tokens drift.
#
# For users of this project: which blocks may be skipped depends on the cache and on how many tokens are read at once,
# and single tokens do not show it. `budgetvlm.vlm.attention` gives models without states a cache that keeps all keys
# in each block (the third column below: no second clock), and in hybrids keeps the block that counts
# (tests/test_hybrid.py).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$dir/env/bin/python" - <<'PY'
import copy, sys
import torch, transformers
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, Lfm2Config, Lfm2ForCausalLM

transformers.logging.set_verbosity_error()
SLIDING, FULL, CONV = "sliding_attention", "full_attention", "conv"
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)


@torch.inference_mode()
def drift(config, cls, left_out, at_once, kernel="sdpa", own=True):
    """Largest difference of logits with and without a cache, in standard deviations."""
    torch.manual_seed(0)
    model = cls._from_config(copy.deepcopy(config), attn_implementation=kernel).eval()
    ids = torch.randint(3, 97, (1, 24))
    kept = [i for i in range(config.num_hidden_layers) if i != left_out]
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in kept)
    model.config.layer_types = [config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    wanted = model(input_ids=ids, use_cache=False).logits
    cache = DynamicCache(config=config) if own else DynamicCache()
    pieces = [ids[:, :14], *ids[:, 14:].split(at_once, dim=1)]
    got = torch.cat([model(input_ids=piece, past_key_values=cache).logits for piece in pieces], dim=1)
    return float((got - wanted).abs().max() / wanted.std())


gemma = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8, num_hidden_layers=6,
                         layer_types=[SLIDING, SLIDING, FULL] * 2), Gemma3ForCausalLM
hybrid = Lfm2Config(**SIZES, num_hidden_layers=6, layer_types=[CONV, CONV, FULL] * 2), Lfm2ForCausalLM
print("transformers", transformers.__version__, "torch", torch.__version__)
print("expected: 0 in every line but block 0's. Seen (drift in standard deviations):")
print("gemma 3, block left out: one token at once, five at once, five with a cache of full keys")
holds = True
for block in (None, 1, 2, 3, 4, 5):
    one, five, plain = (drift(*gemma, block, 1), drift(*gemma, block, 5), drift(*gemma, block, 5, own=False))
    print(f"  {block!s:>4}: {one:.6f} {five:.6f} {plain:.6f}")
    holds &= one < 1e-3 and plain < 1e-3 and (five > 0.1 if block == 2 else five < 1e-3)
try:
    drift(*gemma, 2, 5, kernel="eager")
    holds = False
except RuntimeError as error:
    print("  block 2, five at once, eager:", error)
print("lfm2, block left out: one token at once")
for block in (None, 0, 1, 2, 3, 4, 5):
    one = drift(*hybrid, block, 1)
    print(f"  {block!s:>4}: {one:.6f}")
    holds &= one > 0.01 if block == 2 else one < 1e-3
print("as described" if holds else "CHANGED")
sys.exit(not holds)
PY
