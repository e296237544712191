"""What is asked of the engine, and what it hands back step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal, NamedTuple

from chatpage.errors import RequestError
from chatpage.schedule.beam import Beam, Beams, Finished
from chatpage.schedule.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]
TurnState = Literal["queued", "prefill", "decode", "preempted", "done"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, of which the first `system_tokens` are an operator's system prompt that sessions may share."""

    tokens: tuple[int, ...]
    system_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One turn.

    Attributes:
        prompt: what the model reads.
        params: how tokens are chosen.
        session: key of an open session, whose table rests when the turn ends; None releases everything at the end.
        owner: who asks, where there is no session: requests of one owner may share with each other. None is nobody.
        beams: search for the likeliest answers instead of drawing one; `params` must not ask for draws then.
    """

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    session: str | None = None
    owner: str | None = None
    beams: Beams | None = None

    def __post_init__(self) -> None:
        if self.beams is not None:
            _require_searchable(self.params)


def _require_searchable(params: SamplingParams) -> None:
    """Refuse what a beam search would have to ignore."""
    for name, neutral in {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}.items():
        value = getattr(params, name)
        if value != neutral:
            raise RequestError(
                f"{name} is {value}; with beam search, which draws nothing, it must be {neutral}.", param=name
            )
    if params.stop:
        raise RequestError("stop is not allowed with beam search; stop_token_ids is.", param="stop")
    if params.logprobs is not None:
        raise RequestError("logprobs is not allowed with beam search.", param="logprobs")


@dataclass(frozen=True, slots=True)
class Logprob:
    """A drawn token's log-probability under the model's own distribution, before temperature, penalties and filters.

    Attributes:
        top: the likeliest tokens with theirs, the likeliest first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Delta(NamedTuple):
    """What happened to one request since the last delta. A reader that is slow gets several merged into one.

    Attributes:
        state: `queued`, `prefill`, `decode` or `preempted`; `done` is the last one, and comes exactly once.
        text: characters that are certain by now: never half of one, never the head of a stop string.
        tokens: ids behind the text so far unseen, the end-of-turn token included.
        logprobs: of these tokens, where the request asked for them.
        prompt_tokens, cached_tokens: length of the prompt, and how much of it was found at first admission.
        computed_tokens: how much of the prompt has its keys and values now (prefill progress).
        completion_tokens: how many tokens were generated in all.
        finish_reason: with `done`: `stop`, `length`, `abort` (cancelled) or `error`.
        error: with `error`: one sentence.
        beams, finished: of a beam search that goes on: the live beams, the likeliest first, and those that have
            finished, the best first. All text comes with `done`.
        score: with `done`, of an answer that was searched for: see `Finished`.
    """

    state: TurnState
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    beams: tuple[Beam, ...] = ()
    finished: tuple[Finished, ...] = ()
    score: float | None = None

    @staticmethod
    def merged(deltas: "Sequence[Delta]") -> "Delta":
        """Some deltas, one after the other, as a single one."""
        if len(deltas) == 1:
            return deltas[0]
        _, texts, tokens, logprobs, *_ = zip(*deltas, strict=True)
        return deltas[-1]._replace(
            text="".join(texts),
            tokens=tuple(chain.from_iterable(tokens)),
            logprobs=tuple(chain.from_iterable(logprobs)),
        )
