"""Who is here, and who has to leave when there are too many."""

import pytest

from chatpage import sessions
from chatpage.sessions import Sessions


def test_the_session_that_was_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    here = Sessions("system")
    first, second = here.open()[0], here.open()[0]
    here.use(first.key)
    _, crowded = here.open()
    assert crowded == second.key


def test_a_view_token_outlives_its_session_but_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 1)
    here = Sessions("system")
    session = here.open()[0]
    opened = here.close(session.key)
    assert opened is not None
    assert here.seen_by(session.view_token) == (opened.id, None)
    assert here.close(session.key) is None
    other = here.open()[0]
    here.close(other.key)
    assert here.seen_by(session.view_token) is None, "only the last ones are remembered"
    assert here.seen_by(session.key) is None, "a key is no view token"


def test_domains_part_sessions_unless_all_is_shared() -> None:
    private, public = Sessions("system"), Sessions("all")
    assert len({private.passing(None).domain for _ in range(3)}) == 3
    assert private.passing("me").domain == private.passing("me").domain != private.passing("you").domain
    assert {public.passing(None).domain, public.passing("me").domain} == {"all"}
