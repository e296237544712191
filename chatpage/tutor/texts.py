"""Reads the corpus: topics with their answers, what people say when they want one of them, and words that vary it.

A topic begins with `@id | name; name`. The lines below it begin with a letter:

    Q  the question as the page shows it      A  answers, the first one is the usual     S  short answer
    W  answer to "why?"                       E  an example                              M  in simpler words
    T  topics to ask about next               P  patterns with {x}                       X  what their {x} may be

In `phrasings/` lie the questions for training, a file for each of the hands that wrote them: `@id`, and below it `Q:`
lines. `ambiguous.txt` holds messages that several topics would fit, and `unsure.txt` phrasings that were not
understood. Parts of a line are separated by ` | `, and lines that begin with `# ` are comments.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
SUBJECT_FILES = ("basics", "memory", "sharing", "scheduling", "panel", "page")
UNSURE = "unsure.txt"
UNSURE_HEAD = """\
# Phrasings that other hands' words do not carry, with the topics to ask between. Not to be edited: this is written by
# `python -m chatpage.tutor.classifier --write`.
"""
HANDS = ("first", "a", "b", "c", "d")
OTHER_HANDS = ("e", "f", "g")
"""Hands that wrote nothing about the subject: questions outside of it, small talk and follow-ups."""
CLAUSES = ("how", "what", "when", "whether", "which", "who", "why")
FOLLOW_UPS = ("why", "short", "again", "example", "simple", "more", "meaning")


@dataclass(slots=True)
class Combination:
    """Questions by rule: each of the patterns with each of the subjects."""

    patterns: list[str] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)

    def draw(self, rng: random.Random) -> str:
        return rng.choice(self.patterns).replace("{x}", rng.choice(self.subjects))

    def all(self) -> Iterator[str]:
        return (pattern.replace("{x}", subject) for pattern in self.patterns for subject in self.subjects)


@dataclass(slots=True)
class Topic:
    """What may be asked about one thing, and what to say then."""

    id: str
    group: str
    """The name of its file: one of SUBJECT_FILES, small, outside or follow."""
    names: list[str] = field(default_factory=list)
    """The first one is how the topic is called when the tutor asks whether it is meant."""
    question: str = ""
    """As the page shows it; empty for small talk, follow-ups and what is outside."""
    answers: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    example: list[str] = field(default_factory=list)
    simple: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)
    phrasings: dict[str, list[str]] = field(default_factory=dict)
    """Questions for training, by the hand that wrote them."""
    combinations: list[Combination] = field(default_factory=list)

    @property
    def questions(self) -> list[str]:
        return [text for hand in self.phrasings.values() for text in hand]

    @property
    def sentences(self) -> dict[str, list[str]]:
        """What may be said about the topic, by kind; `answer` is what a question gets."""
        kinds = {"answer": self.answers, "why": self.why, "short": self.short, "example": self.example}
        return {**kinds, "simple": self.simple}

    def add(self, kind: str, text: str) -> None:
        """Adds the rest of a line; ValueError where its letter means nothing."""
        sentences = {"A": self.answers, "S": self.short, "W": self.why, "E": self.example, "M": self.simple}
        if kind in sentences:
            sentences[kind].append(text)
        elif kind == "Q" and not self.question:
            self.question = text
        elif kind == "T":
            self.next.extend(split(text))
        elif kind == "P":
            if not self.combinations or self.combinations[-1].subjects:
                self.combinations.append(Combination())
            self.combinations[-1].patterns.extend(split(text))
        elif kind == "X" and self.combinations:
            self.combinations[-1].subjects.extend(split(text))
        else:
            raise ValueError(f"a line of topic {self.id} begins with {kind!r}: only A S W E M T P X, and Q once")


@dataclass(slots=True)
class Words:
    """How a question can be said in other words: see the head of `corpus/words.txt`."""

    swaps: list[tuple[str, list[str]]] = field(default_factory=list)
    openers: list[str] = field(default_factory=list)
    closers: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    places: list[list[str]] = field(default_factory=lambda: [[], [], []])
    """How one says that the first, the second, or the third is meant."""
    last: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Corpus:
    """Everything that the bundled model is taught."""

    topics: dict[str, Topic]
    """By id."""
    words: Words
    systems: list[str]
    """System prompts for training; the first one is the page's own."""
    ambiguous: dict[str, list[str]]
    """Messages that do not tell what is meant, with the topics that may be."""
    unsure: dict[str, list[str]]
    """Phrasings that were not understood from other hands' words, with what they may be taken for."""

    def group(self, *names: str) -> list[Topic]:
        return [topic for topic in self.topics.values() if topic.group in names]

    @property
    def subjects(self) -> list[Topic]:
        """The topics that are the model's subject: no small talk, nothing outside, no follow-ups."""
        return self.group(*SUBJECT_FILES)


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(" | ")]


