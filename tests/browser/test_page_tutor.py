"""What the page offers of the bundled tutor to ask next."""

import asyncio
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from chatpage.conversation import Exchange
from chatpage.schedule.request import Prompt
from chatpage.settings import Settings
from chatpage.tutor.guide import known
from chatpage.tutor.judge import ask_back
from chatpage.web.page import Page
from chatpage.web.page_tutor import options
from tests.browser.fake import FakeEngine

topics, _ = known()
COW = topics["cow"]
NEXT = [topics[id].question for id in COW.next]


def said(answer: str, *asked: str, ended: str | None = "stop") -> Any:
    """A conversation in which this was asked, and this answered last."""
    shown = [Exchange(question, Prompt((1,)), text="?", finish_reason="stop") for question in asked or ("hello",)]
    shown[-1].text, shown[-1].finish_reason = answer, ended
    return SimpleNamespace(shown=shown, busy=ended is None, replies=[])


def offered(conversation: Any) -> list[str]:
    return [option["value"] for option in options(conversation)]


@pytest.mark.parametrize("ended", ["stop", "length", "abort"])
def test_an_answer_is_gone_on_from_also_if_it_was_cut(ended):
    assert offered(said(COW.answers[0], ended=ended)) == NEXT


def test_nothing_is_offered_where_nothing_was_said_or_is_said_yet():
    assert offered(SimpleNamespace(shown=[], busy=False, replies=[])) == []
    assert offered(said("")) == []
    assert offered(said("", ended="abort")) == []
    assert offered(said(COW.answers[0], ended="error")) == []
    assert offered(said(COW.answers[0], ended=None)) == []


def test_nothing_is_offered_before_a_reply_is_chosen():
    conversation = said(COW.answers[0])
    conversation.replies = conversation.shown
    assert offered(conversation) == []


def test_no_question_is_offered_that_was_asked_before():
    assert offered(said(COW.answers[0], f" {NEXT[0].upper()} ", "more")) == NEXT[1:]


def test_where_all_were_asked_others_are_offered():
    asked = [*NEXT, "more"]
    others = offered(said(COW.answers[0], *asked))
    assert len(others) == 2
    assert not {*others} & {*asked, COW.question}
    assert {*others} <= {topics[id].question for before in COW.next for id in topics[before].next}


def test_what_the_tutor_asks_back_is_offered_though_it_was_asked_before():
    question = ask_back([topics["block"], topics["slot"]])
    asked = [topics["block"].question, "and that?"]
    assert offered(said(question, *asked)) == [topics["block"].question, topics["slot"].question]


def test_when_everything_was_asked_nothing_is_offered():
    everything = [topic.question for topic in topics.values() if topic.question]
    assert offered(said(COW.answers[0], *everything)) == []


@pytest.mark.parametrize("value", [7, None, ["What is a block?"], {"text": 7}, {}])
def test_a_click_that_was_made_up_is_refused(value):
    page = Page(FakeEngine(), Settings(model=None))  # pyright: ignore[reportArgumentType]
    event = gr.SelectData(None, {"index": 0, "value": value})
    request: Any = SimpleNamespace(session_hash="tab")

    async def click() -> list[dict[Any, Any]]:
        return [update async for update in page.ask_offered({}, event, request)]

    with pytest.warns(UserWarning, match="This is no question; load the page again"):
        assert asyncio.run(click()) == [{page.status: gr.skip()}]
