"""The exam: what it asks, how answers are graded, and that a grade can be bad."""

import json

import pytest

from chatpage.tutor import FACTS_FILE, texts
from chatpage.tutor.card import card, results_file
from chatpage.tutor.evaluate import Examiner, Graded, examine, listing, summary
from chatpage.tutor.exam import Question, entries, exam
from chatpage.tutor.judge import ask_back
from chatpage.tutor.texts import plain

corpus = texts.load()
examiner = Examiner(corpus)
topics = corpus.topics


def grade(question: Question, answer: str, *, ended: bool = True) -> str:
    return examiner.grade(question, answer, ended).grade


def follow_up(kind: str) -> Question:
    said = [
        {"role": "user", "content": "What is a block?"},
        {"role": "assistant", "content": topics["block"].answers[0]},
    ]
    return Question("follow-up", "?", "block", kind, said)


ORDINARY = Question("ordinary", "what's a block, then", "block")
OUTSIDE = Question("outside", "how do i bake a cake", "outside")


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        (ORDINARY, topics["block"].answers[0], "right"),
        (ORDINARY, topics["block"].answers[1], "right"),
        (ORDINARY, topics["block"].answers[0].replace("cache memory", "memory"), "right"),
        (ORDINARY, topics["slot"].answers[0], "wrong"),
        (ORDINARY, topics["hi"].answers[0], "wrong"),
        (ORDINARY, "A block is a house with flats.", "wrong"),
        (ORDINARY, "block block block block block", "wrong"),
        (ORDINARY, "", "wrong"),
        (ORDINARY, ask_back([topics["block"], topics["slot"]]), "asked"),
        (ORDINARY, ask_back([topics["paged"], topics["slot"], topics["cow"]]), "asked"),
        (ORDINARY, "Do you mean what you say?", "wrong"),
        (ORDINARY, topics["outside"].answers[0], "honest"),
        (ORDINARY, topics["unclear"].answers[0], "honest"),
        (OUTSIDE, topics["outside"].answers[1], "right"),
        (OUTSIDE, topics["maths"].answers[0], "right"),
        (OUTSIDE, topics["unclear"].answers[0], "honest"),
        (OUTSIDE, topics["block"].answers[0], "wrong"),
        (OUTSIDE, ask_back([topics["block"], topics["slot"]]), "asked"),
        (follow_up("why"), topics["block"].why[0], "right"),
        (follow_up("why"), topics["block"].example[0], "wrong"),
        (follow_up("why"), topics["slot"].why[0], "wrong"),
        (follow_up("again"), topics["block"].answers[1], "right"),
        (follow_up("again"), topics["block"].simple[0], "right"),
        (follow_up("again"), topics["block"].answers[0], "wrong"),
        (follow_up("simple"), topics["block"].simple[0], "right"),
        (follow_up("simple"), topics["block"].short[0], "wrong"),
        (follow_up("meaning"), topics["block"].simple[0], "right"),
        (follow_up("meaning"), topics["slot"].simple[0], "wrong"),
        (follow_up("example"), topics["nothing"].answers[0], "honest"),
    ],
)
def test_grades(question: Question, answer: str, wanted: str) -> None:
    assert grade(question, answer) == wanted


def test_a_turn_that_does_not_end_is_wrong() -> None:
    assert grade(ORDINARY, topics["block"].answers[0], ended=False) == "wrong"
    assert grade(ORDINARY, ask_back([topics["block"], topics["slot"]]), ended=False) == "wrong"


def test_every_sentence_is_nearest_to_its_own_topic() -> None:
    for topic in corpus.subjects:
        for sentences in topic.sentences.values():
            for text in sentences:
                assert examiner.judge.nearest(text).topic == topic.id


def test_the_summary_counts_grades() -> None:
    answers = [
        topics["block"].answers[0],
        topics["slot"].answers[0],
        ask_back([topics["slot"], topics["block"]]),
        ask_back([topics["slot"], topics["cow"]]),
    ]
    graded = [examiner.grade(ORDINARY, answer, True) for answer in answers]
    assert summary(graded) == {
        "ordinary": {
            "questions": 4,
            "right": 0.25,
            "asked": 0.5,
            "honest": 0,
            "wrong": 0.25,
            "helped": 0.5,
            "ended": 1,
        }
    }
    assert listing(graded).startswith("wrong  ordinary  block → slot\n  what's a block, then\n")


