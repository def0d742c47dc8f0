"""What the clients, tools and proxies that people use expect of the server, beside the answer. No model takes part."""

import asyncio
import json
import socket

import openai
import pytest

from tests import fake_replicas
from tests.fake_replicas import CHAT, served

pytestmark = pytest.mark.alone

SAID = "red blue green"


@pytest.fixture(scope="module")
def server():
    with served(word_s=0.001) as running:
        yield running


@pytest.fixture(scope="module")
def address(server):
    return f"http://{server.host}:{server.port}"


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_a_model_is_found_by_its_name_with_and_without_a_budget(client):
    (listed,) = client.models.list()
    assert client.models.retrieve("reference") == listed and listed.created > 1.7e9
    assert client.models.retrieve("reference@300ms").id == "reference@300ms"
    with pytest.raises(openai.NotFoundError, match="'another' does not exist") as raised:
        client.models.retrieve("another")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_raw_responses_have_headers_and_a_name(client):
    raw = client.chat.completions.with_raw_response.create(**CHAT, extra_body={"latency_budget_ms": 5000})
    assert (raw.headers["x-budgetvlm-budget-met"], raw.parse().choices[0].message.content) == ("true", SAID)
    assert raw.request_id == raw.parse()._request_id != client.chat.completions.create(**CHAT)._request_id


def test_the_official_helper_for_streams_puts_an_answer_together(client):
    with client.chat.completions.stream(**CHAT, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        whole = stream.get_final_completion()
    kinds = [event.type for event in events]
    assert kinds.count("content.delta") == 4 and kinds.count("content.done") == 1  # the first one is empty
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (SAID, "stop")
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (3, 0)
    (said,) = [event.chunk.budgetvlm for event in events if hasattr(getattr(event, "chunk", None), "budgetvlm")]
    assert said["setting"] == {"max_crops": 4, "top_k": 2}  # the helper leaves it out of what it puts together


def test_the_official_client_raises_what_ended_a_stream():
    with served(word_s=0.1) as server:
        client = openai.OpenAI(base_url=f"http://{server.host}:{server.port}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**CHAT, stream=True)
        assert next(stream).choices[0].delta.role == "assistant"
        server.kill(server.replicas[0])
        with pytest.raises(openai.APIError, match="ended while it worked on this request"):
            list(stream)


def test_the_asynchronous_client_asks_several_at_once(address):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**CHAT, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            answers = await asyncio.gather(*[client.chat.completions.create(**CHAT) for _ in range(4)])
        return ["".join(pieces), *(answer.choices[0].message.content for answer in answers)]

    assert asyncio.run(ask()) == 5 * [SAID]


@pytest.mark.parametrize(
    "extra",
    [
        {"temperature": 0.7, "top_p": 0.9, "seed": 1, "user": "someone", "n": 1, "logprobs": False, "tools": []},
        {"ignore_eos": True, "min_tokens": 4, "top_k": 1, "repetition_penalty": 1.0, "guided_json": None},
        {"max_completion_tokens": 9, "max_tokens": None, "stop": None, "response_format": {"type": "text"}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},  # without a stream
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be short"}]}, *CHAT["messages"]]},
        {"messages": [{"role": "user", "name": "someone", "content": "what"}]},
    ],
)
def test_fields_that_tools_send_by_habit_are_taken(server, extra):
    assert server.chat(**extra)[0] == 200


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0: Input tag"),
        ({"messages": [{"role": "tool", "content": "what"}]}, "messages.0.role: Input should be 'system'"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop: List should have at most 4 items"),
        ({"stop": ["1", 2]}, "stop.1: Input should be a valid string"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_in_a_field_is_told_of_the_type_that_was_meant(server, changed, says):
    status, _, document = server.chat(**changed)
    assert status == 400 and document["error"]["message"].startswith(says)
    assert document["error"]["param"] == says.partition(":")[0]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/reference"])
def test_where_get_is_answered_head_is(server, path):
    got, head = server.ask(method="GET", path=path), server.ask(method="HEAD", path=path)
    assert (head[0], head[2]) == (got[0], "")
    assert head[1]["content-type"] == got[1]["content-type"]


def test_head_is_refused_where_get_is(server):
    status, headers, _ = server.ask(method="HEAD")
    assert (status, headers["allow"]) == (405, "POST")


def test_proxies_are_told_to_pass_pieces_on_at_once(server):
    _, headers, _ = server.chat(stream=True)
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_no_character_of_an_answer_ends_an_events_line(server, monkeypatch):
    words = "a\u2028b", "c\u2029d\x85", "e\x0b\x1cf\n\r", "\N{GRINNING FACE}"
    monkeypatch.setattr(fake_replicas, "WORDS", words)
    lines = [line for line in server.chat(stream=True)[2].splitlines() if line]  # as httpx ends lines: at U+2028, too
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "".join(words)


def test_a_client_of_http_1_0_reads_until_the_connection_is_closed(server):
    body = json.dumps({**CHAT, "stream": True})
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        head, _, told = b"".join(iter(lambda: connection.recv(4096), b"")).decode().partition("\r\n\r\n")
    assert "chunked" not in head.lower() and "connection: close" in head.lower()
    assert told.startswith("data: {") and told.endswith("data: [DONE]\n\n")


def test_bodies_that_are_compressed_are_refused_by_name(server):
    headers = {"Content-Encoding": "gzip"}
    status, _, document = server.ask(CHAT, headers=headers)
    assert (status, document["error"]["code"]) == (415, "unsupported_media_type")
    assert "gzip" in document["error"]["message"]
    assert server.ask(CHAT, headers={"Content-Encoding": "identity", "Accept-Encoding": "gzip, br"})[0] == 200
