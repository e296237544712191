"""Greedy answers are transformers' own, token for token, however the work is cut up and shared."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import chatpage
from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.model import reference
from chatpage.model.batch import Batch, Row
from chatpage.model.reference import Group, Reach
from chatpage.schedule.request import Request
from tests.engine.harness import Steps, ask, assert_clean, greedy, paused, read, start, user

TUTOR = Path(chatpage.__file__).parent / "tutor" / "weights"
NO_TUTOR = pytest.mark.skipif(not (TUTOR / "model.safetensors").exists(), reason="the bundled weights are not there")
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
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = self.module.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
            self._known[prompt] = out[0, len(prompt) :].tolist()
            if self.is_random:
                assert len(set(self._known[prompt])) >= 20, "too dull an answer to tell right from wrong"
        return self._known[prompt]


@pytest.fixture(
    scope="module",
    params=["llama", "qwen3", "gemma2", pytest.param("tutor", marks=NO_TUTOR)],
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
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    """Prompts in one step and blocks of 16; and prompts in chunks of 7 tokens at most, which no block edge fits."""
    cut = {"max_step_tokens": 7, "block_size": 4} if request.param == "chunked" else {"block_size": 16}
    engine = start(folder, sharing="all", **cut)
    yield engine
    assert_clean(engine)
    engine.stop()


def answer(engine: Engine, prompt_text: str) -> tuple[tuple[int, ...], list[int]]:
    prompt = engine.prompt(user(prompt_text))
    return prompt.tokens, read(engine.stream(Request(prompt, greedy(LENGTH)))).tokens


def test_alone(engine: Engine, oracle: Oracle) -> None:
    prompt, tokens = answer(engine, QUESTIONS[0])
    assert tokens == oracle.answer(prompt)


def test_in_a_mixed_batch(engine: Engine, oracle: Oracle) -> None:
    steps = Steps(engine)
    with paused(engine):
        streams = [ask(engine, question, greedy(LENGTH)) for question in QUESTIONS]
    answers = [read(stream).tokens for stream in streams]
    assert answers == [oracle.answer(engine.prompt(user(question)).tokens) for question in QUESTIONS]
    assert max(len(rows) for rows in steps.rows) == len(QUESTIONS)
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


def one_token_too_few(row: Row) -> Row:
    """The newest token takes the place of the one before it."""
    return replace(row, start=row.start - 1) if row.start else row


def one_token_too_many(row: Row) -> Row:
    """A slot that was never written is between the newest token and the one before it."""
    return replace(row, start=row.start + 1, table=[*row.table, 0]) if row.start else row


@pytest.mark.parametrize("fault", [one_token_too_few, one_token_too_many])
def test_a_wrong_context_would_be_seen(
    engine: Engine, oracle: Oracle, fault: Callable[[Row], Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = engine.core.runner.run
    monkeypatch.setattr(engine.core.runner, "run", lambda rows, copies: run([fault(row) for row in rows], copies))
    prompt, tokens = answer(engine, QUESTIONS[0])
    assert tokens != oracle.answer(prompt)


def test_a_first_token_that_nobody_sees_would_be_seen(
    engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference._reach

    def wrong(group: Group, batch: Batch, window: int | None) -> Reach:
        reach = right(group, batch, window)
        return Reach(reach.slots[:, 1:], None if reach.mask is None else reach.mask[..., 1:])

    monkeypatch.setattr(reference, "_reach", wrong)
    prompt, tokens = answer(engine, QUESTIONS[0])
    assert tokens != oracle.answer(prompt)
