"""What a model says is text: nothing in it runs, nothing in it makes the browser ask anybody for anything."""

import re
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from chatpage.settings import Settings
from chatpage.web.page import mount_page
from chatpage.web.page_text import plain, shown
from tests.browser.conftest import Visitor, served
from tests.browser.fake import FakeEngine

OTHER = "http://attacker.example"
HOSTILE = [
    "<script>window.pwned = 1</script>",
    f"<img src={OTHER}/1.png onerror='window.pwned = 2'>",
    f"![an image]({OTHER}/2.png)",
    f"![by reference][it]\n\n[it]: {OTHER}/3.png",
    f"[![in a link]({OTHER}/4.png)]({OTHER})",
    "<svg onload='window.pwned = 5'><image href='http://attacker.example/5.png'/></svg>",
    f"<iframe src='{OTHER}/6'></iframe><object data='{OTHER}/6'></object><embed src='{OTHER}/6'>",
    "<iframe srcdoc='<script>parent.pwned = 7</script>'></iframe>",
    f"<video src='{OTHER}/8.mp4' autoplay></video><audio src='{OTHER}/8.mp3' autoplay></audio>",
    f"<div style='background: url({OTHER}/9.png)'>styled</div>",
    f"<style>@import url({OTHER}/10.css); body {{ display: none }}</style>",
    f"<link rel=stylesheet href='{OTHER}/11.css'><meta http-equiv=refresh content='0;url={OTHER}/11'>",
    f"<form action='{OTHER}/12'><input autofocus onfocus='window.pwned = 12'></form>",
    "<details open ontoggle='window.pwned = 13'>open</details>",
    "<a href='javascript:window.pwned = 14'>click</a> [click](javascript:window.pwned=14)",
    "[data](data:text/html,<script>window.pwned=15</script>)",
    "`code`<img src=x onerror=window.pwned=16>`code`",
    "```\n</code></pre><img src=x onerror=window.pwned=17>\n```\n<img src=x onerror=window.pwned=17>",
    f"```mermaid\ngraph TD; A[<img src='{OTHER}/18.png' onerror='window.pwned = 18'>]\n```",
    f"$<img src={OTHER}/19.png>$ and $$\\href{{javascript:window.pwned=19}}{{x}} \\includegraphics{{{OTHER}/19.png}}$$",
    f"\\(<img src={OTHER}/20.png>\\) \\[\\htmlStyle{{background: url({OTHER}/20.png)}}{{x}}\\]",
    "\\\\<img src=x onerror=window.pwned=21>\\\\![x](http://attacker.example/21.png)",
    "%%%LATEX_BLOCK_0%%% $x$ ${window.pwned = 22} {{window.pwned = 22}}",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=23></style></mglyph></table></mtext></math>",
    "| a | b |\n|---|---|\n| <img src=x onerror=window.pwned=24> | ![b](http://attacker.example/24.png) |",
    "> ```\n> <b>\n<img src=x onerror=window.pwned=25>",
    f"{OTHER}/26'><input autofocus> {OTHER}/26\\<input autofocus> www.attacker.example<input autofocus>",
    f"{OTHER}/27![x]({OTHER}/27.png) {OTHER}/27\\![x]({OTHER}/27.png) a@attacker.example![x]({OTHER}/27.png)",
]
SOME = (0, 1, 5, 6, 13, 16, 21, 22, 26)  # to be drawn elsewhere than in the chat
ACTIVE = "script, iframe, object, embed, img, image, video, audio, source, style, link, meta, form, input, details"
ACTIVE_ATTRIBUTES = """
    answer => [...answer.querySelectorAll('*')].flatMap(element => [...element.attributes])
        .filter(({name, value}) => name.startsWith('on') || /^\\s*javascript:/i.test(value)).map(({name}) => name)
"""


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(reply=lambda number: HOSTILE[int(number)], delay=0.001)


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    app = Starlette(routes=[Route("/panel/panel.js", _panel)])
    with served(mount_page(app, engine, Settings(model=None))) as url:
        yield url


async def _panel(request: Request) -> Response:
    return Response("export function mount() {}", media_type="text/javascript")


@pytest.fixture(scope="module")
def talk(context, url) -> Iterator[Visitor]:
    visitor = Visitor(context, url)
    yield visitor
    assert visitor.complaints == []


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_an_answer_is_inert(number: int, talk: Visitor):
    talk.ask(str(number))
    answer = talk.page.get_by_test_id("bot").last
    assert answer.locator(ACTIVE).count() == 0
    assert answer.evaluate(ACTIVE_ATTRIBUTES) == []
    for link in answer.locator("a[href]").all():
        assert link.get_attribute("href").startswith(("http://", "https://", "mailto:"))
    assert talk.page.evaluate("window.pwned") is None
    assert talk.complaints == []


