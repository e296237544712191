"""`/kv`: the block pool as it changes, for the panel.

The engine tells the hub what happened after each step. The hub moves its mirror on by that, some tens of times a
second, and hands the same bytes to all viewers who may see the same. All but the listeners runs on the event loop.

While nobody looks the hub sleeps: to follow each token of each session would take the loop as long as to send it.
"""

import asyncio
import json
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatpage.engine import Engine
from chatpage.errors import Unavailable
from chatpage.events import Event, Snapshot
from chatpage.settings import Settings
from chatpage.web.errors import Refusal
from chatpage.web.limits import MAX_VIEWERS
from chatpage.web.openai import bearer
from chatpage.web.view import STRANGER, Line, Mirror, aggregate, epoch_of, only_own

FLUSH_SECONDS = 0.05
SELF_SECONDS = 0.25  # between snapshots in the scope `self`
AGGREGATE_DELAY = 0.5  # seconds that everything is late where others are shown in whole blocks
KEPT_LINES = 20_000  # to resume from
BACKLOG = 64  # messages that a viewer may leave unread
ME_PER_SECOND = 4
ME_TOKENS = 4096  # view tokens whose use is remembered
PING_SECONDS = 15
STOP_SECONDS = 1  # for a stream to end by itself when the server stops
AWAKE_SECONDS = 10  # that the hub stays awake after the last look
WAKE_SECONDS = 30  # that a long step may keep the engine from answering
GLANCE_SECONDS = 2  # the same, for who would rather go without an answer


class Viewer:
    """One open `/kv/events`. `session` is the pseudonym of its own session, or STRANGER."""

    def __init__(self, session: int, first: list[bytes]) -> None:
        self.session = session
        self.stale = False
        self.closed = False
        self._messages: deque[bytes] = deque(first)
        self._more = asyncio.Event()

    def put(self, message: bytes, *, replace: bool = False) -> None:
        """Add a message. With a full backlog everything unread is dropped: a snapshot has to follow."""
        if replace:
            self._messages.clear()
        if len(self._messages) >= BACKLOG:
            self._messages.clear()
            self.stale = True
        if not self.stale:
            self._messages.append(message)
        self._more.set()

    async def close_when(self, stopping: anyio.Event) -> None:
        await stopping.wait()
        self.closed = True
        self._more.set()

    async def wait(self) -> list[bytes]:
        """The messages that have come since the last call; none where the viewer has become stale or closed."""
        while not (self._messages or self.stale or self.closed):
            self._more.clear()
            await self._more.wait()
        messages = list(self._messages)
        self._messages.clear()
        return messages


