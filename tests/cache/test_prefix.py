"""The content tree, and what tables publish into it."""

from collections.abc import Hashable

import pytest

from chatpage.cache.prefix import SYSTEM, Node, PrefixTree, common_length
from chatpage.cache.table import BlockTable
from tests.cache.conftest import Cache


def tree_of(*paths: tuple[Hashable, list[tuple[int, ...]]], size: int = 2) -> PrefixTree:
    """A tree with these paths of blocks, numbered from 1 as they come; equal beginnings are one."""
    tree, block = PrefixTree(size), 0
    for domain, chunks in paths:
        node = tree.root
        for chunk in chunks:
            block += 1
            node = tree.insert(node, domain, chunk, block)
    return tree


def found(tree: PrefixTree, tokens: list[int], domain: str = "a", system_tokens: int = 0) -> list[tuple[int, int]]:
    return [(node.block, length) for node, length in tree.find(tokens, domain, system_tokens)]


def test_nothing_is_found_in_an_empty_tree_or_of_an_empty_prompt() -> None:
    assert found(PrefixTree(2), [1, 2, 3]) == []
    assert found(tree_of(("a", [(1, 2)])), []) == []


def test_whole_blocks_then_the_longest_head() -> None:
    tree = tree_of(("a", [(1, 2, 3), (4, 5, 6)]), ("a", [(1, 2, 3), (4, 5, 7)]), ("a", [(1, 2, 3), (4, 8)]), size=3)
    assert found(tree, [1, 2, 3, 4, 5, 7, 9]) == [(1, 3), (4, 3)]
    assert found(tree, [1, 2, 3, 4, 8, 9]) == [(1, 3), (6, 2)]
    assert found(tree, [1, 2, 3, 4, 5]) == [(1, 3), (2, 2)]
    assert found(tree, [1, 2]) == [(1, 2)]
    assert found(tree, [2, 2, 3]) == []


def test_nothing_is_found_below_a_block_that_matches_in_part() -> None:
    tree = tree_of(("a", [(1, 2), (3, 4)]))
    assert found(tree, [1, 3, 3, 4]) == [(1, 1)]


def test_equal_tokens_below_different_prefixes_are_different_blocks() -> None:
    tree = tree_of(("a", [(1, 1), (3, 4)]), ("a", [(2, 2), (3, 4)]))
    assert found(tree, [1, 1, 3, 4]) == [(1, 2), (2, 2)]
    assert found(tree, [2, 2, 3, 4]) == [(3, 2), (4, 2)]


def test_domains_are_apart_at_every_depth() -> None:
    tree = tree_of((SYSTEM, [(1, 2)]))
    head = tree.insert(tree.root, SYSTEM, (1, 2), 99)
    assert head.block == 1, "the block that is there stays"
    tree.insert(head, "a", (3, 4), 2)
    tree.insert(head, "b", (3, 5), 3)
    assert found(tree, [1, 2, 3, 5], "a", 2) == [(1, 2), (2, 1)]
    assert found(tree, [1, 2, 3, 5], "b", 2) == [(1, 2), (3, 2)]
    assert found(tree, [1, 2, 3, 5], "c", 2) == [(1, 2)]
    assert found(tree, [1, 2, 3, 5], "c", 0) == []


@pytest.mark.parametrize("system_tokens", range(6))
def test_system_blocks_are_found_up_to_the_last_token_of_the_prompt(system_tokens: int) -> None:
    tree = tree_of((SYSTEM, [(1, 2), (3, 4), (5,)]))
    lengths = [length for _, length in tree.find([1, 2, 3, 4, 5, 6], "a", system_tokens)]
    assert sum(lengths) == system_tokens


def test_a_private_block_of_equal_content_does_not_hide_the_system_prompt() -> None:
    cache = Cache(20, 2)
    cache.pin([1, 2, 3, 4, 5])
    cache.compute([1, 2, 9, 9], "a", 0)
    cache.compute([1, 2, 3, 4, 5, 6], "a", 5)
    assert cache.found == 5


def test_removing_a_block_removes_what_was_found_through_it() -> None:
    tree = tree_of(("a", [(1, 2), (3, 4), (5,)]), ("a", [(1, 2), (6, 7)]), ("b", [(1, 2)]))
    (head, _), *_ = tree.find([1, 2], "a")
    child = head.child("a", (3, 4))
    blocks = tree.remove(head)
    assert blocks[0] == 1
    assert sorted(blocks) == [1, 2, 3, 5]
    assert (head.block, child and child.block) == (0, 0)
    assert found(tree, [1, 2, 3], "a") == []
    assert found(tree, [1, 2, 3], "b") == [(6, 2)]


def test_removed_blocks_leave_no_bucket_behind() -> None:
    tree = tree_of(("a", [(1, 2)]), ("a", [(1, 3)]))
    for _ in range(2):
        (node, _), *_ = tree.find([1], "a")
        tree.remove(node)
    assert tree.root.children == {}


def test_a_deep_tree_needs_no_recursion() -> None:
    tree = PrefixTree(1)
    node = tree.root
    for block in range(1, 5001):
        node = tree.insert(node, "a", (7,), block)
    assert sum(1 for _ in tree.root.descendants()) == 5000
    assert len(tree.find([7] * 6000, "a")) == 5000
    assert len(tree.remove(tree.root.children["a", 7][7,])) == 5000


