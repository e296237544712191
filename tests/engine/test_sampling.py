"""Every wish of how tokens are chosen, through the whole engine, against transformers and against itself alone."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatpage.engine import Engine
from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Logprob
from tests.engine.harness import Answer, ask, greedy, inside, paused, read, user

pytestmark = pytest.mark.usefixtures("overlaps")

QUESTION = "What is a block table?"
OTHERS = ["Hi", "And a slot?", "Why is the pool full, and of what?", "?"]


@pytest.fixture
def module(checkpoint: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)


def prompt(engine: Engine, text: str = QUESTION) -> list[int]:
    return list(engine.prompt(user(text)).tokens)


def logprobs(answer: Answer) -> list[Logprob]:
    return [logprob for delta in answer.deltas for logprob in delta.logprobs]


# -- against transformers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_a_repetition_penalty_is_that_of_generate(engine: Engine, module: Any, penalty: float) -> None:
    """The questions are asked at once, each with a penalty of its own but one."""
    ids = torch.tensor([prompt(engine)])
    expected = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=penalty,
    )[0, ids.shape[1] :].tolist()
    plain = read(ask(engine, QUESTION, greedy(40))).tokens
    with paused(engine):
        others = [ask(engine, other, greedy(30, repetition_penalty=1.1 + n)) for n, other in enumerate(OTHERS)]
        stream, unlike = (
            ask(engine, QUESTION, greedy(40, repetition_penalty=penalty)),
            ask(engine, QUESTION, greedy(40)),
        )
    assert read(stream).tokens == expected != plain
    assert read(unlike).tokens == plain
    assert [len(read(other).tokens) for other in others] == [30] * 4


@pytest.mark.parametrize("chunk", [7, 2048])
def test_log_probabilities_are_those_of_a_forward_of_the_whole_text(
    launch: Callable[..., Engine], module: Any, chunk: int
) -> None:
    """Whatever penalties, biases and temperature make of them."""
    engine = launch(max_step_tokens=chunk)
    wishes = [
        SamplingParams(temperature=0, max_tokens=30, logprobs=5),
        SamplingParams(temperature=1.5, top_k=9, seed=1, max_tokens=30, logprobs=20, logit_bias=((40, 3.0),)),
        SamplingParams(temperature=0, repetition_penalty=3, presence_penalty=2, max_tokens=30, logprobs=0),
    ]
    with paused(engine):
        streams = [ask(engine, QUESTION, wish) for wish in wishes]
        silent = ask(engine, QUESTION, greedy(30))
    for stream, wish in zip(streams, wishes, strict=True):
        answer = read(stream)
        before = prompt(engine)
        with torch.no_grad():
            whole = module(torch.tensor([before + answer.tokens])).logits[0].log_softmax(-1)
        rows = whole[len(before) - 1 : -1]
        told = logprobs(answer)
        assert [logprob.token for logprob in told] == answer.tokens
        own = rows.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor([logprob.logprob for logprob in told]), own, atol=1e-4, rtol=0)
        best = rows.topk(wish.logprobs or 0)
        assert [[token for token, _ in logprob.top] for logprob in told] == best.indices.tolist()
        top = torch.tensor([[value for _, value in logprob.top] for logprob in told])
        assert torch.allclose(top, best.values, atol=1e-4, rtol=0)
    assert logprobs(read(silent)) == []


def test_log_probabilities_come_with_their_tokens(engine: Engine) -> None:
    heard: list[Delta] = []
    read(ask(engine, QUESTION, greedy(10, logprobs=1), listener=heard.append))
    assert [len(delta.tokens) for delta in heard] == [0] + [1] * 10
    assert all(tuple(logprob.token for logprob in delta.logprobs) == delta.tokens for delta in heard)


# -- the same seed, whatever else is in the batch ----------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"temperature": 1.2},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.05, "logprobs": 2},
    {"temperature": 1, "repetition_penalty": 1.3},
    {"temperature": 1, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1, "logit_bias": ((40, 2.0), (41, -100)), "min_tokens": 20},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 1, "logprobs": 0},
]


def crowd(engine: Engine, random: Random, count: int) -> list[Any]:
    """Neighbours of all kinds, which end after a few steps each."""
    return [
        ask(engine, random.choice(OTHERS), SamplingParams(**random.choice(KINDS), max_tokens=random.randint(20, 40)))
        for _ in range(count)
    ]


def test_a_seed_gives_the_same_text_whoever_comes_and_goes(launch: Callable[..., Engine]) -> None:
    """Alone; among neighbours that come and go; and in a pool so small that it is preempted again and again."""
    wishes = [SamplingParams(**kind, seed=n, max_tokens=48) for n, kind in enumerate(KINDS)]
    engine = launch()
    alone = [read(ask(engine, QUESTION, wish)) for wish in wishes]
    assert len({answer.text for answer in alone}) == len(KINDS)

    for engine, size in ((launch(max_step_tokens=32), 3), (launch(max_model_len=128, kv_blocks=40), 1)):
        random, late = Random(size), []

        def follow(delta: Delta, engine=engine, random=random, late=late, size=size) -> None:
            if delta.completion_tokens in (9, 21, 33) and delta.state == "decode":
                late.extend(crowd(engine, random, size))

        with paused(engine):
            early = crowd(engine, random, size)
            streams = [ask(engine, QUESTION, wish, listener=follow) for wish in wishes]
        found = [read(stream) for stream in streams]
        assert [(a.text, a.tokens, a.reason) for a in found] == [(a.text, a.tokens, a.reason) for a in alone]
        assert len(late) >= 8 * size
        assert all(read(stream).reason in ("length", "stop") for stream in early + late)
    assert inside(engine, lambda: engine.core.view.counters["preempted"]) > 3


def test_the_choice_of_a_seed_matters_to_every_kind(engine: Engine) -> None:
    for kind in KINDS[:6]:
        texts = {
            read(ask(engine, QUESTION, SamplingParams(**kind, seed=seed, max_tokens=24))).text for seed in range(3)
        }
        assert len(texts) == 3


# -- penalties and biases ----------------------------------------------------------------------------------------------


def test_presence_and_frequency_look_at_the_answer_alone(engine: Engine) -> None:
    """A bias makes one token the only one; the penalty of having been drawn frees the answer of it, once or at last."""
    token = prompt(engine)[-3]
    bias = ((token, 40.0),)
    stuck = read(ask(engine, QUESTION, greedy(8, logit_bias=bias)))
    assert stuck.tokens == [token] * 8
    few = read(ask(engine, QUESTION, greedy(60, logit_bias=((token, 12.0),), frequency_penalty=0.5)))
    again = read(ask(engine, QUESTION, greedy(60, logit_bias=((token, 12.0),))))
    assert few.tokens[0] == again.tokens[0] == token, "the prompt has it too, which counts for nothing"
    assert 1 <= few.tokens.count(token) < again.tokens.count(token)


def test_what_is_biased_by_minus_100_does_not_come(engine: Engine) -> None:
    plain = read(ask(engine, QUESTION, greedy(40))).tokens
    bias = tuple((token, -100) for token in sorted(set(plain)))
    assert not set(read(ask(engine, QUESTION, greedy(40, logit_bias=bias))).tokens) & set(plain)


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_stop_token_is_not_shown_and_told_once(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(40)))
    end = whole.tokens[10]
    first = whole.tokens.index(end)
    answer = read(ask(engine, QUESTION, greedy(40, stop_token_ids=(end,), logprobs=0)))
    assert (answer.tokens, answer.reason) == (whole.tokens[: first + 1], "stop")
    assert answer.text == engine.core.tokenizer.decode(whole.tokens[:first])
    assert len(logprobs(answer)) == first + 1
    assert read(ask(engine, QUESTION, greedy(40))).tokens == whole.tokens, "the next request has its own ends"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_end_is_drawn_before_min_tokens(engine: Engine, temperature: float) -> None:
    """A bias makes two ends the only tokens that are ever drawn: one of the model, and one of the request."""
    model_end, own_end = 1, 40
    bias = ((model_end, 100.0), (own_end, 100.0))
    for end in (model_end, own_end):
        wish = {"temperature": temperature, "seed": 3, "stop_token_ids": (own_end,), "max_tokens": 30}
        only = ((end, 100.0),) if end == model_end else bias[1:]
        at_once = read(ask(engine, QUESTION, SamplingParams(**wish, logit_bias=only)))
        assert (at_once.tokens, at_once.text, at_once.reason) == ([end], "", "stop")
        later = read(ask(engine, QUESTION, SamplingParams(**wish, logit_bias=bias, min_tokens=7)))
        assert len(later.tokens) == 8
        assert later.tokens[-1] in (model_end, own_end)
        assert not {model_end, own_end} & set(later.tokens[:-1])
        assert later.reason == "stop"


def test_a_stop_string_ends_nothing_before_min_tokens(engine: Engine) -> None:
    whole = read(ask(engine, QUESTION, greedy(40)))
    decode = engine.core.tokenizer.decode
    token = next(token for token in whole.tokens[4:] if decode([token]).isalpha())
    stop, at = decode([token]), whole.tokens.index(token)
    before = read(ask(engine, QUESTION, greedy(40, stop=(stop,), min_tokens=at)))
    assert before.tokens == whole.tokens[: at + 1]
    assert (before.text, before.reason) == (whole.text[: whole.text.index(stop)], "stop")
    later = read(ask(engine, QUESTION, greedy(40, stop=(stop,), min_tokens=at + 1)))
    assert later.tokens[: at + 1] == before.tokens
    assert len(later.tokens) > at + 1
    assert stop in later.text


def test_min_tokens_reach_no_further_than_the_servers_limit(launch: Callable[..., Engine]) -> None:
    engine = launch(max_output_tokens=6)
    answer = read(ask(engine, QUESTION, SamplingParams(temperature=0, min_tokens=9)))
    assert (len(answer.tokens), answer.reason) == (6, "length")


def test_a_request_that_bans_everything_still_gets_an_answer(engine: Engine) -> None:
    every = tuple(range(engine.core.loaded.vocab_size))
    answer = read(ask(engine, QUESTION, greedy(9, stop_token_ids=every, min_tokens=5)))
    assert (len(answer.tokens), answer.text, answer.reason) == (1, "", "stop")


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        ({"stop_token_ids": (3, 320)}, "stop_token_ids"),
        ({"logit_bias": ((3, 1.0), (2**31 - 1, 1.0))}, "logit_bias"),
    ],
)
def test_tokens_that_the_model_does_not_know_are_refused(engine: Engine, wishes: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match="the model knows 0 to 319") as refusal:
        ask(engine, QUESTION, greedy(**wishes))
    assert refusal.value.param == param