class Hub:
    """The engine's state on the event loop, and who watches it.

    `mirror` is None while the hub sleeps, or wakes. In the scope `aggregate` it lags behind by AGGREGATE_DELAY.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.scope = settings.resolved_scope
        self.mirror: Mirror | None = None
        self.viewers: set[Viewer] = set()
        self.delay = AGGREGATE_DELAY if self.scope == "aggregate" else 0.0
        self.interval = SELF_SECONDS if self.scope == "self" else FLUSH_SECONDS
        self._arrived: deque[tuple[float, list[Event]]] = deque()
        self._lines: deque[Line] = deque(maxlen=KEPT_LINES)
        self._timer: asyncio.TimerHandle | None = None
        self._flushed = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waking: asyncio.Future[None] | None = None  # done when the mirror may be looked at
        self._looked = 0.0
        self._glanced: asyncio.Future[Snapshot] | None = None  # of the last glance

    def start(self) -> None:
        """Call it on the event loop, before anything else."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        self._sleep()
        self._loop = None

    async def wake(self) -> None:
        """Follow the engine from now on, for a while. Returns when there is a mirror to look at.

        Raises:
            Unavailable: the engine is not ready, or busy.
        """
        if self.engine.status != "ready" or self._loop is None:
            raise Unavailable(f"{self.engine.detail}; please try again in a moment.")
        self._looked = time.monotonic()
        if self._waking is None:
            self._waking = self._loop.create_future()
            self.engine.subscribe(self._listen)
            self._loop.call_later(AWAKE_SECONDS, self._sleep_unless_looked_at)
        try:
            await asyncio.wait_for(asyncio.shield(self._waking), WAKE_SECONDS)
        except TimeoutError:
            raise Unavailable("The engine is busy with a long step; please try again in a moment.") from None

    def _sleep_unless_looked_at(self) -> None:
        if self._loop is None or self._waking is None:
            return
        if self.viewers or not self._waking.done():
            self._looked = time.monotonic()
        left = self._looked + AWAKE_SECONDS - time.monotonic()
        if left <= 0:
            self._sleep()
        else:
            self._loop.call_later(left, self._sleep_unless_looked_at)

    def _sleep(self) -> None:
        self.engine.unsubscribe(self._listen)
        if self._waking is not None and not self._waking.done():
            self._waking.set_exception(Unavailable(f"{self.engine.detail}; please try again in a moment."))
            self._waking.exception()  # perhaps nobody waits any more
        self.mirror, self._waking = None, None
        self._arrived.clear()
        self._lines.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def glance(self) -> Snapshot | None:
        """The engine's state, to be read at once, without following it; None where it is not ready, or busy."""
        if self.mirror is not None:
            return self.mirror.snapshot
        if self.engine.status != "ready" or self._loop is None:
            return None
        if self._glanced is None or self._glanced.done():
            self._glanced = self._look(self._loop)
        with suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._glanced), GLANCE_SECONDS)
        return None

    def _look(self, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[Snapshot]":
        seen: asyncio.Future[Snapshot] = loop.create_future()

        def listen(snapshot: Snapshot | None, events: list[Event]) -> None:
            if snapshot is not None:
                with suppress(RuntimeError):  # the loop was closed meanwhile
                    loop.call_soon_threadsafe(seen.set_result, snapshot)

        self.engine.subscribe(listen)
        self.engine.unsubscribe(listen)
        return seen

    def _listen(self, snapshot: Snapshot | None, events: list[Event]) -> None:
        """Called on the engine's thread."""
        loop = self._loop
        if loop is not None and (snapshot is not None or events):
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._receive, snapshot, list(events))

    def _receive(self, snapshot: Snapshot | None, events: list[Event]) -> None:
        if snapshot is not None:
            self._begin(snapshot)
        if events and self.mirror is not None:  # else they came when the hub had just gone to sleep
            self._arrived.append((time.monotonic(), events))
        self._plan()

    def _begin(self, snapshot: Snapshot) -> None:
        """Have a mirror, which may be looked at when it is as late as everything else is."""
        if self._loop is None or self._waking is None:
            return
        if self.scope != "full":  # its numbers begin anew, so they must not be taken for those of the mirror before
            snapshot.epoch = secrets.token_hex(4)
        self._arrived.clear()  # what a subscription before this one told
        self.mirror = Mirror(snapshot)
        self._loop.call_later(self.delay, self._be_awake, self._waking)

    def _be_awake(self, waking: "asyncio.Future[None]") -> None:
        self._looked = time.monotonic()  # who waits has not looked yet
        if not waking.done():
            waking.set_result(None)

    def _plan(self) -> None:
        """Arrange the next flush: when the oldest events are due, and not too soon after the last one."""
        if self._arrived and self._timer is None and self._loop is not None:
            due = max(self._arrived[0][0] + self.delay, self._flushed + self.interval)
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._flush)

    def _flush(self) -> None:
        """Move the mirror on by what is due, and tell the viewers."""
        self._timer, self._flushed = None, time.monotonic()
        assert self.mirror is not None
        before = {viewer.session: self.number(viewer.session) for viewer in self.viewers}
        lines: list[Line] = []
        while self._arrived and self._arrived[0][0] <= self._flushed - self.delay:
            lines += [self.mirror.apply(event) for event in self._arrived.popleft()[1]]
        self._lines.extend(lines)
        messages = {session: self._message(session, first, lines) for session, first in before.items()}
        for viewer in self.viewers:
            message = messages[viewer.session]
            if message is not None:
                viewer.put(message, replace=self.scope == "self")
        self._forget_the_gone(lines)
        self._plan()

    def _message(self, session: int, after: int, lines: list[Line]) -> bytes | None:
        if self.scope == "self":
            return self.snapshot_message(session)
        return self.delta_message(session, after, self._seen(session, lines))

    def _forget_the_gone(self, lines: list[Line]) -> None:
        assert self.mirror is not None
        watched = {viewer.session for viewer in self.viewers}
        ended = {line.owner for line in lines if line.exact.kind == "end"}
        for session in ended - watched - self.mirror.snapshot.sessions.keys():
            self.mirror.forget(session)

    # -- what a viewer sees ---------------------------------------------------------------------------------------

    def number(self, session: int) -> int:
        """The number of the last event that this viewer has seen."""
        assert self.mirror is not None
        return self.mirror.snapshot.seq if self.scope == "full" else self.mirror.number(session)

    def _seen(self, session: int, lines: Iterable[Line]) -> list[Event]:
        if self.scope == "full":
            return [line.exact for line in lines]
        return [event for line in lines if (event := line.seen_by(session)) is not None]

    def snapshot(self, session: int) -> dict[str, Any]:
        """The body of `/kv/snapshot`. The hub must be awake."""
        mirror, sharing = self.mirror, self.engine.sharing
        assert mirror is not None
        if self.scope == "self":
            return only_own(mirror, session, sharing)
        seen = aggregate(mirror, session) if self.scope == "aggregate" else mirror.snapshot
        return seen.to_json(scope=self.scope, sharing=sharing)

    def snapshot_message(self, session: int) -> bytes:
        body = self.snapshot(session)
        return sse_event("snapshot", f"{body['epoch']}-{body['seq']}", to_json(body))

    def delta_message(self, session: int, after: int, events: list[Event]) -> bytes | None:
        """Events as the viewer's numbers `after` + 1 and on. None where there is nothing to see."""
        if not events:
            return None
        last = after + len(events)
        numbered = ",".join(f'{{"seq":{number},{_fields(event)}' for number, event in enumerate(events, after + 1))
        data = f'{{"seq":[{after + 1},{last}],"time":{time.time():.3f},"events":[{numbered}]}}'
        return sse_event("delta", f"{self.epoch(session)}-{last}", data)

    def epoch(self, session: int) -> str:
        assert self.mirror is not None
        epoch = self.mirror.snapshot.epoch
        return epoch if self.scope == "full" else epoch_of(epoch, session)

    def missed(self, session: int, last_id: str) -> list[Event] | None:
        """What a viewer has missed since the event with this id, or None where that cannot be told any more."""
        epoch, _, number = last_id.rpartition("-")
        if self.scope == "self" or epoch != self.epoch(session) or not number.isdecimal() or len(number) > 18:
            return None
        count = self.number(session) - int(number)
        events: list[Event] = []
        for line in reversed(self._lines):
            if len(events) >= count:
                break
            events += self._seen(session, [line])
        return events[::-1] if len(events) == count else None

    # -- viewers --------------------------------------------------------------------------------------------------

    async def watch(self, session: int, last_id: str, stopping: anyio.Event) -> AsyncIterator[bytes]:
        """Everything that one viewer gets: a snapshot, or what it has missed, then deltas until it leaves."""
        viewer = Viewer(session, self._first(session, last_id))
        self.viewers.add(viewer)
        closing = asyncio.create_task(viewer.close_when(stopping))
        try:
            while not viewer.closed:
                for message in await viewer.wait():
                    yield message
                if viewer.stale:
                    snapshot = self.snapshot_message(session)  # before `yield`: later deltas must fit to it
                    viewer.stale = False
                    yield sse_event("resync", None, "{}")
                    yield snapshot
        finally:
            closing.cancel()
            self.viewers.discard(viewer)

    def _first(self, session: int, last_id: str) -> list[bytes]:
        missed = self.missed(session, last_id)
        if missed is None:
            return [self.snapshot_message(session)]
        delta = self.delta_message(session, self.number(session) - len(missed), missed)
        return [] if delta is None else [delta]


