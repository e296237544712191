"""From logits to tokens.

    logits ──▶ log-probabilities, where asked for: the model's own
      │
      ├─ bias                   logit + bias
      ├─ bans                   −∞
      ├─ repetition penalty     logit / penalty, or · penalty below 0         tokens of prompt and answer
      ├─ presence, frequency    logit − presence − frequency · times drawn    tokens of the answer
      │        └──▶ greedy: the largest
      ├─ temperature            logit / temperature, then softmax
      ├─ top_k ─ top_p ─ min_p  each of what the one before leaves
      └──▶ random: where the row's uniform number falls

Beams take log-probabilities in the place of logits, pass the same steps as greedy rows, and get the likeliest tokens.

The order is that of transformers' processors (bias, repetition penalty, bans, temperature, top_k, top_p, min_p), which
knows no presence and frequency; these come after the repetition penalty as in vLLM. vLLM differs in one thing: there
min_p comes before top_p. A row goes through those of the steps that it asks for, a plain greedy row through none.

Each draw takes one uniform number that depends on (seed, choice, position) alone, and looks up where it falls in the
row's own distribution. So neither the other rows of the batch, nor how often a sequence was preempted, change its text.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chatpage.device import to_device
from chatpage.model.batch import Draw, Drawn
from chatpage.schedule.request import Logprob

# Below this the distribution is a single token in 32-bit numbers anyway, and dividing by less would overflow.
LOWEST_TEMPERATURE = 1e-6
BROKEN = Drawn(error="The model's output was not a number (NaN or infinite).")


@dataclass(frozen=True, slots=True)
class Sampled:
    """What rows gave, perhaps on a device that has not come so far yet.

    Attributes:
        tokens: (rows,), there: −1 where a row is broken.
    """

    tokens: Tensor
    _draws: list[Draw | None]
    _tokens: Tensor  # on the host
    _logprobs: "_Logprobs | None"
    _candidates: "_Candidates | None"
    _arrived: torch.cuda.Event | None

    def drawn(self) -> list[Drawn]:
        """One entry a row; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        logprobs = self._logprobs.of_rows() if self._logprobs else {}
        candidates = self._candidates.of_rows() if self._candidates else {}
        tokens = self._tokens.tolist()
        drawn = [Drawn(token if draw else None) for draw, token in zip(self._draws, tokens, strict=True)]
        for row, logprob in logprobs.items():
            drawn[row] = Drawn(tokens[row], logprob)
        for row, likeliest in candidates.items():
            drawn[row] = Drawn(candidates=likeliest)
        return [BROKEN if token < 0 else given for token, given in zip(tokens, drawn, strict=True)]


@dataclass(frozen=True, slots=True)
class InOrder:
    """What the rows of a list gave, which were computed in another order.

    Attributes:
        places: where each row of the list was.
    """

    sampled: Sampled
    places: list[int]

    def drawn(self) -> list[Drawn]:
        """One entry a row; waits for the device."""
        drawn = self.sampled.drawn()
        return [drawn[place] for place in self.places]


def begin_sampling(logits: Tensor, draws: list[Draw | None], drawn: Tensor | None = None) -> Sampled:
    """What each row of the logits (rows, vocabulary) gives: the token that its draw asks for, if it asks for one.

    A row is broken where its largest logit is not a finite number. Does not wait for the device.

    Args:
        drawn: the tokens (rows,), −1 where a row is broken, if all draws that `leaves_logits` were made already; the
            others are written to it.
    """
    tokens = tokens_of_largest(logits) if drawn is None else drawn
    is_done = _is_plain if drawn is None else leaves_logits
    wishes = {i: draw for i, draw in enumerate(draws) if draw and not draw.candidates and not is_done(draw)}
    if wishes:
        rows = _there(list(wishes), logits)
        chosen = _choose(logits[rows].float(), list(wishes.values()))
        tokens[rows] = chosen.where(tokens[rows] >= 0, -1)
    logprobs, candidates = _logprobs(logits, tokens, draws), _candidates(logits, draws)
    here = tokens.to("cpu", non_blocking=True)
    arrived = None
    if logits.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    return Sampled(tokens, draws, here, logprobs, candidates, arrived)


def tokens_of_largest(logits: Tensor) -> Tensor:
    """The token (rows,) of each row's largest logit, −1 where that is not a finite number."""
    largest, tokens = logits.max(dim=-1)
    return tokens.where(largest.isfinite(), -1)


