"""Reads the exam: questions by hands that had not seen the training phrasings, in `corpus/exam/`.

A line is a set, what is wanted, and the question:

    ORD topic: question                       ordinary        REW topic: question              reworded on purpose
    FOL topic kind: question                  a follow-up, after a question and the answer of that topic
    DIA topic: message => topic kind: question   a dialogue in which the tutor answers each message itself
    OUT kind: question                        outside the subject                     SMA topic: message    small talk

`development` is for choosing between models, `final` is looked at once, at the end. Loads no torch.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chatpage.tutor.texts import FOLDER, Corpus, Topic, lines, plain

Message = dict[str, str]
EXAMS = ("development", "final")
SETS = {
    "ORD": "ordinary",
    "REW": "reworded",
    "FOL": "follow-up",
    "DIA": "dialogue",
    "OUT": "outside",
    "SMA": "small talk",
}
PART = re.compile(r"(\w+)(?: (\w+))?: (.+)")


@dataclass(frozen=True, slots=True)
class Question:
    """One question of the exam, with what was said before it."""

    set: str
    text: str
    topic: str
    """The right topic; `outside` for all that lies outside."""
    kind: str | None = None
    """Of a follow-up: why, short, again, example, simple, more or meaning."""
    history: list[Message] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    """Messages that the tutor has to answer first."""


def exam(corpus: Corpus, name: str, seed: int = 7) -> list[Question]:
    """The questions of an exam, under the page's system prompt; some ordinary ones once more after another topic.

    Questions that the page itself offers are left out: training must contain them.
    """
    offered = {plain(topic.question) for topic in corpus.subjects}
    rng = random.Random(seed)
    system: list[Message] = [{"role": "system", "content": corpus.systems[0]}]
    questions: list[Question] = []
    for set, parts in entries(FOLDER / "exam" / f"{name}.txt"):
        *before, (topic, kind, asked) = parts
        if plain(asked) in offered:
            continue
        said = turn(corpus.topics[topic]) if set == "FOL" else []
        wanted = "outside" if set == "OUT" else topic
        questions.append(Question(SETS[set], asked, wanted, kind, system + said, [message for *_, message in before]))
        if set == "ORD" and rng.random() < 0.25:
            other = rng.choice([one for one in corpus.subjects if one.id != topic])
            questions.append(Question("switch", asked, topic, None, system + turn(other)))
    return questions


def held_out(corpus: Corpus) -> set[str]:
    """All questions of all exams, in their plain form: no lesson contains one.

    Without those of dialogues, some of which are what everybody says there: "shorter".
    """
    questions = [question for name in EXAMS for question in exam(corpus, name)]
    return {plain(question.text) for question in questions if question.set != "dialogue"}


Part = tuple[str, str | None, str]  # topic, kind, message


def entries(path: Path) -> Iterator[tuple[str, list[Part]]]:
    """Set and parts of each line; ValueError names a line that is not understood, and not what it says."""
    for number, line in enumerate(lines(path), start=1):
        set, _, rest = line.partition(" ")
        parts = [PART.fullmatch(part) for part in rest.split(" => ")]
        if set not in SETS or None in parts:
            raise ValueError(f"{path.name} has an entry that is not understood: number {number}")
        yield set, [(part[1], part[2], part[3]) for part in parts if part]


def turn(topic: Topic) -> list[Message]:
    return [{"role": "user", "content": topic.question}, {"role": "assistant", "content": topic.answers[0]}]
