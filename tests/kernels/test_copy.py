"""The copy kernel: whole blocks, in all layers at once, as if every source were read before any target is written."""

from random import Random

import pytest
import torch
from torch import Tensor

from chatpage.kernels.copy import BlockCopier
from chatpage.model.kv import KVPool, LayerShape
from tests.kernels.case import same_bits
from tests.kernels.conftest import DEVICE, ON_GPU, needs_gpu

BLOCKS = 600 if ON_GPU else 30
SHAPES = (LayerShape(2, 64, 64), LayerShape(1, 80, 96), LayerShape(3, 24, 8), LayerShape(2, 256, 128))
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pools(block_size: int, dtype: torch.dtype = torch.float32, shapes: tuple[LayerShape, ...] = SHAPES) -> list[Tensor]:
    """Random keys and values of all layers, with some NaN in them."""
    pool = KVPool(shapes, BLOCKS, block_size, DEVICE, dtype)
    for memory in (*pool.keys, *pool.values):
        memory.copy_(torch.randn(memory.shape, device=DEVICE))
        memory[3, 1] = torch.nan
    return [*pool.keys, *pool.values]


def check(memories: list[Tensor], copier: BlockCopier, pairs: list[tuple[int, int]]) -> None:
    before = [memory.clone() for memory in memories]
    copier.copy(pairs)
    for memory, old in zip(memories, before, strict=True):
        wanted = old.clone()
        for source, target in pairs:
            wanted[target] = old[source]
        assert same_bits(memory, wanted), f"{pairs} in blocks of {tuple(old.shape[1:])}"


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(1, 2)],
        [(5, 5)],
        [(3, 30)],
        [(7, 1), (7, 2), (7, 3)],
        [(1, 2), (2, 3)],
        [(2, 3), (1, 2)],
        [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6)],
        [(1, 2), (2, 1)],
        [(1, 2), (2, 3), (3, 1), (1, 9), (8, 7)],
    ],
    ids=str,
)
def test_every_source_is_read_before_any_target_is_written(pairs):
    memories = pools(block_size=8)
    check(memories, BlockCopier(memories), pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [8, 12, 16, 64])
def test_random_pairs(block_size, dtype):
    """A copier is used again and again, for many blocks and few."""
    random = Random(block_size)
    memories = pools(block_size, dtype, SHAPES if ON_GPU or block_size < 64 else SHAPES[1:3])
    copier = BlockCopier(memories)
    for count in (1, 9, 0, 200 if ON_GPU else 5, 2):
        targets = random.sample(range(1, BLOCKS + 1), count)
        check(memories, copier, [(random.randint(1, BLOCKS), target) for target in targets])


def test_one_layer():
    memories = pools(16, shapes=SHAPES[:1])
    check(memories, BlockCopier(memories), [(4, 6), (6, 4)])


@needs_gpu
def test_a_chain_of_all_blocks_many_times():
    """Copies that run side by side meet each other's targets sooner or later."""
    memories = pools(16)
    copier = BlockCopier(memories)
    for _ in range(20):
        check(memories, copier, [(block, block % BLOCKS + 1) for block in range(1, BLOCKS + 1)])


@needs_gpu
def test_blocks_beyond_two_to_the_31_numbers():
    heads, size, block_size = 8, 128, 16
    count = 2**31 // (heads * size * block_size) + 100
    memory = torch.full((count, block_size, heads, size), torch.nan, device=DEVICE, dtype=torch.float16)
    for block in (1, count - 1):
        memory[block] = torch.randn_like(memory[block])
    old = {block: memory[block].clone() for block in (1, count - 1)}
    copier = BlockCopier([memory])
    copier.copy([(1, count - 2), (count - 1, 2)])
    copier.copy([(count - 1, count - 3), (count - 1, 1), (1, count - 1)])
    wanted = {1: count - 1, 2: count - 1, count - 3: count - 1, count - 2: 1, count - 1: 1}
    for block, source in wanted.items():
        assert same_bits(memory[block], old[source])
    assert int(memory.isnan().sum(dtype=torch.int64)) == (count - len(wanted)) * block_size * heads * size
