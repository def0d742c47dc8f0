"""Features made from text and image without a model: known values, what may not matter, and what cannot be used."""

import base64
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from budgetvlm._io import write_json
from budgetvlm.errors import BudgetVLMWarning, ConfigError, DataError, InputError
from budgetvlm.features import cheap
from budgetvlm.features.cheap import CheapFeatures, CheapOptions
from budgetvlm.features.image_statistics import NUM_MEASURES, image_statistics
from budgetvlm.features.text_statistics import ASKS, NUM_COUNTS, text_counts

COLOURS, THINGS = ("red", "green", "blue", "white"), ("car", "dog", "house", "tree", "lamp")
TEXTS = [f"What colour is the {t}, {c} or not?" for c in COLOURS for t in THINGS]
TEXTS += [f"How many {t}s are in picture {n}?" for t in THINGS for n in range(4)]


def picture(shade=0, size=(40, 20), half=None):
    image = Image.new("L", size, shade)
    if half is not None:
        image.paste(half, (size[0] // 2, 0, *size))
    return image


def test_counts_of_a_question():
    named = dict(zip(["characters", "words", "lines", "numbers", "options", "digits", *ASKS], text_counts(
        "How many cars?\n(A) 10\n(B) 2"), strict=True))  # fmt: skip
    assert {name for name in ASKS if named[name]} == {"how", "how many"}
    assert np.expm1([named[n] for n in ("characters", "words", "lines", "numbers", "options")]) == pytest.approx(
        [27, 7, 2, 2, 2]
    )
    assert named["digits"] == pytest.approx(3 / 27)


def test_questions_of_equal_words_are_near_and_others_are_not():
    extractor = CheapFeatures.fit(TEXTS)
    new = [
        "how many trees are in picture 9?",
        "How many trees are in picture 3?",
        "What colour is the dog, red or not?",
    ]
    one, near, far = extractor(new).language[:, NUM_COUNTS:]
    assert one @ near > 0.7 > 0.3 > one @ far


@pytest.mark.parametrize("empty", ["", None, float("nan"), np.nan])
def test_an_empty_question_has_zeros(empty):
    assert not CheapFeatures.fit([*TEXTS, empty])([empty, "red"]).language[0].any()


def test_a_question_of_unknown_words_points_hardly_anywhere():
    known, half, unknown = CheapFeatures.fit(TEXTS)(["red car", "red car ЖЖЖ ЦЦЦЦЦ", "ЖЖЖ ЦЦЦЦЦ"]).language
    lengths = [np.linalg.norm(row[NUM_COUNTS:]) for row in (known, half, unknown)]
    assert lengths[0] > lengths[1] > 2 * lengths[2]  # a few hashes fall together
    assert unknown[:2].all()


def test_rows_that_are_not_for_training_change_nothing():
    images = [picture(10 * row) for row in range(len(TEXTS))]
    rows = np.arange(0, len(TEXTS), 2)
    others = [text if row % 2 == 0 else "zzz 9 9 9 " * row for row, text in enumerate(TEXTS)]
    other_images = [image if row % 2 == 0 else picture(255, (9, 9), 0) for row, image in enumerate(images)]
    mask = np.isin(np.arange(len(TEXTS)), rows)
    fits = [CheapFeatures.fit(TEXTS, images, rows), CheapFeatures.fit(others, other_images, mask)]
    assert fits[0].to_dict() == fits[1].to_dict() != CheapFeatures.fit(TEXTS, images).to_dict()


def test_one_request_alone_and_a_new_process_have_the_same_bits(tmp_path):
    images = [picture(5 * row, half=255 - row) for row in range(len(TEXTS))]
    extractor = CheapFeatures.fit(TEXTS, images, range(20))
    images[7].save(tmp_path / "7.png")
    write_json(tmp_path / cheap.EXTRACTOR, extractor.to_dict())
    whole = extractor(TEXTS, images)
    code = (
        "import sys; from budgetvlm.features import cheap; "
        "f = cheap.load(sys.argv[1])([sys.argv[2]], [sys.argv[1] + '/7.png']); "
        "print(f.language.tobytes().hex(), f.image.tobytes().hex())"
    )
    words = [sys.executable, "-c", code, str(tmp_path), TEXTS[7]]
    printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert printed == [whole.language[7].tobytes().hex(), whole.image[7].tobytes().hex()]


@pytest.mark.parametrize("images", [None, [picture(5 * row, half=255 - row) for row in range(len(TEXTS))]])
def test_the_sides_of_one_request_are_those_of_a_table(images):
    extractor = CheapFeatures.fit(TEXTS, images, range(20))
    whole = extractor(TEXTS, images)
    np.testing.assert_array_equal(extractor.of_question(TEXTS[7]), whole.language[7])
    np.testing.assert_array_equal(extractor.of_image(images and images[7]), whole.image[7])


def test_fewer_distinct_questions_than_components():
    extractor = CheapFeatures.fit(["red car", "red car", "green tree"], options=CheapOptions(components=64))
    assert extractor(["red tree"]).language.shape == (1, NUM_COUNTS + 2)


@pytest.mark.parametrize(("text", "word"), [("Same?", "equal"), ("", "empty"), (None, "empty")])
def test_equal_questions_are_said_and_harm_nothing(text, word):
    with pytest.warns(BudgetVLMWarning, match=f"all 5 training questions are {word}.*another column"):
        extractor = CheapFeatures.fit([text] * 5)
    language = extractor([text] * 3).language
    assert np.isfinite(language).all() and (language == language[0]).all()


def test_a_very_long_question_costs_no_more_than_its_start():
    extractor = CheapFeatures.fit(TEXTS, options=CheapOptions(longest=100))
    long = extractor([TEXTS[0] + " red" * 100_000, (TEXTS[0] + " red" * 100)]).language
    np.testing.assert_array_equal(*long)
    assert long[0, 0] == pytest.approx(np.log1p(100))


def test_statistics_of_an_image():
    flat, halves = image_statistics(picture(51, (200, 100))), image_statistics(picture(0, (256, 256), half=255))
    size = [np.log(200), np.log(100), np.log(20_000), np.log(2)]
    assert flat[:NUM_MEASURES] == pytest.approx([*size, 0.2, 0, 0, 0, 0], abs=1e-5)
    assert flat[NUM_MEASURES:] == pytest.approx(0.2, abs=1e-5)
    assert halves[4:8] == pytest.approx([0.5, 0.5, 0, 1 / 127], abs=1e-5)  # one step of 127 from column to column
    assert halves[NUM_MEASURES:].reshape(8, 8)[3].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_images_that_are_measured_before_count_the_same():
    images = [picture(5 * row, half=250 - row) for row in range(len(TEXTS))]
    measured = cheap.statistics_of(images)
    extractor = CheapFeatures.fit(TEXTS, measured)
    assert extractor.to_dict() == CheapFeatures.fit(TEXTS, images).to_dict()
    np.testing.assert_array_equal(extractor(TEXTS, measured).image, extractor(TEXTS, images).image)


@pytest.mark.parametrize("missing", [None, "no_such.png"])
def test_a_missing_image_is_named_with_its_row(missing):
    with pytest.raises(InputError, match=r"image 2.*(is missing|does not exist)"):
        CheapFeatures.fit(["a", "b", "c"], [picture(), picture(), missing])


def test_what_cannot_be_used_is_said():
    with pytest.raises(InputError, match="question 1 is 7, which is no text"):
        CheapFeatures.fit(["a", 7])
    with pytest.raises(InputError, match="2 questions but 1 images"):
        CheapFeatures.fit(["a", "b"], [picture()])
    with pytest.raises(InputError, match="list of questions"):
        CheapFeatures.fit(TEXTS)("one question")
    with pytest.raises(ConfigError, match="no training rows"):
        CheapFeatures.fit(["a"], rows=[])
    with pytest.raises(ConfigError, match="components=0, hashed=-1"):
        CheapOptions(components=0, hashed=-1)
    with pytest.raises(InputError, match="fitted without images and are asked for with"):
        CheapFeatures.fit(TEXTS)(["a"], [picture()])
    with pytest.raises(InputError, match="fitted with images and are asked for without"):
        CheapFeatures.fit(["a", "b"], [picture(), picture(9)])(["a"])


def test_files_that_hold_no_extractor(tmp_path):
    with pytest.raises(DataError, match=r"extractor.json.*does not exist"):
        cheap.load(tmp_path)
    document = CheapFeatures.fit(TEXTS).to_dict()
    for change in ({"schema_version": 99}, {"arrays": {}}, {"options": {"unknown": 1}}):
        write_json(tmp_path / cheap.EXTRACTOR, document | change)
        with pytest.raises(DataError, match=r"extractor.json: an extractor.*Fit it again"):
            cheap.load(tmp_path / "best_checkpoint.pt")
    assert CheapFeatures.from_dict(json.loads(json.dumps(document))).to_dict() == document


def bent(document: dict, name: str, array: np.ndarray) -> dict:
    """The document with another array."""
    packed = {"dtype": array.dtype.str, "shape": array.shape, "data": base64.b64encode(array.tobytes()).decode()}
    return document | {"arrays": document["arrays"] | {name: packed}}


def test_arrays_that_do_not_fit_each_other_are_no_extractor():
    """They would be found out in a request, by an index that is out of bounds, or never."""
    fitted = CheapFeatures.fit(TEXTS)
    document, ngrams = fitted.to_dict(), fitted.ngrams
    wrong = [
        bent(document, "idf", ngrams.idf[:-1]),
        bent(document, "idf", ngrams.idf * np.float32(np.nan)),
        bent(document, "directions", ngrams.directions[:-1]),
        bent(document, "columns", ngrams.columns + 2 * fitted.options.hashed),
        bent(document, "shades", ngrams.idf),
        document | {"options": document["options"] | {"hashed": 8}},
        document | {"arrays": None},
    ]
    for changed in wrong:
        with pytest.raises(DataError, match="an extractor that cannot be read"):
            CheapFeatures.from_dict(json.loads(json.dumps(changed)))


def test_half_a_character_is_read_as_an_unknown_one_and_no_questions_are_an_error():
    """JSON may hold half of a surrogate pair, which has no UTF-8."""
    extractor = CheapFeatures.fit([*TEXTS, "a\ud83d"])
    np.testing.assert_array_equal(extractor(["a\ud83d"]).language, extractor(["a?"]).language)
    with pytest.raises(InputError, match="there are no questions"):
        extractor([])


def test_equal_images_are_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extractor = CheapFeatures.fit(["a b", "c d"], [picture(9)] * 2)
    assert extractor(["a b"], [picture(9)]).image.shape == (1, NUM_MEASURES)
