"""Tokens are drawn where the row's point falls in the distribution that its wishes leave.

The oracle sorts, in 64-bit numbers. The kernel sums up 32-bit ones, so what lies within rounding of an edge is open: a
token may belong to what top_p or min_p keeps or not, and a point may hit a token or its neighbour. Everything else must
be as the oracle says.
"""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from chatpage.kernels.draw import draw
from chatpage.model.batch import Draw
from chatpage.model.check import draws_alike
from chatpage.model.sampler import begin_sampling, uniform
from chatpage.schedule.params import SamplingParams
from tests.kernels.case import poisoned, same_bits
from tests.kernels.conftest import DEVICE, ON_GPU, needs_gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARIES = [1, 2, 31, 1023, 1024, 1025, 5000] + ([32_003, 151_936] if ON_GPU else [])
BEFORE_1 = float(np.nextafter(1, 0))
ROUNDING = 3e-6  # of a row's weight

Floats = NDArray[np.float64]


class Wish(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


MIXED = [
    Wish(*wish)
    for wish in itertools.product([0, 1e-6, 0.7, 1, 50], [0, 1, 3, 40, 4000], [1, 0.9, 0.3, 1e-6], [0, 0.05, 1])
]


# -- the oracle -------------------------------------------------------------------------------------------------------


def distribution(logits: Floats, wish: Wish) -> tuple[Floats, Floats]:
    """The weight of each token that is kept for sure, else 0; and of each that may be kept."""
    temperature, top_p, min_p = (float(np.float32(number)) for number in (wish.temperature, wish.top_p, wish.min_p))
    weights = np.exp((logits - logits.max()) / max(temperature, 1e-6))
    order = np.argsort(-logits, kind="stable")  # likelier first, the lower id first among equals
    if wish.top_k:
        order = order[: wish.top_k]
    ordered = weights[order]
    before, total = ordered.cumsum() - ordered, ordered.sum()
    sure, maybe = np.zeros_like(weights), np.zeros_like(weights)
    for kept, within in ((sure, -ROUNDING), (maybe, ROUNDING)):
        stays = (ordered >= min_p * (1 - within)) & ((before < (top_p + within) * total) | (top_p == 1))
        stays[0] = True
        kept[order[stays]] = ordered[stays]
    return sure, maybe


def assert_right(logits: Floats, wish: Wish, point: float, token: int) -> None:
    if not np.isfinite(logits.max()):  # of numbers among which one is none, numpy's largest is none
        assert token == -1
    elif wish.temperature <= 0:
        assert token == logits.argmax()
    else:
        sure, maybe = distribution(logits, wish)
        own, after = maybe[token], slice(token + 1, None)
        assert own > 0, f"token {token} is ruled out by {wish}"
        # Its stretch begins earliest if before it only the sure ones are kept and after it all, and ends latest else.
        begin = sure[:token].sum() / (sure[:token].sum() + own + maybe[after].sum())
        end = 1 - sure[after].sum() / (maybe[:token].sum() + own + sure[after].sum())
        assert begin - ROUNDING <= point <= end + ROUNDING, f"{point} does not hit token {token} of {wish}"


# -- cases ------------------------------------------------------------------------------------------------------------


def drawn(logits: Tensor, wishes: list[Wish], points: list[float]) -> list[int]:
    """What the kernel draws, into the middle of other numbers, from poisoned memory; the logits stay as they are."""
    before = logits.clone()
    tokens = torch.full((len(wishes) + 2,), -77, device=DEVICE)
    with poisoned():
        draw(
            logits,
            torch.tensor(wishes, dtype=torch.float32, device=DEVICE),
            torch.tensor(points, dtype=torch.float64, device=DEVICE),
            tokens[1:-1],
        )
    assert same_bits(logits, before)
    assert tokens[[0, -1]].tolist() == [-77, -77]
    return tokens[1:-1].tolist()


def check(logits: Tensor, wishes: list[Wish], points: list[float]) -> None:
    tokens = drawn(logits, wishes, points)
    for row, wish, point, token in zip(logits.double().cpu().numpy(), wishes, points, tokens, strict=True):
        assert_right(row, wish, point, token)


def draw_points(random: np.random.Generator, count: int) -> list[float]:
    """Some of them at the ends."""
    return np.where(
        random.random(count) < 0.2, random.choice([0, BEFORE_1, 1 - 2**-40], count), random.random(count)
    ).tolist()


def draw_logits(random: np.random.Generator, rows: int, vocabulary: int) -> Tensor:
    """Steep rows and flat ones, coarse ones with many equals, and some where most is banned."""
    logits = random.normal(
        random.normal(0, 8, (rows, 1)), random.choice([0.05, 1, 3, 30], (rows, 1)), (rows, vocabulary)
    )
    step = random.choice([1e-9, 0.25, 2], (rows, 1))
    banned = random.random((rows, vocabulary)) < random.choice([0, 0, 0.5, 0.999], (rows, 1))
    banned[:, random.integers(vocabulary)] = False
    return torch.tensor(np.where(banned, -np.inf, np.round(logits / step) * step), dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_rows_with_all_sorts_of_wishes(vocabulary: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng()
    count = 300 if ON_GPU else 10
    wishes = [MIXED[i] for i in random.choice(len(MIXED), count)]
    check(draw_logits(random, count, vocabulary).to(dtype), wishes, draw_points(random, count))


wishes = st.builds(
    Wish,
    temperature=st.just(0.0) | st.floats(1e-6, 2) | st.sampled_from([1e-6, 1e-3, 1e4]),
    top_k=st.sampled_from([0, 1, 2]) | st.integers(0, 3000),
    top_p=st.just(1.0) | st.floats(1e-6, 1) | st.floats(1e-6, 1e-3),
    min_p=st.sampled_from([0.0, 0.0, 1.0]) | st.floats(0, 1),
)
points = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, BEFORE_1])
cases = st.lists(st.tuples(wishes, points), min_size=1, max_size=4)


@given(rows=cases, vocabulary=st.integers(1, 2500), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
@settings(max_examples=400 if ON_GPU else 30, deadline=None)
def test_any_wishes(rows: list[tuple[Wish, float]], vocabulary: int, dtype: torch.dtype, seed: int) -> None:
    logits = draw_logits(np.random.default_rng(seed), len(rows), vocabulary).to(dtype)
    check(logits, [wish for wish, _ in rows], [point for _, point in rows])


@given(rows=cases, seed=st.integers(0, 2**32), logits=st.lists(st.floats(width=32), min_size=1, max_size=9))
@settings(max_examples=400 if ON_GPU else 25, deadline=None)
@pytest.mark.filterwarnings("ignore:overflow")
def test_any_logits(rows: list[tuple[Wish, float]], seed: int, logits: list[float]) -> None:
    """Those of a few tokens, anywhere among others that are banned: huge, tiny, −0, infinite or no numbers."""
    row = torch.full((2100,), -torch.inf)
    places = np.random.default_rng(seed).choice(len(row), len(logits), replace=False)
    row[places] = torch.tensor(logits)
    check(row.to(DEVICE).expand(len(rows), -1), [wish for wish, _ in rows], [point for _, point in rows])


# -- what is known without an oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        (Wish(), {0, 1, 2, 3, 4}),
        (Wish(0), {1}),
        (Wish(top_k=1), {1}),
        (Wish(top_k=2), {1, 2}),
        (Wish(top_k=4), {0, 1, 2, 3}),
        (Wish(top_p=1e-46), {1}),
        (Wish(top_p=0.5), {1, 2}),
        (Wish(top_p=0.9), {0, 1, 2, 3}),
        (Wish(top_k=3, top_p=0.7), {1, 2}),
        (Wish(min_p=0.4), {0, 1, 2, 3}),
        (Wish(min_p=1), {1, 2}),
        (Wish(top_k=1, min_p=1), {1}),
        (Wish(1e-6), {1, 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_are_kept_by_the_lowest_id(wish: Wish, kept: set[int], dtype: torch.dtype) -> None:
    """They weigh 4, 8, 8, 4, 2 and 0."""
    logits = torch.tensor([2, 3, 3, 2, 1, -torch.inf]).mul(np.log(2)).to(DEVICE, dtype)
    points = [0, 0.3, 0.6, 0.85, BEFORE_1]
    assert set(drawn(logits.expand(len(points), -1), [wish] * len(points), points)) == kept


def test_ties_over_many_tiles() -> None:
    """Of equals that lie in all tiles, what is kept ends in the middle of one, with likelier ones behind it."""
    likelier = torch.rand(4000, device=DEVICE) < 0.02
    logits = torch.where(likelier, 0, -1.5).half()
    wishes = [Wish(), Wish(top_p=0.6), Wish(top_k=3500, top_p=0.8), Wish(top_k=3500, top_p=1e-9)]
    wishes += [Wish(top_k=1500, min_p=min_p) for min_p in (0, 0.2, 0.3)]
    for point in (0, 0.2, 0.5, 0.7, 0.9, BEFORE_1):
        check(logits.expand(len(wishes), -1), wishes, [point] * len(wishes))


def test_what_top_k_leaves_out_stays_out() -> None:
    """However near 1 top_p is: rounding may not bring one more of the equals back."""
    logits = torch.rand(25, 2910, device=DEVICE).half()
    logits[:, 2900:] = -1
    nearly_1 = float(np.nextafter(np.float32(1), np.float32(0)))
    assert set(drawn(logits, [Wish(top_k=2907, top_p=nearly_1)] * 25, [BEFORE_1] * 25)) == {2906}


@pytest.mark.parametrize("wish", [Wish(0), Wish(), Wish(0.7, 40, 0.9, 0.05)], ids=str)
@pytest.mark.parametrize("where", [0, 1500, 2999])
def test_broken_rows(where: int, wish: Wish) -> None:
    """A largest logit that is no finite number gives −1, and leaves the other rows alone."""
    logits = torch.randn(5, 3000, device=DEVICE)
    logits[0, where], logits[1, where], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, where] = -torch.inf
    tokens = drawn(logits, [wish] * 5, [0.5] * 5)
    assert [tokens[i] for i in (0, 1, 3)] == [-1, -1, -1]
    check(logits, [wish] * 5, [0.5] * 5)


def test_points_at_the_ends() -> None:
    logits = torch.full((2, 3000), -torch.inf, device=DEVICE)
    logits[:, 700:2300] = torch.randn(1600, device=DEVICE)
    assert drawn(logits, [Wish()] * 2, [0, BEFORE_1]) == [700, 2299]


@pytest.mark.parametrize("wish", [Wish(), Wish(0.6, 9, 0.95), Wish(top_p=0.7), Wish(1.5, min_p=0.1)], ids=str)
def test_evenly_spaced_points_give_each_token_its_share(wish: Wish) -> None:
    count = 20_000 if ON_GPU else 40
    logits = torch.randn(1, 30, device=DEVICE).mul(2).half()
    points = [(i + 0.5) / count for i in range(count)]
    tokens = Counter(drawn(logits.expand(count, -1), [wish] * count, points))
    sure, maybe = distribution(logits[0].double().cpu().numpy(), wish)
    assert (sure == maybe).all(), "an edge within rounding has never been drawn here"
    for token, share in enumerate(sure / sure.sum()):
        assert abs(tokens[token] - count * share) <= 1 + count * ROUNDING


def test_rows_do_not_depend_on_each_other() -> None:
    """Nor on how far they lie apart."""
    random = np.random.default_rng()
    wishes, points = [MIXED[i] for i in random.choice(len(MIXED), 8)], draw_points(random, 8)
    logits = draw_logits(random, 8, 3000)
    apart = torch.full((8, 3333), torch.nan, device=DEVICE)[:, 100:3100]
    apart.copy_(logits)
    together = drawn(apart, wishes, points)
    assert together == drawn(logits, wishes, points)
    assert (
        together
        == [drawn(logits[i : i + 1], wishes[i : i + 1], points[i : i + 1])[0] for i in reversed(range(8))][::-1]
    )


def test_the_check_at_load_knows_a_kernel_that_draws_something_else() -> None:
    device, dtype = torch.device(DEVICE), torch.float32
    assert draws_alike(draw, device, dtype, 320)

    def draws_the_largest(
        logits: torch.Tensor, wishes: torch.Tensor, points: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        draw(logits, torch.zeros_like(wishes), points, tokens)

    assert not draws_alike(draws_the_largest, device, dtype, 320)


def test_the_sampler_draws_by_the_same_oracle() -> None:
    random = np.random.default_rng()
    wishes = [wish for wish in MIXED if wish.temperature <= 2]
    seed = int(random.integers(2**60))
    draws = [Draw(SamplingParams(*wish), seed, 0, position) for position, wish in enumerate(wishes)]
    logits = draw_logits(random, len(wishes), 700)
    for position, (row, found) in enumerate(
        zip(logits.double().cpu().numpy(), begin_sampling(logits, draws).drawn(), strict=True)
    ):
        assert found.token is not None
        assert_right(row, wishes[position], uniform(draws)[position], found.token)


@needs_gpu
def test_recorded_and_replayed_with_other_numbers() -> None:
    random, rows, vocabulary = np.random.default_rng(), 64, 151_936
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    frame = torch.zeros(rows * 6, dtype=torch.int32, device=DEVICE)  # as a step's numbers come
    held = frame[: rows * 4].view(torch.float32).view(rows, 4)
    where = frame[rows * 4 :].view(torch.float64)
    tokens = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    draw(logits.zero_(), held, where, tokens)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw(logits, held, where, tokens)
    for _ in range(5):
        wishes, points = [MIXED[i] for i in random.choice(len(MIXED), rows)], draw_points(random, rows)
        logits.copy_(draw_logits(random, rows, vocabulary))
        held.copy_(torch.tensor(wishes))
        where.copy_(torch.tensor(points, dtype=torch.float64))
        tokens.fill_(-77)
        graph.replay()
        for row, wish, point, token in zip(logits.double().cpu().numpy(), wishes, points, tokens.tolist(), strict=True):
            assert_right(row, wish, point, token)
