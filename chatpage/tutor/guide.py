"""Says what may be asked next: after an answer two or three questions that the tutor answers well. Loads no torch."""

import functools
from collections.abc import Iterable, Iterator

from chatpage.tutor.judge import NEAR, Judge, Nearest
from chatpage.tutor.texts import Topic, load_topics, plain

STARTERS = ("kvcache", "paged", "panel")
FEW = 2


@functools.cache
def known() -> tuple[dict[str, Topic], Judge]:
    topics = load_topics()
    return topics, Judge(topics.values())


def suggestions(answer: str, asked: Iterable[str] = ()) -> list[str]:
    """Two or three questions that go on from an answer of the tutor's, each of which it answers well.

    Where it asked which of some things is meant, these are the questions, whether they were asked before or not; where
    the answer is about nothing that is known, good ones to begin with.

    Args:
        asked: questions that are not to be suggested again. Where that leaves fewer than two, there are others, which
            go on from those, until all were asked.
    """
    topics, judge = known()
    if options := judge.options(answer):
        return [topics[id].question for id in options]
    nearest = _nearest(answer)
    about = topics[nearest.topic] if nearest.nearness > NEAR else None
    own = about.next if about and about.next else STARTERS
    old = {plain(question) for question in (*asked, about.question if about else "")}
    new = [id for id in _onward(own) if plain(topics[id].question) not in old]
    return [topics[id].question for id in new[: max(FEW, len({*own} & {*new}))]]


@functools.lru_cache(maxsize=1024)
def _nearest(answer: str) -> Nearest:
    """It takes some milliseconds, and the page asks again whenever it draws a chat."""
    return known()[1].nearest(answer)


def _onward(ids: Iterable[str]) -> Iterator[str]:
    """These topics, then those that go on from them, and so on."""
    topics, _ = known()
    found = list(ids)
    for id in found:
        yield id
        found += [next for next in topics[id].next if next not in found]
