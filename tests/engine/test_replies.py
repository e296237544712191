"""Several replies to one prompt: it is computed once, and stored once until they part."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from chatpage.errors import Busy, RequestError
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt, Request
from chatpage.schedule.session import Session
from chatpage.stream import Stream
from tests.checkpoints import make
from tests.engine.desk import Desk, Tokens, words
from tests.engine.harness import Answer, read

HOT: dict[str, Any] = {"temperature": 2.0, "seed": 5, "max_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "llama")


def ask(
    desk: Desk, tokens: Tokens, replies: int, *, session: Session | None = None, **wishes: Any
) -> tuple[Session, list[Stream]]:
    desk.sessions += 1
    session = session or Session(desk.sessions, desk.sessions, keeps=False)
    streams = [Stream(lambda: None) for _ in range(replies)]
    prompt = Prompt((*desk.system, *tokens), len(desk.system))
    desk.core.submit(Request(prompt, SamplingParams(**HOT | wishes)), session, *streams)
    return session, streams


def least_blocks(sequences: list[Tokens], size: int) -> int:
    """Blocks that hold these sequences, where what begins alike is stored once: a block for each different beginning.

    Of a block whose beginning some have in common each has a copy from where they part on.
    """
    blocks = {tokens[: at + size] for tokens in sequences for at in range(0, len(tokens), size)}
    return sum(not any(other != block and other[: len(block)] == block for other in _same_start(block, blocks, size))
               for block in blocks)  # fmt: skip


def _same_start(block: Tokens, blocks: set[Tokens], size: int) -> list[Tokens]:
    start = (len(block) - 1) // size
    return [other for other in blocks if (len(other) - 1) // size == start]


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("length", [1, 3, 4, 21])
def test_replies_share_their_prompt_and_part_by_copies(folder: Path, length: int, overlaps: bool) -> None:
    desk = Desk(folder)
    desk.core.runner.overlaps = overlaps
    before = desk.counters.copy()
    computed = desk.core.counts["computed_tokens"]
    _, streams = ask(desk, words(length, length), 4)
    used = []
    while desk.core.has_work:
        desk.core.step()
        live = [s for turn in desk.core.turns.values() for s in turn.sequences if s.table.length]
        tables = {block for sequence in live for block in sequence.table.blocks}
        stored = [tuple(sequence.tokens[: sequence.table.length]) for sequence in live]
        if not desk.core._flight and live:
            used.append((len(tables), least_blocks(stored, desk.core.pool.block_size)))
    answers = [read(stream) for stream in streams]
    assert len({tuple(answer.tokens) for answer in answers}) == 4, "they must differ for this test to say something"
    assert overlaps or used
    parting = 3 if (len(desk.system) + length) % desk.core.pool.block_size else 0
    copied = desk.counters["copied"] - before["copied"]
    assert copied == parting + bool(len(desk.system) % desk.core.pool.block_size), "one copy each but for the last"
    new = [answer.last.completion_tokens for answer in answers]
    rerun = len(streams) - 1  # each but the first computes the prompt's last token for its own draw
    assert desk.core.counts["computed_tokens"] - computed == length + sum(new) - len(new) + rerun
    for blocks, least in used:
        assert blocks == least, "more blocks than what differs"


def test_each_reply_is_what_it_would_be_alone(folder: Path) -> None:
    """The same seed and choice give the same reply, however many others there are, and whoever else is there."""
    prompts = [words(seed, length) for seed, length in ((1, 5), (2, 17))]
    alone = []
    for tokens in prompts:
        desk = Desk(folder)
        _, streams = ask(desk, tokens, 3)
        desk.finish()
        alone.append([read(stream).tokens for stream in streams])
    desk = Desk(folder, max_step_tokens=9)
    both = [ask(desk, tokens, 3)[1] for tokens in prompts]
    desk.finish()
    assert [[read(stream).tokens for stream in streams] for streams in both] == alone
    desk = Desk(folder)
    _, streams = ask(desk, prompts[0], 2)
    desk.finish()
    assert [read(stream).tokens for stream in streams] == alone[0][:2]


@pytest.mark.parametrize("seed", range(12))
def test_whoever_ends_when_leaves_nothing_behind(folder: Path, seed: int) -> None:
    """Replies are stopped at any time, in a pool that is too small for all; the others are what they would be."""
    random = Random(seed)
    tokens = words(7, random.choice([2, 9, 30]))
    desk = Desk(folder)
    _, streams = ask(desk, tokens, 5)
    desk.finish()
    expected = [read(stream).tokens for stream in streams]
    desk = Desk(
        folder, kv_blocks=random.choice([30, 40, 200]), max_model_len=110, max_sequences=random.choice([2, 4, 8])
    )
    desk.core.runner.overlaps = random.random() < 0.5
    _, streams = ask(desk, tokens, 5)
    stopped: set[int] = set()
    while desk.core.has_work:
        if random.random() < 0.15:
            which = random.randrange(5)
            stopped.add(which)
            desk.core.cancel(streams[which])
        desk.core.step()
    desk.finish()
    for which, stream in enumerate(streams):
        answer = read(stream)
        if which in stopped:
            assert answer.tokens == expected[which][: len(answer.tokens)]
        else:
            assert answer.tokens == expected[which]
    assert sum(desk.core.pool.ref) == 0


def test_the_prompt_counts_once(folder: Path) -> None:
    desk = Desk(folder)
    _, streams = ask(desk, words(3, 10), 4)
    desk.finish()
    prompt = len(desk.system) + 10
    assert desk.core.counts["prompt_tokens"] == prompt
    assert desk.core.counts["cached_tokens"] == len(desk.system)
    first, *others = (read(stream).last for stream in streams)
    assert first.cached_tokens == len(desk.system)
    assert all(other.cached_tokens == prompt for other in others)


def test_one_reply_is_kept_and_gone_on_from(folder: Path) -> None:
    """Until one is chosen all tables rest; then the others' blocks are nobody's, and the next turn finds its own."""
    desk = Desk(folder)
    session = Session(1, "mine")
    _, streams = ask(desk, words(4, 6), 3, session=session)
    while desk.core.has_work:
        desk.core.step()
    answers = [read(stream) for stream in streams]
    assert [sequence.choice for sequence in session.resting] == [0, 1, 2]
    held = {sequence.choice: set(sequence.table.blocks) for sequence in session.resting}
    desk.core.keep(session, 1)
    assert [sequence.choice for sequence in session.resting] == [1]
    gone = (held[0] | held[2]) - held[1]
    assert gone
    assert all(desk.core.pool.ref[block] == 0 for block in gone)
    said = (*words(4, 6), *answers[1].tokens, *words(8, 3))
    _, [stream] = ask(desk, said, 1, session=session)
    while desk.core.has_work:
        desk.core.step()
    assert read(stream).last.cached_tokens == len(desk.system) + 6 + len(answers[1].tokens) - 1
    desk.core.close(session)
    desk.core.step()
    assert sum(desk.core.pool.ref) == 0


def test_keeping_one_stops_the_others(folder: Path) -> None:
    desk = Desk(folder)
    session = Session(1, "mine")
    _, streams = ask(desk, words(4, 6), 3, session=session)
    for _ in range(4):
        desk.core.step()
    desk.core.keep(session, 2)
    while desk.core.has_work:
        desk.core.step()
    assert Counter(read(stream).reason for stream in streams) == {"abort": 2, "length": 1}
    assert [sequence.choice for sequence in session.resting] == [2]


def test_a_choice_that_comes_late_ends_nothing_of_the_next_turn(folder: Path) -> None:
    desk = Desk(folder)
    session = Session(1, "mine")
    ask(desk, words(4, 6), 3, session=session)
    while desk.core.has_work:
        desk.core.step()
    _, [stream] = ask(desk, words(5, 6), 1, session=session)
    desk.core.keep(session, 2)
    while desk.core.has_work:
        desk.core.step()
    assert read(stream).reason == "length"


def test_a_choice_among_replies_that_still_wait(folder: Path) -> None:
    """The others end, and what rests of the turn before rests until the chosen one begins."""
    desk = Desk(folder, max_sequences=1)
    session = Session(1, "mine")
    ask(desk, words(4, 6), 1, session=session)
    while desk.core.has_work:
        desk.core.step()
    before = session.resting[:]
    busy = desk.submit(words(9, 4))
    desk.core.step()
    _, streams = ask(desk, words(5, 6), 3, session=session)
    desk.core.keep(session, 1)
    assert session.resting == before
    while desk.core.has_work:
        desk.core.step()
    assert [read(stream).reason for stream in streams] == ["abort", "length", "abort"]
    assert [sequence.choice for sequence in session.resting] == [1]
    assert read(busy).reason == "length"


def test_a_failed_reply_ends_no_other(folder: Path) -> None:
    desk = Desk(folder)
    _, streams = ask(desk, words(4, 6), 3)
    desk.finish()
    expected = [read(stream).tokens for stream in streams]
    desk = Desk(folder)
    _, streams = ask(desk, words(4, 6), 3)
    for _ in range(5):
        desk.core.step()
    desk.core.settle()
    [second] = [s for turn in desk.core.turns.values() if streams[1] in turn.streams for s in turn.sequences]
    desk.core._end_broken({second: "NaN."})
    desk.finish()
    answers = [read(stream) for stream in streams]
    assert [answer.reason for answer in answers] == ["length", "error", "length"]
    assert [answers[0].tokens, answers[2].tokens] == [expected[0], expected[2]]


def test_replies_count_as_requests(launch: Any) -> None:
    engine = launch(max_sequences=2, max_queue=1)
    prompt = engine.prompt([{"role": "user", "content": "Hi"}])
    with pytest.raises(RequestError, match="n is 4; on this server at most 3 may run or wait"):
        engine.streams(Request(prompt, SamplingParams(max_tokens=4)), [None] * 4)
    with pytest.raises(RequestError, match="A search that returns 2 has 1 listeners"):
        engine.stream(Request(prompt, SamplingParams(temperature=0), beams=Beams(2, returned=2)))
    waiting = engine.stream(Request(prompt, SamplingParams(max_tokens=200)))
    with pytest.raises(Busy, match="3 requests"):
        engine.streams(Request(prompt, SamplingParams(max_tokens=4)), [None] * 3)
    waiting.cancel()
    read(waiting)
    answers: list[Answer] = [
        read(stream) for stream in engine.streams(Request(prompt, SamplingParams(max_tokens=4)), [None] * 3)
    ]
    assert [answer.last.completion_tokens for answer in answers] == [4, 4, 4]
