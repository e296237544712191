"""What happens to blocks, as events; and the state that they add up to.

The cache and the scheduler call `EventLog.emit` at the very place where they change a reference count, a table or a
state. The panel, traces, metrics and tests read the same events, so none of them can disagree with the engine:
replaying the events after any `Snapshot` gives the next one.

    kind       fields                                   what it does to a Snapshot
    ---------  ---------------------------------------  -----------------------------------------------------------
    state      sequence session state                   the sequence (new: with an empty table) gets it
    fork       sequence session parent at               a sequence, empty (new: in the parent's state): `share` fills it
    allocate   block sequence logical ref               table[logical] = block; the block is used, its fill 0
    share      block sequence logical ref at            table[logical] = block; the sequence has `at` tokens
    write      block sequence logical fill at           slots [0, fill) of the block hold something; `at` tokens
    copy       block source sequence logical fill       copy-on-write: the head [0, fill) of source is now in block;
                                                        an `allocate` went before, a `release` of source comes after
    publish    block sequence fill                      frozen and findable by content
    unpublish  block                                    no longer findable; may be written again by its sole holder
    release    block sequence logical ref becomes       one reference fewer; the block is `used`, `idle` or `free` now
    pin        block logical ref at name                part of the system prompt `name` of `at` tokens; never evicted
    evict      block                                    idle -> free: its content is gone
    truncate   sequence at                              the table is cut to `at` tokens; `release` events follow
    preempt    sequence session                         the sequence lost its blocks (a `truncate` to 0 follows)
    end        sequence                                 the sequence is gone, and its session with the last one

`ref` is always the count after the event. Every event also has `seq`, strictly increasing by one, and a `reason`.
No event holds text, token ids, a hash, or an id that opens anything: `session` is a pseudonym.
"""

import base64
import secrets
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

FREE, IDLE, USED = 0, 1, 2
BLOCK_STATES = {"free": FREE, "idle": IDLE, "used": USED}
FOREMOST = ("decode", "prefill", "preempted", "queued", "resting")  # what a session does, if its sequences differ


class Event(NamedTuple):
    """One change. Fields that do not apply to its kind are -1 or empty (see the table above)."""

    seq: int
    kind: str
    reason: str
    sequence: int = -1
    session: int = -1
    logical: int = -1
    block: int = -1
    source: int = -1
    ref: int = -1
    fill: int = -1
    parent: int = -1
    at: int = -1
    state: str = ""
    becomes: str = ""
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields that apply."""
        return {key: value for key, value in self._asdict().items() if value not in (-1, "")}


class EventLog:
    """Numbers the events and hands each to whoever listens.

    Not thread-safe: it belongs to the thread that owns the cache. Listeners are called on that thread, at once.
    """

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.seq = 0
        self.listeners: list[Callable[[Event], None]] = []

    def emit(
        self,
        kind: str,
        reason: str,
        sequence: int = -1,
        session: int = -1,
        logical: int = -1,
        block: int = -1,
        source: int = -1,
        ref: int = -1,
        fill: int = -1,
        parent: int = -1,
        at: int = -1,
        state: str = "",
        becomes: str = "",
        name: str = "",
    ) -> None:
        """Tell of one event. The arguments are the other fields of `Event`, in its order."""
        self.seq = seq = self.seq + 1
        fields = (seq, kind, reason, sequence, session, logical, block, source, ref, fill, parent, at,
                  state, becomes, name)  # fmt: skip
        event = tuple.__new__(Event, fields)  # the constructor takes twice as long, and every token drawn is an event
        for listener in self.listeners:
            listener(event)


@dataclass(slots=True)
class SequenceView:
    """A sequence as the outside sees it: its block table and how many tokens have a slot."""

    id: int
    session: int
    state: str
    parent: int | None = None
    at: int | None = None
    tokens: int = 0
    table: list[int] = field(default_factory=list)


@dataclass(slots=True)
class SessionView:
    """A session, which has at least one sequence."""

    id: int
    sequences: dict[int, SequenceView] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The foremost of its sequences' states."""
        return min((sequence.state for sequence in self.sequences.values()), key=FOREMOST.index)


