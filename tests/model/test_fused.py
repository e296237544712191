"""The usual decoder in fewer operations: used only where it gives the same logits, and no weight is kept twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from chatpage.model import product
from chatpage.model.fused import FusedModel
from chatpage.model.load import LoadedModel, load
from tests.families import make_family

Loads = Callable[..., LoadedModel]


@pytest.fixture
def loads(tmp_path: Path) -> Loads:
    return lambda family, **config: load(
        make_family(family, tmp_path / family, **config), device="cpu", dtype="float32"
    )


def is_fused(model: LoadedModel) -> bool:
    return isinstance(fused_model(model), FusedModel)


def fused_model(model: LoadedModel) -> Any:
    return getattr(model.forward, "__self__", None)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_the_usual_decoder_is_fused(family: str, loads: Loads) -> None:
    assert is_fused(loads(family))


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gpt_oss", "cohere", "phi3"])
def test_others_stay_as_they_are(family: str, loads: Loads) -> None:
    """gemma has the usual names, and norms of its own."""
    assert not is_fused(loads(family))


@pytest.mark.parametrize("factor", ["embedding_multiplier", "residual_multiplier", "logits_scaling"])
def test_the_usual_names_are_not_enough(factor: str, loads: Loads) -> None:
    assert not is_fused(loads("granite", **{factor: 1.5}))


def test_no_weight_is_kept_twice(loads: Loads) -> None:
    """Once packed, the model has only what no product has: the embedding and the norms."""
    model = loads("llama", tie_word_embeddings=False)
    fused_model(model).pack()
    left = {name.split(".")[-2] for name, weight in model.module.named_parameters() if weight.numel()}
    products = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")} | {"lm_head"}
    others = {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}
    assert left == (others if torch.backends.mkldnn.is_available() else others | products)


@pytest.mark.parametrize("pays", [True, False])
def test_weights_are_packed_if_that_pays(pays: bool, loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatpage.model.load.packing_pays", lambda products: pays)
    model = loads("llama")
    assert is_fused(model)
    can = torch.backends.mkldnn.is_available()
    assert (pays and can) == any(not weight.numel() for weight in model.module.parameters())


def test_a_head_that_is_the_embedding_stays_as_that(loads: Loads) -> None:
    model = loads("llama", tie_word_embeddings=True)
    fused_model(model).pack()
    assert len(cast(nn.Embedding, model.module.get_input_embeddings()).weight) == model.vocab_size


def swaps_the_halves(model: FusedModel, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
    cos, sin = (part[0, :, None] for part in model.rotary(hidden[None], positions[None]))
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([first, -second], dim=-1)


def forgets_the_positions(model: FusedModel, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
    cos, sin = (part[0, :, None] for part in model.rotary(hidden[None], positions[None]))
    return torch.ones_like(cos), torch.zeros_like(sin)


@pytest.mark.parametrize("wrong", [swaps_the_halves, forgets_the_positions])
def test_what_computes_something_else_is_not_used(
    wrong: Callable[..., Any], loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedModel, "rotation", wrong)
    assert not is_fused(loads("llama"))


def test_an_error_in_it_is_no_error_of_the_model(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_joined", lambda weights: 1 / 0)
    assert not is_fused(loads("llama"))


def test_what_differs_in_long_contexts_only_is_not_used(loads: Loads) -> None:
    """ministral3 has the usual names; past the length it was trained for, it makes queries larger."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.5,
    }
    assert not is_fused(loads("ministral3", rope_parameters=rope))
