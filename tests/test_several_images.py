"""Several images, several turns, text alone: ids of the model's own processor, logits of its own forward."""

import pytest
import torch
from PIL import Image
from test_families import picture
from test_prompt_ids import KINDS, TEMPLATES, write_tokenizer
from tiny_families import NAMES, write_tiny_family
from tiny_more_families import BUILDERS

from budgetvlm.errors import InputError
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.conversation import about, read_messages
from budgetvlm.vlm.own_processor import NoReference
from budgetvlm.vlm.probe import Probe

FIRST, SECOND = picture(0), picture(1)
ONE_QUESTION = {"paligemma", "paligemma2"}  # of one image, and nothing else
ONE_IMAGE = {"llava_onevision"} | ONE_QUESTION
SPEAKS = [name for name in BUILDERS if name not in ONE_QUESTION]


def shown(image):
    return {"type": "image", "image": image}


def said(text):
    return {"type": "text", "text": text}


def chat(*images, first="what is the red sign"):
    """A system prompt, a question about the first image, its answer, and a question around the others."""
    return read_messages(
        [
            {"role": "system", "content": "the code"},
            {"role": "user", "content": [*map(shown, images[:1]), said(first)]},
            {"role": "assistant", "content": "A 1"},
            {"role": "user", "content": [said("sum of"), *map(shown, images[1:]), said("both")]},
        ]
    )


def prompt_of(vlm, conversation, crops):
    layouts = [vlm.images.layout_of(image, crops) for image in conversation.images]
    visual = [vlm.images.visual_tokens(image, crops) for image in conversation.images]
    texts = vlm.prompt.around(conversation, [layout.lead for layout in layouts])
    return vlm.embed_prompt.around(visual, texts, layouts)


def merged(name, one, two):
    """The arguments of two images, as the model's own processor puts them together."""
    if name == "molmo2":  # places of patches are counted on
        patches = one["pixel_values"].shape[:2].numel()
        places = two["image_token_pooling"]
        two = {**two, "image_token_pooling": torch.where(places < 0, places, places + patches)}
    along = 1 if name.startswith(("idefics", "smolvlm")) else 0
    return {k: torch.cat([v, two[k]], along) if torch.is_tensor(v) else v for k, v in one.items()}


@pytest.mark.parametrize("name", [name for name in SPEAKS if name not in ONE_IMAGE])
@torch.inference_mode()
def test_logits_behind_two_images_are_those_of_the_models_own_forward(models, name):
    vlm = models(name)
    crops, conversation = vlm.most_crops, chat(FIRST, SECOND)
    prompt = prompt_of(vlm, conversation, crops)
    got = vlm.decoder.logits(prompt.embeddings[None], **vlm.decoder_inputs([prompt]).prefill())[0]
    inputs = merged(name, *(vlm.images.plain(image, crops) for image in conversation.images))
    wanted = vlm.family.untouched_logits(vlm.model, prompt, inputs | vlm.family.plain_arguments(prompt, vlm.model))
    assert float((got - wanted).abs().max() / wanted.std()) < 1e-3


