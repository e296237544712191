"""The worked examples with which the field explains paged attention, on the cache as it is."""

import pytest

from chatpage.cache.pool import BlockPool, PoolFull
from chatpage.cache.table import BlockTable
from chatpage.events import EventLog
from tests.cache.conftest import Cache


def slots(table: BlockTable) -> list[int]:
    """The slot of each token: physical block · block size + offset."""
    size = table.pool.block_size
    return [table.blocks[i // size] * size + i % size for i in range(table.length)]


def held_slots(table: BlockTable) -> int:
    return len(table.blocks) * table.pool.block_size


def test_ten_tokens_at_block_size_four_take_three_blocks_and_leave_two_slots() -> None:
    cache = Cache(8, 4)
    table = cache.compute(range(10), tail=False)
    assert len(table.blocks) == 3
    assert held_slots(table) - table.length == 2
    assert [cache.pool.fill[block] for block in table.blocks] == [4, 4, 2]


def test_fifty_tokens_waste_14_slots_in_pages_of_16_and_1998_in_a_reservation() -> None:
    reserved = 2048  # contiguous: prompt and the longest possible answer, in one piece
    cache = Cache(reserved // 16, 16)
    table = cache.compute(range(50), tail=False)
    assert reserved - table.length == 1998
    assert held_slots(table) - table.length == 14
    assert (cache.pool.free, len(table.blocks)) == (124, 4), "the rest of the reservation is free for others"


def test_waste_of_a_sequence_is_less_than_one_block() -> None:
    for size in (1, 2, 3, 4, 16):
        table = Cache(100, size).table()
        for length in range(1, 4 * size + 2):
            table.append(1)
            assert table.length == length
            assert 0 <= held_slots(table) - length < size


def test_block_table_0_to_5_1_to_12_2_to_3() -> None:
    """Other sequences come and go until exactly blocks 5, 12 and 3 are the next ones that are free."""
    cache = Cache(12, 4)
    others = [cache.table() for _ in range(12)]
    for other in others:
        other.append(4)  # block 1 to the first, 2 to the second …
    for block in (5, 12, 3):
        others[block - 1].release()

    table = cache.table()
    table.append(8)
    assert list(table.blocks) == [5, 12]
    table.append(2)
    assert list(table.blocks) == [5, 12, 3]
    assert slots(table) == [20, 21, 22, 23, 48, 49, 50, 51, 12, 13]
    cache.check()


def test_system_prompt_that_ends_inside_a_block_costs_each_session_one_copy() -> None:
    system = list(range(6))
    cache = Cache(20, 4)
    head, tail = cache.pin(system)
    tables = [cache.compute([*system, 10, 11, 12, 13, 14, 15], domain, len(system)) for domain in "abc"]

    assert [event.source for event in cache.heard if event.kind == "copy"] == [tail] * 3
    assert cache.pool.ref[head] == 3, "all sessions share the block that the prompt fills"
    assert cache.pool.ref[tail] == 0, "and hold copies of the one in which it ends"
    assert len({table.blocks[1] for table in tables}) == 3
    tables[0].append(3)
    assert cache.kinds("copy") == 3, "later tokens cost no copy"


def test_system_prompt_that_ends_on_an_edge_costs_no_copy() -> None:
    system = list(range(8))
    cache = Cache(20, 4)
    blocks = cache.pin(system)
    tables = [cache.compute([*system, 10, 11], domain, len(system)) for domain in "ab"]
    assert [list(table.blocks[:2]) for table in tables] == [blocks, blocks]
    assert cache.kinds("copy") == 0


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9])
def test_system_prompt_is_shared_to_its_last_token_and_not_one_further(length: int) -> None:
    system = list(range(length))
    question = [50, 51, 52, 53, 54]
    cache = Cache(20, 4)
    cache.pin(system)
    cache.compute([*system, *question], "a", length)
    assert cache.found == length
    cache.compute([*system, *question], "b", length)
    assert cache.found == length, "b asks what a asked, and shares the system prompt alone"
    cache.compute([*system, *question], "a", length)
    assert cache.found == length + len(question), "a shares with itself all that it asked"


def test_sharing_domains_find_nothing_of_each_other() -> None:
    cache = Cache(20, 4)
    cache.compute(range(10), "a")
    cache.compute(range(10), "b")
    assert cache.found == 0
    cache.compute(range(10), "a")
    assert cache.found == 10


def test_a_prompt_without_registered_system_prompt_finds_nothing_of_it() -> None:
    cache = Cache(20, 4)
    cache.pin(range(8))
    cache.compute(range(8), "a", 0)
    assert cache.found == 0


def test_a_partial_head_of_a_full_block_is_found_and_copied_on_write() -> None:
    cache = Cache(20, 4)
    first = cache.compute([1, 2, 3, 4, 5, 6, 7, 8])
    second = cache.table()
    assert second.find([1, 2, 3, 4, 5, 6, 9]) == 6
    assert list(second.blocks) == list(first.blocks)
    source, target = second.append(1) or (0, 0)
    assert source == first.blocks[1]
    assert list(second.blocks) == [first.blocks[0], target]
    assert (cache.pool.fill[target], cache.pool.fill[source]) == (3, 4)
    cache.check()


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_everything_is_found_and_nothing_allocated(length: int) -> None:
    cache = Cache(20, 4)
    first = cache.compute(range(length))
    free = cache.pool.free
    second = cache.compute(range(length))
    assert (cache.found, list(second.blocks), cache.pool.free) == (length, list(first.blocks), free)


def test_two_answers_of_one_prompt_share_it_and_copy_the_last_block_once() -> None:
    """Parallel sampling: the first that writes takes a copy, the last one writes in place."""
    cache = Cache(10, 4)
    first = cache.compute(range(7), tail=False)
    second = first.fork(2, 7, session=1)
    cache.tables.append(second)
    shared = list(first.blocks)
    assert list(second.blocks) == shared
    source, target = second.append(1) or (0, 0)
    assert (source, list(second.blocks)) == (shared[1], [shared[0], target])
    assert first.append(1) is None
    assert list(first.blocks) == shared
    cache.check()


def test_idle_blocks_are_evicted_least_recently_used_and_tails_first() -> None:
    cache = Cache(6, 4)
    first = cache.compute([1, 1, 1, 1, 1, 1])
    second = cache.compute([2, 2, 2, 2, 2, 2])
    old, recent = list(first.blocks), list(second.blocks)
    first.release()
    second.release()
    assert (cache.pool.free, cache.pool.idle) == (2, 4)
    cache.table().append(6 * 4)
    evicted = [event.block for event in cache.heard if event.kind == "evict"]
    assert evicted == [old[1], old[0], recent[1], recent[0]]
    cache.check()


def test_an_idle_block_can_be_pinned_and_is_never_evicted() -> None:
    cache = Cache(4, 4)
    table = cache.compute(range(6))
    blocks = list(table.blocks)
    table.release()
    for logical, block in enumerate(blocks):
        cache.pool.pin(block, logical=logical, at=6, name="tutor")
    cache.check()
    assert (cache.pool.available, cache.pool.idle) == (2, 0)
    with pytest.raises(PoolFull):
        cache.table().append(3 * 4)
    assert cache.table().find(range(6)) == 6


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    pool = BlockPool(2, 4, EventLog())
    table = BlockTable(pool, 1, "a")
    table.append(7)
    seq, fill = pool.events.seq, list(pool.fill)
    with pytest.raises(PoolFull):
        table.append(2)
    assert (table.length, len(table.blocks), pool.events.seq, pool.fill) == (7, 2, seq, fill)
    table.append(1)
    pool.check([table])
