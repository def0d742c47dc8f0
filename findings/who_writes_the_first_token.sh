#!/usr/bin/env bash
# An expert would say: a chat template may write `<s>` itself or leave it to the processor; Transformers sees to it that
# a prompt has it once, so the ids of one conversation are the same either way. And the tokenizer's
# `apply_chat_template(tokenize=True)` gives the processor's ids but for the copies of the image token.
#
# What happens (transformers 5.23.0, a Llama tokenizer as Transformers makes it anew, inside LLaVA-NeXT's
# processor): both prompts begin with exactly one `<s>`, so nothing looks wrong, but the first word behind it differs:
# it has SentencePiece's mark for a blank in front only where the processor adds `<s>`, because the mark is put at the
# beginning of the text and `<s>` in the text takes that place. A model trained with one template meets another first
# token with the other. The tokenizer's own method drops `<s>` altogether where the template leaves it out. One blank
# line in front of the template's `<s>` is enough to get two of them, and not side by side. And what stands behind the
# image has other ids than when it is tokenised by itself. With the older kind of mark (`legacy=True`) the first word
# is the same in both.
#
# For users of this project: a prompt may not be put together from parts, and no rule of thumb about `<s>` replaces
# asking the processor. `budgetvlm.vlm.prompt` gives the ids of the whole text, `check-model` compares them with the
# model's own processor, and tests/test_prompt_ids.py does so for four kinds of tokenizers and templates of each kind.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -q torch==2.13.0 transformers==5.23.0 pillow==13.0.0 jinja2==3.1.6
HF_HUB_OFFLINE=1 "$dir/env/bin/python" - <<'PY'
import sys
import transformers
from itertools import groupby
from PIL import Image
from transformers import LlamaTokenizer
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

transformers.logging.set_verbosity_error()
TEMPLATE = ("{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}<image>"
            "{% else %}{{ c.text }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}")
image = Image.new("RGB", (28, 28))
talk = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]}]
merges = [(word[:i], word[i]) for word in ("USER", "What", "is", "it") for i in range(1, len(word))]
merges += [("▁", word) for word in ("USER", "What", "is", "it")]
pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", *map(chr, range(33, 127)), *(a + b for a, b in merges)]


def prompts(begin, legacy=False):
    """Tokens (copies of the image token once) by processor, by tokenizer, and of the text behind the image alone."""
    tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges,
                               legacy=legacy, add_bos_token=True, extra_special_tokens={"image_token": "<image>"})
    tokenizer.chat_template = begin + TEMPLATE
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                        image_grid_pinpoints=[[28, 56]])
    processor = LlavaNextProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                   num_additional_image_tokens=1, chat_template=begin + TEMPLATE)
    told = dict(tokenize=True, return_dict=True)
    (ids,) = processor.apply_chat_template(talk, **told)["input_ids"]
    behind = processor.apply_chat_template(talk, tokenize=False).split("<image>")[1]
    both = ids, tokenizer.apply_chat_template(talk, **told)["input_ids"]
    alone = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return [[t for t, _ in groupby(tokenizer.convert_ids_to_tokens(i))] for i in (*both, alone)]


print("transformers", transformers.__version__)
print("expected: one line of tokens, whoever writes <s> and whoever tokenises. Seen:")
written, _, alone = prompts("<s>")
added, by_tokenizer, _ = prompts("")
blank_line = prompts("\n<s>")[0]
behind = written[written.index("<image>") + 1 :]
for name, tokens in (("template writes <s>", written), ("processor adds <s>", added),
                     ("the same by the tokenizer", by_tokenizer), ("a blank line before <s>", blank_line),
                     ("behind the image, in the prompt", behind), ("behind the image, by itself", alone)):
    print(f"  {name:32}", " ".join(tokens[:7]))
holds = [
    written[:2] == ["<s>", "USER"] and added[:2] == ["<s>", "▁USER"] and written[2:] == added[2:],
    by_tokenizer == added[1:],
    blank_line.count("<s>") == 2 and blank_line[1] != "<s>",
    behind != alone,
    prompts("<s>", legacy=True)[0] == prompts("", legacy=True)[0],
]
print("as described" if all(holds) else f"CHANGED {holds}")
sys.exit(not all(holds))
PY
