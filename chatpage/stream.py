"""One request's deltas, on their way from the engine's thread to whoever reads them."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from typing import ClassVar
from weakref import WeakValueDictionary

from chatpage.schedule.request import Delta

log = logging.getLogger(__name__)

MOST_PENDING = 16  # deltas that nobody has fetched; more are merged, since many small objects cost the collector time
FEW = 8  # readers, after whom an event loop need not rest: each gets every token alone
WAKES_A_SECOND = 6400  # of more readers; each costs time in which the engine cannot run Python
LONGEST_REST = 0.04  # seconds; nobody sees in which pieces text comes that fast


class Stream(AsyncIterator[Delta]):
    """Deltas of one request, for one reader: `async for` on an event loop, or `for` on a thread.

    Nothing is lost: a slow reader fetches all that came meanwhile as one delta, and so do those of a crowd, who are
    woken in rounds (see `Bell`). The last delta has the state `done`, and comes however the request ends.

    Args:
        cancel: ends the request.
        listener: gets every delta, read or not, on the engine's thread.
        ended: is called there too, before anybody hears the last delta.
    """

    def __init__(
        self,
        cancel: Callable[[], object],
        listener: Callable[[Delta], None] | None = None,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._cancel = cancel
        self._listener = listener
        self._ended = ended
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)  # for a reader on a thread
        self._pending: list[Delta] = []
        self._finished = False
        self._read_all = False
        self._has_begun = False  # a token has come
        self._is_awaited = False  # by a reader on a thread
        self._bell: Bell | None = None
        self.is_urgent = False
        self._ready = asyncio.Event()

    def cancel(self) -> None:
        """End the request. Harmless at any time, from any thread; the `done` delta still comes."""
        if not self._finished:
            self._cancel()

    # -- the engine's side ----------------------------------------------------------------------------------------

    def put(self, delta: Delta) -> None:
        """Add a delta. An async reader is not woken by this: see `wake`."""
        is_last = delta.state == "done"
        if is_last:
            self._ended()
        if self._listener:
            try:
                self._listener(delta)
            except Exception:  # a mistake of one reader's keeps no other waiting
                log.exception("A stream's listener failed")
        with self._lock:
            self._pending.append(delta)
            if len(self._pending) == MOST_PENDING:
                self._pending = [Delta.merged(self._pending)]
            if is_last or (delta.tokens and not self._has_begun):
                self._finished, self._has_begun, self.is_urgent = is_last, True, True
            if self._is_awaited:
                self._more.notify_all()

    @staticmethod
    def wake(streams: Collection["Stream"]) -> None:
        """Tell the async readers of these streams that there is something to read: at once, or in the next round."""
        for bell in {stream._bell for stream in streams}:
            if bell is not None:
                bell.ring([stream for stream in streams if stream._bell is bell])

    # -- the reader's side ----------------------------------------------------------------------------------------

    def _take(self) -> list[Delta]:
        deltas, self._pending = self._pending, []
        self._read_all = bool(deltas) and deltas[-1].state == "done"
        return deltas

    async def __anext__(self) -> Delta:
        self._bell = Bell.of(asyncio.get_running_loop())
        while not self._read_all:
            self._ready.clear()
            with self._lock:
                deltas = self._take()
            if deltas:
                return Delta.merged(deltas)
            await self._ready.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Delta]:
        while not self._read_all:
            with self._lock:
                self._is_awaited = True
                self._more.wait_for(lambda: self._pending)
                self._is_awaited = False
                deltas = self._take()
            yield Delta.merged(deltas)


async def side_by_side(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several streams as they come, each with the index of its stream."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    awaited = {asyncio.ensure_future(anext(stream)): index for index, stream in enumerate(streams)}
    try:
        while awaited:
            come, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            for task in come:
                index = awaited.pop(task)
                with contextlib.suppress(StopAsyncIteration):
                    yield index, task.result()
                    awaited[asyncio.ensure_future(anext(streams[index]))] = index
    finally:
        for task in awaited:
            task.cancel()


class Bell:
    """Wakes the readers of one event loop, in rounds.

    What a reader does with a piece of text, down to the socket, takes longer than the engine's thread takes for a
    token, and only one thread can run Python at a time. So many readers who fetch every token at once would leave the
    engine too little of that time. Therefore the loop rests after a round, the longer the more readers it woke; in the
    next round each finds several tokens. Who waits for a first token or for the end is woken at once.
    """

    _all: ClassVar["WeakValueDictionary[asyncio.AbstractEventLoop, Bell]"] = WeakValueDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._waiting: set[Stream] = set()
        self._is_planned = False  # a round

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "Bell":
        bell = cls._all.get(loop)
        if bell is None:
            bell = cls._all[loop] = cls(loop)
        return bell

    def ring(self, streams: list[Stream]) -> None:
        """There is something to read for these. Called on the engine's thread."""
        urgent = [stream for stream in streams if stream.is_urgent]
        for stream in urgent:
            stream.is_urgent = False
        with self._lock:
            rests, self._is_planned = self._is_planned, True
            self._waiting.update(streams)
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
            if not rests:
                self._loop.call_soon_threadsafe(self._round)
            elif urgent:
                self._loop.call_soon_threadsafe(_set_ready, urgent)

    def _round(self) -> None:
        with self._lock:
            ready, self._waiting = self._waiting, set()
            rests = self._is_planned = len(ready) > FEW
        _set_ready(ready)
        if rests:
            self._loop.call_later(min(len(ready) / WAKES_A_SECOND, LONGEST_REST), self._round)


def _set_ready(streams: Iterable[Stream]) -> None:
    for stream in streams:
        stream._ready.set()
