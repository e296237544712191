"""The chat page: a hand-wired `gr.Blocks` in which every browser tab has a `Conversation`, or several that were forked.

Gradio shows, the conversations on the server are the truth. Stop is cooperative: the button tells the conversation to
stop, the running handler sees the stream end and finishes as usual (Gradio's own `cancels=` leaves overlays behind).
"""

import asyncio
import contextlib
import html
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatpage.conversation import Conversation, Exchange
from chatpage.engine import Engine, Stream
from chatpage.errors import ChatPageError, RequestError
from chatpage.schedule.request import Delta
from chatpage.settings import Settings
from chatpage.web import page_replies, page_tutor
from chatpage.web.page_settings import CUSTOM, PageSettings, presets
from chatpage.web.page_text import Progress, drawn, plain
from chatpage.web.page_theme import theme
from chatpage.web.visitors import Chat, Tab, Visitors

UPDATE_INTERVAL = 0.04  # seconds between two updates of a streaming answer
POLL_INTERVAL = 0.2  # seconds between two looks at an engine that loads
CHOICE_SECONDS = 2.0  # in which the engine has certainly ended the replies that were not chosen
RELOAD_SECONDS = 2.0  # in which a page that is loaded again has certainly been closed before

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
SHARING = {
    "all": "equal text is shared by all sessions",
    "system": "the system prompt is shared, messages are private",
    "off": "nothing is shared between sessions",
}
BUTTONS_JS = Path(__file__).with_name("page.js").read_text()
BEAMS_JS = Path(__file__).with_name("page_beams.js").read_text()
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'"
KEYS = "<kbd>Enter</kbd> sends · <kbd>Shift</kbd> <kbd>Enter</kbd> starts a line · <kbd>Esc</kbd> stops"

# The address the application is mounted under; behind a proxy it differs from the server's own root.
PANEL_JS = """
const root = window.gradio_config?.root || '';
const base = new URL(root || '.', document.baseURI).pathname.replace(/\\/$/, '');
import(base + '/panel/panel.js').then(panel => panel.mount(element.querySelector('.kv-root')));
"""
# A tab's own storage survives loading the page again. A browser may refuse it, in a frame above all.
VIEWER_JS = """
({secret, ...viewer}) => {
    try { sessionStorage.setItem('chatpage', secret) } catch {}
    window.chatpageViewer = viewer;
    window.dispatchEvent(new CustomEvent('chatpage:viewer'));
}
"""
ARRIVAL_JS = """
() => {
    try { return {secret: sessionStorage.getItem('chatpage')} } catch { return {} }
}
"""
KEYS_JS = """
() => document.addEventListener('keydown', event => {
    if (event.key === 'Escape') document.querySelector('#message button.stop-button')?.click();
})
"""


def examples(settings: Settings) -> list[str]:
    """Questions to begin with."""
    if settings.model is None:
        return page_tutor.examples()
    return [
        "What can you help me with?",
        "Explain virtual memory to a ten-year-old.",
        "Write a haiku about memory.",
        "Name three uses of a hash table.",
    ]


def _placeholder(settings: Settings) -> str:
    """What an empty chat says."""
    welcome = page_tutor.WELCOME if settings.model is None else "### Ask something\n"
    return f"{welcome}Your words take blocks of the pool that is drawn beside this chat."


def build(engine: Engine, settings: Settings) -> gr.Blocks:
    """The page for an engine that need not be ready yet: what depends on the model is filled in when it is."""
    return Page(engine, settings).blocks


def mount_page(app: Starlette, engine: Engine, settings: Settings) -> Starlette:
    """Put the page at "/" of an application that has all its other routes already; Gradio answers whatever is left."""
    gr.mount_gradio_app(
        app,  # pyright: ignore[reportArgumentType]: any Starlette application will do
        build(engine, settings),
        path="/",
        footer_links=["gradio"],
        run_history=False,
        app_kwargs={"middleware": [Middleware(ContentPolicy)]},
        show_error=False,
        max_file_size=0,
        ssr_mode=False,
        theme=theme(),
        css_paths=Path(__file__).with_name("page.css"),
        js=KEYS_JS,
    )
    return app


