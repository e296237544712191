"""Makes conversations for training: questions in many wordings, follow-ups, small talk, and what lies outside.

All chance comes from one seeded generator, so that the same seed gives the same lessons in the same order.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from chatpage.tutor.texts import FOLLOW_UPS, Corpus, Topic, plain

Message = dict[str, str]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Mix:
    """How often the teacher does what, as probabilities."""

    subject: float = 0.64
    outside: float = 0.21
    small: float = 0.14
    follow_up: float = 0.3
    usual_answer: float = 0.75
    default_system: float = 0.55
    no_system: float = 0.25
    combined: float = 0.2
    combined_outside: float = 0.55


class Teacher:
    """Draws conversations from a corpus; none contains a held-out phrasing."""

    def __init__(self, corpus: Corpus, seed: int, mix: Mix | None = None) -> None:
        self.corpus, self.mix, self.rng = corpus, mix or Mix(), random.Random(seed)
        self.subjects = corpus.subjects
        self.outside = corpus.group("outside")
        self.small = corpus.group("small")
        self.follow_ups = [corpus.topic(id) for id in FOLLOW_UPS]
        self.nothing = corpus.topic("nothing")
        self.held_out = {plain(text) for topic in corpus.topics for text in topic.held_out}

    def conversation(self, turns: int) -> list[Message]:
        """A conversation of that many turns, with the page's system prompt, another one or none."""
        return [*self.system(), *self.turns(turns)]

    def system(self) -> list[Message]:
        chance = self.rng.random()
        if chance < self.mix.no_system:
            return []
        own, *others = self.corpus.systems
        text = own if chance < self.mix.no_system + self.mix.default_system else self.rng.choice(others)
        return [{"role": "system", "content": text}]

    def turns(self, count: int) -> Iterator[Message]:
        """User and assistant messages; a follow-up is answered from the topic of the answer before it."""
        topic: Topic | None = None
        said = ""
        for _ in range(count):
            if self.rng.random() < (self.mix.follow_up if topic else 0.03):
                kind = self.rng.choice(self.follow_ups)
                question, said = self.question(kind), self.follow(kind.id, topic, said)
            else:
                asked = self.pick()
                question, said = self.question(asked), self.answer(asked)
                topic = asked if asked.why else None
            yield {"role": "user", "content": question}
            yield {"role": "assistant", "content": said}

    def pick(self) -> Topic:
        """A topic; those with many phrasings come more often."""
        mix = self.mix
        groups = [self.subjects, self.outside, self.small]
        (topics,) = self.rng.choices(groups, [mix.subject, mix.outside, mix.small])
        return self.rng.choices(topics, [len(topic.questions) ** 0.5 for topic in topics])[0]

    def answer(self, topic: Topic) -> str:
        """Mostly the topic's first answer, so that greedy decoding is sure of its way; sometimes another one."""
        first, *others = topic.answers
        return first if not others or self.rng.random() < self.mix.usual_answer else self.rng.choice(others)

    def follow(self, kind: str, topic: Topic | None, said: str) -> str:
        if topic is None:
            return self.answer(self.nothing)
        if kind == "again":
            return next((answer for answer in topic.answers if answer != said), topic.answers[0])
        return {"why": topic.why, "short": topic.short, "example": topic.example}[kind][0]

    def question(self, topic: Topic) -> str:
        """A phrasing for training, varied; held-out phrasings that come out by chance are drawn again."""
        while True:
            text = self.vary(self.phrasing(topic), short=topic.group == "follow")
            if plain(text) not in self.held_out:
                return text

    def phrasing(self, topic: Topic) -> str:
        combined = self.mix.combined_outside if topic.group == "outside" else self.mix.combined
        if topic.combinations and self.rng.random() < combined:
            text = self.rng.choice(topic.combinations).draw(self.rng)
        else:
            text = self.rng.choice(topic.questions)
        return self.other_digits(text) if topic.id == "maths" else text

    def other_digits(self, text: str) -> str:
        return re.sub(r"\d", lambda _: str(self.rng.randrange(10)), text)

    def vary(self, text: str, *, short: bool = False) -> str:
        """The same question in other words, with words before and after it, and with the odd slip of a finger."""
        rng, words = self.rng, self.corpus.words
        for phrase, others in words.swaps:
            if phrase in text and rng.random() < 0.2:
                text = re.sub(rf"\b{re.escape(phrase)}\b", rng.choice(others), text, count=1)
        if not short and rng.random() < 0.18:
            text = f"{rng.choice(words.openers)} {text}"
        if not short and rng.random() < 0.08:
            text = f"{text.rstrip('?')} {rng.choice(words.closers)}".replace(" ,", ",")
        if rng.random() < 0.14:
            text = self.slip(text)
        return self.punctuate(text)

    def slip(self, text: str) -> str:
        """One letter of a longer word left out, doubled, swapped with the next or replaced."""
        rng = self.rng
        places = [match.start() + 1 for match in re.finditer(r"[a-z](?=[a-z]{2,})", text)]
        if not places:
            return text
        at = rng.choice(places)
        before, letter, after = text[:at], text[at], text[at + 1 :]
        return before + rng.choice(
            [after, letter * 2 + after, after[0] + letter + after[1:], rng.choice(LETTERS) + after]
        )

    def punctuate(self, text: str) -> str:
        bare = text.rstrip("?!. ")
        if not bare:
            return text
        return bare + self.rng.choices(["?", "", text[len(bare) :], ".", "!"], [45, 35, 14, 4, 2])[0]
