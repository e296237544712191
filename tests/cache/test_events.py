"""The event log, the snapshot that events add up to, and its form on the wire."""

import base64
import struct
from typing import Any

import pytest

from chatpage.events import COUNTERS, FREE, IDLE, USED, Event, EventLog, Snapshot, runs
from tests.cache.conftest import Cache

# The fields of each kind, from the table at the top of events.py. `reason` and `seq` are in all of them.
FIELDS = {
    "state": {"sequence", "session", "state"},
    "fork": {"sequence", "session", "parent", "at"},
    "allocate": {"block", "sequence", "logical", "ref"},
    "share": {"block", "sequence", "logical", "ref", "at"},
    "write": {"block", "sequence", "logical", "fill", "at"},
    "copy": {"block", "source", "sequence", "logical", "fill"},
    "publish": {"block", "sequence", "fill"},
    "unpublish": {"block"},
    "release": {"block", "sequence", "logical", "ref", "becomes"},
    "pin": {"block", "logical", "ref", "at", "name"},
    "evict": {"block"},
    "truncate": {"sequence", "at"},
    "preempt": {"sequence", "session"},
    "end": {"sequence"},
}


def listened() -> tuple[EventLog, list[Event]]:
    """A log, and what it has told so far."""
    log, heard = EventLog(), []
    log.listeners.append(heard.append)
    return log, heard


@pytest.fixture
def story() -> tuple[Cache, Snapshot, list[Event]]:
    """A day in a small pool in which every kind of event happens, and the snapshot from before it."""
    cache = Cache(7, 4)
    events, snapshot = cache.events, Snapshot.empty(cache.events, block_size=4, num_blocks=7, max_model_len=28)
    for sequence, session in [(1, 100), (2, 101), (4, 102)]:
        events.emit("state", "test", sequence=sequence, session=session, state="queued")
    cache.pin(range(6))
    events.emit("end", "test", sequence=1)
    first = cache.compute([*range(6), 7], "a", 6)
    fork = first.fork(3, 7, session=101)
    cache.tables.append(fork)
    fork.append(1)
    fork.release()
    first.append(1)
    events.emit("state", "test", sequence=2, session=101, state="resting")
    third = cache.compute([9] * 8, "c")
    third.release()
    third.append(16)
    events.emit("preempt", "test", sequence=4, session=102)
    third.release("preempt")
    cache.check()
    return cache, snapshot, cache.heard


# -- the log ----------------------------------------------------------------------------------------------------------


def test_listeners_hear_each_event_once_in_order() -> None:
    log, heard = listened()
    log.emit("evict", "test", block=3)
    log.emit("end", "test", sequence=1)
    assert heard == [Event(1, "evict", "test", block=3), Event(2, "end", "test", sequence=1)]


def test_each_field_of_an_event_is_what_was_told() -> None:
    log, heard = listened()
    told: dict[str, Any] = {field: field for field in Event._fields if field != "seq"}
    log.emit(**told)
    assert heard[0]._asdict() == {"seq": 1, **told}


def test_every_log_has_its_own_epoch() -> None:
    assert len({EventLog().epoch for _ in range(20)}) == 20


def test_a_field_that_no_event_has_is_refused() -> None:
    with pytest.raises(TypeError):
        EventLog().emit("evict", "test", text="hello")


# -- what is in an event ----------------------------------------------------------------------------------------------


def test_every_kind_has_the_fields_of_the_table_and_no_other(story: tuple[Cache, Snapshot, list[Event]]) -> None:
    _, _, events = story
    assert {event.kind for event in events} == set(FIELDS)
    for event in events:
        assert set(event.to_json()) == FIELDS[event.kind] | {"seq", "kind", "reason"}, event
        assert event.reason


def test_zero_is_a_value() -> None:
    event = Event(1, "release", "end", sequence=2, logical=0, block=3, ref=0, becomes="free")
    assert event.to_json() == {
        "seq": 1,
        "kind": "release",
        "reason": "end",
        "sequence": 2,
        "logical": 0,
        "block": 3,
        "ref": 0,
        "becomes": "free",
    }


# -- the snapshot -----------------------------------------------------------------------------------------------------


def test_an_event_that_is_not_the_next_one_is_refused() -> None:
    log, heard = listened()
    snapshot = Snapshot.empty(log, block_size=4, num_blocks=3)
    log.emit("state", "test", sequence=1, session=1, state="queued")
    log.emit("allocate", "test", sequence=1, logical=0, block=1, ref=1)
    first, second = heard
    with pytest.raises(ValueError, match="event 2 cannot follow event 0"):
        snapshot.apply(second)
    snapshot.apply(first)
    with pytest.raises(ValueError, match="event 1 cannot follow event 1"):
        snapshot.apply(first)
    snapshot.apply(second)
    assert (snapshot.seq, snapshot.state[1]) == (2, USED)


