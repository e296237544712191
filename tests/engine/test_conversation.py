"""A conversation: said, stopped, edited, answered again, cleared; what was computed of it is not computed again."""

from collections.abc import Callable

import pytest

from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.errors import RequestError
from chatpage.schedule.params import SamplingParams
from tests.engine.harness import Answer, ask, blocks, greedy, held, inside, paused, read

QUESTION = "What is a block table?"


@pytest.fixture
def conversation(engine: Engine) -> Conversation:
    return Conversation(engine)


def say(conversation: Conversation, text: str, params: SamplingParams | None = None) -> Answer:
    return read(conversation.say(text, params or greedy(9)))


def stop_after(conversation: Conversation, text: str, tokens: int) -> Answer:
    """Say something, and press stop at that many tokens of the answer."""
    with paused(conversation.engine):
        stream = conversation.say(text, greedy(200))
        heard = conversation._exchanges[-1]
        listen = stream._listener
        assert listen is not None

        def stop(delta: object) -> None:
            listen(delta)  # pyright: ignore[reportArgumentType]
            if len(heard.tokens) == tokens:
                conversation.stop()

        stream._listener = stop
    return read(stream)


def test_what_was_said(conversation: Conversation) -> None:
    assert conversation.messages == []
    assert not conversation.busy
    first = say(conversation, QUESTION)
    second = say(conversation, "And a slot?")
    assert conversation.messages == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And a slot?"},
        {"role": "assistant", "content": second.text},
    ]


def test_a_second_turn_is_what_the_template_would_write(conversation: Conversation) -> None:
    """Where the answer's ids are those of its text, going on gives the same ids as rendering everything again."""
    engine = conversation.engine
    turn = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "A table."}]
    read(conversation.say(QUESTION, greedy(1)))
    exchange = conversation._exchanges[0]
    exchange.tokens = engine.core.tokenizer.encode("A table.", add_special_tokens=False)
    read(conversation.say("And a slot?", greedy(1)))
    assert conversation._exchanges[1].prompt == engine.prompt([*turn, {"role": "user", "content": "And a slot?"}])


def test_a_listener_is_not_needed_for_an_answer_to_be_kept(conversation: Conversation) -> None:
    conversation.say(QUESTION, greedy(9))
    while conversation.busy:
        inside(conversation.engine, lambda: None)
    assert conversation.messages[-1]["content"] == read(ask(conversation.engine, QUESTION, greedy(9))).text


def test_one_answer_at_a_time(conversation: Conversation) -> None:
    with paused(conversation.engine):
        stream = conversation.say(QUESTION, greedy(9))
        assert conversation.busy
        assert conversation.messages == [{"role": "user", "content": QUESTION}]
        for try_it in (
            lambda: conversation.say("Hello?", greedy()),
            lambda: conversation.regenerate(greedy()),
            lambda: conversation.edit(0, "Hello?", greedy()),
        ):
            with pytest.raises(RequestError, match="still being written"):
                try_it()
    assert read(stream).reason == "length"
    assert not conversation.busy


@pytest.mark.parametrize("text", ["", "  \n", "word " * 400])
def test_a_refused_turn_changes_nothing(conversation: Conversation, text: str) -> None:
    say(conversation, QUESTION)
    before = conversation.messages
    with pytest.raises(RequestError):
        conversation.say(text, greedy())
    with pytest.raises(RequestError):
        conversation.edit(0, text, greedy())
    assert conversation.messages == before
    assert not conversation.busy
    assert say(conversation, "And a slot?").reason == "length"


def test_regenerate_computes_nothing_of_the_question_again(conversation: Conversation) -> None:
    with pytest.raises(RequestError, match="no question"):
        conversation.regenerate(greedy())
    say(conversation, QUESTION)
    before = say(conversation, "And a slot?")
    again = read(conversation.regenerate(SamplingParams(temperature=1, seed=1, max_tokens=9)))
    assert again.last.cached_tokens == again.last.prompt_tokens == before.last.prompt_tokens
    assert again.tokens != before.tokens
    assert len(conversation.messages) == 4
    assert conversation.messages[-1]["content"] == again.text
    assert read(conversation.regenerate(greedy(9))).tokens == before.tokens


def test_edit_keeps_what_comes_before(conversation: Conversation) -> None:
    first = say(conversation, QUESTION)
    say(conversation, "And a slot?")
    say(conversation, "Thanks")
    with pytest.raises(RequestError, match="Message 1 cannot be edited"):
        conversation.edit(1, "No", greedy())
    for index in (-2, 6, 7):
        with pytest.raises(RequestError):
            conversation.edit(index, "No", greedy())

    edited = read(conversation.edit(2, "And a page?", greedy(9)))
    assert [message["content"] for message in conversation.messages] == [
        QUESTION,
        first.text,
        "And a page?",
        edited.text,
    ]
    computed_before = first.last.prompt_tokens + len(first.tokens) - 1
    assert edited.last.cached_tokens >= computed_before
    assert edited.tokens == say(afresh(conversation), "And a page?").tokens


