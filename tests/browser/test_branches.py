"""Branches in the page: kept, counted, shown again, and gone on from."""

from playwright.sync_api import Locator

from tests.browser.conftest import Site, Visitor, wait_until

QUESTION = "what is a block table?"
OTHER = "what is copy-on-write?"
HOSTILE = "<img src=x onerror='window.pwned=1'> ${window.pwned=2} {{value}} <script>window.pwned=3</script>"


def switches(visitor: Visitor) -> Locator:
    return visitor.page.locator("#chat .switch:visible")


def places(visitor: Visitor) -> list[str]:
    """Where branches part, and which is shown, as a screen reader says it."""
    return [switch.get_attribute("aria-label") for switch in switches(visitor).all()]


def limit(visitor: Visitor, tokens: int) -> None:
    """Make the next answers short, so that they differ from those before."""
    if not visitor.page.get_by_label("Max tokens").is_visible():
        visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("Max tokens").fill(str(tokens))


def retry(visitor: Visitor) -> str:
    return visitor.answered(visitor.page.get_by_role("button", name="Retry").click)


def edit(visitor: Visitor, text: str) -> str:
    visitor.page.get_by_role("button", name="Edit").last.click()
    visitor.page.locator("#chat textarea").fill(text)
    return visitor.answered(visitor.page.get_by_role("button", name="Submit").click)


def questions(visitor: Visitor) -> list[str]:
    return visitor.page.get_by_test_id("user").all_inner_texts()


def press(visitor: Visitor, name: str, place: str) -> None:
    """Press a switch's button, and wait until the page shows the branch that it leads to."""
    visitor.page.get_by_role("button", name=name).click()
    visitor.page.get_by_role("group", name=place).wait_for()


def test_an_answer_given_again_is_a_second_branch(site: Site, arrive):
    visitor = arrive()
    first = visitor.ask(QUESTION)
    assert places(visitor) == []
    limit(visitor, 3)
    second = retry(visitor)
    assert second != first
    assert places(visitor) == ["Branches at answer 1: 2 of 2"]

    press(visitor, "Previous branch", "Branches at answer 1: 1 of 2")
    assert switches(visitor).inner_text().split() == ["‹", "1/2", "›"]
    assert visitor.answer() == first
    assert visitor.status() == "Branch 1 of 2"
    press(visitor, "Next branch", "Branches at answer 1: 2 of 2")
    assert visitor.answer() == second


def test_the_next_turn_goes_on_from_the_branch_that_is_shown(site: Site, arrive):
    visitor = arrive()
    first = visitor.ask(QUESTION)
    edit(visitor, OTHER)
    assert places(visitor) == ["Branches at question 1: 2 of 2"]
    assert QUESTION not in site.context(visitor)

    press(visitor, "Previous branch", "Branches at question 1: 1 of 2")
    assert questions(visitor) == [QUESTION]
    assert visitor.answer() == first
    visitor.ask("And what is a slot?")
    context = site.context(visitor)
    assert QUESTION in context
    assert OTHER not in context
    found, prompt = visitor.status().split(" · ")[-1].split(" prompt tokens")[0].split(" of ")
    assert int(prompt) - int(found) < 20, "only the new turn is computed"


def test_a_branch_is_shown_with_what_was_shown_last_after_it(site: Site, arrive):
    visitor = arrive()
    limit(visitor, 4)
    visitor.ask("a")
    visitor.ask("b")
    visitor.page.get_by_role("button", name="Edit").first.click()
    visitor.page.locator("#chat textarea").fill("c")
    visitor.answered(visitor.page.get_by_role("button", name="Submit").click)
    assert questions(visitor) == ["c"]
    press(visitor, "Previous branch", "Branches at question 1: 1 of 2")
    assert questions(visitor) == ["a", "b"]
    edit(visitor, "d")
    assert places(visitor) == ["Branches at question 1: 1 of 2", "Branches at question 2: 2 of 2"]
    visitor.page.get_by_role("button", name="Next branch").first.click()
    wait_until(lambda: questions(visitor) == ["c"])
    press(visitor, "Previous branch", "Branches at question 2: 2 of 2")
    assert questions(visitor) == ["a", "d"]


