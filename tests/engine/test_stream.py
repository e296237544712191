"""How deltas come to their readers: one by one to a few, in rounds to a crowd, and always all of them."""

import asyncio
import gc
import threading
import time
import weakref

import pytest

from chatpage import stream as stream_module
from chatpage.schedule.request import Delta
from chatpage.stream import FEW, Bell, Stream

TOKENS = 40
CROWD = 4 * FEW


def token(number: int) -> Delta:
    return Delta("decode", text=f"{number} ", tokens=(number,), completion_tokens=number)


async def read(stream: Stream) -> list[Delta]:
    return [delta async for delta in stream]


def say(streams: list[Stream], delta: Delta) -> None:
    """What the engine does after a step."""
    for stream in streams:
        stream.put(delta)
    Stream.wake(streams)


async def speak(count: int, seconds: float) -> list[list[Delta]]:
    """What so many readers get of an answer whose steps take so long."""

    def engine() -> None:
        for number in range(1, TOKENS):
            say(streams, token(number))
            time.sleep(seconds)
        say(streams, token(TOKENS)._replace(state="done"))

    streams = [Stream(lambda: None) for _ in range(count)]
    reading = [asyncio.create_task(read(stream)) for stream in streams]
    await asyncio.sleep(0)  # all of them listen
    await asyncio.to_thread(engine)
    return await asyncio.gather(*reading)


@pytest.mark.parametrize("count", [1, FEW, CROWD])
async def test_every_token_comes_once_and_in_order(count: int) -> None:
    for deltas in await speak(count, 0.0005):
        assert Delta.merged(deltas).tokens == tuple(range(1, TOKENS + 1))
        assert "".join(delta.text for delta in deltas) == "".join(f"{n} " for n in range(1, TOKENS + 1))
        assert [delta.state for delta in deltas].index("done") == len(deltas) - 1


async def test_a_few_get_every_token_alone() -> None:
    streams = [Stream(lambda: None) for _ in range(FEW)]
    for number in range(1, TOKENS):
        reading = [asyncio.create_task(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        say(streams, token(number))
        for delta in await asyncio.wait_for(asyncio.gather(*reading), 5):
            assert delta.tokens == (number,)


async def test_a_crowd_gets_several_tokens_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WAKES_A_SECOND", CROWD / 0.3)
    monkeypatch.setattr(stream_module, "LONGEST_REST", 0.3)
    for deltas in await speak(CROWD, 0.005):
        assert len(deltas) < TOKENS / 2
        assert deltas[0].tokens == (1,)


async def test_a_first_token_and_an_end_wait_for_no_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "WAKES_A_SECOND", 0.001)
    monkeypatch.setattr(stream_module, "LONGEST_REST", 3600.0)
    crowd, late = [Stream(lambda: None) for _ in range(CROWD)], Stream(lambda: None)
    reading = [asyncio.create_task(read(stream)) for stream in crowd]
    others = asyncio.create_task(anext(late))
    await asyncio.sleep(0)
    say(crowd, token(1))
    await asyncio.sleep(0.05)  # from now on the loop rests
    say([late], token(1))
    assert (await asyncio.wait_for(others, 5)).tokens == (1,)
    second = asyncio.create_task(anext(late))
    await asyncio.sleep(0)
    say([late, *crowd], token(2))
    await asyncio.sleep(0.05)
    assert not second.done()
    say([late, *crowd], token(3)._replace(state="done"))
    assert (await asyncio.wait_for(second, 5)).tokens == (2, 3)
    for deltas in await asyncio.wait_for(asyncio.gather(*reading), 5):
        assert [delta.tokens for delta in deltas] == [(1,), (2, 3)]


async def test_whoever_waits_for_a_round_is_woken_though_no_other_step_comes() -> None:
    crowd = [Stream(lambda: None) for _ in range(CROWD)]
    reading = [asyncio.create_task(anext(stream)) for stream in crowd]
    await asyncio.sleep(0)
    say(crowd, token(1))
    await asyncio.gather(*reading)
    reading = [asyncio.create_task(anext(stream)) for stream in crowd]
    await asyncio.sleep(0)
    say(crowd, token(2))  # the last one for a long time
    for delta in await asyncio.wait_for(asyncio.gather(*reading), 5):
        assert delta.tokens == (2,)


def test_a_reader_on_a_thread_waits_for_no_round() -> None:
    stream = Stream(lambda: None)
    deltas: list[Delta] = []
    reader = threading.Thread(target=lambda: deltas.extend(stream))
    reader.start()
    for number in range(1, 5):
        stream.put(token(number))
        deadline = time.monotonic() + 5
        while len(deltas) < number and time.monotonic() < deadline:
            time.sleep(0.001)
    stream.put(Delta("done"))
    reader.join(5)
    assert [delta.tokens for delta in deltas] == [(1,), (2,), (3,), (4,), ()]


def test_the_end_is_noted_once_and_before_anybody_hears_of_it() -> None:
    heard: list[str] = []
    stream = Stream(lambda: None, lambda delta: heard.append(delta.state), ended=lambda: heard.append("ended"))
    say([stream], token(1))
    say([stream], Delta("done"))
    assert heard == ["decode", "ended", "done"]


def test_a_loop_and_its_bell_are_not_kept() -> None:
    async def listen() -> weakref.ref[Bell]:
        stream = Stream(lambda: None)
        stream.put(Delta("done"))
        await read(stream)
        return weakref.ref(Bell.of(asyncio.get_running_loop()))

    bell = asyncio.run(listen())
    gc.collect()
    assert bell() is None


def test_a_loop_that_was_closed_disturbs_nobody() -> None:
    stream, other = Stream(lambda: None), Stream(lambda: None)

    async def leave() -> None:
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0)
        reader.cancel()

    asyncio.run(leave())
    say([stream, other], Delta("done"))
    assert [delta.state for delta in other] == ["done"]