def test_the_development_exam_is_large_and_leaves_out_what_the_page_offers() -> None:
    questions = exam(corpus, "development")
    counts = {set: sum(question.set == set for question in questions) for set in {one.set for one in questions}}
    assert counts["ordinary"] > 250
    assert counts["reworded"] > 180
    assert counts["switch"] > 50
    assert counts["follow-up"] == 60
    assert counts["outside"] == 90
    assert counts["small talk"] == 44
    offered = {plain(topic.question) for topic in corpus.subjects}
    assert not offered & {plain(question.text) for question in questions}
    for question in questions:
        assert question.topic in topics
        assert question.kind in (None, *texts.FOLLOW_UPS)
        assert (question.kind is None) == (question.set != "follow-up")


def test_the_final_exam_can_be_read() -> None:
    questions = exam(corpus, "final")
    assert len(questions) > 500
    assert all(question.topic in topics for question in questions)
    dialogues = [question for question in questions if question.set == "dialogue"]
    assert all(len(question.before) == 2 for question in dialogues)
    assert all(":" not in message for question in dialogues for message in (*question.before, question.text))


def test_a_dialogue_wants_what_its_last_message_is_about(tmp_path) -> None:
    (tmp_path / "final.txt").write_text("DIA block: what is it => slot: and these => slot short: briefly: what?\n")
    parts = [("block", None, "what is it"), ("slot", None, "and these"), ("slot", "short", "briefly: what?")]
    assert list(entries(tmp_path / "final.txt")) == [("DIA", parts)]


def test_a_bad_line_is_named_by_its_number_only(tmp_path) -> None:
    (tmp_path / "final.txt").write_text("ORD block: what is it\nsecret question\n")
    with pytest.raises(ValueError, match=r"^final.txt has an entry that is not understood: number 2$"):
        list(entries(tmp_path / "final.txt"))


class Parrot:
    """Answers the last message in capitals, and remembers the chats."""

    def __init__(self) -> None:
        self.chats: list[list[str]] = []

    def answers(self, chats: list[list[dict[str, str]]]) -> list[tuple[str, bool]]:
        self.chats += [[message["content"] for message in chat] for chat in chats]
        return [(chat[-1]["content"].upper(), True) for chat in chats]


def test_in_a_dialogue_the_tutor_answers_each_message(monkeypatch) -> None:
    dialogue = Question("dialogue", "three", "block", before=["one", "two"])
    monkeypatch.setattr("chatpage.tutor.evaluate.exam", lambda corpus, name: [ORDINARY, dialogue])
    parrot = Parrot()
    graded = examine(parrot, corpus, "development")  # pyright: ignore[reportArgumentType]
    assert parrot.chats == [["one"], ["one", "ONE", "two"], [ORDINARY.text], ["one", "ONE", "two", "TWO", "three"]]
    assert [one.answer for one in graded] == [ORDINARY.text.upper(), "THREE"]


def test_the_card_says_what_the_folder_holds(tmp_path) -> None:
    training = {"size": "large", "steps": 250, "asking": 0.4, "parameters": 3_540_000, "seed": 1, "rows": 4}
    training |= {"seconds": 9, "device": "CPU", "torch": "2", "losses": [3.0, 2.0, 1.5]}
    (tmp_path / FACTS_FILE).write_text(json.dumps({"training": training}))
    config = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "exam," not in card(tmp_path, corpus)
    results = summary([Graded(ORDINARY, "?", "wrong", "hi", [], False)])
    results_file(tmp_path, "development").write_text(json.dumps(results))
    text = card(tmp_path, corpus)
    assert "Llama, 3,540,000 parameters: 4 layers of width 256" in text
    assert "| 100 | 3.000 |\n| 250 | 1.500 |" in text
    assert "| ordinary | 1 | 0% | 0% | 0% | 100% | 0% |" in text
    assert "the development exam, by which" in text
    assert "the final exam" not in text
