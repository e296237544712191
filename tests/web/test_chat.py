"""`/v1/chat/completions` as the `openai` client sees it."""

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from chatpage.errors import Busy, Unavailable
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Logprob, Request
from chatpage.web import openai as openai_routes
from chatpage.web.openai import Answer
from tests.text.samples import byte_level
from tests.web.conftest import SYSTEM_PROMPT, Served, start
from tests.web.fake import FakeEngine
from tests.web.server import serve, wait_until

HELLO = [{"role": "user", "content": "What is a block table?"}]
CHAT = "/v1/chat/completions"


def ask(served: Served, **more):
    return served.client().chat.completions.create(
        **{"model": "tiny-llama", "messages": HELLO, "max_tokens": 16, "temperature": 0, **more}
    )


def test_a_stream_is_the_same_text_as_the_whole(served: Served):
    whole = ask(served)
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *_, last, counted = chunks
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("length", None)
    assert counted.choices == []
    assert counted.usage.completion_tokens == whole.usage.completion_tokens == 16
    assert counted.usage.total_tokens == counted.usage.prompt_tokens + 16
    assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks if chunk.choices) == 1


def test_beam_search(served: Served, checkpoint: Path):
    """The best answers are choices, the best first, with the scores of transformers; the stream says the same."""
    beams = {"use_beam_search": True, "beam_width": 5, "length_penalty": 0.5, "early_stopping": True}
    wishes: dict = {"n": 3, "max_tokens": 12, "extra_body": beams}
    whole = ask(served, **wishes)
    scores = [choice.score for choice in whole.choices]
    assert scores == pytest.approx(generated_scores(served, checkpoint, 12), rel=1e-5)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 3
    assert whole.usage.completion_tokens == 36

    *parts, counted = ask(served, stream=True, stream_options={"include_usage": True}, **wishes)
    for index in range(3):
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == texts[index]
        assert (mine[-1].finish_reason, mine[-1].score) == ("length", scores[index])
    assert counted.usage.completion_tokens == 36


def generated_scores(served: Served, checkpoint: Path, tokens: int) -> list[float]:
    module: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompt = torch.tensor([served.engine.prompt(HELLO).tokens])
    wish: dict = {"num_beams": 5, "length_penalty": 0.5, "early_stopping": True, "num_return_sequences": 3}
    told: dict = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": tokens}
    out = module.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **wish, **told)
    return out.sequences_scores.tolist()


def test_a_beam_is_no_wider_than_the_server(checkpoint: Path):
    engine, settings = start(checkpoint, max_sequences=2)
    with serve(engine, settings) as url:
        engine.wait_ready(60)
        answer = httpx.post(url + CHAT, json={"messages": HELLO, "use_beam_search": True, "beam_width": 3})
        assert answer.status_code == 400
        assert "beam_width is 3; this server runs at most 2 sequences at once." in answer.text


