"""The pool's tensors: copies, stores, and how many blocks there are."""

import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from chatpage.errors import SettingError
from chatpage.model.kv import (
    Budget,
    KVPool,
    LayerShape,
    Wish,
    bytes_per_block,
    free_memory,
    lacks_memory,
    size_pool,
)

LAYERS = (LayerShape(2, 8, 6), LayerShape(1, 4, 4))


@pytest.fixture
def pool() -> KVPool:
    pool = KVPool(LAYERS, num_blocks=5, block_size=4, device="cpu", dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    for blocks in (*pool.keys, *pool.values):
        blocks.copy_(torch.randn(blocks.shape, generator=random))
    return pool


def snapshot(pool: KVPool) -> list[torch.Tensor]:
    return [blocks.clone() for blocks in (*pool.keys, *pool.values)]


def test_copies_read_before_they_write(pool):
    """1→2, 2→3 and 3→1 in one list: every target gets what its source held before the list."""
    before = snapshot(pool)
    pool.copy_blocks([(1, 2), (2, 3), (3, 1)])
    for old, new in zip(before, snapshot(pool), strict=True):
        assert torch.equal(new, old[[0, 3, 1, 2, 4, 5]])


def test_one_source_for_two_targets(pool):
    before = snapshot(pool)
    pool.copy_blocks([(4, 2), (4, 5)])
    for old, new in zip(before, snapshot(pool), strict=True):
        assert torch.equal(new, old[[0, 1, 4, 3, 4, 4]])


def test_no_copies(pool):
    before = snapshot(pool)
    pool.copy_blocks([])
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(pool), strict=True))


def test_store_writes_its_slots_and_no_others(pool):
    before = snapshot(pool)
    slots = torch.tensor([9, -1, 4])
    key, value = torch.full((3, 2, 8), 7.0), torch.full((3, 2, 6), 8.0)
    key[1] = value[1] = torch.nan  # slot −1: thrown away
    pool.store(0, slots, key, value)
    after = snapshot(pool)
    for old, new, number in [(before[0], after[0], 7.0), (before[2], after[2], 8.0)]:
        assert (new[2, 1] == number).all()
        assert (new[1, 0] == number).all()
        new[2, 1], new[1, 0] = old[2, 1], old[1, 0]
        assert torch.equal(new[1:], old[1:])
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[3], after[3])


def test_bytes_per_block_are_those_of_the_tensors(pool):
    total = sum(blocks.nbytes for blocks in (*pool.keys, *pool.values))
    assert pool.bytes_per_block == bytes_per_block(LAYERS, 4, torch.float32) == total // 6


BUDGET = Budget(free=10_000_000, step=0, share=0.5, bytes_per_block=1000)
WISH = Wish(kv_blocks=None, max_model_len=1000, max_positions=4000, sequences=256, block_size=16, shortest=20)

shares = st.integers(1, 100).map(lambda hundredths: hundredths / 100)
budgets = st.builds(
    Budget,
    free=st.integers(0, 10**12),
    step=st.integers(0, 10**11),
    share=shares | st.floats(1e-6, 1),
    bytes_per_block=st.integers(1, 10**8),
)
small_budgets = st.builds(
    Budget, free=st.integers(0, 3000), step=st.integers(0, 500), share=shares, bytes_per_block=st.integers(1, 50)
)
wishes = st.builds(
    Wish,
    kv_blocks=st.none() | st.integers(1, 60),
    max_model_len=st.none() | st.integers(2, 100),
    max_positions=st.just(100),
    sequences=st.integers(1, 20),
    block_size=st.integers(1, 20),
    shortest=st.integers(2, 30),
)


def test_blocks_take_a_share_of_what_the_step_leaves():
    assert BUDGET.blocks == 5000 - 1  # the null block is one of them
    assert replace(BUDGET, share=0.25).blocks == 2500 - 1
    assert replace(BUDGET, step=1_000_000).blocks == 4500 - 1
    assert replace(BUDGET, step=10_000_001).blocks == 0
    assert BUDGET.most == 10_000 - 1
    assert BUDGET.bytes_for(4999) == 10_000_000
    assert BUDGET.share_for(5100) == 0.52


@given(budgets, st.integers(1, 10**6))
def test_bytes_for_is_the_inverse_of_blocks(budget: Budget, blocks: int):
    needed = budget.bytes_for(blocks)
    assert replace(budget, free=needed).blocks == blocks or budget.bytes_per_block * budget.share < 1
    assert replace(budget, free=needed).blocks >= blocks
    assert replace(budget, free=needed - 1).blocks < blocks


@given(budgets)
def test_a_budget_has_the_memory_for_its_blocks(budget: Budget):
    assert not budget.blocks or budget.bytes_for(budget.blocks) <= budget.free
    assert budget.bytes_for(budget.blocks + 1) > budget.free
    assert budget.blocks <= budget.most


@given(budgets, st.data())
def test_share_for_is_the_inverse_too(budget: Budget, data: st.DataObject):
    if budget.most < 1:
        return
    blocks = data.draw(st.integers(1, budget.most))
    share = budget.share_for(blocks)
    assert 0 < share <= 1
    assert replace(budget, share=share).blocks >= blocks
    assert share <= 0.01 or replace(budget, share=round(share - 0.01, 2)).blocks < blocks


