"""Beams live, finish and end as in transformers' own beam search, to the last bit of their scores."""

import math
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

from chatpage.schedule.beam import Beam, Beams, BeamSearch, Finished, Move
from tests.checkpoints import SPECIAL_TOKENS, VOCAB_SIZE, make

Tokens = tuple[int, ...]
# Log-probabilities of the next token after these, by token.
Model = Callable[[Tokens], list[float]]

IMPOSSIBLE = -math.inf


def likeliest(logprobs: list[float], count: int) -> list[tuple[int, float]]:
    return sorted(enumerate(logprobs), key=lambda pair: pair[1], reverse=True)[:count]


def advance(search: BeamSearch, model: Model) -> list[Move]:
    return search.advance([likeliest(model(beam.tokens), search.candidates) for beam in search.live])


def run(search: BeamSearch, model: Model) -> BeamSearch:
    while not search.is_over:
        advance(search, model)
    return search


# -- what transformers answers -----------------------------------------------------------------------------------------


class Oracle:
    """A tiny model, its own `generate`, and the logits that `generate` had for each beginning of an answer.

    The search is handed the same logits, to the bit: which of two near ones is larger would else depend on the machine.
    """

    def __init__(self, folder: Path) -> None:
        self.module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.module.generation_config.eos_token_id = None
        self._known: dict[Tokens, torch.Tensor] = {}

    def generate(self, prompt: Tokens, wish: Beams, stops: list[int], limit: int, bias: float) -> list[Finished]:
        self._known.clear()
        ids = torch.tensor([prompt])
        with self._listening(len(prompt), stops, bias):
            out = self.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=wish.width,
                length_penalty=wish.length_penalty,
                early_stopping=wish.early_stopping,
                num_return_sequences=wish.returned,
                max_new_tokens=limit,
                eos_token_id=stops or None,
                pad_token_id=1,
                use_cache=False,  # every forward reads the whole text
                return_dict_in_generate=True,
                output_scores=True,
            )
        answers = out.sequences[:, len(prompt) :].tolist()
        if wish.width == 1:  # greedy: one answer, with neither padding nor a score
            return [Finished(tuple(answers[0]), math.nan)]
        lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
        scores = out.sequences_scores.tolist()
        return [Finished(tuple(a[:n]), score) for a, n, score in zip(answers, lengths, scores, strict=True)]

    def logprobs(self, tokens: Tokens) -> list[float]:
        """Fails for a beginning that `generate` did not follow."""
        return torch.log_softmax(self._known[tokens], dim=-1).tolist()

    def _listening(self, prompt_length: int, stops: list[int], bias: float) -> RemovableHandle:
        def listen(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            logits = out.logits[:, -1]
            logits[:, stops] += bias
            for row, row_logits in zip(kwargs["input_ids"].tolist(), logits, strict=True):
                self._known[tuple(row[prompt_length:])] = row_logits.clone()

        return self.module.register_forward_hook(listen, with_kwargs=True)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gpt_oss", "bloom"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(make(request.param, tmp_path_factory.mktemp("checkpoints") / request.param))


def draw(random: Random) -> tuple[Tokens, Beams, list[int], int, float]:
    """A prompt, a wish, some end tokens, a limit, and how much likelier than the model has them the end tokens are."""
    tokens = range(len(SPECIAL_TOKENS), VOCAB_SIZE)
    width = random.randint(1, 8)
    wish = Beams(
        width=width,
        length_penalty=random.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        early_stopping=random.choice([False, True, "never"]),
        returned=random.randint(1, width),
    )
    prompt = tuple(random.choices(tokens, k=random.randint(1, 30)))
    stops = random.sample(tokens, random.choice([0, 1, 2, 3, 12]))
    return prompt, wish, stops, random.randint(1, 20), random.choice([0.0, 3.0, 6.0])


def test_the_answers_are_those_of_transformers(oracle: Oracle):
    random = Random(0)
    early = 0
    for _ in range(60):
        prompt, wish, stops, limit, bias = draw(random)
        expected = oracle.generate(prompt, wish, stops, limit, bias)
        search = run(BeamSearch(wish, stop_token_ids=stops, max_tokens=limit), oracle.logprobs)
        assert_equal(search.best, expected, wish)
        early += all(len(beam.tokens) < limit for beam in search.best)
    assert 10 <= early <= 50, "too many searches end in the same way"


def test_a_search_that_is_cut_off_answers_as_if_its_limit_were_there(oracle: Oracle):
    random = Random(1)
    for _ in range(6):
        prompt, wish, stops, limit, bias = draw(random)
        if wish.early_stopping == "never":  # looks at the limit
            continue
        expected = [oracle.generate(prompt, wish, stops, length, bias) for length in range(1, limit + 1)]
        search = BeamSearch(wish, stop_token_ids=stops, max_tokens=limit)
        for answers in expected:
            advance(search, oracle.logprobs)
            if search.is_over:
                break
            assert_equal(search.best, answers, wish)


def assert_equal(best: list[Finished], expected: list[Finished], wish: Beams) -> None:
    assert [beam.tokens for beam in best] == [beam.tokens for beam in expected], wish
    if wish.width > 1:
        assert [beam.score for beam in best] == [beam.score for beam in expected], wish


# -- what always holds -------------------------------------------------------------------------------------------------


def chance(seed: int, size: int) -> Model:
    """Random log-probabilities of `size` tokens, with many ties, and some that are impossible."""

    def logprobs(tokens: Tokens) -> list[float]:
        random = Random(f"{seed} {tokens}")
        return [random.choice([IMPOSSIBLE, 0.0, -0.5, -1.0, -random.expovariate(0.3)]) for _ in range(size)]

    return logprobs


WIDTHS = st.shared(st.integers(1, 8), key="width")
WISHES = st.builds(
    Beams,
    width=WIDTHS,
    length_penalty=st.sampled_from([-5.0, -1.0, 0.0, 0.5, 1.0, 2.0, 5.0]),
    early_stopping=st.sampled_from([False, True, "never"]),
    returned=WIDTHS.flatmap(lambda width: st.integers(1, width)),
)
MODELS = st.builds(chance, st.integers(0, 2**32), st.integers(1, 12))
STOPS = st.sets(st.integers(0, 12), max_size=4)


@given(wish=WISHES, model=MODELS, stops=STOPS, limit=st.integers(1, 12))
def test_invariants(wish: Beams, model: Model, stops: set[int], limit: int):
    search = BeamSearch(wish, stop_token_ids=stops, max_tokens=limit)
    for length in range(1, limit + 1):
        before = search.live
        moves = advance(search, model)
        grown = [Beam((*before[move.parent].tokens, move.token), move.score) for move in moves]
        assert search.live == grown
        assert all(move.score <= before[move.parent].score for move in moves)
        check_live(search, wish, stops, length)
        check_finished(search, wish, stops, limit, model)
        if search.is_over:
            break
    assert search.is_over
    assert search.best == search.finished[: wish.returned]


def check_live(search: BeamSearch, wish: Beams, stops: set[int], length: int) -> None:
    assert len(search.live) <= wish.width
    assert len({beam.tokens for beam in search.live}) == len(search.live)
    assert all(len(beam.tokens) == length and stops.isdisjoint(beam.tokens) for beam in search.live)
    assert all(math.isfinite(beam.score) for beam in search.live)
    assert all(better.score >= worse.score for better, worse in pairwise(search.live))


def check_finished(search: BeamSearch, wish: Beams, stops: set[int], limit: int, model: Model) -> None:
    assert len(search.finished) <= wish.width
    assert len(search.best) <= wish.returned
    assert len({beam.tokens for beam in search.finished}) == len(search.finished)
    assert all(better.score >= worse.score for better, worse in pairwise(search.finished))
    for tokens, score in search.finished:
        assert stops.isdisjoint(tokens[:-1])
        assert tokens[-1] in stops or len(tokens) == limit
        assert score == pytest.approx(likelihood(model, tokens) / len(tokens) ** wish.length_penalty, rel=1e-5)


def likelihood(model: Model, tokens: Tokens) -> float:
    return sum(model(tokens[:i])[token] for i, token in enumerate(tokens))


@given(wish=WISHES, model=MODELS, stops=STOPS, limit=st.integers(1, 12))
def test_more_candidates_than_asked_for_change_nothing(wish: Beams, model: Model, stops: set[int], limit: int):
    some = BeamSearch(wish, stop_token_ids=stops, max_tokens=limit)
    every = BeamSearch(wish, stop_token_ids=stops, max_tokens=limit)
    while not some.is_over:
        moves = every.advance([likeliest(model(beam.tokens), 12) for beam in every.live])
        assert advance(some, model) == moves
        assert some.live == every.live
        assert some.finished == every.finished


@given(seed=st.integers(0, 2**32), wish=WISHES)
def test_wide_enough_it_finds_the_best_of_all(seed: int, wish: Beams):
    """Three tokens, of which one ends: never more than four live beams, and 15 answers of up to three tokens."""
    model = chance(seed, 3)
    every = {tokens[: tokens.index(2) + 1] if 2 in tokens else tokens: 0.0 for tokens in product(range(3), repeat=3)}
    scores = [likelihood(model, tokens) / len(tokens) ** wish.length_penalty for tokens in every]
    possible = sorted((score for score in scores if score > IMPOSSIBLE), reverse=True)
    with patch("chatpage.schedule.beam.MAX_WIDTH", 15):
        wide = Beams(15, wish.length_penalty, wish.early_stopping, returned=15)
    search = run(BeamSearch(wide, stop_token_ids={2}, max_tokens=3), model)
    assert [beam.score for beam in search.best] == pytest.approx(possible, rel=1e-5)


# -- examples ----------------------------------------------------------------------------------------------------------


def test_the_example_at_the_head_of_the_module():
    end = 0
    a, the, dog, cat, ran, sat = range(1, 7)
    search = BeamSearch(Beams(2), stop_token_ids={end}, max_tokens=9)
    assert parents_and_tokens(search.advance([[(a, -0.5), (the, -1.2), (end, -3.0)]])) == [(0, a), (0, the)]
    second = search.advance([[(dog, -0.6), (end, -1.3)], [(cat, -0.1), (end, -2.0)]])
    assert parents_and_tokens(second) == [(0, dog), (1, cat)]
    assert search.finished == []
    third = search.advance([[(ran, -0.5), (sat, -0.8)], [(end, -0.1), (ran, -2.0)]])
    assert parents_and_tokens(third) == [(0, ran), (0, sat)]
    assert search.finished == [Finished((the, cat, end), pytest.approx(-1.4 / 3))]
    assert search.live == [Beam((a, dog, ran), pytest.approx(-1.6)), Beam((a, dog, sat), pytest.approx(-1.9))]


def parents_and_tokens(moves: list[Move]) -> list[tuple[int, int]]:
    return [(move.parent, move.token) for move in moves]


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "live", "goes_on"),
    [
        # The worst of the finished ones has -1.2. Live ones are still behind it, but may come up to 9 tokens.
        (True, 1.0, -1.8, False),
        (False, 1.0, -1.8, False),
        (False, 1.0, -1.2, False),
        ("never", 1.0, -1.8, True),
        ("never", 1.0, -9.0, True),
        ("never", 1.0, -11.0, False),
        ("never", 0.5, -3.0, True),
        ("never", 0.5, -4.0, False),
        ("never", 0.0, -1.8, False),
        ("never", -1.0, -1.8, False),
    ],
)
def test_when_live_beams_are_behind(
    early_stopping: bool | Literal["never"], length_penalty: float, live: float, goes_on: bool
):
    search = BeamSearch(Beams(2, length_penalty, early_stopping), stop_token_ids={0, 1}, max_tokens=9)
    search.advance([[(0, -1.0), (1, -1.2), (2, live), (3, live - 1)]])
    assert search.is_over != goes_on
    assert search.finished == [Finished((0,), -1.0), Finished((1,), pytest.approx(-1.2))]


