"""Beam search in the engine: the answers and scores of transformers, blocks by reference count, nothing left behind."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatpage.schedule.beam import Beams, Finished
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt, Request
from chatpage.schedule.session import Session
from chatpage.stream import Stream
from tests.checkpoints import make
from tests.engine.desk import Desk, Tokens, words
from tests.engine.harness import greedy, read
from tests.engine.test_replies import least_blocks

STOPS = (20, 130, 257)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("llama") / "llama")


def search(
    desk: Desk, tokens: Tokens, beams: Beams, *, session: Session | None = None, **wishes: Any
) -> tuple[Session, list[Stream]]:
    desk.sessions += 1
    session = session or Session(desk.sessions, desk.sessions, keeps=False)
    streams = [Stream(lambda: None) for _ in range(beams.returned)]
    params = SamplingParams(**{"temperature": 0, "max_tokens": 9} | wishes)
    prompt = Prompt((*desk.system, *tokens), len(desk.system))
    desk.core.submit(Request(prompt, params, beams=beams), session, *streams)
    return session, streams


def answers(streams: list[Stream]) -> list[Finished]:
    lasts = [read(stream) for stream in streams]
    return [Finished(tuple(answer.tokens), answer.last.score or 0.0) for answer in lasts]


# -- what transformers answers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "gpt_oss"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = make(request.param, tmp_path_factory.mktemp(request.param) / request.param)
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, module


def generate(module: Any, prompt: Tokens, beams: Beams, limit: int, bias: float, repetition: float) -> list[Finished]:
    ids = torch.tensor([prompt])
    out = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        num_return_sequences=beams.returned,
        max_new_tokens=limit,
        eos_token_id=list(STOPS),
        pad_token_id=1,
        repetition_penalty=repetition,
        sequence_bias={(token,): bias for token in STOPS},
        return_dict_in_generate=True,
        output_scores=True,
    )
    lengths = (out.beam_indices >= 0).sum(dim=1).tolist()
    found = zip(out.sequences[:, len(prompt) :].tolist(), lengths, out.sequences_scores.tolist(), strict=True)
    return [Finished(tuple(tokens[:length]), score) for tokens, length, score in found]


def test_the_answers_are_those_of_transformers(family: tuple[Path, Any]) -> None:
    folder, module = family
    search_as_transformers(Desk(folder, max_step_tokens=40, max_sequences=24), module)


def search_as_transformers(desk: Desk, module: Any) -> None:
    """Many searches in the same steps, in chunks, beside somebody who is greedy."""
    random = Random(1)
    # Whatever else the checkpoint ends at would end these too.
    desk.core.stop_token_ids = frozenset()
    wanted: list[list[Finished]] = []
    given: list[list[Stream]] = []
    beside = desk.submit(words(99, 5), params=greedy(40))
    for seed in range(12):
        width = random.randint(2, 8)
        beams = Beams(
            width,
            length_penalty=random.choice([-1.0, 0.0, 1.0, 2.0]),
            early_stopping=random.choice([False, True, "never"]),
            returned=random.randint(1, width),
        )
        tokens = words(seed, random.randint(1, 30))
        limit, bias, repetition = random.randint(1, 14), random.choice([0.5, 2.0, 4.0]), random.choice([1.0, 1.3])
        wanted.append(generate(module, (*desk.system, *tokens), beams, limit, bias, repetition))
        biased = tuple((token, bias) for token in STOPS)
        wishes = {"max_tokens": limit, "stop_token_ids": STOPS, "logit_bias": biased, "repetition_penalty": repetition}
        given.append(search(desk, tokens, beams, **wishes)[1])
        for _ in range(random.randint(0, 4)):
            desk.core.step()
    desk.finish()
    early = 0
    for streams, expected in zip(given, wanted, strict=True):
        got = answers(streams)
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
        assert [score for _, score in got] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-5)
        early += any(tokens[-1] in STOPS for tokens, _ in got)
    assert 0 < early < len(wanted), "some must end early and some not, for this test to say something"
    assert len(read(beside).tokens) == 40


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "length"), [(2, 1), (4, 4), (6, 21), (8, 3)])
def test_no_more_blocks_than_what_differs(folder: Path, width: int, length: int) -> None:
    desk = Desk(folder)
    used: list[tuple[int, int]] = []
    _, streams = search(desk, words(length, length), Beams(width), max_tokens=30)
    copied = desk.counters["copied"]
    while desk.core.has_work:
        desk.core.step()
        live = list({s for turn in desk.core.turns.values() for s in turn.sequences if s.table.length})
        blocks = {block for sequence in live for block in sequence.table.blocks}
        stored = [tuple(sequence.tokens[: sequence.table.length]) for sequence in live]
        if live:
            used.append((len(blocks), least_blocks(stored, desk.core.pool.block_size)))
        desk.core.check()
    assert len(answers(streams)[0].tokens) == 30
    assert [blocks for blocks, _ in used] == [least for _, least in used]
    assert desk.counters["copied"] > copied
    assert sum(desk.core.pool.ref) == 0


@pytest.mark.parametrize("seed", range(16))
def test_pressure_changes_no_answer(folder: Path, seed: int) -> None:
    """Searches and others in a pool that is too small for all: beams are preempted one by one and all at once."""
    random = Random(seed)
    asked = [
        (words(100 + n, random.randint(1, 20)), Beams(random.choice([2, 4, 8]), returned=2), random.randint(4, 24))
        for n in range(3)
    ]
    expected = []
    for tokens, beams, limit in asked:
        desk = Desk(folder, max_model_len=100)
        _, streams = search(desk, tokens, beams, max_tokens=limit)
        desk.finish()
        expected.append([answer.tokens for answer in answers(streams)])
    blocks = random.choice([34, 40, 50])
    settings: dict[str, Any] = {"max_model_len": 100, "max_sequences": random.choice([8, 9, 20]), "max_step_tokens": 24}
    desk = Desk(folder, kv_blocks=blocks, **settings)
    desk.core.runner.overlaps = random.random() < 0.5
    given = [search(desk, tokens, beams, max_tokens=limit)[1] for tokens, beams, limit in asked]
    others = [desk.submit(words(n, 9), params=greedy(30)) for n in range(2)]
    desk.finish()
    ends = [read(other) for other in others]
    assert all(len(end.tokens) == 30 for end in ends)
    for streams, (tokens, beams, limit), wanted in zip(given, asked, expected, strict=True):
        got = [read(stream) for stream in streams]
        if all(answer.last.completion_tokens == limit for answer in got):
            assert [tuple(answer.tokens) for answer in got] == wanted
        else:  # it had the pool for itself, and that was not enough
            alone = Desk(folder, kv_blocks=blocks, **settings)
            _, streams = search(alone, tokens, beams, max_tokens=limit)
            alone.finish()
            assert [answer.tokens for answer in got] == [read(stream).tokens for stream in streams]


def test_a_search_that_fits_no_pool_ends_with_the_best_so_far(folder: Path) -> None:
    desk = Desk(folder, kv_blocks=30, max_model_len=100)
    _, [stream] = search(desk, words(1, 3), Beams(8), max_tokens=90)
    desk.finish()
    answer = read(stream)
    assert answer.reason == "length"
    assert 5 < len(answer.tokens) < 90
    full = Desk(folder, kv_blocks=300, max_model_len=100)
    _, [stream] = search(full, words(1, 3), Beams(8), max_tokens=len(answer.tokens))
    full.finish()
    assert read(stream).tokens == answer.tokens


# -- ends --------------------------------------------------------------------------------------------------------------


def walk(desk: Desk, steps: int) -> None:
    for _ in range(steps):
        desk.core.step()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_stopping_one_answer_stops_the_search_with_the_best_so_far(folder: Path, steps: int) -> None:
    desk = Desk(folder)
    _, streams = search(desk, words(4, 6), Beams(4, returned=3), max_tokens=40)
    walk(desk, steps)
    desk.core.cancel(streams[1])
    desk.core.step()
    desk.finish()
    got = [read(stream) for stream in streams]
    assert {answer.reason for answer in got} == {"abort"}
    if steps > 2:
        assert all(answer.tokens for answer in got)
        assert got[0].text


def test_the_best_rests_and_the_next_turn_goes_on_from_it(folder: Path) -> None:
    """In a session that keeps, what has finished rests as long as it is among the best; at the end the answers do."""
    desk = Desk(folder)
    desk.core.stop_token_ids = frozenset()
    session = Session(1, "mine")
    biased = tuple((token, 4.0) for token in STOPS)
    _, streams = search(
        desk, words(4, 6), Beams(4, returned=2), session=session, stop_token_ids=STOPS, logit_bias=biased, max_tokens=30
    )
    rested = 0
    while desk.core.has_work:
        desk.core.step()
        rested = max(rested, len(session.resting))
        assert len(session.resting) <= 4
    got = answers(streams)
    assert rested > 0
    assert sorted(sequence.choice for sequence in session.resting) == [0, 1]
    desk.core.keep(session, 0)
    [best] = session.resting
    assert tuple(best.tokens[best.prompt_length :]) == got[0].tokens
    said = (*words(4, 6), *got[0].tokens, *words(8, 3))
    _, [stream] = search(desk, said, Beams(2), session=session)
    while desk.core.has_work:
        desk.core.step()
    assert read(stream).last.cached_tokens == len(desk.system) + 6 + len(got[0].tokens) - 1
    desk.core.close(session)
    desk.core.step()
    assert sum(desk.core.pool.ref) == 0


def test_one_broken_beam_fails_the_search_and_nobody_else(folder: Path) -> None:
    desk = Desk(folder)
    session = Session(7, "mine")
    _, streams = search(desk, words(4, 6), Beams(4, returned=2), session=session, max_tokens=30)
    other = desk.submit(words(5, 4), params=greedy(20))
    walk(desk, 6)
    beams = next(turn for turn in desk.core.turns.values() if streams[0] in turn.streams).sequences
    desk.core._end_broken({beams[1]: "NaN.", beams[2]: "NaN."})
    desk.finish()
    assert [read(stream).reason for stream in streams] == ["error", "error"]
    assert len(read(other).tokens) == 20
    assert not session.resting


def test_what_readers_hear_meanwhile(folder: Path) -> None:
    desk = Desk(folder)
    _, [stream] = search(desk, words(4, 6), Beams(3), max_tokens=6)
    heard: list[Delta] = []
    while desk.core.has_work:
        desk.core.step()
        heard += [stream._pending[-1]] if stream._pending else []
    *going, last = heard
    shown = [delta for delta in going if delta.beams]
    assert [len(delta.beams[0].tokens) for delta in shown] == [1, 2, 3, 4, 5]
    assert all(len(delta.beams) == 3 and not delta.text for delta in shown)
    assert all(delta.beams[0].score >= delta.beams[1].score >= delta.beams[2].score for delta in shown)
    assert (last.state, last.completion_tokens, bool(last.text)) == ("done", 6, True)
    assert last.tokens[:5] in {beam.tokens for beam in shown[-1].beams}


def test_beams_that_make_way_do_not_vanish(folder: Path) -> None:
    """Whoever watches them sees them all the time, also while some compute again."""
    desk = Desk(folder)
    _, [stream] = search(desk, words(4, 6), Beams(4), max_tokens=14)
    heard: list[Delta] = []
    walk(desk, 6)
    desk.core.scheduler.preempt(desk.core.scheduler.running[0], "for this test")
    desk.core._tell_preempted(desk.core.scheduler.preempted)
    while desk.core.has_work:
        desk.core.step()
        heard, stream._pending = heard + stream._pending, []
    counts = [delta.completion_tokens for delta in heard]
    assert counts == sorted(counts)
    assert "preempted" in {delta.state for delta in heard}
    assert all(delta.beams for delta in heard if 0 < delta.completion_tokens < 14)


def test_nothing_is_told_of_what_comes_after_a_template_s_stop_string(folder: Path) -> None:
    desk = Desk(folder)
    _, [stream] = search(desk, words(4, 6), Beams(3), max_tokens=20)
    desk.finish()
    whole = read(stream)
    desk.core.template.stops = (whole.text[3:5],)
    _, [stream] = search(desk, words(4, 6), Beams(3), max_tokens=20)
    desk.finish()
    cut = read(stream)
    assert (cut.text, cut.reason) == (whole.text[:3], "stop")
    assert cut.tokens == whole.tokens[: cut.last.completion_tokens]
    assert len(cut.tokens) < 20


def steps_of(desk: Desk) -> Iterator[int]:
    count = 0
    while desk.core.has_work:
        desk.core.step()
        yield (count := count + 1)


def test_searches_share_their_steps_with_everybody(folder: Path) -> None:
    """Twelve tokens each take thirteen steps, however many search."""
    desk = Desk(folder)
    for n in range(3):
        search(desk, words(n, 5), Beams(4), max_tokens=12)
    desk.submit(words(9, 5), params=greedy(12))
    assert list(steps_of(desk))[-1] <= 14
