"""A model of a real shape with random weights, made where it runs: no checkpoint of many gigabytes is ever written.

The folder that the engine loads has a configuration, the bundled tokenizer and no weights. Inside of `serving` the
loader takes a module that is made on the spot instead of reading one; all else is as always, the checks included.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, Qwen3Config

from benchmarks.ceilings import Ceilings
from chatpage import tutor
from chatpage.model.attention import NAME

# The tokenizer knows so few of the tokens: rows beyond are shrunk, so that answers are made of tokens that have text.
SHRUNK = 0.25


def _qwen3(layers: int, hidden: int, heads: int, inner: int, *, tied: bool, vocabulary: int = 151_936) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads // 2),
        head_dim=128 if hidden > 256 else 64,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )


SHAPES = {
    "tiny": _qwen3(2, 128, 4, 256, tied=True, vocabulary=4096),
    "0.6b": _qwen3(28, 1024, 16, 3072, tied=True),
    "8b": _qwen3(36, 4096, 32, 12_288, tied=False),
}


@torch.no_grad()
def make(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The end of a turn is never the likeliest token."""
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, attn_implementation=attention)
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    head = module.get_output_embeddings().weight
    head[_tokens() :] *= SHRUNK
    head[:2] = 0.0  # the tokenizer's padding and end of turn
    return module.to(device).eval()


def _tokens() -> int:
    return len(AutoTokenizer.from_pretrained(tutor.path()))


@contextmanager
def serving(config: PreTrainedConfig, folder: Path) -> Iterator[str]:
    """A folder for `Settings.model`. What is loaded inside of this has random weights."""
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tutor.path()).save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # the loader asks that there be such a file

    def module(_source: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        return make(config, device, dtype, NAME)

    with patch("chatpage.model.load._module", module):
        yield str(folder)


@dataclass(frozen=True, slots=True)
class Limits:
    """The shortest time that a decode step of this shape could take, by what it must read and multiply.

    Attributes:
        weights: numbers that every step reads: all but an embedding of its own.
        head: those among them that only the tokens meet whose logits are wanted.
        size: bytes of a number.
    """

    config: PreTrainedConfig
    ceilings: Ceilings
    weights: int
    head: int
    size: int

    @classmethod
    def of(cls, config: PreTrainedConfig, ceilings: Ceilings, dtype: torch.dtype) -> "Limits":
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config)
        module.tie_weights()
        head = module.get_output_embeddings().weight.numel()
        unread = 0 if config.tie_word_embeddings else head
        return cls(config, ceilings, module.num_parameters() - unread, head, dtype.itemsize)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        config = self.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.size

    def private_read(self, sessions: int, shared: int, own: float) -> float:
        """Seconds, where every session reads all of its keys and values for itself."""
        return self._weights(sessions) + sessions * (shared + own) * self.kv_bytes / self.ceilings.copy

    def shared_read(self, sessions: int, shared: int, own: float) -> float:
        """Seconds, where the shared keys and values are read once for all."""
        config = self.config
        products = 4 * sessions * config.num_attention_heads * shared * config.head_dim * config.num_hidden_layers
        common = max(shared * self.kv_bytes / self.ceilings.copy, products / self.ceilings.products)
        return self._weights(sessions) + common + sessions * own * self.kv_bytes / self.ceilings.copy

    def first_token(self, before: int, tokens: int) -> float:
        """Seconds for so many tokens of one prompt, behind some that have their keys and values."""
        products = 2 * ((self.weights - self.head) * tokens + self.head)
        read = (self.weights * self.size + before * self.kv_bytes) / self.ceilings.copy
        return max(read, products / self.ceilings.products)

    def _weights(self, sessions: int) -> float:
        read, products = self.weights * self.size, 2 * self.weights * sessions
        return max(read / self.ceilings.copy, products / self.ceilings.products)
