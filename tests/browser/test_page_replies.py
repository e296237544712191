"""What the page says of several replies, and of the beams of a search."""

import pytest

from chatpage.conversation import Exchange
from chatpage.schedule.beam import Beam, Finished
from chatpage.schedule.request import Delta, Prompt
from chatpage.web.page_replies import search, together
from tests.browser.fake import Words


def searching(live: list[str], finished: list[str]) -> dict:
    words = Words()
    beams = tuple(Beam((words.add(text),), -float(rank)) for rank, text in enumerate(live, 1))
    ended = tuple(Finished((words.add(text),), -0.125) for text in finished)
    return search(Exchange("?", Prompt((1,)), beams=beams, finished=ended), words)


def test_what_beams_share_is_drawn_once():
    drawn = searching(
        ["A block is a page", "Each token costs two", "A block is a pool", "A blot"], ["A block is a", "A block"]
    )
    assert [(row["score"], row["shared"], row["text"]) for row in drawn["live"]] == [
        ("\u22121.00", "", "A block is a page"),
        ("\u22122.00", "", "Each token costs two"),
        ("\u22123.00", "A block is a ", "pool"),
        ("\u22124.00", "A ", "blot"),
    ]
    assert [(row["shared"], row["text"]) for row in drawn["finished"]] == [("A block is ", "a"), ("A ", "block")]
    assert drawn["finished"][0]["score"] in ("\u22120.12", "\u22120.13")


def test_of_a_long_beam_the_end_is_drawn():
    head = "word " * 100
    live = searching([f"{head}one", f"{head}two"], [])["live"]
    assert live[0]["text"] == "… " + "word " * 39 + "one"
    assert (live[1]["shared"], live[1]["text"]) == ("… " + "word " * 4, "two")
    assert searching(["a" * 300], [])["live"][0]["text"] == "… " + "a" * 200


@pytest.mark.parametrize(
    ("states", "reasons", "together_state", "together_reason"),
    [
        (["queued", "queued"], [None, None], "queued", None),
        (["decode", "prefill"], [None, None], "decode", None),
        (["done", "preempted"], ["stop", None], "preempted", None),
        (["done", "done"], ["abort", "abort"], "done", "abort"),
        (["done", "done"], ["abort", "length"], "done", "stop"),
    ],
)
def test_several_replies_in_one_line(states, reasons, together_state, together_reason):
    deltas = [
        Delta(state, prompt_tokens=9, cached_tokens=cached, completion_tokens=4, finish_reason=reason)
        for state, reason, cached in zip(states, reasons, (5, 9), strict=True)
    ]
    line = together(deltas)
    assert (line.state, line.finish_reason) == (together_state, together_reason)
    assert (line.completion_tokens, line.cached_tokens) == (8, 5)
