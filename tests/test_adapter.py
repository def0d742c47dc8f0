"""The adapter on a tiny InternVL with experts: knobs are released, the cache is right, tiles are Transformers' own."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import KNOBS, ORDER, TOKENS_PER_TILE, write_tiny_model

from benchmarks.block_orders import block_changes, likelihood
from budgetvlm.errors import CheckpointError, ConfigError, InputError, KnobSpaceError
from budgetvlm.knobs import KnobSpace
from budgetvlm.vlm import STAGES, VLM, load_vlm
from budgetvlm.vlm.decoding import mean_embedder
from budgetvlm.vlm.families.base import pool

SPACE = KnobSpace(KNOBS)
QUESTIONS = ["what is the red sign", "sum of both", "colour of the sign", "code"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vlm(directory):
    return load_vlm(str(directory))


def picture(seed=0, size=(256, 192)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def prompt_ids(vlm, question, num_tiles):
    text = f"<img>{'<IMG_CONTEXT>' * (num_tiles * TOKENS_PER_TILE)}</img>{question}<a>"
    return torch.tensor([vlm.prompt.tokenizer.encode(text, add_special_tokens=False)])


def plain_logits(vlm, image, question, max_crops):
    """Transformers' own path, with nothing of the adapter's: processor, prompt as text, one forward."""
    done = vlm.images.processor(image, max_patches=max_crops, return_tensors="pt")
    ids = prompt_ids(vlm, question, int(done["num_patches"][0]))
    with torch.inference_mode():
        return vlm.model(input_ids=ids, pixel_values=done["pixel_values"]).logits[:, -1]


def adapter_logits(vlm, image, question, max_crops, overview=None):
    with torch.inference_mode():
        return vlm.decoder.logits(
            prompt_of(
                vlm,
                vlm.images.visual_tokens(image, max_crops, overview and overview.tokens),
                question,
                max_crops,
                image,
            )
        )


def prompt_of(vlm, visual, question, max_crops, image=None):
    layout = vlm.images.layout_of(image or picture(), max_crops)
    return vlm.embed_prompt(visual, vlm.prompt.question_ids(question), layout).embeddings[None]


def state(vlm):
    language = vlm.decoder.model
    return [r.top_k for r in routers(vlm)], list(language.layers), language.config.num_hidden_layers


def routers(vlm):
    return [layer.mlp.gate for layer in vlm.decoder.model.layers]


def test_it_is_a_vlm_with_the_knobs_of_its_file(vlm):
    assert isinstance(vlm, VLM)
    assert vlm.knob_space == SPACE
    assert vlm.num_total_blocks == 4
    assert [vlm.active_blocks(n) for n in (2, 3, 4)] == [(0, 3), (0, 2, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize("max_crops", KNOBS["max_crops"])
def test_with_all_blocks_on_the_logits_are_those_of_the_untouched_model(vlm, max_crops):
    image = picture()
    untouched = plain_logits(vlm, image, QUESTIONS[0], max_crops)
    with vlm.apply(SPACE.setting(max_crops=max_crops, top_k=4, num_active_blocks=4)):
        assert torch.equal(plain_logits(vlm, image, QUESTIONS[0], max_crops), untouched)
        assert torch.allclose(adapter_logits(vlm, image, QUESTIONS[0], max_crops), untouched, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 192), (64, 64), (40, 300), (130, 120)])
@pytest.mark.parametrize("max_crops", [1, 2, 4])
def test_tiles_are_those_of_the_processor(vlm, size, max_crops):
    image = picture(1, size)
    expected = vlm.images.processor(image, max_patches=max_crops, return_tensors="pt")["pixel_values"]
    assert torch.allclose(vlm.images.all(image, max_crops), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(256, 192), (64, 64)])
@pytest.mark.parametrize("max_crops", [1, 4])
def test_a_reused_overview_changes_no_logits(vlm, size, max_crops):
    image = picture(2, size)
    overview = vlm.encode_overview(image)
    reused = adapter_logits(vlm, image, QUESTIONS[0], max_crops, overview)
    assert torch.allclose(reused, plain_logits(vlm, image, QUESTIONS[0], max_crops), atol=1e-5)


def test_every_knob_changes_the_logits(vlm):
    """Otherwise the tests of this file would pass with knobs that do nothing."""
    seen = {}
    for setting in SPACE.settings:
        with vlm.apply(setting):
            seen[setting] = adapter_logits(vlm, picture(), QUESTIONS[0], setting["max_crops"])
    for name in SPACE.names:
        smaller = SPACE.setting(**{**SPACE.full, name: SPACE.values(name)[0]})
        assert not torch.allclose(seen[smaller], seen[SPACE.full], atol=1e-3), name


@pytest.mark.parametrize("setting", SPACE.settings, ids=str)
def test_cached_decoding_is_uncached_decoding(vlm, setting):
    """Every step's logits, from the cache, equal those of reading the whole prompt and answer again."""
    with vlm.apply(setting), torch.inference_mode():
        visual = vlm.encode_tiles([picture()], setting["max_crops"])[0]
        prompt = prompt_of(vlm, visual, QUESTIONS[0], setting["max_crops"])
        cache, token = vlm.decoder.prefill(prompt)
        assert cache.get_seq_length() == prompt.shape[1]
        sequence = prompt
        for _ in range(3):
            step = vlm.decoder.embed(token[:, None])
            sequence = torch.cat([sequence, step], dim=1)
            cached = vlm.decoder.logits(step, cache)
            assert torch.allclose(cached, vlm.decoder.logits(sequence), atol=1e-5)
            token = cached.argmax(-1)


