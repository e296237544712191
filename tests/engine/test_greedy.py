"""Greedy answers are transformers' own, token for token, however the work is cut up and shared."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import chatpage
from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.model import load, reference
from chatpage.model.batch import Row
from chatpage.model.reference import Reach
from chatpage.schedule.request import Prompt, Request
from tests.engine.harness import Steps, ask, assert_clean, greedy, intercept, paused, read, start, user

pytestmark = pytest.mark.usefixtures("overlaps")

TUTOR = Path(chatpage.__file__).parent / "tutor" / "weights"
LENGTH = 40
QUESTIONS = [
    "What is a block table?",
    "Hi",
    "The system prompt is shared by all the sessions. " * 3 + "Why?",
    "Tell me, in short sentences, of keys and values, and of the pool.",
    "?",
]


class Oracle:
    """transformers' own `generate`, on an instance of its own."""

    def __init__(self, family: str, folder: Path) -> None:
        self.is_random = family != "tutor"
        self.module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._known: dict[tuple[int, ...], list[int]] = {}

    def answer(self, prompt: tuple[int, ...]) -> list[int]:
        if prompt not in self._known:
            ids = torch.tensor([list(prompt)])
            mask = torch.ones_like(ids)
            out = self.module.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
            self._known[prompt] = out[0, len(prompt) :].tolist()
            if self.is_random:
                assert len(set(self._known[prompt])) >= 20, "too dull an answer to tell right from wrong"
        return self._known[prompt]


@pytest.fixture(
    scope="module",
    params=["llama", "qwen3", "gemma2", "tutor"],
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, checkpoint: Callable[[str], Path]) -> Path:
    return TUTOR if family == "tutor" else checkpoint(family)


@pytest.fixture(scope="module")
def oracle(family: str, folder: Path) -> Oracle:
    return Oracle(family, folder)


@pytest.fixture(params=["whole", "chunked"])
def engine(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """Prompts in one step, blocks of 16 and packed weights; and prompts in chunks of 7 tokens at most, which no block
    edge fits, and plain weights."""
    monkeypatch.setattr(load, "packing_pays", lambda products: request.param == "whole")
    cut = {"max_step_tokens": 7, "block_size": 4} if request.param == "chunked" else {"block_size": 16}
    engine = start(folder, sharing="all", **cut)
    yield engine
    assert_clean(engine)
    engine.stop()


def prompts(engine: Engine) -> list[Prompt]:
    """The questions, and noise."""
    words = range(10, len(engine.core.tokenizer))
    noise = [Prompt(tuple(Random(seed).choices(words, k=60))) for seed in range(3)]
    return [*(engine.prompt(user(question)) for question in QUESTIONS), *noise]


def answers(engine: Engine, oracle: Oracle) -> tuple[list[list[int]], list[list[int]]]:
    """The engine's answers to all prompts, asked at once, and transformers' own."""
    asked = prompts(engine)
    with paused(engine):
        streams = [engine.stream(Request(prompt, greedy(LENGTH))) for prompt in asked]
    expected = [oracle.answer(prompt.tokens) for prompt in asked]
    assert max(len(set(tokens)) for tokens in expected) >= 20
    return [read(stream).tokens for stream in streams], expected


def test_alone(engine: Engine, oracle: Oracle) -> None:
    found = read(ask(engine, QUESTIONS[0], greedy(LENGTH))).tokens
    assert found == oracle.answer(engine.prompt(user(QUESTIONS[0])).tokens)


def test_in_a_mixed_batch(engine: Engine, oracle: Oracle) -> None:
    steps = Steps(engine)
    found, expected = answers(engine, oracle)
    assert found == expected
    assert max(len(rows) for rows in steps.rows) >= 4
    if engine.settings.max_step_tokens == 7:
        widths = [{len(row.tokens) for row in rows} for rows in steps.rows]
        assert any(1 in width and max(width) > 1 for width in widths), "no step had both a decode and a chunk"


def test_with_the_prefix_shared(engine: Engine, oracle: Oracle) -> None:
    """The system prompt is found each time, then part of the question too, then all of it."""
    for question in (QUESTIONS[2], QUESTIONS[2][:70], QUESTIONS[2]):
        stream = ask(engine, question, greedy(LENGTH))
        found = read(stream)
        assert found.tokens == oracle.answer(engine.prompt(user(question)).tokens)
        assert found.last.cached_tokens >= len(engine.systems[0].tokens)
    assert found.last.cached_tokens == found.last.prompt_tokens


def test_on_the_second_turn(engine: Engine, oracle: Oracle) -> None:
    conversation = Conversation(engine)
    first = read(conversation.say(QUESTIONS[3], greedy(LENGTH)))
    second = read(conversation.say(QUESTIONS[0], greedy(LENGTH)))
    prompts = [exchange.prompt.tokens for exchange in conversation._exchanges]
    assert second.last.cached_tokens >= first.last.prompt_tokens + len(first.tokens) - 1
    assert prompts[1][: len(prompts[0]) + len(first.tokens)] == (*prompts[0], *first.tokens)
    assert [first.tokens, second.tokens] == [oracle.answer(prompt) for prompt in prompts]


# -- faults that these tests must see ----------------------------------------------------------------------------------


def without(reach: Reach, first: int, last: int) -> Reach:
    slots = reach.slots
    fewer = (
        slice(slots.start + first, slots.stop - last)
        if isinstance(slots, slice)
        else slots[:, first:][:, : -last or None]
    )
    return replace(
        reach, slots=fewer, mask=None if reach.mask is None else reach.mask[..., first:][..., : -last or None]
    )


def without_the_first(reach: Reach) -> Reach:
    return without(reach, 1, 0)


def without_the_newest(reach: Reach) -> Reach:
    return without(reach, 0, 1)


# Not with the tutor: it knows its answers by heart, and one token fewer does not change them.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"], indirect=True)
@pytest.mark.parametrize("fault", [without_the_first, without_the_newest])
def test_a_context_that_is_too_short_would_be_seen(
    engine: Engine, oracle: Oracle, fault: Callable[[Reach], Reach], monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = reference._reach
    monkeypatch.setattr(reference, "_reach", lambda group, batch, window: fault(reach(group, batch, window)))
    found, expected = answers(engine, oracle)
    assert found != expected


def test_a_context_that_is_too_long_would_be_seen(engine: Engine, oracle: Oracle) -> None:
    """A slot that was never written comes before the newest token."""

    def late(row: Row) -> Row:
        return replace(row, start=row.start + 1, table=[*row.table, 0]) if row.start else row

    intercept(engine.core.runner, lambda rows, compute: compute([late(row) for row in rows]))
    found, expected = answers(engine, oracle)
    assert found != expected
