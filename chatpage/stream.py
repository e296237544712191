"""One request's deltas, on their way from the engine's thread to whoever reads them."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

from chatpage.schedule.request import Delta

log = logging.getLogger(__name__)

MOST_PENDING = 16  # deltas that nobody has fetched; more are merged, since many small objects cost the collector time


class Stream(AsyncIterator[Delta]):
    """Deltas of one request, for one reader: `async for` on an event loop, or `for` on a thread.

    Nothing is lost: a slow reader fetches all that came meanwhile as one delta. The last delta has the state `done`,
    and comes however the request ends. The listener gets every delta, read or not, on the engine's thread.
    """

    def __init__(self, cancel: Callable[[], object], listener: Callable[[Delta], None] | None = None) -> None:
        self._cancel = cancel
        self._listener = listener
        self._lock = threading.Condition()
        self._pending: list[Delta] = []
        self._finished = False
        self._read_all = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()

    def cancel(self) -> None:
        """End the request. Harmless at any time, from any thread; the `done` delta still comes."""
        if not self._finished:
            self._cancel()

    # -- the engine's side ----------------------------------------------------------------------------------------

    def put(self, delta: Delta) -> None:
        """Add a delta. An async reader is not woken by this: see `wake`."""
        if self._listener:
            try:
                self._listener(delta)
            except Exception:  # a mistake of one reader's keeps no other waiting
                log.exception("A stream's listener failed")
        with self._lock:
            self._pending.append(delta)
            if len(self._pending) == MOST_PENDING:
                self._pending = [Delta.merged(self._pending)]
            self._finished = delta.state == "done"
            self._lock.notify_all()

    @staticmethod
    def wake(streams: Iterable["Stream"]) -> None:
        """Tell the async readers of these streams, with one call an event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
        for stream in streams:
            if stream._loop is not None:
                by_loop.setdefault(stream._loop, []).append(stream)
        for loop, ready in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody reads any more
                loop.call_soon_threadsafe(_set_ready, ready)

    # -- the reader's side ----------------------------------------------------------------------------------------

    def _take(self) -> list[Delta]:
        deltas, self._pending = self._pending, []
        self._read_all = bool(deltas) and deltas[-1].state == "done"
        return deltas

    async def __anext__(self) -> Delta:
        self._loop = asyncio.get_running_loop()
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
                self._lock.wait_for(lambda: self._pending)
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


def _set_ready(streams: list[Stream]) -> None:
    for stream in streams:
        stream._ready.set()
