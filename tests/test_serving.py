"""The server with the bundled model, as OpenAI's own client sees it."""

import json
import urllib.request

import openai
import pytest

from budgetvlm import cli
from budgetvlm.engines import verification
from budgetvlm.knobs import KnobSpace
from budgetvlm.serving.server import url
from budgetvlm.vlm import load_vlm
from budgetvlm.vlm.fingerprint import model_fingerprint
from budgetvlm.vlm.loading import model_directory
from tests.server_process import ServerProcess, asked, image_part

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def server():
    """Address of a server that is ready."""
    with ServerProcess("--playground") as running:
        assert f"playground at {running.address}/playground/\n" in running.errors()
        yield running.address


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def test_the_official_client_completes_and_reads_compliance(client):
    assert [model.id for model in client.models.list()] == ["reference"]
    assert client.models.retrieve("reference").owned_by == "budgetvlm"
    budget = {"latency_budget_ms": 60_000}
    answer = client.chat.completions.create(model="reference", messages=asked(image_part()), extra_body=budget)
    assert answer.choices[0].message.content == "X85"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    said = answer.budgetvlm
    assert (said["budget_ms"], said["budget_met"]) == (60_000, True)
    assert set(said["setting"]) == {"max_crops", "top_k", "num_active_blocks"}
    assert sum(said["stages_ms"].values()) <= said["latency_ms"]


@pytest.mark.parametrize(
    ("host", "written"), [("127.0.0.1", "http://127.0.0.1:80"), ("fe80::1", "http://[fe80::1]:80")]
)
def test_an_address_is_written_as_clients_read_it(host, written):
    assert url(host, 80) == written


def test_the_official_client_streams(client):
    stream = client.chat.completions.create(
        model="reference@60000ms", messages=asked(image_part()), stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "X85"
    (last,) = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    assert last.budgetvlm["budget_ms"] == 60_000
    assert chunks[-1].usage.completion_tokens == last.budgetvlm["num_output_tokens"]


def test_a_request_may_name_its_setting(client):
    """And the server says which settings there are."""
    asking = {"model": "reference", "messages": asked(image_part())}
    space = KnobSpace(client.models.retrieve("reference").knob_space)
    assert client.models.list().data[0].fingerprint == model_fingerprint(model_directory("reference"))
    for named in ({"max_crops": 1, "top_k": 2}, dict(space.cheapest), {}):
        said = client.chat.completions.create(**asking, extra_body={"setting": named}).budgetvlm
        assert said["setting"] == {**space.full, **named} and said["why"] == "The setting that the request named."
    with pytest.raises(openai.BadRequestError, match=r"top_k=3 is outside the knob space; allowed: 1, 2, 12"):
        client.chat.completions.create(**asking, extra_body={"setting": {"top_k": 3}})
    with pytest.raises(openai.BadRequestError, match=r"setting\.top_k"):
        client.chat.completions.create(**asking, extra_body={"setting": {"top_k": "all"}})


def test_the_server_is_an_engine_whose_knobs_are_verified(server, monkeypatch, capsys):
    monkeypatch.setattr(verification, "ENGINE_CHECKS", dict(list(verification.ENGINE_CHECKS.items())[:3]))
    assert cli.main(["check-model", "--engine", server, "--json", "--repeats", "0"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["engines"]
    assert (found["kind"], found["model_path"], found["passed"]) == ("budgetvlm", "reference", True)
    assert found["knob_space"] == load_vlm("reference").knob_space.to_dict()
    assert found["checks"][2]["detail"] == "6 values of other knobs, as the answers say"


def test_an_answer_comes_piece_by_piece_and_ends_at_a_stop_string(client):
    asking = {"model": "reference@60000ms", "messages": asked(image_part())}
    pieces = [
        chunk.choices[0].delta.content for chunk in client.chat.completions.create(**asking, stream=True)
        if chunk.choices and chunk.choices[0].delta.content
    ]  # fmt: skip
    assert len(pieces) > 1 and "".join(pieces) == "X85"
    answer = client.chat.completions.create(**asking, stop=["5"])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("X8", "stop")


def test_two_images_and_a_conversation(client):
    one = client.chat.completions.create(model="reference@60000ms", messages=asked(image_part()))
    two = client.chat.completions.create(model="reference@60000ms", messages=asked(image_part(), image_part()))
    assert two.budgetvlm["num_vision_tokens"] > one.budgetvlm["num_vision_tokens"]
    turns = [*asked(image_part()), {"role": "assistant", "content": "X85"}, {"role": "user", "content": "and in blue?"}]
    conversation = client.chat.completions.create(model="reference@60000ms", messages=turns)
    assert conversation.budgetvlm["num_language_tokens"] > one.budgetvlm["num_language_tokens"]
    assert conversation.choices[0].message.content


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"model": "another"}, 404, "'another' does not exist"),
        ({"messages": []}, 400, "messages"),
        ({"extra_body": {"latency_budget_ms": -1}}, 400, "latency_budget_ms"),
        ({"extra_headers": {"X-Latency-Budget-Ms": "soon"}}, 400, "'soon'"),
        ({"messages": asked({"type": "image_url", "image_url": {"url": "http://elsewhere/a.png"}})}, 400, "data URL"),
    ],
)
def test_what_cannot_be_answered_is_said_as_openai_says_it(client, changed, status, says):
    with pytest.raises(openai.APIStatusError, match=says) as raised:
        client.chat.completions.create(**{"model": "reference", "messages": asked(image_part())} | changed)
    assert raised.value.status_code == status
    assert set(raised.value.body) == {"message", "type", "param", "code"}


def previewed(server, **changed):
    body = json.dumps({"model": "reference", "messages": asked(image_part()), **changed}).encode()
    request = urllib.request.Request(f"{server}/playground/preview", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_a_preview_says_what_the_bundled_model_would_choose_at_any_budget(server):
    found = previewed(server)
    assert [knob["name"] for knob in found["knobs"]] == ["max_crops", "top_k", "num_active_blocks"]
    assert (found["allowed"][0], found["allowed"][-1]) == ([], list(range(27)))
    for allowed, chosen, values in zip(found["allowed"], found["choice"], found["values"], strict=True):
        assert not allowed or chosen == max(allowed, key=lambda k: values[k])
    assert set(previewed(server, price=1e4)["choice"]) == {0}  # where time is all that counts
