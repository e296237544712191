"""A tiny random checkpoint of any family of transformers, and what its own `generate` answers.

    python -m tests.families FOLDER llama mixtral …

makes FOLDER/llama/ with a checkpoint and answers.json in it, and so on, and never imports chatpage.
"""

import dataclasses
import json
import sys
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.checkpoints import COMMON, FAMILIES, SPECIAL_TOKENS, VOCAB_SIZE, save

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

ANSWER = 20
PROMPTS = (37, 5, 23, 52)  # lengths: most are past every window, none is a multiple of a block

# The value of a field that a family has no place for.
LEFT_OUT = object()

# Small values of fields that many configuration classes have; a family gets those that its class declares.
SMALL: dict[str, Any] = {
    # Windows shorter than the prompts, on some layers where the family allows it.
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 8,
    # Few experts, and small ones.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "expert_ffn_hidden_size": 32,
    "router_hidden_size": 16,
    "first_k_dense_replace": 1,
    # Recurrent parts.
    "mamba_n_heads": 4,
    "mamba_d_head": 24,
    "mamba_d_state": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Others' names of the common fields.
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "d_model": 48,
    "d_inner": 96,
    "ffn_dim": 96,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "is_decoder": True,
}

# Multi-head latent attention: keys are longer than values.
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# Sparse attention with an indexer that chooses fewer keys than the prompts have.
INDEXED = LATENT | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
# One layer with a window, one without, and one more with.
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# For families that take the head size from the others: 64 / 4 = 16.
WIDE = {"hidden_size": 64}
# Wide enough for all the prompts, where layers do not hand their window over: contexts end at it.
NOT_HANDED_OVER = 80
# What only these tokenizers add to every vocabulary.
ROOM = {"vocab_size": VOCAB_SIZE + 8}
LINEAR_LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}

