"""The block pool: which physical blocks are free, idle or used, and by how many.

    free ──allocate──▶ used ──last release, published──▶ idle ──share──▶ used
      ▲                 │                                  │
      └──last release, not published──┘   └──────evict─────┘

Blocks are numbered 1…N; block 0 is the null block, which padding reads and writes and which is never handed out.
The pool belongs to one thread.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from chatpage.cache.prefix import Node, PrefixTree
from chatpage.events import EventLog

if TYPE_CHECKING:
    from chatpage.cache.table import BlockTable


class PoolFull(Exception):
    """Neither a free nor an idle block is left. Nothing was changed."""


class BlockPool:
    """Reference counts, pins, and the order in which idle blocks are evicted.

    A block with no reference that is published stays as *idle*: it can be found and shared again until it is evicted,
    least recently used first. A table releases its blocks last one first, so children go before their parents.
    """

    def __init__(self, num_blocks: int, block_size: int, events: EventLog) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.events = events
        self.tree = PrefixTree(block_size)
        self.ref = [0] * (num_blocks + 1)
        self.fill = [0] * (num_blocks + 1)
        self.node: list[Node | None] = [None] * (num_blocks + 1)
        self.pinned: set[int] = set()
        self._free = deque(range(1, num_blocks + 1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can hand out now: the free ones and the idle ones."""
        return len(self._free) + len(self._idle)

    # -- references -----------------------------------------------------------------------------------------------

    def allocate(self, sequence: int, logicals: Sequence[int], reason: str) -> list[int]:
        """One block for each logical position, with one reference. All of them, or PoolFull and no change."""
        if len(logicals) > self.available:
            raise PoolFull
        blocks = []
        for logical in logicals:
            block = self._free.popleft() if self._free else self._evict()
            self.ref[block], self.fill[block] = 1, 0
            self.events.emit("allocate", reason, sequence=sequence, logical=logical, block=block, ref=1)
            blocks.append(block)
        return blocks

    def share(self, block: int, sequence: int, logical: int, at: int, reason: str) -> None:
        """One reference more, for a sequence that has `at` tokens with it."""
        self._idle.pop(block, None)
        self.ref[block] += 1
        self.events.emit("share", reason, sequence=sequence, logical=logical, block=block, ref=self.ref[block], at=at)

    def release(self, block: int, sequence: int, logical: int, reason: str) -> None:
        """One reference fewer."""
        self.ref[block] -= 1
        becomes = self._settle(block)
        self.events.emit(
            "release", reason, sequence=sequence, logical=logical, block=block, ref=self.ref[block], becomes=becomes
        )

    def _settle(self, block: int) -> str:
        """Put a block where its references say it belongs."""
        if self.ref[block] or block in self.pinned:
            return "used"
        if self.node[block] is not None:
            self._idle[block] = None
            return "idle"
        self.fill[block] = 0
        self._free.append(block)
        return "free"

    def _evict(self) -> int:
        """Forget the block that has been idle longest, and hand it out."""
        block, _ = self._idle.popitem(last=False)
        self._forget(block)
        self.events.emit("evict", "least recently used", block=block)
        return block

    # -- pins -----------------------------------------------------------------------------------------------------

    def pin(self, block: int, *, logical: int, at: int, name: str) -> None:
        """Keep a block of the system prompt `name` for ever. A pin is not a reference."""
        self._idle.pop(block, None)
        self.pinned.add(block)
        self.events.emit("pin", "system prompt", block=block, ref=self.ref[block], logical=logical, at=at, name=name)

    # -- writing and publishing -----------------------------------------------------------------------------------

    def needs_copy(self, block: int) -> bool:
        """The write rule. A write needs the sole reference, unpinned and unpublished.

        Otherwise the writer gets a copy first, with one exception: a published *tail* that nobody else holds is
        unpublished instead (`unpublish`). A full block is copied even then: it may have children. (A table does without
        that copy where the pool has no room for it: `BlockTable.append`.)
        """
        node = self.node[block]
        is_full = node is not None and len(node.tokens) == self.block_size
        return self.ref[block] > 1 or block in self.pinned or is_full

    def publish(self, parent: Node, domain: Hashable, tokens: tuple[int, ...], block: int, sequence: int) -> Node:
        """Make a written block findable below `parent`.

        Returns its node, or the node of another block that holds the same already (then this one stays private).
        """
        node = self.tree.insert(parent, domain, tokens, block)
        if node.block == block and self.node[block] is None:
            self.node[block] = node
            self.events.emit("publish", "written", block=block, sequence=sequence, fill=len(tokens))
        return node

    def unpublish(self, block: int, reason: str) -> None:
        """Make a block unfindable, so that its sole holder may write it."""
        self._forget(block)
        self.events.emit("unpublish", reason, block=block)

    def _forget(self, block: int) -> None:
        """Take a block out of the content tree, with all that could only be found through it."""
        node = self.node[block]
        assert node is not None, f"block {block} is not published"
        own, *orphans = self.tree.remove(node)
        self.node[own] = None
        for orphan in orphans:
            self.node[orphan] = None
            if orphan in self._idle:
                del self._idle[orphan]
                self._settle(orphan)
                self.events.emit("evict", "its prefix is gone", block=orphan)
            else:
                self.events.emit("unpublish", "its prefix is gone", block=orphan)

    # -- the invariants -------------------------------------------------------------------------------------------

    def check(self, tables: Iterable["BlockTable"]) -> None:
        """Prove that pool, tables and tree agree. `tables` are all that hold a block.

        Every number is counted anew from the tables and the tree, never trusted.

        Raises:
            AssertionError: they do not; the message says where.
        """
        tables = list(tables)
        self._check_references(tables)
        self._check_states()
        self._check_tree()
        for table in tables:
            self._check_table(table)

    def _check_references(self, tables: list["BlockTable"]) -> None:
        counted = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table.blocks:
                counted[block] += 1
        assert counted == self.ref, f"references {self.ref} but tables hold {counted}"
        assert counted[0] == 0, "the null block is in a table"

    def _check_states(self) -> None:
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), f"twice free: {list(self._free)}"
        for block in range(1, self.num_blocks + 1):
            used = self.ref[block] > 0 or block in self.pinned
            places = (block in free) + (block in idle) + used
            assert places == 1, f"block {block} is in {places} of free, idle and used"
            assert block not in free or (self.node[block] is None and self.fill[block] == 0), (
                f"{block}: free, not empty"
            )
            assert block not in idle or self.node[block] is not None, f"block {block} is idle but cannot be found"
            assert block not in self.pinned or self.node[block] is not None, f"block {block} is pinned, not published"

    def _check_tree(self) -> None:
        nodes = list(self.tree.root.descendants())
        assert len({n.block for n in nodes}) == len(nodes), f"a block twice in the tree: {[n.block for n in nodes]}"
        assert {n.block: n for n in nodes} == {b: n for b, n in enumerate(self.node) if n is not None}, "tree and pool"
        for node in nodes:
            assert 0 < len(node.tokens) <= self.fill[node.block] <= self.block_size, f"block {node.block}: fill"
            assert node.parent is not None
            assert node.parent.block == -1 or len(node.parent.tokens) == self.block_size, "below a tail"

    def _check_table(self, table: "BlockTable") -> None:
        size = self.block_size
        assert len(table.blocks) == -(-table.length // size), f"{table.length} tokens in {len(table.blocks)} blocks"
        assert len(set(table.blocks)) == len(table.blocks), f"a block twice in {table.blocks}"
        for logical, block in enumerate(table.blocks):
            held = min(size, table.length - logical * size)
            assert self.fill[block] >= held, f"block {block} holds {self.fill[block]} slots of {held}"
