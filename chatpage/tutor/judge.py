"""Tells which topic of the corpus an answer belongs to. Loads no torch: the page asks it too."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from chatpage.tutor.texts import Topic

NEAR = 0.7
"""How near the nearest sentence must be, by token F1, for an answer to count as it."""
ASKING = "Do you mean "


class Nearest(NamedTuple):
    """The sentence of the corpus that an answer comes nearest to."""

    topic: str
    kind: str
    """answer, why, short, example or simple."""
    text: str
    nearness: float
    """Token F1, 0…1."""


class Judge:
    """Knows all sentences of some topics."""

    def __init__(self, topics: Iterable[Topic]) -> None:
        topics = list(topics)
        self.titles = {topic.names[0]: topic.id for topic in topics if topic.names}
        self.sentences = [
            (topic.id, kind, text, Counter(text.lower().split()))
            for topic in topics
            for kind, texts in topic.sentences.items()
            for text in texts
        ]

    def nearest(self, answer: str) -> Nearest:
        words = Counter(answer.lower().split())
        topic, kind, text, sentence = max(self.sentences, key=lambda known: f1(words, known[3]))
        return Nearest(topic, kind, text, f1(words, sentence))

    def options(self, answer: str) -> list[str]:
        """The topics that an answer asks between, in their order; none if it does not ask back."""
        if not answer.startswith(ASKING):
            return []
        parts = re.split(r", or |, ", answer.removeprefix(ASKING).rstrip("?"))
        return [self.titles[part] for part in parts if part in self.titles]


def ask_back(topics: Iterable[Topic]) -> str:
    """The question which of two or three topics is meant."""
    *others, last = [topic.names[0] for topic in topics]
    return f"{ASKING}{', '.join(others)}, or {last}?"


def f1(a: Counter[str], b: Counter[str]) -> float:
    common = (a & b).total()
    return 2 * common / max(1, a.total() + b.total())
