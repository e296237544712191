"""The engine: one thread that owns everything mutable.

    other threads                 the engine's thread
    ─────────────                 ─────────────────────────────────────────────
    stream(request) ──command──▶  scheduler.submit
    cancel()        ──command──▶  scheduler.end
                                  loop: schedule → run one step → tokens → text
    Stream          ◀──deltas───  once a step
    listeners       ◀──events───  once a step

A command is a function that the thread calls between two steps. So nothing here needs a lock but the table of open
sessions.
"""

import hashlib
import hmac
import itertools
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from chatpage import tutor
from chatpage.cache.pool import BlockPool
from chatpage.cache.prefix import common_length
from chatpage.errors import Busy, ChatPageError, RequestError, SettingError, Unavailable
from chatpage.events import Event, EventLog, Snapshot
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, FinishReason, Prompt, Request
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from chatpage.settings import Settings
from chatpage.stream import Stream
from chatpage.trace import Trace

if TYPE_CHECKING:
    from chatpage.model.batch import Row
    from chatpage.model.load import LoadedModel
    from chatpage.text.answer import Answer
    from chatpage.text.template import Message

log = logging.getLogger(__name__)

Listener = Callable[[Snapshot | None, list[Event]], None]
T = TypeVar("T")

MAX_SESSIONS = 10_000  # open at once; beyond it the one opened first is closed
MAX_BYTES_PER_TOKEN = 16  # a prompt of more bytes per token of context is refused before it is tokenised
DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant. Answer briefly and clearly, and say so when you do not know."
SYSTEM_ROLES = ("system", "developer")
FAILED_STEPS = 3  # in a row, after which the engine gives up
SWEEP_SECONDS = 1.0  # how often expired sessions are looked for while nothing runs


@dataclass(frozen=True, slots=True)
class OpenSession:
    """What the server knows of a session.

    Attributes:
        key: opens it; for the server and its owner alone.
        view_token: lets its owner see its tokens in the panel, and nothing else.
        id: the pseudonym that events carry.
    """

    key: str
    view_token: str
    id: int


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """An operator's system prompt; `tokens` are those that every conversation under it begins with."""

    name: str
    text: str
    tokens: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Turn:
    """A sequence, its text and its reader."""

    sequence: Sequence
    answer: "Answer"
    stream: Stream


