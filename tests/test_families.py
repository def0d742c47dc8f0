"""Every family on a tiny model of it: the checks of `budgetvlm check-model`, and each family's own arithmetic."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_families import ID, write_tiny_family
from tiny_molmo import write_tiny_molmo
from tiny_more_families import BUILDERS

from benchmarks.block_orders import block_changes, likelihood
from budgetvlm.errors import CheckpointError, ConfigError, InputError
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.blocks import check_order
from budgetvlm.vlm.conformance import CHECKS, check, visual_tokens_fall
from budgetvlm.vlm.decoding import PacedBlock, SkippedBlock
from budgetvlm.vlm.families.llama4 import Canvas
from budgetvlm.vlm.families.molmo2 import Crops
from budgetvlm.vlm.probe import Probe, one_knob_at_a_time

QUESTIONS = ["what is the red sign", "sum of both"]
SIZES = [(150, 96), (40, 100)]
AT_EVERY_SETTING = {"qwen3_vl_moe", "ernie4_5_vl_moe", "llava_onevision", "gemma3", "gemma4_shared"}


def picture(seed=0, size=(150, 96)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def crops_of(vlm):
    """The values of max_crops; 1 where images have one size."""
    space = vlm.knob_space
    return [int(crops) for crops in space.values("max_crops")] if "max_crops" in space.names else [1]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_of_every_family_holds_all_checks(models, name):
    vlm, images = models(name), [picture(i, size) for i, size in enumerate(SIZES)]
    settings = None if name in AT_EVERY_SETTING else one_knob_at_a_time(vlm.knob_space)
    outcomes = check(Probe(vlm, images, QUESTIONS, settings))
    assert [o.name for o in outcomes] == list(CHECKS)
    assert [f"{o.name}: {o.detail}" for o in outcomes if o.passed is False] == []


@pytest.fixture(scope="module")
def molmo(tmp_path_factory):
    """Loaded as such a model is: its code lies beside its weights, in two files of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield load_vlm(str(write_tiny_molmo(tmp_path_factory.mktemp("molmo"))), trust_remote_code=True)


def test_molmo_with_its_caches_of_pairs_holds_all_checks(molmo):
    outcomes = check(Probe(molmo, [picture(i, size) for i, size in enumerate(SIZES)], QUESTIONS))
    assert [o.detail for o in outcomes if not o.passed] == [
        "nothing to compare with: Transformers has no processor for model_type 'molmo'"
    ]
    assert molmo.knob_space.to_dict() == {"max_crops": [1, 2, 4], "top_k": [1, 2, 4], "num_active_blocks": [2, 3, 4]}


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (150, 96), (40, 100)])
def test_molmos_overview_is_reused_where_the_mask_allows_it(molmo, size):
    """The processor gives the overview the first tile's mask: padded in one tiling, it may be whole in another."""
    image, left = picture(3, size), []
    overview = molmo.encode_overview(image)
    for crops in (1, 2, 4):
        with torch.inference_mode():
            assert torch.allclose(
                molmo.images.visual_tokens(image, crops, overview.tokens),
                molmo.images.visual_tokens(image, crops),
                atol=1e-6,
            )
        left.append(len(molmo.images.all(image, crops)) - len(molmo.images.beside(image, crops)))
    assert left[0] == 1 and set(left) <= {0, 1}


def test_a_pair_cache_is_as_long_as_the_model_insists(molmo):
    cache, (first, second, _, last) = molmo.decoder.new_cache(), molmo.layers
    assert cache.of([first, last], 4) is None and cache.get_seq_length() == 0
    pairs = [(torch.zeros(1, 2, 5, 3),) * 2 for _ in range(3)]
    cache.keep([first, PacedBlock(second, 1, None, molmo.family.skipped_output), last], pairs)
    assert [id(p) for p in cache.of([first, last], 4)] == [id(pairs[i]) for i in (0, 2, 2, 2)]
    assert cache.get_seq_length() == 5


