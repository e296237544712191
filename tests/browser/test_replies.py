"""Several replies side by side, in the whole product: one is chosen and gone on from, the others give back blocks."""

import re

import pytest
from playwright.sync_api import Locator

from tests.browser import conftest
from tests.browser.conftest import Site, Visitor, wait_until
from tests.browser.test_chats import fork, show

QUESTION = "Why does contiguous reservation waste memory?"
OTHER = "what is copy-on-write?"


@pytest.fixture(autouse=True)
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are slowed, so slow that replies are still written when a busy machine gets to look at them."""
    monkeypatch.setattr(conftest, "STEP", 0.1)


def settings(visitor: Visitor) -> None:
    if not visitor.page.get_by_label("Seed").is_visible():
        visitor.page.get_by_role("button", name="Settings").click()


def want(visitor: Visitor, replies: int, seed: int = 3) -> None:
    """Make the next turns have so many replies, which differ."""
    settings(visitor)
    visitor.page.get_by_role("radio", name="1 reply" if replies == 1 else f"{replies} replies").check()
    visitor.page.get_by_role("spinbutton", name="Temperature").fill("2")
    visitor.page.get_by_label("Seed").fill(str(seed))


def replies(visitor: Visitor) -> Locator:
    return visitor.page.get_by_role("group", name=re.compile(r"^Reply \d of \d$"))


def texts(visitor: Visitor) -> list[str]:
    return replies(visitor).get_by_test_id("bot").all_inner_texts()


def states(visitor: Visitor) -> list[str]:
    return replies(visitor).locator(".state").all_inner_texts()


def use(visitor: Visitor, number: int) -> None:
    """Choose a reply, and wait until the page shows it alone."""
    visitor.page.get_by_role("button", name=f"Use this one: reply {number}").click()
    replies(visitor).first.wait_for(state="detached")


def tables(site: Site, visitor: Visitor) -> list[set[int]]:
    """The blocks of each sequence of the visitor's session, in the order in which they were asked for."""
    session = site.own(visitor)
    view = site.engine.core.view.sessions[session["id"]]
    return [set(view.sequences[number].table) for number in sorted(s["id"] for s in session["sequences"])]