@pytest.mark.parametrize(("early_stopping", "goes_on"), [(True, False), (False, True), ("never", True)])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_when_live_beams_are_ahead(early_stopping: bool | Literal["never"], length_penalty: float, goes_on: bool):
    search = BeamSearch(Beams(2, length_penalty, early_stopping), stop_token_ids={0}, max_tokens=100)
    search.advance([[(1, -0.1), (0, -3.0), (2, -4.0)]])
    assert len(search.finished) == 1
    assert not search.is_over
    search.advance([[(1, -0.1), (0, -3.0), (2, -5.0)], [(1, -9.0)]])
    assert len(search.finished) == 2
    assert search.is_over != goes_on


def test_one_beam_alone_is_greedy_even_if_it_may_never_stop_early():
    search = BeamSearch(Beams(1, early_stopping="never"), stop_token_ids={0}, max_tokens=9)
    assert search.advance([[(0, -1.0), (1, -1.1)]]) == []
    assert search.best == [Finished((0,), -1.0)]


def test_a_vocabulary_of_one_token_has_one_beam():
    search = run(BeamSearch(Beams(4, returned=3), stop_token_ids=(), max_tokens=3), lambda tokens: [-0.5])
    assert search.best == [Finished((0, 0, 0), -0.5)]


def test_where_nothing_is_possible_the_search_is_over():
    search = BeamSearch(Beams(2, returned=2), stop_token_ids={1}, max_tokens=9)
    assert search.advance([[(0, -1.0), (1, -2.0)]]) == [Move(0, 0, -1.0)]
    assert search.advance([[(0, IMPOSSIBLE), (1, IMPOSSIBLE)]]) == []
    assert search.is_over
    assert search.best == [Finished((1,), -2.0)]


