"""A cheap reader of questions: logistic regression on words and parts of words, `python -m chatpage.tutor.classifier`.

It serves the texts, not the page. Trained without one hand and asked about that hand's phrasings, it tells which of
them other hands' words do not carry: those are mislabelled, or not clear, and lessons ask back there. As a program it
prints how far the hands understand each other, and the phrasings that it is sure belong to another topic; with
`--write` it writes `corpus/unsure.txt`.
"""

import argparse
import functools
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from chatpage.tutor import texts
from chatpage.tutor.exam import exam
from chatpage.tutor.texts import HANDS, UNSURE, Corpus, Topic, plain

BUCKETS = 1 << 16
EPOCHS = 8
BATCH = 256
LEARNING_RATE = 0.3
SURE = 0.5
"""A guess that is surer than this and names another topic is worth a look."""
UNSURE_BELOW = 0.25
"""A right guess is not worth much where it is less sure than this."""
THIRD = 0.08
"""The third likeliest topic is worth asking about from this chance on."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What the classifier makes of a text: topics by probability, the likeliest first."""

    topics: list[str]
    chances: list[float]

    @property
    def topic(self) -> str:
        return self.topics[0]

    @property
    def sureness(self) -> float:
        return self.chances[0]


class Classifier:
    """Multinomial logistic regression on hashed features; a topic's weights are a column of the table."""

    def __init__(self, examples: Sequence[tuple[str, str]], seed: int = 0) -> None:
        """Trains on pairs of text and topic."""
        self.topics = sorted({topic for _, topic in examples})
        self.table = torch.nn.EmbeddingBag(BUCKETS, len(self.topics), mode="sum", sparse=True)
        torch.nn.init.zeros_(self.table.weight)
        numbers = {topic: number for number, topic in enumerate(self.topics)}
        wanted = torch.tensor([numbers[topic] for _, topic in examples])
        found = [features(text) for text, _ in examples]
        adagrad = torch.optim.Adagrad(self.table.parameters(), lr=LEARNING_RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(found), generator=generator).split(BATCH):
                loss = F.cross_entropy(self.scores([found[i] for i in chosen]), wanted[chosen], label_smoothing=0.1)
                adagrad.zero_grad()
                loss.backward()
                adagrad.step()

    def scores(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """float [texts, topics]: each text's features, weighted so that a long text counts as much as a short one."""
        sizes = torch.tensor([len(one) for one in found])
        weights = torch.repeat_interleave(sizes.float().rsqrt(), sizes)
        return self.table(torch.cat(list(found)), sizes.cumsum(0) - sizes, per_sample_weights=weights)

    @torch.no_grad()
    def guesses(self, questions: Sequence[str], best: int = 5) -> list[Guess]:
        if not questions:
            return []
        chances, places = self.scores([features(text) for text in questions]).softmax(-1).topk(best)
        return [
            Guess([self.topics[place] for place in row], chance)
            for row, chance in zip(places.tolist(), chances.tolist(), strict=True)
        ]


@functools.cache
def features(text: str) -> torch.Tensor:
    """The buckets of a text's words, pairs of words, and parts of words of three to five letters."""
    words = ["<", *plain(text).replace(",", " ").replace(".", " ").split(), ">"]
    parts = {f"{one} {other}" for one, other in itertools.pairwise(words)}
    for word in words[1:-1]:
        framed = f"<{word}>"
        parts.add(word)
        parts |= {framed[at : at + size] for size in (3, 4, 5) for at in range(len(framed) - size + 1)}
    return torch.tensor([zlib.crc32(part.encode()) % BUCKETS for part in sorted(parts)])


def examples(corpus: Corpus, hands: Iterable[str]) -> list[tuple[str, str]]:
    """What those hands wrote, with the topics; each topic's own question goes with every choice of hands."""
    own = [(topic.question, topic.id) for topic in corpus.subjects]
    return own + [
        (text, topic.id) for topic in corpus.topics.values() for hand in hands for text in topic.phrasings.get(hand, [])
    ]


def out_of_fold(corpus: Corpus) -> dict[str, Guess]:
    """For each phrasing of a subject what a classifier makes of it that was trained on the other hands."""
    found: dict[str, Guess] = {}
    for hand in HANDS:
        classifier = Classifier(examples(corpus, [other for other in HANDS if other != hand]))
        asked = [text for topic in corpus.subjects for text in topic.phrasings.get(hand, [])]
        found.update(zip(asked, classifier.guesses(asked), strict=True))
    return found


def unsure(corpus: Corpus, guesses: dict[str, Guess]) -> dict[str, list[str]]:
    """The phrasings that were taken for another topic or hardly for their own, with two or three to ask between."""
    subjects = {topic.id for topic in corpus.subjects}
    found: dict[str, list[str]] = {}
    for topic, text, guess in judged(corpus, guesses):
        if guess.topic == topic.id and guess.sureness >= UNSURE_BELOW:
            continue
        likely = [id for id, chance in zip(guess.topics, guess.chances, strict=True) if id in subjects]
        worth = 3 if len(likely) > 2 and guess.chances[2] > THIRD else 2
        options = likely[:worth] if topic.id in likely[:worth] else [*likely[: worth - 1], topic.id]
        if len(options) > 1:
            found[text] = options
    return found


def judged(corpus: Corpus, guesses: dict[str, Guess]) -> Iterator[tuple[Topic, str, Guess]]:
    """Every phrasing of a subject, with its topic and what it was taken for."""
    for topic in corpus.subjects:
        for text in topic.questions:
            yield topic, text, guesses[text]


def report(corpus: Corpus, guesses: dict[str, Guess]) -> Iterator[str]:
    """How far the hands understand each other, by topic and by hand; first what they surely take for another topic."""
    for topic, text, guess in judged(corpus, guesses):
        if guess.topic != topic.id and guess.sureness > SURE:
            yield f"{topic.id}: {text} => {guess.topic} ({guess.sureness:.2f})"
    parts = {topic.id: topic.questions for topic in corpus.subjects}
    owners = {text: topic.id for topic in corpus.subjects for text in topic.questions}
    for hand in HANDS:
        parts[f"hand {hand}"] = [text for topic in corpus.subjects for text in topic.phrasings.get(hand, [])]
    for name, asked in parts.items():
        right = sum(guesses[text].topic == owners[text] for text in asked)
        yield f"{name:14} {len(asked):5} phrasings, understood {right / len(asked):4.0%}"


def examined(corpus: Corpus) -> Iterator[str]:
    """What a classifier that was trained on all hands makes of the development exam."""
    classifier = Classifier(examples(corpus, HANDS))
    questions = exam(corpus, "development")
    for set in ("ordinary", "reworded", "outside", "small talk"):
        asked = [question for question in questions if question.set == set]
        guesses = classifier.guesses([question.text for question in asked])
        wanted = [("outside", "maths") if set == "outside" else (question.topic,) for question in asked]
        right = sum(guess.topic in topics for guess, topics in zip(guesses, wanted, strict=True))
        yield f"exam {set:10} {len(asked):4} questions, understood {right / len(asked):4.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chatpage.tutor.classifier", description="Examine the phrasings.")
    parser.add_argument("--write", action="store_true", help=f"write corpus/{UNSURE}")
    given = parser.parse_args()
    corpus = texts.load()
    guesses = out_of_fold(corpus)
    for line in (*report(corpus, guesses), *examined(corpus)):
        print(line)
    if given.write:
        texts.write_unsure(unsure(corpus, guesses))


if __name__ == "__main__":
    main()
