"""Tokens drawn on the device: what `chatpage.model.sampler` does in rows without biases, bans and penalties.

    a row of logits     ├── tile ──┼── tile ──┼── tile ──┼── tile ──┼── tile ──┤

    measure                  ▂          ▅          ▁          █          ▄       each tile's largest, and its weight
                                                                                 (many programs a row)
    choose                                                                       (one program a row)
      greedy                                                  █                  the first tile with the row's largest
      top_k, top_p                      ▅                     █          ▄       what is above an edge, and some at it
      min_p                                                   █          ▄       and not too light
      random            0 ──────────────┬────────────────────▲┬──────────┬ 1     the tile where the row's point falls,
                                                                                 then the same among its logits

A logit weighs exp((logit − largest) / temperature), so the row's largest weighs 1. Nothing is sorted: the edge of top_k
and top_p is looked for among all the numbers that a logit can be. A pass over the row weighs what is not below each of
three of them, which leaves a quarter; it reads only tiles that reach so far up.

The order of sums does not depend on other rows, so the same logits, wishes and point give the same token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from chatpage.kernels.softmax import LOG2_E
from chatpage.kernels.target import launched_early, let_the_next_one_begin, wait_for_the_one_before

TILE = tl.constexpr(1024)  # logits
AT_ONCE = tl.constexpr(4)  # tiles that a program reads at once
MEASURE_WARPS, CHOOSE_WARPS = 4, 16

LOWEST_TEMPERATURE = tl.constexpr(1e-6)  # as in `chatpage.model.sampler`
LEAST_GOAL = tl.constexpr(1e-30)  # however little top_p is, the likeliest token is kept

# How many low bits are 0 in every number of a type, when it is written with 32 bits.
UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

# What is noted of a row, for each tile: the largest logit; the weight, against that logit at first and against the
# row's largest when passes have been made; how many logits lie at the edge; and, as whole numbers one behind the other,
# the tiles that a pass reads.
LARGEST, WEIGHT, TIES, LISTED, NOTES = (tl.constexpr(i) for i in range(5))


@triton.jit
def _load(logits, tiles, size):
    """The logits (tiles, TILE) of some tiles, −∞ behind the row's end."""
    at = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    return tl.load(logits + at, mask=at < size, other=float("-inf"))


# -- measure ----------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(temperature):
    """What differences of logits are multiplied with to be powers of 2."""
    return LOG2_E / tl.maximum(temperature, LOWEST_TEMPERATURE)


@triton.jit
def _measure(logits, stride, size, wishes, notes, TILES: tl.constexpr):
    """Note the largest logit of some tiles, +∞ where one is no number, and what they weigh if the row is random."""
    let_the_next_one_begin()
    row = tl.program_id(1)
    tiles = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    notes += row * NOTES * TILES + tiles
    numbers = _load(logits + row.to(tl.int64) * stride, tiles, size).to(tl.float32)
    largest = tl.max(tl.where(numbers == numbers, numbers, float("inf")), 1)
    tl.store(notes + LARGEST * TILES, largest)
    temperature = tl.load(wishes + row * 4)
    if temperature > 0:
        against = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)  # ∞ − ∞ is no number
        weights = tl.exp2((numbers - against[:, None]) * _scale(temperature))
        tl.store(notes + WEIGHT * TILES, tl.sum(weights, 1))


# -- passes: a row is (logits, size, largest, scale, tops, notes), `tops` (TILES,) being the tiles' largest logits -----


@triton.jit
def _list(notes, needed, TILES: tl.constexpr):
    """List the tiles that are needed, in their order; says how many."""
    one = needed.to(tl.int32)
    listed = (notes + LISTED * TILES).to(tl.pointer_type(tl.int32))
    tl.debug_barrier()  # all warps have read the notes before
    tl.store(listed + tl.cumsum(one, 0) - 1, tl.arange(0, TILES), mask=needed)
    tl.debug_barrier()
    return tl.sum(one, 0)


