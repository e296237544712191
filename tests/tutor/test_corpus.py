"""The texts: readable, enough of them, and nothing of the exam in the lessons."""

from collections import defaultdict

import pytest

from chatpage.tutor import examples, texts
from chatpage.tutor.exam import held_out
from chatpage.tutor.judge import Judge, ask_back
from chatpage.tutor.lessons import Mix, Teacher, bare, untold
from chatpage.tutor.texts import FOLLOW_UPS, HANDS, plain

corpus = texts.load()
asked = held_out(corpus)


@pytest.mark.parametrize("topic", corpus.subjects, ids=lambda topic: topic.id)
def test_every_topic_has_a_hundred_phrasings_and_answers_of_each_kind(topic: texts.Topic) -> None:
    assert len({plain(text) for text in topic.questions}) >= 100
    assert set(topic.phrasings) >= set(HANDS) - {"first"}
    assert topic.question.endswith("?")
    assert len(topic.answers) >= 2
    assert all(topic.sentences.values())
    assert all(len(text.split()) <= 60 for sentences in topic.sentences.values() for text in sentences)
    assert 2 <= len(topic.next) <= 3
    assert all(corpus.topics[id].question and id != topic.id for id in topic.next)


@pytest.mark.parametrize("topic", corpus.group("small"), ids=lambda topic: topic.id)
def test_small_talk_has_many_wordings(topic: texts.Topic) -> None:
    assert len(topic.questions) >= 100
    assert topic.answers


def test_many_questions_are_outside_the_subject() -> None:
    outside = corpus.topics["outside"]
    assert len(set(outside.questions)) >= 2000
    assert len({text for combination in outside.combinations for text in combination.all()}) >= 2000


def test_every_follow_up_can_be_asked() -> None:
    assert all(len(corpus.topics[kind].questions) >= 100 for kind in FOLLOW_UPS)
    assert sum("{x}" in text for text in corpus.topics["meaning"].questions) >= 50


def test_no_phrasing_belongs_to_two_topics() -> None:
    owners = defaultdict(set)
    for topic in corpus.topics.values():
        for text in [*topic.questions, *([topic.question] if topic.question else [])]:
            owners[plain(text)].add(topic.id)
    assert not {text: ids for text, ids in owners.items() if len(ids) > 1}


def test_no_question_of_the_exams_is_trained() -> None:
    trained = {plain(text) for topic in corpus.topics.values() for text in topic.questions}
    trained |= {plain(text) for texts in (corpus.ambiguous, corpus.words.last, *corpus.words.places) for text in texts}
    assert len(asked & trained) == 0  # a number, so that a failure does not tell what the final exam asks


def test_ambiguous_messages_name_topics_and_are_no_phrasings() -> None:
    subjects = {topic.id for topic in corpus.subjects}
    phrasings = {text for topic in corpus.topics.values() for text in topic.questions}
    assert len(corpus.ambiguous) >= 300
    for message, ids in corpus.ambiguous.items():
        assert 2 <= len(set(ids)) == len(ids) <= 3
        assert set(ids) <= subjects
        assert message not in phrasings


def test_unsure_phrasings_are_asked_back_with_their_own_topic() -> None:
    owners = {text: topic.id for topic in corpus.subjects for text in topic.questions}
    for text, ids in corpus.unsure.items():
        assert owners[text] in ids
        assert 2 <= len(set(ids)) == len(ids) <= 3
    assert len(corpus.unsure) < 0.6 * len(owners)


def test_a_question_back_says_its_topics_in_order() -> None:
    judge = Judge(corpus.topics.values())
    for topic in corpus.subjects:
        others = [corpus.topics[id] for id in topic.next[:2]]
        assert judge.options(ask_back([topic, *others])) == [topic.id, *(other.id for other in others)]
    assert judge.options("Do you mean it?") == []
    assert judge.options("A block table is a list.") == []
    table, block = corpus.topics["blocktable"], corpus.topics["block"]
    assert ask_back([table, block]) == "Do you mean the block table, or a block?"


def test_the_page_offers_questions_of_topics() -> None:
    assert set(examples()) <= {topic.question for topic in corpus.subjects}


def test_lessons_hold_nothing_of_the_exam_and_follow_the_seed() -> None:
    first, second = Teacher(corpus, seed=3), Teacher(corpus, seed=3)
    lessons = [first.conversation(5) for _ in range(1000)]
    assert lessons == [second.conversation(5) for _ in range(1000)]
    said = {plain(message["content"]) for lesson in lessons for message in lesson if message["role"] == "user"}
    assert len(asked & said) == 0
    assert len(said) > 3000


def test_lessons_ask_back_and_understand_what_is_said_then() -> None:
    judge = Judge(corpus.topics.values())
    mix = Mix(subject=0, outside=0, small=0, ambiguous=1, choice=1, lone_follow_up=0)
    teacher = Teacher(corpus, seed=4, mix=mix)
    for _ in range(300):
        *_, question, asks, choice, answer = teacher.turns(2)
        options = judge.options(asks["content"])
        assert len(options) >= 2, question
        assert judge.nearest(answer["content"]).topic in options, choice


def test_a_follow_up_gets_what_was_not_said_yet() -> None:
    topic = corpus.topics["block"]
    first, second, *_ = topic.answers
    assert untold(topic, "again", [first]) == second
    assert untold(topic, "again", [first, second]) == topic.simple[0]
    assert untold(topic, "more", [first, second]) == topic.example[0]
    assert untold(topic, "why", [first, topic.why[0]]) == topic.example[0]
    assert untold(topic, "short", [topic.short[0]]) == topic.short[0]


def test_names_lose_their_articles() -> None:
    assert [bare(name) for name in ("the block table", "a block", "an idle block", "paged attention")] == [
        "block table",
        "block",
        "idle block",
        "paged attention",
    ]


def test_a_line_that_means_nothing_is_refused(tmp_path) -> None:
    (tmp_path / "basics.txt").write_text("@token | a token\nZ: what is this\n")
    with pytest.raises(ValueError, match="topic token begins with 'Z'"):
        texts.load_group(tmp_path, "basics")
    (tmp_path / "basics.txt").write_text("Q: a question of no topic\n")
    with pytest.raises(ValueError, match="neither a topic nor a part of one"):
        texts.load_group(tmp_path, "basics")
    (tmp_path / "phrasings").mkdir()
    (tmp_path / "phrasings" / "a.txt").write_text("@unknown\nQ: what is this\n")
    with pytest.raises(ValueError, match="neither a known topic nor phrasings"):
        texts.load_phrasings(tmp_path, "a", dict(corpus.topics))
