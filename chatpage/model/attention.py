"""Where transformers and the paged pool meet: `forward` calls the model, and its layers call `attend` back.

The model is driven without a cache and without masks of its own: positions say where each token belongs, and whoever
attends knows which keys it may see. Who that is, the step says in `forward`; nothing is passed through the model.
"""

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from chatpage.errors import ModelError
from chatpage.model.batch import Inputs

# Not a name with "flash" in it, or of the form "org/name": transformers takes those for kernels that it must load.
NAME = "chatpage"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How a layer asks for attention.

    Attributes:
        scaling: factor on the scores.
        window: a token sees so many tokens, itself included; None is all before it.
        softcap: scores s become softcap * tanh(s / softcap).
        sinks: (heads,), one more score in each softmax, which takes its share and gives nothing.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Attention(Protocol):
    """Attends for all layers of one step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Answers (tokens, heads, value_size) to the queries (tokens, heads, key_size) of one layer.

        Args:
            layer: which one, counted by their calls: a layer that attends twice, or runs twice, is two.
            key, value: of the same tokens, (tokens, kv_heads, key_size or value_size), not in the pool yet.
        """
        ...


# Tensors that some models hand to attention without need.
_KNOWN_TENSORS = {"position_ids", "cache_position", "logits_to_keep"}

_current = threading.local()


@contextmanager
def attending(attention: Attention) -> Iterator[None]:
    """Let `attention` answer what the layers of one forward ask."""
    _current.attention = attention
    _current.layer = 0
    try:
        yield
    finally:
        del _current.attention, _current.layer


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: query (1, heads, tokens, key_size) to (1, tokens, heads, value_size)."""
    if attention_mask is not None:
        raise ModelError(
            f"{type(module).__name__} builds an attention mask of its own, which paged attention cannot obey."
        )
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _KNOWN_TENSORS:
            raise ModelError(f"{type(module).__name__} attends by its own {name}, which paged attention does not know.")
    layer = _current.layer
    _current.layer += 1
    out = _current.attention.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        AttentionCall(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux),
    )
    return out[None], None


# No mask function goes with the name: transformers then builds no mask at all.
AttentionInterface.register(NAME, attend)


def forward(module: PreTrainedModel, batch: Inputs, attention: Attention) -> Tensor:
    """Run the model on the batch: logits (draws, vocabulary) of the sampled tokens. Called in inference mode."""
    with attending(attention):
        return logits_at(module, batch.token_ids[None], batch.positions[None], batch.sampled)[0]


def logits_at(module: PreTrainedModel, token_ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """Logits (sequences, wanted, vocabulary) of some of the tokens of each sequence, without any cache.

    `wanted` is a tensor of indices always: some models do other things when it is a number.
    """
    inputs = {"input_ids": token_ids, "position_ids": positions, "use_cache": False}
    if _keeps_some_logits(type(module)):
        return module(**inputs, logits_to_keep=wanted).logits
    return module(**inputs).logits[:, wanted]


@cache
def _keeps_some_logits(kind: type[PreTrainedModel]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
