"""The pool's tensors: copies, stores, and how many blocks there are."""

import mmap
from pathlib import Path

import pytest
import torch

from chatpage.errors import SettingError
from chatpage.model.kv import CPU_SEQUENCES, KVPool, LayerShape, bytes_per_block, free_memory, num_blocks_for

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


NUMBERS = {
    "free_bytes": 10_000_000,
    "share": 0.5,
    "bytes_per_block": 1000,
    "kv_blocks": None,
    "max_model_len": 1000,
    "max_sequences": 256,
    "block_size": 16,
    "on_cpu": False,
}


def num_blocks(**changes) -> int:
    return num_blocks_for(**(NUMBERS | changes))


def test_num_blocks_is_the_share_of_the_free_memory():
    assert num_blocks() == 5000 - 1  # the null block is one of them
    assert num_blocks(share=0.25) == 2500 - 1


def test_num_blocks_is_no_more_than_can_be_filled():
    assert num_blocks(max_sequences=3) == 3 * 63
    assert num_blocks(on_cpu=True) == CPU_SEQUENCES * 63
    assert num_blocks(on_cpu=True, max_sequences=2) == 2 * 63


def test_num_blocks_as_set():
    assert num_blocks(kv_blocks=63) == 63
    assert num_blocks(kv_blocks=100_000, on_cpu=True) == 100_000


@pytest.mark.parametrize("changes", [{"kv_blocks": 62}, {"free_bytes": 63_999, "share": 1.0}])
def test_a_pool_too_small_for_one_sequence_is_refused_with_what_would_do(changes):
    with pytest.raises(SettingError, match=r"1000 tokens takes 63 blocks.*--max-model-len 992\.$"):
        num_blocks(**changes)
    assert num_blocks(**changes, max_model_len=992) == 62
    if "kv_blocks" in changes:
        assert num_blocks(kv_blocks=63) == 63
    else:
        assert num_blocks(free_bytes=64_000, share=1.0) == 63


def test_no_memory_at_all():
    with pytest.raises(SettingError, match="holds 0 blocks"):
        num_blocks(free_bytes=500)


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
