"""A core without its thread, so that every step can be looked at and cut in."""

from collections.abc import Hashable, Iterable
from pathlib import Path
from random import Random
from typing import Any

from chatpage.core import Core
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt, Request
from chatpage.schedule.session import Session
from chatpage.settings import Settings
from chatpage.stream import Stream
from tests.engine.harness import SETTINGS, greedy, read

LENGTH = 14  # tokens of an answer
Tokens = tuple[int, ...]


def words(seed: int, length: int) -> Tokens:
    """Noise without special tokens."""
    return tuple(Random(seed).choices(range(10, 300), k=length))


class Desk:
    """A core, and what is asked of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.core = Core(Settings(model=str(folder), **SETTINGS | settings), lambda detail: None)
        self.sessions = 0

    @property
    def system(self) -> Tokens:
        return self.core.systems[0].tokens

    def submit(self, tokens: Tokens, domain: Hashable = None, params: SamplingParams | None = None) -> Stream:
        """Ask for what follows the system prompt and these tokens; None is a domain of its own."""
        self.sessions += 1
        session = Session(self.sessions, self.sessions if domain is None else domain, keeps=False)
        shared = 0 if self.core.sharing == "off" else len(self.system)
        stream = Stream(lambda: None)
        request = Request(Prompt((*self.system, *tokens), shared), params or greedy(LENGTH))
        self.core.submit(request, session, stream)
        return stream

    def finish(self) -> None:
        while self.core.has_work:
            self.core.step()
        assert sum(self.core.pool.ref) == 0

    def answers(self, prompts: Iterable[Tokens], domain: Hashable = None) -> list[list[int]]:
        """All of them asked at once."""
        streams = [self.submit(tokens, domain) for tokens in prompts]
        self.finish()
        return [read(stream).tokens for stream in streams]

    @property
    def counters(self) -> dict[str, int]:
        return self.core.view.counters
