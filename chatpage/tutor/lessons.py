"""Makes conversations for training: questions in many wordings, follow-ups, asking back, small talk, what is outside.

All chance comes from one seeded generator, so that the same seed gives the same lessons in the same order.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from chatpage.tutor.exam import Message, held_out
from chatpage.tutor.judge import ask_back
from chatpage.tutor.texts import FOLLOW_UPS, Corpus, Topic, plain

ASKING = 0.4
"""How often a phrasing that other hands' words do not carry is answered by asking back. Below a half, so that the
phrasing itself is still answered, while for an unseen one like it no answer is as likely as asking."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ARTICLES = ("a ", "an ", "the ")
LITTLE_WORDS = {"a", "an", "the", "and", "or", "in", "at", "of", "is", "how", "why", "who", "what", "when", "my"}


@dataclass(frozen=True, slots=True)
class Mix:
    """How often the teacher does what, as probabilities."""

    subject: float = 0.60
    outside: float = 0.20
    small: float = 0.15
    ambiguous: float = 0.05
    asking: float = ASKING
    choice: float = 0.7
    """How often the user then says which is meant."""
    follow_up: float = 0.33
    lone_follow_up: float = 0.03
    """Where there is nothing to follow up on."""
    usual_answer: float = 0.75
    default_system: float = 0.55
    no_system: float = 0.25
    offered: float = 0.05
    combined: float = 0.12
    combined_outside: float = 0.35
    gibberish: float = 0.3


