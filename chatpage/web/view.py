"""What one viewer may see of the cache: pure functions from states and events to states and events.

In the scope `aggregate` a viewer's own rows and the system prompts are exact, and the others' are in whole blocks:
their fills and token counts are rounded up, and a write that changes neither is left out. What a viewer sees is
numbered anew, by what is visible: with gaps, the numbers would tell how many tokens the others have written. So

    view(state after events) == view(state), moved on by what is visible of the events

and a viewer replays what it gets exactly as in the scope `full`. (There is one exception, which no viewer meets: a pin
makes a fill exact without a word. System prompts are pinned before the engine is ready.)
"""

from dataclasses import replace
from typing import Any

from chatpage.events import Event, SequenceView, SessionView, Snapshot


class Line:
    """One event as viewers see it: exactly, in whole blocks, or not at all.

    Attributes:
        owners: pseudonyms of the sessions that see it exactly or at all, where it is `hidden` from the others.
        hidden: in whole blocks nothing changes.
    """

    __slots__ = ("coarse", "exact", "hidden", "owner", "owners")

    def __init__(self, exact: Event, coarse: Event, owner: int | None, owners: tuple[int, ...], hidden: bool) -> None:
        self.exact, self.coarse = exact, coarse
        self.owner, self.owners, self.hidden = owner, owners, hidden

    def seen_by(self, viewer: int | None) -> Event | None:
        """The event for the viewer whose session this is (None: nobody's), with its number in the engine's log."""
        if self.owner is not None and viewer == self.owner:
            return self.exact
        if self.hidden and viewer not in self.owners:
            return None
        return self.coarse


class Mirror:
    """The engine's state as events tell it, with what the scope `aggregate` needs beside it.

    Attributes:
        writer: for each block, the session that wrote it last; its fill is exact for that session alone.
        common: how many events everybody has seen.
        extra: for a session, how many it has seen that are hidden from the others.
        surplus: how many prefix-hit tokens rounding up has added, for each session and (None) in all.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.owner = {s.id: session.id for session in snapshot.sessions.values() for s in session.sequences.values()}
        self.writer: list[int | None] = [None] * (snapshot.num_blocks + 1)
        for session in snapshot.sessions.values():
            for sequence in session.sequences.values():
                for block in sequence.table:
                    self.writer[block] = session.id
        self.common = 0
        self.extra: dict[int, int] = {}
        self.surplus: dict[int | None, int] = {None: 0}

    def apply(self, event: Event) -> Line:
        """Move on by one event. Returns how it is seen."""
        if event.session is not None and event.sequence is not None:
            self.owner[event.sequence] = event.session
        owner = None if event.sequence is None else self.owner.get(event.sequence)
        before = self._tokens(event) if event.kind in ("write", "share") else 0
        line = self._line(event, owner, before)
        self._count(line, before)
        self._note(event, owner)
        self.snapshot.apply(event)
        return line

    def forget(self, session: int) -> None:
        """Drop what is counted for a session that has ended and has no viewer."""
        self.extra.pop(session, None)
        self.surplus.pop(session, None)

    def number(self, viewer: int | None) -> int:
        """How many events this viewer has seen: the number of its last one."""
        return self.common + (self.extra.get(viewer, 0) if viewer is not None else 0)

    def _tokens(self, event: Event) -> int:
        """How many tokens the event's sequence has before it."""
        session = self.snapshot.sessions[self.owner[_known(event.sequence)]]
        return session.sequences[_known(event.sequence)].tokens

    def _line(self, event: Event, owner: int | None, before: int) -> Line:
        size = self.snapshot.block_size
        coarse = _in_whole_blocks(event, size)
        if event.kind != "write":
            return Line(event, coarse, owner, (), False)
        block = _known(event.block)
        same = self.snapshot.fill[block] > 0 and coarse.at == whole(before, size)
        owners = {session for session in (owner, self.writer[block]) if session is not None}
        return Line(event, coarse, owner, tuple(owners), same)

    def _count(self, line: Line, before: int) -> None:
        if not line.hidden:
            self.common += 1
        for session in line.owners if line.hidden else ():
            self.extra[session] = self.extra.get(session, 0) + 1
        event = line.exact
        if event.kind == "share" and event.reason == "prefix hit":
            rounded = _known(line.coarse.at) - whole(before, self.snapshot.block_size)
            more = rounded - (_known(event.at) - before)
            for key in {None, line.owner}:
                self.surplus[key] = self.surplus.get(key, 0) + more

    def _note(self, event: Event, owner: int | None) -> None:
        """Keep `writer` and `owner` in step with the event."""
        if event.kind in ("allocate", "write"):
            self.writer[_known(event.block)] = owner
        elif event.kind == "evict" or event.becomes == "free":
            self.writer[_known(event.block)] = None
        elif event.kind == "end":
            self.owner.pop(_known(event.sequence), None)