def test_molmos_later_tokens_read_the_pairs_of_their_own_blocks(molmo):
    """The prompt is read by all blocks, the next token by the first and the last: the last one's own past counts."""
    image, question = picture(1, SIZES[0]), QUESTIONS[0]
    row = molmo.embed_prompt(
        molmo.images.visual_tokens(image, 1), molmo.prompt.question_ids(question), molmo.images.layout_of(image, 1)
    )
    inputs, past = molmo.decoder_inputs([row]), []
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: past.append((block, inputs[3]))) for block in molmo.layers
    ]
    with torch.inference_mode():
        cache, first = molmo.decoder.prefill(row.embeddings[None], **inputs.prefill())
        pairs = {id(block): pair for (block, _), pair in zip(past, cache.of(list(molmo.layers), 4), strict=True)}
        past.clear()
        with molmo.only_blocks([0, 3]):
            molmo.decoder.decode(cache, first, 2, None, inputs)
    for hook in hooks:
        hook.remove()
    assert [pair is pairs[id(block)] for block, pair in past] == [True, True]


def test_a_molmo_model_that_cannot_be_loaded_says_why(molmo, tmp_path):
    directory = write_tiny_molmo(tmp_path)
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="are missing or of another shape"):
        load_vlm(str(directory), trust_remote_code=True)
    (directory / "tiny_code.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(ConfigError, match=r"does not run with Transformers .*a_package_that_nobody_has"):
        load_vlm(str(directory), trust_remote_code=True)


ODD_SIZES = [(33, 31), (300, 20), (8, 90), (64, 64), (97, 200)]


@pytest.mark.parametrize("name", BUILDERS)
def test_layouts_promise_what_is_encoded_at_any_size(models, name):
    """Counted by arithmetic, against what the processor and the vision tower make."""
    vlm = models(name)
    for size in ODD_SIZES:
        image = picture(5, size)
        for crops in crops_of(vlm):
            with torch.inference_mode():
                got = vlm.images.visual_tokens(image, int(crops))
                reused = vlm.images.visual_tokens(image, int(crops), vlm.encode_overview(image).tokens)
            assert len(got) == vlm.images.layout_of(image, int(crops)).num_visual, (size, crops)
            assert torch.allclose(got, reused, atol=1e-5), (size, crops)


COSTS_FEATURES = ("qwen", "cosmos", "glm", "exaone", "ernie", "mistral3", "pixtral", "lighton", "aria", "gemma4",
                  "llama4")  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_an_overview_that_is_part_of_every_setting_is_not_encoded_again(models, name):
    """What a setting still encodes beside an overview that was read before: docs/families.md says where that is all."""
    images, image = models(name).images, picture(0, (150, 96))
    values = crops_of(models(name))
    free = [crops for crops in values if len(images.beside(image, crops)) < len(images.all(image, crops))]
    if not name.startswith(COSTS_FEATURES):
        assert free == values
    elif name == "llama4":
        assert free == values[1:]  # one tile alone is padded, the overview of several is squeezed
    else:
        assert free == [1]


@pytest.mark.parametrize("name", BUILDERS)
def test_likelihoods_and_changes_of_blocks_can_be_measured(models, name):
    """What an order of blocks is chosen by works for every family: answers lie behind the prompt, at their places."""
    vlm, images = models(name), [picture(0), picture(1, (40, 100))]
    changes = block_changes(vlm, images, QUESTIONS)
    assert len(changes) == vlm.num_total_blocks and min(changes) > 0
    score = likelihood(vlm, images[:1], QUESTIONS[:1], ["A 1"])
    every = tuple(range(vlm.num_total_blocks))
    row = vlm.embed_prompt(
        vlm.encode_tiles(images[:1])[0], vlm.prompt.question_ids(QUESTIONS[0]),
        vlm.images.layout_of(images[0], vlm.most_crops), [ID["A"], ID["1"]],
    )  # fmt: skip
    with torch.inference_mode():
        hidden = vlm.decoder.hidden(row.embeddings[None], **vlm.decoder_inputs([row]).prefill())
        log_probs = vlm.decoder.head(hidden)[0].log_softmax(-1)[-3:]
    expected = sum(float(log_probs[i, token]) for i, token in enumerate([ID["A"], ID["1"], ID["</s>"]])) / 3
    assert score(every) == pytest.approx(expected, abs=1e-4)
    assert score((0, vlm.num_total_blocks - 1)) != pytest.approx(expected, abs=1e-3)


def test_an_oblong_image_is_refused_in_words(models):
    vlm, image = models("qwen2_5_vl"), Image.new("RGB", (900, 4))
    with pytest.raises(InputError, match="refuses an image of 900 x 4"):
        vlm.generate(image, QUESTIONS[0], vlm.knob_space.full)
    with pytest.raises(InputError, match="too oblong"):
        vlm.prompt_size(image, QUESTIONS[0])


def test_what_molmos_own_code_cannot_take_is_refused_in_words(molmo):
    image = Image.new("RGB", (900, 4))
    for ask in (molmo.encode_overview, lambda image: molmo.prompt_size(image, QUESTIONS[0])):
        with pytest.raises(InputError, match="refuses an image of 900 x 4"):
            ask(image)


def test_blocks_whose_keys_others_read_always_run(models):
    vlm = models("gemma4_shared")
    assert vlm.family.fixed_blocks(vlm.model) == (2, 3)
    assert vlm.knob_space.values("num_active_blocks") == (4, 5, 6)
    assert vlm.active_blocks(4) == (0, 2, 3, 5)
    with pytest.raises(ConfigError, match=r"\[0, 2, 3, 5\] at every depth"):
        check_order([0, 5, 1, 2, 3, 4], 6, (2, 3))


def test_experts_of_every_place_are_turned(models):
    """Gemma 4's routers read the configuration; ERNIE has routers of its own for visual tokens."""
    gemma, ernie = models("gemma4_moe"), models("ernie4_5_vl_moe")
    setting = gemma.knob_space.setting(**{**gemma.knob_space.full, "top_k": 1})
    config = gemma.decoder.model.config
    with gemma.apply(setting):
        assert config.top_k_experts == 1
    assert config.top_k_experts == 4
    kinds = {type(dial.owner).__name__ for dial in ernie.dials}
    assert kinds == {"Ernie4_5_VLMoeMoeTopKRouter", "Ernie4_5_VLMoeSparseMoeBlock"} and len(ernie.dials) == 12


def test_a_stand_in_answers_for_its_block():
    block = torch.nn.Linear(2, 2)
    block.attention_type = "sliding_attention"
    stand_in = SkippedBlock(block)
    assert stand_in.attention_type == "sliding_attention" and list(stand_in.parameters()) == []
    hidden = torch.ones(1, 3, 2)
    assert stand_in(hidden, "mask", past_key_values=None) is hidden
    answers = iter([True, False])
    paced = PacedBlock(block, 0, SimpleNamespace(runs=lambda number: next(answers)), lambda states: states + 1)
    assert paced.attention_type == "sliding_attention" and list(paced.parameters()) == []
    assert torch.equal(paced(hidden), block(hidden)) and torch.equal(paced(hidden), hidden + 1)


def test_gemmas_crops_stand_in_words(models):
    """An oblong image at two crops: the image, the words between, two crops; each with its marks around."""
    vlm = models("gemma3")
    layout = vlm.images.layout_of(picture(0, (200, 80)), 2)
    words = vlm.prompt.tokenizer.decode([*vlm.prompt.before_image(layout.lead), *layout.ids])
    assert words.count("<start> <image>") + words.count("<start><image>") == 3
    assert layout.num_visual == 3 * 4 and "Here is the original image" in " ".join(words.split())


def test_a_token_per_crop_is_a_choice(tmp_path):
    directory = write_tiny_family("qwen2_5_vl", tmp_path)
    (directory / "knobs.json").write_text('{"tokens_per_crop": 8}')
    vlm = load_vlm(str(directory))
    assert vlm.knob_space.values("max_crops") == (1, 2, 4, 8)
    assert len(vlm.images.layout_of(picture(), 1).ids) <= 8 < len(vlm.images.layout_of(picture(), 2).ids) <= 16


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seen(pixels, *places):
    """Some colours, and the mean and the spread of all."""
    pixels = pixels.float()
    return [*(float(pixels[place]) for place in places), float(pixels.mean()), float(pixels.std())]


# what Transformers 5.23 gives with torchvision 0.28
LLAMA4_PIXELS = {
    ((150, 96), 4): ((2, 2), [-0.0508, 0.0391, -0.2999, 0.476]),
    ((40, 100), 16): ((4, 2), [-0.7812, -0.2695, -0.4538, 0.6335]),
    ((20, 12), 4): ((1, 1), [-0.332, -0.0273, -0.4046, 0.583]),
}
MOLMO2_PIXELS = {
    ((150, 96), 4): ([3, 3, 4, 4], [-0.4588, 0.4667, 0.0058, 0.4639], [[14, -1, 19, -1], [118, 119, 123, 124]], 5057),
    ((40, 100), 8): ([3, 3, 7, 4], [0.0824, 0.5765, 0.0, 0.3893], [[14, -1, 19, -1], [218, 219, 223, 224]], 14233),
    ((20, 12), 4): ([3, 3, 3, 3], [-0.9765, -0.5294, -0.0026, 0.4978], [[14, -1, 19, -1], [49, -1, -1, -1]], 1203),
}


@pytest.mark.parametrize(("size", "most"), LLAMA4_PIXELS)
def test_llama4s_pixels_are_those_of_the_processor_that_needs_torchvision(models, size, most):
    images, (grid, wanted) = models("llama4").images, LLAMA4_PIXELS[size, most]
    pixels = images.all(noise(*size), most)
    assert images.layout(*size[::-1], most).grid == grid
    assert seen(pixels, (0, 0, 3, 5), (-1, 2, 7, 9)) == pytest.approx(wanted, abs=1e-2)
    assert len(pixels) == grid[0] * grid[1] + (grid != (1, 1))


@pytest.mark.parametrize(("size", "most"), MOLMO2_PIXELS)
def test_molmo2s_pixels_and_pooling_are_those_of_the_processor_that_needs_torchvision(models, size, most):
    grids, wanted, pooled, total = MOLMO2_PIXELS[size, most]
    given = models("molmo2").images.plain(noise(*size), most)
    assert given["image_grids"].tolist() == [grids]
    assert seen(given["pixel_values"], (0, 3, 5), (-1, 7, 9)) == pytest.approx(wanted, abs=1e-3)
    assert given["image_token_pooling"][[5, -1]].tolist() == pooled
    assert int(given["image_token_pooling"].sum()) == total


def test_llama4s_image_reads_row_by_row_with_the_overview_last(models):
    """As its processor writes it: tiles, marks between columns and behind rows, the mark of the overview, its tile."""
    vlm = models("llama4")
    words = vlm.prompt.tokenizer.convert_ids_to_tokens(vlm.images.layout_of(noise(150, 96), 4).ids)
    tile = ["<|patch|>"] * 4
    row = [*tile, "<|tile_x_separator|>", *tile, "<|tile_y_separator|>"]
    assert words == ["<|image_start|>", *row, *row, "<|image|>", *tile, "<|image_end|>"]
    one = vlm.prompt.tokenizer.convert_ids_to_tokens(vlm.images.layout_of(noise(150, 96), 1).ids)
    assert one == ["<|image_start|>", "<|image|>", *tile, "<|image_end|>"]
    assert all(type(dial.owner).__name__ == "Llama4Router" for dial in vlm.dials) and len(vlm.dials) == 3


def test_llama4_may_fill_the_largest_canvas():
    """Of three canvases for a square image the largest, 2 x 2, where enlarging is allowed; the smallest otherwise."""
    square = noise(20, 20)
    assert len(Canvas(side=32, max_patches=4, largest=True).tiles(square, 4)) == 5
    assert len(Canvas(side=32, max_patches=4).tiles(square, 4)) == 1


def test_molmo2s_overview_stands_twice_at_one_crop_and_is_encoded_once(models):
    images, image = models("molmo2").images, noise(150, 96)
    assert (len(images.all(image, 1)), len(images.beside(image, 1))) == (1, 0)
    words = models("molmo2").prompt.tokenizer.convert_ids_to_tokens(images.layout(image.height, image.width, 1).ids)
    low, high = ["<im_patch>"] * 3, ["<im_patch>"] * 3 + ["<im_col>"]
    assert words == ["<low_res_im_start>", *low * 3, "<im_end>", "<im_start>", *high * 3, "<im_end>"]
    assert models("molmo2").prompt.before[0] == ID["</s>"]  # no token begins a text here, so that the end stands there


@pytest.mark.parametrize("kind", ["llama4", "molmo2"])
def test_settings_that_these_processors_do_not_know_are_refused(tmp_path, kind):
    read = {"llama4": Canvas.read, "molmo2": Crops.read}[kind]
    with pytest.raises(ConfigError, match="has no settings of"):
        read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 64}}')
    with pytest.raises(ConfigError, match="square tiles"):
        read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}, "resample": 3}')
    with pytest.raises(ConfigError, match="only 2"):
        read(tmp_path)


