"""A step is in flight while the next one is scheduled and launched; and what goes wrong is noticed one step late."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chatpage import core as module
from chatpage.core import Core
from chatpage.model.batch import Drawn, Row
from chatpage.model.step import Launched
from chatpage.schedule.params import SamplingParams
from chatpage.stream import Stream
from tests.engine.desk import Desk, Tokens, words
from tests.engine.harness import Answer, greedy, read

PROMPTS: list[Tokens] = [words(length, length) for length in (3, 8, 15, 16, 30, 41)]


LOST = RuntimeError("the device was lost")


@dataclass
class Late:
    """A device that is late: it computes a launch only when the next one comes, or when it is read.

    Attributes:
        log: `launch` and `read`, as they came.
        rows: of each launch.
        copies: pairs of blocks, as they came.
        fails: says whether a launch, told by its number, writes nonsense, and raises.
        error: what it raises.
        spoils: what to make of what a launch has drawn, told by its number.
    """

    desk: Desk
    fails: Callable[[int], bool] = lambda number: False
    spoils: Callable[[int, list[Drawn]], list[Drawn]] = lambda number, drawn: drawn
    error: Exception = LOST
    log: list[str] = field(default_factory=list)
    rows: list[list[Row]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        runner = self.desk.core.runner
        runner.overlaps = True
        self._launch, self._copy = runner.launch, runner.copy
        runner.launch, runner.copy = self.launch, self.copy
        self._last: LateRows | None = None

    def catch_up(self) -> None:
        last, self._last = self._last, None
        if last:
            last.compute()

    def launch(self, rows: list[Row]) -> Launched:
        self.catch_up()
        self.log.append("launch")
        self.rows.append(rows)
        taken = [Row(list(r.tokens), r.start, list(r.table), r.store, r.sample, r.source) for r in rows]
        self._last = LateRows(self, taken, len(self.rows) - 1)
        return self._last

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        self.catch_up()
        self.copies += pairs
        self._copy(pairs)


@dataclass
class LateRows:
    late: Late
    rows: list[Row]
    number: int
    outcome: list[Drawn] | Exception | None = None

    def compute(self) -> None:
        if self.late.fails(self.number):
            self.late._launch([replace(row, tokens=[5] * len(row.tokens), source=None) for row in self.rows]).drawn()
            self.outcome = self.late.error
        else:
            self.outcome = self.late.spoils(self.number, self.late._launch(self.rows).drawn())

    def drawn(self) -> list[Drawn]:
        self.late.log.append("read")
        if self.outcome is None:
            self.late.catch_up()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama")


def of_all_kinds() -> list[SamplingParams]:
    return [
        greedy(9),
        SamplingParams(temperature=1.2, seed=1, max_tokens=12),
        SamplingParams(temperature=1, top_k=20, top_p=0.9, seed=2, max_tokens=1),
        greedy(11, min_tokens=7, stop_token_ids=tuple(token for token in range(320) if token % 30)),
        SamplingParams(temperature=1, seed=3, logprobs=2, max_tokens=10, stop_token_ids=tuple(range(5, 320, 9))),
        greedy(10, stop=("a", "e")),
    ]


def ask(desk: Desk, wishes: list[SamplingParams]) -> list[Stream]:
    return [desk.submit(tokens, params=wish) for tokens, wish in zip(PROMPTS, wishes, strict=True)]


def answers(desk: Desk, wishes: list[SamplingParams]) -> list[Answer]:
    streams = ask(desk, wishes)
    desk.finish()
    return [read(stream) for stream in streams]


def told(answers: list[Answer]) -> list[Any]:
    """All but numbers, which depend on how many rows there are beside."""
    logprobs = [[logprob.token for delta in answer.deltas for logprob in delta.logprobs] for answer in answers]
    return [(a.tokens, a.text, a.reason, of_a) for a, of_a in zip(answers, logprobs, strict=True)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    """What is told step by step."""
    plain = told(answers(Desk(folder), of_all_kinds()))
    reasons = [reason for _, _, reason, _ in plain]
    assert {"stop", "length"} == set(reasons)
    return plain


# -- the order of things -----------------------------------------------------------------------------------------------


def test_the_next_step_is_launched_before_one_is_read(folder: Path, expected: list[Any]) -> None:
    desk = Desk(folder)
    late = Late(desk)
    assert told(answers(desk, of_all_kinds())) == expected
    steps = len(late.rows)
    assert late.log == ["launch", *["launch", "read"] * (steps - 1), "read"]
    assert any(row.source is not None for rows in late.rows for row in rows)


def test_without_a_device_every_step_is_read_at_once(folder: Path) -> None:
    desk = Desk(folder)
    late = Late(desk)
    desk.core.runner.overlaps = False
    answers(desk, of_all_kinds())
    assert late.log == ["launch", "read"] * len(late.rows)
    assert all(row.source is None for rows in late.rows for row in rows)


def test_a_row_says_where_its_token_comes_from(folder: Path) -> None:
    desk = Desk(folder)
    late = Late(desk)
    answers(desk, of_all_kinds())
    for before, rows in zip(late.rows, late.rows[1:], strict=False):
        for row in rows:
            if row.source is not None:
                origin = before[row.source]
                assert (row.tokens, row.start) == ([0], origin.context)
                assert origin.table is row.table
                assert origin.sample is not None


def test_a_last_token_that_the_count_tells_takes_no_row_more(folder: Path) -> None:
    """One that is only told by what was drawn does."""
    desk = Desk(folder)
    late = Late(desk)
    desk.submit(PROMPTS[0], params=greedy(7))
    desk.finish()
    assert len(late.rows) == 7
    whole = answers(desk, [greedy(9)] * len(PROMPTS))[0].tokens
    late.rows.clear()
    stop = whole[3]
    desk.submit(PROMPTS[0], params=greedy(9, stop_token_ids=(stop,)))
    desk.finish()
    assert len(late.rows) == whole.index(stop) + 2


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_who_looks_at_what_it_drew_is_waited_for(folder: Path, penalty: str) -> None:
    wishes = [*of_all_kinds()[:-1], greedy(5, **{penalty: 1.5})]
    plain = told(answers(Desk(folder), wishes))
    desk = Desk(folder)
    late = Late(desk)
    assert told(answers(desk, wishes)) == plain
    for rows in late.rows:
        looking = [row for row in rows if row.sample and row.sample.params.penalizes]
        assert all(row.source is None for row in looking)
    assert any(row.source is not None for rows in late.rows for row in rows), "the others overlap once it is gone"


def test_what_is_cancelled_in_flight_is_read_and_dropped(folder: Path) -> None:
    desk = Desk(folder)
    late = Late(desk)
    stream = desk.submit(PROMPTS[0])
    for _ in range(4):
        desk.core.step()
    desk.core.cancel(stream)
    assert desk.core.has_work, "a step is in flight"
    desk.core.step()
    assert not desk.core.has_work
    assert late.log.count("read") == late.log.count("launch")
    answer = read(stream)
    assert (answer.reason, len(answer.tokens)) == ("abort", 3)


def test_the_end_does_not_wait(folder: Path) -> None:
    desk = Desk(folder)
    late = Late(desk)
    stream = desk.submit(PROMPTS[0])
    desk.core.step()
    desk.core.end_all(None)
    assert late.log == ["launch"]
    assert (read(stream).reason, desk.core.has_work) == ("abort", False)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [LOST, torch.OutOfMemoryError("CUDA out of memory.")], ids=["lost", "no memory"])
@pytest.mark.parametrize("lost", range(8))
def test_a_step_that_is_lost_runs_again_with_the_one_behind_it(
    folder: Path, expected: list[Any], lost: int, error: Exception
) -> None:
    desk = Desk(folder)
    late = Late(desk, fails=lambda number: number == lost, error=error)
    assert told(answers(desk, of_all_kinds())) == expected
    assert len(late.rows[lost]) > 1, "who raises alone is not tried again"


@pytest.mark.parametrize("broken", [4, 6])
def test_who_held_a_block_of_a_row_that_is_broken_computes_again(folder: Path, broken: int) -> None:
    """Neither what it drew beside that row counts, nor what it draws in the step that is in flight by then."""
    [expected] = Desk(folder).answers([PROMPTS[4]])

    def spoil(number: int, drawn: list[Drawn]) -> list[Drawn]:
        return [Drawn(error="NaN."), *(Drawn(7) for _ in drawn[1:])] if number in (broken, broken + 1) else drawn

    desk = Desk(folder)
    late = Late(desk, spoils=spoil)
    streams = [desk.submit(PROMPTS[4], "one") for _ in range(3)]
    desk.finish()
    first, *others = [read(stream) for stream in streams]
    assert first.reason == "error"
    assert first.tokens == expected[: len(first.tokens)]
    assert [answer.tokens for answer in others] == [expected] * 2
    assert desk.counters["preempted"] == 2
    assert len(late.rows[broken]) == len(late.rows[broken + 1]) == 3


def test_what_a_step_in_flight_copied_from_a_row_that_is_broken_is_computed_again(folder: Path) -> None:
    """By then the copy is all that its holder shares with that row."""
    head = words(1, 41)
    other = (*head[:1], *words(2, 6))  # the rest of the block in which the system prompt ends, and no more
    [expected] = Desk(folder).answers([other])
    desk = Desk(folder)
    late = Late(desk)
    first = desk.submit(head, "one")
    for _ in range(4):
        desk.core.step()
    [turn] = desk.core.turns.values()
    own = set(turn.sequences[0].table.blocks) - desk.core.pool.pinned
    late.copies.clear()

    def spoil(number: int, drawn: list[Drawn]) -> list[Drawn]:
        """The first row of the step in flight fails, and nothing of what it held can be trusted."""
        if number != 3:
            return drawn
        for blocks in desk.core.runner.pool.tensors:
            blocks[list(own)] = torch.nan
        return [Drawn(error="NaN."), *drawn[1:]]

    late.spoils = spoil
    second = desk.submit(other, "one")
    desk.core.step()
    assert own.intersection(source for source, _ in late.copies), "nothing was copied before that was known"
    desk.finish()
    assert read(first).reason == "error"
    assert read(second).tokens == expected


def test_nothing_is_taken_from_the_device_after_the_proof_that_it_is_sound(folder: Path) -> None:
    """Who starts in flight behind a step of which nothing came is read before the next step wants its token."""
    [expected] = Desk(folder).answers([PROMPTS[1]])
    desk = Desk(folder)
    late = Late(desk, spoils=lambda number, drawn: [Drawn(error="NaN.")] if number == 2 else drawn)
    first = desk.submit(PROMPTS[0])
    for _ in range(3):
        desk.core.step()
    second = desk.submit(PROMPTS[1])
    desk.finish()
    assert read(first).reason == "error"
    assert read(second).tokens == expected
    assert [row.table for row in late.rows[4]] == [[0]], "the proof ran behind the step in flight"


def test_a_dead_device_is_noticed_although_somebody_was_cancelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing came for him, but nothing was asked for him either."""
    desk = Desk(folder)
    late = Late(desk)
    streams = ask(desk, of_all_kinds())
    for _ in range(4):
        desk.core.step()

    def fail(rows: list[Row]) -> Launched:
        raise LOST

    late.fails = lambda number: True
    monkeypatch.setattr(desk.core.runner, "launch", fail)
    desk.core.cancel(streams[0])
    with pytest.raises(RuntimeError, match="computes nothing any more"):
        desk.finish()


