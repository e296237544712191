"""The page by itself, with an engine that pretends: what it shows, and that a refusal loses nothing."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatpage.errors import Busy
from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams
from chatpage.settings import Settings
from chatpage.web import visitors
from chatpage.web.page import mount_page
from chatpage.web.visitors import Visitors
from tests.browser.conftest import Visitor, served, wait_until
from tests.browser.fake import SYSTEM, FakeEngine, System, echo

PANEL = """
export function mount(element) {
    window.addEventListener('chatpage:viewer', () => { element.textContent = 'I am ' + window.chatpageViewer.session })
}
"""


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[str, FakeEngine]]:
    """The page with a pretending engine; a test may change what the engine does."""
    engine = FakeEngine()
    app = Starlette(routes=[Route("/panel/panel.js", _panel)])
    with served(mount_page(app, engine, Settings(model=None))) as url:
        yield url, engine


async def _panel(request: Request) -> Response:
    return Response(PANEL, media_type="text/javascript")


@pytest.fixture
def url(site) -> str:
    return site[0]


@pytest.fixture
def engine(site) -> Iterator[FakeEngine]:
    """The engine, as it was before once the test is over."""
    engine = site[1]
    before = dict(vars(engine))
    yield engine
    vars(engine).update(before)


def test_an_answer_streams_and_its_end_is_told(url, engine, visit):
    engine.delay = 0.08
    visitor = visit(url)
    visitor.send("hello")
    visitor.page.get_by_test_id("bot").wait_for()
    some = visitor.answer()
    assert "Generating" in visitor.status()
    wait_until(lambda: len(visitor.answer()) > len(some))
    visitor.wait_idle()
    assert visitor.answer() == echo("hello").strip()
    assert "83 of" in visitor.status()
    assert "prompt tokens from shared blocks" in visitor.status()
    assert "tokens/s" in visitor.status()


def test_the_page_tells_what_answers_here_and_the_panel_who_looks(url, visit):
    page = visit(url).page
    page.get_by_text(
        "knows one subject · cpu, float32 · block size 16 · equal text is shared by all sessions"
    ).wait_for()
    page.get_by_text("I am ").wait_for()


def test_while_the_engine_loads_nothing_is_lost(url, engine, visit):
    engine.status, engine.detail = "starting", "Loading the bundled model"
    visitor = visit(url, ready=False)
    visitor.page.locator("#status").get_by_text("Loading the bundled model").wait_for()
    visitor.send("hello")
    visitor.page.locator(".toast-body").wait_for()
    assert "Loading the bundled model" in visitor.toast()
    assert visitor.page.locator("#message textarea").input_value() == "hello"
    engine.status, engine.detail = "ready", "Ready"
    visitor.page.locator("#status").get_by_text("Ready").wait_for()
    assert visitor.ask("hello") == echo("hello").strip()


def test_a_failed_engine_is_one_sentence(url, engine, visit):
    engine.status, engine.detail = "failed", "--model is '/nowhere'; there is no such folder."
    visitor = visit(url, ready=False)
    visitor.page.locator("#status").get_by_text("--model is '/nowhere'; there is no such folder.").wait_for()


def test_a_refusal_is_said_and_the_text_stays(url, engine, visit):
    engine.refuse = Busy("320 requests are running or waiting, and 320 is the most; try again.")
    visitor = visit(url)
    visitor.send("a long thought")
    visitor.page.locator(".toast-body").wait_for()
    assert "320 requests are running or waiting" in visitor.toast()
    assert visitor.page.locator("#message textarea").input_value() == "a long thought"
    engine.refuse = None
    visitor.page.locator("#message textarea").press("Enter")
    visitor.page.get_by_test_id("bot").wait_for()


def test_wrong_settings_are_refused_by_name(url, visit):
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("Max tokens").fill("0")
    visitor.send("hello")
    visitor.page.locator(".toast-body").wait_for()
    assert "max_tokens is 0; it must be a whole number from 1" in visitor.toast()


def test_an_empty_message_is_ignored(url, engine, visit):
    visitor = visit(url)
    visitor.page.wait_for_timeout(500)
    # Gradio loses an event that is asked for just when the stream of the one before ends, by itself or broken off.
    ended: list[str] = []
    for event in ("requestfailed", "requestfinished"):
        visitor.page.on(event, lambda request: ended.append(request.url))
    visitor.send("   ")
    wait_until(lambda: visitor.page.wait_for_timeout(20) or any("/queue/data" in url for url in ended))
    visitor.ask("hello")
    assert visitor.page.get_by_test_id("user").count() == 1


def test_one_answer_at_a_time(url, engine, visit):
    engine.delay = 0.1
    visitor = visit(url)
    visitor.send("first")
    visitor.page.get_by_test_id("bot").wait_for()
    visitor.send("second")
    visitor.page.locator(".toast-body").wait_for()
    assert "The last answer is still being written; stop it first." in visitor.toast()
    assert visitor.page.locator("#message textarea").input_value() == "second"


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop(how, url, engine, visit):
    engine.delay = 0.1
    visitor = visit(url)
    visitor.send("hello")
    visitor.page.get_by_test_id("bot").wait_for()
    if how == "button":
        visitor.page.locator("#message .stop-button").click()
    else:
        visitor.page.keyboard.press("Escape")
    visitor.wait_idle()
    assert visitor.status().startswith("Stopped · ")
    assert len(visitor.answer()) < len(echo("hello"))
    assert visitor.page.locator("[data-testid=status-tracker]").get_by_text("Error").count() == 0
    engine.delay = 0.01
    visitor.ask("and now")
    assert visitor.page.get_by_test_id("bot").count() == 2


def test_shift_enter_starts_a_line(url, engine, visit):
    visitor = visit(url)
    visitor.write("one")
    visitor.page.locator("#message textarea").press("Shift+Enter")
    visitor.page.keyboard.type("two")
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_test_id("user").wait_for()
    assert visitor.page.get_by_test_id("user").inner_text().split() == ["one", "two"]


def test_edit_and_retry(url, engine, visit):
    engine.delay = 0.02
    visitor = visit(url)
    visitor.ask("one <b>bold</b> word")
    visitor.ask("two")
    visitor.answered(visitor.page.get_by_role("button", name="Retry").click)
    assert visitor.page.get_by_test_id("user").count() == 2
    visitor.page.get_by_role("button", name="Edit").first.click()
    editor = visitor.page.locator("#chat textarea")
    editor.fill(editor.input_value() + " more")
    answer = visitor.answered(visitor.page.get_by_role("button", name="Submit").click)
    assert answer.startswith("You said: one <b>bold</b> word more")
    assert visitor.page.get_by_test_id("user").all_inner_texts() == ["one <b>bold</b> word more"]


def test_a_tab_that_comes_back_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch):
    """A connection that was lost looks like a closed tab; a page that is loaded again comes with another key."""
    engine = FakeEngine()
    tabs = Visitors(engine)
    tab = tabs.open("tab", None)
    tabs.leave("tab")
    assert not engine.sessions
    assert tabs.peek("tab") is None
    assert tabs.find("tab") is tab
    assert len(engine.sessions) == 1
    assert tabs.come_back("other", tab.secret) is None, "it is open"
    tabs.leave("tab")
    assert tabs.come_back("other", "a guess") is None
    assert tabs.come_back("other", tab.secret) is tab
    assert tabs.find("tab") is None
    monkeypatch.setattr(visitors, "KEEP_TEXT", 0)
    tabs.leave("other")
    assert tabs.come_back("third", tab.secret) is None


def test_an_example_is_asked(url, visit):
    visitor = visit(url)
    visitor.page.get_by_text("What is a block table?").click()
    visitor.page.get_by_text("You said: What is a block table?").wait_for()


def test_settings_reach_the_engine(url, engine, visit):
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("Seed").fill("7")
    visitor.page.get_by_label("Max tokens").fill("40")
    visitor.ask("hello")
    assert (engine.asked[-1].params.seed, engine.asked[-1].params.max_tokens) == (7, 40)
    visitor.page.get_by_role("button", name="Reset", exact=True).click()
    wait_until(lambda: visitor.page.get_by_label("Seed").input_value() == "")
    visitor.ask("hello")
    assert (engine.asked[-1].params.seed, engine.asked[-1].params.max_tokens) == (None, None)


def settings(visitor: Visitor, mode: str = "Draw") -> Any:
    """Open the settings, of which those of this mode are there."""
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name=mode, exact=True).check()
    visitor.page.get_by_label("Seed" if mode == "Draw" else "Beam width").wait_for()
    return visitor.page


def test_a_mode_has_its_settings_and_no_others(url, engine, visit):
    visitor = visit(url)
    page = settings(visitor, "Beam search")
    for name in ("Temperature", "Top-p", "Top-k", "Seed", "Replies"):
        assert page.get_by_label(name).count() == 0
    page.get_by_label("Beam width").fill("3")
    page.get_by_label("Length penalty").fill("-0.5")
    page.get_by_label("Early stopping").click()
    page.get_by_role("option", name="When no live one could become better").click()
    visitor.ask("hello")
    assert engine.asked[-1].beams == Beams(3, -0.5, "never")
    assert engine.asked[-1].params == SamplingParams(temperature=0)
    page.get_by_role("button", name="Reset", exact=True).click()
    page.get_by_label("Seed").wait_for()
    assert page.get_by_label("Beam width").count() == 0
    visitor.ask("hello")
    assert engine.asked[-1].beams is None
    assert engine.asked[-1].params.temperature == 0.7
    page.get_by_role("radio", name="Beam search", exact=True).check()
    page.get_by_label("Beam width").wait_for()
    visitor.ask("hello")
    assert engine.asked[-1].beams == Beams(4, 1.0, False)


@pytest.mark.parametrize(
    ("label", "value", "refusal"),
    [
        ("Beam width", "9", "Beam width is 9; it must be a whole number from 2 to 8."),
        ("Beam width", "1", "Beam width is 1; it must be a whole number from 2 to 8."),
        ("Beam width", "2.5", "Beam width is 2.5; it must be a whole number from 2 to 8."),
        ("Beam width", "", "Beam width is ''; it must be a whole number from 2 to 8."),
        ("Length penalty", "-5.1", "Length penalty is -5.1; it must be a number from -5 to 5."),
        ("Max tokens", "many", "max_tokens is 'many'; it must be a whole number."),
    ],
)
def test_wrong_settings_of_a_search_are_refused_by_name(label, value, refusal, url, visit):
    visitor = visit(url)
    page = settings(visitor, "Beam search")
    page.get_by_label(label).fill(value)
    visitor.send("a long thought")
    page.get_by_text(refusal).wait_for()
    assert page.locator("#message textarea").input_value() == "a long thought"
    assert page.get_by_test_id("user").count() == 0


def test_several_replies_must_be_able_to_differ(url, visit):
    visitor = visit(url)
    page = settings(visitor)
    page.get_by_role("radio", name="3 replies").check()
    page.get_by_role("spinbutton", name="Temperature").fill("0")
    visitor.send("a long thought")
    page.get_by_text("Replies is 3, and Temperature is 0: all of them would be the same.").wait_for()
    assert page.locator("#message textarea").input_value() == "a long thought"


def test_replies_reach_the_engine_and_one_is_kept(url, engine, visit):
    visitor = visit(url)
    page = settings(visitor)
    page.get_by_role("radio", name="3 replies").check()
    visitor.ask("hello")
    assert page.get_by_role("group", name=re.compile("^Reply . of 3$")).count() == 3
    page.get_by_role("button", name="Use this one: reply 2").click()
    page.get_by_role("group", name="Branches at answer 1: 2 of 3").wait_for()
    assert engine.kept[-1] == 1
    page.get_by_role("button", name="Reset", exact=True).click()
    wait_until(page.get_by_role("radio", name="1 reply").is_checked)
    visitor.ask("hello")
    assert page.get_by_role("group", name=re.compile("^Reply")).count() == 0


def test_a_toast_says_what_was_typed_as_text(url, visit):
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("Max tokens").fill("<b>5</b> & more")
    visitor.send("hello")
    visitor.page.locator(".toast-body").wait_for()
    assert "max_tokens is '<b>5</b> & more'; it must be a whole number." in visitor.toast()


def test_a_new_chat_may_have_another_system_prompt(url, engine, visit):
    engine.systems = [System("default", SYSTEM, (1, 2)), System("pirate", "You are a pirate.", (1, 3))]
    visitor = visit(url)
    visitor.ask("hello")
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("System prompt", exact=True).click()
    visitor.page.get_by_role("option", name="pirate, shared").click()
    visitor.page.get_by_role("button", name="New chat").click()
    visitor.page.get_by_test_id("user").wait_for(state="detached")
    visitor.ask("hello")
    visitor.page.get_by_label("System prompt", exact=True).click()
    visitor.page.get_by_role("option", name="Custom text").click()
    visitor.page.get_by_label("Text of the system prompt").fill("You are a cook.")
    visitor.ask("goes on as a pirate")
    visitor.page.get_by_role("button", name="New chat").click()
    visitor.page.get_by_test_id("user").first.wait_for(state="detached")
    visitor.ask("hello")
    assert engine.prompts[-4:] == [None, "You are a pirate.", "You are a pirate.", "You are a cook."]


def test_a_new_chat_ends_the_running_answer(url, engine, visit):
    engine.delay = 0.1
    visitor = visit(url)
    visitor.send("hello")
    visitor.page.get_by_test_id("bot").wait_for()
    visitor.page.get_by_role("button", name="New chat").click()
    visitor.page.get_by_test_id("bot").wait_for(state="detached")
    visitor.wait_idle()
    visitor.page.wait_for_timeout(400)
    assert visitor.page.get_by_test_id("bot").count() == 0
    assert visitor.status() == "Ready"


def test_a_closed_tab_ends_its_session(url, engine, visit):
    engine.delay = 1.0
    visitor = visit(url)
    visitor.send("hello")
    visitor.page.locator("#message .stop-button").wait_for()
    open_before = len(engine.sessions)
    visitor.page.close()
    wait_until(lambda: len(engine.sessions) == open_before - 1, seconds=2)


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_window(width, url, engine, visit):
    engine.reply = lambda text: "A-very-long-word" * 20 + "\n\n```\n" + "code " * 100 + "\n```\n"
    visitor = visit(url, own={"viewport": {"width": width, "height": 844}})
    visitor.ask("hello")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    columns = visitor.page.locator("#columns > .column").all()
    tops = {round(column.bounding_box()["y"]) for column in columns}
    assert len(tops) == (1 if width >= 900 else 2)


@pytest.mark.parametrize("width", [390, 1400])
def test_replies_stay_in_their_columns(width, url, engine, visit):
    engine.reply = lambda text: "A-very-long-word" * 20 + "\n\n- one\n- **two**\n\n```\n" + "code " * 100 + "\n```\n"
    visitor = visit(url, own={"viewport": {"width": width, "height": 844}})
    page = settings(visitor)
    page.get_by_role("radio", name="3 replies").check()
    visitor.ask("hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    replies = page.get_by_role("group", name=re.compile("^Reply")).all()
    assert len(replies) == 3
    for reply in replies:
        box = reply.bounding_box()
        assert reply.locator("strong").count() == 1
        for part in reply.locator(".message-content, .reply-head, pre").all():
            inner = part.bounding_box()
            assert box["x"] <= inner["x"]
            assert inner["x"] + inner["width"] <= box["x"] + box["width"]
