"""The bundled tutor in the page: it is called what it is, and after each answer it says what may be asked next."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from chatpage import tutor
from chatpage.settings import Settings
from chatpage.tutor.guide import known
from chatpage.web.page import mount_page
from tests.browser.conftest import Site, Visitor, served, wait_until
from tests.browser.fake import FakeEngine
from tests.browser.test_branches import edit, press, questions, retry
from tests.browser.test_chats import fork, load_again, show

QUESTION, OTHER = "What is copy-on-write?", "What is a block table?"
REAL_MODEL = "To load a real model: python app.py --model PATH-OR-HUB-ID"
topics, judge = known()
answers = {topic.question: topic.answers[0] for topic in topics.values() if topic.question}


def next_of(question: str) -> list[str]:
    """What goes on from the answer to this question where nothing else was asked."""
    return tutor.suggestions(answers[question])


def group(visitor: Visitor) -> Locator:
    return visitor.page.get_by_role("group", name="Ask next")


def offered(visitor: Visitor) -> list[str]:
    """The suggested questions, once they are there."""
    group(visitor).wait_for()
    return group(visitor).get_by_role("button").all_inner_texts()


def follow(visitor: Visitor, question: str) -> str:
    """Click a suggested question, and wait for the end of its answer."""
    return visitor.answered(group(visitor).get_by_role("button", name=question, exact=True).click)


# -- the tutor itself --------------------------------------------------------------------------------------------------


def test_what_is_suggested_is_answered_well_and_gone_on_from(site: Site, arrive):
    visitor = arrive()
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("spinbutton", name="Temperature").fill("0")
    visitor.ask(QUESTION)
    for _ in range(3):
        new = offered(visitor)
        assert 2 <= len(new) <= 3
        assert not {*new} & {*questions(visitor)}
        answer = follow(visitor, new[-1])
        assert questions(visitor)[-1] == new[-1]
        assert topics[judge.nearest(answer).topic].question == new[-1]
    assert offered(visitor)
    assert site.own(visitor)["state"] == "resting"


def test_the_examples_are_the_tutors_own(site: Site, arrive):
    visitor = arrive()
    examples = visitor.page.locator("#chat .example").all_inner_texts()
    assert 4 <= len(examples) <= 8
    assert examples == tutor.examples()[: len(examples)]


# -- the page, with an engine that says what the tutor should ----------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(reply=lambda text: answers.get(text, "No idea."))


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with served(mount_page(application(), engine, Settings(model=None))) as url:
        yield url


@pytest.fixture
def speak_slowly(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "delay", 0.1)


def application() -> Starlette:
    panel = Response("export function mount() {}", media_type="text/javascript")
    return Starlette(routes=[Route("/panel/panel.js", lambda request: panel)])


def test_the_page_says_that_a_small_model_answers_and_how_to_load_a_real_one(url, visit):
    page = visit(url).page
    page.locator("#header").get_by_text("the bundled tutor, a small demo model that knows one subject · cpu").wait_for()
    page.get_by_role("heading", name="Ask the tutor").wait_for()
    assert page.get_by_text(REAL_MODEL).is_visible()


def test_another_model_is_no_tutor(visit):
    engine = FakeEngine(reply=lambda text: answers[QUESTION])
    with served(mount_page(application(), engine, Settings(model="some/model"))) as url:
        visitor = visit(url)
        visitor.page.locator("#header").get_by_text("fake-model · cpu").wait_for()
        assert not {*visitor.page.locator("#chat .example").all_inner_texts()} & {*answers}
        visitor.ask(QUESTION)
        visitor.page.get_by_role("button", name="Retry").wait_for()
        assert visitor.page.locator("#chat .options").count() == 0
        assert visitor.page.locator("body").get_by_text(re.compile("real model|tutor")).count() == 0
        visitor.page.close()


def test_nothing_is_suggested_while_an_answer_is_written(url, visit, speak_slowly):
    visitor = visit(url)
    visitor.send(QUESTION)
    visitor.page.get_by_test_id("bot").wait_for()
    for _ in range(5):
        assert group(visitor).count() == 0
        visitor.page.wait_for_timeout(100)
    assert visitor.page.locator("#message .stop-button").is_visible()
    visitor.page.locator("#message .stop-button").click()
    visitor.wait_idle()
    assert offered(visitor), "what was stopped can be gone on from"
    visitor.answered(group(visitor).get_by_role("button").first.click)
    assert visitor.page.get_by_test_id("bot").count() == 2


def test_they_follow_what_is_shown(url, visit):
    visitor = visit(url)
    visitor.ask(QUESTION)
    assert offered(visitor) == next_of(QUESTION)
    edit(visitor, OTHER)
    assert offered(visitor) == next_of(OTHER)
    press(visitor, "Previous branch", "Branches at question 1: 1 of 2")
    assert offered(visitor) == next_of(QUESTION)
    load_again(visitor)
    assert offered(visitor) == next_of(QUESTION)
    retry(visitor)
    assert offered(visitor) == next_of(QUESTION)
    chosen = next_of(QUESTION)[0]
    follow(visitor, chosen)
    assert offered(visitor) == tutor.suggestions(answers[chosen], [QUESTION, chosen])
    fork(visitor, 1)
    assert offered(visitor) == next_of(QUESTION)
    visitor.page.get_by_role("button", name="New chat").click()
    group(visitor).wait_for(state="detached")
    assert visitor.page.locator("#chat .example").first.is_visible()
    show(visitor, 1)
    assert offered(visitor) == tutor.suggestions(answers[chosen], [QUESTION, chosen])


def test_of_several_replies_the_chosen_one_is_gone_on_from(url, visit):
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name="2 replies").check()
    visitor.ask(QUESTION)
    use = visitor.page.get_by_role("button", name="Use this one: reply 2")
    use.wait_for()
    assert group(visitor).count() == 0
    use.click()
    assert offered(visitor) == next_of(QUESTION)
    follow(visitor, next_of(QUESTION)[1])
    assert visitor.page.get_by_role("group", name=re.compile("^Reply . of 2$")).count() == 2, "the settings hold"
    assert group(visitor).count() == 0


def test_by_keyboard(url, visit):
    visitor = visit(url)
    visitor.ask(QUESTION)
    first, second, *_ = offered(visitor)
    group(visitor).get_by_role("button", name=first).focus()
    visitor.page.keyboard.press("Tab")
    visitor.answered(lambda: visitor.page.keyboard.press("Enter"))
    assert questions(visitor) == [QUESTION, second]
    assert visitor.page.locator("#message textarea").evaluate("box => box === document.activeElement")


def test_on_a_phone_they_wrap_and_are_in_view(url, visit):
    visitor = visit(url, own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    visitor.ask(OTHER)
    visitor.answered(group(visitor).get_by_role("button").first.tap)
    buttons = group(visitor).get_by_role("button")
    chat = visitor.page.locator("#chat").bounding_box()
    end = chat["y"] + chat["height"]
    wait_until(lambda: buttons.last.bounding_box()["y"] + buttons.last.bounding_box()["height"] <= end)
    for button in buttons.all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert box["x"] + box["width"] <= chat["x"] + chat["width"]
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
