"""The chats of the tabs that show the page."""

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.errors import RequestError, Unavailable

MAX_TABS = 10_000
MAX_CHATS = 8  # of one tab
KEEP_TEXT = 600.0  # seconds that the text of a closed tab is kept


@dataclass(eq=False, slots=True)
class Chat:
    """One chat of a tab.

    Attributes:
        number: what the tab calls it.
        status: what was said last about how it is doing.
    """

    number: int
    conversation: Conversation
    status: str = "Ready"


class Tab:
    """The chats of one browser tab, one of which is shown. The others go on meanwhile.

    Attributes:
        secret: by this the tab gets its chats back after it was loaded again.
    """

    def __init__(self, conversation: Conversation) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.shown = Chat(1, conversation)
        self.chats = [self.shown]
        self._begun = 1

    def begin_anew(self, conversation: Conversation) -> None:
        """Put a new conversation in place of the chat that is shown."""
        self.shown.conversation.close()
        chat = Chat(self.shown.number, conversation)
        self.chats[self.chats.index(self.shown)] = chat
        self.shown = chat

    def fork(self, index: int) -> None:
        """Show a second chat, which begins with everything up to message `index` of this one.

        Raises:
            RequestError: the tab has too many chats, there is no such message, or it is still being written.
        """
        if len(self.chats) >= MAX_CHATS:
            raise RequestError(f"This tab has {MAX_CHATS} chats, which is the most; close one of them first.")
        origin, fork = self.shown, self.shown.conversation.fork(index)
        self._begun += 1
        said = f"Forked from chat {origin.number} · with its first message it takes the blocks that both share"
        self.shown = Chat(self._begun, fork, said)
        self.chats.append(self.shown)

    def show(self, number: int) -> None:
        """Show another chat.

        Raises:
            RequestError: there is no such chat.
        """
        self.shown = self._numbered(number)

    def close(self, number: int) -> None:
        """Close one of several chats, and give its blocks back.

        Raises:
            RequestError: there is no such chat, or no other one.
        """
        chat = self._numbered(number)
        if len(self.chats) == 1:
            raise RequestError("This is the only chat; New chat begins it anew.")
        place = self.chats.index(chat)
        self.chats.remove(chat)
        chat.conversation.close()
        if chat is self.shown:
            self.shown = self.chats[max(0, place - 1)]

    def rest(self) -> None:
        """Stop whatever runs, and give all blocks back. What was said stays."""
        for chat in self.chats:
            chat.conversation.close()

    def wake(self) -> None:
        """Go on after `rest`. The chats find one another's blocks again."""
        first, *others = [chat.conversation for chat in self.chats]
        first.reopen()
        for conversation in others:
            conversation.reopen(first.session)

    def _numbered(self, number: int) -> Chat:
        chat = next((chat for chat in self.chats if chat.number == number), None)
        if chat is None:
            raise RequestError(f"Chat {number} is not here any more.")
        return chat


class Visitors:
    """Who is here: the browser tabs that show the page.

    A tab that is closed gives back its blocks at once. What was said in it is kept for a while, since a tab may only
    have lost its connection or be loaded again, and come back. The keys are Gradio's session hashes, a new one for each
    load: they open things, as the tabs' secrets do, so neither is ever logged, shown or sent to anybody else.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._here: OrderedDict[str, Tab] = OrderedDict()
        self._gone: OrderedDict[str, tuple[float, Tab]] = OrderedDict()

    def find(self, key: str) -> Tab | None:
        """The tab with this key, also if it was away."""
        if key in self._gone:
            self._return(key, key)
        return self._here.get(key)

    def peek(self, key: str) -> Tab | None:
        """The tab with this key while it is open."""
        return self._here.get(key)

    def has(self, secret: str) -> bool:
        """Whether the tab with this secret is open."""
        return any(tab.secret == secret for tab in self._here.values())

    def come_back(self, key: str, secret: str) -> Tab | None:
        """The closed tab with this secret, which is open again under another key. None where it is not known."""
        self._forget()
        old = next((key for key, (_, tab) in self._gone.items() if tab.secret == secret), None)
        return None if old is None else self._return(old, key)

    def open(self, key: str, system_prompt: str | None) -> Tab:
        """Begin a conversation in this tab, in place of the one that it shows.

        Raises:
            Unavailable: the engine is not ready.
        """
        if self._engine.status != "ready":
            raise Unavailable(self._engine.detail)
        self._forget()
        conversation = Conversation(self._engine, system_prompt)
        if tab := self.find(key):
            tab.begin_anew(conversation)
            return tab
        return self._enter(key, Tab(conversation))

    def leave(self, key: str) -> None:
        """The tab is gone, or seems so: stop what runs for it and give back its blocks."""
        if tab := self._here.pop(key, None):
            tab.rest()
            self._gone[key] = time.monotonic(), tab
        self._forget()

    def _enter(self, key: str, tab: Tab) -> Tab:
        if len(self._here) >= MAX_TABS:
            self.leave(next(iter(self._here)))
        self._here[key] = tab
        return tab

    def _return(self, old: str, key: str) -> Tab:
        tab = self._gone.pop(old)[1]
        tab.wake()
        return self._enter(key, tab)

    def _forget(self) -> None:
        while self._gone and next(iter(self._gone.values()))[0] < time.monotonic() - KEEP_TEXT:
            self._gone.popitem(last=False)