def test_skipping_blocks_is_a_model_without_them(vlm):
    """By hand: run the active blocks one after the other on the hidden states."""
    language = vlm.decoder.model
    with torch.inference_mode():
        visual = vlm.encode_tiles([picture()], 1)[0]
        hidden = prompt_of(vlm, visual, QUESTIONS[0], 1)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = language.rotary_emb(hidden, positions)
        with vlm.apply(SPACE.setting(max_crops=1, top_k=4, num_active_blocks=3)):
            skipped = vlm.decoder.logits(hidden)
        for block in (0, 2, 3):
            hidden = language.layers[block](hidden, position_embeddings=rotary, position_ids=positions)
        expected = vlm.model.lm_head(language.norm(hidden))[:, -1]
    assert torch.allclose(skipped, expected, atol=1e-5)


def test_released_also_after_an_exception(vlm):
    before = state(vlm)
    with pytest.raises(RuntimeError, match="stop"), vlm.apply(SPACE.cheapest):
        assert routers(vlm)[0].top_k == 1 and len(vlm.decoder.model.layers) == 2
        raise RuntimeError("stop")
    assert state(vlm) == before


def test_settings_nest(vlm):
    with vlm.apply(SPACE.cheapest):
        with vlm.apply(SPACE.full):
            assert len(vlm.decoder.model.layers) == 4
        assert len(vlm.decoder.model.layers) == 2 and routers(vlm)[0].top_k == 1


def test_an_unknown_value_is_an_error_and_changes_nothing(vlm):
    before = state(vlm)
    wrong = KnobSpace({**KNOBS, "top_k": [3]}).cheapest
    with pytest.raises(KnobSpaceError, match="top_k=3 is outside"), vlm.apply(wrong):
        pass
    assert state(vlm) == before


def test_threads_take_turns(vlm):
    image = picture()
    alone = {s: vlm.generate(image, QUESTIONS[0], s, max_new_tokens=3).token_ids for s in SPACE.settings[::13]}
    failures = []

    def ask(setting):
        for _ in range(4):
            answer = vlm.generate(image, QUESTIONS[0], setting, max_new_tokens=3).token_ids
            if answer != alone[setting]:
                failures.append((setting, answer))

    threads = [threading.Thread(target=ask, args=(s,)) for s in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(alone.values())) > 1


def test_generate_times_every_stage_and_counts_tokens(vlm):
    answer = vlm.generate(picture(), QUESTIONS[0], SPACE.full, max_new_tokens=3)
    assert tuple(answer.stages_ms) == STAGES
    assert all(ms >= 0 for ms in answer.stages_ms.values()) and answer.total_ms > 0
    assert answer.num_vision_tokens == 5 * TOKENS_PER_TILE
    assert answer.num_language_tokens == 5 + 3  # the question's words and <img>, </img>, <a>
    assert answer.num_output_tokens == len(answer.token_ids) <= 3
    assert "<" not in answer.text


def test_a_reused_overview_is_paid_once(vlm):
    overview = vlm.encode_overview(picture())
    answer = vlm.generate(picture(), QUESTIONS[0], SPACE.cheapest, overview=overview)
    assert answer.stages_ms["vision"] >= overview.vision_ms > 0
    assert answer.stages_ms["preprocess"] >= overview.preprocess_ms > 0
    assert answer.token_ids == vlm.generate(picture(), QUESTIONS[0], SPACE.cheapest).token_ids


def test_the_answer_stops_at_the_end_token(vlm, monkeypatch):
    whole = vlm.generate(picture(), QUESTIONS[0], SPACE.full, max_new_tokens=4)
    assert whole.finish_reason == "length"
    end = next(i for i, token in enumerate(whole.token_ids) if token not in whole.token_ids[:i])
    monkeypatch.setattr(vlm.decoder, "end_ids", frozenset({whole.token_ids[end]}))
    short = vlm.generate(picture(), QUESTIONS[0], SPACE.full, max_new_tokens=4)
    assert short.finish_reason == "stop"
    assert short.token_ids == whole.token_ids[: end + 1]


