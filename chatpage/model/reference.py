"""Paged attention in plain torch: slow on a GPU, good enough on a CPU, and what every kernel is compared with.

Memory past a sequence's end is never read, not even under a mask (0 × NaN is NaN): wherever a gather needs filling up,
it reads the sequence's first token instead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chatpage.model.batch import Batch
from chatpage.model.kv import KVPool

# Queries of a chunk that attend at once: bounds the scores, and spares the early ones the keys of the later ones.
TILE = 128
# Decodes attend together where their contexts differ by a factor of two at most; below this many tokens, always.
SHORT = 256


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that attend together: `rows` neighbouring rows of the batch, with `queries` tokens each.

    Attributes:
        first_row, rows: rows of the batch's tables.
        first_token, queries: the tokens first_token … first_token + rows * queries − 1 of the batch.
        starts: (rows,), position of each row's first query.
        context: longest context among them.
    """

    first_row: int
    rows: int
    first_token: int
    queries: int
    starts: Tensor
    context: int


@dataclass(frozen=True, slots=True)
class Reach:
    """What a group's queries read: slots (rows, keys) of the pool; mask (rows, 1, queries, keys), or None for all."""

    slots: Tensor
    mask: Tensor | None


class ReferenceAttention:
    """Attends for one step; what depends on the batch alone is worked out once, not in each layer."""

    def __init__(self, pool: KVPool, batch: Batch) -> None:
        self.pool = pool
        self.batch = batch
        self.groups = _groups(batch)
        self._reaches: dict[int | None, list[Reach]] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.pool.store(layer, self.batch.slots, key, value)
        keys, values = self.pool.flat(self.pool.keys[layer]), self.pool.flat(self.pool.values[layer])
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        for group, reach in zip(self.groups, self._reach(window), strict=True):
            tokens = slice(group.first_token, group.first_token + group.rows * group.queries)
            asked = query[tokens].unflatten(0, (group.rows, group.queries)).transpose(1, 2)
            answer = attention(
                asked,
                _gather(keys, reach.slots),
                _gather(values, reach.slots),
                reach.mask,
                scaling=scaling,
                softcap=softcap,
                sinks=sinks,
            )
            out[tokens] = answer.transpose(1, 2).flatten(0, 1)
        return out

    def _reach(self, window: int | None) -> list[Reach]:
        if window not in self._reaches:
            self._reaches[window] = [_reach(group, self.batch, window) for group in self.groups]
        return self._reaches[window]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped heads: (rows, heads, queries, value_size).

    Args:
        query: (rows, heads, queries, key_size).
        key, value: (rows, kv_heads, keys, key_size or value_size); heads is a multiple of kv_heads.
        mask: (rows, 1, queries, keys), True where a query sees a key; None lets it see all.
        scaling, softcap, sinks: see `chatpage.model.attention.Attention`.
    """
    rows, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    if softcap is None and sinks is None:
        if queries > 1:
            return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=heads > kv_heads)
        # One query a row: the heads that share keys become its queries, so that no key is repeated.
        packed = query.reshape(rows, kv_heads, -1, query.shape[-1])
        return F.scaled_dot_product_attention(packed, key, value, mask, scale=scaling).reshape(rows, heads, 1, -1)
    packed = query.reshape(rows, kv_heads, -1, query.shape[-1])
    scores = (packed @ key.transpose(2, 3)).float().mul_(scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, kv_heads, -1, queries, key.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, kv_heads, -1, 1, 1).expand(rows, -1, -1, queries, -1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.flatten(2, 3) @ value).view(rows, heads, queries, -1)


def _groups(batch: Batch) -> list[Group]:
    """Decodes of similar context together; a chunk alone, in tiles."""
    groups: list[Group] = []
    first_row = first_token = 0
    while first_row < len(batch.rows):
        row = batch.rows[first_row]
        if len(row.tokens) > 1:
            groups += _tiles(batch, first_row, first_token)
            rows = 1
        else:
            longest = max(2 * row.context, SHORT)
            similar = [r for r in batch.rows[first_row:] if len(r.tokens) == 1 and r.context <= longest]
            rows = len(similar)
            starts = batch.positions[first_token : first_token + rows]
            groups.append(Group(first_row, rows, first_token, 1, starts, similar[-1].context))
        first_row += rows
        first_token += rows * len(row.tokens)
    return groups


def _tiles(batch: Batch, row: int, first_token: int) -> list[Group]:
    length, start = len(batch.rows[row].tokens), batch.rows[row].start
    tiles = []
    for begin in range(0, length, TILE):
        queries = min(TILE, length - begin)
        token = first_token + begin
        tiles.append(Group(row, 1, token, queries, batch.positions[token : token + 1], start + begin + queries))
    return tiles


def _reach(group: Group, batch: Batch, window: int | None) -> Reach:
    """The keys from the first that any query of a row sees to the row's last, and which query sees which."""
    last = group.starts + group.queries - 1
    keys = group.context if window is None else min(group.context, window + group.queries - 1)
    positions = (last[:, None] + 1 - keys).clamp(min=0) + torch.arange(keys, device=last.device)
    inside = positions <= last[:, None]
    read = positions.where(inside, 0)
    tables = batch.tables[group.first_row : group.first_row + group.rows]
    slots = tables.gather(1, read // batch.block_size) * batch.block_size + read % batch.block_size
    if group.rows == 1 and group.queries == 1:
        return Reach(slots, None)
    asked = group.starts[:, None] + torch.arange(group.queries, device=last.device)
    mask = positions[:, None] <= asked[:, :, None]
    if window is not None:
        mask &= positions[:, None] > asked[:, :, None] - window
    return Reach(slots, mask[:, None])


def _gather(flat: Tensor, slots: Tensor) -> Tensor:
    """Rows (slots, heads, size) of the pool as (rows, heads, keys, size)."""
    return flat.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)
