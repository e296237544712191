"""What one viewer may see of the cache: pure functions from states and events to states and events.

In the scope `aggregate` a viewer's own rows and the system prompts are exact, and the others' are in whole blocks:
their fills and token counts are rounded up, and a write that changes neither is left out. What a viewer sees is
numbered anew, by what is visible: with gaps, the numbers would tell how many tokens the others have written. So

    view(state after events) == view(state), moved on by what is visible of the events

and a viewer replays what it gets exactly as in the scope `full`. (There is one exception, which no viewer meets: a pin
makes a fill exact without a word. System prompts are pinned before the engine is ready.)

A viewer is the pseudonym of a session; STRANGER has none.
"""

from array import array
from dataclasses import dataclass, replace
from typing import Any

from chatpage.events import Event, SessionView, Snapshot

STRANGER = -1  # also who wrote a block that nobody here has written, and who an event without a sequence belongs to


@dataclass(frozen=True, slots=True)
class Line:
    """One event as viewers see it: exactly, in whole blocks, or not at all.

    Attributes:
        exact, coarse: the event, and the event in whole blocks.
        owner: the session that it happened to, which sees it exactly.
        writer: the session that wrote the block before; for a viewer of that one the block stops being exact.
        hidden: in whole blocks nothing changes, so only those two see it.
    """

    exact: Event
    coarse: Event
    owner: int
    writer: int = STRANGER
    hidden: bool = False

    def seen_by(self, viewer: int) -> Event | None:
        """The event for this viewer, under its number in the engine's log, or None."""
        if viewer != STRANGER and viewer == self.owner:
            return self.exact
        if self.hidden and (viewer == STRANGER or viewer != self.writer):
            return None
        return self.coarse


class Mirror:
    """The engine's state as events tell it, with what the scope `aggregate` needs beside it.

    Attributes:
        owner: for each sequence its session.
        writer: for each block the session that wrote it last: its fill is exact for that one alone.
        common: how many events everybody has seen.
        extra: for a session, how many more it has seen, which are hidden from the others.
        rounding: for a session, how many prefix-hit tokens rounding up has added; for STRANGER, over all of them, less
            those before the first snapshot.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.owner: dict[int, int] = {}
        self.writer = [STRANGER] * (snapshot.num_blocks + 1)
        for session in snapshot.sessions.values():
            for sequence in session.sequences.values():
                self.owner[sequence.id] = session.id
                for block in sequence.table:
                    self.writer[block] = session.id
        self.common = 0
        self.extra: dict[int, int] = {}
        # From 0 on: whoever saw the sums of two mirrors, and knows his own hits exactly, would know those of others.
        self.rounding = {STRANGER: -snapshot.counters["hit_tokens"]}

    def apply(self, event: Event) -> Line:
        """Move on by one event. Returns how it is seen."""
        if event.kind in ("state", "fork"):
            self.owner[event.sequence] = event.session
        line = self._line(event, self.owner.get(event.sequence, STRANGER))
        self._count(line)
        self._note_writer(event, line.owner)
        self.snapshot.apply(event)
        if event.kind == "end":
            del self.owner[event.sequence]
        return line

    def forget(self, session: int) -> None:
        """Drop what is counted for a session that has ended and has no viewer."""
        self.extra.pop(session, None)
        self.rounding.pop(session, None)

    def number(self, viewer: int) -> int:
        """How many events this viewer has seen, which is the number of its last one."""
        return self.common + self.extra.get(viewer, 0)

    def _line(self, event: Event, owner: int) -> Line:
        coarse = _in_whole_blocks(event, self.snapshot.block_size)
        if event.kind != "write":
            return Line(event, coarse, owner)
        unchanged = self.snapshot.fill[event.block] > 0 and coarse.at == self._whole_tokens(event, owner)
        return Line(event, coarse, owner, self.writer[event.block], unchanged)

    def _whole_tokens(self, event: Event, owner: int) -> int:
        """How many tokens the event's sequence has before it, in whole blocks."""
        return whole(self._tokens(event, owner), self.snapshot.block_size)

    def _tokens(self, event: Event, owner: int) -> int:
        return self.snapshot.sessions[owner].sequences[event.sequence].tokens

    def _count(self, line: Line) -> None:
        event = line.exact
        if not line.hidden:
            self.common += 1
        else:
            for session in {line.owner, line.writer} - {STRANGER}:
                self.extra[session] = self.extra.get(session, 0) + 1
        if event.kind == "share" and event.reason == "prefix hit":
            found = event.at - self._tokens(event, line.owner)
            shown = line.coarse.at - self._whole_tokens(event, line.owner)
            for session in {line.owner, STRANGER}:
                self.rounding[session] = self.rounding.get(session, 0) + shown - found

    def _note_writer(self, event: Event, owner: int) -> None:
        if event.kind in ("allocate", "write"):
            self.writer[event.block] = owner
        elif event.kind == "evict" or event.becomes == "free":
            self.writer[event.block] = STRANGER