def aggregate(mirror: Mirror, viewer: int | None) -> Snapshot:
    """The state in whole blocks, but exact where it is the viewer's own or a system prompt's.

    What needs no change is not copied: the result is to be read at once.
    """
    snapshot, size = mirror.snapshot, mirror.snapshot.block_size
    fill = snapshot.fill.translate(bytes([0]) + bytes([size]) * 255)
    for block, writer in enumerate(mirror.writer):
        if viewer is not None and writer == viewer:
            fill[block] = snapshot.fill[block]
    for block in snapshot.pinned():
        fill[block] = snapshot.fill[block]
    rounding = mirror.surplus[None] - (mirror.surplus.get(viewer, 0) if viewer is not None else 0)
    counters = {**snapshot.counters, "hit_tokens": snapshot.counters["hit_tokens"] + rounding}
    sessions = {
        session.id: session if session.id == viewer else _rounded_session(session, size)
        for session in snapshot.sessions.values()
    }
    return replace(
        snapshot,
        epoch=epoch_of(snapshot.epoch, viewer),
        seq=mirror.number(viewer),
        fill=fill,
        sessions=sessions,
        counters=counters,
    )


def only_own(mirror: Mirror, viewer: int | None, sharing: str) -> dict[str, Any]:
    """The body of a snapshot in the scope `self`: the viewer's rows, the system prompts, and the totals."""
    seen = aggregate(mirror, viewer)
    mine = {viewer: seen.sessions[viewer]} if viewer is not None and viewer in seen.sessions else {}
    visible = seen.pinned() | {b for session in mine.values() for s in session.sequences.values() for b in s.table}
    state, fill, ref = bytearray(len(seen.state)), bytearray(len(seen.fill)), seen.ref[:]
    for block in range(len(ref)):
        if block in visible:
            state[block], fill[block] = seen.state[block], seen.fill[block]
        else:
            ref[block] = 0
    body = replace(seen, state=state, fill=fill, ref=ref, sessions=mine).to_json(scope="self", sharing=sharing)
    body["blocks"] = seen.counts()
    return body


def epoch_of(epoch: str, viewer: int | None) -> str:
    """Numbers of one viewer mean nothing to another one, so each has an epoch of its own."""
    return epoch if viewer is None else f"{epoch}.{viewer}"


def whole(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size


def _in_whole_blocks(event: Event, size: int) -> Event:
    if event.kind == "pin":
        return event  # system prompts are public
    at = None if event.at is None else whole(event.at, size)
    fill = None if event.fill is None else whole(event.fill, size)
    return event._replace(at=at, fill=fill)


def _rounded_session(session: SessionView, size: int) -> SessionView:
    sequences = {
        s.id: SequenceView(s.id, s.parent, None if s.at is None else whole(s.at, size), whole(s.tokens, size), s.table)
        for s in session.sequences.values()
    }
    return SessionView(session.id, session.state, sequences)


def _known(value: int | None) -> int:
    """A field that the event's kind always has."""
    if value is None:
        raise ValueError("the event lacks a field of its kind")
    return value
