"""Every refusal of `/v1` is OpenAI's shape and names what is wrong."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatpage.settings import Settings
from tests.web.conftest import Served
from tests.web.fake import FakeEngine
from tests.web.server import serve

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
ASK: dict[str, Any] = {"messages": [USER], "max_tokens": 1}


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=20) as client:
        yield client


def post(client: httpx.Client, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(CHAT, content=content, headers={"Content-Type": "application/json"})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"].endswith(".")
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{\xff}",
        b'\xef\xbb\xbf{"messages": []}',
        b'"text"',
        b"[]",
        b"1",
        b"null",
        b"[" * 100_000,
        b'{"seed": ' + b"1" * 5001 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(client: httpx.Client, body: bytes):
    answer = post(client, body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [123]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [USER] * 1025}, "messages"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": [], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": 1}]}, "messages[1].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 2}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 65}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"stop": 3}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"stop_token_ids": ["3"]}, "stop_token_ids"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"stop_token_ids": [3] * 1025}, "stop_token_ids"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"\ud800": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"01": 1}}, "logit_bias"),
        ({"logit_bias": {"1.0": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 100.5}}, "logit_bias"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
        ({"logit_bias": {"1": None}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999999": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": "true"}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"top_logprobs": 0, "logprobs": False}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": True, "logprobs": True}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 3}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 3}, "model"),
        ({"use_beam_search": "yes"}, "use_beam_search"),
        ({"beam_width": 3}, "beam_width"),
        ({"length_penalty": 2}, "length_penalty"),
        ({"early_stopping": "never", "use_beam_search": False}, "early_stopping"),
        ({"use_beam_search": True, "beam_width": 9}, "beam_width"),
        ({"use_beam_search": True, "beam_width": 2.0}, "beam_width"),
        ({"use_beam_search": True, "length_penalty": -5.5}, "length_penalty"),
        ({"use_beam_search": True, "length_penalty": float("nan")}, "length_penalty"),
        ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": True, "early_stopping": 1}, "early_stopping"),
        ({"use_beam_search": True, "beam_width": 3, "n": 4}, "n"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_k": 5}, "top_k"),
        ({"use_beam_search": True, "stop": "a"}, "stop"),
        ({"use_beam_search": True, "logprobs": True}, "logprobs"),
    ],
)
def test_wrong_values(client: httpx.Client, change: dict[str, Any], param: str):
    answer = post(client, {**ASK, **change})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


@pytest.mark.parametrize(
    "change",
    [
        {"best_of": 3},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"audio": {}},
        {"chat_template": "{{ 1 }}"},
        {"cache_salt": "x"},
        {"priority": 1},
        {"prompt_logprobs": 1},
        {"guided_regex": "a+"},
        {"messages": [{"role": "tool", "content": "3", "tool_call_id": "1"}]},
        {"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{}]}, USER]},
    ],
)
def test_what_is_not_supported_is_not_ignored(client: httpx.Client, change: dict[str, Any]):
    answer = post(client, {**ASK, **change})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "unsupported_parameter")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1, "logprobs": False, "frequency_penalty": 0, "tools": None, "response_format": {"type": "text"}},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "what is this": float("nan")},
        {"max_completion_tokens": 1},
        {"min_p": 0, "repetition_penalty": 1, "min_tokens": 0, "stop_token_ids": [], "logit_bias": {}},
        {"min_p": None, "repetition_penalty": None, "min_tokens": None, "stop_token_ids": None, "logit_bias": None},
        {"logprobs": None, "top_logprobs": None, "presence_penalty": None, "frequency_penalty": None},
        {"min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -2, "frequency_penalty": 2, "min_tokens": 1},
        {"logit_bias": {"319": -100, "0": 100.0}, "stop_token_ids": [319], "logprobs": True, "top_logprobs": 20},
        {"top_k": -1, "temperature": 0.001, "seed": -1, "stop": None},
        {"messages": [{**USER, "name": "me"}, {"role": "assistant", "content": "x", "tool_calls": None}, USER]},
        {"messages": [{"role": "user", "content": "\u0000\u2028\u202e\u200b\ufeff <|end|><|system|> é 👩‍👧"}]},
    ],
)
def test_what_asks_for_nothing_special_is_accepted(client: httpx.Client, change: dict[str, Any]):
    assert post(client, {**ASK, **change}).status_code == 200


def test_images(client: httpx.Client):
    image = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}
    answer = post(client, {"messages": [{"role": "user", "content": [image]}]})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "unsupported_content")


def test_an_unknown_model(client: httpx.Client):
    answer = post(client, {**ASK, "model": "gpt-9"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("length", [600, 100_000])
def test_a_prompt_longer_than_the_context(client: httpx.Client, length: int):
    answer = post(client, {"messages": [{"role": "user", "content": "word " * length}]})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "191" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types(client: httpx.Client, kind: str):
    answer = client.post(CHAT, content=json.dumps(ASK), headers={"Content-Type": kind})
    assert answer.status_code == 415
    error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/kv/snapshot", 405),
        ("POST", "/healthz", 405),
        ("PUT", "/panel/panel.js", 405),
        ("GET", "/v1/completions", 404),
        ("GET", "/kv/other", 404),
        ("GET", "/panel/nothing.js", 404),
    ],
)
def test_wrong_paths_and_methods(client: httpx.Client, method: str, path: str, status: int):
    answer = client.request(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_the_key():
    engine = FakeEngine()
    with serve(engine, Settings(api_key="right")) as url, httpx.Client(base_url=url) as client:
        for key in ("", "Bearer", "Bearer wrong", "Basic right", "Bearer \xe9"):
            headers = {"Authorization": key.encode("latin-1")}
            for answer in (client.post(CHAT, json=ASK, headers=headers), client.get("/v1/models", headers=headers)):
                assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert client.get("/metrics").status_code == 401
        right = {"Authorization": "Bearer right"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/metrics", headers=right).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_before_the_engine_is_ready(fake: tuple[str, FakeEngine]):
    url, engine = fake
    engine.status, engine.detail = "starting", "Loading the model"
    for answer in (httpx.post(url + CHAT, json=ASK), httpx.get(url + "/v1/models")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "Loading the model" in error_of(answer)["message"]


# -- whatever may come --------------------------------------------------------------------------------------------

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "x"]),
            "content": st.text(max_size=30) | anything,
        }
    ),
    max_size=4,
)
fields = st.fixed_dictionaries(
    {"messages": messages | anything, "max_tokens": st.integers(max_value=3) | st.floats() | st.text(max_size=3)},
    optional={
        name: anything | st.floats(-1, 3) | st.integers(-2, 5) | st.booleans()
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens", "logit_bias"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs"),
            *("stream", "stream_options", "n", "model", "tools"),
        )
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=fields | anything)
def test_anything_is_answered_in_shape(client: httpx.Client, body: object):
    answer = post(client, body)
    assert answer.status_code < 500
    if answer.status_code != 200:
        error_of(answer)
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