def test_replies_side_by_side_are_inert(visit, url):
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_role("radio", name="2 replies").check()
    for number in SOME:
        visitor.ask(str(number))
        replies = visitor.page.get_by_role("group", name=re.compile("^Reply"))
        assert replies.count() == 2
        assert replies.locator(ACTIVE).count() == 0
        for reply in replies.all():
            assert reply.evaluate(ACTIVE_ATTRIBUTES) == []
    assert visitor.page.evaluate("window.pwned") is None


def test_beams_are_inert(visit, url, engine, monkeypatch):
    """What a model searches for is text too, down to what Gradio would take for a template."""
    monkeypatch.setattr(engine, "delay", 0.05)
    visitor = visit(url)
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_text("Beam search", exact=True).click()
    visitor.page.get_by_label("Beam width").wait_for()
    beams = visitor.page.locator("#beams section")
    beams.evaluate("""section => new MutationObserver(() => {
        if (section.querySelector('li')) window.drawn = section.textContent
    }).observe(section, {childList: true, subtree: true, characterData: true})""")
    for number in SOME:
        visitor.page.evaluate("window.drawn = ''")
        visitor.ask(str(number))
        drawn, words = visitor.page.evaluate("window.drawn"), HOSTILE[number].split()
        assert all(word in drawn for word in words[: len(words) // 2]), "as it stands"
        assert visitor.page.locator("#beams").locator(ACTIVE).count() == 0
    assert visitor.page.evaluate("window.pwned") is None


def test_nothing_is_fetched_from_elsewhere_whatever_is_drawn(context, url):
    """The second wall: were an image ever drawn, it would not be fetched."""
    asked: list[str] = []

    async def elsewhere(scope, receive, send) -> None:
        asked.append(scope["type"])

    with served(elsewhere) as other:
        asked.clear()
        visitor = Visitor(context, url)
        with visitor.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            visitor.page.evaluate("url => document.body.append(Object.assign(new Image(), {src: url}))", other)
        visitor.page.wait_for_timeout(200)
        visitor.page.close()
        assert asked == []


def test_nothing_leaves_its_message_whatever_is_drawn(talk: Visitor):
    """The second wall: were a styled element ever drawn, it would not cover the page."""
    talk.ask("0")
    content = talk.page.get_by_test_id("bot").last.locator(".message-content")
    cover = """content => {
        const cover = document.createElement('div')
        cover.style = 'position: fixed; inset: 0; z-index: 99999'
        content.append(cover)
        const inner = cover.getBoundingClientRect(), outer = content.getBoundingClientRect()
        cover.remove()
        return [inner.width <= outer.width, inner.height <= outer.height]
    }"""
    assert content.evaluate(cover) == [True, True]


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a < b and 1<2", "a < b and 1<2"),
        ("a <b> tag", "a &lt;b> tag"),
        (r"an escaped \<b>", "an escaped &lt;b>"),
        (r"a backslash \\<b>", r"a backslash \\&lt;b>"),
        ("`<b>` and ``a ` <b>``", "`<b>` and ``a ` <b>``"),
        ("an open ` and <b>", "an open ` and &lt;b>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("1. ```\n   <b>\n   ```\n<b>", "1. ```\n   <b>\n   ```\n&lt;b>"),
        ("```\n<b>", "```\n<b>"),
        ("![x](y)! [z](w)", r"\![x](y)! [z](w)"),
        ("it costs $5 and $10", "it costs $5 and $10"),
        ("for $n$ of $a<b$, $5", r"for \(n\) of \(a<b\), $5"),
        ("$$a<b$$ <b>", "$$a<b$$ &lt;b>"),
        ("```mermaid\ngraph\n```", "``` mermaid\ngraph\n```"),
        ("  indented\n\n    code", "  indented\n\n    code"),
    ],
)
def test_what_is_drawn(text: str, source: str):
    assert shown(text) == source


@pytest.mark.parametrize("text", ["a <b> tag", "`<b>` and <i>", "![x](y)", "a < b", "```\n<b>\n```\n<b>", "plain"])
def test_an_edited_message_is_what_was_typed(text: str):
    assert plain(shown(text)) == text
