"""Greedy answers over the paged pool are those of transformers' `generate`, token for token."""

import pytest
import torch

import chatpage.model.reference as reference
from chatpage.model.batch import Draw, Drawn, Row
from chatpage.model.kv import KVPool
from chatpage.model.reference import Reach
from chatpage.model.sampler import BROKEN
from tests.model.conftest import BLOCK_SIZE
from tests.model.greedy import ANSWER, GREEDY, Sequence, answer, prompts, scattered_tables, their_answer

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss", "deepseek_v2"]


def tables(count: int, prompt: int) -> list[list[int]]:
    return scattered_tables(count, prompt + ANSWER, BLOCK_SIZE, num_blocks=64)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone(family, runner, theirs):
    [prompt] = prompts(1)
    expected = their_answer(theirs(family), prompt)
    assert len(set(expected)) >= 20, "an answer that goes in circles proves little"
    assert answer(runner(family), [Sequence(prompt, *tables(1, len(prompt)))]) == [expected]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7])
def test_in_chunks(family, chunk, runner, theirs):
    [prompt] = prompts(1)
    sequence = Sequence(prompt, *tables(1, len(prompt)), chunk=chunk)
    assert answer(runner(family), [sequence]) == [their_answer(theirs(family), prompt)]


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_mixed_batch(family, runner, theirs):
    """Sequences come in one after another, so that decodes and chunks of several lengths run in the same step."""
    asked = prompts(3)
    sequences = [
        Sequence(prompt, table, begins=3 * i, chunk=5 + i)
        for i, (prompt, table) in enumerate(zip(asked, tables(3, len(asked[-1])), strict=True))
    ]
    assert answer(runner(family), sequences) == [their_answer(theirs(family), prompt) for prompt in asked]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_shared_prefix(family, runner, theirs):
    """The second sequence has the first one's full blocks in its table, and a copy of the block the prefix ends in."""
    prefix, *endings = ([9, 30, 200, 7, 77, 150, 31, 8, 45, 99], [11, 12, 13], [14, 15, 16, 17])
    ours = runner(family)
    first_table, second_table = tables(2, 14)
    first = Sequence(prefix + endings[0], first_table)
    [first_answer] = answer(ours, [first])

    whole, tail = divmod(len(prefix), BLOCK_SIZE)
    assert tail, "the prefix must end inside a block"
    second_table[:whole] = first_table[:whole]
    before = contents(ours.pool, first_table)
    ours.copy([(first_table[whole], second_table[whole])])
    for of_first, of_second in zip(
        *[contents(ours.pool, [t[whole]]) for t in (first_table, second_table)], strict=True
    ):
        assert torch.equal(of_first[:tail], of_second[:tail])

    second = Sequence(prefix + endings[1], second_table, computed=len(prefix))
    [second_answer] = answer(ours, [second])
    assert first_answer == their_answer(theirs(family), prefix + endings[0])
    assert second_answer == their_answer(theirs(family), prefix + endings[1])
    for old, new in zip(before, contents(ours.pool, first_table), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


def contents(pool: KVPool, table: list[int]) -> list[torch.Tensor]:
    """Keys and values of each layer in these blocks, one row a slot."""
    return [blocks[table].flatten(0, 1).clone() for blocks in (*pool.keys, *pool.values)]


@pytest.mark.parametrize("family", FAMILIES)
def test_last_token_again(family, runner):
    """A token whose keys and values are there already can run for its logits alone, and writes nothing."""
    ours = runner(family)
    [prompt] = prompts(1)
    [table] = tables(1, len(prompt))
    draw = Draw(GREEDY, seed=0, choice=0, position=len(prompt))
    [token] = ours.run([Row(prompt, 0, table, sample=draw)])
    before = contents(ours.pool, list(range(1, 65)))
    assert ours.run([Row(prompt[-1:], len(prompt) - 1, table, store=False, sample=draw)]) == [token]
    for old, new in zip(before, contents(ours.pool, list(range(1, 65))), strict=True):
        assert torch.equal(old.nan_to_num(), new.nan_to_num())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("missing", ["first", "newest before itself"])
def test_a_context_that_is_off_by_one_is_noticed(family, missing, runner, theirs, monkeypatch):
    whole_reach = reference._reach

    def reach_less(group, batch, window):
        reach = whole_reach(group, batch, window)
        if group.queries > 1:
            return reach
        keep = list(range(reach.slots.shape[1]))
        del keep[0 if missing == "first" else -2]
        return Reach(reach.slots[:, keep], None if reach.mask is None else reach.mask[..., keep])

    monkeypatch.setattr(reference, "_reach", reach_less)
    [prompt] = prompts(1)
    wrong = answer(runner(family), [Sequence(prompt, *tables(1, len(prompt)))])
    assert wrong != [their_answer(theirs(family), prompt)]


def test_a_broken_sequence_disturbs_no_other(runner, theirs):
    """NaN in one sequence's keys and values: it gets no token, and its neighbours get theirs."""
    ours = runner("llama")
    asked = prompts(2)
    expected = [their_answer(theirs("llama"), prompt)[0] for prompt in asked]
    rows = [
        Row(prompt, 0, table, sample=Draw(GREEDY, seed=0, choice=0, position=len(prompt)))
        for prompt, table in zip(asked, tables(2, len(asked[-1])), strict=True)
    ]
    assert [drawn.token for drawn in ours.run(rows)] == expected
    for row in rows:
        row.start, row.tokens = len(row.tokens) - 1, row.tokens[-1:]
    ours.pool.keys[0][rows[0].table[0]] = torch.nan
    assert ours.run(rows) == [BROKEN, Drawn(expected[1])]
