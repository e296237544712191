"""The block pool as tensors: where keys and values live, how blocks are copied, and how many there can be.

    keys of one layer    (num_blocks + 1, block_size, kv_heads, key_size)
    slot of a token      block * block_size + position % block_size

Block 0 is the null block: what must not be kept is written there, and nobody reads it.
"""

import math
import mmap
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from chatpage.errors import SettingError

# On a CPU the pool shares its memory with everything else on the machine: enough for so many full-length sequences.
CPU_SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores for a token."""

    kv_heads: int
    key_size: int
    value_size: int


class KVPool:
    """Keys and values of every layer, in blocks.

    Attributes:
        num_blocks: blocks that can be handed out: ids 1 to num_blocks.
        bytes_per_block: of keys and values, all layers together.
    """

    def __init__(
        self,
        layers: tuple[LayerShape, ...],
        num_blocks: int,
        block_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block(layers, block_size, dtype)
        blocks = (num_blocks + 1, block_size)
        self.keys = [_zeros((*blocks, s.kv_heads, s.key_size), device, dtype) for s in layers]
        self.values = [_zeros((*blocks, s.kv_heads, s.value_size), device, dtype) for s in layers]

    def store(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the keys (tokens, kv_heads, key_size) and values of one layer. Slot −1 is skipped: the null block's."""
        slots = slots.clamp(min=0)
        self.flat(self.keys[layer]).index_copy_(0, slots, key)
        self.flat(self.values[layer]).index_copy_(0, slots, value)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target), in all layers. Every source is read before any target is written."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
        for blocks in self.tensors:
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))

    @property
    def tensors(self) -> list[Tensor]:
        """All keys and values, (num_blocks + 1, …) each."""
        return [*self.keys, *self.values]

    @staticmethod
    def flat(blocks: Tensor) -> Tensor:
        """The same memory with one row a slot."""
        return blocks.flatten(0, 1)


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Zeros. On a CPU the system gives the memory page by page, at the first write: blocks never used cost nothing."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    try:
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"{math.prod(shape)} numbers do not fit into memory") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def bytes_per_block(layers: tuple[LayerShape, ...], block_size: int, dtype: torch.dtype) -> int:
    numbers = sum(shape.kv_heads * (shape.key_size + shape.value_size) for shape in layers)
    return block_size * numbers * dtype.itemsize


