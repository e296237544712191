"""An engine that only pretends: it says what a test tells it to say, word by word, with no model and no cache.

It follows the parts of `Engine` and `Conversation` that the page relies on, so the page's own behaviour (what it does
with hostile text, with errors, while the engine loads) is tested apart from the engine.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from chatpage.errors import Busy, RequestError, Unavailable
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta

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
    return f"You said: {text}. " + "A block is a fixed number of slots. " * 8


@dataclass
class FakeEngine:
    """`reply` makes the answer of a message, `delay` is the time between two words in seconds."""

    reply: Callable[[str], str] = echo
    delay: float = 0.03
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


class FakeStream:
    """Words of one answer; ends with a `done` delta, early after `cancel`."""

    def __init__(self, engine: FakeEngine, messages: list[dict[str, str]]) -> None:
        self.cancelled = False
        self._deltas = self._speak(engine, messages)

    async def _speak(self, engine: FakeEngine, messages: list[dict[str, str]]) -> AsyncIterator[Delta]:
        words = re.findall(r"\S+\s*|\s+", engine.reply(messages[-1]["content"]))
        prompt = 90 + 12 * len(messages)
        yield Delta("queued", prompt_tokens=prompt)
        yield Delta("prefill", prompt_tokens=prompt, cached_tokens=83, computed_tokens=83)
        await asyncio.sleep(engine.delay * 2)
        messages.append({"role": "assistant", "content": ""})
        said = 0
        for said, word in enumerate(words, start=1):
            if self.cancelled:
                break
            messages[-1]["content"] += word
            yield Delta("decode", word, (said,), prompt, 83, prompt, said)
            await asyncio.sleep(engine.delay)
        reason = "abort" if self.cancelled else "stop"
        yield Delta("done", "", (), prompt, 83, prompt, said, finish_reason=reason)

    def cancel(self) -> None:
        self.cancelled = True

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Delta:
        return await anext(self._deltas)

    async def aclose(self) -> None:
        self.cancel()


class FakeConversation:
    def __init__(self, engine: FakeEngine, system_prompt: str | None = None) -> None:
        self.engine = engine
        self.system_prompt = system_prompt
        self.session = engine.open_session()
        self.messages: list[dict[str, str]] = []
        self.stream: FakeStream | None = None
        self.spoken_until = 0.0

    @property
    def busy(self) -> bool:
        last = self.messages[-1]["role"] if self.messages else "assistant"
        return time.monotonic() < self.spoken_until and not (self.stream and self.stream.cancelled and last)

    def say(self, text: str, params: SamplingParams) -> FakeStream:
        if self.busy:
            raise RequestError("An answer is still being written; stop it or wait for its end.")
        if self.engine.refuse:
            raise self.engine.refuse
        if len(text) > 20_000:
            raise RequestError(f"The message has {len(text)} characters; at most 20000 are allowed.")
        self.messages.append({"role": "user", "content": text})
        words = len(re.findall(r"\S+\s*|\s+", self.engine.reply(text)))
        self.spoken_until = time.monotonic() + self.engine.delay * (words + 2)
        self.stream = FakeStream(self.engine, self.messages)
        return self.stream

    def regenerate(self, params: SamplingParams) -> FakeStream:
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return self.edit(last, self.messages[last]["content"], params)

    def edit(self, index: int, text: str, params: SamplingParams) -> FakeStream:
        if self.busy:
            raise RequestError("An answer is still being written; stop it or wait for its end.")
        del self.messages[index:]
        return self.say(text, params)

    def stop(self) -> None:
        if self.stream:
            self.stream.cancel()

    def clear(self) -> None:
        self.stop()
        self.messages = []

    def close(self) -> None:
        self.stop()
        self.engine.close_session(self.session.key)


FULL = Busy("64 requests wait already; try again in a moment.")
