"""Text comes as its tokens do: whole characters, nothing of a stop string, and together exactly the answer."""

import threading
import time

import pytest
import torch
from test_prompt_ids import KINDS
from test_runtime import QUESTION, controller, directory, picture, vlm  # noqa: F401
from tiny_vlm import SPECIAL, WORDS
from tokenizers import trainers

from budgetvlm.errors import InputError
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm.text_stream import Pieces, TextStream

TEXTS = ["a red sign, 12 + 3", "  été 三三 \U0001f600\U0001f468\u200d\U0001f469 ok \n", "\n\n", "x", "a  b\n\n c"]


def tokenizer_of(kind):
    made = KINDS[kind]()
    made.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return made


def written(decode, ids, **options):
    """The stream of these tokens, its pieces, and how many tokens it took."""
    pieces = []
    stream = TextStream(decode, on_text=pieces.append, **options)
    taken = next((n for n in range(1, len(ids) + 1) if not stream(ids[:n])), len(ids))
    assert stream.finish(ids[:taken]) == "".join(pieces)
    return stream, pieces, taken


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text(kind):
    tokenizer = tokenizer_of(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        stream, pieces, taken = written(tokenizer.decode, ids)
        assert stream.text == tokenizer.decode(ids).strip() and (stream.ended, taken) == (None, len(ids))
        assert not any("\ufffd" in piece for piece in pieces) and len(pieces) >= len(ids)


def test_a_character_comes_with_its_last_byte_and_a_broken_one_at_the_end():
    tokenizer = tokenizer_of("byte_level")
    ids = [tokenizer.encode(byte).ids[0] for byte in "a"]
    smile = [tokenizer.token_to_id(c) for c in "ðŁĺĢ"] if tokenizer.token_to_id("ðŁĺĢ") is None else None
    smile = smile or [tokenizer.token_to_id("ðŁĺĢ")]
    _, pieces, _ = written(tokenizer.decode, ids + smile)
    assert [p for p in pieces if p] == ["a", "\U0001f600"]


def by_letter(ids):
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "taken"),
    [
        ("one. two", (".",), "one", 4),
        ("one END two", ("END",), "one", 7),
        ("one EN two", ("END",), "one EN two", 10),
        ("ababac", ("abac", "bb"), "ab", 6),
        ("a\n\nb", ("\n\n",), "a", 3),
        ("\nb", ("\n",), "", 1),
        ("abc", ("b", "ab"), "", 2),
        ("abcd", ("abcd", "cd"), "", 4),
        ("one E", ("END",), "one E", 5),
    ],
)
def test_stop_strings_end_an_answer_and_are_no_part_of_it(text, stop, wanted, taken):
    stream, pieces, took = written(by_letter, list(map(ord, text)), stop=stop)
    assert (stream.text, took, "".join(pieces)) == (wanted, taken, wanted)
    assert stream.ended == (None if wanted == text else "stop")


def test_several_letters_of_a_token_may_hold_a_stop_string_in_their_middle():
    words = ["say", " one. T", "wo"]
    stream, pieces, taken = written(lambda ids: "".join(words[i] for i in ids), [0, 1, 2], stop=(".",))
    assert (stream.text, pieces, taken) == ("say one", ["say", " one"], 2)


def test_who_reads_may_stop_it_and_gets_nothing_more():
    got = []
    stream = TextStream(by_letter, on_text=lambda piece: got.append(piece) or len(got) < 2)
    ids = list(map(ord, "abcd"))
    assert [stream(ids[:n]) for n in (1, 2)] == [True, False]
    assert (stream.finish(ids[:2]), stream.ended, got) == ("ab", "stopped", ["a", "b"])


def test_blanks_around_an_answer_are_left_out_and_those_within_wait_for_the_next_word():
    _, pieces, _ = written(by_letter, list(map(ord, "  a  b  ")))
    assert pieces == ["", "", "a", "", "", "  b", "", ""]


# ---- requests


@pytest.fixture(scope="module")
def model(vlm):  # noqa: F811
    """Says words, "what what what what" to any question, and no special tokens, which it otherwise likes best."""
    head, words_only = vlm.decoder.head, torch.zeros(len(SPECIAL) + len(WORDS))
    words_only[: len(SPECIAL)] = -torch.inf
    vlm.decoder.head = lambda hidden: head(hidden) + words_only
    yield AdaptiveVLM(vlm, controller())
    vlm.decoder.head = head