@triton.jit
def _next(logits, size, notes, begin, count, TILES: tl.constexpr):
    """Some tiles from place `begin` of the list on, TILES where it has ended; and their logits."""
    listed = (notes + LISTED * TILES).to(tl.pointer_type(tl.int32))
    at = begin + tl.arange(0, AT_ONCE)
    tiles = tl.load(listed + at, mask=at < count, other=TILES)
    return tiles, _load(logits, tiles, size)


@triton.jit
def _sum_from(row, first, second, third, WEIGHED: tl.constexpr, TILES: tl.constexpr):
    """How many logits are not below each of three rising numbers, or what these logits weigh."""
    logits, size, largest, scale, tops, notes = row
    from_first = tl.zeros([AT_ONCE, TILE], tl.float32)
    from_second = tl.zeros([AT_ONCE, TILE], tl.float32)
    from_third = tl.zeros([AT_ONCE, TILE], tl.float32)
    count = _list(notes, tops >= first, TILES)
    ahead = _next(logits, size, notes, 0, count, TILES)
    for begin in range(0, count, AT_ONCE):
        numbers = ahead[1].to(tl.float32)
        ahead = _next(logits, size, notes, begin + AT_ONCE, count, TILES)  # arrives while these are summed up
        weights = tl.exp2((numbers - largest) * scale) if WEIGHED else 1.0
        from_first += tl.where(numbers >= first, weights, 0.0)
        from_second += tl.where(numbers >= second, weights, 0.0)
        from_third += tl.where(numbers >= third, weights, 0.0)
    return tl.sum(from_first), tl.sum(from_second), tl.sum(from_third)


@triton.jit
def _weigh(row, edge, ties, least, TILES: tl.constexpr):
    """What the kept logits of each tile weigh, and how many of the tile's logits lie at the edge.

    Kept are the logits above the edge and the row's first `ties` at it, but none that weighs less than `least`.
    """
    logits, size, largest, scale, tops, notes = row
    needed = (tops >= edge) & (tl.exp2((tops - largest) * scale) >= least)
    count = _list(notes, needed, TILES)
    ahead = _next(logits, size, notes, 0, count, TILES)
    for begin in range(0, count, AT_ONCE):
        tiles, numbers = ahead[0], ahead[1].to(tl.float32)
        ahead = _next(logits, size, notes, begin + AT_ONCE, count, TILES)
        weights = tl.exp2((numbers - largest) * scale)
        above = tl.where((numbers > edge) & (weights >= least), weights, 0.0)
        tl.store(notes + WEIGHT * TILES + tiles, tl.sum(above, 1), mask=tiles < TILES)
        tl.store(notes + TIES * TILES + tiles, tl.sum((numbers == edge).to(tl.float32), 1), mask=tiles < TILES)
    tl.debug_barrier()
    tile = tl.arange(0, TILES)
    above = tl.load(notes + WEIGHT * TILES + tile, mask=needed, other=0.0)
    there = tl.load(notes + TIES * TILES + tile, mask=needed, other=0.0)
    kept = tl.clamp(ties - (tl.cumsum(there, 0) - there), 0.0, there)
    weight = tl.exp2((edge - largest) * scale)
    return above + tl.where(weight >= least, kept * weight, 0.0), there


# -- top_k, top_p and min_p -------------------------------------------------------------------------------------------


@triton.jit
def _key(number, UNUSED: tl.constexpr):
    """Keys are whole numbers in the order of all the numbers that a logit can be."""
    bits = tl.abs(number).to(tl.int32, bitcast=True) >> UNUSED
    return tl.where(number < 0, -bits, bits)


@triton.jit
def _number(key, UNUSED: tl.constexpr):
    size = (tl.abs(key) << UNUSED).to(tl.float32, bitcast=True)
    return tl.where(key < 0, -size, size)


