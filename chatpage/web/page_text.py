"""What the page writes: messages made safe to draw, and the line that says how an answer is doing."""

import re
import time
from typing import Any

from chatpage.schedule.request import Delta

# The parts of a Markdown text that are drawn as they stand: fenced blocks (an open one reaches to the end), code spans
# and formulas. What is none of these is prose.
_VERBATIM = re.compile(
    r"""
      (?P<fence>
        ^ [ \t>]* (?: [-*+][ \t]+ | \d+[.)][ \t]+ )?  (?P<ticks> `{3,} | ~{3,} )
        .*?  (?: ^ [ \t>]* (?P=ticks) [`~]* [ \t]* $ | \Z )
      )
    | (?P<code> (?<!`) (?P<tick> `+ ) (?!`) .+? (?<!`) (?P=tick) (?!`) )
    | (?P<formula> \$\$ .+? \$\$ | \\\( .+? \\\) | \\\[ .+? \\\] )
    | (?<! [\\$\w] ) \$ (?P<inline> [^\s$] (?: [^$\n]* [^\s$\\] )? ) \$ (?! [\d$] )
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
_TAG = re.compile(r"(\\*)<(?=[A-Za-z/!?])")
_IMAGE = re.compile(r"(\\*)!(?=\[)")
_MERMAID = re.compile(r"([`~])(?=mermaid\b)")


def shown(text: str) -> str:
    """The Markdown source that draws `text` with no HTML element and no image of its own.

    Tags appear as they were written, images as links that nobody follows by themselves, so that drawing an answer
    never makes the browser ask another host for anything. Diagrams stay code. Formulas between single dollar signs
    are rewritten as \\(…\\), so that prices are not taken for formulas.
    """
    parts, end = [], 0
    for match in _VERBATIM.finditer(text):
        parts += [_escape(text[end : match.start()]), _verbatim(match)]
        end = match.end()
    return "".join(parts) + _escape(text[end:])


def plain(source: str) -> str:
    """The text that `shown` made `source` of: what an edited message says."""
    parts, end = [], 0
    for match in _VERBATIM.finditer(source):
        parts += [_unescape(source[end : match.start()]), match[0]]
        end = match.end()
    return "".join(parts) + _unescape(source[end:])


def _verbatim(match: re.Match[str]) -> str:
    if match["inline"] is not None:
        return rf"\({match['inline']}\)"
    if match["fence"] is not None:
        return _MERMAID.sub(r"\1 ", match[0], count=1)
    return match[0]


def _escape(prose: str) -> str:
    """Write every `<` that could open a tag as an entity, and a backslash before every `!` that could open an image.

    A backslash is not enough for the tag: a bare address before it would swallow the backslash.
    """
    prose = _TAG.sub(lambda m: _even(m[1]) + "&lt;", prose)
    return _IMAGE.sub(lambda m: _even(m[1]) + r"\!", prose)


def _unescape(prose: str) -> str:
    return _IMAGE.sub(lambda m: _even(m[1]) + "!", prose.replace("&lt;", "<"))


def _even(backslashes: str) -> str:
    """Without the one that would escape what comes next."""
    return backslashes[: len(backslashes) // 2 * 2]


def drawn(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The messages as the Chatbot takes them: as text parts, since it would strip the indent of a bare string."""
    return [
        {"role": message["role"], "content": [{"type": "text", "text": shown(message["content"])}]}
        for message in messages
    ]


class Progress:
    """Times one answer, and tells in a line how far it is."""

    def __init__(self, *, first_turn: bool) -> None:
        self._first_turn = first_turn
        self._asked = time.monotonic()
        self._began = 0.0  # when the first tokens arrived, and how many they were
        self._head = 0

    def line(self, delta: Delta) -> str:
        """What `delta` says about the answer so far."""
        if delta.completion_tokens and not self._head:
            self._began, self._head = time.monotonic(), delta.completion_tokens
        if delta.state == "queued":
            return "Queued"
        if delta.state == "preempted":
            return "Waiting for free blocks"
        if delta.state == "prefill":
            return f"Prefill {delta.computed_tokens} of {delta.prompt_tokens} tokens"
        if delta.beams:
            return " · ".join(_search(delta))
        if delta.state == "decode":
            return " · ".join(["Generating", *self._speed(delta), tokens(delta.completion_tokens)])
        return " · ".join([*_ending(delta), *_score(delta), *self._summary(delta)])

    def _speed(self, delta: Delta) -> list[str]:
        seconds = time.monotonic() - self._began
        if delta.completion_tokens == self._head or seconds < 0.2:
            return []
        return [f"{(delta.completion_tokens - self._head) / seconds:.0f} tokens/s"]

    def _summary(self, delta: Delta) -> list[str]:
        where = "from shared blocks" if self._first_turn else "already in the cache"
        found = f"{delta.cached_tokens} of {delta.prompt_tokens} prompt tokens {where}"
        if not self._head:
            return [found]
        wait = f"first token {_duration(self._began - self._asked)}"
        return [wait, *self._speed(delta), tokens(delta.completion_tokens), found]


def _ending(delta: Delta) -> list[str]:
    words = {"abort": "Stopped", "length": "Cut at the limit of tokens", "error": "Failed"}
    return [words[delta.finish_reason]] if delta.finish_reason in words else []


def _search(delta: Delta) -> list[str]:
    live = "1 live beam" if len(delta.beams) == 1 else f"{len(delta.beams)} live beams"
    return [f"Searching · {live}, {len(delta.finished)} finished", f"{tokens(len(delta.beams[0].tokens))} long"]


def _score(delta: Delta) -> list[str]:
    return [] if delta.score is None else [f"The best that was found, score {decimal(delta.score)}"]


def decimal(number: float) -> str:
    """Two decimals, with a minus as it is written."""
    return f"{number:.2f}".replace("-", "\u2212")


def tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
