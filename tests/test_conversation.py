"""Chat messages: what is read of them, and that all that is wrong is said at once."""

import pytest
from PIL import Image

from budgetvlm.errors import InputError
from budgetvlm.vlm.conversation import read_messages

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
    assert read.question == "what is it\nwhat is it" and not read.is_plain


@pytest.mark.parametrize(
    ("content", "plain"), [([IMAGE, TEXT], True), ([TEXT, IMAGE], False), ([IMAGE, IMAGE, TEXT], False), ("hi", False)]
)
def test_one_image_and_one_question_is_plain(content, plain):
    assert read_messages([{"role": "user", "content": content}]).is_plain is plain


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
