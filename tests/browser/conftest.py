"""A real Chromium, and servers for it to look at."""

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Dialog,
    Error,
    Request,
    TimeoutError,
    sync_playwright,
)

from chatpage import tutor
from chatpage.engine import Engine
from chatpage.settings import Settings
from chatpage.web.app import create_app
from tests.checkpoints import make

STEP = 0.03  # seconds that a slowed step takes at least
TIMEOUT = 20_000  # ms; much more than anything takes on a machine that has nothing else to do
# What was written has gone, or a toast says why not; a blank message is not heard at all.
IS_HEARD = """text => !text.trim() || document.querySelector('#message textarea')?.value !== text
    || document.querySelector('.toast-body') !== null"""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-features=LocalNetworkAccessChecks",  # a test frames this machine's page in one of another origin
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of the page that waited in vain runs once more: Gradio loses an event now and then (`Visitor.send`)."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=["TimeoutError"]))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser a module: while it runs it holds this thread's event loop, which other tests need."""
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        except Error as error:
            reason = f"no Chromium to test the page with: {error.message.splitlines()[0]}"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    """Where visitors open their tabs, unless they want a browser of their own: Gradio's scripts are loaded once."""
    context = new_context(browser)
    yield context
    context.close()


def new_context(browser: Browser, **options: Any) -> BrowserContext:
    return browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})


class Visitor:
    """A tab that shows the page, and what should not have happened in it."""

    def __init__(self, context: BrowserContext, url: str, *, ready: bool = True) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", self._on_request)
        self.page.on("dialog", self._on_dialog)
        self.page.goto(url)
        if ready:
            self.page.wait_for_function("window.chatpageViewer")

    def _on_dialog(self, dialog: Dialog) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(f"console: {message.text}")

    def _on_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme.startswith("http") and address.netloc != urlsplit(self.url).netloc:
            self.complaints.append(f"another host: {request.url}")

    # -- what a visitor does --------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        self.page.locator("#message textarea").fill(text)

    def send(self, text: str) -> None:
        """Press Enter, and once more if nothing comes of it.

        Gradio loses an event that is asked for in the very moment in which the stream of the one before ends. The text
        stays where it is then, and a visitor would press again.
        """
        self.write(text)
        self.page.locator("#message textarea").press("Enter")
        try:
            self.page.wait_for_function(IS_HEARD, arg=text, timeout=TIMEOUT / 2)
        except TimeoutError:
            self.page.locator("#message textarea").press("Enter")

    def ask(self, text: str) -> str:
        """Send, and wait for the end of the answer."""
        return self.answered(lambda: self.send(text))

    def answered(self, act: Callable[[], object]) -> str:
        """Do what makes the model answer, and wait for the end of that answer."""
        self.page.locator("#status p").evaluate("line => line.classList.add('before')")
        act()
        self.page.locator("#status p:not(.before)").wait_for()
        self.wait_idle()
        return self.answer()

    def wait_idle(self) -> None:
        self.page.locator("#message .submit-button").wait_for()

    def answer(self) -> str:
        return self.page.get_by_test_id("bot").last.inner_text()

    def status(self) -> str:
        return self.page.locator("#status p").inner_text()

    def toast(self) -> str:
        """The sentence of the newest toast."""
        return self.page.locator(".toast-body").last.inner_text()


@pytest.fixture
def visit(browser: Browser, context: BrowserContext) -> Iterator[Callable[..., Visitor]]:
    """Opens the page as a new visitor; at the end nobody may have seen an error or reached another host.

    `visit(url)` opens a tab, `visit(url, own={…})` a browser with these options.
    """
    visitors: list[Visitor] = []
    own_contexts: list[BrowserContext] = []

    def visit(url: str, *, ready: bool = True, own: dict[str, Any] | None = None) -> Visitor:
        if own is not None:
            own_contexts.append(new_context(browser, **own))
        visitors.append(Visitor(context if own is None else own_contexts[-1], url, ready=ready))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.page.close()
    for own_context in own_contexts:
        own_context.close()
    assert [visitor.complaints for visitor in visitors] == [[] for _ in visitors]


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """The application on a free port of this machine, for as long as the block lasts: its address."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def wait_until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    """Look every 10 ms until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"did not happen within {seconds} s")
        time.sleep(0.01)


# -- the whole product -------------------------------------------------------------------------------------------------


class Site:
    """A server with its engine, and what its block pool looks like from outside."""

    def __init__(self, url: str, engine: Engine) -> None:
        self.url = url
        self.engine = engine

    def snapshot(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/kv/snapshot").raise_for_status().json()

    def own(self, visitor: Visitor) -> dict[str, Any] | None:
        """The visitor's session in the snapshot."""
        number = visitor.page.evaluate("window.chatpageViewer.session")
        return next((session for session in self.snapshot()["sessions"] if session["id"] == number), None)

    def context(self, visitor: Visitor) -> str:
        """The text whose keys and values the visitor's session holds: what its next turn goes on from."""
        described = self.engine.describe(visitor.page.evaluate("window.chatpageViewer.token"))
        return "".join(token["text"] for sequence in described["sequences"] for token in sequence["tokens"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """None, which is the bundled tutor; a random checkpoint where it was not trained yet."""
    if (tutor.path() / "model.safetensors").is_file():
        return None
    return str(make("llama", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def site(model: str | None) -> Iterator[Site]:
    settings = Settings(
        model=model, kv_blocks=256, sharing="system", panel_scope="full", max_output_tokens=48, paranoid=True
    )
    engine = Engine(settings)
    with served(create_app(engine, settings)) as url:
        engine.wait_ready(60)
        yield Site(url, engine)


@pytest.fixture
def slow(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps long enough to see an answer grow."""
    launch = site.engine.core.runner.launch
    monkeypatch.setattr(site.engine.core.runner, "launch", lambda rows: (time.sleep(STEP), launch(rows))[1])


@pytest.fixture
def arrive(site: Site, visit: Callable[..., Visitor]) -> Callable[..., Visitor]:
    """A new visitor, with the page ready and the panel live."""

    def arrive(**options) -> Visitor:
        visitor = visit(site.url, **options)
        visitor.page.locator("[data-testid=kv-status][data-state=live]").wait_for()
        return visitor

    return arrive
