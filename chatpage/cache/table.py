"""The block table of one sequence: logical blocks 0, 1, 2 … to physical ones.

    tokens    T h e _ c a t _ | s a t _ o n         block size 8, length 14
    logical   0               | 1
    physical  5               | 12                  table [5, 12]; slot of token 9 is 12 · 8 + 1

Tables never change for tokens that are there, except when a write needs a copy of the last block.
"""

from array import array
from collections.abc import Hashable, Sequence

from chatpage.cache.pool import BlockPool
from chatpage.cache.prefix import SYSTEM, Node


class BlockTable:
    """The blocks that hold the first `length` tokens of a sequence.

    Args:
        pool: where blocks come from.
        sequence: the id that events carry.
        domain: with whom the blocks after the system prompt are shared.
        system_tokens: length of the operator-owned system prompt at the head, shared in the domain SYSTEM.
    """

    def __init__(self, pool: BlockPool, sequence: int, domain: Hashable, system_tokens: int = 0) -> None:
        self.pool = pool
        self.sequence = sequence
        self.domain = domain
        self.system_tokens = system_tokens
        self.blocks = array("i")  # as the kernels read it
        self.length = 0
        # The node of the last full block whose content is in the tree, and how many full blocks that is.
        self._node: Node = pool.tree.root
        self._published = 0

    @property
    def is_findable(self) -> bool:
        """Whether what this table will publish can be found: not below a block that has left the content tree."""
        return self._node.block != 0

    def matches(self, tokens: Sequence[int]) -> list[tuple[Node, int]]:
        """The published blocks that hold a prefix of `tokens`, and how many of them each holds. Changes nothing."""
        return self.pool.tree.find(tokens, self.domain, self.system_tokens)

    def find(self, tokens: Sequence[int]) -> int:
        """Share every block that already holds a prefix of `tokens`. Only for an empty table.

        Returns:
            How many tokens were found, which may be all of them.
        """
        return self.take(self.matches(tokens))

    def take(self, matches: list[tuple[Node, int]]) -> int:
        """Share the blocks of `matches`, which must still be published. Returns how many tokens they hold."""
        assert not self.blocks, "the table is not empty"
        for logical, (node, length) in enumerate(matches):
            self.length += length
            self.blocks.append(node.block)
            self.pool.share(node.block, self.sequence, logical, self.length, "prefix hit")
            if length == self.pool.block_size:
                self._node, self._published = node, logical + 1
        return self.length

    def append(self, count: int) -> tuple[int, int] | None:
        """Give `count` more tokens a slot: the rest of the last block, then new blocks.

        Returns:
            `(source, target)` where the last block had to be copied. All copies of a step are made before anything is
            written in it, each source read before any target is written: that is right as long as no table is
            truncated or released between its `append` and the step, or forked beyond what was written before.

        Raises:
            PoolFull: there is no room; nothing was changed.
        """
        if self.append_in_place(count):
            return None
        pool, size = self.pool, self.pool.block_size
        writes_last = self.length % size != 0
        wanted = range(len(self.blocks), -(-(self.length + count) // size))
        copied = None
        if writes_last and self._must_copy_last(len(wanted)):
            last = len(self.blocks) - 1
            target, *fresh = pool.allocate(self.sequence, [last, *wanted], "copy-on-write")
            copied = (self._replace_last(target), target)
        else:
            fresh = pool.allocate(self.sequence, wanted, "append") if wanted else ()
            if writes_last and pool.node[self.blocks[-1]] is not None:
                pool.unpublish(self.blocks[-1], "written by its sole holder")
        self.blocks.extend(fresh)
        self._write(count)
        return copied

    def append_in_place(self, count: int) -> bool:
        """`append`, but only where no block changes hands; False where one must, and then nothing was changed.

        The last block has room then, and it is the table's own: nobody else holds it, and nobody can find it. (What is
        pinned is published.) So it is nearly always for who decodes.
        """
        pool, size = self.pool, self.pool.block_size
        if not 0 < self.length % size <= size - count:
            return False
        block = self.blocks[-1]
        if pool.ref[block] > 1 or pool.node[block] is not None:
            return False
        self._fill(len(self.blocks) - 1, self.length + count)
        return True

    @property
    def must_copy(self) -> bool:
        """Whether the next token's slot is in a block that must be copied first."""
        return self.length % self.pool.block_size != 0 and self._must_copy_last(0)

    def _must_copy_last(self, more: int) -> bool:
        """Whether the write rule asks for a copy of the last block, given that `more` new blocks are needed too."""
        pool, block = self.pool, self.blocks[-1]
        if not pool.needs_copy(block):
            return False
        sole = pool.ref[block] == 1 and block not in pool.pinned
        # A copy would only keep an old branch findable: not worth it where the pool has no room for both.
        return not (sole and pool.available < more + 1)

    def _replace_last(self, target: int) -> int:
        """Put a copy in the last block's place. Returns the source."""
        pool, last = self.pool, len(self.blocks) - 1
        source, head = self.blocks[last], self.length % pool.block_size
        pool.fill[target] = head
        pool.events.emit("copy", "shared", sequence=self.sequence, logical=last, block=target, source=source, fill=head)
        self.blocks[last] = target
        pool.release(source, self.sequence, last, "copied")
        return source

    def _write(self, count: int) -> None:
        size, end = self.pool.block_size, self.length + count
        for logical in range(self.length // size, len(self.blocks)):
            self._fill(logical, min(end, (logical + 1) * size))

    def _fill(self, logical: int, at: int) -> None:
        """The block's slots up to token `at` are written."""
        pool, block = self.pool, self.blocks[logical]
        pool.fill[block] = fill = at - logical * pool.block_size
        pool.events.emit("write", "append", sequence=self.sequence, logical=logical, block=block, fill=fill, at=at)
        self.length = at

    def fork(self, sequence: int, at: int, *, session: int) -> "BlockTable":
        """A second table that shares the blocks of the first `at` tokens."""
        assert 0 <= at <= self.length, f"fork at {at} of {self.length}"
        child = BlockTable(self.pool, sequence, self.domain, self.system_tokens)
        self.pool.events.emit("fork", "fork", sequence=sequence, session=session, parent=self.sequence, at=at)
        for logical in range(-(-at // self.pool.block_size)):
            child.length = min(at, (logical + 1) * self.pool.block_size)
            child.blocks.append(self.blocks[logical])
            self.pool.share(self.blocks[logical], sequence, logical, child.length, "fork")
        child._node, child._published = self._node, self._published
        child._climb()
        return child

    def truncate(self, length: int, reason: str = "truncate") -> None:
        """Keep only the first `length` tokens; release the other blocks, last one first."""
        assert 0 <= length <= self.length, f"truncate to {length} of {self.length}"
        if length == self.length:
            return
        self.length = length
        self.pool.events.emit("truncate", reason, sequence=self.sequence, at=length)
        keep = -(-length // self.pool.block_size)
        while len(self.blocks) > keep:
            block = self.blocks.pop()
            self.pool.release(block, self.sequence, len(self.blocks), reason)
        self._climb()

    def release(self, reason: str = "end") -> None:
        """Give everything back. Harmless the second time."""
        self.truncate(0, reason)

    def _climb(self) -> None:
        """Move up the tree to the last full block that the table still has."""
        while self._published > self.length // self.pool.block_size:
            assert self._node.parent is not None
            self._node, self._published = self._node.parent, self._published - 1

    def publish(self, tokens: Sequence[int], computed: int, *, tail: bool = False) -> None:
        """Make findable what is written: the full blocks of the first `computed` tokens, and on `tail` the rest too.

        A tail is the end of a turn: nothing may follow it without a new `append`, so `computed` is `length` then.

        Args:
            tokens: the sequence's tokens, at least `computed` of them.
            computed: tokens whose keys and values are in the pool, at most `length`.
        """
        size = self.pool.block_size
        while (self._published + 1) * size <= computed and self._may_publish(size):
            self._node = self._publish_block(self._published, tokens, size)
            self._published += 1
        if tail and 0 < (rest := computed - self._published * size) < size and self._may_publish(rest):
            self._publish_block(self._published, tokens, rest)

    def _may_publish(self, count: int) -> bool:
        """Whether the next block may be found by `count` tokens: not below a node that has left the tree.

        A fork that ended earlier may have published the block that both share, with fewer tokens. That name makes way,
        unless it is the system prompt's.
        """
        block = self.blocks[self._published]
        node = self.pool.node[block]
        makes_way = node is None or (len(node.tokens) < count and block not in self.pool.pinned)
        is_full = node is not None and len(node.tokens) == self.pool.block_size == count
        return self.is_findable and (makes_way or is_full)

    def _publish_block(self, logical: int, tokens: Sequence[int], count: int) -> Node:
        start = logical * self.pool.block_size
        chunk = tuple(tokens[start : start + count])
        domain = SYSTEM if start + count <= self.system_tokens else self.domain
        node = self.pool.node[self.blocks[logical]]
        if node is not None and len(node.tokens) < count:
            self.pool.unpublish(self.blocks[logical], "it holds more by now")
        return self.pool.publish(self._node, domain, chunk, self.blocks[logical], self.sequence)