def test_cut_off_before_its_first_token_it_has_an_empty_answer():
    search = BeamSearch(Beams(4, returned=2), stop_token_ids={0}, max_tokens=9)
    assert search.best == [Finished((), 0.0)]


def test_equal_scores_fall_to_the_likelier_beam_and_then_to_the_token_handed_in_first():
    search = BeamSearch(Beams(2), stop_token_ids=(), max_tokens=9)
    assert parents_and_tokens(search.advance([[(5, -1.0), (3, -1.0), (4, -1.0)]])) == [(0, 5), (0, 3)]
    assert parents_and_tokens(search.advance([[(9, -1.0), (8, -1.0)], [(1, -1.0)]])) == [(0, 9), (0, 8)]


def test_of_equal_finished_ones_the_older_stays():
    search = BeamSearch(Beams(2, length_penalty=0.0), stop_token_ids={0, 1}, max_tokens=9)
    search.advance([[(2, -0.5), (0, -1.0), (3, -2.0)]])
    search.advance([[(1, -0.5), (0, -0.5), (2, -1.0)], []])
    assert search.best == [Finished((0,), -1.0)]
    assert search.finished == [Finished((0,), -1.0), Finished((2, 1), -1.0)]


def test_every_live_beam_must_be_given_something():
    search = BeamSearch(Beams(2), stop_token_ids=(), max_tokens=9)
    with pytest.raises(ValueError, match="shorter"):
        search.advance([])