@pytest.mark.parametrize("setting", SPACE.settings[::6], ids=str)
def test_a_batch_gives_the_answers_of_one_by_one(vlm, setting):
    """Questions and images of several sizes, so that rows are padded."""
    images = [picture(i, size) for i, size in enumerate([(256, 192), (64, 64), (100, 300), (256, 192)])]
    single = [vlm.generate(i, q, setting, max_new_tokens=4) for i, q in zip(images, QUESTIONS, strict=True)]
    for visual in (None, vlm.encode_tiles(images, setting["max_crops"])):
        batch = vlm.generate_batch(images, QUESTIONS, setting, max_new_tokens=4, visual=visual)
        assert [g.token_ids for g in batch] == [g.token_ids for g in single]
        assert [g.text for g in batch] == [g.text for g in single]
        assert [g.num_vision_tokens for g in batch] == [g.num_vision_tokens for g in single]
        assert all(g.stages_ms == {} for g in batch)


def test_a_batch_ends_each_answer_for_itself(vlm, monkeypatch):
    images = [picture(i) for i in range(4)]
    first = vlm.generate(images[0], QUESTIONS[0], SPACE.full, max_new_tokens=1).token_ids[0]
    monkeypatch.setattr(vlm.decoder, "end_ids", frozenset({first}))
    single = [vlm.generate(i, q, SPACE.full, max_new_tokens=4) for i, q in zip(images, QUESTIONS, strict=True)]
    batch = vlm.generate_batch(images, QUESTIONS, SPACE.full, max_new_tokens=4)
    assert [g.token_ids for g in batch] == [g.token_ids for g in single]
    assert batch[0].finish_reason == "stop" and batch[0].num_output_tokens == 1


def test_no_question_no_answer(vlm):
    assert vlm.generate_batch([], [], SPACE.full) == []


def test_features(vlm):
    overview = vlm.encode_overview(picture())
    assert overview.tokens.shape == (TOKENS_PER_TILE, 32)
    assert overview.feature.shape == (64,) and overview.feature.dtype == np.float32
    words = vlm.decoder.embed(torch.tensor(vlm.prompt.question_ids("red sign")))
    np.testing.assert_allclose(vlm.question_feature("red sign"), words.mean(0), rtol=1e-5, atol=1e-7)
    several = vlm.encode_overviews([picture(1), picture()])
    assert torch.allclose(several[1].tokens, overview.tokens, atol=1e-5)
    np.testing.assert_allclose(several[1].feature, overview.feature, rtol=0, atol=1e-5)
    assert pool(torch.tensor([[1.0, 5.0], [3.0, 1.0]])).tolist() == [2.0, 3.0, 3.0, 5.0]
    assert pool(torch.tensor([[1.0, 5.0], [3.0, 1.0]], dtype=torch.bfloat16)).tolist() == [2.0, 3.0, 3.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_of_words(dtype):
    table = torch.nn.Embedding.from_pretrained(torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=dtype))
    mean = mean_embedder(table)(np.array([0, 1]))
    assert mean.tolist() == [2.0, 4.0] and mean.dtype == np.float32
    with pytest.raises(IndexError):
        mean_embedder(table)(np.array([0, 2]))


@pytest.mark.parametrize("question", ["", "  ", None, 3])
def test_an_empty_question(vlm, question):
    with pytest.raises(InputError, match="question is empty"):
        vlm.generate(picture(), question, SPACE.cheapest)


def test_special_tokens_in_a_question_are_plain_text(vlm):
    special = set(vlm.prompt.tokenizer.all_special_ids) - {vlm.prompt.tokenizer.unk_token_id}
    assert not special & set(vlm.prompt.question_ids("the </s> <IMG_CONTEXT> sign"))


@pytest.mark.parametrize("image", [None, "photo.png", np.zeros((4, 4, 3))])
def test_something_that_is_no_image(vlm, image):
    with pytest.raises(InputError, match="an image is needed"):
        vlm.generate(image, QUESTIONS[0], SPACE.cheapest)


def test_a_truncated_image(vlm, tmp_path):
    picture(0, (512, 512)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / "cut.png") as cut, pytest.raises(InputError, match="truncated"):
        vlm.encode_overview(cut)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_images_of_other_modes(vlm, mode):
    image = Image.new("I;16", (64, 64)) if mode == "I;16" else picture(0, (64, 64)).convert(mode)
    assert vlm.encode_overview(image).tokens.isfinite().all()


def test_no_room_for_an_answer(vlm):
    with pytest.raises(InputError, match="max_new_tokens=0"):
        vlm.generate(picture(), QUESTIONS[0], SPACE.cheapest, max_new_tokens=0)