@pytest.mark.parametrize("name", SPEAKS)
@torch.inference_mode()
def test_a_conversation_is_answered_alike_one_by_one_and_with_its_overviews_known(models, name):
    """Its tokens are those of reading all at once; text alone has no visual token."""
    vlm = models(name)
    setting, images = vlm.knob_space.full, (FIRST,) if name in ONE_IMAGE else (FIRST, SECOND)
    for conversation in (chat(*images), chat()):
        made = vlm.generate(None, conversation, setting, max_new_tokens=3)
        known = [vlm.encode_overview(image) for image in conversation.images]
        assert vlm.generate(None, conversation, setting, max_new_tokens=3, overview=known).token_ids == made.token_ids
        prompt = prompt_of(vlm, conversation, vlm.most_crops)
        assert (len(prompt), prompt.num_image_tokens) == (
            made.num_vision_tokens + made.num_language_tokens, made.num_vision_tokens,
        )  # fmt: skip
        logits = vlm.decoder.logits(prompt.embeddings[None], **vlm.decoder_inputs([prompt]).prefill())
        assert int(logits.argmax()) == made.token_ids[0]
        vision, language = vlm.prompt_size(None, conversation)
        each = [vlm.prompt_size(image, "what")[0] for image in conversation.images]
        assert vision.tolist() == (sum(each).tolist() if each else [0.0] * len(vision))
        if name != "gemma3":  # its words in front of an image count as the image's here, and as text in a prompt
            assert (vision[-1], language) == (made.num_vision_tokens, made.num_language_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "style", "names"), [
    ("llava_next", "mistral", {}), ("llava_next", "begins", {}), ("gemma3", "begins", {}), ("idefics3", "mistral", {}),
    ("qwen2_5_vl", "trims", {}), ("internvl_dense", "vicuna", NAMES["internvl"]),
])  # fmt: skip
def test_ids_of_conversations_are_those_of_the_processors(tmp_path, kind, name, style, names):
    """Also where an image stands between words, and where a question comes in the general way."""
    directory = write_tiny_family(name, tmp_path)
    write_tokenizer(directory, kind, **names)
    place = "<start>" if name == "gemma3" else "<image>"
    (directory / "chat_template.jinja").write_text(TEMPLATES[style].replace("<image>", place))
    vlm = load_vlm(str(directory))
    probe = Probe(vlm, [FIRST], ["what"])
    for conversation in (chat(FIRST, SECOND), chat(FIRST), chat(FIRST, SECOND, first="  été \n12"), chat(FIRST, FIRST)):
        for crops in (1, vlm.most_crops):
            try:
                probe.same_ids(conversation, crops)
            except NoReference:
                assert crops == 1
    image = vlm.images.layout_of(FIRST, vlm.most_crops)
    for question in ["What is the red sign?", "  What is it", "is it <image> or <s>? </s>", "été 三 \U0001f600"]:
        alone = vlm.prompt.around(question, [image.lead])
        assert list(vlm.prompt.around(about(FIRST, question), [image.lead])) == list(alone)
        assert vlm.prompt.num_text_tokens(question) == vlm.prompt.num_text_tokens(about(FIRST, question))


@pytest.mark.parametrize("name", sorted(ONE_IMAGE))
def test_a_second_image_where_one_is_taken_is_refused(models, name):
    vlm = models(name)
    for ask in (vlm.prompt_size, lambda *asked: vlm.generate(*asked, vlm.knob_space.full)):
        with pytest.raises(InputError, match="takes one image"):
            ask(None, chat(FIRST, SECOND))


def test_a_model_without_a_chat_template_takes_one_question(models):
    with pytest.raises(InputError, match="takes one image and then one question"):
        models("paligemma").generate(None, chat(), models("paligemma").knob_space.full)


def test_images_of_other_sizes_stand_in_their_order(models):
    """The second image's rows and columns are its own, and the text behind it goes on after its longer side."""
    vlm = models("qwen2_5_vl")
    small = Image.new("RGB", (40, 100))
    for images in ((FIRST, small), (small, FIRST)):
        prompt = prompt_of(vlm, chat(*images), vlm.most_crops)
        grids = torch.tensor([[1, *vlm.images.layout_of(image, vlm.most_crops).grid] for image in images])
        ids, kinds = torch.tensor([prompt.token_ids]), prompt.visual_mask().long()[None]
        wanted, _ = vlm.model.model.get_rope_index(ids, image_grid_thw=grids, mm_token_type_ids=kinds)
        assert torch.equal(vlm.decoder_inputs([prompt]).prefill()["position_ids"], wanted)


def test_a_batch_may_hold_text_alone_beside_images(models):
    """Padding, positions and deep features are each prompt's own."""
    vlm = models("qwen3_vl")
    prompts = [prompt_of(vlm, chat(FIRST, SECOND), 4), prompt_of(vlm, chat(), 4)]
    together = vlm.decoder_inputs(prompts)
    with torch.inference_mode():
        logits = vlm.decoder.logits(together.embeddings(), **together.prefill())
        for row, prompt in zip(logits, prompts, strict=True):
            alone = vlm.decoder.logits(prompt.embeddings[None], **vlm.decoder_inputs([prompt]).prefill())[0]
            assert torch.allclose(row, alone, atol=1e-3)


def test_messages_that_a_template_refuses_are_refused_in_words(tmp_path):
    directory = write_tiny_family("llava_next", tmp_path)
    path = directory / "chat_template.jinja"
    path.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + path.read_text()
    )
    with pytest.raises(InputError, match="refuses these messages: no system here"):
        load_vlm(str(directory)).prompt_size(None, chat(FIRST))
