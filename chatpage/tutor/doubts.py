"""Finds the phrasings that a tutor does not understand from other hands' words: `python -m chatpage.tutor.doubts`.

For each hand a tutor is trained without its phrasings and then asked them. What it answers wrongly is written to
`corpus/unsure.txt`, in place of what the classifier found: lessons ask back there, so that the tutor learns where it
would be wrong. Five trainings: some minutes on a large GPU.
"""

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from chatpage.tutor import texts
from chatpage.tutor.evaluate import Tutor
from chatpage.tutor.judge import Judge
from chatpage.tutor.texts import HANDS, Corpus, Topic
from chatpage.tutor.train import SIZE, SIZES, Plan, train

BEGINNING = 24
"""Tokens of an answer that tell its topic."""


def doubts(corpus: Corpus, plan: Plan, device: torch.device) -> dict[str, list[str]]:
    """The phrasings that a tutor without their hand got wrong, with two or three topics to ask between."""
    judge = Judge(corpus.topics.values())
    topic_of = functools.cache(functools.partial(begun, judge))  # the same answers come again and again
    found: dict[str, list[str]] = {}
    for hand in HANDS:
        with TemporaryDirectory() as folder:
            train(Path(folder), replace(plan, without=hand), device)
            tutor = Tutor(Path(folder))
        asked = [(topic, text) for topic in corpus.subjects for text in topic.phrasings.get(hand, [])]
        answers = tutor.answers([[{"role": "user", "content": text}] for _, text in asked], BEGINNING)
        taken = [topic_of(answer) for answer, _ in answers]
        wrong = {
            text: options(corpus, topic, text, id)
            for (topic, text), id in zip(asked, taken, strict=True)
            if id != topic.id
        }
        print(f"hand {hand}: {len(asked)} phrasings, understood {1 - len(wrong) / len(asked):.0%}", flush=True)
        found |= wrong
    return found


def begun(judge: Judge, beginning: str) -> str:
    """The topic of the sentence that begins so, or of the nearest one."""
    if beginning:
        for topic, _, text, _ in judge.sentences:
            if text.startswith(beginning):
                return topic
    return judge.nearest(beginning).topic


def options(corpus: Corpus, topic: Topic, text: str, taken: str) -> list[str]:
    """What to ask between: what the phrasing was taken for, its own topic, what the classifier named, a neighbour."""
    named = corpus.unsure.get(text, [])
    likely = [taken] if corpus.topics[taken].question else []
    return list(dict.fromkeys([*likely, topic.id, *named, *topic.next]))[: 3 if named else 2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m chatpage.tutor.doubts", description="Find what is not understood.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", choices=list(SIZES), default=SIZE)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = 256 if device.type == "cuda" else 32
    texts.write_unsure(doubts(texts.load(), Plan(given.steps, rows, given.size, asking=0), device))


if __name__ == "__main__":
    main()
