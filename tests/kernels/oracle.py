"""Paged attention as its definition says, in float64: every kernel must give the same."""

import torch
from torch import Tensor

from chatpage.model.batch import Batch


def attention(
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What a step must answer: (tokens, heads, value_size). `keys` and `values` are those of a layer of the pool."""
    answers, first = [], 0
    for row in batch.rows:
        last = first + len(row.tokens)
        blocks = [row.table[position // batch.block_size] for position in range(row.context)]
        offsets = [position % batch.block_size for position in range(row.context)]
        seen_keys, seen_values = keys[blocks, offsets].double(), values[blocks, offsets].double()
        if row.store:
            seen_keys[row.start :], seen_values[row.start :] = key[first:last].double(), value[first:last].double()
        asked = query[first:last].double()
        answer = asked.new_empty(*asked.shape[:2], seen_values.shape[2])
        at = torch.arange(row.start, row.context, device=query.device)[:, None]
        of = torch.arange(row.context, device=query.device)[None]
        unseen = of > at if window is None else (of > at) | (of <= at - window)
        heads_of_a_key = query.shape[1] // keys.shape[2]
        for head in range(query.shape[1]):
            scores = scaling * (asked[:, head] @ seen_keys[:, head // heads_of_a_key].T)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            scores[unseen] = -torch.inf
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].double().expand(len(scores), 1)], dim=1)
            weights = scores.softmax(1)[:, : row.context]
            answer[:, head] = weights @ seen_values[:, head // heads_of_a_key]
        answers.append(answer)
        first = last
    return torch.cat(answers)
