"""A checkpoint of a given shape with random weights: honest for speed, meaningless as a model."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chatpage import tutor

LLAMA_14M = LlamaConfig(
    vocab_size=16_384,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=10,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)


@torch.no_grad()
def save(config: LlamaConfig, folder: Path) -> Path:
    """Random weights in `folder`, with the bundled tokenizer. The end of a turn is never the likeliest token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=1.0 if "embed" in name else 1.5 / weight.shape[1] ** 0.5)
    model.get_output_embeddings().weight[:2] = 0.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tutor.path()).save_pretrained(folder)
    return folder
