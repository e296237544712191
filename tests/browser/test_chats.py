"""Forks: several chats in one tab, which share blocks and go on alone. And what loading the page again leaves."""

import re

import pytest

from chatpage.web import page, visitors
from tests.browser.conftest import Site, Visitor, wait_until

QUESTION = "what is a block table?"
OTHER = "what is copy-on-write?"


def fork(visitor: Visitor, message: int, chat: int = 2) -> None:
    """Press "Fork here" at a message, and wait for the chat that it opens."""
    visitor.page.get_by_role("button", name="Fork here").nth(message).click()
    shown(visitor, chat)


def show(visitor: Visitor, chat: int) -> None:
    visitor.page.get_by_role("button", name=f"Chat {chat}, session").click()
    shown(visitor, chat)


def shown(visitor: Visitor, chat: int) -> None:
    """Wait until the page and its panel show this chat."""
    label = visitor.page.locator(f"#buttons [aria-label^='Chat {chat}, session'][aria-current=true]")
    label.wait_for()
    session = re.findall(r"session (\d+)", label.get_attribute("aria-label"))[0]
    visitor.page.wait_for_function(f"window.chatpageViewer.session === {session}")


def chats(visitor: Visitor) -> list[str]:
    return visitor.page.locator("#buttons .chat b").all_inner_texts()


def questions(visitor: Visitor) -> list[str]:
    return visitor.page.get_by_test_id("user").all_inner_texts()


def load_again(visitor: Visitor) -> None:
    visitor.page.reload()
    visitor.page.wait_for_function("window.chatpageViewer")


