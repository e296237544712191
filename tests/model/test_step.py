"""The largest step, and a pool in place of another."""

import pytest
import torch

from chatpage.model.batch import Draw, Row
from chatpage.model.frame import largest, sizes
from chatpage.model.step import ModelRunner, largest_step
from chatpage.schedule.params import SamplingParams


@pytest.fixture
def runner(loaded) -> ModelRunner:
    return ModelRunner(loaded("llama"), num_blocks=1, block_size=4, max_rows=6)


@pytest.mark.parametrize(
    ("max_rows", "max_tokens", "max_context", "lengths"),
    [
        (6, 20, 100, [15, 1, 1, 1, 1, 1]),
        (6, 20, 8, [8, 8, 1, 1, 1, 1]),
        (6, 6, 8, [1] * 6),
        (6, 3, 8, [1] * 3),
        (6, 100, 2, [2] * 6),
        (1, 1, 8, [1]),
    ],
)
def test_the_largest_step_has_as_many_rows_and_tokens_as_there_may_be(
    runner: ModelRunner, max_rows: int, max_tokens: int, max_context: int, lengths: list[int]
) -> None:
    rows = largest_step(max_rows, max_tokens, max_context, 4)
    assert [len(row.tokens) for row in rows] == lengths
    assert all(row.context == (max_context if len(row.tokens) > 1 else 1) for row in rows)
    drawn = runner.run(rows)
    assert all(given.token is not None and given.logprob is not None for given in drawn)
    assert not any(numbers[1:].any() for numbers in runner.pool.tensors), "it keeps nothing"


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(256, 2048), (8, 8), (1, 1), (300, 7), (1, 4096)])
def test_the_largest_sizes_are_recorded_ones_with_room_for_the_largest_step(max_rows: int, max_tokens: int) -> None:
    rows = largest_step(max_rows, max_tokens, max_tokens, 4)
    chosen = largest(max_rows, max_tokens)
    assert set(chosen) <= set(sizes(max_rows, max_tokens))
    assert all(size.rows >= len(rows) and size.tokens == max_tokens for size in chosen)


def test_nothing_is_measured_on_a_cpu(runner: ModelRunner) -> None:
    assert runner.measure_step(max_tokens=100, max_context=50, recorded=False) == 0


def test_another_pool(runner: ModelRunner) -> None:
    """It is the one that is read, written and copied in."""
    draw = Draw(SamplingParams(temperature=0), seed=0, choice=0, position=5)
    [expected] = runner.run([Row([5, 6, 7, 8, 9], 0, [1, 0], sample=draw)])
    small = runner.pool
    runner.resize(5)
    assert runner.pool.num_blocks == 5
    assert not any(numbers.any() for numbers in runner.pool.tensors)
    small.keys[0].fill_(torch.nan)
    runner.run([Row([5, 6, 7, 8], 0, [3])])
    runner.copy([(3, 5)])
    assert runner.run([Row([9], 4, [5, 2], sample=draw)]) == [expected]
