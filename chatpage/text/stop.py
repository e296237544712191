"""Stop strings, of which no character is ever sent."""

from collections.abc import Iterable


class StopStrings:
    """Lets text pass until one of the stop strings is complete; the one that is complete first counts.

    The end of the text so far is held back while it may be the beginning of a stop string. A stop string that ends in
    exempt text passes like any other; one that only begins there does not.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._exempt = 0  # so many characters of what is held were exempt
        self._met = False

    def add(self, text: str, *, exempt: bool = False) -> tuple[str, bool]:
        """Text that is safe to send, and whether a stop string was met: it and everything after it is dropped."""
        if not self._stops:
            return text, False
        if self._met:
            return "", True
        text = self._held + text
        if exempt:
            self._exempt = len(text)
        start = self._first_stop(text)
        if start is not None:
            self._held, self._met = "", True
            return text[:start], True
        safe = len(text) - self._unsure(text)
        self._held, self._exempt = text[safe:], max(0, self._exempt - safe)
        return text[:safe], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string that ends first begins (of two that end there, the longer one)."""
        found = [(at + len(stop), at) for stop in self._stops if (at := self._find(stop, text)) >= 0]
        return min(found)[1] if found else None

    def _find(self, stop: str, text: str) -> int:
        """Where a stop string begins that ends after the exempt characters; −1 for nowhere."""
        return text.find(stop, max(0, self._exempt + 1 - len(stop)))

    def _unsure(self, text: str) -> int:
        """How many characters at the end of `text` may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
