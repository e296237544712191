"""Several replies of a conversation side by side: they are branches, and one of them is gone on from."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from chatpage.conversation import Conversation, Exchange
from chatpage.engine import Engine
from chatpage.errors import Busy, RequestError
from chatpage.schedule.params import SamplingParams
from tests.engine.harness import Answer, assert_clean, blocks, greedy, held, inside, paused, read

QUESTION = "What is a block table?"


@pytest.fixture
def conversation(engine: Engine) -> Conversation:
    return Conversation(engine)


def hot(max_tokens: int | None = 9, seed: int = 3) -> SamplingParams:
    return SamplingParams(temperature=2, seed=seed, max_tokens=max_tokens)


def finish(conversation: Conversation) -> list[Answer]:
    """Read the running turn to its end."""
    return [read(reply.stream) for reply in conversation.turn if reply.stream is not None]


def ask(conversation: Conversation, text: str = QUESTION, replies: int = 4, **wishes: Any) -> list[Exchange]:
    conversation.say(text, hot(**wishes), replies=replies)
    finish(conversation)
    return conversation.turn


def known(exchange: Exchange) -> int:
    """Tokens that were computed when its turn ended: all but the last drawn one."""
    return len(exchange.prompt.tokens) + len(exchange.tokens) - 1


def test_until_one_is_chosen_they_stand_side_by_side(conversation: Conversation) -> None:
    turn = ask(conversation)
    assert len({reply.text for reply in turn}) == 4
    assert conversation.replies == turn == conversation.asked
    assert conversation.shown == [turn[0]]
    assert conversation.partings == {1: (1, 4)}
    conversation.choose(3)
    assert conversation.replies == []
    assert conversation.messages[1] == {"role": "assistant", "content": turn[2].text}
    assert conversation.partings == {1: (3, 4)}
    with pytest.raises(RequestError, match="no replies to choose from any more"):
        conversation.choose(1)
    conversation.switch(1, 1)
    assert conversation.shown == [turn[0]]


def test_one_reply_is_there_at_once(conversation: Conversation) -> None:
    ask(conversation, replies=1)
    assert conversation.replies == []
    with pytest.raises(RequestError, match="no replies"):
        conversation.choose(1)


def test_the_chosen_one_keeps_its_blocks_alone(conversation: Conversation) -> None:
    """And the next turn computes its own tokens only."""
    engine = conversation.engine
    turn = ask(conversation)
    resting = held(engine)
    conversation.choose(2)
    assert held(engine) < resting
    assert (
        blocks(engine)["resting"]
        == -(-known(turn[1]) // engine.block_size) - len(engine.systems[0].tokens) // engine.block_size
    )
    second = read(conversation.say("And a slot?", greedy(4)))
    assert second.last.cached_tokens == known(turn[1])


def test_choosing_stops_the_others(conversation: Conversation) -> None:
    with paused(conversation.engine):
        conversation.say(QUESTION, hot(40, seed=1), replies=3)
        first, second, third = conversation.turn
        stop_all_but_at(conversation, second, tokens=3)
    answers = finish(conversation)
    assert [answer.reason == "abort" for answer in answers] == [True, False, True]
    assert not conversation.busy
    assert conversation.shown == [second]
    assert len(second.tokens) > len(first.tokens)
    assert third.text == answers[2].text


def stop_all_but_at(conversation: Conversation, reply: Exchange, tokens: int) -> None:
    """Choose this reply when it has so many tokens."""
    assert reply.stream is not None
    listen = reply.stream._listener
    assert listen is not None

    def hear(delta: Any) -> None:
        listen(delta)
        if len(reply.tokens) == tokens:
            conversation.choose(reply.choice + 1)

    reply.stream._listener = hear


def test_stop_ends_all_and_the_choice_is_still_there(conversation: Conversation) -> None:
    with paused(conversation.engine):
        conversation.say(QUESTION, hot(None), replies=3)
        assert conversation.busy
        for number in (0, 4):
            with pytest.raises(RequestError, match=rf"Reply {number} is not there; it must be one of 1 to 3\."):
                conversation.choose(number)
        conversation.stop()
    assert [answer.reason for answer in finish(conversation)] == ["abort"] * 3
    assert not conversation.busy
    assert len(conversation.replies) == 3
    conversation.choose(3)


def test_while_one_is_written_all_are(conversation: Conversation) -> None:
    with paused(conversation.engine):
        conversation.say(QUESTION, hot(), replies=2)
        first, second = conversation.turn
        assert first.stream is not None
        assert second.stream is not None
        first.stream.cancel()
    while not first.done:
        inside(conversation.engine, lambda: None)
    assert conversation.busy == (not second.done)
    assert read(second.stream).reason == "length"
    assert not conversation.busy


def test_the_next_message_goes_on_from_the_first_reply(conversation: Conversation) -> None:
    turn = ask(conversation)
    second = read(conversation.say("And a slot?", greedy(4)))
    assert conversation.replies == []
    assert conversation.shown[0] is turn[0]
    assert second.last.cached_tokens == known(turn[0])


def test_a_failed_reply_is_not_gone_on_from(conversation: Conversation) -> None:
    turn = ask(conversation, replies=3)
    turn[0].finish_reason = "error"
    assert conversation.shown == [turn[1]]
    read(conversation.say("And a slot?", greedy(4)))
    assert conversation.shown[0] is turn[1]


def test_a_refused_turn_leaves_the_choice(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = ask(conversation)
    before = held(conversation.engine)
    for text in ("", "word " * 400):
        with pytest.raises(RequestError):
            conversation.say(text, greedy())
    with monkeypatch.context() as patch:
        patch.setattr(conversation.engine, "_open_replies", 10_000)
        with pytest.raises(Busy):
            conversation.say("And a slot?", greedy(), replies=2)
    assert conversation.replies == turn
    assert held(conversation.engine) == before
    conversation.choose(4)


def test_replies_again_and_in_another_branch(conversation: Conversation) -> None:
    ask(conversation, replies=2)
    conversation.choose(2)
    read(conversation.say("And a slot?", greedy(4)))
    conversation.regenerate(hot(), replies=3)
    answers = finish(conversation)
    assert all(answer.last.cached_tokens == answer.last.prompt_tokens for answer in answers)
    assert conversation.partings == {1: (2, 2), 3: (2, 4)}
    conversation.switch(3, 1)
    assert conversation.replies == [], "whoever leaves has chosen the first"
    assert conversation.shown[-1].question == "And a slot?"
    conversation.edit(2, "And a page?", hot(), replies=2)
    finish(conversation)
    assert conversation.partings == {1: (2, 2), 2: (5, 6)}
    fork = conversation.fork(3)
    assert fork.replies == []
    assert fork.messages == conversation.messages
    assert len(conversation.replies) == 2


def test_whoever_does_not_like_any_asks_again(conversation: Conversation) -> None:
    first = ask(conversation, replies=3)
    conversation.regenerate(hot(seed=4), replies=2)
    finish(conversation)
    assert len(conversation.replies) == 2
    assert conversation.partings == {1: (4, 5)}
    conversation.choose(2)
    conversation.switch(1, 3)
    assert conversation.shown == [first[2]]


def test_a_choice_outlives_its_session(conversation: Conversation) -> None:
    turn = ask(conversation, replies=3)
    conversation.close()
    conversation.reopen()
    assert conversation.replies == turn
    conversation.choose(2)
    read(conversation.say("And a slot?", greedy(4)))
    assert conversation.shown[0] is turn[1]


def test_clear_forgets_the_choice(conversation: Conversation) -> None:
    ask(conversation)
    conversation.clear()
    assert (conversation.replies, conversation.turn, conversation.shown) == ([], [], [])
    assert held(conversation.engine) == 0
    read(conversation.say(QUESTION, greedy(2)))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_chosen_when_leaves_nothing_behind(launch: Callable[..., Engine], seed: int) -> None:
    """In a pool that is too small for all replies; what is kept is what it would be alone."""
    engine = launch(max_model_len=160, kv_blocks=70)
    draw = random.Random(seed)
    conversation = Conversation(engine)
    for turn in range(12):
        with paused(engine):
            asked = conversation.asked
            if len(conversation.shown) > 2:
                conversation.branch(0, QUESTION, hot(12, turn), replies=draw.randint(1, 4))
            else:
                conversation.say(f"Question {turn}", hot(12, turn), replies=draw.randint(1, 4))
            replies = conversation.turn
            one = draw.choice(replies)
            if len(replies) > 1 and draw.random() < 0.5:
                stop_all_but_at(conversation, one, draw.randint(1, 12))
            elif draw.random() < 0.3:
                conversation.stop()
        finish(conversation)
        assert conversation.asked == [*asked, *replies]
        if conversation.replies and draw.random() < 0.5:
            conversation.choose(draw.randint(1, len(replies)))
        if draw.random() < 0.3:
            conversation.switch(1, draw.randint(1, conversation.branches(1).count))
    conversation.close()
    assert_clean(engine)