def test_several_replies(served: Served):
    """Each is what it is in a stream; the prompt counts once, and each reply has its own end and log-probabilities."""
    wishes: dict = {"n": 3, "temperature": 1.5, "seed": 4, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = ask(served, **wishes)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert all(choice.finish_reason in ("stop", "length") for choice in whole.choices)
    counts = [len(choice.logprobs.content) for choice in whole.choices]
    assert whole.usage.completion_tokens == sum(counts)
    alone = ask(served, **wishes | {"n": 1})
    assert alone.choices[0].message.content == texts[0]
    assert alone.usage.prompt_tokens == whole.usage.prompt_tokens

    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}, **wishes))
    *parts, counted = chunks
    for index in range(3):
        mine = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == texts[index]
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == [whole.choices[index].finish_reason]
        assert sum(len(choice.logprobs.content) for choice in mine if choice.logprobs) == counts[index]
    assert counted.usage.completion_tokens == sum(counts)
    assert counted.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stream_has_only_data_and_ends_with_done(served: Served):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    lines = [line for line in httpx.post(served.url + CHAT, json=body).text.split("\n") if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_usage_tells_what_was_shared(served: Served):
    system = len(served.engine.systems[0].tokens)
    first = ask(served, messages=[{"role": "user", "content": "Nobody asked this before 1."}])
    assert first.usage.prompt_tokens_details.cached_tokens >= system
    private = ask(
        served, messages=[{"role": "system", "content": "Zebra."}, {"role": "user", "content": "Quite new 2."}]
    )
    assert private.usage.prompt_tokens_details.cached_tokens < system


def test_the_servers_system_prompt_is_the_default(served: Served):
    named = ask(served, messages=[{"role": "system", "content": SYSTEM_PROMPT}, *HELLO])
    developer = ask(served, messages=[{"role": "developer", "content": SYSTEM_PROMPT}, *HELLO])
    assert ask(served).choices[0].message == named.choices[0].message == developer.choices[0].message


def test_text_parts_are_joined(served: Served):
    parts = [{"type": "text", "text": "What is a "}, {"type": "text", "text": "block table?"}]
    joined = ask(served, messages=[{"role": "user", "content": parts}])
    assert joined.choices[0].message.content == ask(served).choices[0].message.content


def test_a_seed_gives_the_same_answer(served: Served):
    first, second = (ask(served, temperature=1, seed=7, extra_body={"top_k": 40}) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert ask(served, temperature=1, seed=8).choices[0].message.content != first.choices[0].message.content


def test_a_stop_string_is_never_sent(served: Served):
    text = ask(served).choices[0].message.content
    stop = text[5:8]
    stopped = ask(served, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_penalties_and_biases_change_the_answer(served: Served):
    plain = ask(served).choices[0].message.content
    for wish in (
        {"presence_penalty": -2, "frequency_penalty": -2},
        {"extra_body": {"repetition_penalty": 5}},
        {"logit_bias": {"40": 100}},
    ):
        assert ask(served, **wish).choices[0].message.content != plain
    assert ask(served, logit_bias={"40": 100}).choices[0].message.content == served.engine.core.token_text(40) * 16
    likeliest = ask(served, temperature=2, extra_body={"min_p": 1})
    assert likeliest.choices[0].message.content == plain


def test_stop_tokens(served: Served):
    tokens = drawn(served)
    stopped = ask(served, extra_body={"stop_token_ids": [tokens[5]]})
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == tokens.index(tokens[5]) + 1
    later = ask(served, extra_body={"stop_token_ids": [tokens[5]], "min_tokens": 16})
    assert (later.choices[0].finish_reason, later.usage.completion_tokens) == ("length", 16)


def drawn(served: Served, **more) -> list[int]:
    """The ids behind an answer."""
    prompt = served.engine.prompt([dict(message) for message in HELLO])
    stream = served.engine.stream(Request(prompt, SamplingParams(temperature=0, max_tokens=16, **more)))
    return [token for delta in stream for token in delta.tokens]


def test_log_probabilities(served: Served):
    assert ask(served).choices[0].logprobs is None
    assert [entry.top_logprobs for entry in ask(served, logprobs=True).choices[0].logprobs.content] == [[]] * 16
    answer = ask(served, logprobs=True, top_logprobs=3, temperature=1, seed=5)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens == 16
    text = answer.choices[0].message.content
    assert b"".join(bytes(entry.bytes) for entry in entries if entry.bytes).decode(errors="replace") == text
    for entry in entries:
        values = [likely.logprob for likely in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob <= values[0] < 0
        for likely in entry.top_logprobs:
            assert (likely.token == entry.token) == (likely.logprob == entry.logprob)
            assert bytes(likely.bytes).decode(errors="backslashreplace") == likely.token
    assert any(entry.logprob < entry.top_logprobs[0].logprob for entry in entries), "always the likeliest"


def test_log_probabilities_of_a_stream_come_with_their_text_or_before(served: Served):
    """Half characters are held back, and so are heads of the stop string."""
    wishes = {"logprobs": True, "top_logprobs": 2, "temperature": 2, "max_tokens": 60, "stop": ["aQZ", "\n\n\n"]}
    held = 0
    for seed in range(8):
        whole = ask(served, seed=seed, **wishes).choices[0]
        text, raw, entries = "", b"", []
        for chunk in ask(served, seed=seed, stream=True, **wishes):
            choice = chunk.choices[0]
            new = choice.logprobs.content if choice.logprobs else []
            text, raw = text + (choice.delta.content or ""), raw + b"".join(bytes(e.bytes) for e in new if e.bytes)
            entries += new
            held += len(new) > 1
            assert not new or choice.delta.content or choice.finish_reason
            assert raw.decode(errors="replace").startswith(text.removesuffix("\ufffd"))
        assert text == whole.message.content
        assert [entry.token for entry in entries] == [entry.token for entry in whole.logprobs.content]
    assert held, "nothing was held back"


def test_a_stop_token_is_told_at_the_end(served: Served):
    """With the ending, or with the last text where both come at once."""
    stop = drawn(served)[5]
    wishes = {"logprobs": True, "extra_body": {"stop_token_ids": [stop]}}
    choices = [chunk.choices[0] for chunk in ask(served, stream=True, **wishes)]
    assert choices[-1].finish_reason == "stop"
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert entries[-1].token == served.engine.core.token_text(stop)


def test_an_impossible_token_is_told_with_a_finite_number(fake: tuple[str, FakeEngine]):
    url, engine = fake
    engine.core = SimpleNamespace(tokenizer=byte_level())
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    told = Delta("done", "a", (1,), (Logprob(1, -math.inf, ((2, -math.inf),)),), finish_reason="stop")
    engine.say_when_asked(0, told)
    answer = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True)
    [entry] = answer.choices[0].logprobs.content
    assert (entry.token, entry.bytes, entry.logprob) == ("<|im_start|>", None, -9999.0)
    assert entry.top_logprobs[0].logprob == -9999.0


def test_a_huge_max_tokens_is_capped_by_the_context(served: Served):
    answer = ask(served, max_tokens=10**9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens <= served.engine.max_model_len


def test_models(served: Served):
    assert [model.id for model in served.client().models.list()] == ["tiny-llama"]
    assert served.client().models.retrieve("tiny-llama").id == "tiny-llama"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("other/model")


def test_a_session_computes_only_its_new_tokens(served: Served):
    header = {"X-ChatPage-Session": ""}
    body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
    first = httpx.post(served.url + CHAT, json=body, headers=header)
    key = first.headers["x-chatpage-session"]
    answer = first.json()["choices"][0]["message"]
    again = {**body, "messages": [*HELLO, answer, {"role": "user", "content": "Why?"}]}
    second = httpx.post(served.url + CHAT, json=again, headers={"X-ChatPage-Session": key})
    assert second.headers["x-chatpage-session"] == key
    found = second.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert found >= first.json()["usage"]["prompt_tokens"]
    unknown = httpx.post(served.url + CHAT, json=body, headers={"X-ChatPage-Session": "guessed"})
    assert unknown.headers["x-chatpage-session"] not in ("guessed", key)
    assert "x-chatpage-session" not in httpx.post(served.url + CHAT, json=body).headers


def test_many_at_once(served: Served):
    expected = ask(served).choices[0].message.content
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(served).choices[0].message.content)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [expected] * 8


def test_leaving_a_stream_ends_the_request(served: Served):
    aborted = served.engine.stats()["finished_abort"]
    with ask(served, stream=True, max_tokens=400) as stream:
        next(iter(stream))
    wait_until(lambda: served.engine.stats()["finished_abort"] == aborted + 1)
    wait_until(lambda: not served.engine.stats()["has_work"])


# -- with an engine that waits ------------------------------------------------------------------------------------


def leave_before_the_answer(url: str, body: dict, seconds: float = 0.3) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + CHAT, json=body, timeout=httpx.Timeout(5, read=seconds))


def test_leaving_while_the_request_waits(fake: tuple[str, FakeEngine]):
    url, engine = fake
    leave_before_the_answer(url, {"messages": HELLO})
    wait_until(lambda: engine.cancelled == {0})
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}):
        wait_until(lambda: len(engine.made) == 2)
    wait_until(lambda: engine.cancelled == {0, 1})