def test_a_pool_is_no_larger_than_can_be_filled():
    assert size_pool(BUDGET, WISH) == (4999, 1000)
    assert size_pool(BUDGET, replace(WISH, sequences=3)) == (3 * 63, 1000)
    assert size_pool(BUDGET, replace(WISH, max_model_len=None, sequences=3)) == (3 * 250, 4000)


def test_a_pool_as_set():
    assert size_pool(BUDGET, replace(WISH, kv_blocks=63)) == (63, 1000)
    assert size_pool(BUDGET, replace(WISH, kv_blocks=9999)) == (9999, 1000), "the share is for what is not set"


def test_a_context_that_nobody_asked_for_is_shortened():
    few = replace(BUDGET, free=200_000)
    assert size_pool(few, replace(WISH, max_model_len=None)) == (99, 99 * 16)
    with pytest.raises(SettingError, match="one sequence of 1600 tokens"):
        size_pool(few, replace(WISH, max_model_len=1600))


@pytest.mark.parametrize(
    ("budget", "wish", "said"),
    [
        (
            BUDGET,
            replace(WISH, kv_blocks=62),
            "--kv-blocks is 62, but one sequence of 1000 tokens takes 63 blocks of 16: use --kv-blocks 63 or "
            "--max-model-len 992.",
        ),
        (
            replace(BUDGET, free=63_000),
            replace(WISH, kv_blocks=62),
            "--kv-blocks is 62, but one sequence of 1000 tokens takes 63 blocks of 16: use --max-model-len 992.",
        ),
        (
            replace(BUDGET, free=63_000),
            replace(WISH, kv_blocks=63),
            "--kv-blocks is 63, but so many blocks of 1000 bytes do not fit into the free 0 MiB, which holds 62: use "
            "--kv-blocks 62 with --max-model-len 992.",
        ),
        (
            replace(BUDGET, step=2_000_000),
            replace(WISH, kv_blocks=8000),
            "--kv-blocks is 8000, but so many blocks of 1000 bytes do not fit into the 8 MiB that the largest step "
            "leaves of 10 MiB, which holds 7999: use --kv-blocks 7999.",
        ),
        (
            replace(BUDGET, free=100_000),
            WISH,
            "--kv-memory 0.5 of the free 0 MiB holds 49 blocks, but one sequence of 1000 tokens takes 63 blocks "
            "(0 MiB): free some memory, or use --kv-memory 0.64 or --max-model-len 784.",
        ),
        (
            replace(BUDGET, free=500),
            WISH,
            "--kv-memory 0.5 of the free 0 MiB holds 0 blocks, but one sequence of 1000 tokens takes 63 blocks "
            "(0 MiB): free some memory, or use a smaller model.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(budget: Budget, wish: Wish, said: str):
    with pytest.raises(SettingError) as caught:
        size_pool(budget, wish)
    assert str(caught.value) == said


@given(small_budgets, wishes)
@example(Budget(3, 0, 0.1, 1), Wish(None, 2, 100, 1, 1, 2))
def test_a_pool_fits_and_holds_a_sequence_or_the_advice_is_good(budget: Budget, wish: Wish):
    try:
        blocks, longest = size_pool(budget, wish)
    except SettingError as error:
        said = str(error)
    else:
        assert blocks * wish.block_size >= longest
        assert (blocks + 1) * budget.bytes_per_block <= budget.rest
        assert wish.kv_blocks or blocks <= budget.blocks
        assert longest == wish.max_model_len or longest >= min(wish.shortest, wish.max_positions)
        return
    for way in re.split(", | or ", said[said.index("use ") :]):
        values = dict(re.findall(r"--([a-z-]+) ([\d.]*\d)", way))
        share = float(values.pop("kv-memory", budget.share))
        better = replace(wish, **{name.replace("-", "_"): int(value) for name, value in values.items()})
        if (share, better) != (budget.share, wish):
            assert size_pool(replace(budget, share=share), better), way


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("an illegal memory access"), False),
        (ValueError(), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, lacks: bool):
    assert lacks_memory(error) == lacks
    later = RuntimeError("the capture was broken off")
    later.__context__ = error
    assert lacks_memory(later) == lacks


def test_memory_that_cannot_be_had_at_all():
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        KVPool(LAYERS, 9 * 10**12, 4, "cpu", torch.float32)
    assert lacks_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert lacks_memory(caught.value)


def test_free_memory_of_this_machine():
    assert free_memory("cpu") > 2**20


def test_blocks_that_are_not_used_take_no_memory():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    pool = KVPool((LayerShape(kv_heads=8, key_size=64, value_size=64),), 4000, 16, "cpu", torch.float32)
    assert pool.bytes_per_block * pool.num_blocks > 200 * 2**20
    assert resident() - before < 8 * 2**20
    slots = torch.arange(16, 16 * 501)
    numbers = torch.ones(len(slots), 8, 64)
    pool.store(0, slots, numbers, numbers)
    assert 28 * 2**20 < resident() - before < 80 * 2**20
    assert pool.keys[0][501:].count_nonzero() == 0