def aggregate(mirror: Mirror, viewer: int) -> Snapshot:
    """The state in whole blocks, but exact where it is the viewer's own or a system prompt's.

    What needs no change is not copied: the result is to be read at once.
    """
    snapshot, size = mirror.snapshot, mirror.snapshot.block_size
    fill = snapshot.fill.translate(bytes([0]) + bytes([size]) * 255)
    own = [block for block, writer in enumerate(mirror.writer) if writer == viewer != STRANGER]
    for block in (*own, *snapshot.pinned()):
        fill[block] = snapshot.fill[block]
    rounding = mirror.rounding[STRANGER] - (mirror.rounding.get(viewer, 0) if viewer != STRANGER else 0)
    return replace(
        snapshot,
        epoch=epoch_of(snapshot.epoch, viewer),
        seq=mirror.number(viewer),
        fill=fill,
        sessions={
            session.id: session if session.id == viewer else _in_whole_tokens(session, size)
            for session in snapshot.sessions.values()
        },
        counters={**snapshot.counters, "hit_tokens": snapshot.counters["hit_tokens"] + rounding},
    )


def only_own(mirror: Mirror, viewer: int, sharing: str) -> dict[str, Any]:
    """The body of a snapshot in the scope `self`: the viewer's rows, the system prompts, and the totals."""
    seen = aggregate(mirror, viewer)
    mine = {viewer: seen.sessions[viewer]} if viewer in seen.sessions else {}
    tables = [sequence.table for session in mine.values() for sequence in session.sequences.values()]
    state, ref, fill = bytearray(len(seen.state)), array("H", bytes(2 * len(seen.ref))), bytearray(len(seen.fill))
    for block in seen.pinned().union(*tables):
        state[block], ref[block], fill[block] = seen.state[block], seen.ref[block], seen.fill[block]
    body = replace(seen, state=state, ref=ref, fill=fill, sessions=mine).to_json(scope="self", sharing=sharing)
    return {**body, "blocks": seen.counts()}


def epoch_of(epoch: str, viewer: int) -> str:
    """One viewer's numbers mean nothing to another one, so each has an epoch of its own."""
    return epoch if viewer == STRANGER else f"{epoch}.{viewer}"


def whole(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size


def _in_whole_blocks(event: Event, size: int) -> Event:
    if event.kind == "pin" or (event.at < 0 and event.fill < 0):
        return event  # system prompts are public
    return event._replace(
        at=whole(event.at, size) if event.at >= 0 else event.at,
        fill=whole(event.fill, size) if event.fill >= 0 else event.fill,
    )


def _in_whole_tokens(session: SessionView, size: int) -> SessionView:
    sequences = {
        s.id: replace(s, at=None if s.at is None else whole(s.at, size), tokens=whole(s.tokens, size))
        for s in session.sequences.values()
    }
    return SessionView(session.id, sequences)
