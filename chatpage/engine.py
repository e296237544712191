"""The engine: one thread that owns everything mutable.

    other threads                 the engine's thread
    ─────────────                 ─────────────────────────────────────────────
    stream(request) ──command──▶  core.submit
    cancel()        ──command──▶  core.cancel
                                  loop: commands, then one step
    Stream          ◀──deltas───  once a step
    listeners       ◀──events───  once a step

A command is a function that the thread calls between two steps.
"""

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from chatpage.cache.prefix import common_length
from chatpage.errors import Busy, ChatPageError, RequestError, Unavailable
from chatpage.events import Event, Snapshot
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.sessions import OpenSession, Sessions
from chatpage.settings import Settings
from chatpage.stream import Stream

if TYPE_CHECKING:
    from chatpage.core import Core, SystemPrompt
    from chatpage.schedule.session import Session
    from chatpage.text.template import ChatTemplate, Message

log = logging.getLogger(__name__)

T = TypeVar("T")
Listener = Callable[[Delta], None]

SYSTEM_ROLES = ("system", "developer")
MAX_BYTES_PER_TOKEN = 16  # a prompt of more bytes per token of context is refused before it is tokenised
SWEEP_SECONDS = 1.0  # how often expired sessions are looked for while nothing runs
ANSWER_SECONDS = 30.0  # a question to the engine's thread waits so long for the step before it
USUAL_COLLECTION = gc.get_threshold()
RARE_COLLECTION = (10_000, *USUAL_COLLECTION[1:])  # of new objects: a step of 256 sequences makes a few thousand


