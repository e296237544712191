"""A real uvicorn server in a thread, on a free port: what an in-process transport hides (disconnects) is real here."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from chatpage.launch import bind, url_of
from chatpage.settings import Settings
from chatpage.web.app import create_app


@contextmanager
def serve(engine: Any, settings: Settings) -> Iterator[str]:
    """Serve until the block ends. Gives the address."""
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(engine, settings, page=False), log_level="error", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield url_of("127.0.0.1", listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not end"


def wait_until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