def test_a_fork_shares_blocks_and_goes_on_alone(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    visitor.ask("what is a slot?")
    assert not visitor.page.get_by_role("navigation", name="Chats").is_visible()
    fork(visitor, 1)
    assert questions(visitor) == [QUESTION]
    assert visitor.status().startswith("Forked from chat 1")
    visitor.ask(OTHER)
    assert questions(visitor) == [QUESTION, OTHER]

    sessions = site.snapshot()["sessions"]
    assert len(sessions) == 2
    view = site.engine.core.view
    origin, forked = (
        next(iter(view.sessions[session["id"]].sequences.values())).table
        for session in sorted(sessions, key=lambda session: session["id"])
    )
    shared = [block for block, other in zip(origin, forked, strict=False) if block == other]
    assert len(shared) > len(site.engine.systems[0].tokens) // site.engine.block_size
    assert all(view.ref[block] == 2 for block in shared)
    own = visitor.page.get_by_test_id("kv-own-table")
    assert own.get_by_text("×2").count() == len(shared)
    assert visitor.page.get_by_test_id("kv-other-session").count() == 1

    show(visitor, 1)
    assert questions(visitor) == [QUESTION, "what is a slot?"]
    visitor.ask("and a page?")
    assert OTHER not in site.context(visitor)
    show(visitor, 2)
    assert questions(visitor) == [QUESTION, OTHER]
    assert "and a page?" not in site.context(visitor)


def test_two_chats_are_answered_at_once_and_stopped_alone(site: Site, arrive, slow):
    visitor = arrive()
    stop = visitor.page.locator("#message .stop-button")
    visitor.ask(QUESTION)
    fork(visitor, 1)
    show(visitor, 1)
    visitor.send(OTHER)
    visitor.page.get_by_test_id("bot").nth(1).wait_for()
    show(visitor, 2)
    assert visitor.page.locator("#message .submit-button").is_visible()
    visitor.send("why does contiguous reservation waste memory?")
    stop.wait_for()
    wait_until(lambda: site.engine.stats()["running"] == 2)
    stop.click()
    visitor.wait_idle()
    assert visitor.status().startswith("Stopped")
    assert site.engine.stats()["running"] == 1

    show(visitor, 1)
    stop.wait_for()
    some = visitor.answer()
    wait_until(lambda: len(visitor.answer()) > len(some))
    visitor.wait_idle()
    assert "first token" in visitor.status()
    assert visitor.page.get_by_role("button", name="Fork here").last.is_enabled()
    show(visitor, 2)
    assert visitor.status().startswith("Stopped")


def test_an_answer_that_ends_unseen_is_there_when_its_chat_is_shown(site: Site, arrive, slow):
    visitor = arrive()
    visitor.ask(QUESTION)
    fork(visitor, 1)
    visitor.send(OTHER)
    visitor.page.get_by_test_id("bot").nth(1).wait_for()
    show(visitor, 1)
    wait_until(lambda: site.engine.stats()["running"] == 0)
    visitor.page.wait_for_timeout(300)
    assert questions(visitor) == [QUESTION]
    assert visitor.page.get_by_role("button", name="Retry").is_enabled()
    show(visitor, 2)
    assert questions(visitor) == [QUESTION, OTHER]
    assert "first token" in visitor.status()
    visitor.wait_idle()


def test_a_closed_chat_leaves_the_other(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    fork(visitor, 1)
    visitor.ask(OTHER)
    visitor.page.get_by_role("button", name="Close chat 1").click()
    visitor.page.get_by_role("navigation", name="Chats").wait_for(state="hidden")
    wait_until(lambda: len(site.snapshot()["sessions"]) == 1)
    assert questions(visitor) == [QUESTION, OTHER]
    visitor.ask("and a slot?")
    assert "already in the cache" in visitor.status()
    fork(visitor, 5, chat=3)
    visitor.page.get_by_role("button", name="Close chat 3").click()
    visitor.page.get_by_role("navigation", name="Chats").wait_for(state="hidden")
    assert questions(visitor) == [QUESTION, OTHER, "and a slot?"]


def test_a_question_is_left_out_of_a_fork_and_may_be_reworded(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    visitor.ask(OTHER)
    fork(visitor, 2)
    assert questions(visitor) == [QUESTION]
    assert visitor.page.locator("#message textarea").input_value() == OTHER
    show(visitor, 1)
    visitor.write("my own words")
    fork(visitor, 0, chat=3)
    assert questions(visitor) == []
    assert visitor.page.locator("#message textarea").input_value() == "my own words"


def test_a_new_chat_takes_the_place_of_the_one_that_is_shown(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    fork(visitor, 1)
    visitor.page.get_by_role("button", name="New chat").click()
    visitor.page.get_by_test_id("user").wait_for(state="detached")
    assert chats(visitor) == ["Chat 1", "Chat 2"]
    show(visitor, 1)
    assert questions(visitor) == [QUESTION]


def test_a_tab_has_no_end_of_chats(site: Site, arrive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(visitors, "MAX_CHATS", 2)
    visitor = arrive()
    visitor.ask(QUESTION)
    fork(visitor, 1)
    visitor.page.get_by_role("button", name="Fork here").last.click()
    visitor.page.get_by_text("This tab has 2 chats, which is the most; close one of them first.").wait_for()
    assert chats(visitor) == ["Chat 1", "Chat 2"]


def test_a_closed_tab_frees_all_its_chats(site: Site, arrive):
    visitor, used = arrive(), site.snapshot()["blocks"]["used"]
    visitor.ask(QUESTION)
    fork(visitor, 1)
    visitor.ask(OTHER)
    visitor.page.close()
    wait_until(lambda: site.snapshot()["blocks"]["used"] == used, seconds=2)
    assert site.snapshot()["sessions"] == []


def test_many_chats_on_a_phone(site: Site, arrive):
    visitor = arrive(own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    visitor.ask(QUESTION)
    for chat in range(2, visitors.MAX_CHATS + 1):
        fork(visitor, 1, chat)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in visitor.page.locator("#buttons button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert box["x"] + box["width"] <= 390


# -- loading the page again --------------------------------------------------------------------------------------------


def test_a_page_that_is_loaded_again_has_its_chats_and_branches(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    answer = visitor.answered(visitor.page.get_by_role("button", name="Retry").click)
    fork(visitor, 1)
    visitor.ask(OTHER)
    show(visitor, 1)
    load_again(visitor)
    shown(visitor, 1)
    assert site.snapshot()["sessions"] == []
    assert visitor.status().startswith("Loaded again · what was said is here")
    assert (questions(visitor), visitor.answer()) == ([QUESTION], answer)
    visitor.page.get_by_role("group", name="Branches at answer 1: 2 of 2").wait_for()

    visitor.ask("and a slot?")
    show(visitor, 2)
    assert questions(visitor) == [QUESTION, OTHER]
    visitor.ask("and a slot?")
    found = int(re.findall(r"(\d+) of", visitor.status())[0])
    assert found > len(site.engine.systems[0].tokens), "the chats of a tab share again"


def test_loading_again_stops_the_answer_and_keeps_its_beginning(site: Site, arrive, slow):
    visitor = arrive()
    visitor.send("why does contiguous reservation waste memory?")
    visitor.page.get_by_test_id("bot").wait_for()
    some = visitor.answer()
    load_again(visitor)
    visitor.complaints.clear()  # Gradio complains of the stream that it leaves
    visitor.page.get_by_test_id("bot").wait_for()
    assert visitor.answer().startswith(some)
    assert site.engine.stats()["running"] == 0
    visitor.wait_idle()
    visitor.ask(OTHER)
    assert visitor.page.get_by_test_id("bot").count() == 2


def test_a_copy_of_a_tab_takes_nothing_from_it(site: Site, arrive, visit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "RELOAD_SECONDS", 0.3)
    visitor = arrive()
    visitor.ask(QUESTION)
    secret = visitor.page.evaluate("sessionStorage.getItem('chatpage')")
    copy = arrive()
    copy.page.evaluate("secret => sessionStorage.setItem('chatpage', secret)", secret)
    load_again(copy)
    assert questions(copy) == []
    assert "open in another tab" in copy.status()
    assert copy.page.evaluate("sessionStorage.getItem('chatpage')") != secret
    visitor.ask(OTHER)
    assert questions(visitor) == [QUESTION, OTHER]


def test_where_the_browser_stores_nothing_loading_again_begins_anew(site: Site, arrive):
    visitor = arrive()
    refuse = "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('no') }})"
    visitor.page.add_init_script(refuse)
    load_again(visitor)
    visitor.ask(QUESTION)
    load_again(visitor)
    assert questions(visitor) == []
    assert visitor.status() == "Ready"
