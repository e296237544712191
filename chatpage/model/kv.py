"""The block pool as tensors: where keys and values live, how blocks are copied, and how many there can be.

    keys of one layer    (num_blocks + 1, block_size, kv_heads, key_size)
    slot of a token      block * block_size + position % block_size

Block 0 is the null block: what must not be kept is written there, and nobody reads it.
"""

import math
import mmap
import os
from dataclasses import dataclass
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


def affordable_blocks(free_bytes: int, share: float, bytes_per_block: int) -> int:
    """How many blocks, besides the null block, a share of the free memory holds."""
    return int(free_bytes * share) // bytes_per_block - 1


def num_blocks_for(
    *,
    free_bytes: int,
    share: float,
    bytes_per_block: int,
    kv_blocks: int | None,
    max_model_len: int,
    max_sequences: int,
    block_size: int,
    on_cpu: bool,
) -> int:
    """How many blocks the pool gets, the null block left out.

    The setting, if there is one; else what the share of the free memory holds, but no more than the sequences can fill.

    Raises:
        SettingError: one sequence of full length would not fit; the message says what would.
    """
    per_sequence = -(-max_model_len // block_size)
    sequences = min(max_sequences, CPU_SEQUENCES) if on_cpu else max_sequences
    affordable = affordable_blocks(free_bytes, share, bytes_per_block)
    blocks = min(affordable, sequences * per_sequence) if kv_blocks is None else kv_blocks
    if blocks >= per_sequence:
        return blocks
    shorter = f"--max-model-len {blocks * block_size}" if blocks >= 1 else "a smaller model"
    if kv_blocks is not None:
        raise SettingError(
            f"--kv-blocks is {kv_blocks}, but one sequence of {max_model_len} tokens takes {per_sequence} blocks "
            f"of {block_size}: set --kv-blocks to at least {per_sequence}, or use {shorter}."
        )
    needed = (per_sequence + 1) * bytes_per_block
    raise SettingError(
        f"--kv-memory {share:g} of the free {_mib(free_bytes)} holds {max(blocks, 0)} blocks, but one sequence "
        f"of {max_model_len} tokens takes {per_sequence} blocks ({_mib(needed)}): free some memory, or use {shorter}."
    )


def free_memory(device: torch.device | str) -> int:
    """Bytes that a pool on `device` could take now."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading took and gave back again
        return torch.cuda.mem_get_info(device)[0]
    limits = [_memory_available(), _container_memory_left()]
    return min(limit for limit in limits if limit is not None)


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


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
