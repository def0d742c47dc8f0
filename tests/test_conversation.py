"""Chat messages: what is read of them, and that all that is wrong is said at once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runtime import QUESTION, SPACE, controller, directory, picture, vlm  # noqa: F401

from budgetvlm.errors import InputError
from budgetvlm.runtime import AdaptiveVLM
from budgetvlm.vlm.conversation import is_plain, read_messages

PICTURE = Image.new("RGB", (8, 6))
IMAGE, TEXT = {"type": "image", "image": PICTURE}, {"type": "text", "text": "what is it"}


def test_turns_keep_the_places_of_their_images(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    read = read_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [TEXT, IMAGE]},
            {"role": "assistant", "content": "a dot"},
            {"role": "user", "content": [{"type": "image", "image": tmp_path / "a.png"}, TEXT, TEXT]},
        ]
    )
    assert [turn["role"] for turn in read.turns] == ["system", "user", "assistant", "user"]
    assert read.turns[0]["content"] == [{"type": "text", "text": "be brief"}]
    assert [part["type"] for part in read.turns[1]["content"]] == ["text", "image"]
    assert read.images[0] is PICTURE and read.images[1].size == (8, 6)
    assert read.question == "what is it\nwhat is it" and not is_plain(read)


@pytest.mark.parametrize(
    ("content", "plain"), [([IMAGE, TEXT], True), ([TEXT, IMAGE], False), ([IMAGE, IMAGE, TEXT], False), ("hi", False)]
)
def test_one_image_and_one_question_is_plain(content, plain):
    assert is_plain(read_messages([{"role": "user", "content": content}])) is plain


@pytest.mark.parametrize("messages", [[], "hello", {"role": "user"}, None, 3])
def test_what_is_no_list_of_messages(messages):
    with pytest.raises(InputError, match="is no list of messages"):
        read_messages(messages)


def test_all_that_is_wrong_is_said_at_once():
    url = {"type": "image_url", "image_url": {"url": "http://x"}}
    with pytest.raises(InputError) as refused:
        read_messages(
            [
                {"role": "tool", "content": "x"},
                {"role": "user", "content": [url, {"type": "image", "image": "none.png"}, {"type": "text"}, 3]},
                {"role": "assistant", "content": [IMAGE]},
                {"role": "user", "content": None},
            ]
        )
    for part in (
        'messages[0] needs a "role"', "messages[1], part 0: a part is", "'none.png' does not exist",
        "messages[1], part 2:", "part 3:", "messages[2], part 0: an image in a message of the assistant",
        'messages[3] needs a "content"',
    ):  # fmt: skip
        assert part in str(refused.value), part


@pytest.mark.parametrize("last", [{"role": "assistant", "content": "a"}, {"role": "user", "content": [IMAGE]}])
def test_the_last_message_asks(last):
    with pytest.raises(InputError, match="the last message has to be the user's"):
        read_messages([{"role": "user", "content": "hi"}, last])


# ---- requests


@pytest.fixture(scope="module")
def model(vlm):  # noqa: F811
    return AdaptiveVLM(vlm, controller())


def chat(*images, text=QUESTION):
    return [
        {"role": "system", "content": "code"},
        {"role": "user", "content": [*({"type": "image", "image": one} for one in images), TEXT]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": text},
    ]


def words(vlm, conversation):  # noqa: F811
    """The tokens of a prompt, visual ones as one."""
    first, *texts = vlm.prompt.around(conversation, [""] * len(conversation.images))
    names = vlm.prompt.tokenizer.convert_ids_to_tokens
    return " ".join([*names(list(first)), *(w for ids in texts for w in ["IMAGE", *names(list(ids))])])


def test_a_template_of_knobs_json_writes_conversations(vlm, picture):  # noqa: F811
    """Each image between its marks, in front of what the user says; an answer ends as the model's answers do."""
    read = read_messages(chat(picture, picture))
    assert (
        words(vlm, read)
        == "code <img> IMAGE </img> <img> IMAGE </img> what is <unk> <a> A </s> what is the red sign <a>"
    )
    one = {"role": "user", "content": [TEXT, IMAGE]}  # in whatever order they come, the model reads the image first
    assert words(vlm, read_messages([one])) == "<img> IMAGE </img> what is <unk> <a>"


