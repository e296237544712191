"""An engine that only pretends: it says what a test tells it to say, word by word, with no model and no cache.

It follows the parts of `Engine` that the page and its conversations rely on, so the page's own behaviour (what it does
with hostile text, with errors, while the engine loads) is tested apart from the engine.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from chatpage.errors import Unavailable
from chatpage.schedule.beam import Beam, Finished
from chatpage.schedule.request import Delta, Prompt, Request
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


class Words:
    """A tokenizer that makes a token of each word that it is given."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def add(self, word: str) -> int:
        self._words.append(word)
        return len(self._words) - 1

    def decode(self, ids: list[int], **options: bool) -> str:
        return "".join(self._words[token] for token in ids)


def echo(text: str) -> str:
    return f"You said: {text}. " + "A block is a fixed number of slots. " * 4


@dataclass
class FakeEngine:
    """`reply` makes the answer of a message, `delay` is the time between two words in seconds.

    A second reply is the same text, and so are the beams of a search, which do not part.
    """

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
    asked: list[Request] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    speeches: list["Speech"] = field(default_factory=list)
    messages: list[list[Any]] = field(default_factory=list)
    core: Any = field(default_factory=lambda: SimpleNamespace(tokenizer=Words(), stop_token_ids=frozenset()))
    template: Any = field(default_factory=lambda: SimpleNamespace(follow_up=lambda messages: None))

    def open_session(self, like: Session | None = None) -> Session:
        if self.status != "ready":
            raise Unavailable(self.detail)
        session = Session(secrets.token_hex(8), secrets.token_hex(8), len(self.sessions) + 1)
        self.sessions[session.key] = session
        return session

    def close_session(self, key: str) -> None:
        if self.sessions.pop(key, None):
            for speech in self.speeches:
                if speech.request.session == key:
                    speech.cancelled = True

    def has_session(self, key: str) -> bool:
        return key in self.sessions

    def require_size(self, messages: list[Any]) -> None:
        pass

    def prompt(self, messages: list[Any]) -> Prompt:
        """A prompt of one token: where to find what was said."""
        self.messages.append(messages)
        return Prompt((len(self.messages) - 1,))

    def streams(self, request: Request, listeners: Sequence[Callable[[Delta], None]]) -> list[Stream]:
        if self.refuse:
            raise self.refuse
        messages = self.messages[request.prompt.tokens[0]]
        self.asked.append(request)
        self.prompts.append(messages[0]["content"] if messages[0]["role"] == "system" else None)
        speeches = [Speech(self, request, messages, listener) for listener in listeners]
        self.speeches += speeches
        return [speech.stream for speech in speeches]

    def keep_reply(self, key: str, choice: int) -> None:
        self.kept.append(choice)
        turn = [speech for speech in self.speeches if speech.request is self.asked[-1]]
        for speech in turn[:choice] + turn[choice + 1 :]:
            speech.cancelled = True


class Speech:
    """One answer, spoken into a stream word by word; it ends early when the stream is cancelled."""

    def __init__(
        self, engine: FakeEngine, request: Request, messages: list[Any], listener: Callable[[Delta], None]
    ) -> None:
        self.engine = engine
        self.request = request
        self.cancelled = False
        self.stream = Stream(self._cancel, listener)
        self._messages = messages
        self._words: list[int] = []
        self._task = asyncio.create_task(self._speak())

    def _cancel(self) -> None:
        self.cancelled = True

    def _put(self, state: Any, text: str = "", words: Sequence[int] = (), computed: int = 83, **more: Any) -> None:
        """Tell `text`, which is these words."""
        prompt_tokens = 90 + 12 * len(self._messages)
        self.stream.put(Delta(state, text, tuple(words), (), prompt_tokens, 83, computed, len(self._words), **more))
        Stream.wake([self.stream])

    async def _speak(self) -> None:
        self._put("queued", computed=0)
        await asyncio.sleep(self.engine.delay)
        self._put("prefill")
        await asyncio.sleep(self.engine.delay)
        said = ""
        for word in re.findall(r"\S+\s*|\s+", self.engine.reply(self._messages[-1]["content"])):
            if self.cancelled:
                break
            said += word
            self._words.append(self.engine.core.tokenizer.add(word))
            self._put_word(word)
            await asyncio.sleep(self.engine.delay)
        reason = "abort" if self.cancelled else "stop"
        if self.request.beams:
            self._put("done", said, self._words, finish_reason=reason, score=-0.5)
        else:
            self._put("done", finish_reason=reason)

    def _put_word(self, word: str) -> None:
        beams = self.request.beams
        if beams is None:
            self._put("decode", word, self._words[-1:])
        else:
            live = tuple(Beam(tuple(self._words), -1.5 - rank) for rank in range(beams.width))
            self._put("decode", beams=live, finished=(Finished(tuple(self._words), -0.5),))