def test_leaving_ends_all_replies(fake: tuple[str, FakeEngine]):
    url, engine = fake
    leave_before_the_answer(url, {"messages": HELLO, "n": 3})
    wait_until(lambda: engine.cancelled == {0, 1, 2})
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True, "n": 2}):
        wait_until(lambda: len(engine.made) == 5)
        engine.say(3, Delta("done", text="Hi", finish_reason="stop"))
    wait_until(lambda: engine.cancelled >= {0, 1, 2, 4})


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_fails_ends_the_others(fake: tuple[str, FakeEngine], stream: bool):
    url, engine = fake
    engine.say_when_asked(0, Delta("done", finish_reason="error", error="The step failed."))
    answer = httpx.post(url + CHAT, json={"messages": HELLO, "n": 3, "stream": stream})
    assert "The step failed." in answer.text
    wait_until(lambda: engine.cancelled >= {1, 2})


def test_a_crowd_that_comes_does_not_hold_up_an_answer(fake: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch):
    url, engine = fake
    crowd, read = 5 * openai_routes.READ_AT_ONCE, engine.prompt
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as response:
        pieces = response.iter_text()
        assert "assistant" in next(pieces)
        monkeypatch.setattr(engine, "prompt", lambda messages: time.sleep(0.02) or read(messages))
        bodies = [{"messages": HELLO, "stream": True}] * crowd
        threads = [threading.Thread(target=lambda body=body: httpx.post(url + CHAT, json=body)) for body in bodies]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(engine.made) > 1)
        engine.say(0, Delta("decode", text="Hi", tokens=(5,)))
        assert "Hi" in next(pieces)
        assert len(engine.made) < crowd, "all of the crowd came first"
    wait_until(lambda: len(engine.made) == crowd + 1)
    for number in range(1, crowd + 1):
        engine.say(number, Delta("done", text="Hi", tokens=(5,), finish_reason="stop"))
    for thread in threads:
        thread.join(10)


