"""The usual decoder in fewer and larger operations: what most families compute, without a call for every small part.

    hidden ── norm ── q|k|v in one product ── RoPE ── attention ── product ──(+)── norm ── gate|up in one product ── …

Llama, Mistral, Qwen and many others are this decoder under different names. Whether a model is one is not read from its
name but tried: its modules must be named like this, and its logits must stay the same (`chatpage.model.check`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatpage.model.attention import Attention, AttentionCall
from chatpage.model.batch import Batch
from chatpage.model.product import Product

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class NotUsual(Exception):
    """The model is not the usual decoder."""


class FusedModel:
    """Computes what a usual decoder computes. It shares the model's weights, and leaves the model as it is.

    Args:
        module: the model.
        calls: how each layer asks for attention.

    Raises:
        NotUsual: modules are missing, or there are more of them.
    """

    def __init__(self, module: PreTrainedModel, calls: Sequence[AttentionCall]) -> None:
        decoder = module.get_decoder()
        parts: list[Any] = [getattr(decoder, name, None) for name in ("embed_tokens", "rotary_emb", "norm", "layers")]
        if None in parts or type(parts[0]) is not nn.Embedding:
            raise NotUsual("It has no plain embedding, one RoPE, layers and a last norm.")
        self._embedding, self._rotary, norm, layers = parts
        self._norm = _Norm(norm)
        self._head = Product([module.get_output_embeddings()])
        if len(layers) != len(calls):
            raise NotUsual("Its layers do not attend once each.")
        self._layers = [_Layer(i, layer, call) for i, (layer, call) in enumerate(zip(layers, calls, strict=True))]

    def pack(self) -> None:
        """Lay the weights of the products out for speed, where that is known to help; the model has none of them then,
        and computes no more. A head that is the embedding too is kept as both."""
        for product in (self._head, *(product for layer in self._layers for product in layer.products)):
            product.pack(keep=self._embedding.weight)

    def forward(self, batch: Batch, attention: Attention) -> Tensor:
        """Logits (rows, vocabulary) of each row's last token. Called in inference mode."""
        hidden = self._embedding(batch.token_ids)
        rotation = self._rotation(hidden, batch.positions)
        for layer in self._layers:
            hidden = layer(hidden, rotation, attention)
        return self._head(self._norm(hidden[batch.sampled]))

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens, 1, head_size), the sines with the sign that the other half enters with."""
        cos, sin = (part[0, :, None] for part in self._rotary(hidden[None], positions[None]))
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat([-first, second], dim=-1)


class _Layer:
    """Attention and a feed-forward part, each behind a norm and added to what came in."""

    def __init__(self, index: int, layer: Any, call: AttentionCall) -> None:
        _require_children(layer, LAYER)
        attention = layer.self_attn
        has_norms = _require_children(attention, ATTENTION, optional=HEAD_NORMS)
        self._index, self._call = index, call
        self._size: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._size
        self._rotated = self._heads + attention.k_proj.out_features // self._size
        self._before, self._between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._query_norm = _Norm(attention.q_norm) if has_norms else None
        self._key_norm = _Norm(attention.k_norm) if has_norms else None
        self._in = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self._out = Product([attention.o_proj])
        self._mlp = _feed_forward(layer.mlp)
        self.products = [self._in, self._out, *self._mlp.products]

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """(tokens, hidden_size) to the same."""
        hidden = hidden + self._out(self._attend(self._before(hidden), rotation, attention))
        return hidden + self._mlp(self._between(hidden))

    def _attend(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        heads = self._in(hidden).view(hidden.shape[0], -1, self._size)
        value = heads[:, self._rotated :]
        query, key = self._rotate(heads, rotation)
        call = self._call
        answer = attention.attend(
            self._index,
            query,
            key,
            value,
            scaling=call.scaling,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
        )
        return answer.flatten(1)

    def _rotate(self, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions: each half of a head turned against the other."""
        turned = heads[:, : self._rotated]
        if self._query_norm is not None and self._key_norm is not None:
            query, key = turned[:, : self._heads], turned[:, self._heads :]
            turned = torch.cat([self._query_norm(query), self._key_norm(key)], dim=1)
        cos, sin = rotation
        turned = torch.addcmul(turned * cos, turned.roll(self._size // 2, dims=-1), sin)
        return turned[:, : self._heads], turned[:, self._heads :]


def _feed_forward(mlp: Any) -> "_GatedProduct | _AsItIs":
    """One product for gate and up, where there are such; else, in a mixture of experts, the part as it is."""
    is_gated = {name for name, _ in mlp.named_children()} == GATED
    return _GatedProduct(mlp) if is_gated else _AsItIs(mlp)


class _AsItIs:
    """A feed-forward part that is called as the model calls it."""

    def __init__(self, mlp: Any) -> None:
        self._mlp = mlp
        self.products: list[Product] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._mlp(hidden[None])[0]


class _GatedProduct:
    """The feed-forward part: one product for gate and up."""

    def __init__(self, mlp: Any) -> None:
        self._activation = mlp.act_fn
        self._in, self._out = Product([mlp.gate_proj, mlp.up_proj]), Product([mlp.down_proj])
        self.products = [self._in, self._out]

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self._in(hidden).chunk(2, dim=-1)
        return self._out(self._activation(gate) * up)


class _Norm:
    """Root mean square normalisation."""

    def __init__(self, norm: Any) -> None:
        if getattr(norm, "bias", None) is not None:
            raise NotUsual("Its norms have a bias.")
        self._weight: Tensor = norm.weight
        self._epsilon: float = getattr(norm, "variance_epsilon", None) or norm.eps
        # The same as x / hypot(|x|, sqrt(size * epsilon)) * (sqrt(size) * weight): half as many calls on a CPU, where
        # torch has no kernel of its own for it.
        self._by_length = norm.weight.is_cpu and norm.weight.dtype == torch.float32
        self._scale = norm.weight.detach() * norm.weight.numel() ** 0.5
        self._floor = norm.weight.new_tensor((norm.weight.numel() * self._epsilon) ** 0.5)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._by_length:
            length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return hidden / torch.hypot(length, self._floor) * self._scale
        return F.rms_norm(hidden, self._weight.shape, self._weight, self._epsilon)


def _require_children(module: nn.Module, names: set[str], *, optional: Iterable[str] = ()) -> bool:
    """Whether it has the optional modules beside those that it must have. It may have no others, nor own parameters."""
    found = {name for name, _ in module.named_children()}
    if found not in (names, names | set(optional)) or next(module.parameters(recurse=False), None) is not None:
        raise NotUsual(f"{type(module).__name__} has {', '.join(sorted(found))}.")
    return found != names