def test_replay_gives_the_pool(story: tuple[Cache, Snapshot, list[Event]]) -> None:
    cache, snapshot, events = story
    snapshot.apply_all(events)
    pool = cache.pool
    assert (list(snapshot.ref), list(snapshot.fill)) == (pool.ref, pool.fill)
    assert [state == USED for state in snapshot.state[1:]] == [
        pool.ref[block] > 0 or block in pool.pinned for block in range(1, 8)
    ]
    counts = snapshot.counts()
    assert (counts["free"], counts["idle"], counts["pinned"]) == (pool.free, pool.idle, 2)
    assert counts["free"] + counts["idle"] + counts["used"] == 7
    assert snapshot.sessions[101].sequences[2].table == list(cache.tables[1].blocks)
    assert snapshot.counters["copied"] == cache.kinds("copy") > 0
    assert snapshot.counters["hit_tokens"] == 6
    assert snapshot.counters["preempted"] == 1


def test_a_session_goes_with_its_last_sequence() -> None:
    log, heard = listened()
    snapshot = Snapshot.empty(log, block_size=4, num_blocks=3)
    log.emit("state", "test", sequence=1, session=9, state="decode")
    log.emit("fork", "test", sequence=2, session=9, parent=1, at=0)
    log.emit("end", "test", sequence=1)
    snapshot.apply_all(heard)
    assert list(snapshot.sessions[9].sequences) == [2]
    log.emit("end", "test", sequence=2)
    snapshot.apply(heard[-1])
    assert snapshot.sessions == {}


def test_resting_counts_blocks_that_only_resting_sessions_hold() -> None:
    cache = Cache(10, 4)
    snapshot = Snapshot.empty(cache.events, block_size=4, num_blocks=10)
    cache.events.listeners.append(snapshot.apply)
    for sequence in (1, 2):
        cache.events.emit("state", "test", sequence=sequence, session=sequence, state="decode")
    first = cache.compute(range(8))
    cache.events.emit("state", "test", sequence=1, session=1, state="resting")
    assert (snapshot.counts()["resting"], snapshot.counts()["shared"]) == (2, 0)
    cache.compute([0, 1, 2, 3, 9])
    assert (snapshot.counts()["resting"], snapshot.counts()["shared"]) == (1, 1)
    first.release()
    assert (snapshot.counts()["resting"], snapshot.counts()["shared"]) == (0, 0)


# -- the wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "short"),
    [
        ([], []),
        ([7], [7]),
        ([3, 4, 5, 9], [[3, 3], 9]),
        ([9, 3, 4, 5], [9, [3, 3]]),
        ([5, 12, 3], [5, 12, 3]),
        ([1, 2, 4, 5], [[1, 2], [4, 2]]),
        ([3, 2, 1], [3, 2, 1]),
    ],
)
def test_runs(table: list[int], short: list[int | list[int]]) -> None:
    assert runs(table) == short


def test_snapshot_on_the_wire(story: tuple[Cache, Snapshot, list[Event]]) -> None:
    cache, snapshot, events = story
    snapshot.apply_all(events)
    body = snapshot.to_json(scope="full", sharing="all")
    assert set(body) == {
        *("v", "epoch", "seq", "time", "block_size", "num_blocks", "bytes_per_block", "max_model_len"),
        *("scope", "sharing", "blocks", "counters", "pool", "system", "sessions"),
    }
    assert (body["v"], body["epoch"], body["seq"]) == (1, cache.events.epoch, cache.events.seq)
    assert (body["block_size"], body["num_blocks"], body["max_model_len"]) == (4, 7, 28)
    assert set(body["blocks"]) == {"free", "idle", "used", "shared", "pinned", "resting"}
    assert set(body["counters"]) == set(COUNTERS)
    [system] = body["system"]
    assert (system["name"], system["tokens"], system["table"]) == ("tutor", 6, [[1, 2]])
    session = next(session for session in body["sessions"] if session["id"] == 101)
    [sequence, *forks] = session["sequences"]
    table = runs(cache.tables[1].blocks)
    assert sequence == {"id": 2, "state": "resting", "parent": None, "at": None, "tokens": 8, "table": table}
    assert session["state"] == ("queued" if forks else "resting"), "the foremost of its sequences' states"


def test_pool_on_the_wire_is_one_entry_a_block_without_the_null_block() -> None:
    log, heard = listened()
    snapshot = Snapshot.empty(log, block_size=4, num_blocks=3)
    log.emit("state", "test", sequence=1, session=1, state="decode")
    log.emit("allocate", "test", sequence=1, logical=0, block=2, ref=1)
    log.emit("share", "test", sequence=1, logical=0, block=2, ref=258, at=3)
    log.emit("write", "test", sequence=1, logical=0, block=2, fill=3, at=3)
    log.emit("allocate", "test", sequence=1, logical=1, block=3, ref=1)
    log.emit("release", "test", sequence=1, logical=1, block=3, ref=0, becomes="idle")
    snapshot.apply_all(heard)
    pool = {key: base64.b64decode(text) for key, text in snapshot.to_json(scope="full", sharing="all")["pool"].items()}
    assert list(pool["state"]) == [FREE, USED, IDLE]
    assert struct.unpack("<3H", pool["ref"]) == (0, 258, 0)
    assert list(pool["fill"]) == [0, 3, 0]
