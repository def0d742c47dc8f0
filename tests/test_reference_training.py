"""How the bundled model is made: labels, packing, the training pass, and the lessons run through with tiny numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from budgetvlm.tasks import signs
from budgetvlm.vlm import load_vlm
from experiments.reference import batches, build, forward, labels, stages, train_reference

ROOT = Path(__file__).parents[1]


def scene(*placed: signs.Sign, shapes: tuple[signs.Shape, ...] = ()) -> signs.Scene:
    return signs.Scene("large", placed, shapes, 0)


def test_the_training_vocabulary_is_the_tokenizers():
    tokenizer = build.build_tokenizer()
    rng = np.random.default_rng(0)
    for seed in range(60):
        question = signs.ask(signs.make_scene(seed), rng)
        for text in (question.text, question.answer):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == batches.encode(text) and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(batches.encode(question.answer)) == question.answer


def test_a_shape_is_labelled_where_it_lies():
    shape = signs.Shape("square", "red", (0.0, 0.0, 64.0, 48.0))  # the overview's upper left 16 x 16 pixels
    (tile,) = labels.tile_labels(scene(shapes=(shape,)), 1)
    expected = np.zeros((8, 8), np.int8)
    expected[:2, :2] = signs.SHAPES.index("square") + 1
    assert np.array_equal(tile[..., 3], expected)
    assert set(tile[:2, :2, 4].ravel()) == {list(signs.COLOURS).index("red") + 1}


def test_small_print_is_unreadable_until_there_are_enough_tiles():
    small = next(s for s in map(signs.make_scene, range(99)) if s.difficulty == "small")
    assert (labels.tile_labels(small, 1)[..., 0] <= 0).all() and (labels.tile_labels(small, 4)[..., 0] <= 0).all()
    read = labels.tile_labels(small, 12)[..., 0]
    codes = {labels.CHARS.index(c) + 1 for sign in small.signs for c in sign.code}
    assert set(read[read > 0]) == codes


def test_tiles_and_positions_are_in_the_models_order():
    """A mark travels through the labels and through InternVL's own pixel shuffle to the same place."""
    model = build.build_model(0)
    marked = torch.zeros(1, 8, 8, 5, dtype=torch.int8)
    marked[0, 5, 2, 4] = 1
    features = torch.zeros(1, 8, 8, 1)
    features[0, 5, 2, 0] = 1.0
    shuffled = model.model.pixel_shuffle(features, scale_factor=0.5).reshape(1, 16, 4)
    content = labels.one_hot(marked).unflatten(-1, (4, -1)).sum(-1)
    assert torch.equal(content, shuffled)


def test_packed_questions_do_not_see_each_other():
    model = build.build_model(0).eval()
    both = batches.pack([signs.make_scene(0)], 1, np.random.default_rng(0), 2, None)
    visual = torch.randn(1, 16, 128)
    with torch.no_grad():
        before = forward.answer_logits(model, both, visual, (8,))[8]
        first = both.positions[0].tolist().index(18)  # the first question starts behind the image's 18 tokens
        both.ids[0, first] = 9
        after = forward.answer_logits(model, both, visual, (8,))[8]
    changed = (before - after).abs().amax(-1) > 1e-6
    split = int((both.targets[0, : both.positions[0].tolist().index(18, first + 1)] >= 0).sum())
    assert changed[:split].all() and not changed[split:].any()


@pytest.fixture(scope="module")
def reference():
    return load_vlm("reference")