def test_parents_come_before_their_children() -> None:
    tree = tree_of(("a", [(1, 2), (3, 4), (5, 6)]), ("a", [(1, 2), (7, 8)]), ("b", [(1, 2), (3, 4)]))
    seen: set[Node | None] = {tree.root}
    for node in tree.root.descendants():
        assert node.parent in seen
        seen.add(node)


def test_common_length() -> None:
    assert [common_length(a, b) for a, b in [([], [1]), ([1, 2], [1, 3]), ([1, 2], [1, 2, 3]), ([2], [1])]] == [
        0,
        1,
        2,
        0,
    ]


# -- what tables publish ----------------------------------------------------------------------------------------------


def test_only_what_is_computed_is_found() -> None:
    cache = Cache(10, 4)
    table = cache.table()
    table.append(12)
    for computed, expected in [(3, 0), (4, 4), (11, 8), (12, 12)]:
        table.publish(range(12), computed)
        assert sum(length for _, length in cache.pool.tree.find(range(12), "a")) == expected
    cache.check()


def test_a_tail_is_found_after_its_turn_and_written_again_by_its_sole_holder() -> None:
    cache = Cache(10, 4)
    table = cache.compute(range(6))
    assert cache.pool.node[table.blocks[1]] is not None
    assert table.append(1) is None, "no copy: nobody else holds it"
    assert cache.pool.node[table.blocks[1]] is None
    cache.check()


def test_a_full_block_keeps_its_content_even_from_its_sole_holder() -> None:
    """Edit and regenerate: the branch that is left can still be found, as long as there is room for both."""
    cache = Cache(10, 4)
    table = cache.compute(range(8))
    left = table.blocks[1]
    table.truncate(6)
    assert table.append(2) == (left, table.blocks[1])
    assert sum(length for _, length in cache.pool.tree.find(range(8), "a")) == 8
    cache.check()


def test_a_full_block_is_written_in_place_where_there_is_no_room_for_a_copy() -> None:
    cache = Cache(2, 4)
    table = cache.compute(range(8))
    blocks = list(table.blocks)
    table.truncate(6)
    assert table.append(2) is None
    assert list(table.blocks) == blocks
    assert sum(length for _, length in cache.pool.tree.find(range(8), "a")) == 4
    cache.check()


def test_of_two_blocks_with_equal_content_the_second_stays_private() -> None:
    cache = Cache(10, 4)
    first, second = cache.table(), cache.table()
    for table in (first, second):
        table.append(8)  # both before either is published
    for table in (first, second):
        table.publish(range(8), 8)
    assert cache.kinds("publish") == 2
    second.release()
    assert (cache.pool.idle, cache.pool.free) == (0, 8)
    cache.check()


def test_two_branches_are_found_apart() -> None:
    cache = Cache(10, 4)
    table = cache.compute(range(12))
    fork = table.fork(2, 6, session=1)
    cache.tables.append(fork)
    other = [0, 1, 2, 3, 4, 5, 66, 77, 88, 99]
    fork.append(4)
    fork.publish(other, 10, tail=True)
    cache.check()
    for branch, blocks in [(list(range(12)), list(table.blocks)), (other, list(fork.blocks))]:
        assert [node.block for node, _ in cache.pool.tree.find(branch, "a")] == blocks
    assert sum(length for _, length in cache.pool.tree.find([*range(8), 88, 99], "a")) == 8


def test_the_name_that_a_fork_gave_a_block_makes_way_for_a_longer_one() -> None:
    cache = Cache(10, 4)
    table = cache.table()
    table.append(4)
    fork = table.fork(2, 2, session=1)
    cache.tables.append(fork)
    fork.publish([0, 1], 2, tail=True)
    table.publish(range(4), 4)
    cache.check()
    assert (cache.kinds("publish"), cache.kinds("unpublish")) == (2, 1)
    table.release()
    fork.release()
    cache.check()
    assert cache.table().find(range(4)) == 4


def test_the_name_of_the_system_prompt_makes_way_for_no_other() -> None:
    cache = Cache(10, 4)
    table = cache.table(system_tokens=2)
    table.append(3)
    fork = table.fork(2, 2, session=1)
    cache.tables.append(fork)
    fork.publish([0, 1], 2, tail=True)
    cache.pool.pin(table.blocks[0], logical=0, at=2, name="default")
    table.publish(range(3), 3, tail=True)
    assert cache.table(system_tokens=2).find(range(3)) == 2
    cache.check()


def test_an_evicted_prefix_takes_along_what_was_found_through_it() -> None:
    """The second sequence continues below a block of the first, and holds a private copy of it itself."""
    cache = Cache(4, 2)
    first, second = cache.table(), cache.table()
    for table in (first, second):
        table.append(2)
    first.publish([1, 2], 2)
    second.append(2)
    second.publish([1, 2, 3, 4], 4)
    first.release()
    third: BlockTable = cache.table()
    third.append(4)  # evicts the first's block
    assert cache.pool.tree.find([1, 2, 3, 4], "a") == []
    cache.check()
    second.publish([1, 2, 3, 4], 4)
    assert cache.pool.tree.find([1, 2, 3, 4], "a") == [], "nothing is published below a block that has gone"
    second.release()
    assert (cache.pool.free, cache.pool.idle) == (2, 0)
    cache.check()