class Teacher:
    """Draws conversations from a corpus; none contains a question of the exams."""

    def __init__(self, corpus: Corpus, seed: int | str, mix: Mix | None = None) -> None:
        self.corpus, self.mix, self.rng = corpus, mix or Mix(), random.Random(seed)
        self.subjects = corpus.subjects
        self.outside = corpus.group("outside")
        self.small = corpus.group("small")
        self.follow_ups = [corpus.topics[kind] for kind in FOLLOW_UPS]
        self.questions = {topic.id: topic.questions for topic in corpus.topics.values()}
        self.ambiguous = list(corpus.ambiguous)
        self.held_out = held_out(corpus)
        self.named = {bare(name).lower(): topic for topic in self.subjects for name in topic.names}
        self.naming = re.compile(rf"\b({'|'.join(sorted(map(re.escape, self.named), key=len, reverse=True))})\b")

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
        """User and assistant messages; what a turn means may depend on the answer before it."""
        topic: Topic | None = None
        options: list[Topic] = []
        told: list[str] = []
        for _ in range(count):
            if options and self.rng.random() < self.mix.choice:
                question, topic, options = *self.choice(options), []
                told = [self.answer(topic)]
            elif self.rng.random() < (self.mix.follow_up if topic else self.mix.lone_follow_up):
                question, topic, said = self.follow(topic, told)
                told = [*told, said]
            else:
                question, topic, options = self.ask()
                told = [ask_back(options) if options else self.answer(topic)]
                topic = None if options or not topic.why else topic
            yield {"role": "user", "content": question}
            yield {"role": "assistant", "content": told[-1]}

    def ask(self) -> tuple[str, Topic, list[Topic]]:
        """A question with its topic, and where it is not clear, the topics to ask between."""
        mix = self.mix
        kinds = [self.subjects, self.outside, self.small, []]
        (topics,) = self.rng.choices(kinds, [mix.subject, mix.outside, mix.small, mix.ambiguous])
        if not topics:
            message = self.rng.choice(self.ambiguous)
            options = self.meant(self.corpus.ambiguous[message])
            return self.unseen(message, short=True), options[0], options
        topic = self.rng.choices(topics, [len(self.questions[topic.id]) ** 0.5 for topic in topics])[0]
        text = self.phrasing(topic)
        unsure = self.corpus.unsure.get(text)
        options = self.meant(unsure) if unsure and self.rng.random() < mix.asking else []
        return self.unseen(text), topic, options

    def meant(self, ids: list[str]) -> list[Topic]:
        return [self.corpus.topics[id] for id in ids]

    def answer(self, topic: Topic) -> str:
        """Mostly the topic's first answer, so that greedy decoding is sure of its way; sometimes another one."""
        first, *others = topic.answers
        return first if not others or self.rng.random() < self.mix.usual_answer else self.rng.choice(others)

    def choice(self, options: list[Topic]) -> tuple[str, Topic]:
        """A short reply to "Do you mean …?", and which of the options it means."""
        rng, words = self.rng, self.corpus.words
        number = rng.randrange(len(options))
        if rng.random() < 0.4:
            places = words.places[number] + (words.last if number == len(options) - 1 else [])
            return self.punctuate(rng.choice(places)), options[number]
        topic = options[number]
        others = {word for other in options if other is not topic for word in content_words(other.names[0])}
        telling = [word for word in content_words(topic.names[0]) if word not in others]
        names = [name.lower() for name in topic.names] + [f"the {word}" for word in telling] + telling
        return self.unseen(rng.choice(words.choices).replace("{x}", rng.choice(names)), short=True), topic

    def follow(self, topic: Topic | None, told: list[str]) -> tuple[str, Topic | None, str]:
        """A follow-up, the topic it leads to, and what is said; without a topic there is nothing to follow up on."""
        kind = self.rng.choice(self.follow_ups)
        text = self.rng.choice(self.questions[kind.id])
        if "{x}" in text:
            names = self.naming.findall(told[-1].lower()) if topic else []
            name = self.rng.choice(names or ["it"])
            text = text.replace("{x}", name)
            meant = self.named.get(name, topic)
            if meant is not topic and meant is not None:
                return self.unseen(text, short=True), meant, meant.answers[0]
        said = self.answer(self.corpus.topics["nothing"]) if topic is None else untold(topic, kind.id, told)
        return self.unseen(text, short=True), topic, said

    def phrasing(self, topic: Topic) -> str:
        """What somebody may say who wants that topic, as it stands in the corpus or by rule."""
        chance, mix = self.rng.random(), self.mix
        combined = mix.combined_outside if topic.group == "outside" else mix.combined
        if topic.question and chance < mix.offered:
            return topic.question
        if topic.combinations and chance < mix.offered + combined:
            text = self.rng.choice(topic.combinations).draw(self.rng)
        elif topic.id == "unclear" and chance < mix.gibberish:
            text = self.gibberish()
        else:
            text = self.rng.choice(self.questions[topic.id])
        return re.sub(r"\d", lambda _: str(self.rng.randrange(10)), text) if topic.id == "maths" else text

    def gibberish(self) -> str:
        """Keys hit at random."""
        words = self.rng.choices([1, 2, 3], [70, 20, 10])[0]
        return " ".join("".join(self.rng.choices(LETTERS, k=self.rng.randint(3, 8))) for _ in range(words))

    def unseen(self, text: str, *, short: bool = False) -> str:
        """The text varied; where a question of the exams comes out by chance, it is varied again."""
        while True:
            varied = self.vary(text, short=short)
            if plain(varied) not in self.held_out:
                return varied

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


def untold(topic: Topic, kind: str, told: list[str]) -> str:
    """What a follow-up of that kind gets: what was not said yet, if there is such."""
    wanted = {
        "why": topic.why + topic.example,
        "short": topic.short,
        "again": topic.answers + topic.simple,
        "example": topic.example + topic.simple,
        "simple": topic.simple + topic.short,
        "more": topic.answers + topic.example + topic.why,
        "meaning": topic.simple + topic.answers,
    }[kind]
    return next((text for text in wanted if text not in told), wanted[0])


def bare(name: str) -> str:
    """The name without its article."""
    return next((name.removeprefix(article) for article in ARTICLES if name.startswith(article)), name)


def content_words(name: str) -> list[str]:
    return [word for word in name.lower().split() if word not in LITTLE_WORDS]
