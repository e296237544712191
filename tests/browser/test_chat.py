"""The whole product in a real browser: page, engine and panel. What the issue promises a visitor, seen as one."""

import re

import pytest
from playwright.sync_api import Browser

from chatpage.engine import Engine
from chatpage.settings import Settings
from chatpage.web.app import create_app
from tests.browser.conftest import Site, served, wait_until

QUESTION = "Why does contiguous reservation waste memory?"


def test_two_visitors_share_the_system_prompt(site: Site, arrive, slow):
    before = site.snapshot()
    anna, ben = arrive(own={}), arrive(own={})
    anna.send(QUESTION)
    ben.send("What is copy-on-write?")
    wait_until(lambda: site.engine.stats()["running"] == 2)
    for visitor in (anna, ben):
        visitor.page.get_by_test_id("bot").wait_for()
    heads = [visitor.answer() for visitor in (anna, ben)]
    wait_until(lambda: len(anna.answer()) > len(heads[0]) and len(ben.answer()) > len(heads[1]))

    system = site.engine.systems[0]
    full_blocks = len(system.tokens) // site.engine.block_size
    for visitor in (anna, ben):
        visitor.wait_idle()
        trunk = visitor.page.get_by_test_id("kv-system")
        trunk.get_by_text("×2 sessions").wait_for()
        assert f"{len(system.tokens)} tokens in {-(-len(system.tokens) // site.engine.block_size)} blocks" in (
            trunk.inner_text()
        )
        assert visitor.page.get_by_test_id("kv-other-session").count() == 1
        assert f"{len(system.tokens)} of " in visitor.status()
        assert "prompt tokens from shared blocks" in visitor.status()

    after = site.snapshot()
    copies = after["counters"]["copied"] - before["counters"]["copied"]
    assert copies == (2 if len(system.tokens) % site.engine.block_size else 0)
    tables = [
        site.engine.core.view.sessions[s["id"]].sequences[s["sequences"][0]["id"]].table for s in after["sessions"]
    ]
    assert len(tables) == 2
    assert tables[0][:full_blocks] == tables[1][:full_blocks]
    assert not set(tables[0][full_blocks:]) & set(tables[1][full_blocks:])


def test_the_second_turn_computes_only_its_own_tokens(site: Site, arrive):
    visitor = arrive()
    visitor.ask("What is a block table?")
    session = site.own(visitor)
    assert session["state"] == "resting"
    held = session["sequences"][0]["tokens"]
    before = site.engine.stats()
    visitor.ask("And what is a KV cache?")
    after = site.engine.stats()
    prompt = after["prompt_tokens"] - before["prompt_tokens"]
    found = after["cached_tokens"] - before["cached_tokens"]
    assert found == held
    assert f"{found:.0f} of {prompt:.0f} prompt tokens already in the cache" in visitor.status()
    template = site.engine.template
    follow_up = template.follow_up([{"role": "user", "content": "And what is a KV cache?"}])
    assert prompt - found <= 1 + len(template.end_of_turn) + len(follow_up)


def test_retry_and_edit_keep_what_came_before(site: Site, arrive):
    visitor = arrive()
    visitor.ask("What is paged attention?")
    visitor.answered(visitor.page.get_by_role("button", name="Retry").click)
    found, prompt = (int(number) for number in re.findall(r"(\d+) of (\d+) prompt tokens", visitor.status())[0])
    assert prompt - found <= 1
    visitor.ask("What is copy-on-write?")
    visitor.page.get_by_role("button", name="Edit").last.click()
    visitor.page.locator("#chat textarea").fill("What is a block?")
    visitor.answered(visitor.page.get_by_role("button", name="Submit").click)
    assert visitor.page.get_by_test_id("user").all_inner_texts() == ["What is paged attention?", "What is a block?"]
    assert visitor.page.get_by_test_id("bot").count() == 2


