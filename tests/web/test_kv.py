"""`/kv` over a real connection: snapshots, deltas, scopes, resuming, falling behind."""

import asyncio
import base64
import json
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest

from chatpage.conversation import Conversation
from chatpage.errors import Unavailable
from chatpage.events import Event, SequenceView, Snapshot, SystemView
from chatpage.schedule.params import SamplingParams
from chatpage.settings import Settings
from chatpage.web import kv
from chatpage.web.view import STRANGER
from tests.web.conftest import Served, start
from tests.web.fake import FakeEngine
from tests.web.server import serve, wait_until
from tests.web.story import Story

GREEDY = SamplingParams(temperature=0, max_tokens=20)


class Reader:
    """Reads /kv/events on a thread until the block ends. `events` are `(event, id, data)`."""

    def __init__(self, url: str, token: str = "", last_id: str = "") -> None:
        self.url = f"{url}/kv/events"
        self.headers = [("Authorization", f"Bearer {token}")] if token else []
        self.headers += [("Last-Event-ID", last_id)] if last_id else []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.raw = ""

    def __enter__(self) -> "Reader":
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(self._read())
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.events or self.task.done())
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(5)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)

    async def _read(self) -> None:
        fields: dict[str, str] = {}
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream("GET", self.url, headers=self.headers) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                self.raw += line + "\n"
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
                elif "event" in fields:
                    self.events.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
                    fields = {}