def test_a_long_message_is_answered_like_a_short_one(served: Served):
    """Its body, which is mostly white space, is read on a thread."""
    body = json.dumps({"messages": HELLO, "max_tokens": 8, "temperature": 0})
    headers = {"Content-Type": "application/json"}
    answers = [
        httpx.post(served.url + CHAT, content=sent, headers=headers).json()["choices"]
        for sent in (body, body + " " * openai_routes.SHORT_BODY)
    ]
    assert answers[0] == answers[1]


def test_leaving_at_once(fake: tuple[str, FakeEngine]):
    """The client sends its request and is gone before anything could be answered."""
    import socket

    url, engine = fake
    host, port = url.removeprefix("http://").split(":")
    body = b'{"messages": [{"role": "user", "content": "hi"}], "stream": true}'
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
    wait_until(lambda: len(engine.made) == 10)
    wait_until(lambda: engine.cancelled == set(range(10)))


def test_an_error_in_a_stream_is_told_in_the_stream(fake: tuple[str, FakeEngine]):
    url, engine = fake
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    wait_until(lambda: engine.made)
    engine.say(0, Delta("decode", text="Half an"))
    engine.say(0, Delta("done", finish_reason="error", error="The step failed."))
    with pytest.raises(openai.APIError, match="The step failed"):
        list(stream)


