"""Every sequence of operations up to a length, on a pool of four blocks: breadth first, equal states merged.

Two states are equal where they differ in nothing but the numbers of their blocks. Each transition is checked against
the write rule and the sharing domains, each state by `BlockPool.check` and against what the slots should hold.
"""

import marshal
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.prefix import SYSTEM, Node
from chatpage.cache.table import BlockTable
from chatpage.events import EventLog
from tests.cache.naive import longest

BLOCKS, SIZE, MOST = 4, 2, 3
SYSTEM_PROMPT = (0,)  # ends inside a block
# domain, length of the system prompt, tokens; strangers and neighbours begin alike
PROMPTS = [("a", 1, (0, 0, 1)), ("b", 1, (0, 0, 0)), ("a", 0, (0, 0, 0, 1))]

Operation = tuple[str, int]
Slot = tuple[int, ...]  # what is in a slot: the tokens up to it; () was never written


@dataclass(eq=False)
class Holder:
    table: BlockTable
    tokens: tuple[int, ...]


@dataclass(eq=False)
class World:
    """A pool, its slots, and up to MOST tables; who arrives brings one of the first `prompts` of PROMPTS."""

    prompts: int
    pool: BlockPool = field(default_factory=lambda: BlockPool(BLOCKS, SIZE, EventLog()))
    slots: list[list[Slot]] = field(default_factory=lambda: [[()] * SIZE for _ in range(BLOCKS + 1)])
    holders: list[Holder] = field(default_factory=list)

    # -- operations: each returns whether it could be done --------------------------------------------------------

    def operations(self) -> list[Operation]:
        """What can be tried now."""
        every = ["append", "fork", "truncate", "publish", "end_turn", "release", "preempt"]
        alone: list[Operation] = [("press", 0)] if self.pool.pinned else [("press", 0), ("pin", 0)]
        arrivals = [("arrive", n) for n in range(self.prompts)] if len(self.holders) < MOST else []
        return [*alone, *arrivals, *((name, who) for name in every for who in range(len(self.holders)))]

    def arrive(self, which: int) -> bool:
        domain, system_tokens, tokens = PROMPTS[which]
        holder = Holder(BlockTable(self.pool, 0, domain, system_tokens), ())
        self.holders.append(holder)
        return self._catch_up(holder, tokens)

    def _catch_up(self, holder: Holder, tokens: tuple[int, ...]) -> bool:
        table = holder.table
        most, least = longest(self.pool, tokens, table.domain, table.system_tokens)
        matches = table.matches(tokens)
        for logical, (node, length) in enumerate(matches):
            end = logical * SIZE + length
            assert node.domain == table.domain or (node.domain == SYSTEM and end <= table.system_tokens), "a stranger's"
        found = table.take(matches)
        assert least <= found <= most, f"found {found} tokens, not {least} to {most}"
        holder.tokens = tokens[:found]
        if found < len(tokens):
            self._grow(holder, tokens[found:])
        return True

    def append(self, who: int) -> bool:
        return self._grow(self.holders[who], (1,))

    def _grow(self, holder: Holder, tokens: tuple[int, ...]) -> bool:
        """Slots, the copy, then the writes; where there is no room, nothing is changed."""
        table, pool, start = holder.table, self.pool, holder.table.length
        is_tight = (start + len(tokens)) // SIZE + 2 > pool.available + len(table.blocks)
        before = self.form() if is_tight else b""
        try:
            copied = table.append(len(tokens))
        except PoolFull:
            assert self.form() == before, "a failed allocation left a trace"
            return False
        if copied:
            source, target = copied
            self.slots[target] = list(self.slots[source])
        holder.tokens += tokens
        for position in range(start, len(holder.tokens)):
            block = table.blocks[position // SIZE]
            assert pool.ref[block] == 1, "written under several references"
            assert pool.node[block] is None, "written while it can be found"
            assert block not in pool.pinned, "written although it is pinned"
            self.slots[block][position % SIZE] = holder.tokens[: position + 1]
        return True

    def fork(self, who: int) -> bool:
        parent = self.holders[who]
        if len(self.holders) == MOST or not parent.tokens:
            return False
        at = len(parent.tokens) - 1
        self.holders.append(Holder(parent.table.fork(0, at, session=0), parent.tokens[:at]))
        return True

    def truncate(self, who: int) -> bool:
        holder = self.holders[who]
        if not holder.tokens:
            return False
        holder.tokens = holder.tokens[:-1]
        holder.table.truncate(len(holder.tokens))
        return True

    def publish(self, who: int) -> bool:
        holder = self.holders[who]
        holder.table.publish(holder.tokens, len(holder.tokens))
        return True

    def end_turn(self, who: int) -> bool:
        holder = self.holders[who]
        holder.table.publish(holder.tokens, len(holder.tokens), tail=True)
        return True

    def release(self, who: int) -> bool:
        holder = self.holders.pop(who)
        holder.table.release()
        holder.table.release()
        return True

    def preempt(self, who: int) -> bool:
        """Give everything back, and come again."""
        holder = self.holders[who]
        holder.table.release()
        return self._catch_up(holder, holder.tokens)

    def press(self, _: int) -> bool:
        """A stranger takes whatever can be had for a moment: every idle block is evicted."""
        if not self.pool.available:
            return False
        stranger = BlockTable(self.pool, 0, "stranger")
        stranger.append(self.pool.available * SIZE)
        stranger.release()
        return True

    def pin(self, _: int) -> bool:
        table = BlockTable(self.pool, 0, SYSTEM, len(SYSTEM_PROMPT))
        holder = Holder(table, ())
        self._catch_up(holder, SYSTEM_PROMPT)
        done = holder.tokens == SYSTEM_PROMPT
        if done:
            table.publish(SYSTEM_PROMPT, len(SYSTEM_PROMPT), tail=True)
            self.pool.pin(table.blocks[0], logical=0, at=len(SYSTEM_PROMPT), name="default")
        table.release()
        return done

    # -- what is true of every state ------------------------------------------------------------------------------

    def check(self) -> None:
        self.pool.check([holder.table for holder in self.holders])
        for holder in self.holders:
            held = [self.slots[holder.table.blocks[i // SIZE]][i % SIZE] for i in range(holder.table.length)]
            assert held == [holder.tokens[: i + 1] for i in range(len(holder.tokens))], "not what the table says"
        for node in self.pool.tree.root.descendants():
            prefix = spelt(node)
            start = len(prefix) - len(node.tokens)
            held = self.slots[node.block][: len(node.tokens)]
            assert held == [prefix[: i + 1] for i in range(start, len(prefix))], "not what the tree says"
        if self.pool.pinned:
            found = self.pool.tree.find(SYSTEM_PROMPT, "visitor", len(SYSTEM_PROMPT))
            assert sum(length for _, length in found) == len(SYSTEM_PROMPT), "the system prompt is not found whole"

    def _key(self, holder: Holder) -> tuple[Any, ...]:
        table, pool = holder.table, self.pool
        blocks = [(pool.ref[b], pool.node[b] is None, b in pool.pinned) for b in table.blocks]
        return table.domain, table.system_tokens, holder.tokens, table._published, table._node.block == 0, blocks

    def form(self) -> bytes:
        """All that matters of this state; equal for states that differ only in the numbers of their blocks."""
        pool = self.pool
        self.holders.sort(key=self._key)  # who came first makes no difference
        names: dict[int, int] = {-1: -1, 0: 0}
        for block in (*(b for h in self.holders for b in h.table.blocks), *pool._idle, *sorted(pool.pinned)):
            names.setdefault(block, len(names))
        holders = tuple(
            (
                h.table.domain,
                h.table.system_tokens,
                h.tokens,
                tuple(names[b] for b in h.table.blocks),
                chain(h.table, names),
            )
            for h in self.holders
        )
        blocks = tuple(
            (pool.ref[b], pool.fill[b], b in pool.pinned, tuple(self.slots[b][: pool.fill[b]])) for b in names if b > 0
        )
        idle = tuple(names[b] for b in pool._idle)
        return marshal.dumps((holders, blocks, idle, tree(pool.tree.root, names), pool.free), 2)


def spelt(node: Node) -> tuple[int, ...]:
    return (spelt(node.parent) if node.parent else ()) + node.tokens


def chain(table: BlockTable, names: dict[int, int]) -> tuple[int, ...]:
    """The nodes from a table's place in the tree up to the root; 0 where one has left the tree."""
    node, result = table._node, [table._published]
    while node.parent is not None:
        result.append(names[node.block])
        node = node.parent
    return tuple(result)


def tree(node: Node, names: dict[int, int]) -> tuple[Any, ...]:
    """A node and all below it. Which of several children is found may depend on their order, so that is kept."""
    children = sorted(node.children.items())
    below = tuple((domain, tuple(tree(n, names) for n in bucket.values())) for (domain, _), bucket in children)
    return names[node.block], node.tokens, below


@dataclass
class Found:
    """What a search went through.

    Attributes:
        states: how many different ones, the first included.
        transitions: how many operations were done from them.
        sequences: how many sequences of operations lead through them, each at most `depth` long.
    """

    depth: int = 0
    states: int = 1
    transitions: int = 0
    sequences: int = 0


@dataclass
class Place:
    """A state at the depth that the search is at: how to have it again, one way to it, and how many there are."""

    saved: bytes
    way: tuple[Operation, ...]
    ways: int


def search(depth: int, prompts: int = len(PROMPTS), say: Callable[[str], object] = print) -> Found:
    """Try everything up to `depth` operations, and say after each depth how much that was.

    Raises:
        AssertionError: something is wrong; the message has the operations that lead there.
    """
    found, first = Found(), World(prompts)
    seen = {first.form()}
    front = {first.form(): Place(pickle.dumps(first), (), 1)}
    for found.depth in range(1, depth + 1):
        following: dict[bytes, Place] = {}
        for place in front.values():
            for operation, world in after(place):
                found.transitions += 1
                form = world.form()
                if form not in following:
                    way = (*place.way, operation)
                    if form not in seen:
                        checked(world.check, way)
                        seen.add(form)
                    saved = pickle.dumps(world) if found.depth < depth else b""
                    following[form] = Place(saved, way, 0)
                following[form].ways += place.ways
        front = following
        found.states = len(seen)
        found.sequences += sum(place.ways for place in front.values())
        say(f"depth {found.depth}: {found.states:,} states, {found.sequences:,} sequences of operations")
    return found


def after(place: Place) -> Iterator[tuple[Operation, World]]:
    """Each operation that can be done there, and the world after it."""
    for operation in pickle.loads(place.saved).operations():
        world, (name, argument) = pickle.loads(place.saved), operation
        if checked(getattr(world, name), (*place.way, operation), argument):
            yield operation, world


def checked(do: Callable[..., Any], way: tuple[Operation, ...], *arguments: int) -> Any:
    try:
        return do(*arguments)
    except Exception as error:
        raise AssertionError(f"{error!r} after {' '.join(f'{name}({argument})' for name, argument in way)}") from error
