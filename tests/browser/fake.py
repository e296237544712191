"""An engine that only pretends: it says what a test tells it to say, word by word, with no model and no cache.

It follows the parts of `Engine` and `Conversation` that the page relies on, so the page's own behaviour (what it does
with hostile text, with errors, while the engine loads) is tested apart from the engine.
"""

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chatpage.errors import RequestError, Unavailable
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta
from chatpage.stream import Stream

SYSTEM = "You are a patient tutor who explains how a server keeps the memory of many chats in blocks."


@dataclass(frozen=True)
class System:
    name: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Session:
    key: str
    view_token: str
    id: int


def echo(text: str) -> str:
    return f"You said: {text}. " + "A block is a fixed number of slots. " * 4


@dataclass
class FakeEngine:
    """`reply` makes the answer of a message, `delay` is the time between two words in seconds."""

    reply: Callable[[str], str] = echo
    delay: float = 0.01
    status: str = "ready"
    detail: str = "Ready"
    model_name: str = "fake-model"
    device: str = "cpu"
    dtype: str = "float32"
    sharing: str = "all"
    block_size: int = 16
    num_blocks: int = 512
    max_model_len: int = 2048
    notes: list[str] = field(default_factory=list)
    systems: list[System] = field(default_factory=lambda: [System("default", SYSTEM, tuple(range(83)))])
    sessions: dict[str, Session] = field(default_factory=dict)
    refuse: Exception | None = None
    asked: list[SamplingParams] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)

    def open_session(self) -> Session:
        if self.status != "ready":
            raise Unavailable(self.detail)
        session = Session(secrets.token_hex(8), secrets.token_hex(8), len(self.sessions) + 1)
        self.sessions[session.key] = session
        return session

    def close_session(self, key: str) -> None:
        self.sessions.pop(key, None)

    def has_session(self, key: str) -> bool:
        return key in self.sessions


class Speech:
    """One answer, spoken into a stream word by word; it ends early when the stream is cancelled."""

    def __init__(self, engine: FakeEngine, messages: list[dict[str, str]]) -> None:
        self.cancelled = self.done = False
        self.stream = Stream(self._cancel)
        self._prompt_tokens = 90 + 12 * len(messages)
        self._task = asyncio.create_task(self._speak(engine, messages))

    def _cancel(self) -> None:
        self.cancelled = True

    def _put(self, state: Any, text: str = "", said: int = 0, computed: int = 83, reason: Any = None) -> None:
        self.stream.put(Delta(state, text, (), (), self._prompt_tokens, 83, computed, said, reason))
        Stream.wake([self.stream])

    async def _speak(self, engine: FakeEngine, messages: list[dict[str, str]]) -> None:
        self._put("queued", computed=0)
        await asyncio.sleep(engine.delay)
        self._put("prefill")
        await asyncio.sleep(engine.delay)
        words = re.findall(r"\S+\s*|\s+", engine.reply(messages[-1]["content"]))
        messages.append({"role": "assistant", "content": ""})
        said = 0
        while said < len(words) and not self.cancelled:
            messages[-1]["content"] += words[said]
            said += 1
            self._put("decode", words[said - 1], said, self._prompt_tokens)
            await asyncio.sleep(engine.delay)
        self.done = True
        self._put("done", "", said, self._prompt_tokens, "abort" if self.cancelled else "stop")


class FakeConversation:
    def __init__(self, engine: FakeEngine, system_prompt: str | None = None) -> None:
        self.engine = engine
        self.system_prompt = system_prompt
        self.reopen()
        self.messages: list[dict[str, str]] = []
        self.partings: dict[int, Any] = {}
        self.speech: Speech | None = None

    def reopen(self, like: Session | None = None) -> None:
        self.session = self.engine.open_session()

    @property
    def busy(self) -> bool:
        return self.speech is not None and not self.speech.done

    def say(self, text: str, params: SamplingParams) -> Stream:
        return self._ask(len(self.messages), text, params)

    def regenerate(self, params: SamplingParams) -> Stream:
        index = len(self.messages) // 2 * 2 - 2
        return self._ask(index, self.messages[index]["content"], params)

    def edit(self, index: int, text: str, params: SamplingParams) -> Stream:
        return self._ask(index, text, params)

    def _ask(self, index: int, text: str, params: SamplingParams) -> Stream:
        if self.busy:
            raise RequestError("The last answer is still being written; stop it first.")
        if self.engine.refuse:
            raise self.engine.refuse
        self.engine.asked.append(params)
        self.engine.prompts.append(self.system_prompt)
        self.messages[index:] = [{"role": "user", "content": text}]
        self.speech = Speech(self.engine, self.messages)
        return self.speech.stream

    def stop(self) -> None:
        if self.speech:
            self.speech.stream.cancel()

    def close(self) -> None:
        self.stop()
        self.engine.close_session(self.session.key)
