"""From logits to tokens.

Each draw takes one uniform number that depends on (seed, choice, position) alone, and looks up where it falls in the
row's own distribution. So neither the other rows of the batch, nor how often a sequence was preempted, change its text.
"""

import torch
from torch import Tensor

from chatpage.model.batch import Draw, Drawn

# Below this the distribution is a single token in 32-bit numbers anyway, and dividing by less would overflow.
LOWEST_TEMPERATURE = 1e-6
BROKEN = Drawn(error="The model's output was not a number (NaN or infinite).")


def sample(logits: Tensor, draws: list[Draw | None]) -> list[Drawn]:
    """What each row of the logits (draws, vocabulary) gives: the token that its draw asks for, if it asks for one.

    A row is broken where its largest logit is not a finite number.
    """
    largest, tokens = logits.max(dim=-1)
    random = {i: draw for i, draw in enumerate(draws) if draw is not None and not draw.params.greedy}
    if random:
        rows = torch.tensor(list(random), device=logits.device)
        tokens[rows] = _draw(logits[rows].float(), list(random.values()))
    finite = largest.isfinite().tolist()
    return [
        Drawn(token if draw else None) if sound else BROKEN
        for draw, token, sound in zip(draws, tokens.tolist(), finite, strict=True)
    ]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that looks random: a hash of the three."""
    state = 0
    for part in (seed, choice, position):
        state = _mix(state ^ (part & _MASK))
    return (state >> 24) * 2.0**-40


_MASK = 2**64 - 1


def _mix(state: int) -> int:
    """The step of the generator SplitMix64: every bit of the input changes about half of the output's."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _draw(logits: Tensor, draws: list[Draw]) -> Tensor:
    """The tokens (draws,) where the uniform numbers fall in the cumulated probabilities, in the vocabulary's order."""
    probabilities = _probabilities(logits, [draw.params.temperature for draw in draws])
    filtered = [i for i, d in enumerate(draws) if d.params.top_p < 1 or 0 < d.params.top_k < logits.shape[-1]]
    if filtered:
        rows = torch.tensor(filtered, device=logits.device)
        params = [draws[i].params for i in filtered]
        probabilities[rows] = _keep(probabilities[rows], [p.top_k for p in params], [p.top_p for p in params])
    cumulated = probabilities.cumsum(dim=-1, dtype=torch.float64)
    points = [uniform(draw.seed, draw.choice, draw.position) for draw in draws]
    points = torch.tensor(points, dtype=torch.float64, device=logits.device)[:, None]
    # A token of probability 0 cannot be hit: the sum does not rise there, and `right` passes over equal sums.
    return torch.searchsorted(cumulated, points * cumulated[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _probabilities(logits: Tensor, temperatures: list[float]) -> Tensor:
    heat = torch.tensor(temperatures, device=logits.device).clamp(min=LOWEST_TEMPERATURE)[:, None]
    return ((logits - logits.amax(dim=-1, keepdim=True)) / heat).softmax(dim=-1)


def _keep(probabilities: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Zero all but the top_k likeliest (0: all), and of these all but the likeliest that reach top_p of their sum."""
    device, vocabulary = probabilities.device, probabilities.shape[-1]
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    counts = torch.tensor([k if 0 < k < vocabulary else vocabulary for k in top_k], device=device)
    shares = torch.tensor(top_p, device=device)[:, None]
    kept = ordered.masked_fill(torch.arange(vocabulary, device=device) >= counts[:, None], 0.0)
    before = kept.cumsum(dim=-1) - kept
    kept = kept.masked_fill(before >= shares * kept.sum(dim=-1, keepdim=True), 0.0)
    return torch.zeros_like(probabilities).scatter_(1, tokens, kept)
