"""Unusual orders of events, and wishes that must be obeyed or refused."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.errors import RequestError, SettingError
from chatpage.events import Event, Snapshot
from chatpage.schedule.request import Prompt, Request
from tests.engine.harness import ask, blocks, greedy, inside, intercept, paused, read


def test_a_turn_that_is_cancelled_while_it_waits_leaves_its_session_resting(launch: Callable[..., Engine]) -> None:
    engine = launch(max_sequences=1)
    session = engine.open_session()
    read(ask(engine, "One", session=session))
    before = blocks(engine)
    with paused(engine):
        first = ask(engine, "A stranger's", greedy(40))
        second = ask(engine, "Two", session=session)
    inside(engine, lambda: None)
    second.cancel()
    assert read(second).reason == "abort"
    read(first)
    assert inside(engine, lambda: engine.core.view.sessions[session.id].state) == "resting"
    assert blocks(engine)["resting"] == before["resting"]


def test_a_listener_that_fails_is_left_out_and_the_others_go_on(engine: Engine) -> None:
    heard: list[Event] = []

    def fail(snapshot: Snapshot | None, events: list[Event]) -> None:
        if events:
            raise OSError("no space left")

    engine.subscribe(fail)
    engine.subscribe(lambda snapshot, events: heard.extend(events))
    assert read(ask(engine, "Hello")).reason == "length"
    assert engine.status == "ready"
    assert heard


def test_a_context_longer_than_the_model_knows_is_refused(launch: Callable[..., Engine]) -> None:
    with pytest.raises(SettingError, match=r"--max-model-len is 513, but .+ 512"):
        launch(max_model_len=513)


def test_a_trace_that_cannot_be_written_stops_the_start(launch: Callable[..., Engine]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no full device")
    with pytest.raises(SettingError, match="--trace is '/dev/full', which cannot be written"):
        launch(trace="/dev/full")


@pytest.mark.parametrize("tokens", [(), (5, 320), (-1, 5)])
def test_a_prompt_of_no_tokens_or_of_unknown_ones_is_refused(engine: Engine, tokens: tuple[int, ...]) -> None:
    with pytest.raises(RequestError):
        engine.stream(Request(Prompt(tokens), greedy()))


def test_a_later_question_that_is_far_too_long_is_not_even_tokenised(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Conversation(engine)
    read(chat.say("One", greedy(4)))
    encoded: list[int] = []
    encode = engine.template._encode
    monkeypatch.setattr(engine.template, "_encode", lambda text: (encoded.append(len(text)), encode(text))[1])
    with pytest.raises(RequestError, match="tokens"):
        chat.say("long " * 10_000, greedy(4))
    assert max(encoded, default=0) < 10_000


def test_a_stop_string_is_no_part_of_the_history(engine: Engine) -> None:
    chat = Conversation(engine)
    text = read(ask(engine, "One", greedy(30))).text
    stop = text[8:12]
    first = read(chat.say("One", greedy(30, stop=(stop,))))
    assert first.reason == "stop"
    assert first.text == text[: text.index(stop)]
    read(chat.say("Two", greedy(2)))
    said = engine.core.tokenizer.decode(list(chat._exchanges[-1].prompt.tokens))
    assert f"<|assistant|>\n{first.text}<|end|>" in said


def test_every_reader_hears_of_the_end_even_if_nothing_can_be_ended_in_order(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("tables and references disagree")

    with paused(engine):
        streams = [ask(engine, "One", greedy(9)), ask(engine, "Two", greedy(20))]
        monkeypatch.setattr(engine.core.scheduler, "end", fail)
        streams[0].cancel()
    assert [read(stream).reason for stream in streams] == ["abort", "error"]
    engine._thread.join(10)
    assert engine.status == "failed"


async def test_who_is_cancelled_need_not_wait_for_the_next_step(engine: Engine) -> None:
    go = threading.Event()
    stream = ask(engine, "One", greedy(None))
    await anext(stream)
    intercept(engine.core.runner, lambda rows, compute: (go.wait(20), compute(rows))[1])
    with paused(engine):
        other = ask(engine, "Two", greedy(4))
        stream.cancel()
    try:
        async with asyncio.timeout(5):
            assert [delta async for delta in stream][-1].finish_reason == "abort"
    finally:
        go.set()
    assert read(other).reason == "length"
