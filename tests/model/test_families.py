"""The engine says what transformers' own `generate` says in a process without chatpage, family by family.

Prompts longer than the windows, in chunks of 7 tokens and blocks of 4, all at once. All families that can be made are
tried by `python -m benchmarks.families --write`, which writes docs/families.md.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from chatpage.errors import ModelError
from chatpage.model import check
from chatpage.model.load import load
from tests.families import TYPES, make_family
from tests.model.families import answer, write_families

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "families.md"

NAMES = """
afmoe apertus arcee bitnet cohere cohere2 cohere2_moe cwm dbrx deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5
ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe
gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe helium hunyuan_v1_dense jetmoe llama llama4_text
longcat_flash mimo_v2_flash minimax_m2 ministral mistral mixtral modernbert-decoder moshi nanochat nemotron olmo olmo2
olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
vaultgemma
"""
FAMILIES = NAMES.split()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_families(tmp_path_factory.mktemp("families"), FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_generate(family: str, checkpoints: Path) -> None:
    expected = json.loads((checkpoints / family / "answers.json").read_text())
    assert len({token for tokens in expected for token in tokens}) >= 20, "too dull to tell right from wrong"
    tokens, _ = answer(checkpoints / family)
    assert tokens == expected


def test_the_oracle_never_sees_chatpage() -> None:
    program = "import sys, tests.families; sys.exit(any(name.split('.')[0] == 'chatpage' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("minimax_m3_vl_text", "attends by its own block_indices"),
        ("inkling_text", "attends by its own position_bias"),
        ("deepseek_v32", "cannot do without masks or a cache of their own"),
        ("lfm2", "remember more than keys and values: of 3 layers only 1 attend"),
        ("doge", "builds an attention mask of its own"),
        ("zaya", "cannot do without masks or a cache of their own"),
    ],
)
def test_families_that_would_be_wrong(family: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load(make_family(family, tmp_path / family), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [{"attention_chunk_size": 100}, {"attention_chunk_size": 333}])
def test_contexts_end_where_chunks_of_attention_would_begin(field: dict[str, int], tmp_path: Path) -> None:
    """llama4 hides whole chunks in its masks, which its layers do not hand over."""
    model = load(make_family("llama4_text", tmp_path / "llama4", **field), device="cpu")
    assert model.max_positions == field["attention_chunk_size"]
    assert "hides or forgets others" in model.notes[0]


def test_contexts_end_where_the_cache_of_generate_forgets(tmp_path: Path) -> None:
    """moshi's masks know no window, but what generate remembers has one."""
    assert load(make_family("moshi", tmp_path / "moshi", sliding_window=100), device="cpu").max_positions == 100


@pytest.mark.parametrize("handed_over", [29, 31, None])
def test_masks_are_compared_at_lengths_that_are_never_computed(handed_over: int | None, tmp_path: Path) -> None:
    """A window that a layer hands over wrongly, in a context of a million tokens."""
    folder = make_family("gemma2", tmp_path / "gemma2", sliding_window=30, max_position_embeddings=1_000_000)
    model = load(folder, device="cpu")
    assert model.max_positions == 1_000_000
    found = check.probe(model.module)
    assert check.visible(model.module, found, 1_000_000) == 1_000_000
    layer = model.module.model.layers[2].self_attn
    assert layer.sliding_window == 30
    layer.sliding_window = handed_over
    assert check.visible(model.module, found, 1_000_000) == min(30, handed_over or 30)


def test_what_comes_after_must_be_hidden() -> None:
    seen = torch.ones(1, 1, 4, 9, dtype=torch.bool)
    causal = seen.tril(5)
    assert check._is_causal(causal, 4, 9, None)
    assert not check._is_causal(seen, 4, 9, None)
    assert not check._is_causal(None, 4, 9, None)
    assert check._is_causal(causal & ~seen.tril(2), 4, 9, 3)
    assert not check._is_causal(causal & ~seen.tril(2), 4, 9, 4)
    assert not check._is_causal(torch.where(causal, 0.25, -1e9), 4, 9, None), "a bias is no mask"
    assert check._is_causal(torch.where(causal, 0.0, -1e9), 4, 9, None)


def test_the_table_is_of_this_transformers() -> None:
    """docs/families.md has every type, and at least 60 that work; made anew for another version of transformers."""
    text = TABLE.read_text(encoding="utf-8")
    assert "## Gives other answers" not in text
    works = text.split("## Works")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| `", works, re.MULTILINE)) >= 60
    if f"transformers {transformers.__version__}," in text:
        listed = re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)
        listed += re.findall(r"`([^`]+)`", text.split("## Encoder-decoders")[1])
        assert sorted(listed) == sorted(TYPES)