@dataclass(slots=True)
class SystemView:
    name: str
    tokens: int
    table: list[int] = field(default_factory=list)


COUNTERS = ("allocated", "freed", "copied", "published", "evicted", "preempted", "hit_tokens")


@dataclass
class Snapshot:
    """The whole visible state of the cache after event number `seq`; `apply` moves it on by one event.

    `state`, `ref` and `fill` have `num_blocks + 1` entries: index 0 is the null block, which is never shown.
    """

    epoch: str
    seq: int
    block_size: int
    num_blocks: int
    bytes_per_block: int
    max_model_len: int
    state: bytearray
    ref: array  # of unsigned 16-bit
    fill: bytearray
    system: dict[str, SystemView] = field(default_factory=dict)
    sessions: dict[int, SessionView] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    _sequences: dict[int, SequenceView] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(
        cls, log: EventLog, *, block_size: int, num_blocks: int, bytes_per_block: int = 0, max_model_len: int = 0
    ) -> "Snapshot":
        """The state before anything happened: every block free, nobody there."""
        entries = num_blocks + 1
        return cls(
            epoch=log.epoch,
            seq=log.seq,
            block_size=block_size,
            num_blocks=num_blocks,
            bytes_per_block=bytes_per_block,
            max_model_len=max_model_len,
            state=bytearray(entries),
            ref=array("H", bytes(2 * entries)),
            fill=bytearray(entries),
        )

    def apply(self, event: Event) -> None:
        """Move on by one event.

        Raises:
            ValueError: the event is not the next one.
        """
        if event.seq != self.seq + 1:
            raise ValueError(f"event {event.seq} cannot follow event {self.seq}")
        self.seq = event.seq
        _move(event.kind)(self, event)

    def apply_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.apply(event)

    # -- one method a kind; the table at the top of this file says what each does ---------------------------------

    def _place(self, event: Event) -> SequenceView:
        sequence = self._sequences[event.sequence]
        if event.logical == len(sequence.table):
            sequence.table.append(event.block)
        else:
            sequence.table[event.logical] = event.block
        return sequence

    def _enter(self, sequence: SequenceView) -> None:
        self.sessions.setdefault(sequence.session, SessionView(sequence.session)).sequences[sequence.id] = sequence
        self._sequences[sequence.id] = sequence

    def _state(self, event: Event) -> None:
        if event.sequence in self._sequences:
            self._sequences[event.sequence].state = event.state
        else:
            self._enter(SequenceView(event.sequence, event.session, event.state))

    def _fork(self, event: Event) -> None:
        like = self._sequences.get(event.sequence) or self._sequences[event.parent]
        self._enter(SequenceView(event.sequence, event.session, like.state, event.parent, event.at))

    def _allocate(self, event: Event) -> None:
        self._place(event)
        self.state[event.block], self.ref[event.block], self.fill[event.block] = USED, event.ref, 0
        self.counters["allocated"] += 1

    def _share(self, event: Event) -> None:
        sequence = self._place(event)
        if event.reason == "prefix hit":
            self.counters["hit_tokens"] += event.at - sequence.tokens
        sequence.tokens = event.at
        self.state[event.block], self.ref[event.block] = USED, event.ref

    def _write(self, event: Event) -> None:
        self._sequences[event.sequence].tokens = event.at
        self.fill[event.block] = event.fill

    def _copy(self, event: Event) -> None:
        self.fill[event.block] = event.fill
        self.counters["copied"] += 1

    def _publish(self, event: Event) -> None:
        self.counters["published"] += 1

    def _unpublish(self, event: Event) -> None:
        pass  # being findable is not visible from outside

    def _release(self, event: Event) -> None:
        self.ref[event.block] = event.ref
        self.state[event.block] = BLOCK_STATES[event.becomes]
        if event.becomes == "free":
            self._set_free(event.block)

    def _pin(self, event: Event) -> None:
        self.state[event.block], self.ref[event.block] = USED, event.ref
        system = self.system.setdefault(event.name, SystemView(event.name, event.at))
        system.table.append(event.block)

    def _evict(self, event: Event) -> None:
        self._set_free(event.block)
        self.counters["evicted"] += 1

    def _truncate(self, event: Event) -> None:
        sequence = self._sequences[event.sequence]
        sequence.tokens = event.at
        del sequence.table[-(-event.at // self.block_size) :]

    def _preempt(self, event: Event) -> None:
        self._sequences[event.sequence].state = "preempted"
        self.counters["preempted"] += 1

    def _end(self, event: Event) -> None:
        session = self.sessions[self._sequences.pop(event.sequence).session]
        del session.sequences[event.sequence]
        if not session.sequences:
            del self.sessions[session.id]

    def _set_free(self, block: int) -> None:
        self.state[block], self.ref[block], self.fill[block] = FREE, 0, 0
        self.counters["freed"] += 1

    # -- what is counted, and the form on the wire ----------------------------------------------------------------

    def pinned(self) -> set[int]:
        return {block for system in self.system.values() for block in system.table}

    def counts(self) -> dict[str, int]:
        """Numbers of blocks. `free + idle + used = num_blocks`; shared, pinned and resting are parts of used."""
        states = self.state[1:]
        held = [0] * (self.num_blocks + 1)
        for sequence in self._sequences.values():
            if sequence.state == "resting":
                for block in sequence.table:
                    held[block] += 1
        pinned = self.pinned()
        resting = sum(1 for block, n in enumerate(held) if n and n == self.ref[block] and block not in pinned)
        return {
            "free": states.count(FREE),
            "idle": states.count(IDLE),
            "used": states.count(USED),
            "shared": sum(1 for ref in self.ref if ref >= 2),
            "pinned": len(pinned),
            "resting": resting,
        }

    def to_json(self, *, scope: str, sharing: str) -> dict[str, Any]:
        """The body of `GET /kv/snapshot` (interfaces.md)."""
        return {
            "v": 1,
            "epoch": self.epoch,
            "seq": self.seq,
            "time": time.time(),
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "bytes_per_block": self.bytes_per_block,
            "max_model_len": self.max_model_len,
            "scope": scope,
            "sharing": sharing,
            "blocks": self.counts(),
            "counters": dict(self.counters),
            "pool": {
                "state": _base64(self.state[1:]),
                "ref": _base64(_little_endian(self.ref[1:])),
                "fill": _base64(self.fill[1:]),
            },
            "system": [{"name": s.name, "tokens": s.tokens, "table": runs(s.table)} for s in self.system.values()],
            "sessions": [
                {
                    "id": session.id,
                    "state": session.state,
                    "tokens": sum(s.tokens for s in session.sequences.values()),
                    "sequences": [
                        {
                            "id": s.id,
                            "state": s.state,
                            "parent": s.parent,
                            "at": s.at,
                            "tokens": s.tokens,
                            "table": runs(s.table),
                        }
                        for s in session.sequences.values()
                    ],
                }
                for session in self.sessions.values()
            ],
        }


@cache
def _move(kind: str) -> Callable[[Snapshot, Event], None]:
    """The method of a kind of events."""
    return getattr(Snapshot, f"_{kind}")


def runs(table: list[int]) -> list[int | list[int]]:
    """A block table with neighbours written as [first, length]: [3, 4, 5, 9] becomes [[3, 3], 9]."""
    out: list[int | list[int]] = []
    start = 0
    for i in range(1, len(table) + 1):
        if i == len(table) or table[i] != table[i - 1] + 1:
            length = i - start
            out.append([table[start], length] if length > 1 else table[start])
            start = i
    return out


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _little_endian(values: array) -> bytes:
    if values.itemsize != 2:  # no platform we know of
        raise TypeError("array('H') is not 16 bits wide here")
    swapped = array("H", values)
    if array("H", [1]).tobytes() != b"\x01\x00":
        swapped.byteswap()
    return swapped.tobytes()
