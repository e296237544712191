"""Paged attention in plain torch: slow on a GPU, good enough on a CPU, and what every kernel is compared with.

Memory past a sequence's end is never read, not even under a mask (0 × NaN is NaN): wherever a gather needs filling up,
it reads the sequence's first token instead.

Decodes that begin with the same physical blocks read those once, all their queries as one matrix; each reads its own
blocks for itself, and one softmax goes over both.

    row 0   table [3, 4, 9]          shared [3, 4]   own [9]
    row 1   table [3, 4, 7, 2]                       own [7, 2]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from chatpage.cache.prefix import common_length
from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Row
from chatpage.model.kv import KVPool

Pair = tuple[Tensor, Tensor]  # keys and values

# Queries of a chunk that attend at once: bounds the scores, and spares the early ones the keys of the later ones.
TILE = 128
# Decodes attend together where what each reads for itself differs by a factor of two at most; below SHORT, always.
SHORT = 256
# Below this many shared keys, summed over the rows, two smaller products take longer than one gather.
WORTH_SHARING = 512


@dataclass(frozen=True, slots=True)
class Group:
    """Queries that attend together: `rows` neighbouring rows of the batch, with `queries` tokens each.

    Attributes:
        first_row, rows: rows of the batch's tables.
        first_token, queries: the tokens first_token … first_token + rows * queries − 1 of the batch.
        starts: (rows,), position of each row's first query.
        context: longest context among them.
        shared: leading tokens whose blocks all rows have in common, and each query sees.
    """

    first_row: int
    rows: int
    first_token: int
    queries: int
    starts: Tensor
    context: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Reach:
    """What a group's queries read.

    Attributes:
        slots: (rows, keys) of the pool; a slice where one row reads slots that lie side by side.
        mask: (rows, 1, queries, keys), True where a query sees a key; None where it sees all.
        shared: slots that all rows read, before those.
    """

    slots: Tensor | slice
    mask: Tensor | None
    shared: Tensor | slice | None = None


class ReferenceAttention:
    """Attends for one step; what depends on the batch alone is worked out once, not in each layer."""

    def __init__(self, pool: KVPool, batch: Batch) -> None:
        self.pool = pool
        self.batch = batch
        self.groups = _groups(batch)
        self._reaches: dict[int | None, list[tuple[Reach, Tensor | None]]] = {}  # by window, with their masks as biases

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.pool.store(layer, self.batch.slots, key, value)
        keys, values = self.pool.flat(self.pool.keys[layer]), self.pool.flat(self.pool.values[layer])
        answers = []
        for group, (reach, bias) in zip(self.groups, self._reach(call.window), strict=True):
            asked = query[group.first_token : group.first_token + group.rows * group.queries]
            answer = attention(
                asked.view(group.rows, group.queries, *asked.shape[1:]).transpose(1, 2),
                _gather(keys, reach.slots),
                _gather(values, reach.slots),
                bias,
                call,
                shared=None if reach.shared is None else (_gather(keys, reach.shared), _gather(values, reach.shared)),
            )
            answers.append(answer.transpose(1, 2).flatten(0, 1))
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _reach(self, window: int | None) -> list[tuple[Reach, Tensor | None]]:
        if window not in self._reaches:
            reaches = [_reach(group, self.batch, window) for group in self.groups]
            self._reaches[window] = [(reach, _bias(reach.mask, self.pool.keys[0].dtype)) for reach in reaches]
        return self._reaches[window]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    call: AttentionCall,
    *,
    shared: Pair | None = None,
) -> Tensor:
    """Softmax attention with grouped heads: (rows, heads, queries, value_size).

    Args:
        query: (rows, heads, queries, key_size).
        key, value: (rows, kv_heads, keys, key_size or value_size); heads is a multiple of kv_heads.
        bias: (rows, 1, queries, keys), 0 where a query sees a key, else −inf; None lets it see all.
        call: its window is in the bias.
        shared: keys and values (1, kv_heads, keys, size) that every row sees besides its own.
    """
    rows, heads, queries, _ = query.shape
    kv_heads = key.shape[1]
    scaling, is_plain = call.scaling, call.softcap is None and call.sinks is None
    if is_plain and shared is None and queries > 1:
        return F.scaled_dot_product_attention(query, key, value, bias, scale=scaling, enable_gqa=heads > kv_heads)
    # The heads that share keys become queries of one head, so that no key is repeated.
    packed = query.reshape(rows, kv_heads, -1, query.shape[-1])
    if is_plain and shared is None:
        answer = F.scaled_dot_product_attention(packed, key, value, bias, scale=scaling)
    elif is_plain and shared and bias is not None and query.is_cpu and key.shape[-1] == value.shape[-1]:
        answer = _merged(packed, key, value, bias, scaling, shared)
    else:
        answer = _explicit(packed, key, value, bias, call, shared)
    return answer.reshape(rows, heads, queries, -1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    call: AttentionCall,
    shared: Pair | None,
) -> Tensor:
    """Attention as the formula says: (rows, kv_heads, queries of all heads that share keys, value_size)."""
    rows, kv_heads = query.shape[:2]
    query = query.float() * call.scaling  # products of unscaled half-precision numbers may overflow
    scores = query @ key.float().transpose(2, 3)
    if shared is not None:
        scores = torch.cat([_product_with_shared(query, shared[0].float().transpose(2, 3)), scores], dim=-1)
    before = scores.shape[-1] - key.shape[2]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if bias is not None:
        scores[..., before:].unflatten(2, (-1, bias.shape[2])).add_(bias[:, :, None])
    if call.sinks is not None:
        queries = scores.shape[2] * kv_heads // len(call.sinks)
        column = call.sinks.float().view(1, kv_heads, -1, 1, 1).expand(rows, -1, -1, queries, -1)
        scores = torch.cat([scores, column.flatten(2, 3)], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)
    answer = weights[..., before : before + key.shape[2]] @ value
    if shared is not None:
        answer += _product_with_shared(weights[..., :before], shared[1])
    return answer


def _merged(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, shared: Pair) -> Tensor:
    """Attention to the shared keys and to each row's own, merged by the logarithms of their weights' sums.

    Faster than with one softmax over both: this kernel, the one behind `scaled_dot_product_attention`, never writes the
    scores down, and it hands out the sums. (It is no public function: `tests/model/test_reference.py` sees it change.)
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    together = query.transpose(0, 1).flatten(1, 2)[None]
    out, sums = kernel(together, *shared, scale=scaling)
    first = out[0].unflatten(1, (query.shape[0], -1)).transpose(0, 1)
    first_sums = sums[0].unflatten(1, (query.shape[0], -1)).transpose(0, 1)
    own, own_sums = kernel(query, key, value, attn_mask=bias, scale=scaling)
    return own.lerp(first, (first_sums - own_sums).sigmoid()[..., None].to(own.dtype))