@pytest.mark.parametrize("size", [(434, 330), (330, 434), (500, 500), (2000, 300)])
@pytest.mark.parametrize("longest", [96, 100, 120])
def test_tiles_are_counted_as_they_are_made(models, size, longest):
    """Where `longest_edge` is no multiple of a tile, Idefics3's processor promises fewer than it makes."""
    vlm = models("idefics3")
    processor = type(vlm.images.processor).from_dict(
        {**vlm.images.processor.to_dict(), "size": {"longest_edge": longest}}
    )
    images = type(vlm.images)(vlm.model, processor, vlm.prompt.tokenizer, {})
    done = processor(Image.new("RGB", size), return_tensors="pt", return_row_col_info=True)
    grid = images.layout(size[1], size[0], images.most_crops).grid
    assert grid == (done["rows"][0][0], done["cols"][0][0])
    assert len(done["pixel_values"][0]) == max(grid[0] * grid[1], 0) + 1


def test_an_internvl_processor_that_does_not_say_that_it_cuts(tmp_path):
    """As all public ones: `crop_to_patches` is what the model's own processor says at each call."""
    directory = write_tiny_family("internvl_dense", tmp_path)
    path = directory / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    del settings["crop_to_patches"]
    path.write_text(json.dumps(settings))
    vlm = load_vlm(str(directory))
    outcomes = check(Probe(vlm, [picture()], QUESTIONS[:1], one_knob_at_a_time(vlm.knob_space)))
    assert [f"{o.name}: {o.detail}" for o in outcomes if o.passed is False] == []


