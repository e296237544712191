"""The conversations of the tabs that show the page."""

import time
from collections import OrderedDict

from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.errors import Unavailable

MAX_CONVERSATIONS = 10_000
KEEP_TEXT = 600.0  # seconds that the text of a closed tab is kept


class Visitors:
    """Who is here: one conversation a browser tab.

    A tab that is closed gives back its blocks at once. What was said in it is kept for a while, since a tab may only
    have lost its connection, and come back. The keys are Gradio's session hashes: they open things, so they are never
    logged, shown or sent anywhere.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._here: OrderedDict[str, Conversation] = OrderedDict()
        self._gone: OrderedDict[str, tuple[float, Conversation]] = OrderedDict()

    def find(self, key: str) -> Conversation | None:
        """The conversation of this tab, also if the tab was away."""
        if key in self._gone:
            self._here[key] = self._gone.pop(key)[1]
        return self._here.get(key)

    def peek(self, key: str) -> Conversation | None:
        """The conversation of this tab while it is open."""
        return self._here.get(key)

    def open(self, key: str, system_prompt: str | None) -> Conversation:
        """A new conversation for this tab, in place of the one that it had.

        Raises:
            Unavailable: the engine is not ready.
        """
        if self._engine.status != "ready":
            raise Unavailable(self._engine.detail)
        self._forget()
        if old := self.find(key):
            old.close()
        elif len(self._here) >= MAX_CONVERSATIONS:
            self.leave(next(iter(self._here)))
        self._here[key] = Conversation(self._engine, system_prompt)
        return self._here[key]

    def leave(self, key: str) -> None:
        """The tab is gone, or seems so: stop what runs for it and give back its blocks."""
        if conversation := self._here.pop(key, None):
            conversation.close()
            self._gone[key] = time.monotonic(), conversation
        self._forget()

    def _forget(self) -> None:
        while self._gone and next(iter(self._gone.values()))[0] < time.monotonic() - KEEP_TEXT:
            self._gone.popitem(last=False)
