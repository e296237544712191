"""Tokens fall as often as they should, and each depends on its own row alone."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import chatpage.model.sampler as sampler
from chatpage.model.batch import Draw, Drawn
from chatpage.model.sampler import begin_sampling
from chatpage.schedule.params import SamplingParams

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, -math.inf, 1.9, 0.5])


def draws(params: SamplingParams, count: int, seed: int = 11) -> list[Draw]:
    return [Draw(params, seed=seed, choice=0, position=position) for position in range(count)]


def uniform(seed: int, choice: int, position: int) -> float:
    return float(sampler.uniform([Draw(SamplingParams(), seed, choice, position)])[0])


def sample(logits: torch.Tensor, wishes: list[Draw]) -> list[Drawn]:
    return begin_sampling(logits, wishes).drawn()


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
        SamplingParams(top_p=1e-60),
        SamplingParams(temperature=2, top_k=1, top_p=0.5),
    ],
)
def test_the_likeliest_only(params):
    assert set(tokens(LOGITS.expand(50, -1), draws(params, 50))) == {1}


def test_min_p():
    """A twentieth of the likeliest one's probability: −1 is too far from 2."""
    kept = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert_distribution(shares(SamplingParams(min_p=0.1)), LOGITS.masked_fill(~kept, -math.inf).softmax(0))
    assert set(tokens(LOGITS.expand(50, -1), draws(SamplingParams(min_p=1), 50))) == {1}


def test_a_bias_and_a_ban_and_penalties_change_the_shares():
    params = SamplingParams(logit_bias=((2, 2.5), (0, -1)), presence_penalty=0.5, frequency_penalty=-0.25)
    expected = LOGITS + torch.tensor([-1, 0, 2.5, 0, 0, 0, 0, 0]) - torch.tensor([0, 0, 0, 0, 0, 0, 0.25, -0.25])
    expected[3] = -math.inf
    wishes = [Draw(params, 5, 0, position, (1, 1, 6, 7, 7, 7), 2, (3, 99)) for position in range(4000)]
    drawn = torch.tensor(tokens(LOGITS.expand(4000, -1), wishes))
    assert_distribution(torch.bincount(drawn, minlength=8) / 4000, expected.softmax(0))


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=1.5, top_k=9, top_p=0.9),
    SamplingParams(),
    SamplingParams(min_p=0.1, logprobs=3),
    SamplingParams(temperature=0, repetition_penalty=1.4, logprobs=0),
    SamplingParams(temperature=0.9, presence_penalty=1, frequency_penalty=0.5),
    SamplingParams(logit_bias=((3, 4.0), (7, -100))),
    SamplingParams(temperature=0, logit_bias=((5, 9.0),), logprobs=2),
]


def test_a_draw_does_not_depend_on_the_batch():
    random = torch.Generator().manual_seed(5)
    count = 4 * len(KINDS)
    logits = 2 * torch.randn(count, 50, generator=random)
    past = torch.randint(50, (count, 12), generator=random).tolist()
    wishes: list[Draw | None] = [
        Draw(KINDS[i % len(KINDS)], i - 9, i % 2, 3 * i, past[i], i % 12, past[i][:3] if i % 3 == 0 else ())
        for i in range(count)
    ]
    wishes[7] = None
    together = sample(logits, wishes)
    alone = [sample(logits[i : i + 1], wishes[i : i + 1])[0] for i in range(count)]
    reverse = sample(logits.flip(0), wishes[::-1])[::-1]
    assert together == alone == reverse
    assert len({drawn.token for drawn in together}) > 15
    assert together[7] == Drawn()


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


@pytest.mark.parametrize("params", [*KINDS, SamplingParams(top_k=2, top_p=0.9)])
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
    monkeypatch.setattr(sampler, "uniform", lambda draws: np.full(len(draws), number))
    logits = torch.tensor([[-math.inf, 0.1, 0.2, -math.inf]])
    assert tokens(logits, draws(SamplingParams(), 1)) == [token]


# -- against transformers' own processors ------------------------------------------------------------------------------

VOCABULARY = 40


def processors(params: SamplingParams, banned: list[int], prompt_length: int) -> LogitsProcessorList:
    """In the order of transformers' `generate`, for one row. Presence and frequency it does not know."""
    chosen = LogitsProcessorList()
    if params.logit_bias:
        chosen.append(SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if banned:
        chosen.append(MinNewTokensLengthLogitsProcessor(prompt_length, 10**6, banned))
    if params.temperature not in (0, 1):
        chosen.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(TopPLogitsWarper(float(params.top_p)))
    if params.min_p:
        chosen.append(MinPLogitsWarper(float(params.min_p)))
    return chosen


tokens_ids = st.integers(0, VOCABULARY - 1)
wishes = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0, 0.5, 1, 1.7])},
    optional={
        "top_k": st.integers(0, VOCABULARY + 5),
        "top_p": st.floats(0.05, 1),
        "min_p": st.floats(0, 0.6),
        "repetition_penalty": st.floats(0.5, 2),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(tokens_ids, st.floats(-5, 5).filter(bool), max_size=4).map(
            lambda biases: tuple(biases.items())
        ),
    },
)
cases = st.lists(
    st.tuples(wishes, st.lists(tokens_ids, min_size=1, max_size=15), st.lists(tokens_ids, max_size=3)), max_size=5
)


