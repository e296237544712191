"""Print logs of the real block pool as JSON, for model.test.mjs.

Each log: `{name, snapshots, events}`; `snapshots` are bodies of `GET /kv/snapshot`, the first one before every event,
`events` as they are on the wire. Random, but the same every time.
"""

import copy
import json
import random
import sys
from typing import Any

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.table import BlockTable
from chatpage.events import Event, EventLog, Snapshot

SYSTEM = tuple(range(1, 38))


class Script:
    """Sessions that say, stop, fork, rewind and leave, in an order that a seed decides."""

    def __init__(self, *, num_blocks: int, block_size: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.log = EventLog()
        self.pool = BlockPool(num_blocks, block_size, self.log)
        self.mirror = Snapshot.empty(
            self.log, block_size=block_size, num_blocks=num_blocks, bytes_per_block=4096, max_model_len=512
        )
        self.events: list[Event] = []
        self.log.listeners += [self.events.append, self.mirror.apply]
        self.snapshots = [self.snapshot()]
        self.tables: dict[int, tuple[int, BlockTable, list[int]]] = {}  # sequence -> session, table, tokens
        self.next = 1

    def snapshot(self) -> dict[str, Any]:
        return copy.deepcopy(self.mirror.to_json(scope="full", sharing="all"))

    def pin_system(self) -> None:
        self.log.emit("state", "start", sequence=0, session=0, state="prefill")
        table = BlockTable(self.pool, 0, "system", len(SYSTEM))
        table.append(len(SYSTEM))
        table.publish(SYSTEM, len(SYSTEM), tail=True)
        for logical, block in enumerate(table.blocks):
            self.pool.pin(block, logical=logical, at=len(SYSTEM), name="default")
        table.release()
        self.log.emit("end", "end", sequence=0)

    def arrive(self) -> None:
        sequence = session = self.next
        self.next += 1
        self.log.emit("state", "arrival", sequence=sequence, session=session, state="queued")
        table = BlockTable(self.pool, sequence, session % 3, len(SYSTEM))
        tokens = [*SYSTEM, *(self.random.randrange(50, 53) for _ in range(self.random.randrange(1, 40)))]
        self.tables[sequence] = (session, table, tokens)
        table.find(tokens[:-1])
        self.grow(sequence, len(tokens) - table.length)

    def grow(self, sequence: int, more: int) -> None:
        session, table, tokens = self.tables[sequence]
        tokens += [self.random.randrange(50, 53) for _ in range(table.length + more - len(tokens))]
        try:
            table.append(more)
        except PoolFull:
            self.log.emit("preempt", "pool is full", sequence=sequence, session=session)
            table.release("preempted")
            return
        state = self.random.choice(["prefill", "decode", "resting"])
        self.log.emit("state", "step", sequence=sequence, session=session, state=state)
        table.publish(tokens, table.length, tail=state == "resting")

    def fork(self, sequence: int) -> None:
        session, table, tokens = self.tables[sequence]
        child, self.next = self.next, self.next + 1
        self.tables[child] = (
            session,
            table.fork(child, self.random.randrange(table.length + 1), session=session),
            tokens[:],
        )

    def rewind(self, sequence: int) -> None:
        _, table, tokens = self.tables[sequence]
        table.truncate(self.random.randrange(table.length + 1))
        del tokens[table.length :]

    def leave(self, sequence: int) -> None:
        _, table, _ = self.tables.pop(sequence)
        table.release("end")
        self.log.emit("end", "end", sequence=sequence)

    def play(self, steps: int) -> None:
        self.pin_system()
        for step in range(steps):
            self._act()
            if step % (steps // 4) == 0:
                self.snapshots.append(self.snapshot())
        self.snapshots.append(self.snapshot())

    def _act(self) -> None:
        if len(self.tables) < 3:
            return self.arrive()
        sequence = self.random.choice(list(self.tables))
        action = self.random.choices(["grow", "arrive", "fork", "rewind", "leave"], [8, 2, 1, 1, 2])[0]
        if action == "grow":
            return self.grow(sequence, self.random.randrange(1, 12))
        if action == "arrive":
            return self.arrive()
        return getattr(self, action)(sequence)


def record(name: str, **sizes: int) -> dict[str, Any]:
    steps = sizes.pop("steps")
    script = Script(**sizes)
    script.play(steps)
    return {"name": name, "snapshots": script.snapshots, "events": [event.to_json() for event in script.events]}


if __name__ == "__main__":
    logs = [
        record("room for all", num_blocks=500, block_size=16, seed=1, steps=120),
        record("a pool that is too small", num_blocks=40, block_size=8, seed=2, steps=300),
        record("blocks of one slot", num_blocks=300, block_size=1, seed=3, steps=60),
    ]
    json.dump(logs, sys.stdout)
