"""A conversation's branches: kept, counted, shown again, forked; and what they have in common is computed once."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from chatpage import conversation as module
from chatpage.conversation import Conversation, Exchange
from chatpage.engine import Engine
from chatpage.errors import RequestError
from tests.engine.harness import Answer, ask, assert_clean, greedy, held, inside, paused, read

QUESTION = "What is a block table?"


@pytest.fixture
def conversation(engine: Engine) -> Conversation:
    return Conversation(engine)


def say(conversation: Conversation, text: str, tokens: int = 9) -> Answer:
    return read(conversation.say(text, greedy(tokens)))


def questions(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages[::2]]


def known(exchange: Exchange) -> int:
    """Tokens that were computed when its turn ended: all but the last drawn one."""
    return len(exchange.prompt.tokens) + len(exchange.tokens) - 1


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_edit_and_regenerate_keep_what_was_there(conversation: Conversation) -> None:
    for text in (QUESTION, "And a slot?", "Thanks"):
        say(conversation, text)
    before = conversation.messages
    read(conversation.edit(2, "And a page?", greedy(9)))
    read(conversation.regenerate(greedy(4)))
    assert questions(conversation) == [QUESTION, "And a page?"]
    assert [conversation.branches(i) for i in range(4)] == [(1, 1), (1, 1), (3, 3), (3, 3)]

    conversation.switch(3, 1)
    assert conversation.messages == before
    assert conversation.branches(2) == (1, 3)
    conversation.switch(2, 2)
    assert questions(conversation) == [QUESTION, "And a page?"]
    assert len(conversation.shown[-1].tokens) == 9


def test_a_branch_after_any_message(conversation: Conversation) -> None:
    for text in (QUESTION, "And a slot?", "Thanks"):
        say(conversation, text)
    read(conversation.branch(1, "After the first answer", greedy(4)))
    assert questions(conversation) == [QUESTION, "After the first answer"]
    conversation.switch(2, 1)
    read(conversation.branch(5, "After the last answer", greedy(4)))
    assert questions(conversation)[2:] == ["Thanks", "After the last answer"]
    read(conversation.branch(2, "In place of the second question", greedy(4)))
    assert questions(conversation) == [QUESTION, "In place of the second question"]
    assert conversation.branches(2) == (3, 3)


def test_switching_back_shows_what_was_shown_last(conversation: Conversation) -> None:
    say(conversation, "a", 4)
    say(conversation, "b", 4)
    read(conversation.edit(2, "c", greedy(4)))
    say(conversation, "d", 4)
    read(conversation.edit(0, "e", greedy(4)))
    assert questions(conversation) == ["e"]
    conversation.switch(0, 1)
    assert questions(conversation) == ["a", "c", "d"]
    conversation.switch(2, 1)
    conversation.switch(0, 2)
    conversation.switch(0, 1)
    assert questions(conversation) == ["a", "b"]
    conversation.show(conversation.asked[2])
    assert questions(conversation) == ["a", "c", "d"]
    assert [exchange.question for exchange in conversation.asked] == ["a", "b", "c", "d", "e"]


def test_branches_part_at_the_answer_where_they_ask_the_same(conversation: Conversation) -> None:
    for text in (QUESTION, "And a slot?"):
        say(conversation, text, 4)
    assert conversation.partings == {}
    read(conversation.regenerate(greedy(4)))
    assert conversation.partings == {3: (2, 2)}
    read(conversation.edit(2, "And a page?", greedy(4)))
    assert conversation.partings == {2: (3, 3)}
    read(conversation.edit(0, "Hi", greedy(4)))
    assert conversation.partings == {0: (2, 2)}
    conversation.switch(0, 1)
    conversation.switch(2, 1)
    assert conversation.partings == {0: (1, 2), 2: (1, 3)}


def test_messages_and_branches_that_are_not_there(conversation: Conversation) -> None:
    for try_it in (
        lambda index: conversation.branches(index),
        lambda index: conversation.switch(index, 1),
        lambda index: conversation.fork(index),
        lambda index: conversation.branch(index, "Hi", greedy()),
    ):
        with pytest.raises(RequestError, match=r"Message 0 is not there; there is none yet\."):
            try_it(0)
    say(conversation, QUESTION)
    with pytest.raises(RequestError, match=r"Message 2 is not there; the last one is 1\."):
        conversation.branches(2)
    with pytest.raises(RequestError, match="Message -1 is not there"):
        conversation.fork(-1)
    for number in (0, 2):
        with pytest.raises(RequestError, match=rf"Branch {number} of message 1 .+ one of 1 to 1\."):
            conversation.switch(1, number)


def test_while_an_answer_is_written_the_branch_stays(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    with paused(conversation.engine):
        stream = conversation.regenerate(greedy(9))
        for try_it in (
            lambda: conversation.switch(0, 1),
            lambda: conversation.show(conversation.asked[0]),
            lambda: conversation.fork(1),
            lambda: conversation.branch(1, "Hello?", greedy()),
        ):
            with pytest.raises(RequestError, match="still being written"):
                try_it()
        empty = conversation.fork(0)
    read(stream)
    assert empty.messages == []
    conversation.switch(0, 1)


def test_a_refused_branch_changes_nothing(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    say(conversation, "And a slot?")
    before, asked = conversation.messages, conversation.asked
    for text in ("", "word " * 400):
        with pytest.raises(RequestError):
            conversation.branch(1, text, greedy())
    assert (conversation.messages, conversation.asked) == (before, asked)


def test_clear_forgets_all_branches(conversation: Conversation) -> None:
    say(conversation, QUESTION, 4)
    read(conversation.edit(0, "Hi", greedy(4)))
    conversation.clear()
    assert (conversation.messages, conversation.asked) == ([], [])
    say(conversation, QUESTION, 4)
    assert conversation.branches(0) == (1, 1)


def test_a_conversation_does_not_grow_for_ever(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EXCHANGES", 2)
    say(conversation, QUESTION, 1)
    read(conversation.regenerate(greedy(1)))
    with pytest.raises(RequestError, match="has 2 questions in all its branches, and 2 is the most"):
        conversation.regenerate(greedy(1))
    assert not conversation.busy
    conversation.clear()
    with pytest.raises(RequestError, match="has 0 questions in all its branches, and 2 is the most"):
        conversation.say(QUESTION, greedy(1), replies=3)


# -- what is found of it -----------------------------------------------------------------------------------------------


def test_after_switching_back_only_the_new_turn_is_computed(conversation: Conversation) -> None:
    for text in (QUESTION, "And a slot?"):
        say(conversation, text)
    left = conversation.shown[-1]
    read(conversation.edit(0, "Something else entirely", greedy(9)))
    say(conversation, "And more of that")
    right = conversation.shown[-1]

    conversation.switch(0, 1)
    assert say(conversation, "Go on").last.cached_tokens == known(left)
    conversation.switch(0, 2)
    assert say(conversation, "Go on").last.cached_tokens == known(right)


def test_an_edit_in_the_middle_keeps_every_common_block(conversation: Conversation) -> None:
    """Not only the whole blocks: the one in which the questions part is found up to there, and copied on write."""
    for text in (QUESTION, "And a slot?", "Thanks"):
        say(conversation, text)
    first, second = conversation.shown[:2]
    edited = read(conversation.edit(2, "And a spoon?", greedy(9)))
    old, new = second.prompt.tokens, conversation.shown[-1].prompt.tokens
    common = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert known(first) < common < len(new)
    assert edited.last.cached_tokens == common


def test_an_answer_given_again_computes_no_token_of_its_question(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    again = read(conversation.regenerate(greedy(9)))
    assert again.last.cached_tokens == again.last.prompt_tokens


@pytest.mark.parametrize("sharing", ["system", "all", "off"])
def test_a_fork_finds_what_it_has_in_common(launch: Callable[..., Engine], sharing: str) -> None:
    engine = launch(sharing=sharing)
    conversation = Conversation(engine)
    for text in (QUESTION, "And a slot?", "Thanks"):
        say(conversation, text)
    before = held(engine)
    fork = conversation.fork(3)
    assert fork.session.key != conversation.session.key
    assert fork.messages == conversation.messages[:4]
    assert held(engine) == before, "a fork holds nothing until it is asked"

    answer = say(fork, "Go on")
    assert answer.last.cached_tokens >= known(conversation.shown[1])
    assert questions(fork) == [QUESTION, "And a slot?", "Go on"]
    assert questions(conversation) == [QUESTION, "And a slot?", "Thanks"]
    assert [len(talk.asked) for talk in (fork, conversation)] == [3, 3]
    stranger = say(Conversation(engine), QUESTION)
    shared = {"system": len(engine.systems[0].tokens), "off": 0, "all": stranger.last.prompt_tokens}
    assert stranger.last.cached_tokens == shared[sharing], "only one's own forks find it"


def test_a_fork_and_its_origin_answer_side_by_side(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    fork = conversation.fork(1)
    with paused(conversation.engine):
        streams = [talk.say("And a slot?", greedy(12)) for talk in (conversation, fork)]
    first, second = map(read, streams)
    assert first.tokens == second.tokens
    conversation.close()
    fork.edit(0, "Hi", greedy(4))
    fork.stop()


def test_a_fork_outlives_its_origin(conversation: Conversation) -> None:
    say(conversation, QUESTION)
    fork = conversation.fork(1)
    conversation.close()
    answer = say(fork, "And a slot?")
    assert answer.last.cached_tokens >= known(fork.shown[0])
    late = conversation.fork(1)
    assert say(late, "And a slot?").tokens == answer.tokens, "of a closed session: computed again"


def test_conversations_that_are_opened_again_share_again(launch: Callable[..., Engine]) -> None:
    """Their old blocks are of a domain that is gone; what one of them computes anew is found by the other."""
    engine = launch(sharing="system")
    conversation = Conversation(engine)
    say(conversation, QUESTION)
    fork = conversation.fork(1)
    for talk in (conversation, fork):
        talk.close()
    conversation.reopen()
    fork.reopen(conversation.session)
    key = fork.session.key
    first, second = (say(talk, "And a slot?") for talk in (conversation, fork))
    assert first.last.cached_tokens == len(engine.systems[0].tokens)
    assert second.last.cached_tokens > known(fork.shown[0])
    fork.reopen(conversation.session)
    assert fork.session.key == key, "it is open"


def test_an_expired_session_goes_on_in_any_branch(launch: Callable[..., Engine]) -> None:
    """What is in the cache still is found by all branches; then all of it is evicted, and computed again."""
    engine = launch(kv_blocks=80)
    conversation = Conversation(engine)
    for text in (QUESTION, "And a slot?"):
        say(conversation, text)
    left = conversation.shown[-1]
    read(conversation.edit(2, "And a page?", greedy(9)))
    expire(engine)
    assert held(engine) == 0
    conversation.switch(2, 1)
    first = say(conversation, "Go on")
    assert first.last.cached_tokens == known(left)

    read(ask(engine, "A stranger fills the pool", greedy(None)))
    again = read(conversation.regenerate(greedy(9)))
    assert again.last.cached_tokens == len(engine.systems[0].tokens)
    assert again.tokens == first.tokens


def test_branches_of_a_template_that_rewrites_the_past(conversation: Conversation) -> None:
    conversation.engine.template.additive = False
    first = say(conversation, QUESTION)
    say(conversation, "And a slot?")
    read(conversation.edit(2, "And a page?", greedy(9)))
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first.text}]
    turn = {"role": "user", "content": "And a page?"}
    assert conversation.shown[-1].prompt == conversation.engine.prompt([*said, turn])


def expire(engine: Engine) -> None:
    """Release every resting table, as the time to live does."""
    inside(engine, lambda: engine.core.expire(rested_before=float("inf")))


# -- all of it, in any order -------------------------------------------------------------------------------------------

WORDS = ["", "What", " is", " a", " block", " table", "?", " the", " pool", " slot", " é", " 한"]
Path = tuple[tuple[str, int], ...]  # questions, and how many tokens their answers have


class Walk:
    """Does anything that a visitor can do with a conversation and its forks, and knows what must come of it.

    Every answer must be the one that a fresh conversation gives which is asked the same path at once. The pool holds
    hardly more than one full context, so branches are evicted all the time.
    """

    def __init__(self, engine: Engine, roomy: Engine, seed: int) -> None:
        self.engine = engine
        self.roomy = roomy
        self.random = random.Random(seed)
        self.talks = [Conversation(engine)]
        self.answers: dict[Path, list[int]] = {}
        self.found = 0

    def step(self) -> None:
        talk = self.random.choice(self.talks)
        action = self.random.choice([self.ask, self.ask, self.stop, self.switch, self.fork, self.expire, self.close])
        action(talk)
        for exchange in talk.asked:
            assert exchange.tokens == self.expected(path_of(exchange))

    def ask(self, talk: Conversation) -> None:
        """Say, answer again, edit or branch."""
        answer = read(self.begin(talk, self.random.randint(1, 12)))
        assert answer.reason == "length"
        assert answer.tokens == talk.shown[-1].tokens
        self.found += answer.last.cached_tokens

    def begin(self, talk: Conversation, tokens: int) -> Any:
        text = "".join(self.random.choices(WORDS, k=self.random.randint(0, 6))) + self.random.choice("abc")
        last = 2 * len(talk.shown) - 1
        ways = [lambda: talk.say(text, greedy(tokens))]
        if last > 0:
            index = self.random.randint(0, last)
            ways += [
                lambda: talk.regenerate(greedy(tokens)),
                lambda: talk.edit(index - index % 2, text, greedy(tokens)),
                lambda: talk.branch(index, text, greedy(tokens)),
            ]
        way = ways[0] if len(talk.shown) < 2 else self.random.choice(ways)
        return (ways[-1] if len(talk.shown) > 4 else way)()

    def stop(self, talk: Conversation) -> None:
        """Stop after some tokens, perhaps before the first."""
        with paused(self.engine):
            stream = self.begin(talk, 100)
            stop_at(stream, talk, self.random.randint(0, 6))
        assert read(stream).reason == "abort"

    def switch(self, talk: Conversation) -> None:
        if talk.shown:
            index = self.random.randrange(2 * len(talk.shown))
            number = self.random.randint(1, talk.branches(index).count)
            talk.switch(index, number)
            assert talk.branches(index).number == number

    def fork(self, talk: Conversation) -> None:
        if talk.shown and len(self.talks) < 3:
            index = self.random.randrange(2 * len(talk.shown))
            fork = talk.fork(index)
            assert fork.messages == talk.messages[: (index + 1) // 2 * 2]
            self.talks.append(fork)

    def expire(self, talk: Conversation) -> None:
        expire(self.engine)

    def close(self, talk: Conversation) -> None:
        if self.random.random() < 0.3:
            talk.close()

    def expected(self, path: Path) -> list[int]:
        """The last answer of a fresh conversation that is asked this path, in another engine."""
        if path not in self.answers:
            fresh = Conversation(self.roomy)
            for question, tokens in path:
                with paused(self.roomy):
                    stream = fresh.say(question, greedy(max(tokens, 1)))
                    if not tokens:
                        fresh.stop()
                read(stream)
            self.answers[path] = fresh.shown[-1].tokens
            fresh.close()
        return self.answers[path]


def path_of(exchange: Exchange) -> Path:
    return tuple((step.question, len(step.tokens)) for step in exchange.path())


def stop_at(stream: Any, talk: Conversation, tokens: int) -> None:
    """Press stop at that many tokens of the running answer."""
    listen, heard = stream._listener, talk.shown[-1]
    if not tokens:
        talk.stop()

    def hear(delta: object) -> None:
        listen(delta)
        if len(heard.tokens) == tokens:
            talk.stop()

    stream._listener = hear


@pytest.mark.parametrize("seed", range(4))
def test_any_walk_through_a_conversation_gives_the_answers_of_fresh_ones(
    launch: Callable[..., Engine], seed: int
) -> None:
    walk = Walk(launch(max_model_len=200, kv_blocks=60), launch(), seed)
    for _ in range(50):
        walk.step()
    assert walk.found > 0 < walk.engine.core.view.counters["evicted"]
    assert len(walk.answers) > 8
    for talk in walk.talks:
        talk.close()
    assert_clean(walk.engine)