def test_several_images_are_encoded_once_each_and_seen_by_their_mean(vlm, model, picture, monkeypatch):  # noqa: F811
    other, tiles, seen = picture.rotate(180), [], []
    encode, values = vlm.images.encode, model.network.values
    monkeypatch.setattr(vlm.images, "encode", lambda pixels, at: tiles.append(len(pixels[0])) or encode(pixels, at))
    monkeypatch.setattr(model.network, "values", lambda *asked: seen.append(asked) or values(*asked))
    answer = model.generate(messages=chat(picture, other), max_new_tokens=2)
    assert tiles == [1, 1, 4, 4] and answer.setting == SPACE.full
    features = [vlm.encode_overview(one).feature for one in (picture, other)]
    np.testing.assert_allclose(seen[0][0], np.mean(features, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(seen[0][1], vlm.question_feature(QUESTION))
    asked = model.request(None, read_messages(chat(picture, other)))
    np.testing.assert_array_equal(asked.vision, 2 * model.request(picture, QUESTION).vision)
    assert (asked.images, answer.num_vision_tokens, answer.num_language_tokens) == (
        2.0, asked.vision[-1], asked.language
    )  # fmt: skip


def test_text_alone_is_answered_at_the_fewest_crops_and_encodes_nothing(model, monkeypatch):
    monkeypatch.setattr(model.vlm, "encode_overview", lambda image: pytest.fail("there is no image"))
    answer = model.generate(messages=chat(), max_new_tokens=2)
    assert answer.setting == SPACE.setting(**{**SPACE.full, "max_crops": 1})
    assert (answer.num_vision_tokens, answer.stages_ms["preprocess"], answer.stages_ms["vision"]) == (0, 0.0, 0.0)
    assert answer.stages_ms["prefill"] > 0 and answer.num_language_tokens == 13
    np.testing.assert_array_equal(model.image_feature([]), model.controller.image_input.mean.numpy())


def test_a_conversation_that_nothing_keeps_is_rejected_before_the_model_runs(model, picture, monkeypatch):  # noqa: F811
    monkeypatch.setattr(model.vlm, "encode_overview", lambda image: pytest.fail("the model ran"))
    for messages in (chat(picture), chat()):
        with pytest.raises(InputError, match="cannot be kept"):
            model.generate(messages=messages, budget_ms=0.01, when_infeasible="reject")


def test_a_batch_is_answered_by_deadline_and_given_back_in_order(model, picture, monkeypatch):  # noqa: F811
    """Each has its own terms; who waits longer than its budget is late, and says so."""
    order, generate = [], model.vlm.generate
    monkeypatch.setattr(model.vlm, "generate", lambda *a, **o: order.append(o["max_new_tokens"]) or generate(*a, **o))
    asked = [
        {"image": picture, "question": QUESTION, "max_new_tokens": 1},
        {"messages": chat(picture), "budget_ms": 1e5, "max_new_tokens": 2},
        {"image": picture, "question": QUESTION, "budget_ms": 5e4, "max_new_tokens": 3, "price": 0.5},
    ]
    answers = model.generate_batch(asked)
    assert order == [3, 2, 1] and [answer.num_output_tokens for answer in answers] == [1, 2, 3]
    assert [answer.budget_ms for answer in answers] == [float("inf"), 1e5, 5e4]
    assert answers[2].latency_ms < answers[1].latency_ms < answers[0].latency_ms  # waiting counts
    assert model.generate_batch([]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"question": QUESTION}, "request 1 .* an image is needed"),
        ({"messages": []}, "request 1 .* no list of messages"),
        ({"messages": chat(), "budget_ms": -1}, "request 1 .* not a positive number"),
        ({"messages": chat(), "when_infeasible": "reject"}, "request 1 .* would lose the answers"),
        ({"messages": chat(), "max_tokens": 3}, "request 1 .*max_tokens is unknown; known: budget_ms"),
    ],
)
def test_a_batch_with_one_that_cannot_be_answered_is_not_begun(model, picture, monkeypatch, wrong, message):  # noqa: F811
    monkeypatch.setattr(model.vlm, "generate", lambda *a, **o: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        model.generate_batch([{"image": picture, "question": QUESTION}, wrong])


def test_the_snippet_of_the_documents_runs(monkeypatch, capsys):
    """As it stands, in a clone; what it prints ends with how the answer ended."""
    monkeypatch.chdir(Path(__file__).parents[1])
    text = Path("docs/own-model.md").read_text(encoding="utf-8")
    snippet = text.partition("## Messages and streams")[2].partition("```python\n")[2].partition("```")[0]
    exec(snippet, {})
    assert capsys.readouterr().out.split()[-1] in ("stop", "length", "budget")
