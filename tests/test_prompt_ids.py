"""A prompt's token ids are those of the model's own processor, whatever tokenizer, template and question."""

import json

import pytest
from PIL import Image
from tiny_families import ID, NAMED, NAMES, SPECIAL, write_tiny_family
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.conformance import prompt_is_the_processors
from budgetvlm.vlm.probe import Broken, Probe

TEXT = [
    "What is the red sign?\n\n\nAnswer with a letter: A, B or C. 12 + 3",
    "USER: what is this ASSISTANT: a sign [INST]",
]
CONTENT = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
)
MESSAGES = "{% for m in messages %}BEFORE" + CONTENT + "AFTER{% endfor %}"


def template(before, after):
    return MESSAGES.replace("BEFORE", before).replace("AFTER", after)


TEMPLATES = {
    "mistral": template("[INST] ", " [/INST]"),
    "vicuna": template("USER: ", " ASSISTANT:"),
    "begins": template("{{ bos_token }}USER: ", "{{ eos_token }}{% if add_generation_prompt %}A{% endif %}"),
    "trims": template("{{ '<start>' + m['role'] }}\n\n", "<end>\n").replace(
        "{{ c['text'] }}", "{{ c['text'] | trim }}"
    ),
}
QUESTIONS = [
    "What is the red sign?", "  What is it", "\n\nWhat\n is\tthis?\n", "A", "is it <image> or <s>? </s>",
    "été 三 \U0001f600",
]  # fmt: skip


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def metaspace(scheme):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def sentencepiece():
    """As SentencePiece's files were converted at first: the mark is text, put in front of every piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


KINDS = {
    "byte_level": byte_level, "metaspace_first": lambda: metaspace("first"),
    "metaspace_always": lambda: metaspace("always"), "sentencepiece": sentencepiece,
}  # fmt: skip


def write_tokenizer(directory, kind, *, begins=True, **names):
    """Replace a tiny model's tokenizer; special tokens keep their ids."""
    tokenizer = KINDS[kind]()
    trainer = trainers.BpeTrainer(vocab_size=len(SPECIAL) + 300, special_tokens=[*SPECIAL, "<s>"], show_progress=False)
    tokenizer.train_from_iterator([*TEXT * 3, *QUESTIONS[:4]], trainer)
    if begins:
        first = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        extra_special_tokens=NAMED | names,
    ).save_pretrained(directory)  # fmt: skip
    assert AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("<image>") == ID["<image>"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return write_tiny_family("llava_next", tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_of_llava_are_those_of_its_processor(llava, kind, style):
    """In the processor's own way, called as its documentation calls it."""
    write_tokenizer(llava, kind)
    (llava / "chat_template.jinja").write_text(TEMPLATES[style])
    vlm = load_vlm(str(llava))
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(llava), AutoTokenizer.from_pretrained(llava),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATES[style],
    )  # fmt: skip
    for size in [(150, 96), (33, 70)]:
        image = Image.new("RGB", size)
        layout = vlm.images.layout_of(image, vlm.most_crops)
        for question in QUESTIONS:
            if "<" in question:
                continue
            content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            wanted = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"][0]
            before, after = vlm.prompt.around_image(vlm.prompt.question_ids(question), layout.lead)
            assert [*before, *layout.ids, *after] == list(wanted), question
            assert (wanted[0] == vlm.prompt.tokenizer.bos_token_id) and wanted[1] != wanted[0]
            assert len(wanted) == vlm.prompt.num_text_tokens(question) + len(layout.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_question_are_plain_text(llava, kind):
    """As Transformers has it where it is asked to; by default it takes them for the model's own."""
    write_tokenizer(llava, kind)
    (llava / "chat_template.jinja").write_text(TEMPLATES["begins"])
    prompt = load_vlm(str(llava)).prompt
    question = "is it <image> or <s>? </s>"
    before, after = prompt.around_image(prompt.question_ids(question))
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    wanted = prompt.tokenizer.apply_chat_template(
        said, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True
    )
    assert [*before, ID["<image>"], *after] == wanted
    assert [i for i in after if i in prompt.tokenizer.all_special_ids and i != ID["<unk>"]] == [ID["</s>"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "style", "names"), [
    ("gemma3", "begins", {}), ("idefics3", "mistral", {}), ("qwen2_5_vl", "trims", {}),
    ("internvl_dense", "vicuna", NAMES["internvl"]),
])  # fmt: skip
def test_ids_of_other_families_are_those_of_their_processors(tmp_path, kind, name, style, names):
    directory = write_tiny_family(name, tmp_path)
    write_tokenizer(directory, kind, **names)
    place = "<start>" if name == "gemma3" else "<image>"
    (directory / "chat_template.jinja").write_text(TEMPLATES[style].replace("<image>", place))
    vlm = load_vlm(str(directory))
    images = [Image.new("RGB", size) for size in [(150, 96), (40, 100)]]
    assert "prompts alike" in prompt_is_the_processors(Probe(vlm, images, ["What is the red sign?"]))


def test_a_model_whose_prompts_are_not_its_processors_is_found_out(llava, monkeypatch):
    write_tokenizer(llava, "metaspace_first")
    (llava / "chat_template.jinja").write_text(TEMPLATES["mistral"])
    vlm = load_vlm(str(llava))
    probe = Probe(vlm, [Image.new("RGB", (150, 96))], ["What is the red sign?"])
    assert "prompts alike" in prompt_is_the_processors(probe)
    monkeypatch.setattr(vlm.prompt, "before_image", lambda lead: vlm.prompt.before[1:])
    with pytest.raises(Broken, match=r"from token 0 on .* instead of the processor's \['<s>'"):
        prompt_is_the_processors(probe)


def test_the_processors_chat_template_comes_before_the_tokenizers(llava):
    """As older models have it: one of text alone beside the tokenizer, the other in a file of its own."""
    write_tokenizer(llava, "byte_level")
    (llava / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((llava / "tokenizer_config.json").read_text())
    (llava / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ messages[0]['content'] }}"})
    )
    (llava / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATES["vicuna"]}))
    prompt = load_vlm(str(llava)).prompt
    (llava / "chat_template.json").unlink()
    assert prompt.tokenizer.decode(prompt.before) == "<s>USER: "
