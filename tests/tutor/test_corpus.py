"""The texts: readable, enough of them, and nothing of the exam in the lessons."""

from collections import defaultdict

import pytest

from chatpage.tutor import texts
from chatpage.tutor.lessons import Teacher
from chatpage.tutor.texts import FOLLOW_UPS, plain

corpus = texts.load()


@pytest.mark.parametrize("topic", corpus.subjects, ids=lambda topic: topic.id)
def test_every_topic_has_phrasings_and_answers_of_each_kind(topic: texts.Topic) -> None:
    assert len(topic.questions) >= 20
    assert len(topic.answers) >= 2
    assert topic.short
    assert topic.why
    assert topic.example
    assert topic.ordinary
    assert len(topic.reworded) >= 2


@pytest.mark.parametrize("topic", corpus.group("small"), ids=lambda topic: topic.id)
def test_small_talk_has_many_wordings(topic: texts.Topic) -> None:
    assert len(topic.questions) >= 20
    assert topic.answers
    assert len(topic.reworded) >= 3


def test_many_questions_are_outside_the_subject() -> None:
    outside = corpus.topic("outside")
    assert len(set(outside.questions)) >= 300
    assert len({text for combination in outside.combinations for text in combination.all()}) >= 2000


def test_every_follow_up_can_be_asked() -> None:
    assert all(len(corpus.topic(kind).questions) >= 30 for kind in FOLLOW_UPS)


def test_no_phrasing_belongs_to_two_topics() -> None:
    owners = defaultdict(set)
    for topic in corpus.topics:
        for text in topic.questions + topic.held_out:
            owners[plain(text) or text].add(topic.id)
    assert not {text: ids for text, ids in owners.items() if len(ids) > 1}


def test_no_held_out_phrasing_is_trained() -> None:
    held_out = {plain(text) for topic in corpus.topics for text in topic.held_out}
    trained = {plain(text) for topic in corpus.topics for text in topic.questions}
    for topic in corpus.topics:
        trained |= {plain(text) for combination in topic.combinations for text in combination.all()}
    assert not held_out & trained


def test_lessons_hold_nothing_of_the_exam_and_follow_the_seed() -> None:
    held_out = {plain(text) for topic in corpus.topics for text in topic.held_out}
    first, second = Teacher(corpus, seed=3), Teacher(corpus, seed=3)
    lessons = [first.conversation(5) for _ in range(1000)]
    assert lessons == [second.conversation(5) for _ in range(1000)]
    asked = {plain(message["content"]) for lesson in lessons for message in lesson if message["role"] == "user"}
    assert not held_out & asked
    assert len(asked) > 3000


def test_a_line_that_means_nothing_is_refused(tmp_path) -> None:
    (tmp_path / "basics.txt").write_text("@token | a token\nZ: what is this\n")
    with pytest.raises(ValueError, match="topic token begins with 'Z'"):
        texts.load_topics(tmp_path, "basics")
    (tmp_path / "basics.txt").write_text("Q: a question of no topic\n")
    with pytest.raises(ValueError, match="neither a topic nor a part of one"):
        texts.load_topics(tmp_path, "basics")