@given(cases=cases, seed=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_what_may_be_drawn_and_how_likely_is_as_in_transformers(cases, seed):
    """The oracle gives each row's distribution; the uniform numbers are then laid out along it.

    A token is drawn exactly where the number falls between the shares of the tokens before it and with it.
    """
    logits = 3 * torch.randn(len(cases), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    draws = []
    for position, (wish, past, banned) in enumerate(cases):
        draws.append(Draw(SamplingParams(**wish), seed, 0, position, past, len(past) // 2, banned))
    for draw, row, drawn in zip(draws, logits, sample(logits.clone(), draws), strict=True):
        counts = Counter(draw.tokens[draw.prompt_length :])
        penalty = torch.zeros(VOCABULARY)
        for token, times in counts.items():
            penalty[token] = draw.params.presence_penalty + draw.params.frequency_penalty * times
        # Biases and bans do not care whether they come before it, and the repetition penalty must not see it.
        first, rest = processors(draw.params, list(draw.banned), 0), LogitsProcessorList()
        while first and type(first[-1]).__name__.endswith("Warper"):
            rest.insert(0, first.pop())
        ids = torch.tensor([draw.tokens])
        scores = first(ids, row[None].clone()) - penalty
        if draw.params.greedy:
            assert scores[0, drawn.token] == scores.max()
            continue
        ends = rest(ids, scores).softmax(-1)[0].double().cumsum(0)
        number = uniform(draw.seed, draw.choice, draw.position) * ends[-1]
        assert drawn.token is not None
        begin = ends[drawn.token - 1] if drawn.token else 0
        assert begin - 1e-5 <= number <= ends[drawn.token] + 1e-5


def test_nothing_can_be_drawn_that_transformers_would_rule_out():
    """The distribution's edges, with thousands of draws: filters that meet each other."""
    params = SamplingParams(temperature=1.6, top_k=12, top_p=0.85, min_p=0.2, repetition_penalty=1.3)
    row = 2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    past = [1, 4, 4, 9, 30]
    expected = processors(params, [], 0)(torch.tensor([past]), row[None].clone()).softmax(-1)[0]
    assert 3 < (expected > 0).sum() < 12
    wishes = [Draw(params, 1, 0, position, past, 2) for position in range(4000)]
    drawn = torch.tensor(tokens(row.expand(4000, -1), wishes))
    assert_distribution(torch.bincount(drawn, minlength=VOCABULARY) / 4000, expected)


def test_the_repetition_penalty_sees_the_bias():
    """(1 + 5) / 2 is less than 4, and 1 / 2 + 5 would be more."""
    params = SamplingParams(temperature=0, repetition_penalty=2, logit_bias=((0, 5),))
    past, logits = [0], torch.tensor([[1.0, 4.0]])
    assert tokens(logits.clone(), [Draw(params, 0, 0, 0, past, 1)]) == [1]
    assert processors(params, [], 0)(torch.tensor([past]), logits).argmax() == 1


# -- bans and log-probabilities ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_k=1)])
def test_what_is_banned_is_not_drawn_as_long_as_anything_is_left(params):
    def drawn(banned: list[int]) -> set[int | None]:
        wishes = [Draw(params, 2, 0, position, (), 0, banned) for position in range(60)]
        return set(tokens(LOGITS.expand(60, -1), wishes))

    assert not drawn([1, 6, 10**6]) & {1, 6, None}
    assert drawn([0, 1, 2, 3, 4, 6]) == {7}, "5 is impossible for the model"
    everything = drawn(list(range(8)))
    assert everything == drawn([])
    assert None not in everything


def test_a_ban_outdoes_a_bias():
    params = SamplingParams(temperature=0, logit_bias=((3, 100.0), (4, 90.0)))
    assert tokens(LOGITS[None], [Draw(params, 0, 0, 0, (), 0, (3,))]) == [4]


def test_log_probabilities_are_the_models_own():
    params = SamplingParams(
        temperature=0.2, top_k=2, repetition_penalty=2, logit_bias=((2, 50.0),), presence_penalty=2, logprobs=3
    )
    plain = SamplingParams(temperature=0, logprobs=0)
    silent = SamplingParams(temperature=0)
    draws = [Draw(params, 0, 0, 0, (1, 6), 0), Draw(plain, 0, 0, 0), Draw(silent, 0, 0, 0), None]
    first, second, third, fourth = sample(LOGITS.expand(4, -1), draws)
    own = LOGITS.log_softmax(0).tolist()
    assert first.logprob is not None
    assert (first.token, first.logprob.token) == (2, 2)
    assert first.logprob.logprob == pytest.approx(own[2], abs=1e-5)
    assert [token for token, _ in first.logprob.top] == [1, 6, 3]
    assert [value for _, value in first.logprob.top] == pytest.approx([own[1], own[6], own[3]], abs=1e-5)
    assert second.logprob is not None
    assert second.logprob.top == ()
    assert second.logprob.logprob == pytest.approx(own[1], abs=1e-5)
    assert third.logprob is fourth.logprob is None


def test_more_alternatives_than_tokens():
    [drawn] = sample(LOGITS[None], [Draw(SamplingParams(logprobs=20), 0, 0, 0)])
    assert drawn.logprob is not None
    assert len(drawn.logprob.top) == 8


def test_rows_that_ask_for_nothing_cost_one_maximum(monkeypatch):
    monkeypatch.setattr(sampler, "_choose", None)
    monkeypatch.setattr(torch.Tensor, "log_softmax", None)
    assert tokens(LOGITS.expand(3, -1), draws(SamplingParams(temperature=0), 3)) == [1, 1, 1]
