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
from chatpage.model.batch import Inputs
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
        self.embedding, self.rotary, norm, layers = parts
        self.norm = Norm(norm)
        self.head = Product([module.get_output_embeddings()])
        if len(layers) != len(calls):
            raise NotUsual("Its layers do not attend once each.")
        self.layers = [Layer(i, layer, call) for i, (layer, call) in enumerate(zip(layers, calls, strict=True))]
        self.products = [*(product for layer in self.layers for product in layer.products), self.head]

    def pack(self) -> None:
        """Lay the weights of the products out for oneDNN, where that can be; the model has none of them then, and
        computes no more. A head that is the embedding too is kept as both."""
        for product in self.products:
            product.pack(keep=self.embedding.weight)

    def forward(self, batch: Inputs, attention: Attention) -> Tensor:
        """Logits (rows, vocabulary) of each row's last token. Called in inference mode."""
        hidden = self.embedding(batch.token_ids)
        rotation = self.rotation(hidden, batch.positions)
        for layer in self.layers:
            hidden = layer(hidden, rotation, attention)
        return self.head(self.norm(hidden[batch.sampled]))

    def rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (tokens, 1, head_size), the sines with the sign that the other half enters with."""
        cos, sin = (part[0, :, None] for part in self.rotary(hidden[None], positions[None]))
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat([-first, second], dim=-1)


class Layer:
    """Attention and a feed-forward part, each behind a norm and added to what came in."""

    def __init__(self, index: int, layer: Any, call: AttentionCall) -> None:
        _require_children(layer, LAYER)
        attention = layer.self_attn
        has_norms = _require_children(attention, ATTENTION, optional=HEAD_NORMS)
        self.index, self.call = index, call
        self.size: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.size
        self._rotated = self.heads + attention.k_proj.out_features // self.size
        self.before, self.between = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.query_norm = Norm(attention.q_norm) if has_norms else None
        self.key_norm = Norm(attention.k_norm) if has_norms else None
        self.into = Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Product([attention.o_proj])
        self.mlp = _feed_forward(layer.mlp)
        self.products = [self.into, self.out, *self.mlp.products]

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """(tokens, hidden_size) to the same."""
        hidden = hidden + self.out(self.attend(self.before(hidden), rotation, attention))
        return hidden + self.mlp(self.between(hidden))

    def attend(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        heads = self.into(hidden).view(hidden.shape[0], -1, self.size)
        value = heads[:, self._rotated :]
        query, key = self.rotate(heads, rotation)
        return attention.attend(self.index, query, key, value, self.call).flatten(1)

    def rotate(self, heads: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions: each half of a head turned against the other."""
        turned = heads[:, : self._rotated]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = turned[:, : self.heads], turned[:, self.heads :]
            turned = torch.cat([self.query_norm(query), self.key_norm(key)], dim=1)
        cos, sin = rotation
        turned = torch.addcmul(turned * cos, turned.roll(self.size // 2, dims=-1), sin)
        return turned[:, : self.heads], turned[:, self.heads :]


def _feed_forward(mlp: Any) -> "GatedProduct | AsItIs":
    """One product for gate and up, where there are such; else, in a mixture of experts, the part as it is."""
    is_gated = {name for name, _ in mlp.named_children()} == GATED
    return GatedProduct(mlp) if is_gated else AsItIs(mlp)


class AsItIs:
    """A feed-forward part that is called as the model calls it."""

    def __init__(self, mlp: Any) -> None:
        self.mlp = mlp
        self.products: list[Product] = []

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden[None])[0]


class GatedProduct:
    """The feed-forward part: one product for gate and up."""

    def __init__(self, mlp: Any) -> None:
        self.activation = mlp.act_fn
        self.into, self.out = Product([mlp.gate_proj, mlp.up_proj]), Product([mlp.down_proj])
        self.products = [self.into, self.out]

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.into(hidden).chunk(2, dim=-1)
        return self.out(self.activation(gate) * up)


class Norm:
    """Root mean square normalisation."""

    def __init__(self, norm: Any) -> None:
        if getattr(norm, "bias", None) is not None:
            raise NotUsual("Its norms have a bias.")
        self.weight: Tensor = norm.weight
        self.epsilon: float = getattr(norm, "variance_epsilon", None) or norm.eps
        # The same as x / hypot(|x|, sqrt(size * epsilon)) * (sqrt(size) * weight): half as many calls on a CPU, where
        # torch has no kernel of its own for it.
        self._by_length = norm.weight.is_cpu and norm.weight.dtype == torch.float32
        self._scale = norm.weight.detach() * norm.weight.numel() ** 0.5
        self._floor = norm.weight.new_tensor((norm.weight.numel() * self.epsilon) ** 0.5)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._by_length:
            length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return hidden / torch.hypot(length, self._floor) * self._scale
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def _require_children(module: nn.Module, names: set[str], *, optional: Iterable[str] = ()) -> bool:
    """Whether it has the optional modules beside those that it must have. It may have no others, nor own parameters."""
    found = {name for name, _ in module.named_children()}
    if found not in (names, names | set(optional)) or next(module.parameters(recurse=False), None) is not None:
        raise NotUsual(f"{type(module).__name__} has {', '.join(sorted(found))}.")
    return found != names
