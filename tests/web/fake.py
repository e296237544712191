"""An engine without a model, whose requests go on only when a test says so."""

import threading
from collections.abc import Callable
from typing import Any

from chatpage.engine import OpenSession
from chatpage.events import EventLog, Snapshot
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.stream import Stream
from tests.web.server import wait_until


class FakeEngine:
    """What the web relies on. `requests` are the ones that came; `say` sends one of their replies a delta."""

    def __init__(self) -> None:
        self.status = "ready"
        self.detail = "Ready"
        self.model_name = "fake"
        self.sharing = "all"
        self.systems: list[Any] = []
        self.requests: list[Request] = []
        self.made: list[Stream] = []
        self.cancelled: set[int] = set()
        self.refusal: Exception | None = None
        self.keys: set[str] = set()
        self.closed: list[str] = []
        self.has_work = False
        self.idle_seconds = 0.0
        self.events = EventLog()
        self.snapshot = Snapshot.empty(self.events, block_size=4, num_blocks=8)

    def start(self) -> None: ...

    def stop(self, timeout: float = 3.0) -> None: ...

    def prompt(self, messages: list[dict[str, str]]) -> Prompt:
        return Prompt(tuple(range(len(messages[-1]["content"]))))

    def open_session(self) -> OpenSession:
        key = f"key-{len(self.keys) + 1}"
        self.keys.add(key)
        return OpenSession(key, f"view-{key}", len(self.keys))

    def close_session(self, key: str) -> None:
        self.keys.discard(key)
        self.closed.append(key)

    def has_session(self, key: str) -> bool:
        return key in self.keys

    def streams(self, request: Request, listeners: list[None]) -> list[Stream]:
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        return [self._stream() for _ in listeners]

    def _stream(self) -> Stream:
        number = len(self.made)

        def cancel() -> None:
            self.cancelled.add(number)
            self.say(number, Delta("done", finish_reason="abort"))

        self.made.append(Stream(cancel))
        return self.made[-1]

    def say(self, number: int, delta: Delta) -> None:
        self.made[number].put(delta)
        Stream.wake([self.made[number]])

    def say_when_asked(self, number: int, delta: Delta) -> None:
        """Say it from another thread, as soon as somebody asks for that stream."""

        def wait_and_say() -> None:
            wait_until(lambda: len(self.made) > number)
            self.say(number, delta)

        threading.Thread(target=wait_and_say).start()

    def subscribe(self, listener: Callable[..., None]) -> None:
        listener(self.snapshot, [])

    def unsubscribe(self, listener: Callable[..., None]) -> None: ...

    def describe(self, view_token: str) -> dict[str, Any] | None:
        key = view_token.removeprefix("view-")
        return {"session": 1, "sequences": []} if key in self.keys else None

    def stats(self) -> dict[str, float]:
        return {"has_work": self.has_work, "seconds_since_progress": self.idle_seconds}