class Engine:
    """A model, its paged KV cache and its scheduler, behind a thread-safe front."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sharing = settings.resolved_sharing
        self.status: Literal["starting", "ready", "stopping", "failed"] = "starting"
        self.detail = "Starting"
        self.systems: list[SystemPrompt] = []
        self.notes: list[str] = []
        self.last_progress = time.monotonic()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._settled = threading.Event()  # start-up has ended, well or not
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._ended = False  # the thread runs no more commands
        self._sessions: dict[str, Session] = {}
        self._viewers: dict[str, str] = {}
        self._session_ids = itertools.count(1)
        self._boot_key = secrets.token_bytes(32)
        self._open_requests = 0
        self._counts: Counter[str] = Counter()
        self._turns: dict[int, Turn] = {}
        self._listeners: list[Listener] = []
        self._events: list[Event] = []
        self._touched: set[Stream] = set()
        self._failed_steps = 0

    # -- from any thread: life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load. Returns at once; `status` and `detail` tell how it goes."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait for the end of start-up.

        Raises:
            ChatPageError: why the model or a setting was refused.
            TimeoutError: it is not over yet.
        """
        if not self._settled.wait(timeout):
            raise TimeoutError(f"The engine was not ready after {timeout} seconds: {self.detail}.")
        if self._error is not None:
            raise self._error

    def stop(self, timeout: float = 3.0) -> None:
        """Cancel everything and end the thread. Harmless the second time."""
        if self.status in ("starting", "ready"):
            self.status, self.detail = "stopping", "The server is stopping"
        self._post(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # -- from any thread: sessions --------------------------------------------------------------------------------

    def open_session(self) -> OpenSession:
        """A new session with a domain of its own, or everybody's where all text is shared."""
        key, view_token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        domain: Hashable = "all" if self.sharing == "all" else secrets.token_bytes(16)
        session = Session(next(self._session_ids), domain)
        with self._lock:
            oldest = next(iter(self._sessions)) if len(self._sessions) >= MAX_SESSIONS else None
            self._sessions[key] = session
            self._viewers[view_token] = key
        if oldest is not None:
            self.close_session(oldest)
        return OpenSession(key, view_token, session.id)

    def close_session(self, key: str) -> None:
        """Cancel what it runs and release its blocks. Harmless the second time."""
        with self._lock:
            session = self._sessions.pop(key, None)
            self._viewers = {token: k for token, k in self._viewers.items() if k != key}
        if session is not None:
            self._post(lambda: self._close(session))

    def has_session(self, key: str) -> bool:
        return key in self._sessions

    def describe(self, view_token: str) -> dict[str, Any] | None:
        """The tokens of one's own session with their places (`GET /kv/me`), or None for an unknown view token.

        Raises:
            Unavailable: the engine is not ready.
        """
        self._require_ready()
        with self._lock:
            session = self._sessions.get(self._viewers.get(view_token, ""))
        if session is None:
            return None
        size = self.block_size
        sequences = [
            {
                "id": number,
                "tokens": [
                    {"text": self._token_text(token), "block": table[i // size], "slot": i % size}
                    for i, token in enumerate(tokens)
                ],
            }
            for number, tokens, table in self._ask(lambda: self._places(session))
        ]
        return {"session": session.id, "sequences": sequences}

    # -- from any thread: requests --------------------------------------------------------------------------------

    def prompt(self, messages: list["Message"]) -> Prompt:
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
        size = sum(len(str(message.get("content")).encode("utf-8", "replace")) for message in messages)
        if size > MAX_BYTES_PER_TOKEN * self.max_model_len:
            raise self._too_long(f"more than {self.max_model_len}")
        tokens = self.template.render(messages)
        self.require_room(len(tokens))
        system = next((s for s in self.systems if s.text == text), None)
        shared = common_length(tokens, system.tokens) if system and self.sharing != "off" else 0
        return Prompt(tuple(tokens), shared)

    def require_room(self, tokens: int) -> None:
        """Refuse a prompt that leaves no room for an answer in the context."""
        if tokens >= self.max_model_len:
            raise self._too_long(str(tokens))

    def _too_long(self, tokens: str) -> RequestError:
        return RequestError(
            f"The messages have {tokens} tokens; with room for an answer at most {self.max_model_len - 1} are allowed.",
            param="messages",
            code="context_length_exceeded",
        )

    def stream(self, request: Request, listener: Callable[[Delta], None] | None = None) -> Stream:
        """Submit a request.

        Args:
            listener: gets every delta on the engine's thread, whether the stream is read or not.

        Raises:
            RequestError: it can never be served.
            Busy: too many are waiting.
            Unavailable: the engine is not ready.
        """
        self._require_ready()
        self.require_room(len(request.prompt.tokens))
        if request.session is not None and not self.has_session(request.session):
            raise RequestError("The session is not known here; it may have been closed.", param="session")
        self._enter_queue()
        done = threading.Event()

        def hear(delta: Delta) -> None:
            if listener is not None:
                listener(delta)
            if delta.state == "done" and not done.is_set():
                done.set()
                self._leave_queue()

        stream = Stream(lambda: self._post(lambda: self._cancel(stream)), hear)
        if not self._post(lambda: self._submit(request, stream)):
            self._leave_queue()
            raise Unavailable(f"{self.detail}.")
        return stream

    def _enter_queue(self) -> None:
        limit = self.settings.max_sequences + self.settings.max_queue
        with self._lock:
            if self._open_requests >= limit:
                raise Busy(
                    f"{self._open_requests} requests are running or waiting, and {limit} is the most; try again."
                )
            self._open_requests += 1

    def _leave_queue(self) -> None:
        with self._lock:
            self._open_requests -= 1

    def _require_ready(self) -> None:
        if self.status != "ready":
            raise Unavailable(f"{self.detail}; please try again in a moment.")

    # -- from any thread: watching --------------------------------------------------------------------------------

    def subscribe(self, listener: Listener) -> None:
        """Call `listener(snapshot, [])` once the model is loaded, then `listener(None, events)` after every step.

        It is called on the engine's thread, and must be quick. The snapshot is the listener's own copy.
        """
        self._post(lambda: self._add_listener(listener))

    def unsubscribe(self, listener: Listener) -> None:
        self._post(lambda: self._listeners.remove(listener) if listener in self._listeners else None)

    def stats(self) -> dict[str, float]:
        """Counters since the start, and how many sequences run and wait now."""
        scheduler = getattr(self, "_scheduler", None)
        return {
            "steps": self._counts["steps"],
            "prompt_tokens": self._counts["prompt_tokens"],
            "cached_tokens": self._counts["cached_tokens"],
            "computed_tokens": self._counts["computed_tokens"],
            "generated_tokens": self._counts["generated_tokens"],
            **{f"finished_{reason}": self._counts[reason] for reason in ("stop", "length", "abort", "error")},
            "running": len(scheduler.running) if scheduler else 0,
            "waiting": len(scheduler.waiting) + len(scheduler.preempted) if scheduler else 0,
            "sessions": len(self._sessions),
            "has_work": bool(scheduler and scheduler.has_work),
            "seconds_since_progress": time.monotonic() - self.last_progress,
        }

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
        return future.result(timeout=30)

    # -- the engine's thread: life --------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._load()
            self._prefill_systems()
            if self.status == "starting":
                self.status, self.detail = "ready", "Ready"
            self._settled.set()
            while self.status == "ready":
                self._run_commands(wait=not self._scheduler.has_work)
                self._run_step()
        except ChatPageError as error:
            self._fail(error, str(error))
        except Exception as error:
            log.exception("The engine's thread ended")
            self._fail(error, f"The engine failed: {type(error).__name__}: {error}")
        finally:
            self._end_all()

    def _fail(self, error: BaseException, detail: str) -> None:
        self._error, self.status, self.detail = error, "failed", detail

    def _end_all(self) -> None:
        """Tell every reader that nothing more will come."""
        self._settled.set()
        with self._lock:
            self._ended = True
        is_loaded = hasattr(self, "_scheduler")  # otherwise there is nothing that a command could change
        while not self._commands.empty():
            command = self._commands.get()
            if is_loaded:
                command()
        for turn in list(self._turns.values()):
            if self.status == "failed":
                self._finish(turn, "error", error=self.detail)
            else:
                self._finish(turn, "abort")
        Stream.wake(self._touched)

    def _load(self) -> None:
        """Model, pool and scheduler, in this order: the pool's shapes come from the model itself."""
        from chatpage.model.load import load
        from chatpage.text.template import ChatTemplate

        settings = self.settings
        self.detail = f"Loading {settings.model or 'the bundled model'}"
        loaded = load(settings.model or str(tutor.path()), device=settings.device, dtype=settings.dtype)
        self.model_name, self.tokenizer, self.template = loaded.name, loaded.tokenizer, ChatTemplate(loaded.tokenizer)
        self.device, self.dtype = str(loaded.device), str(loaded.dtype).removeprefix("torch.")
        self.notes = list(loaded.notes)
        self._stop_token_ids = loaded.stop_token_ids
        self._token_text = lru_cache(maxsize=65_536)(lambda token: self.tokenizer.decode([token]))
        self._make_room_for_blocks(loaded)
        self._log = EventLog()
        self._log.listeners.append(self._events.append)
        self._pool = BlockPool(self.num_blocks, self.block_size, self._log)
        self._scheduler = Scheduler(
            self._pool, max_sequences=settings.max_sequences, max_step_tokens=settings.max_step_tokens
        )
        self._view = Snapshot.empty(
            self._log,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            bytes_per_block=self._runner.pool.bytes_per_block,
            max_model_len=self.max_model_len,
        )
        if settings.trace:
            self._add_listener(Trace(settings.trace, sharing=self.sharing))

    def _make_room_for_blocks(self, loaded: "LoadedModel") -> None:
        from chatpage.model.kv import bytes_per_block, free_memory, num_blocks_for
        from chatpage.model.step import ModelRunner

        settings = self.settings
        self.block_size = settings.block_size
        self.max_model_len = min(settings.max_model_len or loaded.max_positions, loaded.max_positions)
        self.num_blocks = num_blocks_for(
            free_bytes=free_memory(loaded.device),
            share=settings.kv_memory,
            bytes_per_block=bytes_per_block(loaded.layers, settings.block_size, loaded.dtype),
            kv_blocks=settings.kv_blocks,
            max_model_len=self.max_model_len,
            max_sequences=settings.max_sequences,
            block_size=settings.block_size,
            on_cpu=loaded.device.type == "cpu",
        )
        self._runner = ModelRunner(loaded, num_blocks=self.num_blocks, block_size=self.block_size)

    def _prefill_systems(self) -> None:
        """Compute every system prompt once, and pin it, so that no session computes it again."""
        self.detail = "Computing the system prompt"
        for number, text in enumerate(self.settings.system_prompt or [self._default_system_prompt()]):
            name = "default" if number == 0 else f"system prompt {number + 1}"
            system = SystemPrompt(name, text, tuple(self.template.system_prefix(text)))
            if len(system.tokens) + 1 >= self.max_model_len:
                raise SettingError(
                    f"--system-prompt number {number + 1} has {len(system.tokens)} tokens; it must leave room for a "
                    f"question and an answer in a context of {self.max_model_len}."
                )
            if self.sharing != "off" and system.tokens:
                self._prefill_and_pin(system)
            self.systems.append(system)

    def _default_system_prompt(self) -> str:
        """The model's own, or none where its template takes none."""
        text = tutor.system_prompt() if self.settings.model is None else DEFAULT_SYSTEM_PROMPT
        try:
            self.template.system_prefix(text)
        except RequestError:
            self.notes.append("This model's chat template takes no system prompt.")
            return ""
        return text

    def _prefill_and_pin(self, system: SystemPrompt) -> None:
        session = Session(0, domain=None, keeps=False)
        prompt = Prompt(system.tokens, len(system.tokens))
        sequence = self._scheduler.submit(session, prompt, SamplingParams(), draws=False)
        while sequence.computed < len(sequence.tokens):
            step = self._scheduler.schedule()
            if step.exhausted:
                raise SettingError(
                    f"--kv-blocks is {self.num_blocks}, but the system prompts need more: allow more, or shorten "
                    "or leave out a --system-prompt."
                )
            self._compute(step)
        sequence.table.publish(sequence.tokens, sequence.computed, tail=True)
        for logical, block in enumerate(sequence.table.blocks):
            self._pool.pin(block, logical=logical, at=len(system.tokens), name=system.name)
        self._scheduler.end(sequence, "the system prompt is computed")
        self._hand_out_events()

    # -- the engine's thread: commands ----------------------------------------------------------------------------

    def _run_commands(self, *, wait: bool) -> None:
        """Everything that was asked meanwhile; where nothing is to be computed, wait for it."""
        try:
            if wait:
                self._commands.get(timeout=SWEEP_SECONDS)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            self._expire_sessions()

    def _submit(self, request: Request, stream: Stream) -> None:
        session = self._session_of(request)
        prompt = request.prompt
        seed = request.params.seed
        try:
            if session is None:
                raise RequestError("The session was closed.")
            if session.keeps and session.active:
                raise RequestError("This session has a turn that is still running; wait for it, or stop it.")
            sequence = self._scheduler.submit(
                session, prompt, request.params, seed=secrets.randbits(63) if seed is None else seed
            )
        except RequestError as error:
            stream.put(Delta("done", prompt_tokens=len(prompt.tokens), finish_reason="error", error=str(error)))
            self._touched.add(stream)
            return
        from chatpage.text.answer import Answer

        room = self.max_model_len - len(prompt.tokens)
        limits = (room, request.params.max_tokens, self.settings.max_output_tokens)
        answer = Answer(
            self.tokenizer,
            stop_token_ids=self._stop_token_ids,
            stops=request.params.stop,
            limit=min(limit for limit in limits if limit is not None),
        )
        turn = self._turns[sequence.id] = Turn(sequence, answer, stream)
        self._counts["prompt_tokens"] += len(prompt.tokens)
        self._tell(turn, "queued")

    def _session_of(self, request: Request) -> Session | None:
        if request.session is not None:
            return self._sessions.get(request.session)
        if self.sharing == "all":
            domain: Hashable = "all"
        elif request.owner is not None:
            domain = hmac.digest(self._boot_key, request.owner.encode(), hashlib.sha256)
        else:
            domain = secrets.token_bytes(16)
        return Session(next(self._session_ids), domain, keeps=False)

    def _cancel(self, stream: Stream) -> None:
        turn = next((turn for turn in self._turns.values() if turn.stream is stream), None)
        if turn is not None:
            self._finish(turn, "abort")

    def _close(self, session: Session) -> None:
        for turn in [turn for turn in self._turns.values() if turn.sequence.session is session]:
            self._finish(turn, "abort")
        self._scheduler.wake(session, "the session was closed")

    def _expire_sessions(self) -> None:
        deadline = time.monotonic() - self.settings.session_ttl
        for session in list(self._scheduler.resting):
            if session.rested_at > deadline:
                break  # longest rested first
            self._scheduler.wake(session, "the session expired")

    def _places(self, session: Session) -> list[tuple[int, list[int], list[int]]]:
        """Id, tokens that have a slot, and block table of each of a session's sequences."""
        sequences = [turn.sequence for turn in self._turns.values() if turn.sequence.session is session]
        if session.resting is not None:
            sequences.append(session.resting)
        return [(s.id, s.tokens[: s.table.length], list(s.table.blocks)) for s in sequences]

    def _add_listener(self, listener: Listener) -> None:
        self._hand_out_events()
        listener(deepcopy(self._view), [])
        self._listeners.append(listener)

    # -- the engine's thread: one step ----------------------------------------------------------------------------

    def _run_step(self) -> None:
        step = self._scheduler.schedule()
        for sequence in step.preempted:
            self._tell(self._turns[sequence.id], "preempted")
        for sequence in step.exhausted:
            self._finish(self._turns[sequence.id], "length")
        if step.chunks:
            try:
                self._deliver(step, self._compute(step))
                self._failed_steps = 0
            except Exception:
                log.exception("A step failed")
                self._abandon(step)
        self._hand_out_events()
        Stream.wake(self._touched)
        self._touched.clear()
        self.last_progress = time.monotonic()
        if self.settings.paranoid:
            self._check()

    def _compute(self, step: Step) -> list[int | None]:
        """Run one step, and publish what it computed. Returns the token drawn for each chunk, if any."""
        drawn = self._runner.run([self._row(chunk) for chunk in step.chunks], step.copies)
        for chunk, token in zip(step.chunks, drawn, strict=True):
            if self._draws(chunk) and token is None:
                turn = self._turns[chunk.sequence.id]
                self._finish(turn, "error", error="The model's output was not a number (NaN or infinite).")
        self._scheduler.finish(step)
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += sum(chunk.count for chunk in step.chunks)
        return drawn

    def _row(self, chunk: Chunk) -> "Row":
        from chatpage.model.batch import Draw, Row

        sequence, end = chunk.sequence, chunk.start + chunk.count
        draw = Draw(sequence.params, sequence.seed, 0, end) if self._draws(chunk) else None
        return Row(sequence.tokens[chunk.start : end], chunk.start, sequence.table.blocks, chunk.stores, draw)

    @staticmethod
    def _draws(chunk: Chunk) -> bool:
        return chunk.sequence.draws and chunk.reaches_end

    def _deliver(self, step: Step, drawn: list[int | None]) -> None:
        for chunk, token in zip(step.chunks, drawn, strict=True):
            turn = self._turns.get(chunk.sequence.id)
            if turn is None:  # it failed in this step
                continue
            if token is None:
                self._tell(turn, "prefill")
                continue
            turn.sequence.tokens.append(token)
            self._counts["generated_tokens"] += 1
            text, reason = turn.answer.add(token)
            if reason is None:
                self._tell(turn, "decode", text=text, tokens=(token,))
            else:
                self._finish(turn, reason, text=text, tokens=(token,))

    def _abandon(self, step: Step) -> None:
        """A step raised: its sequences end, all others go on."""
        self._failed_steps += 1
        for chunk in step.chunks:
            turn = self._turns.get(chunk.sequence.id)
            if turn is not None:
                self._finish(turn, "error", error="The step that computed this answer failed; please try again.")
        if self._failed_steps >= FAILED_STEPS:
            raise RuntimeError(f"{FAILED_STEPS} steps failed one after another")

    def _finish(
        self,
        turn: Turn,
        reason: FinishReason,
        *,
        text: str = "",
        tokens: tuple[int, ...] = (),
        error: str | None = None,
    ) -> None:
        if reason in ("abort", "length") and not tokens:  # cut off from outside: what was held back is certain now
            text = turn.answer.flush()
        del self._turns[turn.sequence.id]
        self._scheduler.end(turn.sequence, error or reason, failed=reason == "error")
        self._counts[reason] += 1
        self._counts["cached_tokens"] += turn.sequence.cached or 0
        self._tell(turn, "done", text=text, tokens=tokens, finish_reason=reason, error=error)

    def _tell(
        self,
        turn: Turn,
        state: Literal["queued", "prefill", "decode", "preempted", "done"],
        *,
        text: str = "",
        tokens: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> None:
        sequence = turn.sequence
        turn.stream.put(
            Delta(
                state=state,
                text=text,
                tokens=tokens,
                prompt_tokens=sequence.prompt_length,
                cached_tokens=sequence.cached or 0,
                computed_tokens=min(sequence.computed, sequence.prompt_length),
                completion_tokens=sequence.generated,
                finish_reason=finish_reason,
                error=error,
            )
        )
        self._touched.add(turn.stream)

    def _hand_out_events(self) -> None:
        if not self._events:
            return
        events = self._events[:]
        self._events.clear()
        self._view.apply_all(events)
        for listener in self._listeners:
            listener(None, events)

    def _check(self) -> None:
        """Prove the cache's invariants, and that the events tell the same story as the pool."""
        self._pool.check(self._scheduler.tables())
        assert list(self._view.ref) == self._pool.ref, "the events and the pool disagree on references"
        assert list(self._view.fill) == self._pool.fill, "the events and the pool disagree on fills"
