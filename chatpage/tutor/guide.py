"""Says what may be asked next: after an answer two or three questions that the tutor answers well. Loads no torch."""

import functools

from chatpage.tutor.judge import NEAR, Judge
from chatpage.tutor.texts import Topic, load_topics

STARTERS = ("kvcache", "paged", "panel")


@functools.cache
def known() -> tuple[dict[str, Topic], Judge]:
    topics = load_topics()
    return topics, Judge(topics.values())


def suggestions(answer: str) -> list[str]:
    """Two or three questions that go on from an answer of the tutor's, each of which it answers well.

    Where it asked which of some things is meant, these are the questions; else good ones to begin with.
    """
    topics, judge = known()
    nearest = judge.nearest(answer)
    next = topics[nearest.topic].next if nearest.nearness > NEAR else []
    return [topics[id].question for id in judge.options(answer) or next or STARTERS]