def replay(events: list[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """The state that a viewer has from its first snapshot and the deltas after it, as a body of /kv/snapshot."""
    (name, _, first), *deltas = events
    assert name == "snapshot"
    state = loaded(deepcopy(first))
    for name, event_id, delta in deltas:
        assert name == "delta"
        assert delta["seq"][0] == state.seq + 1
        state.apply_all(Event(**event) for event in delta["events"])
        assert event_id == f"{state.epoch}-{state.seq}" == f"{state.epoch}-{delta['seq'][1]}"
    return {**state.to_json(scope=first["scope"], sharing=first["sharing"]), "time": 0}


def loaded(body: dict[str, Any]) -> Snapshot:
    """A Snapshot from the body of /kv/snapshot: what a panel does."""

    def bytes_of(name: str, before: bytes) -> bytes:
        return before + base64.b64decode(body["pool"][name])

    def table(runs: list[Any]) -> list[int]:
        return [b for run in runs for b in (range(run[0], sum(run)) if isinstance(run, list) else [run])]

    scalars = ("epoch", "seq", "block_size", "num_blocks", "bytes_per_block", "max_model_len", "counters")
    snapshot = Snapshot(
        **{name: body[name] for name in scalars},
        state=bytearray(bytes_of("state", b"\0")),
        ref=array("H", bytes_of("ref", b"\0\0")),
        fill=bytearray(bytes_of("fill", b"\0")),
        system={s["name"]: SystemView(s["name"], s["tokens"], table(s["table"])) for s in body["system"]},
    )
    for session in body["sessions"]:
        for s in session["sequences"]:
            where = (s["parent"], s["at"], s["tokens"], table(s["table"]))
            snapshot._enter(SequenceView(s["id"], session["id"], s["state"], *where))
        assert snapshot.sessions[session["id"]].state == session["state"]
    return snapshot


def snapshot_of(url: str, token: str = "") -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = httpx.get(f"{url}/kv/snapshot", headers=headers)
    assert answer.status_code == 200
    return {**answer.json(), "time": 0}


def talk(conversation: Conversation, text: str) -> None:
    for _ in conversation.say(text, GREEDY):
        pass


def agree(reader: Reader, url: str, token: str = "") -> None:
    """What the reader has been told is what the server says, at a moment when both are equally far."""

    def both_are_equally_far() -> bool:
        shown = snapshot_of(url, token)
        events = list(reader.events)
        if events[-1][1] != f"{shown['epoch']}-{shown['seq']}":
            return False
        assert replay(events) == shown
        return True

    wait_until(both_are_equally_far)


def test_full_shows_every_row_exactly(served: Served):
    with Reader(served.url) as reader:
        conversation = Conversation(served.engine)
        talk(conversation, "Hello there")
        agree(reader, served.url)
        shown = snapshot_of(served.url)
        (session,) = [s for s in shown["sessions"] if s["id"] == conversation.session.id]
        assert session["state"] == "resting"
        assert shown["scope"] == "full"
        kinds = [event["kind"] for _, _, delta in reader.events[1:] for event in delta["events"]]
        assert kinds.count("copy") == 1, "the system prompt ends inside a block: one copy-on-write a session"
        conversation.close()
        wait_until(lambda: conversation.session.id not in [s["id"] for s in snapshot_of(served.url)["sessions"]])
        agree(reader, served.url)


def test_resuming(served: Served):
    conversation = Conversation(served.engine)
    with Reader(served.url) as first:
        pass
    seen = first.events[0][1]
    talk(conversation, "While nobody looks")
    wait_until(lambda: snapshot_of(served.url)["sessions"])
    with Reader(served.url, last_id=seen) as second:
        assert second.events[0][0] == "delta"
        second.events[:0] = first.events  # what comes from now on is added to them
        agree(second, served.url)
    conversation.close()


@pytest.mark.parametrize("last_id", ["nonsense", "0000-3", "{epoch}-999999", "{epoch}--1", "{epoch}-1", "{epoch}-1e3"])
def test_an_id_that_cannot_be_resumed_from_gets_a_snapshot(served: Served, last_id: str):
    last_id = last_id.replace("{epoch}", snapshot_of(served.url)["epoch"])
    with Reader(served.url, last_id=last_id) as reader:
        assert reader.events[0][0] == "snapshot"


def test_ones_own_tokens(served: Served, monkeypatch: pytest.MonkeyPatch):
    conversation = Conversation(served.engine)
    talk(conversation, "My own words")
    now = time.monotonic()
    monkeypatch.setattr(kv, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))  # all in one second
    headers = {"Authorization": f"Bearer {conversation.session.view_token}"}
    answers = [httpx.get(f"{served.url}/kv/me", headers=headers) for _ in range(6)]
    assert [answer.status_code for answer in answers[:4]] == [200] * 4
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    mine = answers[0].json()
    text = "".join(token["text"] for token in mine["sequences"][0]["tokens"])
    assert "My own words" in text
    assert mine["session"] == conversation.session.id
    assert httpx.get(f"{served.url}/kv/me").status_code == 401
    assert httpx.get(f"{served.url}/kv/me", headers={"Authorization": "Bearer guessed"}).status_code == 401
    conversation.close()


# -- other scopes -------------------------------------------------------------------------------------------------


@contextmanager
def scoped(checkpoint: Path, scope: str) -> Iterator[Served]:
    engine, settings = start(checkpoint, panel_scope=scope, sharing="system")
    with serve(engine, settings) as url:
        engine.wait_ready(60)
        yield Served(url, engine)


def test_aggregate(checkpoint: Path):
    with scoped(checkpoint, "aggregate") as served:
        mine, other = Conversation(served.engine), Conversation(served.engine)
        token = mine.session.view_token
        with Reader(served.url, token) as own, Reader(served.url) as stranger:
            talk(mine, "These are my words")
            talk(other, "Those are canary words")
            wait_until(lambda: [s["state"] for s in snapshot_of(served.url)["sessions"]] == ["resting"] * 2)
            agree(own, served.url, token)
            agree(stranger, served.url)
            exact = {s["id"]: s["sequences"][0]["tokens"] for s in snapshot_of(served.url, token)["sessions"]}
            assert exact[mine.session.id] % 16, "a test where rounding would not show"
            assert exact[other.session.id] % 16 == 0
            rounded = {s["id"]: s["sequences"][0]["tokens"] for s in snapshot_of(served.url)["sessions"]}
            assert rounded[mine.session.id] % 16 == 0
            for secret in ("canary", mine.session.key, other.session.key, other.session.view_token):
                assert secret not in own.raw + stranger.raw
        last = own.events[-1][1]
        talk(mine, "More")
        talk(other, "More")
        wait_until(lambda: snapshot_of(served.url, token)["seq"] > int(last.rpartition("-")[2]))
        wait_until(lambda: [s["state"] for s in snapshot_of(served.url)["sessions"]] == ["resting"] * 2)
        with Reader(served.url, token, last) as again:
            assert again.events[0][0] == "delta"
            again.events[:0] = own.events
            agree(again, served.url, token)


def test_self(checkpoint: Path):
    with scoped(checkpoint, "self") as served:
        mine, other = Conversation(served.engine), Conversation(served.engine)
        with Reader(served.url, mine.session.view_token) as own:
            talk(mine, "These are my words")
            talk(other, "Those are not")
            wait_until(lambda: snapshot_of(served.url)["blocks"]["resting"] >= 4)
            wait_until(lambda: own.events[-1][2]["blocks"]["resting"] >= 4)
        assert {name for name, _, _ in own.events} == {"snapshot"}
        assert {s["id"] for _, _, body in own.events for s in body["sessions"]} == {mine.session.id}
        shown = sum(byte > 0 for byte in base64.b64decode(own.events[-1][2]["pool"]["state"]))
        assert shown < own.events[-1][2]["blocks"]["used"]
        assert snapshot_of(served.url)["sessions"] == []
        unknown = {"Authorization": "Bearer guessed"}
        assert httpx.get(f"{served.url}/kv/events", headers=unknown).status_code == 401


def test_off():
    with serve(FakeEngine(), Settings(panel_scope="off")) as url:
        for path in ("/kv/snapshot", "/kv/events", "/kv/me"):
            assert httpx.get(url + path).status_code == 404


def test_too_many_viewers(fake: tuple[str, FakeEngine], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv, "MAX_VIEWERS", 1)
    url, _ = fake
    with Reader(url):
        answer = httpx.get(f"{url}/kv/events")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_viewers")


# -- the hub alone ------------------------------------------------------------------------------------------------


async def test_a_viewer_that_falls_behind_is_given_a_snapshot():
    story = Story(5)
    engine = FakeEngine()
    engine.snapshot = story.snapshot
    hub = kv.Hub(engine, Settings())  # type: ignore[arg-type]
    hub.start()
    await hub.wake()
    watching = hub.watch(STRANGER, "", anyio.Event())
    first = await anext(watching)
    assert first.startswith(b"id: ")
    assert b"event: snapshot" in first
    for _ in range(3 * kv.BACKLOG):
        hub._receive(None, story.more(5))
        hub._flush()
    assert b"event: resync" in await anext(watching)
    snapshot = await anext(watching)
    assert f"-{hub.number(STRANGER)}\n".encode() in snapshot
    hub._receive(None, story.more(20))
    hub._flush()
    delta = await anext(watching)
    assert f'"seq":[{int(snapshot.split(b"-")[1].split()[0]) + 1},'.encode() in delta
    await watching.aclose()
    assert hub.viewers == set()
    hub.stop()


class Teller(FakeEngine):
    """Tells its story to whoever listens, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.story = Story(3)
        self.listeners: list[Any] = []

    def subscribe(self, listener: Any) -> None:
        self.listeners.append(listener)
        listener(deepcopy(self.story.snapshot), [])

    def unsubscribe(self, listener: Any) -> None:
        self.listeners = [other for other in self.listeners if other != listener]

    def go_on(self) -> None:
        events = self.story.more(30)
        self.story.snapshot.apply_all(events)
        for listener in self.listeners:
            listener(None, events)


@pytest.mark.parametrize("scope", ["full", "aggregate", "self"])
async def test_the_hub_follows_the_engine_only_while_somebody_looks(scope: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv, "AWAKE_SECONDS", 0.2)
    monkeypatch.setattr(kv, "AGGREGATE_DELAY", 0.1)
    engine = Teller()
    hub = kv.Hub(engine, Settings(panel_scope=scope))  # type: ignore[arg-type]
    hub.start()
    assert not engine.listeners
    await hub.wake()
    watching = hub.watch(STRANGER, "", anyio.Event())
    first = await anext(watching)
    before, told = hub.snapshot(STRANGER)["epoch"], engine.story.snapshot.seq
    engine.go_on()
    assert await anext(watching) != first
    await asyncio.sleep(0.5)
    assert len(engine.listeners) == 1, "somebody watches"

    await watching.aclose()
    await asyncio.sleep(0.5)
    assert not engine.listeners
    assert hub.mirror is None
    for _ in range(5):
        engine.go_on()
    await hub.wake()
    after = hub.snapshot(STRANGER)
    assert (after["epoch"] == before) == (scope == "full")
    if scope == "full":
        assert after["seq"] == engine.story.snapshot.seq > told
        assert after["counters"] == engine.story.snapshot.counters
    elif scope == "aggregate":
        assert after["seq"] == 0, "it would tell how much was written meanwhile"
        assert after["counters"]["hit_tokens"] == 0, "beside what a session knows of its own hits it would tell others'"
    hub.stop()
    assert not engine.listeners


async def test_nothing_is_shown_in_whole_blocks_before_it_is_late(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv, "AGGREGATE_DELAY", 0.3)
    hub = kv.Hub(Teller(), Settings(panel_scope="aggregate"))  # type: ignore[arg-type]
    hub.start()
    asked = time.monotonic()
    await hub.wake()
    assert time.monotonic() - asked >= 0.29
    hub.stop()


async def test_a_glance_wakes_nobody():
    engine = Teller()
    hub = kv.Hub(engine, Settings())  # type: ignore[arg-type]
    hub.start()
    seen = await hub.glance()
    assert seen is not None
    assert seen.seq == engine.story.snapshot.seq
    assert not engine.listeners
    assert hub.mirror is None
    engine.status = "failed"
    assert await hub.glance() is None


async def test_an_engine_that_does_not_answer_is_busy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kv, "WAKE_SECONDS", 0.1)
    monkeypatch.setattr(kv, "GLANCE_SECONDS", 0.1)
    engine = Teller()
    monkeypatch.setattr(engine, "subscribe", lambda listener: None)
    hub = kv.Hub(engine, Settings())  # type: ignore[arg-type]
    hub.start()
    with pytest.raises(Unavailable, match="busy with a long step"):
        await hub.wake()
    assert await hub.glance() is None


@pytest.mark.parametrize("scope", ["full", "aggregate"])
async def test_who_waits_for_a_long_step_is_not_forgotten(scope: str, monkeypatch: pytest.MonkeyPatch):
    """The engine answers when the hub would long sleep again, had it looked at viewers alone."""
    monkeypatch.setattr(kv, "AWAKE_SECONDS", 0.1)
    monkeypatch.setattr(kv, "AGGREGATE_DELAY", 0.2)
    engine = Teller()
    hub = kv.Hub(engine, Settings(panel_scope=scope))  # type: ignore[arg-type]
    hub.start()
    subscribe = engine.subscribe
    monkeypatch.setattr(
        engine, "subscribe", lambda listener: asyncio.get_running_loop().call_later(0.4, subscribe, listener)
    )
    await hub.wake()
    assert hub.snapshot(STRANGER)["num_blocks"]
    hub.stop()


async def test_who_waits_when_the_server_stops_is_told(monkeypatch: pytest.MonkeyPatch):
    engine = Teller()
    monkeypatch.setattr(engine, "subscribe", lambda listener: None)
    hub = kv.Hub(engine, Settings())  # type: ignore[arg-type]
    hub.start()
    asyncio.get_running_loop().call_later(0.1, hub.stop)
    with pytest.raises(Unavailable, match="Ready; please try again"):
        await asyncio.wait_for(hub.wake(), 5)


async def test_glances_share_one_look():
    engine = Teller()
    hub = kv.Hub(engine, Settings())  # type: ignore[arg-type]
    hub.start()
    looks: list[Any] = []
    subscribe = engine.subscribe
    engine.subscribe = lambda listener: (looks.append(listener), subscribe(listener))  # type: ignore[method-assign]
    await asyncio.gather(hub.glance(), hub.glance(), hub.glance())
    assert len(looks) == 1
    await hub.wake()
    assert await hub.glance() is hub.mirror.snapshot  # type: ignore[union-attr]
    assert len(looks) == 2
    hub.stop()
