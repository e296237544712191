"""Positions that transformers would choose by the longest sequence of a step are the same in every step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatpage.errors import ModelError
from chatpage.model import rope
from chatpage.model.load import LoadedModel, load
from chatpage.model.step import ModelRunner
from tests.families import make_family
from tests.model.greedy import Sequence, answer, prompts, scattered_tables, their_answer

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

# Original length, and the longest context.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "longrope": ("llama", {"rope_parameters": LONG}, 64, 512),
    # With a factor on the scores that comes from the lengths.
    "phi3": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": LONG | {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
        },
        64,
        512,
    ),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, 64, 256),
    # Each type of layer has frequencies of its own.
    "by layer type": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LONG, "sliding_attention": PLAIN}},
        64,
        512,
    ),
}


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    family, config, _, _ = MODELS[kind]
    return make_family(family, tmp_path / "model", **config)


def answers(model: LoadedModel, asked: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers to all at once, in chunks of 7."""
    tables = scattered_tables(len(asked), 160 + tokens, 4, 200)
    runner = ModelRunner(model, num_blocks=200, block_size=4, max_rows=64)
    return answer(runner, [Sequence(p, t, chunk=7) for p, t in zip(asked, tables, strict=True)], tokens)


def noise(length: int) -> list[int]:
    return torch.randint(5, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def test_contexts_end_where_positions_would_change(kind: str, folder: Path) -> None:
    original = MODELS[kind][2]
    model = load(folder, device="cpu")
    assert model.max_positions == original
    assert ["longrope" in note for note in model.notes] == ([] if kind == "dynamic" else [True])


def test_short_contexts_are_as_without_long_ones(kind: str, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    asked = prompts(3)
    model = load(folder, device="cpu")
    assert answers(model, asked, 20) == [their_answer(theirs, prompt, 20) for prompt in asked]


def test_longer_contexts_that_are_wished(kind: str, folder: Path) -> None:
    """A sequence of the wished length has the positions that transformers gives it."""
    model = load(folder, device="cpu", max_model_len=150)
    assert model.max_positions == (150 if kind == "dynamic" else MODELS[kind][3])
    assert "positions that are meant for" in model.notes[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    prompt = noise(150)
    expected = theirs(torch.tensor([prompt])).logits[0, -1].argmax().item()
    assert answers(model, [prompt], 1) == [[expected]]


def test_a_long_one_beside_changes_nothing(kind: str, folder: Path) -> None:
    model = load(folder, device="cpu", max_model_len=200)
    short = prompts(2)
    alone = [answers(model, [prompt], 20)[0] for prompt in short]
    assert answers(model, [*short, noise(140)], 20)[:2] == alone
    assert len(set(alone[0])) >= 10, "too dull an answer to tell right from wrong"


def test_wishes_end_somewhere(kind: str, folder: Path) -> None:
    assert load(folder, device="cpu", max_model_len=100_000).max_positions == MODELS[kind][3]


def test_positions_that_were_not_pinned_would_be_noticed(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rope, "pin", lambda module, positions, wished: (200, []))
    with pytest.raises(ModelError, match="change a sequence's keys when another one is 200 tokens long"):
        load(folder, device="cpu")


def test_positions_that_cannot_be_pinned(tmp_path: Path) -> None:
    """phimoe chooses a factor for its positions by the longest sequence, whatever is pinned."""
    parameters = LONG | {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6, "short_mscale": 1.0, "long_mscale": 1.5}
    folder = make_family("phimoe", tmp_path / "model", rope_parameters=parameters, sliding_window=512)
    assert load(folder, device="cpu").max_positions == 64
    with pytest.raises(ModelError, match="change a sequence's keys"):
        load(folder, device="cpu", max_model_len=100)
