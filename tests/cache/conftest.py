"""A pool, and the shortest way to let a sequence compute in it."""

from collections.abc import Callable, Hashable, Sequence

import pytest

from chatpage.cache.pool import BlockPool
from chatpage.cache.table import BlockTable
from chatpage.events import Event, EventLog


class Cache:
    """A pool and its tables. `compute` does what a turn does: find, append the rest, publish."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.events = EventLog()
        self.heard: list[Event] = []
        self.events.listeners.append(self.heard.append)
        self.pool = BlockPool(num_blocks, block_size, self.events)
        self.tables: list[BlockTable] = []
        self.found = 0  # tokens, by the last `compute`

    def table(self, domain: Hashable = "a", system_tokens: int = 0) -> BlockTable:
        table = BlockTable(self.pool, len(self.tables) + 1, domain, system_tokens)
        self.tables.append(table)
        return table

    def compute(
        self, tokens: Sequence[int], domain: Hashable = "a", system_tokens: int = 0, *, tail: bool = True
    ) -> BlockTable:
        table = self.table(domain, system_tokens)
        self.found = table.find(tokens)
        if self.found < len(tokens):
            table.append(len(tokens) - self.found)
        table.publish(tokens, len(tokens), tail=tail)
        self.check()
        return table

    def pin(self, tokens: Sequence[int], name: str = "tutor") -> list[int]:
        """Compute a system prompt and pin it, as the engine does at its start. Returns its blocks."""
        table = self.compute(tokens, "the server", len(tokens))
        blocks = list(table.blocks)
        for logical, block in enumerate(blocks):
            self.pool.pin(block, logical=logical, at=len(tokens), name=name)
        table.release()
        self.check()
        return blocks

    def kinds(self, kind: str) -> int:
        """How many events of a kind there were."""
        return sum(event.kind == kind for event in self.heard)

    def check(self) -> None:
        self.pool.check(self.tables)


@pytest.fixture
def make() -> Callable[[int, int], Cache]:
    return Cache
