"""Engines on tiny random checkpoints, ways to ask them, and ways to look inside between two steps."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chatpage.engine import Engine, OpenSession
from chatpage.events import Event, Snapshot
from chatpage.model.batch import Drawn, Row
from chatpage.model.step import Launched, ModelRunner
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Request
from chatpage.settings import Settings
from chatpage.stream import Stream
from chatpage.text.template import Message

T = TypeVar("T")

# Small blocks, so that everything has several; nobody shares by accident; every step proves the cache's invariants.
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "block_size": 4,
    "kv_blocks": 400,
    "max_model_len": 320,
    "sharing": "system",
    "system_prompt": "You are kind.",
    "paranoid": True,
}


def start(model: Path | None, **settings: Any) -> Engine:
    """An engine that is ready. `settings` go on top of SETTINGS; None takes one away."""
    wanted = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
    engine = Engine(Settings(model=None if model is None else str(model), **wanted))
    engine.start()
    engine.wait_ready(60)
    return engine


def greedy(max_tokens: int | None = 24, **wishes: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **wishes)


def user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def ask(
    engine: Engine,
    text: str,
    params: SamplingParams | None = None,
    *,
    session: OpenSession | None = None,
    system: str | None = None,
    listener: Callable[[Delta], None] | None = None,
) -> Stream:
    """Submit one question; `system` brings a system message of its own."""
    messages = ([{"role": "system", "content": system}] if system else []) + user(text)
    request = Request(engine.prompt(messages), params or greedy(), session=session.key if session else None)
    return engine.stream(request, listener)


@dataclass
class Answer:
    """Everything that a stream said."""

    deltas: list[Delta]

    @property
    def last(self) -> Delta:
        return self.deltas[-1]

    @property
    def reason(self) -> str | None:
        return self.last.finish_reason

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


def read(stream: Stream) -> Answer:
    """Read a stream to its end, which must be a single `done`."""
    answer = Answer(list(stream))
    assert [delta.state == "done" for delta in answer.deltas] == [False] * (len(answer.deltas) - 1) + [True]
    assert answer.reason is not None
    assert len(answer.tokens) == answer.last.completion_tokens
    return answer


# -- the engine's thread -----------------------------------------------------------------------------------------------


@contextmanager
def paused(engine: Engine) -> Iterator[None]:
    """Hold the engine between two steps: whatever is asked meanwhile is heard before the next one."""
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(30)

    engine._post(hold)
    assert held.wait(30)
    try:
        yield
    finally:
        go.set()


def inside(engine: Engine, look: Callable[[], T]) -> T:
    """Call a function on the engine's thread, when everything asked so far was heard and told."""
    return engine._ask(look)


def blocks(engine: Engine) -> dict[str, int]:
    """The numbers of blocks that the events add up to."""
    return inside(engine, lambda: (engine.core._hand_out_events(), engine.core.view.counts())[1])


def held(engine: Engine) -> int:
    """How many blocks are used, the pinned ones left out."""
    counts = blocks(engine)
    return counts["used"] - counts["pinned"]


def assert_clean(engine: Engine) -> None:
    """With every session closed, nobody holds a block and nothing is remembered of any request."""
    for key in list(engine._sessions._by_key):
        engine.close_session(key)
    assert held(engine) == 0
    inside(engine, engine.core.check)
    scheduler = engine.core.scheduler
    queues = scheduler.running, scheduler.waiting, scheduler.preempted, scheduler.resting
    assert not any([*queues, engine.core.turns, engine._sessions, engine._sessions._keys, engine._open_replies])
    assert sum(engine.core.pool.ref) == 0
    assert engine.core.view.sessions == {}


@dataclass
class Done:
    """What was launched and is computed already."""

    results: list[Drawn]

    def drawn(self) -> list[Drawn]:
        return self.results


def intercept(
    runner: ModelRunner, around: Callable[[list[Row], Callable[[list[Row]], list[Drawn]]], list[Drawn]]
) -> None:
    """Have all rows that are computed from now on pass through `around(rows, compute)`."""
    launch = runner.launch
    runner.launch = lambda rows: Done(around(rows, lambda rows: launch(rows).drawn()))


class Steps:
    """The rows and copies of every step from now on, and the events, in the order in which they came."""

    def __init__(self, engine: Engine) -> None:
        self.rows: list[list[Row]] = []
        self.copies: list[tuple[int, int]] = []
        self.events: list[Event] = []
        self._launch, self._copy = engine.core.runner.launch, engine.core.runner.copy
        engine.core.runner.launch, engine.core.runner.copy = self._record, self._record_copies
        engine.subscribe(self._hear)
        inside(engine, lambda: None)

    def _record(self, rows: list[Row]) -> Launched:
        self.rows.append([Row(list(r.tokens), r.start, list(r.table), r.store, r.sample) for r in rows])
        return self._launch(rows)

    def _record_copies(self, pairs: list[tuple[int, int]]) -> None:
        self.copies += pairs
        self._copy(pairs)

    def _hear(self, snapshot: Snapshot | None, events: list[Event]) -> None:
        self.events += events

    def kinds(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def tokens(self) -> int:
        return sum(len(row.tokens) for rows in self.rows for row in rows)