@pytest.mark.parametrize("crops", [[1], [1, 2], [2], [3, 4]])
def test_llava_below_its_own_grids(tmp_path, crops):
    directory = write_tiny_family("llava_next", tmp_path)
    (directory / "knobs.json").write_text(json.dumps({"knob_space": {"max_crops": crops, "num_active_blocks": [2, 4]}}))
    vlm = load_vlm(str(directory))
    outcomes = check(Probe(vlm, [picture()], QUESTIONS[:1]))
    assert [f"{o.name}: {o.detail}" for o in outcomes if o.passed is False] == []


def test_weights_that_are_a_pickle_alone_are_to_be_converted(tmp_path):
    """With the command of the message."""
    directory = write_tiny_family("llava_next", tmp_path)
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"holds pytorch_model\.bin, a pickle") as refused:
        load_vlm(str(directory))
    exec(str(refused.value).partition('python -c "')[2].partition('"')[0].replace("DIR", str(directory)))
    assert load_vlm(str(directory)).num_total_blocks == 4
    for path in directory.glob("*model*"):
        path.unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        load_vlm(str(directory))


def test_crops_that_change_nothing_are_left_out_and_named(models, tmp_path):
    """Three tiles in a row are for panoramas alone: other images look as they do with two."""
    assert models("llava_next").knob_space.values("max_crops") == (1, 2, 4)
    directory = write_tiny_family("llava_next", tmp_path)
    (directory / "knobs.json").write_text(json.dumps({"knob_space": {"max_crops": [1, 2, 3, 4]}}))
    probe = Probe(load_vlm(str(directory)), [picture()], QUESTIONS[:1])
    with torch.inference_mode():
        assert "max_crops=3 shows ordinary images as a value before" in visual_tokens_fall(probe)


def test_small_images_can_cost_more_than_the_limit_says():
    """The figures of docs/families.md: a limit of pixels for Qwen3-VL, a target of tokens for Gemma 4."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    area = 32 * 32**2
    tokens = [
        rows * columns // 32**2
        for rows, columns in (smart_resize(*s, 32, area, area) for s in [(64, 64), (1080, 1920)])
    ]
    assert tokens == [36, 28]
    height, width = get_aspect_ratio_preserving_size(16, 16, 16, 140 * 3**2, 3)
    assert (height // 48) * (width // 48) == 121