def plain(text: str) -> str:
    """The text without case, outer punctuation and repeated spaces, to tell whether two phrasings are the same."""
    return " ".join(text.lower().split()).strip(" ?!.,:;") or text


def load(folder: Path = FOLDER) -> Corpus:
    """The corpus of a folder; ValueError where a line is not understood."""
    words = load_words(folder / "words.txt")
    topics = load_topics(folder)
    for topic in topics.values():
        topic.combinations += by_name(topic.names, words.patterns)
    for hand in (*HANDS, *OTHER_HANDS):
        load_phrasings(folder, hand, topics)
    ambiguous, unsure = (load_messages(folder / name) for name in ("ambiguous.txt", UNSURE))
    return Corpus(topics, words, list(lines(folder / "systems.txt")), ambiguous, unsure)


def by_name(names: list[str], patterns: list[str]) -> list[Combination]:
    """Questions for a thing by its names; a name that is half a sentence, "how a token is found", stands alone."""
    clauses = [name for name in names if name.split()[0] in CLAUSES]
    things = [name for name in names if name not in clauses]
    rules = [Combination(patterns, things), Combination(["{x}"], clauses)]
    return [rule for rule in rules if rule.subjects]


def load_topics(folder: Path = FOLDER) -> dict[str, Topic]:
    """The topics with their answers, without phrasings."""
    groups = (*SUBJECT_FILES, "small", "outside", "follow")
    return {topic.id: topic for group in groups for topic in load_group(folder, group)}


def load_group(folder: Path, group: str) -> list[Topic]:
    topics: list[Topic] = []
    for line in lines(folder / f"{group}.txt"):
        if line.startswith("@"):
            id, _, names = line[1:].partition("|")
            topics.append(Topic(id.strip(), group, names=[name.strip() for name in names.split(";") if name.strip()]))
        elif topics and line[1:3] == ": ":
            topics[-1].add(line[0], line[3:].strip())
        else:
            raise ValueError(f"{group}.txt has a line that is neither a topic nor a part of one: {line!r}")
    return topics


def load_phrasings(folder: Path, hand: str, topics: dict[str, Topic]) -> None:
    """Adds the questions of one hand to the topics."""
    topic: Topic | None = None
    for line in lines(folder / "phrasings" / f"{hand}.txt"):
        if line.startswith("@") and line[1:] in topics:
            topic = topics[line[1:]]
        elif topic and line.startswith("Q: "):
            topic.phrasings.setdefault(hand, []).extend(split(line[3:]))
        else:
            raise ValueError(f"phrasings/{hand}.txt has a line that is neither a known topic nor phrasings: {line!r}")


def load_messages(path: Path) -> dict[str, list[str]]:
    messages: dict[str, list[str]] = {}
    for line in lines(path):
        message, _, ids = line.rpartition(" => ")
        messages[message] = [id.strip() for id in ids.split(",")]
    return messages


def write_unsure(messages: dict[str, list[str]], folder: Path = FOLDER) -> None:
    lines = [f"{message} => {', '.join(ids)}\n" for message, ids in messages.items()]
    (folder / UNSURE).write_text(UNSURE_HEAD + "".join(lines), encoding="utf-8")


def load_words(path: Path) -> Words:
    words = Words()
    for line in lines(path):
        kind, phrases = line[0], split(line[2:])
        if kind == "=":
            words.swaps.append((phrases[0], phrases[1:]))
        elif kind in "123":
            words.places[int(kind) - 1].extend(phrases)
        else:
            plain_lists = {"<": words.openers, ">": words.closers, "@": words.patterns}
            {**plain_lists, "0": words.last, "*": words.choices}[kind].extend(phrases)
    return words


def lines(path: Path) -> Iterator[str]:
    """The lines of a file without comments, empty lines and outer spaces."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("# "):
            yield line.strip()