def test_while_an_answer_is_written_the_branch_stays(site: Site, arrive, slow):
    visitor = arrive()
    limit(visitor, 2)
    visitor.ask(QUESTION)
    retry(visitor)
    limit(visitor, 48)
    visitor.send(OTHER)
    visitor.page.get_by_test_id("bot").nth(1).wait_for()
    for name in ("Previous branch", "Next branch"):
        assert visitor.page.get_by_role("button", name=name).is_disabled()
    visitor.page.get_by_role("button", name="Previous branch").click(force=True)
    visitor.page.wait_for_timeout(200)
    assert places(visitor) == ["Branches at answer 1: 2 of 2"]
    visitor.page.locator("#message .stop-button").click()
    visitor.wait_idle()
    press(visitor, "Previous branch", "Branches at answer 1: 1 of 2")


def test_branches_by_keyboard(site: Site, arrive):
    visitor = arrive()
    limit(visitor, 2)
    visitor.ask(QUESTION)
    retry(visitor)
    previous, following = (visitor.page.get_by_role("button", name=f"{name} branch") for name in ("Previous", "Next"))
    previous.focus()
    visitor.page.keyboard.press("Enter")
    visitor.page.get_by_role("group", name="1 of 2").wait_for()
    assert previous.is_disabled()
    assert previous.evaluate("button => button === document.activeElement")
    visitor.page.keyboard.press("Tab")
    assert following.evaluate("button => button === document.activeElement")
    visitor.page.keyboard.press("Space")
    visitor.page.get_by_role("group", name="2 of 2").wait_for()


def test_the_buttons_come_back_whatever_gradio_drops(site: Site, arrive):
    """Its rows of buttons are not ours. Where it has none, ours are at the message itself."""
    visitor = arrive()
    limit(visitor, 2)
    visitor.ask(QUESTION)
    retry(visitor)
    forks = visitor.page.get_by_role("button", name="Fork here")
    visitor.page.evaluate("document.querySelectorAll('.branches').forEach(bar => bar.remove())")
    wait_until(lambda: forks.count() == 2)
    visitor.page.evaluate("document.querySelectorAll('#chat .message-buttons').forEach(row => row.className = '')")
    visitor.page.evaluate("document.querySelectorAll('.branches').forEach(bar => bar.remove())")
    wait_until(lambda: visitor.page.locator(".message-row > .branches").count() == 2)
    press(visitor, "Previous branch", "Branches at answer 1: 1 of 2")
    assert forks.count() == 2


def test_nothing_that_was_written_runs_in_the_buttons(site: Site, arrive):
    visitor = arrive()
    limit(visitor, 2)
    visitor.ask(HOSTILE)
    retry(visitor)
    edit(visitor, "${window.pwned=4} {{value}}")
    press(visitor, "Previous branch", "Branches at question 1: 2 of 3")
    assert questions(visitor) == [HOSTILE]
    assert visitor.page.evaluate("window.pwned") is None
    assert visitor.page.locator("#card :is(img, script, iframe)").count() == 0


def test_a_click_that_was_made_up_is_refused(site: Site, arrive):
    """As a browser may send that runs another page than ours."""
    visitor = arrive()
    limit(visitor, 2)
    visitor.ask(QUESTION)
    retry(visitor)
    for made_up, refusal in {
        "message: 9": "Message 9 is not there; the last one is 1.",
        "parting: {number: 9}": "Branch 8 of message 1 is not there; it must be one of 1 to 2.",
        "parting: {number: '<b>'}": "This button is not known here; load the page again.",
    }.items():
        click = f"button => {{Object.assign(button.closest('.branches'), {{{made_up}}}); button.click()}}"
        visitor.page.get_by_role("button", name="Previous branch").evaluate(click)
        visitor.page.get_by_text(refusal).wait_for()
        visitor.page.locator(".toast-close").click()
    assert places(visitor) == ["Branches at answer 1: 2 of 2"]


def test_branches_on_a_phone(site: Site, arrive):
    visitor = arrive(own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    visitor.ask(QUESTION)
    retry(visitor)
    edit(visitor, OTHER)
    for button in visitor.page.locator("#chat .branches button:visible").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
        assert box["x"] + box["width"] <= 390
    visitor.page.get_by_role("button", name="Previous branch").tap()
    visitor.page.get_by_role("group", name="2 of 3").wait_for()
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