def test_a_streamed_answer_is_the_answer(model, picture):  # noqa: F811
    whole, pieces = model.generate(picture, QUESTION, max_new_tokens=6), []
    streamed = model.generate(picture, QUESTION, max_new_tokens=6, on_text=pieces.append)
    assert "".join(pieces) == streamed.answer == whole.answer
    assert len(pieces) >= whole.num_output_tokens == streamed.num_output_tokens
    assert streamed.finish_reason == whole.finish_reason
    stream = model.generate(picture, QUESTION, max_new_tokens=6, stream=True)
    assert "".join(stream) == stream.answer.answer == whole.answer and list(stream) == []
    assert "".join(model.stream(picture, QUESTION, max_new_tokens=6)) == whole.answer
    with pytest.raises(InputError, match="give one of both"):
        model.stream(picture, QUESTION, on_text=pieces.append)


def test_an_answer_ends_at_a_stop_string(model, picture):  # noqa: F811
    assert model.generate(picture, QUESTION, max_new_tokens=3).answer == "what what what"
    for stop in ("t w", ["nothing", "t w"]):
        cut = model.generate(picture, QUESTION, max_new_tokens=6, stop=stop)
        assert (cut.answer, cut.finish_reason, cut.num_output_tokens) == ("wha", "stop", 2)


def test_a_caller_may_stop_an_answer_within_one_token(model, picture):  # noqa: F811
    answer = model.generate(picture, QUESTION, max_new_tokens=6, on_text=lambda piece: False)
    assert (answer.num_output_tokens, answer.finish_reason) == (1, "stopped")


def test_what_was_stopped_teaches_no_length_and_only_that_it_was_late(model, picture, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(model.guard, "update", lambda index, bounds, outcome: seen.append(outcome))
    model.generate(picture, QUESTION, on_text=lambda piece: False)
    model.generate(picture, QUESTION, stop="w")
    model.generate(picture, QUESTION, stop="x")
    assert [(outcome.whole, outcome.stopped) for outcome in seen] == [(False, True), (False, False), (True, False)]


def test_a_slow_reader_does_not_hold_the_model_and_closing_stops_it():
    made, go, waited = [], threading.Event(), threading.Event()

    def write(on_text):
        go.wait(10)
        for number in range(100):
            made.append(number)
            if not on_text(f"{number} "):
                break
            if number == 3:
                waited.wait(10)
        return "end"

    with Pieces(write) as pieces:
        go.set()
        while len(made) < 4:  # nobody has read anything yet
            time.sleep(1e-3)
        assert [next(pieces), next(pieces)] == ["0 ", "1 "]
    waited.set()
    assert pieces.answer == "end" and len(made) == 5
    assert list(pieces) == ["2 ", "3 ", "4 "]


def test_a_stream_that_is_dropped_stops_its_writer():
    told, ended = threading.Event(), threading.Event()

    def write(on_text):
        while on_text("x"):
            told.set()
        ended.set()

    pieces = Pieces(write)
    assert told.wait(10)
    del pieces
    assert ended.wait(10)


def test_what_a_writer_raises_is_raised_where_it_is_read(model, picture):  # noqa: F811
    with pytest.raises(InputError, match="cannot be kept"):
        list(AdaptiveVLM(model.vlm, controller()).generate(
            picture, QUESTION, budget_ms=0.01, when_infeasible="reject", stream=True
        ))  # fmt: skip
    with pytest.raises(InputError, match=r"max_new_tokens=0 .* stop=\['', 3\]"):  # before anything is written
        model.generate(picture, QUESTION, stream=True, max_new_tokens=0, stop=["", 3])
    for stop in (None, 3):
        with pytest.raises(InputError, match=f"stop={stop} holds"):
            model.generate(picture, QUESTION, stop=stop)


def test_messages_of_one_question_are_that_question(model, picture):  # noqa: F811
    image, text = {"type": "image", "image": picture}, {"type": "text", "text": QUESTION}
    asked = model.generate(messages=[{"role": "user", "content": [image, text]}], max_new_tokens=6)
    plain = model.generate(picture, QUESTION, max_new_tokens=6)
    assert (asked.answer, asked.num_vision_tokens, asked.num_language_tokens) == (
        plain.answer, plain.num_vision_tokens, plain.num_language_tokens,
    )  # fmt: skip
    with pytest.raises(InputError, match="give either"):
        model.generate(picture, messages=[{"role": "user", "content": [image, text]}])