class ContentPolicy:
    """Tells the browser to fetch nothing from other hosts, whatever an answer tries to draw."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


class Page:
    """The components, and what happens when somebody uses them."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.visitors = Visitors(engine)
        with gr.Blocks(title="ChatPage", analytics_enabled=False, fill_width=True) as self.blocks:
            self._lay_out()
            self._wire()
        self.blocks.queue(default_concurrency_limit=None, api_open=False)

    # -- what is on the page --------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        self.header = gr.HTML(_header_html(self.engine.detail), elem_id="header")
        with gr.Row(elem_id="columns", equal_height=False):
            with gr.Column(elem_id="chat-column", min_width=320):
                self._lay_out_chat()
                self.wishes = PageSettings()
            with gr.Column(elem_id="panel-column", min_width=320):
                gr.HTML(html_template="<div class='kv-root'></div>", js_on_load=PANEL_JS, elem_id="panel")
        self.viewer = gr.JSON(visible="hidden")

    def _lay_out_chat(self) -> None:
        with gr.Column(elem_id="card"):
            self.buttons = gr.HTML(
                _buttons(None),
                html_template="<div></div>",
                js_on_load=BUTTONS_JS,
                apply_default_css=False,
                elem_id="buttons",
            )
            self.chat = gr.Chatbot(
                label="Chat",
                elem_id="chat",
                show_label=False,
                height=560,
                layout="bubble",
                editable="user",
                latex_delimiters=LATEX,
                buttons=["copy", "copy_all"],
                sanitize_html=True,
                allow_tags=False,
                feedback_options=None,
                allow_file_downloads=False,
                placeholder=_placeholder(self.settings),
                examples=[{"text": text} for text in examples(self.settings)],
            )
            # Beams are text that a model wrote: it is no part of the template, which Gradio would run.
            self.beams = gr.HTML(
                {}, html_template="<div></div>", js_on_load=BEAMS_JS, apply_default_css=False, elem_id="beams"
            )
            self.status = gr.HTML(_status_html(self.engine.detail), elem_id="status")
            self.message = gr.Textbox(
                label="Message",
                elem_id="message",
                show_label=False,
                container=False,
                placeholder="Write a message",
                lines=1,
                max_lines=8,
                submit_btn="Send",
                autofocus=True,
            )
        with gr.Row(elem_id="below"):
            self.new = gr.Button("New chat", elem_id="new-chat", size="sm", scale=0, min_width=96)
            gr.HTML(KEYS, elem_id="keys")
        if self.settings.model is None:
            gr.HTML(page_tutor.REAL_MODEL, elem_id="real-model")

    # -- what happens ---------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        # What may be refused goes through the queue: without it a toast does not reach the browser.
        many: dict[str, Any] = {**hidden, "concurrency_limit": None, "trigger_mode": "multiple"}
        wishes: set[Any] = {self.message, *self.wishes.fields}
        answer: list[Any] = [self.chat, self.buttons, self.beams, self.message, self.status, self.viewer]

        self.message.submit(self.send, wishes, answer, **many)
        self.chat.example_select(self.ask_offered, wishes, answer, **many)
        self.chat.option_select(self.ask_offered, wishes, answer, **many)
        self.chat.retry(self.retry, wishes, answer, **many)
        self.chat.edit(self.edit, wishes, answer, **many)
        self.buttons.click(self.press, self.message, answer, **many)
        self.message.stop(self.stop, None, None, queue=False, **hidden)
        self.new.click(self.start_again, wishes, answer, **many)
        preset, text = self.wishes.preset, self.wishes.prompt_text
        preset.input(self.show_prompt, preset, text, queue=False, **hidden)
        self.wishes.wire(**hidden)
        self.viewer.change(None, self.viewer, None, js=VIEWER_JS, **hidden)
        arrival: list[Any] = [*answer, self.header, preset, text]
        self.blocks.load(self.arrive, self.viewer, arrival, js=ARRIVAL_JS, **many)
        self.blocks.unload(self.leave)

    async def arrive(self, stored: dict[str, Any] | None, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        """A tab has opened: tell how the engine's start goes on, then give the tab its chat, or the ones it had."""
        said = ""
        while self.engine.status == "starting":
            if self.engine.detail != said:
                said = self.engine.detail
                yield {self.status: _status_html(said)}
            await asyncio.sleep(POLL_INTERVAL)
        try:
            tab = await self._tab(_key(request), (stored or {}).get("secret"))
        except ChatPageError as error:
            yield {self.status: _status_html(str(error))}
            return
        name, text = next(((system.name, system.text) for system in self.engine.systems), (CUSTOM, ""))
        yield {
            **self._shown(tab),
            self.header: _header_html(_facts(self.engine, self.settings)),
            self.wishes.preset: gr.Dropdown(choices=presets(self.engine), value=name),
            self.wishes.prompt_text: gr.Textbox(value=text, interactive=name == CUSTOM),
        }

    async def _tab(self, key: str, secret: str | None) -> Tab:
        """The tab that was loaded again, or a new one.

        A page may be here again before its end was heard of. If it does not end, this tab is a copy of it.
        """
        until = time.monotonic() + RELOAD_SECONDS
        while secret and self.visitors.has(secret) and time.monotonic() < until:
            await asyncio.sleep(POLL_INTERVAL)
        if tab := self.visitors.find(key):  # it has asked something meanwhile
            return tab
        if secret and (tab := self.visitors.come_back(key, secret)):
            for chat in [chat for chat in tab.chats if chat.conversation.messages]:
                chat.status = "Loaded again · what was said is here, its blocks went back to the pool"
            return tab
        tab = self.visitors.open(key, None)
        if secret:
            tab.shown.status = "Ready · the chat from before is open in another tab, or no longer kept"
        return tab

    async def leave(self, request: gr.Request) -> None:
        """The tab is closed."""
        self.visitors.leave(_key(request))

    async def send(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        text = values[self.message]
        if text and text.strip():
            async for update in self._answer(values, request, lambda talk: partial(talk.say, text), sent=True):
                yield update
        else:
            yield {self.status: gr.skip()}

    async def ask_offered(
        self, values: dict[Any, Any], event: gr.SelectData, request: gr.Request
    ) -> AsyncIterator[dict[Any, Any]]:
        """A question that the page offers: an example, or one to go on with. The browser may send anything."""
        match event.value:
            case {"text": str(text)} | str(text):
                async for update in self._answer(values, request, lambda talk: partial(talk.say, text)):
                    yield update
            case _:
                _warn("This is no question; load the page again.")
                yield {self.status: gr.skip()}

    async def retry(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        async for update in self._answer(values, request, lambda talk: talk.regenerate):
            yield update

    async def edit(
        self, values: dict[Any, Any], event: gr.EditData, request: gr.Request
    ) -> AsyncIterator[dict[Any, Any]]:
        index = event.index if isinstance(event.index, int) else event.index[0]
        text = plain(str(event.value))
        async for update in self._answer(values, request, lambda talk: partial(talk.edit, index, text)):
            yield update

    async def stop(self, request: gr.Request) -> None:
        if tab := self.visitors.find(_key(request)):
            tab.shown.conversation.stop()

    async def start_again(self, values: dict[Any, Any], request: gr.Request) -> dict[Any, Any]:
        """New chat, in place of the one that is shown, with the system prompt that is chosen now."""
        try:
            return self._shown(self.visitors.open(_key(request), self.wishes.system_prompt(values, self.engine)))
        except ChatPageError as error:
            _warn(str(error))
            return {self.status: gr.skip()}

    async def press(self, typed: str, event: gr.EventData, request: gr.Request) -> dict[Any, Any]:
        """One of the buttons that `page.js` draws."""
        tab = self.visitors.find(_key(request))
        if tab is None:
            return {self.status: gr.skip()}
        try:
            return await self._do(tab, event._data, typed)
        except ChatPageError as error:
            _warn(str(error))
            return {self.status: gr.skip()}

    async def _do(self, tab: Tab, wish: Any, typed: str) -> dict[Any, Any]:
        """What a button asks for; the browser may send anything."""
        match wish:
            case {"do": "switch", "message": int(message), "number": int(number)}:
                conversation = tab.shown.conversation
                conversation.switch(message, number)
                tab.shown.status = f"Branch {number} of {conversation.branches(message).count}"
            case {"do": "choose", "number": int(number)}:
                await self._choose(tab.shown, number)
            case {"do": "fork", "message": int(message)}:
                messages = tab.shown.conversation.messages
                tab.fork(message)
                if not typed.strip() and messages[message]["role"] == "user":  # a question is left out: to be reworded
                    return {**self._shown(tab), self.message: _idle(messages[message]["content"])}
            case {"do": "show", "chat": int(number)}:
                tab.show(number)
            case {"do": "close", "chat": int(number)}:
                tab.close(number)
            case _:
                raise RequestError("This button is not known here; load the page again.")
        return self._shown(tab)

    @staticmethod
    async def _choose(chat: Chat, number: int) -> None:
        """Go on from a reply. The others have ended when this returns, so that nothing waits for them in vain."""
        replies = chat.conversation.replies
        chat.conversation.choose(number)
        others = replies[: number - 1] + replies[number:]
        until = time.monotonic() + CHOICE_SECONDS
        while not all(reply.done for reply in others) and time.monotonic() < until:
            await asyncio.sleep(UPDATE_INTERVAL)
        chat.status = f"Reply {number} of {len(replies)} · the blocks of the others went back to the pool"

    async def show_prompt(self, name: str) -> Any:
        """The text of the chosen system prompt. One's own begins as the one that was shown before."""
        text = next((system.text for system in self.engine.systems if system.name == name), None)
        return gr.Textbox(interactive=True) if text is None else gr.Textbox(value=text, interactive=False)

    # -- one answer -----------------------------------------------------------------------------------------------

    async def _answer(
        self,
        values: dict[Any, Any],
        request: gr.Request,
        begin: Callable[[Conversation], Callable[..., Stream]],
        *,
        sent: bool = False,
    ) -> AsyncIterator[dict[Any, Any]]:
        """Begin a turn and show its answer as it grows. A refusal is said in a toast; what was typed stays."""
        key = _key(request)
        try:
            wish = self.wishes.wish(values)
            tab = self._asked(key, self.wishes.system_prompt(values, self.engine))
            chat, conversation = tab.shown, tab.shown.conversation
            progress = Progress(first_turn=not conversation.messages)
            begin(conversation)(wish.params, replies=wish.replies, beams=wish.beams)
        except ChatPageError as error:
            _warn(str(error))
            yield self._truth(key)
            return
        yield {**self._shown(tab), self.message: _busy(clear=sent)}
        before = 2 * len(conversation.shown) - 1  # messages that stay as they are
        history = drawn(conversation.messages[:before])
        last: dict[int, Delta] = {}
        async with contextlib.aclosing(_paced(conversation.turn)) as come:
            async for deltas in come:
                last |= deltas
                chat.status = self._progress(conversation, progress, last)
                for delta in deltas.values():
                    if delta.error:
                        _warn(delta.error)
                if self._sees(key, chat):
                    answers = drawn(page_replies.messages(conversation)[before:])
                    yield {self.chat: history + answers, **self._beside(tab)}
        yield self._truth(key)

    @staticmethod
    def _progress(conversation: Conversation, progress: Progress, last: dict[int, Delta]) -> str:
        """How the turn is doing: all replies, or the one that was chosen of them."""
        if len(last) == 1:
            return progress.line(*last.values())
        if conversation.replies:
            return progress.line(page_replies.together(list(last.values())))
        return progress.line(last[conversation.shown[-1].choice])

    def _asked(self, key: str, system_prompt: str | None) -> Tab:
        """This tab; with a new conversation where none has begun with another system prompt."""
        tab = self.visitors.find(key)
        if tab and (tab.shown.conversation.messages or tab.shown.conversation.system_prompt == system_prompt):
            return tab
        return self.visitors.open(key, system_prompt)

    def _sees(self, key: str, chat: Chat) -> bool:
        """Whether the tab shows this chat now: not if it is closed, or the visitor looks at another one."""
        tab = self.visitors.peek(key)
        return tab is not None and tab.shown is chat

    def _truth(self, key: str) -> dict[Any, Any]:
        """The chat as the server has it now. Gradio repeats the last update when a handler ends, so it must be true."""
        tab = self.visitors.peek(key)
        if tab is None or tab.shown.conversation.busy:
            return {self.status: gr.skip()}
        return self._shown(tab)

    def _shown(self, tab: Tab) -> dict[Any, Any]:
        """All that the page shows of a tab's chats."""
        conversation = tab.shown.conversation
        return {
            self.chat: self._said(conversation),
            self.message: _busy() if conversation.busy else _idle(),
            self.viewer: _viewer(tab),
            **self._beside(tab),
        }

    def _said(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The messages; the bundled tutor's last one with what may be asked next."""
        messages = drawn(page_replies.messages(conversation))
        if self.settings.model is None and (options := page_tutor.options(conversation)):
            messages[-1]["options"] = options
        return messages

    def _beside(self, tab: Tab) -> dict[Any, Any]:
        """What is drawn around the messages, and changes with each token."""
        turn = tab.shown.conversation.turn
        searched = len(turn) == 1 and turn[0].beams
        return {
            self.buttons: _buttons(tab),
            self.beams: page_replies.search(turn[0], self.engine.core.tokenizer) if searched else {},
            self.status: _status_html(tab.shown.status),
        }


async def _paced(turn: list[Exchange]) -> AsyncGenerator[dict[int, Delta]]:
    """What has come for each reply of a turn, not more often than the page is drawn. Whoever leaves early ends them."""
    streams = {reply.choice: reply.stream for reply in turn if reply.stream}
    awaited: dict[asyncio.Task[Delta], int] = {}
    try:
        while streams:
            wanted = streams.keys() - awaited.values()
            awaited |= {asyncio.create_task(_next(streams[choice])): choice for choice in wanted}
            come, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            deltas = {awaited.pop(task): task.result() for task in come}
            for choice, delta in deltas.items():
                if delta.state == "done":
                    del streams[choice]
            yield dict(sorted(deltas.items()))
            if streams:
                await asyncio.sleep(UPDATE_INTERVAL)
    finally:
        for task in awaited:
            task.cancel()
        for stream in streams.values():
            stream.cancel()


async def _next(stream: Stream) -> Delta:
    return await anext(stream)


def _warn(message: str) -> None:
    """Say it in a toast, which would draw HTML."""
    gr.Warning(html.escape(message, quote=False))


def _key(request: gr.Request) -> str:
    if not request.session_hash:
        raise gr.Error("This page needs a browser.")
    return request.session_hash


def _viewer(tab: Tab) -> dict[str, Any]:
    """Who looks at the panel: what opens the own rows, and the pseudonym they have in the events; and the tab."""
    session = tab.shown.conversation.session
    return {"token": session.view_token, "session": session.id, "secret": tab.secret}


def _buttons(tab: Tab | None) -> dict[str, Any]:
    """What `page.js` draws its buttons by."""
    if tab is None:
        return {"busy": False, "partings": [], "replies": [], "foremost": 0, "chats": [], "shown": 0}
    conversation = tab.shown.conversation
    places = conversation.partings.items()
    replies = page_replies.states(conversation)
    return {
        "busy": conversation.busy,
        "partings": [{"message": message, "number": at.number, "count": at.count} for message, at in places],
        "replies": replies,
        "foremost": conversation.shown[-1].choice + 1 if replies else 0,
        "chats": [{"number": chat.number, "session": chat.conversation.session.id} for chat in tab.chats],
        "shown": tab.shown.number,
    }


def _busy(*, clear: bool = False) -> Any:
    buttons = {"submit_btn": False, "stop_btn": "Stop"}
    return gr.Textbox(value="", **buttons) if clear else gr.Textbox(**buttons)


def _idle(text: str | None = None) -> Any:
    buttons = {"submit_btn": "Send", "stop_btn": False}
    return gr.Textbox(**buttons) if text is None else gr.Textbox(value=text, **buttons)


def _facts(engine: Engine, settings: Settings) -> str:
    """What answers here, and what is shared in force."""
    return " · ".join(
        [
            page_tutor.NAME if settings.model is None else engine.model_name,
            f"{engine.device}, {engine.dtype}",
            f"block size {engine.block_size}",
            SHARING[engine.sharing],
        ]
    )


def _header_html(facts: str) -> str:
    return f"<h1>ChatPage</h1><p>{html.escape(facts)}</p>"


def _status_html(line: str) -> str:
    return f"<p>{html.escape(line)}</p>"