# What a family needs besides COMMON, SMALL, and its entry in tests/checkpoints.py.
OWN: dict[str, dict[str, Any]] = {
    "afmoe": MIXED_LAYERS,
    "axk1": LATENT,
    "axk2": INDEXED,
    "bailing_hybrid": LATENT | LINEAR_LAYERS,
    "beam": MIXED_LAYERS,
    "cohere2": MIXED_LAYERS,
    "cohere2_moe": MIXED_LAYERS,
    "cohere_compass_text": MIXED_LAYERS
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "cwm": MIXED_LAYERS,
    "dbrx": WIDE
    | {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED,
    "dots1": MIXED_LAYERS,
    "dots3_note_text": INDEXED,
    "exaone4": MIXED_LAYERS,
    "exaone_moe": MIXED_LAYERS,
    "falcon_h1": {"mamba_d_ssm": 96, "mamba_n_heads": 4, "mamba_d_head": 24},
    "falcon": {"head_dim": LEFT_OUT, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": MIXED_LAYERS,
    "gemma3_text": MIXED_LAYERS,
    # The last layer uses the keys and values of an earlier one.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": None,
        "laurel_rank": 8,
    },
    # Layers without a window have larger heads, and no values of their own.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 8,
        "num_experts": None,
        "moe_intermediate_size": None,
    },
    "gemma4_unified_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "global_head_dim": 32,
    },
    "git": {"vision_config": VISION},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {
        "num_hidden_layers": LEFT_OUT,
        "num_attention_heads": LEFT_OUT,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_oss": MIXED_LAYERS,
    "granite_swa": MIXED_LAYERS,
    "granitemoe_swa": MIXED_LAYERS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4},
    "hy_v4": INDEXED,
    "jetmoe": {"kv_channels": 16},
    "kolibri1": MIXED_LAYERS,
    "flint": MIXED_LAYERS,
    "laguna": MIXED_LAYERS,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {
        "attention_chunk_size": NOT_HANDED_OVER,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "kimi_linear": LATENT | LINEAR_LAYERS,
    "longcat_flash": LATENT | {"num_layers": 2, "num_hidden_layers": 2, "ffn_hidden_size": 96, "zero_expert_num": 2},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 2, "state_size": 4},
    "mellum": MIXED_LAYERS,
    "mimo_v2_flash": MIXED_LAYERS | {"v_head_dim": 12},
    "minicpm3": LATENT,
    # Sparse attention over blocks on the last layer, fewer than the prompts have.
    "minimax_m3_vl_text": {
        "rotary_dim": 8,
        "layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": MIXED_LAYERS,
    "modernbert-decoder": MIXED_LAYERS | WIDE | {"local_attention": 8},
    "moshi": {"sliding_window": NOT_HANDED_OVER, "num_codebooks": 1, "audio_vocab_size": 32},
    "olmo3": MIXED_LAYERS,
    "opt": {"word_embed_proj_dim": 48},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "phi4_multimodal": {
        "head_dim": 12,
        "vision_config": VISION | {"crop_size": 28},
        "audio_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 48,
            "nemo_conv_channels": 16,
            "depthwise_separable_out_channel": 48,
        },
    },
    "phimoe": {"head_dim": 12, "sliding_window": NOT_HANDED_OVER},
    "prophetnet": {"num_hidden_layers": LEFT_OUT},
    "qwen2": MIXED_LAYERS | ROOM,
    "qwen2_moe": MIXED_LAYERS | {"sliding_window": NOT_HANDED_OVER},
    "qwen3": MIXED_LAYERS,
    "qwen3_next": LINEAR_LAYERS,
    "qwen3_5_text": LINEAR_LAYERS,
    "qwen3_5_moe_text": ROOM | LINEAR_LAYERS,
    "qwen4_exp_text": LINEAR_LAYERS,
    "reformer": {"attn_layers": ["local", "local"], "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 32]},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "vaultgemma": MIXED_LAYERS,
    "xlnet": {"max_position_embeddings": LEFT_OUT, "d_head": 12},
    "xmod": {"default_language": "en_XX"},
    "youtu": LATENT,
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba"], "layer_types": LEFT_OUT},
    "zaya": {"num_experts_per_tok": 1},
    "bitnet": WIDE,
    "gpt_neox_japanese": WIDE,
    "helium": WIDE,
    "olmoe": WIDE,
    "persimmon": WIDE,
    "stablelm": WIDE,
    "codegen": {"n_embd": 64, "rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"attention_window_size": 8},
}

# Families with more than text: the towers are small, and the language model is that of another entry.
WITH_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "dots3_note": ("dots3_note_text", {}),
    "gemma3": ("gemma3_text", {"vision_config": VISION, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", {"vision_config": VISION, "audio_config": None}),
    "gemma4_unified": ("gemma4_unified_text", {"vision_config": VISION, "audio_config": None}),
    "got_ocr2": ("qwen2", {"vision_config": VISION | {"output_channels": 48, "mlp_dim": 96}}),
    "llama4": ("llama4_text", {"vision_config": VISION | {"vision_output_dim": 48}}),
    "qwen3_5": ("qwen3_5_text", {"vision_config": {"depth": 1, "hidden_size": 48, "num_heads": 4}}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {"vision_config": {"depth": 1, "hidden_size": 48, "num_heads": 4}}),
}


def configuration(family: str, **config: Any) -> PreTrainedConfig:
    """A family's tiny configuration; `config` overrides some of its fields.

    Raises:
        Exception: of any kind, where transformers refuses it.
    """
    return AutoConfig.for_model(family, **(_fields(family) | config))


def _fields(family: str) -> dict[str, Any]:
    if family in WITH_TEXT:
        text, rest = WITH_TEXT[family]
        return {"tie_word_embeddings": False, "text_config": {"model_type": text, **_fields(text)}, **rest}
    declared = {field.name for field in dataclasses.fields(cast(Any, CONFIG_MAPPING[family]))}
    small = {name: value for name, value in SMALL.items() if name in declared}
    every = COMMON | small | FAMILIES.get(family, {}) | OWN.get(family, {})
    return {name: value for name, value in every.items() if value is not LEFT_OUT}


def make_family(family: str, folder: str | Path, **config: Any) -> Path:
    """Save a random checkpoint of any type of `TYPES` to `folder`, unless it is there already; its path."""
    return save(configuration(family, **config), folder)


def prompts() -> list[list[int]]:
    """Noise."""
    random = Random(0)
    return [random.choices(range(len(SPECIAL_TOKENS), VOCAB_SIZE), k=length) for length in PROMPTS]


def generate(folder: Path) -> list[list[int]]:
    """Greedy answers of transformers, with its own attention, to each of the prompts by itself."""
    model = cast(Any, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32))
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def main(folder: str, *families: str) -> None:
    torch.set_num_threads(1)
    for family in families:
        answers = generate(make_family(family, Path(folder) / family))
        (Path(folder) / family / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
