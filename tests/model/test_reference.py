"""The torch attention against one query at a time, written as the formula says."""

import math

import pytest
import torch

import chatpage.model.reference as reference
from chatpage.model.attention import AttentionCall
from chatpage.model.batch import Batch, Draw, Row
from chatpage.model.kv import KVPool, LayerShape
from chatpage.model.reference import ReferenceAttention
from chatpage.schedule.params import SamplingParams

BLOCK_SIZE = 4
HEADS, KV_HEADS, KEY_SIZE, VALUE_SIZE = 6, 2, 8, 5
ROWS = [  # (tokens, start)
    (1, 30),
    (9, 0),
    (1, 0),
    (3, 14),
    (1, 5),
    (1, 16),
    (7, 3),
]


def naive(query, keys, values, *, window, softcap, sinks, scaling):
    """One query (heads, key_size) over its context (tokens, kv_heads, size)."""
    if window is not None:
        keys, values = keys[-window:], values[-window:]
    out = []
    for head in range(HEADS):
        kv_head = head // (HEADS // KV_HEADS)
        scores = [float(query[head] @ key[kv_head]) * scaling for key in keys]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        weights = [math.exp(score) for score in scores]
        total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
        out.append(sum(weight / total * value[kv_head] for weight, value in zip(weights, values, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 6, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("tile", [3, 128])
def test_every_query_sees_its_own_context(window, softcap, with_sinks, tile, monkeypatch):
    monkeypatch.setattr(reference, "TILE", tile)
    monkeypatch.setattr(reference, "SHORT", 8)
    random = torch.Generator().manual_seed(3)
    pool = KVPool((LayerShape(KV_HEADS, KEY_SIZE, VALUE_SIZE),), 40, BLOCK_SIZE, "cpu", torch.float32)
    pool.keys[0].fill_(torch.nan)
    pool.values[0].fill_(torch.nan)
    blocks = iter((torch.randperm(40, generator=random) + 1).tolist())
    rows, contexts = [], []
    for tokens, start in ROWS:
        length = start + tokens
        table = [next(blocks) for _ in range(-(-length // BLOCK_SIZE))]
        key = torch.randn(length, KV_HEADS, KEY_SIZE, generator=random)
        value = torch.randn(length, KV_HEADS, VALUE_SIZE, generator=random)
        slots = torch.tensor(Row([0] * length, 0, table).slots(BLOCK_SIZE))
        pool.store(0, slots[:start], key[:start], value[:start])
        rows.append(Row([0] * tokens, start, table))
        contexts.append((key, value))
    batch = Batch.build(rows, block_size=BLOCK_SIZE)
    query = torch.randn(len(batch.token_ids), HEADS, KEY_SIZE, generator=random)
    sinks = torch.randn(HEADS, generator=random) if with_sinks else None
    settings = {"window": window, "softcap": softcap, "sinks": sinks, "scaling": 0.3}
    fresh = [[part[rows[i].start :] for part in contexts[i]] for i in batch.order]
    key, value = (torch.cat(parts) for parts in zip(*fresh, strict=True))
    out = ReferenceAttention(pool, batch).attend(0, query, key, value, AttentionCall(**settings))
    index = 0
    for i in batch.order:
        key, value = contexts[i]
        for position in range(rows[i].start, rows[i].context):
            expected = naive(query[index], key[: position + 1], value[: position + 1], **settings)
            torch.testing.assert_close(out[index], expected, rtol=1e-4, atol=1e-5)
            index += 1


@pytest.mark.parametrize("window", [None, 6, 64])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("value_size", [VALUE_SIZE, KEY_SIZE])
def test_decodes_that_share_blocks_read_them_once(window, softcap, with_sinks, value_size, monkeypatch):
    """Three decodes behind a prefix of 12 tokens, one that shares only 4 of them, and one that shares none."""
    monkeypatch.setattr(reference, "WORTH_SHARING", 1)
    random = torch.Generator().manual_seed(4)
    pool = KVPool((LayerShape(KV_HEADS, KEY_SIZE, value_size),), 40, BLOCK_SIZE, "cpu", torch.float32)
    pool.keys[0].fill_(torch.nan)
    pool.values[0].fill_(torch.nan)
    tables = [[9, 2, 31, 5], [9, 2, 31, 12, 8], [9, 2, 31, 7, 20, 6], [9, 14, 15], [3, 4]]
    lengths = [13, 19, 24, 11, 7]
    for table, length in zip(tables, lengths, strict=True):
        slots = torch.tensor(Row([0] * length, 0, table).slots(BLOCK_SIZE))
        missing = pool.flat(pool.keys[0])[slots].isnan()[:, 0, 0]
        count = int(missing.sum())
        key = torch.randn(count, KV_HEADS, KEY_SIZE, generator=random)
        pool.store(0, slots[missing], key, torch.randn(count, KV_HEADS, value_size, generator=random))
    keys, values = pool.flat(pool.keys[0]).clone(), pool.flat(pool.values[0]).clone()
    batch = Batch.build([Row([0], n - 1, t) for t, n in zip(tables, lengths, strict=True)], block_size=BLOCK_SIZE)
    query = torch.randn(len(tables), HEADS, KEY_SIZE, generator=random)
    sinks = torch.randn(HEADS, generator=random) if with_sinks else None
    settings = {"window": window, "softcap": softcap, "sinks": sinks, "scaling": 0.3}
    attention = ReferenceAttention(pool, batch)
    assert max(group.shared for group in attention.groups) == 4, "the one that shares less limits the group"
    out = attention.attend(0, query, keys[batch.slots], values[batch.slots], AttentionCall(**settings))
    for i, row in enumerate(batch.rows):
        slots = Row([0] * row.context, 0, row.table).slots(BLOCK_SIZE)
        expected = naive(query[i], keys[slots], values[slots], **settings)
        torch.testing.assert_close(out[i], expected, rtol=1e-4, atol=1e-5)


def test_batch_is_flat_and_ordered():
    draw = Draw(SamplingParams(), seed=1, choice=0, position=3)
    rows = [
        Row([1, 2, 3], 0, [4], sample=draw),
        Row([7], 9, [1, 2, 3], store=False),
        Row([9], 5, [3, 8, 6], sample=draw),
    ]
    batch = Batch.build(rows, block_size=4)
    assert batch.order == [2, 1, 0]
    assert batch.token_ids.tolist() == [9, 7, 1, 2, 3]
    assert batch.positions.tolist() == [5, 9, 0, 1, 2]
    assert batch.slots.tolist() == [8 * 4 + 1, -1, 16, 17, 18]
    assert batch.query_starts.tolist() == [0, 1, 2, 5]
    assert batch.contexts.tolist() == [6, 10, 3]
    assert batch.tables.tolist() == [[3, 8, 6], [1, 2, 3], [4, 0, 0]]
    assert batch.sampled.tolist() == [0, 1, 4]


def test_rows_that_begin_with_the_same_block_are_side_by_side():
    rows = [Row([7], start, [first, 9]) for start, first in [(5, 3), (4, 8), (7, 1), (6, 3), (5, 2)]]
    batch = Batch.build(rows, block_size=4)
    assert [row.table[0] for row in batch.rows] == [8, 2, 1, 3, 3]
    assert batch.origins == [0, 0, 0, 3, 3]


def test_a_table_that_is_too_short_is_an_error():
    with pytest.raises(IndexError):
        Batch.build([Row([1, 2, 3, 4, 5], 0, [7])], block_size=4)