def test_four_replies_stream_side_by_side_and_one_is_chosen(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 4)
    visitor.send(QUESTION)
    replies(visitor).nth(3).wait_for()
    wait_until(lambda: all(len(text) > 3 for text in texts(visitor)))
    assert site.engine.stats()["running"] == 4
    some = texts(visitor)
    assert all(re.fullmatch(r"Writing · \d+ tokens?", state) for state in states(visitor))
    wait_until(lambda: all(len(now) > len(then) for now, then in zip(texts(visitor), some, strict=True)))
    boxes = [reply.bounding_box() for reply in replies(visitor).all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    visitor.wait_idle()

    ended = texts(visitor)
    assert len(set(ended)) > 1
    assert "prompt tokens" in visitor.status()
    assert all(re.fullmatch(r"(Ended|Cut at the limit) · \d+ tokens?", state) for state in states(visitor))
    assert visitor.page.get_by_role("button", name="Fork here").count() == 1, "which reply would it be of?"
    first, second, third, fourth = tables(site, visitor)
    mine = third - first - second - fourth
    theirs = (first | second | fourth) - third
    assert mine
    assert theirs
    used = site.snapshot()["blocks"]["used"]

    use(visitor, 3)
    assert tables(site, visitor) == [third]
    assert site.snapshot()["blocks"]["used"] == used - len(theirs)
    assert all(site.engine.core.view.ref[block] == 0 for block in theirs)
    assert visitor.answer() == ended[2]
    assert visitor.status() == "Reply 3 of 4 · the blocks of the others went back to the pool"
    visitor.page.get_by_role("group", name="Branches at answer 1: 3 of 4").wait_for()
    visitor.page.get_by_role("button", name="Previous branch").click()
    visitor.page.get_by_role("group", name="Branches at answer 1: 2 of 4").wait_for()
    assert visitor.answer() == ended[1]


def test_the_chosen_one_is_gone_on_from(site: Site, arrive):
    visitor = arrive()
    want(visitor, 3)
    visitor.ask(QUESTION)
    chosen = texts(visitor)[1]
    use(visitor, 2)
    want(visitor, 1)
    before = site.engine.stats()
    visitor.ask(OTHER)
    after = site.engine.stats()
    new = {name: after[name] - before[name] for name in ("prompt_tokens", "cached_tokens")}
    assert new["prompt_tokens"] - new["cached_tokens"] < 20, "only the new turn is computed"
    assert visitor.page.get_by_test_id("bot").first.inner_text() == chosen
    assert visitor.page.get_by_test_id("bot").count() == 2


def test_one_is_chosen_while_all_are_written(site: Site, arrive, slow):
    """By key: the others stop at once, the chosen one goes on, and the keyboard is where the next message goes."""
    visitor = arrive()
    want(visitor, 3)
    visitor.send(QUESTION)
    wait_until(lambda: len(texts(visitor)) == 3 and all(texts(visitor)))
    visitor.page.get_by_role("button", name="Use this one: reply 1").focus()
    visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Enter")
    replies(visitor).first.wait_for(state="detached")
    wait_until(lambda: site.engine.stats()["running"] <= 1, seconds=0.5)
    some = visitor.answer()
    assert visitor.page.locator("#message textarea").evaluate("box => box === document.activeElement")
    visitor.wait_idle()
    assert len(visitor.answer()) > len(some)
    assert visitor.answer().startswith(some)
    assert len(tables(site, visitor)) == 1
    visitor.page.get_by_role("group", name="Branches at answer 1: 2 of 3").wait_for()


def test_whoever_just_writes_on_goes_on_from_the_first(site: Site, arrive):
    visitor = arrive()
    want(visitor, 2)
    visitor.ask(QUESTION)
    first = texts(visitor)[0]
    visitor.page.get_by_text("Use one of the 2 replies. If you just write on, it is reply 1.").wait_for()
    assert replies(visitor).first.locator("[aria-current=true]").count() == 1
    want(visitor, 1)
    visitor.ask(OTHER)
    assert replies(visitor).count() == 0
    assert visitor.page.get_by_test_id("bot").first.inner_text() == first
    visitor.page.get_by_role("group", name="Branches at answer 1: 1 of 2").wait_for()
    assert len(tables(site, visitor)) == 1


def test_stop_ends_all_and_one_can_still_be_chosen(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 3)
    visitor.send(QUESTION)
    wait_until(lambda: len(texts(visitor)) == 3 and all(texts(visitor)))
    visitor.page.locator("#message .stop-button").click()
    wait_until(lambda: site.engine.stats()["running"] == 0, seconds=0.5)
    visitor.wait_idle()
    assert visitor.status().startswith("Stopped · ")
    assert all(state.startswith("Stopped · ") for state in states(visitor))
    last = texts(visitor)[2]
    use(visitor, 3)
    assert visitor.answer() == last


def test_a_reply_that_ends_early_leaves_the_others(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 3)
    visitor.send(QUESTION)
    wait_until(lambda: len(texts(visitor)) == 3 and all(texts(visitor)))
    session = visitor.page.evaluate("window.chatpageViewer.session")
    site.engine._ask(lambda: cancel_first(site, session))
    wait_until(lambda: states(visitor)[0].startswith("Stopped"))
    some = texts(visitor)
    wait_until(lambda: all(len(now) > len(then) for now, then in zip(texts(visitor)[1:], some[1:], strict=True)))
    assert texts(visitor)[0] == some[0]
    visitor.wait_idle()
    assert [state.split(" · ")[0] == "Stopped" for state in states(visitor)] == [True, False, False]


def test_one_that_has_ended_is_chosen_while_the_others_are_written(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 3)
    visitor.send(QUESTION)
    wait_until(lambda: len(texts(visitor)) == 3 and all(texts(visitor)))
    session = visitor.page.evaluate("window.chatpageViewer.session")
    site.engine._ask(lambda: cancel_first(site, session))
    wait_until(lambda: states(visitor)[0].startswith("Stopped"))
    first = texts(visitor)[0]
    use(visitor, 1)
    wait_until(lambda: site.engine.stats()["running"] == 0, seconds=0.5)
    visitor.wait_idle()
    assert visitor.answer() == first
    assert len(tables(site, visitor)) == 1
    visitor.ask(OTHER)
    assert visitor.page.get_by_test_id("bot").first.inner_text() == first


def cancel_first(site: Site, session: int) -> None:
    """As if the first reply of this session had been ended by the engine."""
    core = site.engine.core
    sequence = min(core.view.sessions[session].sequences)
    core._finish(core.turns[sequence], "abort")


def test_replies_with_branches_and_forks(site: Site, arrive):
    visitor = arrive()
    visitor.ask(QUESTION)
    want(visitor, 2)
    visitor.answered(visitor.page.get_by_role("button", name="Retry").click)
    assert replies(visitor).count() == 2
    again = texts(visitor)
    use(visitor, 2)
    visitor.page.get_by_role("group", name="Branches at answer 1: 3 of 3").wait_for()
    assert visitor.answer() == again[1]

    fork(visitor, 1)
    assert visitor.answer() == again[1]
    visitor.ask(OTHER)
    assert replies(visitor).count() == 2
    show(visitor, 1)
    replies(visitor).first.wait_for(state="detached")
    visitor.page.get_by_role("button", name="Edit").last.click()
    visitor.page.locator("#chat textarea").fill(OTHER)
    visitor.answered(visitor.page.get_by_role("button", name="Submit").click)
    assert replies(visitor).count() == 2
    show(visitor, 2)
    replies(visitor).nth(1).wait_for()
    use(visitor, 1)
    visitor.page.get_by_role("group", name="Branches at answer 2: 1 of 2").wait_for()


def test_leaving_for_another_branch_takes_the_first(site: Site, arrive):
    visitor = arrive()
    visitor.ask(OTHER)
    want(visitor, 2)
    visitor.page.get_by_role("button", name="Edit").last.click()
    visitor.page.locator("#chat textarea").fill(QUESTION)
    visitor.answered(visitor.page.get_by_role("button", name="Submit").click)
    first = texts(visitor)[0]
    visitor.page.get_by_role("button", name="Previous branch").click()
    visitor.page.get_by_role("group", name="Branches at question 1: 1 of 3").wait_for()
    assert replies(visitor).count() == 0
    visitor.page.get_by_role("button", name="Next branch").click()
    visitor.page.get_by_role("group", name="Branches at question 1: 2 of 3").wait_for()
    assert visitor.answer() == first
    assert len(tables(site, visitor)) == 1


def test_loading_the_page_again_leaves_the_choice(site: Site, arrive):
    visitor = arrive()
    want(visitor, 3)
    visitor.ask(QUESTION)
    before = texts(visitor)
    visitor.page.reload()
    visitor.page.wait_for_function("window.chatpageViewer")
    replies(visitor).nth(2).wait_for()
    assert texts(visitor) == before
    assert site.snapshot()["sessions"] == []
    use(visitor, 2)
    assert visitor.answer() == before[1]
    visitor.ask(OTHER)
    assert visitor.page.get_by_test_id("bot").first.inner_text() == before[1]


def test_a_choice_that_was_made_up_is_refused(site: Site, arrive):
    visitor = arrive()
    want(visitor, 2)
    visitor.ask(QUESTION)
    for made_up, refusal in {
        "9": "Reply 9 is not there; it must be one of 1 to 2.",
        "'<b>'": "This button is not known here; load the page again.",
    }.items():
        click = f"button => {{button.closest('[role=group]').number = {made_up}; button.click()}}"
        visitor.page.get_by_role("button", name="Use this one: reply 2").evaluate(click)
        visitor.page.get_by_text(refusal).wait_for()
        visitor.page.locator(".toast-close").click()
    assert replies(visitor).count() == 2


def test_replies_on_a_phone(site: Site, arrive):
    visitor = arrive(own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    want(visitor, 4)
    visitor.ask(QUESTION)
    tops = [reply.bounding_box()["y"] for reply in replies(visitor).all()]
    assert tops == sorted(set(tops)), "one below the other"
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in replies(visitor).get_by_role("button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert box["x"] + box["width"] <= 390
    visitor.page.get_by_role("button", name="Use this one: reply 4").tap()
    visitor.page.get_by_role("group", name="Branches at answer 1: 4 of 4").wait_for()


def test_a_closed_tab_frees_all_its_replies(site: Site, arrive, slow):
    visitor, used = arrive(), site.snapshot()["blocks"]["used"]
    want(visitor, 4)
    visitor.send(QUESTION)
    wait_until(lambda: len(texts(visitor)) == 4 and all(texts(visitor)))
    visitor.page.close()
    wait_until(lambda: site.snapshot()["blocks"]["used"] == used, seconds=2)
    assert site.engine.stats()["running"] == 0
