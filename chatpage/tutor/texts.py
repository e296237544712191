"""Reads the corpus: topics with their answers and phrasings, and the words that vary them.

A topic begins with `@id | name; name`. The lines below it begin with a letter:

    A  answers, the first one is the usual    S  short answer      W  answer to "why?"      E  an example
    Q  phrasings for training                 N  held out, ordinary wording                 H  held out, reworded
    P  patterns with {x}                      X  what the {x} of the patterns before may be

Phrasings, patterns and subjects are separated by ` | `. Lines that begin with `# ` are comments.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
SUBJECT_FILES = ("basics", "memory", "sharing", "scheduling", "page")
FOLLOW_UPS = ("why", "short", "again", "example")


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
    """The name of its file: basics, memory, sharing, scheduling, page, small, outside or follow."""
    names: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    example: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    ordinary: list[str] = field(default_factory=list)
    reworded: list[str] = field(default_factory=list)
    combinations: list[Combination] = field(default_factory=list)

    @property
    def held_out(self) -> list[str]:
        return self.ordinary + self.reworded

    def add(self, kind: str, text: str) -> None:
        """Adds the rest of a line; ValueError where its letter means nothing."""
        sentences = {"A": self.answers, "S": self.short, "W": self.why, "E": self.example}
        phrasings = {"Q": self.questions, "N": self.ordinary, "H": self.reworded}
        if kind in sentences:
            sentences[kind].append(text)
        elif kind in phrasings:
            phrasings[kind].extend(split(text))
        elif kind == "P":
            if not self.combinations or self.combinations[-1].subjects:
                self.combinations.append(Combination())
            self.combinations[-1].patterns.extend(split(text))
        elif kind == "X" and self.combinations:
            self.combinations[-1].subjects.extend(split(text))
        else:
            raise ValueError(f"a line of topic {self.id} begins with {kind!r}, which is none of A S W E Q N H P X")


@dataclass(slots=True)
class Words:
    """How a question can be said in other words: see the head of `corpus/words.txt`."""

    swaps: list[tuple[str, list[str]]] = field(default_factory=list)
    openers: list[str] = field(default_factory=list)
    closers: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Corpus:
    """Everything that the bundled model is taught."""

    topics: list[Topic]
    words: Words
    systems: list[str]
    """System prompts for training; the first one is the page's own."""

    def group(self, *names: str) -> list[Topic]:
        return [topic for topic in self.topics if topic.group in names]

    def topic(self, id: str) -> Topic:
        return next(topic for topic in self.topics if topic.id == id)

    @property
    def subjects(self) -> list[Topic]:
        """The topics that are the model's subject: no small talk, nothing outside, no follow-ups."""
        return self.group(*SUBJECT_FILES)


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(" | ")]


def plain(text: str) -> str:
    """The text without case, outer punctuation and repeated spaces, to tell whether two phrasings are the same."""
    return " ".join(text.lower().split()).strip(" ?!.,:;")


def load(folder: Path = FOLDER) -> Corpus:
    """The corpus of a folder; ValueError where a line is not understood."""
    words = load_words(folder / "words.txt")
    topics = [topic for name in (*SUBJECT_FILES, "small", "outside", "follow") for topic in load_topics(folder, name)]
    for topic in topics:
        if topic.names:
            topic.combinations.append(Combination(words.patterns, topic.names))
    return Corpus(topics, words, systems=list(lines(folder / "systems.txt")))


def load_topics(folder: Path, group: str) -> list[Topic]:
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


def load_words(path: Path) -> Words:
    words = Words()
    for line in lines(path):
        kind, phrases = line[0], split(line[2:])
        if kind == "=":
            words.swaps.append((phrases[0], phrases[1:]))
        else:
            {"<": words.openers, ">": words.closers, "@": words.patterns}[kind].extend(phrases)
    return words


def lines(path: Path) -> Iterator[str]:
    """The lines of a file without comments, empty lines and outer spaces."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("# "):
            yield line.strip()