@pytest.mark.parametrize("lost", [2, 3, 4])
def test_copies_that_fail_end_only_those_of_their_step(
    folder: Path, expected: list[Any], lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others come a step later."""
    desk = Desk(folder)
    late = Late(desk)
    streams = ask(desk, of_all_kinds())
    copy = desk.core.runner.copy

    def fail(pairs: list[tuple[int, int]]) -> None:
        if len(late.rows) == lost:
            monkeypatch.setattr(desk.core.runner, "copy", copy)
            raise RuntimeError("no copy today")
        copy(pairs)

    monkeypatch.setattr(desk.core.runner, "copy", fail)
    desk.finish()
    ended = [read(stream) for stream in streams]
    assert "error" in {answer.reason for answer in ended}
    for answer, (tokens, _, reason, _) in zip(ended, expected, strict=True):
        assert answer.tokens == tokens[: len(answer.tokens)]
        assert answer.reason in ("error", reason)
    assert told(answers(desk, of_all_kinds())) == expected


# -- faults: each is one line of the core, wrong -----------------------------------------------------------------------

FAULTS = [
    ("delivers what was dropped", "_deliver", "turn is None or not chunk.is_wanted", "turn is None"),
    ("counts known tokens only", "_draw", "position - sequence.prompt_length", "sequence.generated"),
    ("takes each token from the first row", "_rows", "places[chunk.sequence]", "0"),
    ("does not say where a token is", "_row", "chunk.stores, draw, source)", "chunk.stores, draw)"),
    ("lets stay what must be waited for", "_launch", "and not step.is_awaited", ""),
    ("keeps what was read after a step that was lost", "_read", "self._flight.spoil()", "pass"),
    ("runs again those who are gone", "_run_again", "[chunk for chunk in chunks if chunk.is_wanted]", "chunks"),
    ("lets stay what fails", "step", "and not self._flight.stays", "and False"),
    ("forgets what is in flight", "has_work", "or self._flight is not None", ""),
]


@pytest.mark.parametrize(("method", "right", "wrong"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS])
def test_these_tests_find_a_core_that(
    method: str, right: str, wrong: str, folder: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = inspect.getattr_static(Core, method)
    source = textwrap.dedent(inspect.getsource(whole.fget if isinstance(whole, property) else whole))
    assert source.count(right) == 1, f"{method} has changed; its fault must change too"
    defined: dict[str, object] = {}
    exec(source.replace(right, wrong), dict(vars(module)), defined)
    monkeypatch.setattr(Core, method, defined[method])
    assert is_found(folder, expected)


def is_found(folder: Path, expected: list[Any]) -> bool:
    """Whether one of the tests fails, with whatever it raises."""
    try:
        test_the_next_step_is_launched_before_one_is_read(folder, expected)
        test_who_looks_at_what_it_drew_is_waited_for(folder, "repetition_penalty")
        test_what_is_cancelled_in_flight_is_read_and_dropped(folder)
        test_who_held_a_block_of_a_row_that_is_broken_computes_again(folder, 4)
        for lost in range(8):
            test_a_step_that_is_lost_runs_again_with_the_one_behind_it(folder, expected, lost, LOST)
    except Exception:
        return True
    return False
