"""Who is here: open sessions, by the secrets that open them."""

import hashlib
import hmac
import itertools
import secrets
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from chatpage.schedule.session import Session

MAX_SESSIONS = 10_000  # open at once; beyond it the one that was used longest ago is closed


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


class Sessions:
    """All open sessions, and which sharing domain each belongs to. May be called from any thread.

    Args:
        sharing: `system` and `off` give each session a domain of its own, `all` puts everybody into one.
    """

    def __init__(self, sharing: str) -> None:
        self._sharing = sharing
        self._boot_key = secrets.token_bytes(32)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._by_key: OrderedDict[str, Session] = OrderedDict()  # used longest ago first
        self._keys: dict[str, str] = {}  # by view token
        self._view_tokens: dict[str, str] = {}  # by key
        self._closed: OrderedDict[str, int] = OrderedDict()  # by view token, of the sessions closed last

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def open(self, like: str | None = None) -> tuple[OpenSession, str | None]:
        """A new session, and the key of the one that must be closed for it, if there are too many.

        Args:
            like: key of another session of the same visitor, whose domain it shares while that one is open.
        """
        key, view_token = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        with self._lock:
            origin = self._by_key.get(like) if like is not None else None
            session = Session(next(self._ids), origin.domain if origin else self._domain(None))
            crowded = next(iter(self._by_key)) if len(self._by_key) >= MAX_SESSIONS else None
            self._by_key[key], self._keys[view_token], self._view_tokens[key] = session, key, view_token
        return OpenSession(key, view_token, session.id), crowded

    def close(self, key: str) -> Session | None:
        """Forget a session, but for its view token. None where it is not open."""
        with self._lock:
            session = self._by_key.pop(key, None)
            if session is not None:
                view_token = self._view_tokens.pop(key)
                del self._keys[view_token]
                self._closed[view_token] = session.id
                if len(self._closed) > MAX_SESSIONS:
                    self._closed.popitem(last=False)
        return session

    def use(self, key: str) -> Session | None:
        """The session that this key opens, which is in use now."""
        with self._lock:
            if key in self._by_key:
                self._by_key.move_to_end(key)
            return self._by_key.get(key)

    def seen_by(self, view_token: str) -> tuple[int, Session | None] | None:
        """The session whose owner has this view token: its pseudonym, and itself while it is open."""
        with self._lock:
            if view_token in self._keys:
                session = self._by_key[self._keys[view_token]]
                return session.id, session
            if view_token in self._closed:
                return self._closed[view_token], None
        return None

    def passing(self, owner: str | None) -> Session:
        """A session for one request, which leaves when it ends. Requests of one owner share a domain."""
        return Session(next(self._ids), self._domain(owner), keeps=False)

    def _domain(self, owner: str | None) -> Hashable:
        if self._sharing == "all":
            return "all"
        if owner is None:
            return secrets.token_bytes(16)
        return hmac.digest(self._boot_key, owner.encode(), hashlib.sha256)
