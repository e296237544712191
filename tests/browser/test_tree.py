"""The fork tree in the panel: replies of the engine, beams of tests/panel/feed.py, and two people with one question."""

import contextlib
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from chatpage.engine import Engine
from chatpage.settings import Settings
from chatpage.web.app import create_app
from tests.browser.conftest import Site, served

FEED = Path(__file__).parents[1] / "panel" / "feed.py"
QUESTION = "What is a block table, and how does a sequence use it to find its slots?"


def expected(tables: dict[str, list[int]]) -> Counter[tuple[str, int]]:
    """(blocks, by how many sequences they are held) for each run of a tree: blocks that the same sequences have."""
    runs: dict[frozenset[str], list[int]] = {frozenset(tables): []}
    for table in sorted(tables.values()):
        for end in range(1, len(table) + 1):
            holders = frozenset(name for name, other in tables.items() if other[:end] == table[:end])
            run = runs.setdefault(holders, [])
            if table[end - 1] not in run:
                run.append(table[end - 1])
    return Counter((",".join(map(str, run)), len(holders)) for holders, run in runs.items())


def drawn(tree: Locator) -> Counter[tuple[str, int]]:
    """The same, as the panel shows it; without sequences that have no block of their own, which have a row too."""
    rows = tree.locator("[role=treeitem]:not(.kv-dropped)").evaluate_all(
        "rows => rows.map(row => [row.dataset.run, Number(row.dataset.sequences), row.matches('.kv-fork-trunk')])"
    )
    return Counter((run, sequences) for run, sequences, is_trunk in rows if run or is_trunk)


def tables(page: Page, session: str) -> dict[str, list[int]]:
    """The block tables of a session as the panel's model has them."""
    return page.evaluate(
        """session => {
          const {sequences} = document.querySelector('.kv-panel').__kvModel.sessions.get(Number(session))
          return Object.fromEntries([...sequences.values()].filter(s => s.table.length).map(s => [s.id, s.table]))
        }""",
        session,
    )


def same_on_both_sides(tree: Locator) -> bool:
    """Whether a tree that does not change any more is the one of its tables."""
    session = tree.get_attribute("data-session")
    assert session is not None
    return drawn(tree) == expected(tables(tree.page, session))


