"""Tiny random checkpoints, saved to disk as a hub model is: weights, configuration, tokenizer with a chat template.

    folder = make("llama", tmp_path / "llama")
    AutoModelForCausalLM.from_pretrained(folder)

About 0.1 million parameters, made in well under a second, the same for the same arguments. The weights are large
enough for greedy answers to wander over the vocabulary, and for every token of the context to matter. Special tokens
are never the likeliest, so a greedy answer goes on to its limit. Head sizes differ from hidden size / heads, and
queries share keys (GQA), so that code which guesses shapes is caught.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 320

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SAMPLE_TEXT = [
    "You are a helpful assistant. You answer in short sentences, and say so when you do not know.",
    "What is a block table? It says for each block of a sequence where in the pool its keys and values are.",
    "The system prompt is shared by all the sessions: the same blocks, with a reference count.",
]

# Fields that most families share; each family may rename or add some.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    # A window shorter than any prompt on every other layer, softcaps on the scores and on the logits.
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 10.0,
        "final_logit_softcapping": 30.0,
    },
    # Attention sinks, and a window on every other layer.
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    # Keys longer than values (multi-head latent attention).
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 3,
        "n_routed_experts": 2,
        "moe_intermediate_size": 32,
    },
    # Families whose layers never call the attention function.
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 48, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 512},
    # No attention at all; and attention that sees what comes after.
    "mamba": {"state_size": 4},
    "bert": {},
    # A window that is in the mask only; and positions that depend on the longest sequence of a batch.
    "phimoe": {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "phi3": {
        "head_dim": 12,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 6,
            "long_factor": [4.0] * 6,
        },
    },
}


def make(family: str, folder: str | Path, **config: Any) -> Path:
    """Save a random checkpoint of `family` (a key of FAMILIES) to `folder`, unless it is there already; its path.

    `config` overrides fields of the configuration: `make("gemma2", folder, sliding_window=24)`.
    """
    return save(AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | config)), folder)


def save(config: PreTrainedConfig, folder: str | Path) -> Path:
    """Save a random checkpoint with this configuration to `folder`, unless it is there already; its path."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return folder
    model = AutoModelForCausalLM.from_config(config)
    _set_weights(model)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of VOCAB_SIZE tokens: every text has ids; characters outside ASCII take several."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(SAMPLE_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        extra_special_tokens=SPECIAL_TOKENS[2:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def _set_weights(model: PreTrainedModel) -> None:
    """Draw every matrix so that signals keep their size through the layers, and attention is far from even."""
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            if not any(part in name.lower() for part in ("norm", "ln_")):
                weight.copy_((0.1 if name.endswith("bias") else 0.5) * torch.randn(weight.shape, generator=random))
            continue
        std = 1.0 if any(part in name for part in ("embed", "wte", "wpe")) else 2.0 / weight.shape[-1] ** 0.5
        weight.copy_(std * torch.randn(weight.shape, generator=random))
    head = model.get_output_embeddings()
    head.weight[: len(SPECIAL_TOKENS)] = 0.0
