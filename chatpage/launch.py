"""From settings to a server that answers: `ChatPage("path").launch()`."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn

from chatpage.engine import Engine
from chatpage.errors import SettingError
from chatpage.settings import Settings
from chatpage.web.app import create_app

DRAIN_SECONDS = 1.0  # for open responses to end by themselves when the server stops
CANCEL_SECONDS = 2  # after which uvicorn cancels whatever is left
POLL_SECONDS = 0.1


class ChatPage:
    """A chat page for one model.

    Args:
        model: folder or Hugging Face Hub id; None is the bundled model.
        settings: every field of `Settings` as a keyword.

    Raises:
        SettingError: a setting is wrong.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **settings: Any) -> None:
        if model is not None:
            settings["model"] = model
        self.settings = Settings(**settings)

    def launch(self) -> None:
        """Serve the page until the process is told to stop.

        Raises:
            ChatPageError: the port, the model or a setting cannot be used.
        """
        self.settings.require_possible()
        launch(self.settings)


def launch(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. The port is taken before any work is done, and the page answers while the model
    loads.

    Raises:
        ChatPageError: the port, the model or a setting cannot be used.
    """
    with bind(settings.host, settings.port) as listener:
        engine = Engine(settings)
        app = create_app(engine, settings)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_level="warning",
            access_log=False,  # Gradio's addresses hold session hashes, which open things
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=CANCEL_SECONDS,
        )
        server = _Server(config, engine, url_of(settings.host, listener.getsockname()[1]))
        with _quiet_end():
            server.run(sockets=[listener])
    if server.failed:
        engine.wait_ready()


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there, so that no other program can take the port while the model loads.

    Raises:
        SettingError: the address is not ours, or the port is taken or forbidden.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except socket.gaierror:
        listener.close()
        raise SettingError(f"--host is {host!r}; it must be an address of this machine.") from None
    except OSError as error:
        listener.close()
        raise SettingError(_why_not_bound(host, port, error)) from None
    return listener


def url_of(host: str, port: int) -> str:
    """The address to type into a browser on this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def _why_not_bound(host: str, port: int, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return f"--port is {port}; this user may not listen on it, so choose one from 1024 to 65535."
    if isinstance(error, OSError) and "address already in use" in str(error).lower():
        return f"--port is {port}; another program listens on {host}:{port} already, so stop it or choose another port."
    return f"--host is {host!r} and --port {port}; this machine cannot listen there: {error.strerror}."


class _Server(uvicorn.Server):
    """uvicorn, which also says how start-up goes, and ends in time with streams open."""

    def __init__(self, config: uvicorn.Config, engine: Engine, url: str) -> None:
        super().__init__(config)
        self.engine = engine
        self.url = url
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            _say(f"ChatPage is on {self.url}")
            self._watch = asyncio.create_task(self._watch_engine())

    async def _watch_engine(self) -> None:
        """Say what the engine does until it is ready. End the server where it cannot start."""
        said = ""
        while self.engine.status == "starting":
            if self.engine.detail != said:
                said = self.engine.detail
                _say(f"{said} …")
            await asyncio.sleep(POLL_SECONDS)
        if self.engine.status == "failed":
            self.failed = self.should_exit = True
        elif self.engine.status == "ready":
            for line in self._ready_lines():
                _say(line)

    def _ready_lines(self) -> list[str]:
        engine = self.engine
        slots = engine.num_blocks * engine.block_size
        return [
            f"{engine.model_name} is ready on {engine.device} in {engine.dtype}: "
            f"{engine.num_blocks} blocks of {engine.block_size} slots, {slots} tokens in all",
            *engine.notes,
        ]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers first: their streams then close by themselves, and only idle connections are left."""
        stopping = asyncio.create_task(asyncio.to_thread(self.engine.stop, DRAIN_SECONDS))
        hanging_up = asyncio.create_task(self._hang_up())
        await super().shutdown(sockets=sockets)
        hanging_up.cancel()
        await stopping

    async def _hang_up(self) -> None:
        """Close what is still open after a while: the page's heartbeats, which never end by themselves."""
        await asyncio.sleep(DRAIN_SECONDS)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked twice: at once
            os._exit(128 + sig)
        super().handle_exit(sig, frame)


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Return normally after SIGINT and SIGTERM, which uvicorn raises anew once it has served."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, flush=True)