class Routes:
    """The routes below /kv."""

    def __init__(self, engine: Engine, hub: Hub) -> None:
        self.engine = engine
        self.hub = hub
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()

    def routes(self) -> list[Route]:
        if self.hub.scope == "off":
            return []
        return [
            Route("/snapshot", self.snapshot, methods=["GET"]),
            Route("/events", self.events, methods=["GET"]),
            Route("/me", self.me, methods=["GET"]),
        ]

    async def snapshot(self, request: Request) -> Response:
        session = await self._session(request)
        await self.hub.wake()
        body = self.hub.snapshot(session)
        return JSONResponse(body, headers={"Cache-Control": "no-store"})

    async def events(self, request: Request) -> Response:
        session = await self._session(request)
        await self.hub.wake()
        if len(self.hub.viewers) >= MAX_VIEWERS:
            raise Refusal(503, f"{MAX_VIEWERS} viewers are watching, and no more are allowed.", code="too_many_viewers")
        stopping = anyio.Event()
        return EventSourceResponse(
            self.hub.watch(session, request.headers.get("last-event-id", ""), stopping),
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            shutdown_event=stopping,
            shutdown_grace_period=STOP_SECONDS,
        )

    async def me(self, request: Request) -> Response:
        token = bearer(request)
        if not token:
            raise Refusal(401, "Send the view token as Authorization: Bearer.", code="invalid_view_token")
        self._count(token)
        return JSONResponse(await self._describe(token), headers={"Cache-Control": "no-store"})

    async def _session(self, request: Request) -> int:
        """The pseudonym of the viewer's own session. STRANGER where it has none, or everybody sees the same."""
        token = bearer(request)
        if not token or self.hub.scope == "full":
            return STRANGER
        return (await self._describe(token))["session"]

    async def _describe(self, token: str) -> dict[str, Any]:
        try:
            described = await asyncio.to_thread(self.engine.describe, token)
        except TimeoutError:
            raise Unavailable("The engine is busy with a long step; please try again in a moment.") from None
        if described is None:
            raise Refusal(401, "The view token is not known here.", code="invalid_view_token")
        return described

    def _count(self, token: str) -> None:
        """Refuse what goes beyond ME_PER_SECOND reads with one view token."""
        now = time.monotonic()
        asked = self._asked.setdefault(token, deque(maxlen=ME_PER_SECOND))
        self._asked.move_to_end(token)
        if len(self._asked) > ME_TOKENS:
            self._asked.popitem(last=False)
        if len(asked) == ME_PER_SECOND and now - asked[0] < 1.0:
            raise Refusal(
                429,
                f"At most {ME_PER_SECOND} reads a second are allowed.",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )
        asked.append(now)


def sse_event(name: str, event_id: str | None, data: str) -> bytes:
    """One server-sent event; `data` is JSON on one line."""
    head = f"id: {event_id}\n" if event_id is not None else ""
    return f"{head}event: {name}\ndata: {data}\n\n".encode()


def to_json(body: Any) -> str:
    return json.dumps(body, separators=(",", ":"))


@lru_cache(maxsize=4096)
def _fields(event: Event) -> str:
    """An event's fields but its number, as JSON without the opening brace. Viewers differ in the number alone."""
    body = event.to_json()
    del body["seq"]
    return to_json(body)[1:]
