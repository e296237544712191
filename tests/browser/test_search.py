"""Beam search in the whole product: the live beams are seen with their scores, and the best becomes the answer."""

import re
from typing import Any

import pytest

from chatpage.schedule.beam import Beams
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Request
from tests.browser import conftest
from tests.browser.conftest import Site, Visitor, wait_until
from tests.browser.test_chats import fork, show

QUESTION = "Why does contiguous reservation waste memory?"
OTHER = "what is copy-on-write?"


@pytest.fixture(autouse=True)
def slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are slowed, so slow that a search is still going on when a busy machine gets to look at it."""
    monkeypatch.setattr(conftest, "STEP", 0.12)


def want(visitor: Visitor, width: int, max_tokens: int = 24) -> None:
    """Have the next answers searched for."""
    if not visitor.page.get_by_label("Max tokens").is_visible():
        visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name="Beam search").check()
    visitor.page.get_by_label("Beam width").fill(str(width))
    visitor.page.get_by_label("Max tokens").fill(str(max_tokens))


def beams(visitor: Visitor) -> list[tuple[float, str]]:
    """Score and text of each live one, as they are drawn at one moment."""
    rows = visitor.page.get_by_role("list", name="Live beams").evaluate_all(
        "lists => lists.flatMap(list => [...list.children].map(row => [...row.children].map(cell => cell.textContent)))"
    )
    return [(float(score.replace("\u2212", "-")), text) for score, text in rows]


def searched(site: Site, width: int, max_tokens: int) -> Any:
    """What the engine itself answers to the first question."""
    prompt = site.engine.prompt([{"role": "user", "content": QUESTION}])
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    [stream] = site.engine.streams(Request(prompt, params, beams=Beams(width)), [None])
    return list(stream)[-1]


def test_live_beams_with_their_scores_and_the_best_as_the_answer(site: Site, arrive, slow):
    best = searched(site, 4, 48)
    visitor = arrive()
    want(visitor, 4, 48)
    visitor.send(QUESTION)
    region = visitor.page.get_by_role("region", name="Beam search")
    region.wait_for()
    wait_until(lambda: len(beams(visitor)) == 4)
    seen = [beams(visitor)]
    assert re.match(r"Searching · 4 live beams, \d finished · \d+ tokens? long", visitor.status())
    assert visitor.page.get_by_test_id("bot").count() == 0
    shared = []
    while region.is_visible():
        if now := beams(visitor):
            seen.append(now)
        shared += region.locator(".shared").all_inner_texts()
    for live in seen:
        scores = [score for score, _ in live]
        assert scores == sorted(scores, reverse=True)
        assert max(scores) < 0
    assert len({str(live) for live in seen}) > 4, "they were seen to grow"
    assert any(shared), "what one has in common with another"
    visitor.wait_idle()
    assert visitor.answer() == best.text.strip()
    assert f"The best that was found, score {best.score:.2f}".replace("-", "\u2212") in visitor.status()
    wait_until(lambda: len(site.own(visitor)["sequences"]) == 1)
    assert site.own(visitor)["state"] == "resting"


def test_finished_beams_are_marked(site: Site, arrive, slow):
    visitor = arrive()
    visitor.page.evaluate("""() => {
        const section = document.querySelector('#beams section')
        new MutationObserver(() => { window.mostFinished = Math.max(window.mostFinished ?? 0,
            section.hidden ? 0 : section.querySelectorAll('.finished:not([hidden]) li').length)
        }).observe(section, {childList: true, subtree: true, attributes: true})
    }""")
    want(visitor, 5, 48)
    visitor.ask("What is a slot, and how many has a block of a page table?")
    most = visitor.page.evaluate("window.mostFinished")
    if site.engine.settings.model is None:
        assert most > 0, "the tutor ends its answers"
    assert most <= 5


def test_the_answer_is_gone_on_from_and_is_a_branch(site: Site, arrive):
    visitor = arrive()
    want(visitor, 3, 12)
    first = visitor.ask(QUESTION)
    before = site.engine.stats()
    visitor.ask(OTHER)
    after = site.engine.stats()
    new = {name: after[name] - before[name] for name in ("prompt_tokens", "cached_tokens")}
    assert new["prompt_tokens"] - new["cached_tokens"] < 20, "only the new turn is computed"
    visitor.page.get_by_role("radio", name="Draw").check()
    visitor.page.get_by_role("radio", name="2 replies").check()
    visitor.answered(visitor.page.get_by_role("button", name="Retry").click)
    visitor.page.get_by_role("button", name="Use this one: reply 2").click()
    visitor.page.get_by_role("group", name="Branches at answer 2: 3 of 3").wait_for()
    fork(visitor, 1)
    assert visitor.answer() == first


def test_stop_takes_the_best_so_far(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 4, 48)
    visitor.send(QUESTION)
    wait_until(lambda: any(len(text) > 8 for _, text in beams(visitor)))
    visitor.page.locator("#message .stop-button").click()
    wait_until(lambda: site.engine.stats()["running"] == 0, seconds=0.5)
    visitor.wait_idle()
    assert visitor.status().startswith("Stopped · The best that was found, score \u2212")
    assert visitor.answer()
    assert visitor.page.get_by_role("region", name="Beam search").count() == 0
    wait_until(lambda: len(site.own(visitor)["sequences"]) == 1)


def test_loading_again_ends_the_search_with_its_best(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 2, 48)
    visitor.send(QUESTION)
    wait_until(lambda: any(len(text) > 8 for _, text in beams(visitor)))
    visitor.page.reload()
    visitor.page.wait_for_function("window.chatpageViewer")
    visitor.complaints.clear()  # Gradio complains of the stream that it leaves
    visitor.page.get_by_test_id("bot").wait_for()
    assert visitor.answer()
    assert site.snapshot()["sessions"] == []
    assert visitor.page.get_by_role("region", name="Beam search").count() == 0


def test_another_chat_is_looked_at_while_one_is_searched(site: Site, arrive, slow):
    visitor = arrive()
    want(visitor, 2, 4)
    visitor.ask(OTHER)
    want(visitor, 2, 48)
    fork(visitor, 1)
    visitor.send(QUESTION)
    region = visitor.page.get_by_role("region", name="Beam search")
    region.wait_for()
    show(visitor, 1)
    region.wait_for(state="hidden")
    show(visitor, 2)
    region.wait_for()
    visitor.wait_idle()
    region.wait_for(state="hidden")


def test_beams_on_a_phone(site: Site, arrive, slow):
    visitor = arrive(own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    want(visitor, 8, 48)
    visitor.send(QUESTION)
    region = visitor.page.get_by_role("region", name="Beam search")
    region.wait_for()
    wait_until(lambda: len(beams(visitor)) == 8)
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    top = visitor.page.locator("#message").bounding_box()["y"]
    visitor.page.locator("#message .stop-button").click()
    visitor.wait_idle()
    assert abs(visitor.page.locator("#message").bounding_box()["y"] - top) < 60, "nothing jumps"