def test_stop(site: Site, arrive, slow):
    visitor = arrive()
    visitor.send(QUESTION)
    visitor.page.get_by_test_id("bot").wait_for()
    visitor.page.locator("#message .stop-button").click()
    wait_until(lambda: site.engine.stats()["running"] == 0, seconds=0.25)
    allocated = site.snapshot()["counters"]["allocated"]
    visitor.wait_idle()
    assert visitor.status().startswith("Stopped · ")
    session = site.own(visitor)
    assert session["state"] == "resting"
    assert site.snapshot()["counters"]["allocated"] == allocated
    tokens = session["sequences"][0]["tokens"]
    assert len(site.engine.core.view.sessions[session["id"]].sequences[session["sequences"][0]["id"]].table) == -(
        -tokens // site.engine.block_size
    )
    visitor.ask("What is a block table?")
    assert "already in the cache" in visitor.status()


def test_a_closed_tab_frees_its_blocks(site: Site, arrive, slow):
    visitor, watcher = arrive(), arrive()
    used = site.snapshot()["blocks"]["used"]
    visitor.send(QUESTION)
    visitor.page.get_by_test_id("bot").wait_for()
    assert site.snapshot()["blocks"]["used"] > used
    watcher.page.get_by_test_id("kv-other-session").wait_for()
    visitor.page.close()
    wait_until(lambda: site.snapshot()["blocks"]["used"] == used, seconds=2)
    assert site.snapshot()["sessions"] == []
    assert site.engine.stats()["running"] == 0
    watcher.page.get_by_test_id("kv-other-session").wait_for(state="detached")


def test_a_new_chat_frees_the_old_one(site: Site, arrive):
    visitor = arrive()
    visitor.ask("What is a block?")
    before = visitor.page.evaluate("window.chatpageViewer.session")
    visitor.page.get_by_role("button", name="New chat").click()
    visitor.page.get_by_test_id("user").wait_for(state="detached")
    wait_until(lambda: visitor.page.evaluate("window.chatpageViewer.session") != before)
    assert before not in [session["id"] for session in site.snapshot()["sessions"]]
    visitor.ask("What is a block?")
    visitor.page.get_by_test_id("kv-own-table").wait_for()


def test_an_expired_session_goes_on(site: Site, arrive):
    """Its blocks are gone, its text is not: it is computed again in a new session, which the panel shows as ours."""
    visitor = arrive()
    visitor.ask("What is a block table?")
    before = visitor.page.evaluate("window.chatpageViewer.session")
    for key in list(site.engine._sessions._by_key):
        site.engine.close_session(key)
    visitor.ask("And what is a KV cache?")
    assert visitor.page.get_by_test_id("user").count() == 2
    assert visitor.page.evaluate("window.chatpageViewer.session") != before
    visitor.page.get_by_test_id("kv-own-table").wait_for()


def test_on_a_phone_the_panel_is_below_the_chat(site: Site, arrive):
    visitor = arrive(own={"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True})
    visitor.ask("What is a block table?")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    chat, panel = (visitor.page.locator(part).bounding_box() for part in ("#card", "#panel"))
    assert panel["y"] >= chat["y"] + chat["height"]
    assert panel["width"] <= 390
    visitor.page.get_by_test_id("kv-own-table").wait_for()


def test_inside_the_frame_of_a_space(model: str | None, browser: Browser, monkeypatch: pytest.MonkeyPatch):
    """A Space shows the page in a frame of another origin; here a page that only pretends to be huggingface.co."""
    monkeypatch.setenv("SPACE_ID", "someone/chatpage")
    settings = Settings(model=model, kv_blocks=128, host="127.0.0.1", max_output_tokens=40)
    engine = Engine(settings)
    with served(create_app(engine, settings)) as url:
        engine.wait_ready(60)
        context = browser.new_context()
        context.route(
            "https://huggingface.co/**",
            lambda route: route.fulfill(
                content_type="text/html", body=f"<iframe src='{url}' style='width: 1300px; height: 900px'></iframe>"
            ),
        )
        page = context.new_page()
        page.goto("https://huggingface.co/spaces/someone/chatpage")
        frame = page.frame_locator("iframe")
        frame.locator("#status").get_by_text("Ready").wait_for()
        frame.locator("#message textarea").fill("What is a block?")
        frame.locator("#message textarea").press("Enter")
        frame.get_by_text("prompt tokens from shared blocks").wait_for()
        frame.get_by_test_id("kv-own-table").wait_for()
        context.close()