def test_an_error_is_the_last_event_and_text_before_it_is_sent(fake: tuple[str, FakeEngine]):
    url, engine = fake
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as response:
        wait_until(lambda: engine.made)
        engine.made[0].put(Delta("decode", text="Half an", tokens=(5,)))
        engine.say(0, Delta("done", text=" answer", finish_reason="error", error="The step failed."))
        response.read()
    *_, text, error, done, nothing = response.text.split("\n\n")
    assert json.loads(text.removeprefix("data: "))["choices"][0]["delta"] == {"content": "Half an answer"}
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "The step failed."
    assert (done, nothing) == ("data: [DONE]", "")


@pytest.mark.parametrize(
    "text", ["plain", 'a "quote" \\ and\nlines', "Grüße 🙂 \ue000 \u2028", "\x00", "%s {} \\ue000"]
)
def test_a_chunk_of_text_is_like_any_other(text: str):
    answer = Answer('a "model" \ue000', include_usage=True)
    for index in (0, 1, 0):
        assert answer.text_chunk(index, text) == answer.chunk(index, {"content": text})


def test_a_silent_stream_is_kept_alive(fake: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openai_routes, "PING_SECONDS", 0.05)
    url, engine = fake
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}) as response:
        pieces = response.iter_text()
        wait_until(lambda: ": ping\n\n" in next(pieces))
        engine.say(0, Delta("done", text="Hi", tokens=(5,), finish_reason="stop"))
        assert "".join(pieces).endswith("data: [DONE]\n\n")
    chunks = client.chat.completions.create(model="fake", messages=HELLO, stream=True)
    engine.say_when_asked(1, Delta("queued"))
    time.sleep(0.2)
    engine.say(1, Delta("done", text="Hi", tokens=(5,), finish_reason="stop"))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hi", None]


def test_an_error_without_a_stream(fake: tuple[str, FakeEngine]):
    url, engine = fake
    engine.say_when_asked(0, Delta("done", finish_reason="error", error="The step failed."))
    answer = httpx.post(url + CHAT, json={"messages": HELLO})
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "The step failed.")


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (Busy("65 are waiting."), 429, "engine_overloaded"),
        (Unavailable("Loading."), 503, "service_unavailable"),
        (RuntimeError("a secret"), 500, "internal_error"),
    ],
)
def test_what_the_engine_refuses(fake: tuple[str, FakeEngine], refusal: Exception, status: int, code: str):
    url, engine = fake
    engine.refusal = refusal
    answer = httpx.post(url + CHAT, json={"messages": HELLO}, headers={"X-ChatPage-Session": ""})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    assert engine.keys == set(), "a session was opened for a refused request"


def test_an_answer_that_was_left_frees_its_session_once(fake: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch):
    url, engine = fake
    headers = {"X-ChatPage-Session": engine.open_session().key}
    body = {"messages": HELLO, "stream": True}
    held: list[tuple[int, Delta]] = []
    with monkeypatch.context() as patched:
        patched.setattr(engine, "say", lambda *said: held.append(said))
        with httpx.stream("POST", url + CHAT, json=body, headers=headers):
            pass
        wait_until(lambda: held)
    with httpx.stream("POST", url + CHAT, json=body, headers=headers) as second:
        assert second.status_code == 200
        engine.say(*held[0])
        time.sleep(0.1)
        third = httpx.post(url + CHAT, json={"messages": HELLO}, headers=headers)
        assert (third.status_code, third.json()["error"]["code"]) == (409, "session_busy")


def test_one_turn_at_a_time_in_a_session(fake: tuple[str, FakeEngine]):
    url, engine = fake
    key = engine.open_session().key
    headers = {"X-ChatPage-Session": key}
    with httpx.stream("POST", url + CHAT, json={"messages": HELLO, "stream": True}, headers=headers):
        second = httpx.post(url + CHAT, json={"messages": HELLO}, headers=headers)
        assert (second.status_code, second.json()["error"]["code"]) == (409, "session_busy")
    wait_until(lambda: engine.cancelled == {0})
    engine.say_when_asked(1, Delta("done", text="Hi", finish_reason="stop"))
    assert httpx.post(url + CHAT, json={"messages": HELLO}, headers=headers).status_code == 200
