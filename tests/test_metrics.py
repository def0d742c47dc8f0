"""The data sets' metrics: known answers, and agreement with other implementations on thousands of cases.

The cases and the other implementations' results are made by benchmarks/metric_cases.py.
"""

import json
import string
from pathlib import Path

import pytest

from budgetvlm.tasks.answers import normalise_answer
from budgetvlm.tasks.choices import open_answer, parse_choice
from budgetvlm.tasks.cider import Cider, tokenise
from budgetvlm.tasks.metrics import METRICS, anls, exact_match, multiple_choice, relaxed_accuracy, vqa_accuracy, yes_no

CASES = json.loads((Path(__file__).parent / "data/metric_cases.json").read_text(encoding="utf-8"))
OURS = {**METRICS, "open": METRICS["multiple_choice"], "cider": Cider(case[1] for case in CASES["cider"])}


def departs(name, case):
    """Where others give a wrong answer points for blanks, or take a reference of articles alone for an empty one."""
    texts = [case[0], *case[1]]
    blanks = any(text != " ".join(text.split()) for text in texts)
    articles = any(set(text.lower().strip(string.punctuation + " ").split()) <= {"a", "an", "the"} for text in texts)
    return (name == "anls" and blanks) or (name == "vqa" and articles)


@pytest.mark.parametrize("name", [name for name in CASES if name != "tokens"])
def test_scores_are_those_of_another_implementation(name):
    cases = [case for case in CASES[name] if not departs(name, case)]
    assert len(cases) > 0.4 * len(CASES[name])
    assert [case for case in cases if OURS[name](*case[:3]) != pytest.approx(case[3], abs=1e-6)] == []


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("15", "1.5", 0), ("1240", "12.40", 0), ("5", "-5", 0), ("330", "3:30", 0), ("20192020", "2019-2020", 0),
        ("12", "1/2", 0), ("1240", "12,40", 0), ("30", "3.0", 0), ("$-5", "5", 0), ("7", "007", 0),
        ("1e5", "1e-5", 0), ("0.00001", "1e-05", 1), ("v15", "v1.5", 0),
        ("$12.40", "12.40", 1), ("12.4", "12.40", 1), ("-$5", "-5", 1), ("1,240", "1240", 1), (".5", "0.5.", 1),
        ("3.0", "3", 1), ("\N{MINUS SIGN}5", "-5", 1), ("3:30.", "3:30", 1), ("Red.", "red", 1),
        ("T-shirt", "tshirt", 1),
        ("", "?", 0), (".", "?", 0), ("?", "?", 1),
    ],
)  # fmt: skip
def test_numbers_keep_their_point_and_sign(prediction, answer, right):
    assert exact_match(prediction, [answer]) == exact_match(answer, [prediction]) == right


@pytest.mark.parametrize("metric", [vqa_accuracy, exact_match, anls, relaxed_accuracy])
@pytest.mark.parametrize("answer", ["A", "the", "?", "none", "0"])
def test_an_empty_answer_meets_no_reference_and_a_reference_meets_itself(metric, answer):
    assert metric("", [answer]) == metric(" ", [answer] * 10) == 0.0
    assert metric(answer, [answer]) == metric(answer, [answer] * 10) == 1.0


def test_blanks_make_no_answer_better():
    assert anls("ab" + " " * 5, ["cd" + " " * 5]) == anls("a     b", ["c     d"]) == anls("ab     ", ["cd"]) == 0.0
    assert anls(" Hollywood\n", ["hollywood"]) == 1.0


def test_the_cases_are_many_and_both_right_and_wrong():
    assert sum(map(len, CASES.values())) > 3000
    for name, cases in CASES.items():
        if name not in ("tokens", "cider"):
            share = sum(case[3] >= 0.5 for case in cases) / len(cases)
            assert 0.1 < share < 0.9, (name, share)


def test_captions_are_split_into_words_as_by_the_penn_treebank():
    wrong = [(caption, words, tokenise(caption)) for caption, words in CASES["tokens"] if tokenise(caption) != words]
    assert wrong == []


def test_every_annotator_is_left_out_once():
    answers = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("Red.", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("the blue", answers) == 1.0
    assert vqa_accuracy("green", answers) == 0.0


def test_few_annotators_are_not_ten():
    assert vqa_accuracy("two", ["2"]) == 1.0
    assert vqa_accuracy("red", ["red", "blue"]) == pytest.approx((0 + 1) / 2)
    assert vqa_accuracy("red", ["red", "red"]) == 1.0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Two dogs!", "2 dogs"),
        ("1,000", "1000"),
        ("3.5 cm.", "3.5 cm"),
        ("dont", "don't"),
        ("a red-green hat", "red green hat"),
        ("", ""),
    ],
)
def test_answers_are_normalised(text, plain):
    assert normalise_answer(text) == plain


def test_similar_texts_count_by_their_edits_and_far_ones_not_at_all():
    assert anls("Hollywod", ["hollywood"]) == pytest.approx(1 - 1 / 9)
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abc", ["abxyz"]) == 0.0
    assert anls("", ["x"]) == 0.0


def test_numbers_may_be_off_by_five_per_cent():
    assert relaxed_accuracy("105", ["100"]) == 1.0
    assert relaxed_accuracy("105.1", ["100"]) == 0.0
    assert relaxed_accuracy("0", ["0"]) == 1.0
    assert relaxed_accuracy("50%", ["0.51"]) == 1.0
    assert relaxed_accuracy("Brazil", ["brazil"]) == 1.0


OPTIONS = ["a cat", "a dog", "two cows"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("The answer is (C)", "C"),
        ("A or B", "B"),
        ("a dog", "B"),
        ("I am quite sure that it is two cows", "C"),
        ("D", None),
        ("", None),
        ("neither", None),
    ],
)
def test_the_letter_is_read_from_free_text(response, letter):
    assert parse_choice(response, OPTIONS) == letter


def test_a_question_without_options_is_open():
    assert multiple_choice("The answer is 3.50", ["3.5"]) == 1.0
    assert multiple_choice("(B)", ["B"], OPTIONS) == 1.0
    assert open_answer("so x = 1,200", ["1200"]) == 1.0
    assert open_answer("12", ["1200"]) == 0.0


def test_exact_match_forgives_case_and_marks_only():
    assert exact_match(" Two. ", ["two"]) == 1.0
    assert exact_match("2", ["two"]) == 0.0


def test_yes_and_no_as_the_authors_of_pope_read_them():
    assert yes_no("Yes, there is.", ["yes"]) == 1.0
    assert yes_no("There is not. Yes.", ["no"]) == 1.0
    assert yes_no("", ["yes"]) == yes_no(" ", ["no"]) == 0.0


def test_a_caption_like_its_references_scores_one_and_an_unrelated_one_nothing():
    corpus = [["a red bus stops"], ["two dogs play"], ["an old man reads"]]
    cider = Cider(corpus)
    assert cider("A red bus stops.", corpus[0]) == pytest.approx(1.0)
    assert cider("quite something else", corpus[0]) == 0.0
    assert 0 < cider("a red bus", corpus[0]) < 1
    assert cider("", corpus[0]) == cider("words", []) == 0.0


def test_a_word_of_every_image_counts_for_nothing():
    cider = Cider([["the bus stops"], ["the dogs play"]])
    assert cider("the", ["the bus stops"]) == 0.0