class Engine:
    """A model, its paged KV cache and its scheduler, behind a thread-safe front."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sharing = settings.resolved_sharing
        self.status: Literal["starting", "ready", "stopping", "failed"] = "starting"
        self.detail = "Starting"
        self.last_progress = time.monotonic()
        self._sessions = Sessions(self.sharing)
        self._core: Core | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._settled = threading.Event()  # start-up has ended, well or not
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ended = False  # the thread runs no more commands
        self._open_replies = 0

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load. Returns at once; `status` and `detail` tell how it goes."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait for the end of start-up.

        Raises:
            ChatPageError: why the model or a setting was refused, or that the engine was stopped meanwhile.
            TimeoutError: it is not over yet.
        """
        if not self._settled.wait(timeout):
            raise TimeoutError(f"The engine was not ready after {timeout} seconds: {self.detail}.")
        if self._error is not None:
            raise self._error
        self._require_ready()

    def stop(self, timeout: float = 3.0) -> None:
        """Cancel everything and end the thread. Harmless the second time."""
        with self._lock:
            if self.status in ("starting", "ready"):
                self.status, self.detail = "stopping", "The server is stopping"
        self._post(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def core(self) -> "Core":
        """What the thread owns. Others may read what never changes once the engine is ready.

        Raises:
            Unavailable: it is not there yet.
        """
        if self._core is None:
            raise Unavailable(f"{self.detail}; please try again in a moment.")
        return self._core

    @property
    def model_name(self) -> str:
        return self.core.model_name

    @property
    def device(self) -> str:
        return str(self.core.loaded.device)

    @property
    def dtype(self) -> str:
        return str(self.core.loaded.dtype).removeprefix("torch.")

    @property
    def notes(self) -> list[str]:
        """Sentences that whoever runs the page should read."""
        return self.core.notes

    @property
    def block_size(self) -> int:
        return self.core.pool.block_size

    @property
    def num_blocks(self) -> int:
        return self.core.pool.num_blocks

    @property
    def max_model_len(self) -> int:
        return self.core.max_model_len

    @property
    def systems(self) -> "list[SystemPrompt]":
        """The operator's system prompts; the first is the default."""
        return self.core.systems

    @property
    def template(self) -> "ChatTemplate":
        return self.core.template

    # -- sessions -------------------------------------------------------------------------------------------------

    def open_session(self, like: OpenSession | None = None) -> OpenSession:
        """A new session with the domain of one like it, or its own, or everybody's where all text is shared."""
        session, crowded = self._sessions.open(like.key if like else None)
        if crowded is not None:
            self.close_session(crowded)
        return session

    def close_session(self, key: str) -> None:
        """Cancel what it runs and release its blocks. Harmless the second time."""
        session = self._sessions.close(key)
        if session is not None and self._core is not None:
            self._post(lambda: self.core.close(session))

    def has_session(self, key: str) -> bool:
        return key in self._sessions

    def describe(self, view_token: str) -> dict[str, Any] | None:
        """The tokens of one's own session with their places (`GET /kv/me`), or None for an unknown view token.

        A session that was closed has none.

        Raises:
            Unavailable: the engine is not ready.
        """
        self._require_ready()
        seen = self._sessions.seen_by(view_token)
        if seen is None:
            return None
        number, session = seen
        places = self._ask(lambda: self.core.places(session)) if session else []
        return {"session": number, "sequences": [self._place_tokens(*place) for place in places]}

    def _place_tokens(self, sequence: int, tokens: list[int], table: list[int]) -> dict[str, Any]:
        size, text = self.block_size, self.core.token_text
        placed = [{"text": text(token), "block": table[i // size], "slot": i % size} for i, token in enumerate(tokens)]
        return {"id": sequence, "tokens": placed}

    # -- requests -------------------------------------------------------------------------------------------------

    def prompt(self, messages: "list[Message]") -> Prompt:
        """Token ids of a conversation, under the default system prompt where it brings none of its own.

        Raises:
            RequestError: the chat template refuses it, or it is longer than the context.
            Unavailable: the model is not loaded.
        """
        self._require_ready()
        text = self.systems[0].text
        if messages and messages[0].get("role") in SYSTEM_ROLES:
            text = messages[0].get("content")
        elif messages and text:
            messages = [{"role": "system", "content": text}, *messages]
        self.require_size(messages)
        tokens = tuple(self.template.render(messages))
        self.require_room(len(tokens))
        system = next((s for s in self.systems if s.text == text), None)
        shared = common_length(tokens, system.tokens) if system and self.sharing != "off" else 0
        return Prompt(tokens, shared)

    def require_size(self, messages: "list[Message]") -> None:
        """Refuse texts that are so long that they need not even be tokenised."""
        size = sum(len(str(message.get("content")).encode("utf-8", "replace")) for message in messages)
        if size > MAX_BYTES_PER_TOKEN * self.max_model_len:
            raise self._too_long(f"more than {self.max_model_len}")

    def require_room(self, tokens: int) -> None:
        """Refuse a prompt that leaves no room for an answer in the context."""
        if tokens >= self.max_model_len:
            raise self._too_long(str(tokens))

    def _require_known(self, prompt: Prompt, params: SamplingParams) -> None:
        """Refuse tokens that would make their step fail, and with it everybody's who is in that step."""
        if not prompt.tokens:
            raise RequestError("The prompt has no tokens; it must have at least one.", param="messages")
        last = self.core.loaded.vocab_size - 1
        named = {"The prompt": prompt.tokens, "stop_token_ids": params.stop_token_ids, "logit_bias": params.biased}
        for name, tokens in named.items():
            if tokens and not 0 <= min(tokens) <= max(tokens) <= last:
                unknown = next(token for token in tokens if not 0 <= token <= last)
                param = "messages" if name == "The prompt" else name
                raise RequestError(f"{name} has token {unknown}; the model knows 0 to {last}.", param=param)

    @property
    def _most_replies(self) -> int:
        """How many may run or wait at once."""
        return self.settings.max_sequences + self.settings.max_queue

    def _require_places(self, request: Request, replies: int) -> None:
        """Refuse what could never run, or wait, with all its beams or replies."""
        places, most = self.settings.max_sequences, self._most_replies
        if request.beams and request.beams.width > places:
            raise RequestError(
                f"beam_width is {request.beams.width}; this server runs at most {places} sequences at once.",
                param="beam_width",
            )
        if request.beams and request.beams.returned != replies:
            raise RequestError(f"A search that returns {request.beams.returned} has {replies} listeners.", param="n")
        if replies > most:
            raise RequestError(f"n is {replies}; on this server at most {most} may run or wait.", param="n")

    def _too_long(self, tokens: str) -> RequestError:
        return RequestError(
            f"The messages have {tokens} tokens; with room for an answer at most {self.max_model_len - 1} are allowed.",
            param="messages",
            code="context_length_exceeded",
        )

    def stream(self, request: Request, listener: Listener | None = None) -> Stream:
        """Submit a request for one reply: see `streams`."""
        return self.streams(request, [listener])[0]

    def streams(self, request: Request, listeners: Sequence[Listener | None]) -> list[Stream]:
        """Submit a request. Its prompt is computed once, and stored once for all replies.

        Args:
            listeners: one for each reply that is wanted, so many as a beam search is to return; it gets every delta
                on the engine's thread, whether the stream is read or not.

        Returns:
            The streams of the replies, in this order.

        Raises:
            RequestError: it can never be served.
            Busy: too many are waiting.
            Unavailable: the engine is not ready.
        """
        self._require_ready()
        self._require_known(request.prompt, request.params)
        self.require_room(len(request.prompt.tokens))
        self.core.scheduler.require_room(request.prompt)
        self._require_places(request, len(listeners))
        if request.session is not None and not self.has_session(request.session):
            raise RequestError("The session is not known here; it may have been closed.", param="session")
        self._enter_queue(len(listeners))
        streams = [self._stream_for(listener) for listener in listeners]
        if not self._post(lambda: self.core.submit(request, self._session_of(request), *streams)):
            self._leave_queue(len(listeners))
            raise Unavailable(f"{self.detail}.")
        return streams

    def _stream_for(self, listener: Listener | None) -> Stream:
        def cancel() -> None:
            self._post(lambda: self.core.cancel(stream))

        stream = Stream(cancel, listener, ended=lambda: self._leave_queue(1))
        return stream

    def keep_reply(self, key: str, choice: int) -> None:
        """Go on from one reply of a session's turn: the others end, and give their blocks back."""
        session = self._sessions.use(key)
        if session is not None:
            self._post(lambda: self.core.keep(session, choice))

    def _session_of(self, request: Request) -> "Session | None":
        if request.session is None:
            return self._sessions.passing(request.owner)
        return self._sessions.use(request.session)

    def _enter_queue(self, replies: int) -> None:
        with self._lock:
            if self._open_replies + replies > self._most_replies:
                raise Busy(
                    f"{self._most_replies} requests are running or waiting, which is the most; please try again later."
                )
            self._open_replies += replies

    def _leave_queue(self, replies: int) -> None:
        with self._lock:
            self._open_replies -= replies

    def _require_ready(self) -> None:
        if self.status != "ready":
            raise Unavailable(f"{self.detail}; please try again in a moment.")

    # -- watching -------------------------------------------------------------------------------------------------

    def subscribe(self, listener: Callable[[Snapshot | None, list[Event]], None]) -> None:
        """Call `listener(snapshot, [])` once the model is loaded, then `listener(None, events)` after every step.

        It is called on the engine's thread, and must be quick. The snapshot is the listener's own copy.
        """
        self._post(lambda: self.core.add_listener(listener))

    def unsubscribe(self, listener: Callable[[Snapshot | None, list[Event]], None]) -> None:
        self._post(lambda: self.core.remove_listener(listener))

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how many sequences run and wait now. All 0 before the engine is ready."""
        core = self._core
        counts = core.counts if core else {}
        names = ("steps", "prompt_tokens", "cached_tokens", "computed_tokens", "generated_tokens")
        return {
            **{name: counts.get(name, 0) for name in names},
            **{f"finished_{reason}": counts.get(reason, 0) for reason in ("stop", "length", "abort", "error")},
            "running": len(core.scheduler.running) if core else 0,
            "waiting": len(core.scheduler.waiting) + len(core.scheduler.preempted) if core else 0,
            "sessions": len(self._sessions),
            "has_work": bool(core and core.has_work),
            "seconds_since_progress": time.monotonic() - self.last_progress,
        }

    # -- the thread -----------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> bool:
        """Have a command run between two steps. False where the thread has ended, or is about to."""
        with self._lock:
            if not self._ended:
                self._commands.put(command)
            return not self._ended

    def _ask(self, question: Callable[[], T]) -> T:
        """Run a function on the engine's thread between two steps, and wait for its answer."""
        future: Future[T] = Future()

        def answer() -> None:
            try:
                future.set_result(question())
            except BaseException as error:
                future.set_exception(error)

        if not self._post(answer):
            raise Unavailable(f"{self.detail}.")
        return future.result(timeout=ANSWER_SECONDS)

    def _main(self) -> None:
        try:
            self._load()
            while self.status == "ready":
                self._run_commands()
                if self.core.step() or not self.core.has_work:
                    self.last_progress = time.monotonic()
        except ChatPageError as error:
            self._fail(error, str(error))
        except Exception as error:
            log.exception("The engine's thread ended")
            self._fail(error, "The engine failed; the server's log says why")
        finally:
            self._end()

    def _load(self) -> None:
        from chatpage.core import Core  # late: torch takes seconds to import, and the page is up meanwhile

        self._core = Core(self.settings, self._say)
        _collect_rarely()
        with self._lock:
            if self.status == "starting":
                self.status, self.detail = "ready", "Ready"
        self._settled.set()

    def _say(self, detail: str) -> None:
        if self.status == "starting":
            self.detail = detail

    def _run_commands(self) -> None:
        """Everything that was asked meanwhile; where nothing is to be computed, wait for it."""
        try:
            if not self.core.has_work:
                self._commands.get(timeout=SWEEP_SECONDS)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            self.core.expire(rested_before=time.monotonic() - self.settings.session_ttl)

    def _fail(self, error: BaseException, detail: str) -> None:
        self._error, self.status, self.detail = error, "failed", detail

    def _end(self) -> None:
        """Nothing more will come: every reader is told, and nobody can ask any more."""
        with self._lock:
            self._ended = True
        if self._core is not None:  # otherwise there is nothing that a command could change
            while not self._commands.empty():
                try:
                    self._commands.get()()
                except Exception:  # the others who asked wait too
                    log.exception("A command failed while the engine ended")
            self._core.end_all(f"{self.detail.rstrip('.')}." if self.status == "failed" else None)
        _collect_as_usual()
        self._settled.set()


def _collect_rarely() -> None:
    """Let the garbage collector look seldom, and only at what is made from now on: what was loaded stays.

    With 256 sequences it takes a third of the host's time otherwise, most of it for walking over the modules.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*RARE_COLLECTION)


def _collect_as_usual() -> None:
    gc.unfreeze()
    gc.set_threshold(*USUAL_COLLECTION)