@dataclass(frozen=True, slots=True)
class Budget:
    """How many blocks there is memory for, and what would hold others.

        free   ┌ largest step ┬ blocks, the null block too: a share of the rest ┬ left alone ┐

    Attributes:
        free: bytes, while there is no pool.
        step: bytes of them that the largest step takes.
        share: of the rest, for the pool.
        bytes_per_block: in all layers.
    """

    free: int
    step: int
    share: float
    bytes_per_block: int

    @property
    def rest(self) -> int:
        """Bytes that the largest step leaves."""
        return max(0, self.free - self.step)

    @property
    def blocks(self) -> int:
        """How many blocks fit, the null block left out."""
        return max(0, int(self.rest * _exact(self.share)) // self.bytes_per_block - 1)

    @property
    def most(self) -> int:
        """How many blocks would fit if the pool took all of the rest."""
        return replace(self, share=1.0).blocks

    def bytes_for(self, blocks: int) -> int:
        """The least free memory that holds so many blocks."""
        return self.step + math.ceil((blocks + 1) * self.bytes_per_block / _exact(self.share))

    def share_for(self, blocks: int) -> float:
        """The least share, in hundredths, that holds so many blocks, `most` at most."""
        return math.ceil(Fraction(100 * (blocks + 1) * self.bytes_per_block, self.rest)) / 100

    def __str__(self) -> str:
        if not self.step:
            return f"the free {mib(self.free)}"
        return f"the {mib(self.rest)} that the largest step leaves of {mib(self.free)}"


def _exact(share: float) -> Fraction:
    """The decimal number that was written."""
    return Fraction(str(share))


@dataclass(frozen=True, slots=True)
class Wish:
    """What a pool should be like.

    Attributes:
        kv_blocks: how many blocks; None takes what there is memory for.
        max_model_len: how many tokens a sequence can have; None takes max_positions, or what there is memory for.
        max_positions: tokens that the model allows.
        sequences: of full length; what more than these could fill is not taken.
        block_size: slots in a block.
        shortest: tokens that a sequence must be able to have for the pool to be of use.
    """

    kv_blocks: int | None
    max_model_len: int | None
    max_positions: int
    sequences: int
    block_size: int
    shortest: int


def size_pool(budget: Budget, wish: Wish) -> tuple[int, int]:
    """How many blocks the pool gets, the null block left out, and how many tokens a sequence can have.

    Raises:
        SettingError: one sequence of full length would not fit, or the blocks not into memory; the message says what
            would.
    """
    longest = wish.max_model_len or wish.max_positions
    if wish.kv_blocks is not None:
        _require_blocks(budget, wish, wish.kv_blocks, -(-longest // wish.block_size))
        return wish.kv_blocks, longest
    fits = budget.blocks * wish.block_size
    if wish.max_model_len is None and fits >= wish.shortest:
        longest = min(longest, fits)
    per_sequence = -(-longest // wish.block_size)
    if budget.blocks < per_sequence:
        shares = [f"--kv-memory {budget.share_for(per_sequence):g}"] if per_sequence <= budget.most else []
        raise SettingError(
            f"--kv-memory {budget.share:g} of {budget} holds {budget.blocks} blocks, but one sequence of {longest} "
            f"tokens takes {per_sequence} blocks ({mib((per_sequence + 1) * budget.bytes_per_block)}): free some "
            f"memory, or use {_either(*shares, *_shorter(wish, budget.blocks))}."
        )
    return min(budget.blocks, wish.sequences * per_sequence), longest


def _require_blocks(budget: Budget, wish: Wish, blocks: int, per_sequence: int) -> None:
    most = budget.most
    if blocks > most:
        fewer = f"--kv-blocks {most}"
        ways = [fewer] if most >= per_sequence else [f"{fewer} with {way}" for way in _shorter(wish, most)]
        raise SettingError(
            f"--kv-blocks is {blocks}, but so many blocks of {budget.bytes_per_block} bytes do not fit into {budget}, "
            f"which holds {most}: use {_either(*ways)}."
        )
    if blocks < per_sequence:
        longest = wish.max_model_len or wish.max_positions
        more = [f"--kv-blocks {per_sequence}"] if per_sequence <= most else []
        raise SettingError(
            f"--kv-blocks is {blocks}, but one sequence of {longest} tokens takes {per_sequence} blocks of "
            f"{wish.block_size}: use {_either(*more, *_shorter(wish, blocks))}."
        )


def _shorter(wish: Wish, blocks: int) -> list[str]:
    """The longest context that so many blocks hold, where it is long enough."""
    length = blocks * wish.block_size
    return [f"--max-model-len {length}"] if length >= wish.shortest else []


def _either(*ways: str) -> str:
    *others, last = ways or ("a smaller model",)
    return f"{', '.join(others)} or {last}" if others else last


def free_memory(device: torch.device | str) -> int:
    """Bytes that a pool on `device` could take now."""
    device = torch.device(device)
    if device.type == "cuda":
        empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    limits = [_memory_available(), _container_memory_left()]
    return min(limit for limit in limits if limit is not None)


def empty_cache() -> None:
    """Give back what torch keeps on a GPU for later allocations, in pieces that may all be too small."""
    torch.cuda.empty_cache()


def lacks_memory(error: BaseException | None) -> bool:
    """Whether it was raised, or something on the way to it, because an allocation failed."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if "out of memory" in str(error) or "can't allocate memory" in str(error):  # of the driver; of a CPU
            return True
        error = error.__cause__ or error.__context__
    return False


def _memory_available() -> int:
    """Free memory of the machine; half of what is built in where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 2**31


def _container_memory_left() -> int | None:
    """What the container's limit leaves, if there is one (cgroup v2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        return max(0, int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):  # no such files, or "max"
        return None


def mib(count: int) -> str:
    """A number of bytes, to be read."""
    return f"{count / 2**20:,.0f} MiB"