def test_training_counts_as_right_what_the_adapter_answers_right(reference):
    """Teacher-forced packed training and greedy decoding through the adapter agree, at reduced settings too."""
    model = reference.model
    setting = reference.knob_space.setting(
        max_crops=4, top_k=reference.knob_space.values("top_k")[1], num_active_blocks=4
    )
    scenes = [signs.make_scene(signs.scene_seed("pretrain-check", i)) for i in range(12)]
    forward.set_top_k(model, int(setting["top_k"]))
    trained, answered = [], []
    try:
        for i, drawn in enumerate(scenes):
            batch = batches.pack([drawn], 4, np.random.default_rng(i), 1, None)
            question = signs.ask(drawn, np.random.default_rng(i))
            with torch.no_grad():
                visual = model.get_image_features(stages.pictures([drawn], 4)[0]).pooler_output.flatten(0, 1)[None]
                hits, _ = forward.question_hits(forward.answer_logits(model, batch, visual, (4,))[4], batch)
            trained.append(bool(hits[0]))
            answer = reference.generate(signs.draw(drawn), question.text, setting, max_new_tokens=4)
            answered.append(answer.text == question.answer)
    finally:
        forward.set_top_k(model, stages.FULL_TOP_K)
    assert trained == answered and any(trained)


def test_training_sees_what_the_model_sees(reference):
    """The training pass takes pictures to visual tokens as `get_image_features` does, up to bfloat16."""
    pixels = stages.pictures([signs.make_scene(1)], 4)
    with torch.no_grad():
        seen = stages.seen_tokens(reference.model)(pixels)[0]
        expected = reference.model.get_image_features(pixels[0]).pooler_output.flatten(0, 1)
    assert torch.nn.functional.cosine_similarity(seen, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize("top_k", [1, 4])
def test_dense_experts_are_the_chosen_experts(top_k):
    model = build.build_model(0)
    forward.set_top_k(model, top_k)
    block = model.model.language_model.layers[0].mlp
    hidden = torch.randn(1, 7, 128)
    looped = block(hidden).detach()
    with forward.dense_experts(model):
        dense = block(hidden)
    assert torch.allclose(dense, looped, atol=0.02 * float(looped.abs().max()))
    assert torch.equal(block(hidden), looped)


def test_a_stream_uses_its_scenes_again():
    stream = stages.Stream(stages.true_labels, "pretrain-check", reuse=2, keep=20)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(40):
        scenes, content = stream.draw(rng, 4, "medium", 6)
        assert len({s.seed for s in scenes}) == 6 and {s.difficulty for s in scenes} == {"medium"}
        assert torch.equal(content, stages.true_labels(scenes, 4))
        drawn += [s.seed for s in scenes]
    assert 1.6 < len(drawn) / len(set(drawn)) < 2.4
    held_out = stages.Stream(stages.true_labels, "pretrain-check", reuse=np.inf, keep=6)
    first, second = ({s.seed for s in held_out.draw(rng, 1, "large", 6)[0]} for _ in range(2))
    assert first == second


def test_sums_with_one_sign_to_look_up():
    drawn = signs.make_scene(3)
    by_colour = {sign.colour: sign.code for sign in drawn.signs}
    rng = np.random.default_rng(0)
    looked_up = 0
    for _ in range(300):
        question = batches.ask_by_code(rng, drawn)
        if question.kind == "sum":
            named = [w for w in question.text.split() if w in by_colour or w in signs.catalogue()]
            assert len(named) == 2 and sum(w in by_colour for w in named) <= 1
            looked_up += any(w in by_colour for w in named)
            assert question.answer == str(sum(int(by_colour.get(w, w)[2]) for w in named))
    assert looked_up > 20


def test_the_shipped_weights_are_of_the_documented_size():
    files = list((ROOT / "src/budgetvlm/vlm/reference").rglob("*.safetensors"))
    assert files and sum(f.stat().st_size for f in files) <= 12 * 2**20


def test_all_lessons_run_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "CHECKED", 2)  # scenes of the learning curve
    options = ["--output_dir", str(tmp_path), "--threads", str(torch.get_num_threads())]
    steps = [word for name in ("language", "vision", "projector", "joint") for word in (f"--{name}_steps", "2")]
    for _ in range(2):
        assert train_reference.main([*options, *steps]) == 0
        stamps = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
        assert {"language.safetensors", "vision.safetensors", "projector.safetensors", "joint.safetensors"} <= set(
            stamps
        )
    assert train_reference.main([*options, "--export", str(tmp_path / "model"), "--order_scenes", "2"]) == 0
    assert load_vlm(str(tmp_path / "model")).knob_space.to_dict() == build.KNOB_SPACE
