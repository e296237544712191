"""The usual decoder on a GPU: matrix products by cuBLAS, and one kernel for all that lies between two of them.

add, norm ── q|k|v ── norms of heads, RoPE, store ── attention ── product ── add, norm ── gate|up ── gate ── product
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from chatpage.kernels.angles import angles
from chatpage.kernels.gate import gate
from chatpage.kernels.norm import add_and_norm
from chatpage.kernels.rotate import Turn
from chatpage.model.attention import Attention
from chatpage.model.batch import Inputs
from chatpage.model.fused import FusedModel, GatedProduct, Layer
from chatpage.model.paged import KernelAttention

Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `FusedModel.rotation`

TRIED = (0, 1, 5, 17, 127, 1000, 4095, 100_000)  # positions at which two rotations are compared
ROUNDING = 1e-5


class KernelModel:
    """Computes what a fused model computes, in fewer launches.

    Args:
        fused: whose weights it shares.
    """

    def __init__(self, fused: FusedModel) -> None:
        self._fused = fused
        self._rotation = _rotation_by_kernel(fused) or fused.rotation

    def forward(self, batch: Inputs, attention: Attention) -> Tensor:
        """Logits (rows, vocabulary) of each row's last token. Called in inference mode."""
        fused = self._fused
        hidden, more = fused.embedding(batch.token_ids), None
        rotation = self._rotation(hidden, batch.positions)
        for layer in fused.layers:
            hidden, normed = add_and_norm(hidden, more, layer.before.weight, layer.before.epsilon)
            more = layer.out(self._attend(layer, normed, rotation, attention))
            hidden, normed = add_and_norm(hidden, more, layer.between.weight, layer.between.epsilon)
            more = self._feed_forward(layer, normed)
        last = batch.sampled
        added = None if more is None else more[last]
        _, normed = add_and_norm(hidden[last], added, fused.norm.weight, fused.norm.epsilon)
        return fused.head(normed, batch.logits)

    @staticmethod
    def _attend(layer: Layer, normed: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        if not isinstance(attention, KernelAttention):
            return layer.attend(normed, rotation, attention)
        heads = layer.into(normed).view(len(normed), -1, layer.size)
        cos, sin = (part[:, 0].contiguous() for part in rotation)  # as it is, where a kernel made it
        turn = Turn(cos, sin)
        if layer.query_norm and layer.key_norm:
            turn = Turn(cos, sin, layer.query_norm.weight, layer.key_norm.weight, layer.query_norm.epsilon)
        query = attention.turn_and_store(layer.index, heads, turn)
        return attention.read(layer.index, query, layer.call).flatten(1)

    @staticmethod
    def _feed_forward(layer: Layer, normed: Tensor) -> Tensor:
        mlp = layer.mlp
        if isinstance(mlp, GatedProduct) and isinstance(mlp.activation, SiLUActivation | nn.SiLU):
            return mlp.out(gate(mlp.into(normed)))
        return mlp(normed)


@torch.inference_mode()
def _rotation_by_kernel(fused: FusedModel) -> Rotation | None:
    """One kernel for what takes the model's own module ten, if it gives the same; else None."""
    frequencies = getattr(fused.rotary, "inv_freq", None)
    scaling = getattr(fused.rotary, "attention_scaling", 1.0)
    if frequencies is None or frequencies.dim() != 1:
        return None

    def rotation(hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = angles(positions, frequencies, scaling, hidden)
        return cos[:, None], sin[:, None]

    positions = torch.tensor(TRIED, device=frequencies.device)
    for dtype in (torch.float32, fused.norm.weight.dtype):  # some turn in the precision of what they are given
        hidden = torch.zeros(len(TRIED), 1, dtype=dtype, device=frequencies.device)
        allowed = scaling * max(ROUNDING, torch.finfo(dtype).eps)
        for theirs, ours in zip(fused.rotation(hidden, positions), rotation(hidden, positions), strict=True):
            is_alike = (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
            if not (is_alike and torch.allclose(theirs, ours, rtol=0, atol=allowed)):
                return None
    return rotation
