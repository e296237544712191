"""The cache as simply as one can think it: what each slot holds, and which tokens each sequence has.

A key or value depends on its token *and on all tokens before it*. So a slot of the naive memory does not hold a token
but the number of a whole prefix: two slots are equal only where they end equal prefixes.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatpage.cache.pool import BlockPool
from chatpage.cache.prefix import SYSTEM, Node
from chatpage.cache.table import BlockTable
from chatpage.events import Event


@dataclass(eq=False)
class LiveSequence:
    """One sequence: its table, and the tokens that the table must hold."""

    table: BlockTable
    session: int
    tokens: list[int] = field(default_factory=list)

    @property
    def id(self) -> int:
        return self.table.sequence


class Memory:
    """What is in the slots, as written. Prefixes have numbers from 1; 0 is a slot that was never written."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.size = block_size
        self.slots = [[0] * block_size for _ in range(num_blocks + 1)]
        self._prefixes: dict[tuple[int, int], int] = {}

    def spell(self, tokens: Iterable[int], prefix: int = 0) -> list[int]:
        """The numbers of the prefixes that end in each of `tokens`, which follow the prefix of that number."""
        numbers = []
        for token in tokens:
            prefix = self._prefixes.setdefault((prefix, token), len(self._prefixes) + 1)
            numbers.append(prefix)
        return numbers

    def read(self, table: Sequence[int], length: int) -> list[int]:
        return [self.slots[table[i // self.size]][i % self.size] for i in range(length)]

    def write(self, table: Sequence[int], tokens: Sequence[int], start: int) -> list[tuple[int, int]]:
        """Write the slots of `tokens[start:]`; returns them as (block, offset)."""
        written = []
        for position, number in list(enumerate(self.spell(tokens)))[start:]:
            block, offset = table[position // self.size], position % self.size
            self.slots[block][offset] = number
            written.append((block, offset))
        return written

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks, all of them read before the first is written, as the tensors do it."""
        heads = [(target, list(self.slots[source])) for source, target in pairs]
        for target, slots in heads:
            self.slots[target] = slots


class Published:
    """Which blocks can be found, who published them, and what they held at that moment: learnt from events alone."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.content: dict[int, list[int]] = {}
        self.domain: dict[int, Hashable] = {}

    def add(self, event: Event, sequence: LiveSequence) -> None:
        assert event.block not in self.content, f"block {event.block} is published twice"
        self.content[event.block] = self.memory.slots[event.block][: event.fill]
        end = sequence.table.blocks.index(event.block) * self.memory.size + event.fill
        is_system = end <= sequence.table.system_tokens
        self.domain[event.block] = SYSTEM if is_system else sequence.table.domain

    def remove(self, block: int) -> None:
        del self.content[block], self.domain[block]


def paths(pool: BlockPool) -> list[list[Node]]:
    """Every path of the content tree, from its first block down to any of its blocks."""
    result = []
    for node in pool.tree.root.descendants():
        path = [node]
        while path[0].parent is not None and path[0].parent.block != -1:
            path.insert(0, path[0].parent)
        result.append(path)
    return result


def longest(pool: BlockPool, tokens: Sequence[int], domain: Hashable, system_tokens: int) -> tuple[int, int]:
    """How many leading tokens could be found at all, by trying every path; and how many at least must be.

    What must be found is what can be found with the system prompt's own blocks all in the domain SYSTEM: a private
    block of equal content must never hide them.
    """
    most, least = 0, 0
    for path in paths(pool):
        held, in_order = 0, True
        for node in path:
            own, end = node.domain == domain, held + len(node.tokens)
            seen = len(tokens) if own else system_tokens if node.domain == SYSTEM else 0
            common = head_in_common(node.tokens, tokens[held : min(seen, held + pool.block_size)])
            in_order = in_order and (node.domain == SYSTEM or end > system_tokens)
            held += common
            if held < end or len(node.tokens) < pool.block_size:
                break
        most = max(most, held)
        least = max(least, held if in_order else 0)
    return most, least


def head_in_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def deep_state(pool: BlockPool, sequences: Iterable[LiveSequence]) -> dict[str, Any]:
    """All that an operation without effect must leave as it was, the order of eviction included."""
    return {
        "ref": list(pool.ref),
        "fill": list(pool.fill),
        "free": list(pool._free),
        "idle": list(pool._idle),
        "pinned": sorted(pool.pinned),
        "published": [None if node is None else (node.domain, node.tokens) for node in pool.node],
        "tree": [(n.block, n.domain, n.tokens, n.parent and n.parent.block) for n in pool.tree.root.descendants()],
        "tables": [
            (s.id, list(s.table.blocks), s.table.length, s.table._node.block, s.table._published) for s in sequences
        ],
        "events": pool.events.seq,
    }
