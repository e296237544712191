"""Rotary positions that a model would choose anew in each step, by the longest sequence in it, are chosen once.

transformers does that for two kinds of RoPE (`dynamic_rope_update`). Beside a longer sequence a short one's keys would
then no longer go with those that are in the pool. So the frequencies are pinned at load:

longrope    two sets, for contexts up to the original length and for longer ones; the latter only where they are wished
dynamic     one set up to the configured length; for longer contexts that are wished, what fits exactly their length
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PINNED = "pinned"  # a kind that transformers leaves alone


def pin(module: nn.Module, positions: int, wished: int | None) -> tuple[int, list[str]]:
    """Pin the frequencies of every layer.

    Args:
        positions: tokens of a context, as the configuration says.
        wished: length of contexts that is asked for.

    Returns:
        How long contexts may be, and notes on why.
    """
    limit, notes = positions, []
    for part, layer_type, kind in _rotary(module):
        rope = part.config.rope_parameters if layer_type is None else part.config.rope_parameters[layer_type]
        if kind == "longrope":
            limit, note = _longrope(part, layer_type, rope, positions, wished)
        else:
            limit, note = _dynamic(part, layer_type, rope, positions, wished)
        if note and note not in notes:
            notes.append(note)
    return limit, notes


def _rotary(module: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """The parts that would choose again, the type of layer where they keep frequencies for several, and how."""
    for part in module.modules():
        kinds = getattr(part, "rope_type", None)
        for layer_type, kind in list(kinds.items()) if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield part, layer_type, kind


def _longrope(
    part: Any, layer_type: str | None, rope: dict[str, Any], positions: int, wished: int | None
) -> tuple[int, str]:
    original = rope["original_max_position_embeddings"]
    if wished is None or wished <= original:
        _pin(part, layer_type, "longrope", original)
        return min(positions, original), (
            f"Contexts end at {original} tokens: past them this model (longrope) uses other positions for all; "
            f"--max-model-len chooses those, up to {positions}."
        )
    _pin(part, layer_type, "longrope", original + 1)
    return (
        positions,
        f"Contexts of all lengths get the positions that are meant for more than {original} tokens (longrope).",
    )


def _dynamic(
    part: Any, layer_type: str | None, rope: dict[str, Any], positions: int, wished: int | None
) -> tuple[int, str | None]:
    longest = int(positions * rope["factor"])
    if wished is None or wished <= positions:
        _pin(part, layer_type, "dynamic", positions)
        return positions, None
    length = min(wished, longest)
    _pin(part, layer_type, "dynamic", length)
    return length, f"Contexts of all lengths get the positions that are meant for {length} tokens (dynamic RoPE)."


def _pin(part: Any, layer_type: str | None, kind: str, length: int) -> None:
    """Give a part the frequencies of a sequence of this length."""
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    frequencies = getattr(part, name)
    chosen, _ = ROPE_INIT_FUNCTIONS[kind](part.config, frequencies.device, seq_len=length, layer_type=layer_type)
    with torch.no_grad():
        frequencies.copy_(chosen)
    if layer_type is None:
        part.rope_type = PINNED
    else:
        part.rope_type[layer_type] = PINNED
