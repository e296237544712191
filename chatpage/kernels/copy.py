"""Copy-on-write: whole blocks of all layers in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatpage.device import to_device

TILE = 1024  # numbers that a program copies


@triton.jit
def _copy(pairs, addresses, sizes, TILE: tl.constexpr):
    pair, pool = tl.program_id(0), tl.program_id(1)
    size = tl.load(sizes + pool)
    at = tl.program_id(2) * TILE + tl.arange(0, TILE)
    blocks = tl.load(addresses + pool).to(tl.pointer_type(tl.int16))
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    inside = at < size
    tl.store(blocks + target * size + at, tl.load(blocks + source * size + at, mask=inside), mask=inside)


class BlockCopier:
    """Copies blocks in all the given pools, (blocks, …) each, contiguous, of two- or four-byte numbers."""

    def __init__(self, pools: list[Tensor]) -> None:
        self._pools = pools  # keeps the memory behind the addresses
        sizes = [pool[0].nbytes // 2 for pool in pools]
        device = pools[0].device
        self._addresses = torch.tensor([pool.data_ptr() for pool in pools], dtype=torch.int64, device=device)
        self._sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self._tiles = triton.cdiv(max(sizes), TILE)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copy (source, target). Every source is read before any target is written."""
        if not pairs:
            return
        where = to_device(pairs, self._addresses.device)
        sources, targets = zip(*pairs, strict=True)
        if set(sources).isdisjoint(targets):
            _copy[(len(pairs), len(self._pools), self._tiles)](where, self._addresses, self._sizes, TILE)
            return
        for pool in self._pools:  # side by side, one copy might read what another one has written
            pool.index_copy_(0, where[:, 1], pool.index_select(0, where[:, 0]))