@contextlib.contextmanager
def pool(*options: str) -> Iterator[str]:
    """The address of a real pool with visitors that are not: see tests/panel/feed.py."""
    spec = importlib.util.spec_from_file_location("feed", FEED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with served(module.create_app(module.parse(options))) as url:
        yield url


@pytest.fixture(scope="module")
def feed() -> Iterator[str]:
    """Here the first visitor's answers are beam searches, 30 steps a second."""
    with pool("--beams", "8", "--speed", "30") as url:
        yield url


def paused(page: Page) -> Locator:
    """The panel's tree of the viewer in the middle of a search, which stands still."""
    tree = page.get_by_test_id("kv-fork-tree")
    page.locator(
        "[data-testid=kv-fork-tree][data-state=decode][data-sequences='8'] .kv-branch .kv-branch"
    ).first.wait_for()
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(300)  # the last numbers are drawn
    return tree


def test_replies_are_branches_of_one_trunk(site: Site, visit: Callable[..., Any], slow: None):
    page = visit(f"{site.url}/panel/", ready=False).page
    page.locator("[data-testid=kv-status][data-state=live]").wait_for()
    asked = {
        "model": site.engine.model_name,
        "messages": [{"role": "user", "content": QUESTION}],
        "n": 3,
        "temperature": 1.5,
        "min_tokens": 40,
        "max_tokens": 40,
    }
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(httpx.post(f"{site.url}/v1/chat/completions", json=asked, timeout=60).status_code)

    answer = threading.Thread(target=ask)
    answer.start()
    tree = page.get_by_test_id("kv-fork-tree")
    tree.locator(".kv-branch").nth(2).wait_for()
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(300)
    assert same_on_both_sides(tree)
    trunk = tree.locator(".kv-fork-trunk")
    assert trunk.get_attribute("data-sequences") == "3"
    assert trunk.locator(".kv-times").first.inner_text() == "×3 sequences"
    told = page.locator(".kv-events").inner_text()
    assert "forked into 3 branches after" in told
    page.get_by_role("button", name="Resume").click()
    answer.join()
    assert statuses == [200]
    tree.wait_for(state="detached")


def test_beams_that_fork_and_are_dropped_at_every_step(feed: str, visit: Callable[..., Any]):
    page = visit(f"{feed}/?me", ready=False).page
    page.locator(".kv-branch.kv-dropped").first.wait_for()
    tree = paused(page)
    assert same_on_both_sides(tree)
    assert int(tree.get_by_test_id("kv-dropped").get_attribute("data-count") or 0) > 0
    assert "dropped so far" in tree.get_by_test_id("kv-dropped").inner_text()
    expect(page.locator(".kv-branch.kv-dropped")).to_have_count(0)  # a second or two later, although nothing happens


def test_a_snapshot_gives_the_same_tree(feed: str, visit: Callable[..., Any]):
    """Who comes in the middle of a search, and with reduced motion, sees what the others see."""
    page = visit(f"{feed}/", ready=False, own={"reduced_motion": "reduce"}).page
    tree = paused(page)
    assert same_on_both_sides(tree)
    assert tree.locator(".kv-you").inner_text() == "Session 1"


def test_keys_move_in_the_tree(feed: str, visit: Callable[..., Any]):
    page = visit(f"{feed}/?me", ready=False).page
    tree = paused(page)
    inner = tree.get_by_role("tree")
    inner.focus()
    page.keyboard.press("ArrowDown")
    inspector = page.locator(".kv-inspector")
    expect(inspector).to_contain_text("Trunk: blocks")
    page.keyboard.press("ArrowDown")
    expect(inspector).to_contain_text("Branch: block")
    active = inner.get_attribute("aria-activedescendant")
    row = tree.locator(f"#{active}")
    assert row.get_attribute("aria-label", timeout=1000) in inspector.inner_text()
    blocks = set((row.get_attribute("data-run") or "").split(","))
    selected = set(page.locator(".kv-chip.kv-selected").evaluate_all("chips => chips.map(chip => chip.dataset.block)"))
    assert selected
    assert selected <= blocks
    page.keyboard.press("End")
    last = tree.locator("[role=treeitem]").last.get_attribute("id")
    assert inner.get_attribute("aria-activedescendant") == last


def test_a_busy_tree_reuses_its_rows_and_keeps_its_pace(feed: str, visit: Callable[..., Any]):
    page = visit(f"{feed}/?me", ready=False).page
    page.locator("[data-testid=kv-fork-tree][data-state=decode][data-sequences='8']").wait_for()
    measured = page.evaluate(
        """async () => {
          const frames = [], rows = new Set()
          let last = performance.now()
          for (const end = last + 3000; last < end; ) {
            const now = await new Promise(requestAnimationFrame)
            frames.push(now - last)
            last = now
            for (const row of document.querySelectorAll('.kv-branch')) rows.add(row.id)
          }
          return {rows: rows.size, median: frames.sort((a, b) => a - b)[frames.length >> 1]}
        }"""
    )
    assert measured["rows"] < 60  # meanwhile about a hundred beams came and went
    assert measured["median"] < 40  # ms; 17 where nothing else runs on the machine


def test_a_click_on_a_branch_shows_its_text(visit: Callable[..., Any]):
    with pool("--replies", "3", "--speed", "60") as url:
        page = visit(f"{url}/?me", ready=False).page
        branch = page.locator("[data-testid=kv-fork-tree][data-sequences='3'] .kv-branch").last
        branch.locator(".kv-chip").nth(2).wait_for()
        text = page.locator(".kv-text")
        before = text.inner_text()
        branch.locator(".kv-branch-label").click()
        name = (branch.locator(".kv-branch-label").inner_text()).split(" · ")[0]
        expect(text).to_contain_text(f"{name};")
        assert text.inner_text() != before
        page.close()


# -- two people, one question ------------------------------------------------------------------------------------------


def two_ask(arrive: Callable[[], Any]) -> tuple[Any, Any]:
    anna, ben = arrive(), arrive()
    anna.ask(QUESTION)
    ben.ask(QUESTION)
    return anna, ben


def test_with_sharing_all_the_same_question_is_in_the_same_blocks(model: str | None, visit: Callable[..., Any]):
    settings = Settings(model=model, kv_blocks=128, sharing="all", panel_scope="full", max_output_tokens=8)
    engine = Engine(settings)
    with served(create_app(engine, settings)) as url:
        engine.wait_ready(60)
        anna, ben = two_ask(lambda: visit(url))
        for visitor in (anna, ben):
            row = visitor.page.get_by_test_id("kv-other-session")
            expect(row).to_contain_text("of text with you.")
            own = visitor.page.get_by_test_id("kv-own-table")
            expect(own).to_contain_text("of text with session")
            shared = own.locator(".kv-across")
            assert shared.count() >= 1
            shared.first.hover()
            expect(visitor.page.locator(".kv-inspector")).to_contain_text("shared by several sessions")
        for visitor in (anna, ben):
            visitor.page.close()


def test_with_sharing_system_it_is_not(site: Site, arrive: Callable[..., Any]):
    for visitor in two_ask(arrive):
        expect(visitor.page.get_by_test_id("kv-other-session")).to_have_count(1)
        assert "of text with" not in visitor.page.locator(".kv-section-table").inner_text()
        assert visitor.page.locator(".kv-across").count() == 0
