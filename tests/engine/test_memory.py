"""Memory that runs out in a step: it is freed, steps become smaller, somebody makes way, and all is said in the end."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from chatpage import core as core_module
from chatpage import pace
from chatpage.core import NO_MEMORY
from chatpage.errors import ModelError
from chatpage.model.batch import Row
from chatpage.model.step import Launched
from chatpage.schedule.beam import Beams
from tests.engine.desk import Desk, Tokens, words
from tests.engine.harness import Answer, greedy, read
from tests.engine.test_beams import search

pytestmark = pytest.mark.usefixtures("overlaps")

PROMPTS: list[Tokens] = [words(length, length) for length in (3, 8, 15, 16, 30, 41)]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]


@dataclass
class Device:
    """One whose memory runs out.

    Attributes:
        room: says for how many tokens at once there is memory in this launch; it is asked with the rows.
        launched: the tokens of each launch that did not fail.
        failed: the tokens of each launch that did.
    """

    desk: Desk
    room: Callable[[list[Row]], int]
    error: Exception = ERRORS[0]
    launched: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        runner = self.desk.core.runner
        self._launch = runner.launch
        runner.launch = self.launch

    def launch(self, rows: list[Row]) -> Launched:
        tokens = sum(len(row.tokens) for row in rows)
        if tokens > self.room(rows):
            self.failed.append(tokens)
            raise self.error
        self.launched.append(tokens)
        return self._launch(rows)


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return Desk(folder).answers(PROMPTS)


def answers(desk: Desk) -> list[Answer]:
    """Those to all prompts, which must come to an end."""
    streams = [desk.submit(tokens) for tokens in PROMPTS]
    finish(desk)
    return [read(stream) for stream in streams]


def finish(desk: Desk) -> None:
    for _ in range(3000):
        if not desk.core.has_work:
            break
        desk.core.step()
    assert not desk.core.has_work, "it goes on for ever"
    assert sum(desk.core.pool.ref) == 0
    desk.core.check()


@pytest.mark.parametrize("error", ERRORS, ids=["GPU", "Python", "CPU"])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 20])
def test_steps_become_as_small_as_there_is_memory_for(
    folder: Path, expected: list[list[int]], room: int, error: Exception
) -> None:
    desk = Desk(folder)
    device = Device(desk, lambda rows: room, error)
    assert [answer.tokens for answer in answers(desk)] == expected
    assert device.failed
    assert desk.counters["preempted"] == 0
    tried = len(device.launched) / (pace.CALM / 2) + 1  # again and again, but not in every step
    assert len(device.failed) < 20 * tried


def test_steps_become_large_again(folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CALM", 5)
    desk = Desk(folder)
    usual = desk.core.scheduler.max_step_tokens, desk.core.scheduler.max_sequences
    lacking = [4] * 20
    device = Device(desk, lambda rows: lacking.pop() if lacking else 10**6)
    assert [answer.tokens for answer in answers(desk)] == expected
    assert (desk.core.scheduler.max_step_tokens, desk.core.scheduler.max_sequences) == usual
    assert max(device.launched[:8]) <= 4 < max(device.launched[20:])


@pytest.mark.parametrize("seed", range(12))
def test_memory_that_is_short_now_and_then(folder: Path, expected: list[list[int]], seed: int) -> None:
    """Even a single token fails, but never when it is the third time in a row."""
    random, desk = Random(seed), Desk(folder, kv_blocks=90 if seed % 2 else 400, max_model_len=90)
    in_a_row = 0

    def room(rows: list[Row]) -> int:
        nonlocal in_a_row
        left = random.choice([0, 1, 2, 5, 20, 100, 1000, 1000]) if in_a_row < 3 else 1000
        in_a_row = 0 if left else in_a_row + 1
        return left

    device = Device(desk, room)
    assert [answer.tokens for answer in answers(desk)] == expected
    assert device.failed


def test_who_has_no_memory_makes_way_and_comes_back(folder: Path, expected: list[list[int]]) -> None:
    """There is none for the longest sequence from its third token on, as long as there are others."""
    desk = Desk(folder)
    longest = len(desk.system) + len(PROMPTS[5]) + 2

    def room(rows: list[Row]) -> int:
        return 0 if len(desk.core.turns) > 1 and any(row.context > longest for row in rows) else 1000

    device = Device(desk, room)
    assert [answer.tokens for answer in answers(desk)] == expected
    assert desk.counters["preempted"] >= 1
    assert device.failed


def test_who_made_way_waits_until_another_has_ended(folder: Path) -> None:
    """Also where steps may be large, since long prompts fitted into the one that lacked memory."""
    [expected] = Desk(folder).answers([PROMPTS[5]])
    desk = Desk(folder)
    unlucky = desk.submit(PROMPTS[5], params=greedy(14, seed=666))
    for _ in range(5):
        desk.core.step()

    def room(rows: list[Row]) -> int:
        unlucky_runs = any(row.sample and row.sample.seed == 666 for row in rows)
        return 0 if unlucky_runs and len(desk.core.turns) > 1 else 1000

    device = Device(desk, room)
    others = [desk.submit(words(seed, 40), params=greedy(40)) for seed in range(3)]
    finish(desk)
    assert read(unlucky).tokens == expected
    assert [len(read(stream).tokens) for stream in others] == [40] * 3
    assert desk.counters["preempted"] == 1
    assert len(device.failed) < 10


def test_a_token_that_never_fits_ends_its_answer_alone(folder: Path, expected: list[list[int]]) -> None:
    desk = Desk(folder)
    longest = len(desk.system) + len(PROMPTS[5]) + 4
    Device(desk, lambda rows: 0 if any(row.context > longest for row in rows) else 1000)
    *others, last = answers(desk)
    assert [answer.tokens for answer in others] == expected[:5]
    assert (last.reason, last.deltas[-1].error) == ("error", NO_MEMORY.error)
    assert last.tokens == expected[5][: len(last.tokens)]
    assert len(last.tokens) == 5
    assert desk.counters["preempted"] > 1


def test_who_never_has_memory_does_not_wait_until_nobody_comes_any_more(folder: Path) -> None:
    desk = Desk(folder)
    length = len(desk.system) + len(PROMPTS[5])
    device = Device(desk, lambda rows: 0 if any(row.context > length + 3 for row in rows) else 1000)
    unlucky = desk.submit(PROMPTS[5], params=greedy(14))
    others = [desk.submit(words(seed, 5), params=greedy(3 + seed % 5)) for seed in range(6)]
    for seed in range(6, 300):
        desk.core.step()
        if unlucky._finished:
            break
        others.append(desk.submit(words(seed, 5), params=greedy(3 + seed % 5)))
    assert read(unlucky).reason == "error"
    assert len(others) < 250
    assert len(device.failed) < 100
    finish(desk)
    assert {read(stream).reason for stream in others} == {"length"}


def test_no_memory_for_anything_ends_all_answers_and_not_the_engine(folder: Path, expected: list[list[int]]) -> None:
    desk = Desk(folder)
    device = Device(desk, lambda rows: 0)
    assert {(answer.reason, answer.deltas[-1].error) for answer in answers(desk)} == {("error", NO_MEMORY.error)}
    device.room = lambda rows: 1000
    assert [answer.tokens for answer in answers(desk)] == expected


SEARCH = words(4, 6)


def test_a_moment_without_memory_ends_no_search(folder: Path) -> None:
    [expected] = searched(Desk(folder), 4)
    for step in range(1, 9):
        desk = Desk(folder)
        device = Device(desk, lambda rows: 1000)
        [stream] = search(desk, SEARCH, Beams(4), max_tokens=9)[1]
        for _ in range(step):
            desk.core.step()
        device.room = lambda rows: 0
        desk.core.step()
        device.room = lambda rows: 1000
        finish(desk)
        assert device.failed
        assert read(stream).tokens == expected


def searched(desk: Desk, width: int) -> list[list[int]]:
    _, streams = search(desk, SEARCH, Beams(width), max_tokens=9)
    finish(desk)
    return [read(stream).tokens for stream in streams]


def test_beams_come_back_although_there_are_fewer_places_than_before(folder: Path) -> None:
    """Two of four beams have no memory in one step, and the scheduler is slowed down to the other two."""
    [expected] = searched(Desk(folder), 4)
    desk = Desk(folder)
    device = Device(desk, lambda rows: 1000)
    _, [stream] = search(desk, SEARCH, Beams(4), max_tokens=9)
    for _ in range(4):
        desk.core.step()
    unlucky = [sequence.table.blocks for sequence in desk.core.scheduler.running[2:]]
    device.room = lambda rows: 0 if len(rows) > 2 or any(rows[0].table is blocks for blocks in unlucky) else 1000
    desk.core.step()
    device.room = lambda rows: 1000
    later = desk.submit(PROMPTS[0], params=greedy(3))
    finish(desk)
    assert desk.counters["preempted"] >= 2
    assert read(stream).tokens == expected
    assert read(later).reason == "length"


def test_a_search_wider_than_the_places_that_are_left_starts_when_nobody_runs(folder: Path) -> None:
    [expected] = searched(Desk(folder), 4)
    desk = Desk(folder)
    device = Device(desk, lambda rows: 1000)
    others = [desk.submit(words(n, 5), params=greedy(12)) for n in range(2)]
    for _ in range(3):
        desk.core.step()
    device.room = lambda rows: 0 if len(rows) > 1 else 1000
    desk.core.step()
    device.room = lambda rows: 1000
    assert desk.core.scheduler.max_sequences < 4
    _, [stream] = search(desk, SEARCH, Beams(4), max_tokens=9)
    finish(desk)
    assert read(stream).tokens == expected
    assert [read(other).reason for other in others] == ["length"] * 2


@pytest.mark.parametrize("seed", range(12))
def test_searches_and_memory_that_is_short_now_and_then(folder: Path, seed: int) -> None:
    random, desk = Random(seed), Desk(folder, kv_blocks=60 if seed % 2 else 400, max_model_len=90, max_sequences=9)
    expected = {width: searched(Desk(folder), width) for width in (2, 4)}
    lacking = 0

    def room(rows: list[Row]) -> int:
        nonlocal lacking
        left = random.choice([0, 1, 2, 5, 20, 1000, 1000]) if lacking < 3 else 1000
        lacking = 0 if left else lacking + 1
        return left

    device = Device(desk, room)
    asked = [(width, search(desk, SEARCH, Beams(width), max_tokens=9)[1]) for width in (4, 2, 4)]
    others = [desk.submit(tokens) for tokens in PROMPTS[:3]]
    finish(desk)
    assert device.failed
    given = [(expected[width][0], read(streams[0])) for width, streams in asked]
    assert all(answer.tokens == tokens for tokens, answer in given if answer.reason != "error")
    # Who is alone and lacks memory twice for the same token ends.
    assert {answer.last.error for _, answer in given} | {read(other).last.error for other in others} <= {
        None,
        NO_MEMORY.error,
    }


def test_a_system_prompt_without_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            started = Startup(*args, **kwargs)
            self.runner, self.max_model_len, self.notes = started.runner, started.max_model_len, started.notes

            def launch(rows: list[Row]) -> Launched:
                raise torch.OutOfMemoryError("CUDA out of memory.")

            self.runner.launch = launch

    Startup = core_module.Startup
    monkeypatch.setattr(core_module, "Startup", Full)
    with pytest.raises(ModelError, match="The system prompt cannot be computed: There is too little memory"):
        Desk(folder)


@pytest.mark.parametrize("times", [1, 2, 10**6])
def test_copies_without_memory(folder: Path, times: int) -> None:
    """Those of their step compute again, or end if there is no memory the second time either."""
    expected = Desk(folder, sharing="all").answers([PROMPTS[4]] * 3, domain="one")
    desk = Desk(folder, sharing="all")
    copy, failed = desk.core.runner.copy, 0

    def fail(pairs: list[tuple[int, int]]) -> None:
        nonlocal failed
        if pairs and failed < times:
            failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        copy(pairs)

    desk.core.runner.copy = fail
    streams = [desk.submit(PROMPTS[4], "one") for _ in range(3)]
    finish(desk)
    told = [read(stream) for stream in streams]
    assert failed
    for answer, tokens in zip(told, expected, strict=True):
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert answer.reason == "length" if times == 1 else answer.reason in ("length", "error")
    if times == 10**6:
        assert NO_MEMORY.error in {answer.deltas[-1].error for answer in told}


def test_what_the_failed_step_had_is_freed_before_it_runs_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing holds on to the frames of an error, and the cache is emptied after they are gone."""
    desk, held, at_freeing = Desk(folder), [], []
    monkeypatch.setattr(core_module, "empty_cache", lambda: at_freeing.append([ref() is None for ref in held]))

    def room(rows: list[Row]) -> int:
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        if len(held) in (3, 4):
            raise RuntimeError("the capture was broken off") from ERRORS[0]
        return 1000 + len(activations)

    Device(desk, room)
    desk.submit(PROMPTS[0], params=greedy(6))
    finish(desk)
    assert len(at_freeing) >= 2
    assert all(all(gone) for gone in at_freeing)
