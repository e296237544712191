"""What must make no difference makes none: the greedy tokens of a prompt are those that it has alone.

Alone is: nothing shared, one sequence at a time, whole prompts in one step. `test_greedy.py` shows that to be what
transformers says. Here the same core runs without its thread, so that every step can be looked at and cut in.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from random import Random

import pytest

from chatpage.schedule import sequence as schedule
from tests.engine.desk import LENGTH, Desk, Tokens, words
from tests.engine.harness import intercept, read

pytestmark = pytest.mark.usefixtures("overlaps")

# Of all lengths around the edges of blocks; some begin alike, two are the same, one is longer than every window.
HEAD = words(0, 37)
PROMPTS: list[Tokens] = [
    *(words(length, length) for length in (1, 3, 4, 5, 15, 16, 17, 33)),
    *(HEAD[:at] + words(at, 6) for at in (4, 11, 16, 32, 36)),
    HEAD,
    HEAD,
    words(9, 90),
]
assert len(PROMPTS) == 16


class Alone:
    """The answers that every prompt has alone."""

    def __init__(self, folder: Path) -> None:
        self._desk = Desk(folder, sharing="off", max_sequences=1, block_size=16)
        self._desk.core.runner.overlaps = False
        self._known: dict[Tokens, list[int]] = {}

    def answers(self, prompts: Iterable[Tokens]) -> list[list[int]]:
        prompts = list(prompts)
        for tokens in prompts:
            if tokens not in self._known:
                self._known[tokens] = self._desk.answers([tokens])[0]
        return [self._known[tokens] for tokens in prompts]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint(request.param)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    alone = Alone(folder)
    answers = alone.answers(PROMPTS)
    assert len({tuple(answer) for answer in answers}) == len(set(PROMPTS)), "too dull to tell right from wrong"
    return alone


@pytest.mark.parametrize("sharing", ["off", "system", "all"])
def test_whatever_is_shared(folder: Path, alone: Alone, sharing: str) -> None:
    """Twice each: the second time everything is found that may be."""
    desk = Desk(folder, sharing=sharing)
    for _ in range(2):
        assert desk.answers(PROMPTS, "everybody" if sharing == "all" else None) == alone.answers(PROMPTS)
    hits = desk.counters["hit_tokens"]
    system = 2 * len(PROMPTS) * len(desk.system)
    assert hits == {"off": 0, "system": system}.get(sharing, hits)
    assert sharing != "all" or hits > system + sum(map(len, PROMPTS))


@pytest.mark.parametrize("block_size", [4, 8, 16, 32])
def test_whatever_the_size_of_a_block(folder: Path, alone: Alone, block_size: int) -> None:
    desk = Desk(folder, block_size=block_size, sharing="all")
    for _ in range(2):
        assert desk.answers(PROMPTS, "everybody") == alone.answers(PROMPTS)


@pytest.mark.parametrize("budget", [1, 2, 7, 30, 4096])
def test_whatever_a_step_may_compute(folder: Path, alone: Alone, budget: int) -> None:
    asked = PROMPTS[::2] if budget < 7 else PROMPTS
    assert Desk(folder, max_step_tokens=budget).answers(asked) == alone.answers(asked)


@pytest.mark.parametrize("at_once", [1, 64])
@pytest.mark.parametrize("kv_blocks", [1600, 120], ids=["room for all", "a full pool"])
def test_however_many_run_at_once(folder: Path, alone: Alone, at_once: int, kv_blocks: int) -> None:
    desk = Desk(folder, max_sequences=at_once, kv_blocks=kv_blocks, max_model_len=200)
    widths: list[int] = []
    intercept(desk.core.runner, lambda rows, compute: (widths.append(len(rows)), compute(rows))[1])
    asked = PROMPTS * 4
    assert desk.answers(asked) == alone.answers(asked)
    assert max(widths) == at_once or kv_blocks == 120
    assert (desk.counters["preempted"] > 0) == (at_once > 1 and kv_blocks == 120)


# -- preempted ---------------------------------------------------------------------------------------------------------


def preempt_at(desk: Desk, tokens: Tokens, position: int, domain: Hashable = None) -> list[int]:
    """Take all blocks from a sequence between two steps, when so many of its tokens are computed."""
    stream = desk.submit(tokens, domain)
    (sequence,) = desk.core.scheduler.waiting
    while sequence.computed != position:
        desk.core.step()
    preempt(desk, sequence)
    desk.finish()
    return read(stream).tokens


def preempt(desk: Desk, sequence: schedule.Sequence) -> None:
    before = desk.counters["preempted"]
    desk.core.scheduler.preempt(sequence, "a test")
    desk.core._hand_out()
    desk.core.check()
    assert desk.counters["preempted"] == before + 1


def test_wherever_it_is_preempted(folder: Path, alone: Alone) -> None:
    """At each of its positions, the system prompt's apart, which is found."""
    desk = Desk(folder, max_step_tokens=1)
    tokens = PROMPTS[5]
    (expected,) = alone.answers([tokens])
    first = len(desk.system) + 1
    for position in range(first, first + len(tokens) + LENGTH - 2):
        assert preempt_at(desk, tokens, position) == expected


def test_however_often_it_is_preempted(folder: Path, alone: Alone) -> None:
    """After every step of eight tokens, of which a whole block at least is found again."""
    desk = Desk(folder, max_step_tokens=8)
    streams = [desk.submit(tokens) for tokens in PROMPTS]
    random = Random(3)
    while desk.core.has_work:
        desk.core.step()
        if desk.core.scheduler.running and desk.counters["preempted"] < 200:
            preempt(desk, random.choice(desk.core.scheduler.running))
    assert [read(stream).tokens for stream in streams] == alone.answers(PROMPTS)
    assert desk.counters["preempted"] > 100


# -- forked, shuffled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["one", None], ids=["forked", "separate"])
def test_forked_or_separate(folder: Path, alone: Alone, domain: Hashable) -> None:
    """Branches of one conversation, from each of its positions, while it goes on."""
    desk = Desk(folder)
    trunk = desk.submit(HEAD, domain)
    for _ in range(4):
        desk.core.step()
    branches = [HEAD[:at] + words(at, 3) for at in range(len(HEAD))]
    found = desk.answers(branches, domain)
    assert found == alone.answers(branches)
    assert read(trunk).tokens == alone.answers([HEAD])[0]
    system = (len(branches) + 1) * len(desk.system)
    assert (desk.counters["hit_tokens"] > system) == (domain is not None)


def test_a_copy_that_is_not_made_would_be_seen(folder: Path, alone: Alone) -> None:
    desk = Desk(folder)
    desk.core.runner.copy = lambda pairs: None
    assert desk.answers(PROMPTS) != alone.answers(PROMPTS)


@pytest.mark.parametrize("seed", range(4))
def test_in_whatever_order_they_come(folder: Path, alone: Alone, seed: int) -> None:
    """Some steps between them, some in domains of their own, in a pool that has no room for all of them."""
    random = Random(seed)
    desk = Desk(folder, kv_blocks=80, max_model_len=140, max_step_tokens=random.choice([5, 16, 64]))
    asked: Sequence[Tokens] = random.sample(PROMPTS * 2, 2 * len(PROMPTS))
    streams = []
    for tokens in asked:
        streams.append(desk.submit(tokens, random.choice(["a", "b", None])))
        for _ in range(random.randint(0, 3)):
            desk.core.step()
    desk.finish()
    assert [read(stream).tokens for stream in streams] == alone.answers(asked)
