"""The state machine: on the cache as it is, and on caches with one fault each, all of which it must find."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings

from chatpage.cache.pool import BlockPool
from chatpage.cache.prefix import Node, PrefixTree
from chatpage.cache.table import BlockTable
from tests.cache.machine import CacheMachine, walk

CHECKED = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    phases=(Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestCache = CacheMachine.TestCase
TestCache.settings = CHECKED


def walks(seeds: Iterable[int]) -> int:
    return sum(walk(seed) for seed in seeds)


def test_walks() -> None:
    assert walks(range(800)) == 48_000  # operations; with the scheduler's, some 10^5


# -- faults: each is one line of the cache, wrong ----------------------------------------------------------------------

append_in_place, fork, publish = BlockTable.append_in_place, BlockTable.fork, BlockTable.publish
may_publish, publish_block = BlockTable._may_publish, BlockTable._publish_block
allocate, share, evict, settle = BlockPool.allocate, BlockPool.share, BlockPool._evict, BlockPool._settle
find, insert, remove = PrefixTree.find, PrefixTree.insert, PrefixTree.remove


def releases_twice(table: BlockTable, reason: str = "end") -> None:
    table.pool.events.emit("truncate", reason, sequence=table.sequence, at=0)
    table.length = 0
    for logical, block in reversed(list(enumerate(table.blocks))):
        table.pool.release(block, table.sequence, logical, reason)


def writes_in_place_what_others_hold_or_find(table: BlockTable, count: int) -> bool:
    has_room = 0 < table.length % table.pool.block_size <= table.pool.block_size - count
    if has_room:
        table._fill(len(table.blocks) - 1, table.length + count)
    return has_room


def writes_only_what_has_room_in_place(table: BlockTable, count: int) -> bool:
    return append_in_place(table, min(count, -table.length % table.pool.block_size))


def misses_the_copy_of_a_shared_block(pool: BlockPool, block: int) -> bool:
    return block in pool.pinned


def writes_into_a_pinned_block(pool: BlockPool, block: int) -> bool:
    return pool.ref[block] > 1


def copies_a_tail_that_nobody_else_holds(pool: BlockPool, block: int) -> bool:
    return True


def leaves_an_evicted_block_in_the_tree(pool: BlockPool, block: int) -> None:
    pool.node[block] = None


def forgets_a_block_but_not_its_children(tree: PrefixTree, node: Node) -> list[int]:
    block = node.block
    remove(tree, node)
    return [block]


def shares_one_token_past_the_system_prompt(
    tree: PrefixTree, tokens: Sequence[int], domain: Hashable, system_tokens: int = 0
) -> list[tuple[Node, int]]:
    return find(tree, tokens, domain, system_tokens + 1 if system_tokens else 0)


def finds_blocks_of_another_domain(
    tree: PrefixTree, tokens: Sequence[int], domain: Hashable, system_tokens: int = 0
) -> list[tuple[Node, int]]:
    return max((find(tree, tokens, d, system_tokens) for d in "ab"), key=lambda found: sum(n for _, n in found))


def finds_less_than_there_is(
    tree: PrefixTree, tokens: Sequence[int], domain: Hashable, system_tokens: int = 0
) -> list[tuple[Node, int]]:
    return [match for match in find(tree, tokens, domain, system_tokens) if match[1] == tree.block_size]


def compares_only_the_tokens_of_the_block(
    tree: PrefixTree, parent: Node, domain: Hashable, tokens: tuple[int, ...], block: int
) -> Node:
    same = (node for node in tree.root.descendants() if (node.domain, node.tokens) == (domain, tokens))
    return next(same, None) or insert(tree, parent, domain, tokens, block)


def counts_a_revived_block_as_idle_too(
    pool: BlockPool, block: int, sequence: int, logical: int, at: int, reason: str
) -> None:
    was_idle = block in pool._idle
    share(pool, block, sequence, logical, at, reason)
    if was_idle:
        pool._idle[block] = None


def evicts_the_latest(pool: BlockPool) -> int:
    pool._idle.move_to_end(next(reversed(pool._idle)), last=False)
    return evict(pool)


def frees_a_block_that_is_pinned(pool: BlockPool, block: int) -> str:
    pool.pinned.discard(block)
    return settle(pool, block)


def keeps_the_fill_of_a_freed_block(pool: BlockPool, block: int) -> str:
    fill = pool.fill[block]
    becomes = settle(pool, block)
    pool.fill[block] = fill
    return becomes


def changes_something_before_it_refuses(
    pool: BlockPool, sequence: int, logicals: Iterable[int], reason: str
) -> list[int]:
    return [block for logical in logicals for block in allocate(pool, sequence, [logical], reason)]


def publishes_below_a_block_that_has_gone(table: BlockTable, count: int) -> bool:
    node = table._node
    table._node = table.pool.tree.root
    try:
        return may_publish(table, count)
    finally:
        table._node = node


def keeps_the_name_that_a_fork_gave(table: BlockTable, count: int) -> bool:
    node = table.pool.node[table.blocks[table._published]]
    return may_publish(table, count) and (node is None or len(node.tokens) == table.pool.block_size)


def gives_a_block_two_names(table: BlockTable, logical: int, tokens: Sequence[int], count: int) -> Node:
    block = table.blocks[logical]
    known, table.pool.node[block] = table.pool.node[block], None
    try:
        return publish_block(table, logical, tokens, count)
    finally:
        table.pool.node[block] = known or table.pool.node[block]


def forks_to_a_node_that_the_child_does_not_have(
    table: BlockTable, sequence: int, at: int, *, session: int
) -> BlockTable:
    child = fork(table, sequence, at, session=session)
    child._node, child._published = table._node, table._published
    return child


def stays_at_the_node_of_a_block_that_it_gave_back(table: BlockTable) -> None:
    table._published = min(table._published, table.length // table.pool.block_size)


def publishes_the_tail_of_a_turn_that_goes_on(
    table: BlockTable, tokens: Sequence[int], computed: int, *, tail: bool = False
) -> None:
    publish(table, tokens, computed, tail=True)


def keeps_the_branches_of_nodes_that_have_gone(tree: PrefixTree, node: Node) -> list[int]:
    parent, key = node.parent, (node.domain, node.tokens[0])
    blocks = remove(tree, node)
    assert parent is not None
    parent.children.setdefault(key, {})
    return blocks


def forgets_to_say_that_a_block_is_unpublished(pool: BlockPool, block: int, reason: str) -> None:
    pool._forget(block)


FAULTS = [
    (BlockTable, "release", releases_twice),
    (BlockTable, "append_in_place", writes_in_place_what_others_hold_or_find),
    (BlockTable, "append_in_place", writes_only_what_has_room_in_place),
    (BlockTable, "_may_publish", publishes_below_a_block_that_has_gone),
    (BlockTable, "_may_publish", keeps_the_name_that_a_fork_gave),
    (BlockTable, "_publish_block", gives_a_block_two_names),
    (BlockTable, "publish", publishes_the_tail_of_a_turn_that_goes_on),
    (BlockTable, "fork", forks_to_a_node_that_the_child_does_not_have),
    (BlockTable, "_climb", stays_at_the_node_of_a_block_that_it_gave_back),
    (BlockPool, "needs_copy", misses_the_copy_of_a_shared_block),
    (BlockPool, "needs_copy", writes_into_a_pinned_block),
    (BlockPool, "needs_copy", copies_a_tail_that_nobody_else_holds),
    (BlockPool, "allocate", changes_something_before_it_refuses),
    (BlockPool, "share", counts_a_revived_block_as_idle_too),
    (BlockPool, "unpublish", forgets_to_say_that_a_block_is_unpublished),
    (BlockPool, "_forget", leaves_an_evicted_block_in_the_tree),
    (BlockPool, "_evict", evicts_the_latest),
    (BlockPool, "_settle", frees_a_block_that_is_pinned),
    (BlockPool, "_settle", keeps_the_fill_of_a_freed_block),
    (PrefixTree, "find", shares_one_token_past_the_system_prompt),
    (PrefixTree, "find", finds_blocks_of_another_domain),
    (PrefixTree, "find", finds_less_than_there_is),
    (PrefixTree, "insert", compares_only_the_tokens_of_the_block),
    (PrefixTree, "remove", keeps_the_branches_of_nodes_that_have_gone),
    (PrefixTree, "remove", forgets_a_block_but_not_its_children),
]


@pytest.mark.parametrize(("owner", "name", "wrong"), FAULTS, ids=[wrong.__name__ for _, _, wrong in FAULTS])
def test_the_machine_finds_a_cache_that(
    owner: type, name: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        walks(range(300))
