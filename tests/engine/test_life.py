"""A request's life and an engine's: cancelled, preempted, refused, failed, stopped; and nobody else is disturbed."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from chatpage.engine import Engine
from chatpage.errors import Busy, ModelError, RequestError, SettingError, Unavailable
from chatpage.model import step as model_step
from chatpage.model.batch import Drawn, Row
from chatpage.model.sampler import Sampled
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.settings import Settings
from chatpage.stream import Stream
from tests.engine.harness import SETTINGS, Steps, ask, greedy, held, inside, intercept, paused, read, user

pytestmark = pytest.mark.usefixtures("overlaps")

QUESTION = "What is a block table?"
LONG = "The system prompt is shared by all the sessions. " * 2
OTHERS = ["Hi", "And a slot?", "Why is the pool full, and of what?"]


class When:
    """Calls a stream's `cancel` on the engine's thread, at the first delta that is as wished."""

    def __init__(self, wish: Callable[[Delta], bool]) -> None:
        self.wish = wish
        self.stream: Stream | None = None

    def __call__(self, delta: Delta) -> None:
        if self.stream is not None and self.wish(delta):
            self.stream.cancel()


# -- cancelled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wish",
    [
        lambda delta: delta.state == "queued",
        lambda delta: delta.state == "prefill" and delta.computed_tokens > delta.cached_tokens,
        lambda delta: delta.completion_tokens == 3,
    ],
    ids=["queued", "prefilling", "decoding"],
)
def test_a_cancelled_request_leaves_no_trace(launch: Callable[..., Engine], wish: Callable[[Delta], bool]) -> None:
    engine = launch(max_step_tokens=7)
    alone = [read(ask(engine, other)).tokens for other in OTHERS]
    baseline = held(engine)
    cancel = When(wish)
    with paused(engine):
        streams = [ask(engine, other) for other in OTHERS[:2]]
        cancel.stream = ask(engine, LONG, greedy(200), listener=cancel)
        streams.append(ask(engine, OTHERS[2]))
    cancelled = read(cancel.stream)
    assert cancelled.reason == "abort"
    assert cancelled.last.completion_tokens <= 3
    assert [read(stream).tokens for stream in streams] == alone
    assert held(engine) == baseline
    cancel.stream.cancel()
    assert inside(engine, lambda: engine.stats()["finished_abort"]) == 1


def test_a_request_that_waits_for_a_place_is_cancelled(launch: Callable[..., Engine]) -> None:
    engine = launch(max_sequences=1)
    with paused(engine):
        first = ask(engine, QUESTION)
        waiting = ask(engine, LONG)
    waiting.cancel()
    answer = read(waiting)
    assert (answer.reason, answer.tokens) == ("abort", [])
    assert read(first).reason == "length"


def test_a_cancelled_answer_keeps_the_characters_that_were_certain(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(20)))
    cancel = When(lambda delta: delta.completion_tokens == 10)
    with paused(engine):
        cancel.stream = ask(engine, QUESTION, greedy(20), listener=cancel)
    half = read(cancel.stream)
    assert half.tokens == whole.tokens[:10]
    assert half.text == engine.core.tokenizer.decode(half.tokens, skip_special_tokens=True)


# -- a pool that is too small ------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {"max_model_len": 96, "kv_blocks": 24, "max_step_tokens": 16}


def test_a_tiny_pool_serves_a_crowd(launch: Callable[..., Engine]) -> None:
    """One sequence of full length fits, and twelve come: they take turns, and each says what it says alone."""
    questions = [f"{n} {QUESTION}"[: 4 + 2 * n] for n in range(12)]
    roomy = launch(**TINY | {"kv_blocks": 400})
    alone = [read(ask(roomy, question, greedy(25))) for question in questions]

    engine = launch(**TINY)
    with paused(engine):
        streams = [ask(engine, q, greedy(25), session=engine.open_session()) for q in questions]
    crowd = [read(stream) for stream in streams]
    assert [(a.tokens, a.text, a.reason) for a in crowd] == [(a.tokens, a.text, a.reason) for a in alone]
    assert engine.core.view.counters["preempted"] > 3
    assert any(delta.state == "preempted" for answer in crowd for delta in answer.deltas)
    assert all(answer.last.cached_tokens == len(engine.systems[0].tokens) for answer in crowd)


def test_preempted_requests_draw_the_same_tokens(launch: Callable[..., Engine]) -> None:
    wishes = [SamplingParams(temperature=1, seed=n, max_tokens=25) for n in range(8)]
    roomy = launch(**TINY | {"kv_blocks": 400})
    alone = [read(ask(roomy, QUESTION, wish)).tokens for wish in wishes]

    engine = launch(**TINY)
    with paused(engine):
        streams = [ask(engine, QUESTION, wish) for wish in wishes]
    assert [read(stream).tokens for stream in streams] == alone
    assert engine.core.view.counters["preempted"] > 0


def test_resting_tables_make_room(launch: Callable[..., Engine]) -> None:
    engine = launch(**TINY)
    sessions = [engine.open_session() for _ in range(6)]
    for session in sessions:
        assert read(ask(engine, QUESTION, greedy(25), session=session)).reason == "length"
    resting = inside(engine, lambda: [session.id for session in engine.core.scheduler.resting])
    assert resting
    assert resting == [session.id for session in sessions][-len(resting) :], "longest rested go first"
    assert engine.core.view.counters["preempted"] == 0


def test_an_answer_that_meets_the_end_of_the_pool_ends_there(launch: Callable[..., Engine]) -> None:
    """The context allows 96 tokens, but the pinned system prompt takes blocks that a strange one cannot use."""
    engine = launch(**TINY)
    usable = 4 * (engine.num_blocks - len(engine.core.pool.pinned))
    answer = read(ask(engine, QUESTION, greedy(None), system="You are a pirate."))
    assert answer.reason == "length"
    assert answer.last.prompt_tokens + len(answer.tokens) == usable + 1 < engine.max_model_len
    assert answer.text == engine.core.tokenizer.decode(answer.tokens)


def test_an_answer_that_meets_the_end_of_the_context_ends_there(engine: Engine) -> None:
    answer = read(ask(engine, QUESTION, greedy(None)))
    assert answer.reason == "length"
    assert answer.last.prompt_tokens + len(answer.tokens) == engine.max_model_len


# -- refused -----------------------------------------------------------------------------------------------------------


def is_one_sentence(error: object) -> bool:
    text = str(error)
    return text.endswith(".") and "\n" not in text and len(text) < 300


def test_a_prompt_longer_than_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"at most 319 are allowed") as refusal:
        engine.prompt(user("word " * 400))
    assert is_one_sentence(refusal.value)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match=r"have 320 tokens"):
        engine.stream(Request(Prompt((5,) * 320)))
    with pytest.raises(RequestError, match=r"more than 320"):
        engine.prompt(user("x" * 10**6))
    assert read(ask(engine, QUESTION)).reason == "length"


def test_the_longest_prompt_gets_one_token(engine: Engine) -> None:
    answer = read(engine.stream(Request(Prompt((5,) * 319), greedy(9))))
    assert (answer.reason, len(answer.tokens)) == ("length", 1)


def test_a_prompt_that_can_never_fit_is_refused(launch: Callable[..., Engine]) -> None:
    engine = launch(**TINY)
    usable = 4 * (engine.num_blocks - len(engine.core.pool.pinned))
    with pytest.raises(RequestError, match="blocks") as refusal:
        engine.stream(Request(Prompt((5,) * usable), greedy()))
    assert is_one_sentence(refusal.value)
    assert read(engine.stream(Request(Prompt((5,) * (usable - 1)), greedy(1)))).reason == "length"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"content": "Hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "king", "content": "I"}],
    ],
)
def test_malformed_messages_are_refused(engine: Engine, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages") as refusal:
        engine.prompt(messages)
    assert is_one_sentence(refusal.value)


def test_a_full_queue_is_busy(launch: Callable[..., Engine]) -> None:
    engine = launch(max_sequences=2, max_queue=3)
    with paused(engine):
        streams = [ask(engine, QUESTION) for _ in range(5)]
        with pytest.raises(Busy) as refusal:
            ask(engine, QUESTION)
        streams[4].cancel()
    assert is_one_sentence(refusal.value)
    assert [read(stream).reason for stream in streams] == ["length"] * 4 + ["abort"]
    assert read(ask(engine, QUESTION)).reason == "length"


def test_a_session_runs_one_turn_at_a_time(engine: Engine) -> None:
    session = engine.open_session()
    with paused(engine):
        first, second = (ask(engine, QUESTION, session=session) for _ in range(2))
    refused = read(second)
    assert refused.reason == "error"
    assert is_one_sentence(refused.last.error)
    assert read(first).reason == "length"


def test_a_session_that_was_closed_is_not_known(engine: Engine) -> None:
    session = engine.open_session()
    with paused(engine):
        stream = ask(engine, QUESTION, session=session)
        late = ask(engine, QUESTION, session=engine.open_session())
        engine.close_session(session.key)
    refused = read(stream)
    assert (refused.reason, read(late).reason) == ("error", "length")
    assert is_one_sentence(refused.last.error)
    with pytest.raises(RequestError, match="session"):
        ask(engine, QUESTION, session=session)
    assert not engine.has_session(session.key)
    assert engine.describe(session.view_token) == {"session": session.id, "sequences": []}


def test_a_silent_session_releases_its_blocks(launch: Callable[..., Engine]) -> None:
    engine = launch(session_ttl=0.05)
    session = engine.open_session()
    read(ask(engine, QUESTION, session=session))
    deadline = time.monotonic() + 5
    while held(engine):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    again = read(ask(engine, QUESTION, session=session))
    assert again.last.cached_tokens == again.last.prompt_tokens, "what it wrote is idle, and still found"


# -- the end of an answer ----------------------------------------------------------------------------------------------


def test_max_tokens_and_the_servers_own_limit(launch: Callable[..., Engine]) -> None:
    engine = launch(max_output_tokens=6)
    for asked, given in [(1, 1), (5, 5), (7, 6), (None, 6)]:
        answer = read(ask(engine, QUESTION, greedy(asked)))
        assert (len(answer.tokens), answer.reason) == (given, "length")


def test_a_stop_string_ends_an_answer_and_is_not_shown(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(40))).text
    stop = whole[10:13]
    answer = read(ask(engine, QUESTION, greedy(40, stop=(stop,))))
    assert (answer.text, answer.reason) == (whole[: whole.index(stop)], "stop")
    never = read(ask(engine, QUESTION, greedy(40, stop=(whole[-1] + "never",))))
    assert (never.text, never.reason) == (whole, "length")


def test_an_end_of_turn_token_ends_an_answer_and_is_not_shown(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(40)))
    end = whole.tokens[10]
    first = whole.tokens.index(end)
    engine.core.stop_token_ids = frozenset({end})
    answer = read(ask(engine, QUESTION, greedy(40)))
    assert (answer.tokens, answer.reason) == (whole.tokens[: first + 1], "stop")
    assert answer.text == engine.core.tokenizer.decode(whole.tokens[:first])


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    warm = SamplingParams(temperature=1.2, top_p=0.95, top_k=50, seed=7, max_tokens=24)
    alone = read(ask(engine, QUESTION, warm)).text
    with paused(engine):
        others = [ask(engine, other, SamplingParams(temperature=1, min_tokens=30, max_tokens=30)) for other in OTHERS]
        same = ask(engine, QUESTION, warm)
        unlike = ask(engine, QUESTION, SamplingParams(temperature=1.2, top_p=0.95, top_k=50, seed=8, max_tokens=24))
    assert read(same).text == alone != read(unlike).text
    fresh = [read(ask(engine, QUESTION, SamplingParams(max_tokens=24))).text for _ in range(2)]
    assert fresh[0] != fresh[1]
    assert [read(other).reason for other in others] == ["length"] * len(others)


def test_the_numbers_of_a_delta(engine: Engine) -> None:
    heard: list[Delta] = []
    answer = read(ask(engine, QUESTION, greedy(5), listener=heard.append))
    prompt = len(engine.prompt(user(QUESTION)).tokens)
    assert [delta.state for delta in heard] == ["queued"] + ["decode"] * 4 + ["done"]
    assert [delta.completion_tokens for delta in heard] == [0, 1, 2, 3, 4, 5]
    assert [delta.computed_tokens for delta in heard] == [0] + [prompt] * 5
    assert {delta.prompt_tokens for delta in heard} == {prompt}
    assert "".join(delta.text for delta in heard) == answer.text


# -- readers -----------------------------------------------------------------------------------------------------------


async def test_readers_on_an_event_loop_and_on_a_thread_read_the_same(engine: Engine) -> None:
    expected = [read(ask(engine, other)).text for other in OTHERS]

    async def listen(stream: Stream) -> str:
        return "".join([delta.text async for delta in stream])

    streams = [ask(engine, other) for other in OTHERS]
    assert await asyncio.gather(*map(listen, streams)) == expected


async def test_a_reader_that_goes_away_ends_the_request(engine: Engine) -> None:
    stream = ask(engine, QUESTION, greedy(None))
    async for delta in stream:
        if delta.completion_tokens:
            break
    await stream.aclose()
    assert [delta.finish_reason async for delta in stream][-1] == "abort"


def test_a_reader_that_never_reads_holds_nothing_up(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(100)))
    never = ask(engine, QUESTION, greedy(100))
    assert read(ask(engine, "Hi", greedy(150))).reason == "length"
    assert held(engine) == 0, "the one that nobody reads has ended too"
    late = read(never)
    assert len(late.deltas) == 1, "nothing piles up"
    assert (late.text, late.tokens) == (whole.text, whole.tokens)


# -- steps that fail ---------------------------------------------------------------------------------------------------


@contextmanager
def failing(engine: Engine, fails: Callable[[list[Row]], bool]) -> Iterator[None]:
    """The runner raises in the steps for which `fails` is true, after it has written."""
    launch = engine.core.runner.launch

    def broken(rows: list[Row], compute: Callable[[list[Row]], list[Drawn]]) -> list[Drawn]:
        drawn = compute(rows)
        if fails(rows):
            raise RuntimeError("out of luck")
        return drawn

    intercept(engine.core.runner, broken)
    yield
    engine.core.runner.launch = launch


def of_seed(seed: int) -> Callable[[list[Row]], bool]:
    return lambda rows: any(row.sample is not None and row.sample.seed == seed for row in rows)


def test_a_step_that_raises_once_is_tried_again(engine: Engine) -> None:
    expected = [read(ask(engine, other)).tokens for other in OTHERS]
    left = [True]
    with failing(engine, lambda rows: bool(left) and left.pop()):
        with paused(engine):
            streams = [ask(engine, other) for other in OTHERS]
        assert [read(stream).tokens for stream in streams] == expected


def test_a_request_that_raises_ends_alone(engine: Engine) -> None:
    alone = [read(ask(engine, other)).tokens for other in OTHERS]
    whole = read(ask(engine, QUESTION)).tokens
    session = engine.open_session()
    baseline = held(engine)
    with failing(engine, of_seed(666)):
        with paused(engine):
            streams = [ask(engine, other) for other in OTHERS]
            broken = ask(engine, QUESTION, greedy(seed=666), session=session)
        answer = read(broken)
        assert answer.reason == "error"
        assert is_one_sentence(answer.last.error)
        assert [read(stream).tokens for stream in streams] == alone
    assert held(engine) == baseline
    again = read(ask(engine, QUESTION, session=session))
    assert again.tokens == whole
    assert again.last.cached_tokens == len(engine.systems[0].tokens), "what a failed turn wrote is not found"
    assert engine.status == "ready"


def test_any_number_of_requests_that_raise_leaves_the_engine_alive(engine: Engine) -> None:
    with failing(engine, of_seed(666)):
        assert [read(ask(engine, QUESTION, greedy(seed=666))).reason for _ in range(5)] == ["error"] * 5
    assert read(ask(engine, QUESTION)).reason == "length"


def test_an_engine_that_computes_nothing_any_more_says_so_to_all(engine: Engine) -> None:
    with failing(engine, lambda rows: True):
        with paused(engine):
            streams = [ask(engine, other) for other in OTHERS]
        answers = [read(stream) for stream in streams]
        engine._thread.join(10)
    assert [answer.reason for answer in answers] == ["error"] * len(OTHERS)
    assert all(is_one_sentence(answer.last.error) for answer in answers)
    assert engine.status == "failed"
    with pytest.raises(Unavailable):
        ask(engine, QUESTION)


def test_a_row_that_is_not_a_number_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [read(ask(engine, other)).tokens for other in OTHERS]
    begin, steps = model_step.begin_sampling, []

    def poisoned(logits: torch.Tensor, draws: list[Any]) -> Sampled:
        steps.append(len(draws))
        for row, draw in enumerate(draws):
            if draw and draw.seed == 666 and len(steps) > 5:
                logits[row] = torch.nan
        return begin(logits, draws)

    monkeypatch.setattr(model_step, "begin_sampling", poisoned)
    with paused(engine):
        streams = [ask(engine, other) for other in OTHERS]
        broken = ask(engine, QUESTION, greedy(seed=666))
    answer = read(broken)
    assert answer.reason == "error"
    assert is_one_sentence(answer.last.error)
    assert 3 <= len(answer.tokens) < 24
    assert [read(stream).tokens for stream in streams] == alone


# -- start and stop ----------------------------------------------------------------------------------------------------


def test_the_collector_looks_seldom_while_an_engine_serves_and_as_before_when_it_has_stopped(
    launch: Callable[..., Engine],
) -> None:
    before = gc.get_threshold()
    engine = launch()
    assert gc.get_threshold()[0] > before[0]
    assert gc.get_freeze_count() > 0, "what was loaded is looked at again and again"
    engine.stop()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_stop_ends_what_runs_and_what_waits(launch: Callable[..., Engine]) -> None:
    engine = launch(max_sequences=2)
    with paused(engine):
        streams = [ask(engine, QUESTION, greedy(None)) for _ in range(5)]
    next(iter(streams[0]))
    begun = time.monotonic()
    engine.stop()
    assert time.monotonic() - begun < 3
    assert not engine.is_alive
    assert [list(stream)[-1].finish_reason for stream in streams] == ["abort"] * 5
    engine.stop()
    with pytest.raises(Unavailable):
        ask(engine, QUESTION)
    streams[0].cancel()
    engine.close_session("unknown")


@pytest.mark.parametrize(
    ("settings", "error", "names"),
    [
        ({"model": "/no/such/folder"}, ModelError, "/no/such/folder"),
        ({"kv_blocks": 3}, SettingError, "--kv-blocks"),
        ({"system_prompt": "word " * 400}, SettingError, "--system-prompt"),
        ({"system_prompt": ["a " * 70, "b " * 70, "c " * 70], "kv_blocks": 80}, SettingError, "--system-prompt"),
    ],
    ids=["no model", "too few blocks", "a system prompt that is too long", "system prompts that fill the pool"],
)
def test_an_engine_that_cannot_start_says_why(
    checkpoint: Callable[[str], Path], settings: dict[str, Any], error: type[Exception], names: str
) -> None:
    engine = Engine(Settings(**SETTINGS | {"model": str(checkpoint("llama"))} | settings))
    engine.subscribe(lambda snapshot, events: None)
    session = engine.open_session()
    engine.close_session(session.key)
    with pytest.raises(Unavailable):
        engine.prompt(user(QUESTION))
    with pytest.raises(Unavailable):
        engine.describe(session.view_token)
    engine.start()
    try:
        with pytest.raises(error, match=names) as refusal:
            engine.wait_ready(20)
        assert is_one_sentence(refusal.value)
        assert engine.status == "failed"
        with pytest.raises(Unavailable):
            engine.stream(Request(Prompt((1, 2, 3))))
    finally:
        engine.stop()
    engine._thread.join(5)


def test_a_listener_gets_a_snapshot_and_then_what_changes_it(engine: Engine) -> None:
    snapshots, threads = [], set()

    def listen(snapshot: Any, events: list[Any]) -> None:
        threads.add(threading.current_thread())
        if snapshot is not None:
            snapshots.append(snapshot)
        snapshots[0].apply_all(events)

    engine.subscribe(listen)
    read(ask(engine, QUESTION, session=engine.open_session()))
    inside(engine, engine.core._hand_out_events)
    assert len(snapshots) == 1
    assert snapshots[0] == engine.core.view
    assert snapshots[0] is not engine.core.view
    assert threads == {engine._thread}
    engine.unsubscribe(listen)
    read(ask(engine, QUESTION))
    assert snapshots[0].seq < engine.core.view.seq


def test_describe_tells_a_sessions_own_tokens_and_places(engine: Engine) -> None:
    session = engine.open_session()
    steps = Steps(engine)
    answer = read(ask(engine, QUESTION, greedy(9), session=session))
    me = engine.describe(session.view_token)
    assert me is not None
    (sequence,) = me["sequences"]
    assert me["session"] == session.id
    text = "".join(token["text"] for token in sequence["tokens"])
    assert QUESTION in text
    assert len(sequence["tokens"]) == answer.last.prompt_tokens + 8
    table = steps.rows[-1][0].table
    assert [token["block"] for token in sequence["tokens"][::4]] == table
    assert [token["slot"] for token in sequence["tokens"]][:6] == [0, 1, 2, 3, 0, 1]
    assert engine.describe(session.key) is None


def test_who_waits_for_an_engine_that_is_stopped_meanwhile_is_told(checkpoint: Callable[[str], Path]) -> None:
    engine = Engine(Settings(model=str(checkpoint("llama"))))
    engine.start()
    engine.stop(timeout=30)
    with pytest.raises(Unavailable):
        engine.wait_ready(30)
