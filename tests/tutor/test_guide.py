"""The next questions: they belong to the answer, and their answers are known."""

import pytest

from chatpage import tutor
from chatpage.tutor import texts
from chatpage.tutor.judge import ask_back

corpus = texts.load()
questions = {topic.question for topic in corpus.subjects}


@pytest.mark.parametrize("topic", corpus.subjects, ids=lambda topic: topic.id)
def test_each_topic_suggests_two_or_three_others(topic: texts.Topic) -> None:
    for answer in (topic.answers[0], topic.why[0], topic.simple[0]):
        next = tutor.suggestions(answer)
        assert next == [corpus.topics[id].question for id in topic.next]
        assert 2 <= len(set(next)) <= 3
        assert topic.question not in next


def test_an_answer_that_was_cut_still_suggests() -> None:
    answer = corpus.topics["cow"].answers[0]
    assert tutor.suggestions(answer[: len(answer) * 2 // 3]) == tutor.suggestions(answer)


def test_a_question_back_suggests_what_it_asks() -> None:
    table, block = corpus.topics["blocktable"], corpus.topics["block"]
    assert tutor.suggestions(ask_back([table, block])) == [table.question, block.question]


@pytest.mark.parametrize("answer", ["", "Hello!", "No idea, something else altogether.", "Do you mean what you say?"])
def test_where_nothing_is_known_good_questions_to_begin_with(answer: str) -> None:
    assert tutor.suggestions(answer) == ["What is a KV cache?", "What is paged attention?", "What does the panel show?"]


def test_every_topic_is_suggested_somewhere() -> None:
    suggested = {question for topic in corpus.subjects for question in tutor.suggestions(topic.answers[0])}
    assert suggested == questions