def afresh(conversation: Conversation) -> Conversation:
    """The same first turn in another session."""
    other = Conversation(conversation.engine, conversation.system_prompt)
    say(other, conversation.messages[0]["content"])
    return other


def test_editing_the_first_message_begins_anew(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    say(conversation, "And a slot?")
    edited = read(conversation.edit(0, "Hi", greedy(9)))
    assert conversation.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": edited.text}]
    assert edited.last.cached_tokens >= len(conversation.engine.systems[0].tokens)
    assert edited.tokens == say(Conversation(conversation.engine), "Hi").tokens


def test_a_stopped_answer_is_closed_and_the_conversation_goes_on(conversation: Conversation) -> None:
    conversation.stop()
    stopped = stop_after(conversation, QUESTION, tokens=5)
    assert stopped.reason == "abort"
    assert len(stopped.tokens) == 5
    assert conversation.messages[-1] == {"role": "assistant", "content": stopped.text}
    assert not conversation.busy
    second = say(conversation, "And a slot?")
    template, exchanges = conversation.engine.template, conversation._exchanges
    follow_up = template.follow_up([{"role": "user", "content": "And a slot?"}])
    assert follow_up is not None
    assert exchanges[1].prompt.tokens == (
        *exchanges[0].prompt.tokens,
        *stopped.tokens,
        *template.end_of_turn,
        *follow_up,
    )
    assert second.last.cached_tokens == stopped.last.prompt_tokens + 4, "the last drawn token never ran"


def test_an_answer_that_ended_by_itself_gets_no_second_end(conversation: Conversation) -> None:
    engine = conversation.engine
    end = engine.template.end_of_turn
    tokens = [5, 6, end[0]]
    assert conversation._closing(tokens) == end[1:]
    assert conversation._closing(tokens[:-1]) == end
    assert conversation._closing([]) == end


def test_an_answer_that_was_stopped_before_its_first_token(conversation: Conversation) -> None:
    with paused(conversation.engine):
        stream = conversation.say(QUESTION, greedy())
        conversation.stop()
    assert read(stream).tokens == []
    assert conversation.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ""}]
    assert say(conversation, "And a slot?").reason == "length"


def test_clear_forgets_everything(conversation: Conversation) -> None:
    first, session = say(conversation, QUESTION), conversation.session
    say(conversation, "And a slot?")
    conversation.clear()
    assert conversation.messages == []
    assert held(conversation.engine) == 0
    assert conversation.session != session
    again = say(conversation, QUESTION)
    assert again.last.cached_tokens == len(conversation.engine.systems[0].tokens), "nothing private is found"
    assert again.tokens == first.tokens


def test_clear_while_an_answer_is_written(conversation: Conversation) -> None:
    stream = conversation.say(QUESTION, greedy(None))
    conversation.clear()
    assert list(stream)[-1].finish_reason in ("abort", "error")
    assert not conversation.busy
    assert say(conversation, "Hi").reason == "length"
    assert len(conversation.messages) == 2


def test_close_gives_all_blocks_back(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    assert blocks(conversation.engine)["resting"] > 0
    conversation.close()
    conversation.close()
    assert held(conversation.engine) == 0


def test_a_conversation_outlives_its_session(conversation: Conversation) -> None:
    """The server may close sessions when there are too many; what was said lives on, and is computed again."""
    first = say(conversation, QUESTION)
    conversation.engine.close_session(conversation.session.key)
    second = say(conversation, "And a slot?")
    assert second.last.cached_tokens == len(conversation.engine.systems[0].tokens)
    assert second.tokens == say(afresh(conversation), "And a slot?").tokens
    assert conversation.messages[1]["content"] == first.text


@pytest.mark.parametrize("registered", [True, False])
def test_a_system_prompt_of_ones_own(launch: Callable[..., Engine], registered: bool) -> None:
    engine = launch(system_prompt=["You are kind.", "You are a pirate."])
    text = "You are a pirate." if registered else "You are a cook."
    first, second = (say(Conversation(engine, text), QUESTION) for _ in range(2))
    shared = len(engine.systems[1].tokens) if registered else 0
    assert [first.last.cached_tokens, second.last.cached_tokens] == [shared, shared]
    assert first.tokens == second.tokens != say(Conversation(engine), QUESTION).tokens


def test_a_template_that_rewrites_the_past_is_rendered_whole(conversation: Conversation) -> None:
    conversation.engine.template.additive = False
    first = say(conversation, QUESTION)
    say(conversation, "And a slot?")
    turn = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.text}]
    whole = conversation.engine.prompt([*turn, {"role": "user", "content": "And a slot?"}])
    assert conversation._exchanges[1].prompt == whole