@triton.jit
def _search(row, low, high, goal, WEIGHED: tl.constexpr, UNUSED: tl.constexpr, TILES: tl.constexpr):
    """The edge: the largest number from which on the logits come to `goal`; and what those above it come to.

    A logit counts 1, or what it weighs. Keys: from `low` on they come to the goal for sure, above `high` is nothing.
    """
    above = 0.0
    while low < high:
        step = ((high.to(tl.int64) - low + 3) // 4).to(tl.int32)
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        from_first, from_second, from_third = _sum_from(
            row, _number(first, UNUSED), _number(second, UNUSED), _number(third, UNUSED), WEIGHED, TILES
        )
        if from_third >= goal:
            low = third
        elif from_second >= goal:
            low, high, above = second, third - 1, from_third
        elif from_first >= goal:
            low, high, above = first, second - 1, from_second
        else:
            high, above = first - 1, from_first
    return _number(low, UNUSED), above


@triton.jit
def _filter(row, weights, top_k, top_p, min_p, UNUSED: tl.constexpr, TILES: tl.constexpr):
    """What is kept of a row whose tiles have these weights (TILES,): each wish looks at what the one before it leaves.

    Gives the edge, the ties there, what the kept logits of each tile weigh and how many of its logits lie at the edge
    (see `_weigh`). `top_k` is the number of logits at most.
    """
    _logits, size, largest, scale, tops, _notes = row
    highest = _key(largest, UNUSED)
    edge, ties = tl.full([], float("-inf"), tl.float32), top_k
    there = tl.zeros([TILES], tl.float32)
    if top_k < size:
        # Whatever k tiles reach, k logits reach.
        reached = tl.where(tl.arange(0, TILES) >= top_k - 1, tl.sort(tops, descending=True), float("-inf"))
        edge, above = _search(row, _key(tl.max(reached, 0), UNUSED), highest, top_k, False, UNUSED, TILES)
        ties = top_k - above
    if top_p < 1:
        if top_k < size:
            weights, there = _weigh(row, edge, ties, 0.0, TILES)
        total = tl.sum(weights.to(tl.float64), 0).to(tl.float32)
        # Logits lighter than this come to less than what is left out, however many there are: the edge is not among
        # them. Half of it, and a key less, for rounding.
        light = (1 - top_p) * total / top_k
        low = _key(largest + tl.log2(light / 2) / scale, UNUSED) - 1
        goal = tl.maximum(top_p * total, LEAST_GOAL)
        inner, above = _search(row, tl.maximum(low, _key(edge, UNUSED)), highest, goal, True, UNUSED, TILES)
        needed = tl.ceil((goal - above) / tl.exp2((inner - largest) * scale))
        ties = tl.minimum(needed, tl.where(inner == edge, ties, size))
        edge = inner
    if (top_k < size) | (top_p < 1) | (min_p > 0):
        weights, there = _weigh(row, edge, ties, min_p, TILES)
    return edge, ties, weights, there


# -- choose -----------------------------------------------------------------------------------------------------------


@triton.jit
def _fall(weights, goal, SIZE: tl.constexpr):
    """Where `goal` falls in the cumulated weights, never on one that is 0; and the sum of those before."""
    place = tl.arange(0, SIZE)
    last = tl.max(tl.where(weights > 0, place, 0), 0)  # for a goal that rounding brings to the end
    hit = tl.min(tl.where((tl.cumsum(weights, 0) > goal) & (weights > 0), place, last), 0)
    return hit, tl.sum(tl.where(place < hit, weights, 0.0), 0)


@triton.jit
def _random(row, top_k, top_p, min_p, point, UNUSED: tl.constexpr, TILES: tl.constexpr):
    """The token where the point falls."""
    logits, size, largest, scale, tops, notes = row
    tile = tl.arange(0, TILES)
    weights = tl.load(notes + WEIGHT * TILES + tile, mask=tops > float("-inf"), other=0.0)
    weights *= tl.exp2((tops - largest) * scale)
    top_k = tl.where(top_k > 0, tl.minimum(top_k, size), size)
    edge, ties, weights, there = _filter(row, weights, top_k, top_p, min_p, UNUSED, TILES)

    weights = weights.to(tl.float64)
    goal = point * tl.sum(weights, 0)
    hit, before = _fall(weights, goal, TILES)
    ties -= tl.sum(tl.where(tile < hit, there, 0.0), 0)  # left for this tile

    at = hit * TILE + tl.arange(0, TILE)
    numbers = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
    weights = tl.exp2((numbers - largest) * scale)
    is_tie = numbers == edge
    kept = (numbers > edge) | (is_tie & (tl.cumsum(is_tie.to(tl.float32), 0) <= ties))
    weights = tl.where(kept & (weights >= min_p), weights, 0.0).to(tl.float64)
    place, before = _fall(weights, goal - before, TILE)
    return hit * TILE + place


@triton.jit
def _greedy(logits, size, largest, tops, TILES: tl.constexpr):
    """The first token with the largest logit."""
    hit = tl.min(tl.where(tops == largest, tl.arange(0, TILES), TILES), 0)
    at = hit * TILE + tl.arange(0, TILE)
    numbers = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
    return tl.min(tl.where(numbers == largest, at, size), 0)


@triton.jit
def _choose(
    logits, stride, size, wishes, points, notes, tokens,
    UNUSED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The token of a row, −1 where its largest logit is not a finite number."""
    wait_for_the_one_before()
    index = tl.program_id(0)
    logits += index.to(tl.int64) * stride
    notes += index * NOTES * TILES
    tile = tl.arange(0, TILES)
    tops = tl.load(notes + LARGEST * TILES + tile, mask=tile * TILE < size, other=float("-inf"))
    largest = tl.max(tops, 0)
    temperature, top_k = tl.load(wishes + index * 4), tl.load(wishes + index * 4 + 1)
    top_p, min_p = tl.load(wishes + index * 4 + 2), tl.load(wishes + index * 4 + 3)
    token = tl.full([], -1, tl.int32)
    if tl.abs(largest) < float("inf"):
        if temperature > 0:
            row = (logits, size, largest, _scale(temperature), tops, notes)
            point = tl.load(points + index).to(tl.float64)
            token = _random(row, top_k, top_p, min_p, point, UNUSED, TILES)
        else:
            token = _greedy(logits, size, largest, tops, TILES)
    tl.store(tokens + index, token.to(tl.int64))


def draw(logits: Tensor, wishes: Tensor, points: Tensor, tokens: Tensor) -> None:
    """Draw a token for each row.

    Args:
        logits: (rows, vocabulary) of 32 or 16 bits, a row without gaps.
        wishes: (rows, 4) of float32, contiguous: temperature (0: the largest logit), top_k (0: all), top_p (1: all)
            and min_p (0: all).
        points: (rows,) of float64, contiguous: the row's own uniform number in [0, 1).
        tokens: (rows,) of int64, contiguous, written to: −1 where the largest logit is not a finite number.
    """
    rows, size = logits.shape
    tiles = triton.cdiv(size, TILE.value)
    room = max(AT_ONCE.value, triton.next_power_of_2(tiles))
    notes = torch.empty(rows, NOTES.value, room, dtype=torch.float32, device=logits.device)
    _measure[(triton.cdiv(tiles, AT_ONCE.value), rows)](
        logits, logits.stride(0), size, wishes, notes, room, num_warps=MEASURE_WARPS
    )
    _choose[(rows,)](
        logits, logits.stride(0), size, wishes, points, notes, tokens, UNUSED_BITS[logits.dtype], room,
        num_warps=CHOOSE_WARPS, **launched_early(),
    )  # fmt: skip
