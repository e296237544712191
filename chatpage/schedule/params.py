"""How a request wants its tokens to be chosen, and when to end."""

from dataclasses import dataclass

from chatpage.errors import RequestError

MAX_STOPS = 4
MAX_STOP_LENGTH = 64
MAX_TOKEN_IDS = 1024
MAX_REPLIES = 8
MAX_LOGPROBS = 20
MAX_BIAS = 100


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's wishes. Wrong values are refused here, by name, whatever door they came through.

    chatpage/model/sampler.py draws the order in which they act.

    Attributes:
        temperature: 0 takes the likeliest token always (greedy); 1 is the model's own distribution.
        top_k: keep only so many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability.
        min_p: keep the tokens whose probability is at least this share of the likeliest one's; 0 keeps all.
        repetition_penalty: the logit of a token that prompt or answer has already is divided by it, or multiplied if
            negative; 1 changes nothing.
        presence_penalty: is taken from the logit of a token that the answer has already.
        frequency_penalty: is taken from it once for each time that the answer has the token.
        logit_bias: (token, what is added to its logit) for some tokens.
        seed: the same seed gives the same draws at the same positions; None draws afresh.
        max_tokens: end after so many; None goes on to the end of the context or the server's limit.
        min_tokens: draw no token that ends the answer before there are so many, and let no stop string end it there.
        stop: end before any of these strings appears.
        stop_token_ids: end at any of these tokens, beside the model's own; they are not shown.
        logprobs: report each token's log-probability, and those of so many of the likeliest; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_choice()
        self._check_end()
        if self.logprobs is not None:
            require_whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    def _check_choice(self) -> None:
        require_number("temperature", self.temperature, 0, 2)
        require_whole("top_k", self.top_k, 0, 2**31 - 1)
        require_number("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise RequestError("top_p is 0; it must be greater than 0 and at most 1.", param="top_p")
        require_number("min_p", self.min_p, 0, 1)
        # Beyond these, 32-bit numbers overflow.
        require_number("repetition_penalty", self.repetition_penalty, 0.01, 100)
        require_number("presence_penalty", self.presence_penalty, -2, 2)
        require_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _require_tuple("logit_bias", self.logit_bias, MAX_TOKEN_IDS)
        for pair in self.logit_bias:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise RequestError(
                    f"logit_bias holds {shortened(pair)}; each entry must be a token and a bias.", param="logit_bias"
                )
            token, bias = pair
            require_whole("A token of logit_bias", token, 0, 2**31 - 1, param="logit_bias")
            require_number(f"The logit_bias of token {token}", bias, -MAX_BIAS, MAX_BIAS, param="logit_bias")
        if len(set(self.biased)) < len(self.biased):
            raise RequestError("logit_bias names a token twice; each may have one bias.", param="logit_bias")
        if self.seed is not None:
            require_whole("seed", self.seed, -(2**63), 2**63 - 1)

    def _check_end(self) -> None:
        require_whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            require_whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is {self.max_tokens}.",
                    param="min_tokens",
                )
        _require_tuple("stop", self.stop, MAX_STOPS)
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"stop holds {shortened(text)}; each must be a string of 1 to {MAX_STOP_LENGTH} characters.",
                    param="stop",
                )
        _require_tuple("stop_token_ids", self.stop_token_ids, MAX_TOKEN_IDS)
        for token in self.stop_token_ids:
            require_whole("A token of stop_token_ids", token, 0, 2**31 - 1, param="stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def biased(self) -> tuple[int, ...]:
        """Tokens that have a bias."""
        return tuple(token for token, _ in self.logit_bias)

    @property
    def penalizes_drawn(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.penalizes_drawn


def require_number(name: str, value: object, low: float, high: float, *, param: str | None = None) -> None:
    """Refuse what is no number from `low` to `high`. `param` is the field to blame, if `name` is not."""
    in_range = isinstance(value, int | float) and low <= value <= high  # NaN is in no range
    if isinstance(value, bool) or not in_range:
        message = f"{name} is {shortened(value)}; it must be a number from {low} to {high}."
        raise RequestError(message, param=param or name)


def require_whole(name: str, value: object, low: int, high: int, *, param: str | None = None) -> None:
    """Refuse what is no whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        message = f"{name} is {shortened(value)}; it must be a whole number from {low} to {high}."
        raise RequestError(message, param=param or name)


def _require_tuple(name: str, value: object, longest: int) -> None:
    if not isinstance(value, tuple):
        raise RequestError(f"{name} is {shortened(value)}; it must be a tuple.", param=name)
    if len(value) > longest:
        raise RequestError(f"{name} has {len(value)} entries; at most {longest} are allowed.", param=name)


def shortened(value: object) -> str:
    """A wrong value as an error may show it."""
    if isinstance(value, int) and value.bit_length() > 128:
        return "a number of more than 128 bits"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