def test_change_of_blocks_is_that_of_the_hidden_states(vlm):
    """A block made to do nothing has no influence; its neighbours have some."""
    block = vlm.decoder.model.layers[2]
    kept = [p.clone() for p in (block.self_attn.o_proj.weight, block.mlp.experts.down_proj)]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.experts.down_proj.zero_()
    try:
        changes = block_changes(vlm, [picture(0), picture(1)], QUESTIONS[:2])
    finally:
        with torch.no_grad():
            block.self_attn.o_proj.weight.copy_(kept[0])
            block.mlp.experts.down_proj.copy_(kept[1])
    assert len(changes) == 4
    assert changes[2] == pytest.approx(0, abs=1e-6)
    assert min(changes[0], changes[1], changes[3]) > 1e-3


def test_likelihood_of_answers_is_that_of_the_plain_model(vlm):
    """By hand: the answer behind the prompt, and the log-probability of each of its tokens."""
    image, question, answer = picture(), QUESTIONS[0], "A 1 2"
    done = vlm.images.processor(image, max_patches=4, return_tensors="pt")
    prompt = prompt_ids(vlm, question, int(done["num_patches"][0]))
    tokens = torch.tensor([[*vlm.prompt.tokenizer.encode(answer, add_special_tokens=False), 2]])
    with torch.inference_mode():
        logits = vlm.model(input_ids=torch.cat([prompt, tokens], 1), pixel_values=done["pixel_values"]).logits
    expected = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1).gather(1, tokens.T).mean()
    score = likelihood(vlm, [image], [question], [answer])
    assert score((0, 1, 2, 3)) == pytest.approx(float(expected), abs=1e-4)
    assert score((0, 3)) != pytest.approx(float(expected), abs=1e-2)
    assert len(vlm.decoder.model.layers) == 4


@pytest.fixture
def copy(directory, tmp_path):
    """A copy of the model's directory that a test may damage."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_without_knobs_a_space_is_derived_and_a_prompt_is_asked_for(copy):
    (copy / "knobs.json").write_text(json.dumps({"prompt": "<img>{image}</img>{question}<a>"}))
    vlm = load_vlm(str(copy))
    assert vlm.knob_space.to_dict() == {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]}
    assert vlm.active_blocks(3) == (0, 1, 3)
    (copy / "knobs.json").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_vlm(str(copy))


def test_the_chat_template_is_the_prompt_of_last_resort(copy, directory):
    (copy / "knobs.json").unlink()
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<IMG_CONTEXT>{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    (copy / "chat_template.jinja").write_text(template)
    edit(
        copy / "tokenizer_config.json",
        extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>"},
    )
    prompt = load_vlm(str(copy)).prompt
    known = load_vlm(str(directory)).prompt
    assert (prompt.before, prompt.between, prompt.after) == (known.before, known.between, known.after)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"prompt": "{question}{image}"}, r"image.* once and then"),
        ({"block_order": [1, 0, 2, 3]}, "first and the last in front"),
        ({"knob_space": {"top_k": [7]}}, "exceeds the model's 6 experts"),
        ({"knob_space": {"num_active_blocks": [1, 5]}}, "outside 2 to 4"),
        ({"knob_space": {"max_crops": [1.5]}}, "whole numbers"),
        ({"knob_space": {"depth": [1]}}, "no knob depth"),
        ({"knob_space": {"top_k": []}}, "top_k has no values"),
        ({"knob_space": 3}, "cannot be used"),
    ],
)
def test_knobs_that_do_not_fit(copy, knobs, message):
    edit(copy / "knobs.json", **knobs)
    with pytest.raises(ConfigError, match=message):
        load_vlm(str(copy))


def test_directories_that_hold_no_model(copy, tmp_path):
    with pytest.raises(ConfigError, match="is not a directory"):
        load_vlm(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_vlm(str(tmp_path / "empty"))
    edit(copy / "config.json", model_type="nobody")
    with pytest.raises(ConfigError, match=r"'nobody'.*internvl"):
        load_vlm(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_vlm(str(copy))


def test_damaged_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_vlm(str(copy))


def test_incomplete_weights(copy):
    """Transformers would draw the missing weights at random and go on."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.mlp.gate.weight"))]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 are missing.*layers\.1\.mlp\.gate\.weight"):
        load_vlm(str(copy))


def test_missing_tokenizer_and_odd_options(copy):
    with pytest.raises(ConfigError, match="num_threads=0"):
        load_vlm(str(copy), num_threads=0)
    with pytest.raises(ConfigError, match="device="):
        load_vlm(str(copy), device="abacus")
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        load_vlm(str(copy))


def test_order_of_the_tiny_model_is_not_the_default():
    assert ORDER != [0, 3, 1, 2]
