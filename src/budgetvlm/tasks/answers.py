"""The answer normalisation of the VQA challenge: what its evaluation server does to answers before it compares them.

Goyal et al., "Making the V in VQA Matter", CVPR 2017, evaluation code of the challenge: lower case, no commas and
question marks, punctuation removed or turned into blanks, number words into digits, no articles, apostrophes put back.
"""

from __future__ import annotations

import re

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_DIGIT_GROUPS = re.compile(r"(?<=\d),+(?=\d)")
_LOOSE_PERIOD = re.compile(r"\.(?!\d)")

# Words written without (one of) their apostrophes are given them back. The server's list lacks some (he'll, she'd),
# because the word without the apostrophe is another word.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
    you're you've""".split()
_MORE_APOSTROPHES = """couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've
    you'd've""".split()


def _apostrophes() -> dict[str, str]:
    known = {word.replace("'", ""): word for word in _ONE_APOSTROPHE}
    for word in _MORE_APOSTROPHES:
        places = [i for i, character in enumerate(word) if character == "'"]
        known |= {word[:i] + word[i + 1 :]: word for i in places}
    return known | {"somebody'd": "somebodyd"}  # as the server has it


APOSTROPHES = _apostrophes()


def normalise_answer(text: str) -> str:
    """Return an answer as the VQA evaluation compares it; articles alone stay, which it makes an empty answer of."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(re.sub(r"[\n\t]", " ", text).strip())
    words = [NUMBERS.get(word, word) for word in text.split()]
    words = [word for word in words if word not in ARTICLES] or words
    return " ".join(APOSTROPHES.get(word, word) for word in words)


def _without_punctuation(text: str) -> str:
    """A mark beside a blank vanishes, a mark between letters becomes a blank, a period stays before a digit."""
    groups = _DIGIT_GROUPS.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        alone = groups or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if alone else " ")
    return _LOOSE_PERIOD.sub("", cleaned)