def uniform(draws: Sequence[Draw]) -> NDArray[np.float64]:
    """For each draw a number in [0, 1) that looks random: a hash of its seed, choice and position."""
    state = np.zeros(len(draws), dtype=np.uint64)
    for parts in ([d.seed for d in draws], [d.choice for d in draws], [d.position for d in draws]):
        state = _mix(state ^ np.array(parts, dtype=np.int64).view(np.uint64))
    return (state >> np.uint64(24)).astype(np.float64) * 2.0**-40


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The step of the generator SplitMix64: every bit of the input changes about half of the output's."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _is_plain(draw: Draw) -> bool:
    """Whether the largest of the model's logits is what the draw asks for."""
    return draw.params.greedy and leaves_logits(draw)


def leaves_logits(draw: Draw) -> bool:
    """Whether the model's own logits are drawn from."""
    p = draw.params
    return not (draw.banned or p.logit_bias or p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)


def _choose(logits: Tensor, draws: list[Draw]) -> Tensor:
    """The tokens (draws,). `logits` are 32-bit, and written to."""
    _change(logits, draws)
    random = [i for i, draw in enumerate(draws) if not draw.params.greedy]
    if len(random) == len(draws):
        return _draw(logits, draws)
    tokens = logits.argmax(dim=-1)
    if random:
        rows = _there(random, logits)
        tokens[rows] = _draw(logits[rows], [draws[i] for i in random])
    return tokens


# -- what changes the logits ------------------------------------------------------------------------------------------


def _change(logits: Tensor, draws: list[Draw]) -> None:
    _add_biases(logits, draws)
    _ban(logits, draws)
    _penalize_repetition(logits, draws)
    _penalize_drawn(logits, draws)


def _add_biases(logits: Tensor, draws: list[Draw]) -> None:
    biased = [dict(draw.params.logit_bias) for draw in draws]
    if any(biased):
        biases = list(chain.from_iterable(of_row.values() for of_row in biased))
        logits[_pairs(biased, logits)] += _there(biases, logits, torch.float32)


def _ban(logits: Tensor, draws: list[Draw]) -> None:
    """Make banned tokens impossible, in those rows where something is left then; the others draw what they can."""
    banning = [i for i, draw in enumerate(draws) if draw.banned]
    if banning:
        # A configuration may name an end that its model does not know.
        known = [[token for token in draws[i].banned if token < logits.shape[-1]] for i in banning]
        rows = _there(banning, logits)
        before = logits[rows]
        after = before.index_put(_pairs(known, logits), logits.new_full((), -torch.inf))
        nothing_left = after.amax(dim=-1, keepdim=True) == -torch.inf
        logits[rows] = torch.where(nothing_left, before, after)


def _penalize_repetition(logits: Tensor, draws: list[Draw]) -> None:
    had = [draw.tokens if draw.params.repetition_penalty != 1 else () for draw in draws]
    if any(had):
        # A token that comes twice is read twice and then written twice with the same number.
        rows, tokens = _pairs(had, logits)
        penalties = _there([draw.params.repetition_penalty for draw in draws], logits, torch.float32)[rows]
        before = logits[rows, tokens]
        logits[rows, tokens] = torch.where(before < 0, before * penalties, before / penalties)


def _penalize_drawn(logits: Tensor, draws: list[Draw]) -> None:
    drawn = [Counter(draw.tokens[draw.prompt_length :]) if draw.params.penalizes_drawn else {} for draw in draws]
    if any(drawn):
        taken = [
            draw.params.presence_penalty + draw.params.frequency_penalty * times
            for draw, of_row in zip(draws, drawn, strict=True)
            for times in of_row.values()
        ]
        logits[_pairs(drawn, logits)] -= _there(taken, logits, torch.float32)


