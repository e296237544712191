"""How a request wants its tokens to be chosen, and when to end."""

from dataclasses import dataclass

from chatpage.errors import RequestError

MAX_STOPS = 4
MAX_STOP_LENGTH = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's wishes. Wrong values are refused here, by name, whatever door they came through.

    Attributes:
        temperature: 0 takes the likeliest token always (greedy); 1 is the model's own distribution.
        top_k: keep only so many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability.
        seed: the same seed gives the same draws at the same positions; None draws afresh.
        max_tokens: end after so many; None goes on to the end of the context or the server's limit.
        min_tokens: draw no token that ends the answer before there are so many.
        stop: end before any of these strings appears.
        stop_token_ids: end at any of these tokens, beside the model's own; they are not shown.
        logprobs: report each token's log-probability, and those of so many of the likeliest; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0, 2)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be greater than 0 and at most 1.", param="top_p")
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stop)} strings; at most {MAX_STOPS} are allowed.", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"stop holds {text!r}; each must be a string of 1 to {MAX_STOP_LENGTH} characters.", param="stop"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _number(name: str, value: object, low: float, high: float) -> None:
    in_range = isinstance(value, int | float) and low <= value <= high  # NaN is in no range
    if isinstance(value, bool) or not in_range:
        raise RequestError(f"{name} is {_short(value)}; it must be a number from {low} to {high}.", param=name)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {_short(value)}; it must be a whole number from {low} to {high}.", param=name)


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 128 bits"
    return repr(value)
