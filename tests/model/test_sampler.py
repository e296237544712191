"""Tokens fall as often as they should, and each depends on its own row alone."""

import itertools
import math

import pytest
import torch

import chatpage.model.sampler as sampler
from chatpage.model.batch import Draw
from chatpage.model.sampler import sample, uniform
from chatpage.schedule.params import SamplingParams

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, -math.inf, 1.9, 0.5])


def draws(params: SamplingParams, count: int, seed: int = 11) -> list[Draw]:
    return [Draw(params, seed=seed, choice=0, position=position) for position in range(count)]


def tokens(logits: torch.Tensor, wishes: list[Draw]) -> list[int | None]:
    return [drawn.token for drawn in sample(logits, wishes)]


def shares(params: SamplingParams, count: int = 4000) -> torch.Tensor:
    drawn = torch.tensor(tokens(LOGITS.expand(count, -1), draws(params, count)))
    return torch.bincount(drawn, minlength=len(LOGITS)) / count


def assert_distribution(found: torch.Tensor, expected: torch.Tensor, count: int = 4000) -> None:
    """Pearson's chi-squared stays below what one run in a thousand exceeds (7 degrees of freedom at most)."""
    assert (found[expected == 0] == 0).all()
    possible = expected > 0
    chi_squared = count * ((found - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < 24.3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature(temperature):
    assert_distribution(shares(SamplingParams(temperature=temperature)), (LOGITS / temperature).softmax(0))


def test_top_k():
    kept = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
    assert_distribution(shares(SamplingParams(top_k=3)), LOGITS.masked_fill(~kept, -math.inf).softmax(0))


def test_top_p():
    """The two likeliest have 0.65 of the whole, the third is needed to reach 0.7."""
    kept = torch.tensor([0, 1, 0, 1, 0, 0, 1, 0], dtype=torch.bool)
    assert_distribution(shares(SamplingParams(top_p=0.7)), LOGITS.masked_fill(~kept, -math.inf).softmax(0))


def test_top_p_is_taken_of_what_top_k_leaves():
    """Of the three likeliest, the first two have 0.81."""
    kept = torch.tensor([0, 1, 0, 0, 0, 0, 1, 0], dtype=torch.bool)
    expected = LOGITS.masked_fill(~kept, -math.inf).softmax(0)
    assert_distribution(shares(SamplingParams(top_k=3, top_p=0.7)), expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1e-9),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(temperature=2, top_k=1, top_p=0.5),
    ],
)
def test_the_likeliest_only(params):
    assert set(tokens(LOGITS.expand(50, -1), draws(params, 50))) == {1}


def test_a_draw_does_not_depend_on_the_batch():
    random = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(24, 50, generator=random)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.9),
        SamplingParams(),
    ]
    wishes = [Draw(kinds[i % 6], seed=i - 9, choice=i % 2, position=3 * i) for i in range(24)]
    together = tokens(logits, wishes)
    alone = [tokens(logits[i : i + 1], wishes[i : i + 1])[0] for i in range(24)]
    reverse = tokens(logits.flip(0), wishes[::-1])[::-1]
    assert together == alone == reverse
    assert len(set(together)) > 10


def test_seed_choice_and_position_each_change_the_draw():
    flat = torch.zeros(1, 10_000)
    drawn = {
        (seed, choice, position): tokens(flat, [Draw(SamplingParams(), seed, choice, position)])[0]
        for seed, choice, position in itertools.product([-(2**63), -1, 0, 1, 2**63 - 1], [0, 1], [0, 1, 2])
    }
    assert len(set(drawn.values())) >= len(drawn) - 2


def test_uniform_numbers_are_uniform_in_each_argument():
    for numbers in (
        [uniform(i, 0, 0) for i in range(4000)],
        [uniform(0, i, 0) for i in range(4000)],
        [uniform(0, 0, i) for i in range(4000)],
    ):
        assert all(0 <= number < 1 for number in numbers)
        tenths = torch.bincount((10 * torch.tensor(numbers)).long(), minlength=10)
        assert ((tenths - 400) ** 2 / 400).sum() < 27.9  # one in a thousand, 9 degrees of freedom
        following = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers)) / len(numbers) * 12
        assert abs(following) < 0.06


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=2, top_p=0.9)]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gets_no_token(params, bad):
    logits = LOGITS.repeat(3, 1)
    logits[1, 4] = bad
    whole = tokens(LOGITS.expand(3, -1), draws(params, 3))
    assert tokens(logits, draws(params, 3)) == [whole[0], None, whole[2]]
    assert tokens(torch.full((1, 8), -math.inf), draws(params, 1)) == [None]


def test_half_precision_logits():
    drawn = tokens(LOGITS.bfloat16().expand(200, -1), draws(SamplingParams(top_p=0.9), 200))
    assert set(drawn) <= {0, 1, 3, 6, 7}


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2.0**-40, 2)])
def test_the_ends_of_the_range_hit_no_impossible_token(number, token, monkeypatch):
    monkeypatch.setattr(sampler, "uniform", lambda *_: number)
    logits = torch.tensor([[-math.inf, 0.1, 0.2, -math.inf]])
    assert tokens(logits, draws(SamplingParams(), 1)) == [token]