def _product_with_shared(rows: Tensor, shared: Tensor) -> Tensor:
    """Products of (rows, kv_heads, n, k) with the one (1, kv_heads, k, m), all rows as one matrix."""
    together = rows.transpose(0, 1).flatten(1, 2)
    return (together @ shared[0]).unflatten(1, (rows.shape[0], -1)).transpose(0, 1)


def _groups(batch: Batch) -> list[Group]:
    """Decodes of one origin and similar length together; a chunk alone, in tiles."""
    groups: list[Group] = []
    first_row = first_token = 0
    while first_row < len(batch.rows):
        row = batch.rows[first_row]
        if len(row.tokens) > 1:
            groups += _tiles(batch, first_row, first_token)
            rows = 1
        else:
            rows = _alike(batch, first_row)
            together = batch.rows[first_row : first_row + rows]
            starts = batch.positions[first_token : first_token + rows]
            shared = _shared_tokens(together, batch.block_size) if rows > 1 else 0
            groups.append(Group(first_row, rows, first_token, 1, starts, together[-1].context, shared))
        first_row += rows
        first_token += rows * len(row.tokens)
    return groups


def _alike(batch: Batch, first: int) -> int:
    """How many decodes from row `first` on attend together: of the same origin, the longest not twice the shortest."""
    longest, last = max(2 * batch.rows[first].context, SHORT), first
    while last < len(batch.rows):
        row = batch.rows[last]
        if len(row.tokens) > 1 or row.context > longest or batch.origins[last] != batch.origins[first]:
            break
        last += 1
    return last - first


def _shared_tokens(rows: list[Row], block_size: int) -> int:
    """Leading tokens whose blocks all rows have, less than the shortest context; 0 where it is not worth it."""
    most = (rows[0].context - 1) // block_size
    first = rows[0].table[:most]
    blocks = min(common_length(first, row.table) for row in rows[1:])
    shared = blocks * block_size
    return shared if shared * (len(rows) - 1) >= WORTH_SHARING else 0


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
    keys = group.context if window is None else min(group.context, window + group.queries - 1)
    row = batch.rows[group.first_row]
    if group.rows == 1:
        first = group.context - keys
        slots = _slots(row.table, first, group.context, batch.block_size, group.starts.device)
        return Reach(slots, _mask(group, first, keys, window))
    shared = group.shared if window is None else 0
    keys -= shared
    last = group.starts
    positions = (last[:, None] + 1 - keys).clamp(min=shared) + torch.arange(keys, device=last.device)
    inside = positions <= last[:, None]
    read = positions.where(inside, shared)
    tables = batch.tables[group.first_row : group.first_row + group.rows]
    slots = tables.gather(1, read // batch.block_size) * batch.block_size + read % batch.block_size
    common = _slots(row.table, 0, shared, batch.block_size, last.device) if shared else None
    return Reach(slots, inside[:, None, None], common)


def _slots(table: Sequence[int], begin: int, end: int, block_size: int, device: torch.device) -> Tensor | slice:
    """Slots of the positions begin … end − 1 of one row; a slice where they lie side by side."""
    first, last = begin // block_size, (end - 1) // block_size
    blocks = list(table[first : last + 1])
    offset = begin - first * block_size
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        start = blocks[0] * block_size + offset
        return slice(start, start + end - begin)
    starts = torch.tensor(blocks, device=device)[:, None] * block_size
    return (starts + torch.arange(block_size, device=device)).flatten()[None, offset : offset + end - begin]


def _mask(group: Group, first: int, keys: int, window: int | None) -> Tensor | None:
    """Which keys from position `first` on each query of a single row sees; None for one query, which sees all."""
    if group.queries == 1:
        return None
    device = group.starts.device
    asked = group.starts[:, None] + torch.arange(group.queries, device=device)
    positions = first + torch.arange(keys, device=device)
    mask = positions <= asked[:, :, None]
    if window is not None:
        mask &= positions > asked[:, :, None] - window
    return mask[:, None]


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a mask adds to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _gather(flat: Tensor, slots: Tensor | slice) -> Tensor:
    """Rows (slots, heads, size) of the pool as (rows, heads, keys, size). A slice is not copied."""
    if isinstance(slots, slice):
        return flat[slots].transpose(0, 1)[None]
    return flat.index_select(0, slots.flatten()).view(*slots.shape, *flat.shape[1:]).transpose(1, 2)
