"""The bundled task: reproducible, splits apart, answers that follow from what is drawn."""

import itertools
from collections import Counter

import numpy as np
import pytest

from budgetvlm.errors import ConfigError
from budgetvlm.tasks import SPLITS, load_task, signs
from budgetvlm.tasks.signs_task import SPLIT_SIZES


def test_the_same_seed_draws_the_same_picture_and_question():
    first, second = (next(iter(load_task("signs").samples("test"))) for _ in range(2))
    assert (first.sample_id, first.question, first.answers) == (second.sample_id, second.question, second.answers)
    assert np.array_equal(np.asarray(first.load_image()), np.asarray(second.load_image()))


def test_pictures_are_rgb_of_the_documented_size():
    image = next(iter(load_task("signs").samples("train"))).load_image()
    assert (image.mode, image.size) == ("RGB", (256, 192))


def test_splits_share_no_image():
    seeds = {s: {signs.scene_seed(s, i) for i in range(SPLIT_SIZES[s] // 2)} for s in SPLITS}
    assert all(len(seeds[s]) == SPLIT_SIZES[s] // 2 for s in SPLITS)
    assert all(not seeds[a] & seeds[b] for a, b in itertools.combinations(SPLITS, 2))


def test_a_part_of_a_split_is_drawn_from_it_in_order_with_whole_images():
    everything = [s.sample_id for s in load_task("signs").samples("validation")]
    part = [s.sample_id for s in load_task("signs").samples("validation", 40, seed=3)]
    assert part == sorted(part) and set(part) <= set(everything) and len(set(part)) == 40
    assert set(Counter(i.rsplit("-", 1)[0] for i in part).values()) == {2}
    assert part != [s.sample_id for s in load_task("signs").samples("validation", 40, seed=4)]


def test_an_odd_number_of_samples_is_given_exactly():
    assert len(list(load_task("signs").samples("test", 7))) == 7


@pytest.mark.parametrize("kind", signs.KINDS)
def test_answers_follow_from_the_scene(kind):
    rng = np.random.default_rng(0)
    asked = 0
    for seed in range(40):
        scene = signs.make_scene(seed)
        if kind not in signs.possible_kinds(scene):
            continue
        asked += 1
        question = signs.ask(scene, rng, kind)
        assert question.answer == _answer_from_words(scene, question)
    assert asked > 20


def _answer_from_words(scene, question):
    """The answer worked out from the question's words alone."""
    words = question.text.split()
    named = {word: sign for word in words for sign in scene.signs if sign.colour == word}
    if question.kind == "shape":
        return next(shape.colour for shape in scene.shapes if shape.name in words)
    if question.kind == "largest":
        return sorted(scene.signs, key=lambda s: int(s.code[1:]))[-1].code
    if question.kind == "sum":
        assert len(named) == 2
        return str(sum(int(sign.code[2]) for sign in named.values()))
    (sign,) = named.values()
    price, town = signs.catalogue()[sign.code]
    digits = str(int(sign.code[1]) + int(sign.code[2]))
    return {"read": sign.code, "price": price, "origin": town, "digits": digits}[question.kind]


def test_difficulty_is_the_size_of_the_print():
    for seed in range(30):
        scene = signs.make_scene(seed)
        low, high = signs.FONT_SIZES[scene.difficulty]
        assert all(low <= sign.font_size <= high for sign in scene.signs)


def test_signs_lie_inside_the_picture_and_apart():
    for seed in range(50):
        boxes = [sign.box for sign in signs.make_scene(seed).signs]
        assert all(0 <= b[0] < b[2] <= signs.WIDTH and 0 <= b[1] < b[3] <= signs.HEIGHT for b in boxes)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_shares_of_kinds_are_those_documented():
    drawn = Counter(s.groups["kind"] for s in load_task("signs").samples("test") if s.groups["difficulty"] == "large")
    total = sum(drawn.values())
    for kind, share in zip(signs.KINDS, signs.KIND_SHARES["large"], strict=True):
        # two questions of an image differ, which moves the shares a little
        assert abs(drawn[kind] / total - share) < 0.04


def test_the_score_is_exact_match_without_regard_to_case_and_blanks():
    sample = next(iter(load_task("signs").samples("test")))
    answer = sample.answers[0]
    assert load_task("signs").score(f" {answer.lower()} ", sample) == 1.0
    assert load_task("signs").score(answer + "x", sample) == 0.0


def test_what_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="no task 'sings'"):
        load_task("sings")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        list(load_task("signs").samples("dev"))
    with pytest.raises(ConfigError, match="0 samples asked"):
        list(load_task("signs").samples("test", 0))