def _pairs(tokens: Sequence[Collection[int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Row and token of each token of each row."""
    rows = chain.from_iterable(repeat(i, len(of_row)) for i, of_row in enumerate(tokens))
    return (
        _there(list(rows), like),
        _there(list(chain.from_iterable(tokens)), like),
    )


# -- what draws -------------------------------------------------------------------------------------------------------


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """The tokens (draws,) where the uniform numbers fall in the cumulated probabilities, in the vocabulary's order."""
    probabilities = _probabilities(logits, [draw.params.temperature for draw in draws])
    filtered = [i for i, d in enumerate(draws) if d.params.top_p < 1 or 0 < d.params.top_k < logits.shape[-1]]
    if filtered:
        rows = _there(filtered, logits)
        params = [draws[i].params for i in filtered]
        probabilities[rows] = _keep(probabilities[rows], [p.top_k for p in params], [p.top_p for p in params])
    cut = [i for i, draw in enumerate(draws) if draw.params.min_p > 0]
    if cut:
        rows = _there(cut, logits)
        probabilities[rows] = _cut(probabilities[rows], [draws[i].params.min_p for i in cut])
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    points = _there(uniform(draws), logits, torch.float64)[:, None]
    # A token of probability 0 cannot be hit: the sum does not rise there, and `right` passes over equal sums.
    return torch.searchsorted(cumulated, points * cumulated[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _probabilities(logits: Tensor, temperatures: list[float]) -> Tensor:
    heat = _there(temperatures, logits, torch.float32).clamp(min=LOWEST_TEMPERATURE)[:, None]
    return ((logits - logits.amax(dim=-1, keepdim=True)) / heat).softmax(dim=-1)


def _keep(probabilities: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Zero all but the top_k likeliest (0: all), and of these all but the likeliest that reach top_p of their sum."""
    device, vocabulary = probabilities.device, probabilities.shape[-1]
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    counts = _there([k if 0 < k < vocabulary else vocabulary for k in top_k], probabilities)
    shares = _there(top_p, probabilities, torch.float32)[:, None]
    kept = ordered.masked_fill(torch.arange(vocabulary, device=device) >= counts[:, None], 0.0)
    before = kept.cumsum(dim=-1) - kept
    reached = (before >= shares * kept.sum(dim=-1, keepdim=True)) & (before > 0)  # the product may round to 0
    kept = kept.masked_fill(reached, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, tokens, kept)


def _cut(probabilities: Tensor, min_p: list[float]) -> Tensor:
    """Zero all that are below min_p times the likeliest."""
    lowest = _there(min_p, probabilities, torch.float32)[:, None] * probabilities.amax(dim=-1, keepdim=True)
    return probabilities.masked_fill(probabilities < lowest, 0.0)


# -- what reports -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Log-probabilities on their way to the host; `counts` says by row how many likeliest tokens are asked for."""

    counts: dict[int, int]
    tokens: Tensor
    own: Tensor
    top_tokens: Tensor
    top: Tensor

    def of_rows(self) -> dict[int, Logprob]:
        columns = zip(self.tokens.tolist(), self.own.tolist(), self.top_tokens.tolist(), self.top.tolist(), strict=True)
        return {
            row: Logprob(token, logprob, tuple(zip(likeliest[:count], theirs[:count], strict=True)))
            for (row, count), (token, logprob, likeliest, theirs) in zip(self.counts.items(), columns, strict=True)
        }


def _logprobs(logits: Tensor, tokens: Tensor, draws: list[Draw | None]) -> _Logprobs | None:
    """Where asked for: the log-probabilities of a row's token and of its likeliest ones, before anything else."""
    asked = {i: d.params.logprobs for i, d in enumerate(draws) if d is not None and d.params.logprobs is not None}
    if not asked:
        return None
    rows = _there(list(asked), logits)
    own = logits[rows].float().log_softmax(dim=-1)
    chosen = tokens[rows]
    of_tokens = own.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
    top = own.topk(min(max(asked.values()), own.shape[-1]), dim=-1)
    numbers = (chosen, of_tokens, top.indices, top.values)
    return _Logprobs(asked, *(tensor.to("cpu", non_blocking=True) for tensor in numbers))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The likeliest tokens and their scores on their way to the host; `counts` says by row how many are asked for."""

    counts: dict[int, int]
    tokens: Tensor
    scores: Tensor

    def of_rows(self) -> dict[int, tuple[tuple[int, float], ...]]:
        rows = zip(self.counts.items(), self.tokens.tolist(), self.scores.tolist(), strict=True)
        return {row: tuple(zip(tokens[:n], scores[:n], strict=True)) for (row, n), tokens, scores in rows}


def _candidates(logits: Tensor, draws: list[Draw | None]) -> _Candidates | None:
    """Where asked for: the likeliest tokens by their log-probabilities, which pass the steps that change logits."""
    asked = {i: draw for i, draw in enumerate(draws) if draw and draw.candidates}
    if not asked:
        return None
    scores = logits[_there(list(asked), logits)].float().log_softmax(dim=-1)
    _change(scores, list(asked.values()))
    counts = {i: draw.candidates for i, draw in asked.items()}
    top = scores.topk(min(max(counts.values()), scores.shape[-1]), dim=-1)
    return _Candidates(counts, *(tensor.to("cpu", non_blocking=True) for tensor in (top.indices, top.values)))


def _there(numbers: Any, like: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    return to_device(numbers, like.device, dtype)
