"""Answers of a real GPU, by its kernels and recorded steps: transformers' own, and nothing is compiled meanwhile."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Prompt, Request
from tests.checkpoints import make
from tests.engine.desk import Desk, words
from tests.engine.harness import greedy, paused, read, start
from tests.engine.test_beams import search_as_transformers
from tests.families import ANSWER, prompts
from tests.model.families import write_families

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU runs the kernels in truth")

ROOT = Path(__file__).parents[2]
RECORDED = ["llama", "qwen2", "qwen3", "gemma2", "mistral", "glm4", "olmo2"]
UNRECORDED = ["gpt_oss", "qwen3_moe"]  # their experts ask the host in the middle of a step
FAMILIES = RECORDED + UNRECORDED


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_families(tmp_path_factory.mktemp("families"), FAMILIES)


@pytest.mark.parametrize("cut", [{"max_step_tokens": 7, "block_size": 4}, {"block_size": 16, "max_sequences": 16}])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str, cut: dict[str, Any], checkpoints: Path) -> None:
    """In float32, all prompts at once: in chunks that fit no block, and whole."""
    expected = json.loads((checkpoints / family / "answers.json").read_text())
    engine = start(checkpoints / family, device="cuda", attention="triton", **cut)
    with paused(engine):
        streams = [engine.stream(Request(Prompt(tuple(tokens)), greedy(ANSWER))) for tokens in prompts()]
    found = [read(stream).tokens for stream in streams]
    engine.stop()
    assert found == expected
    assert any("recorded" in note for note in engine.notes) == (family in UNRECORDED), engine.notes


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_searches_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = make(family, tmp_path / family)
    # Other ways than "eager" leave out soft caps in some versions of transformers.
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    search_as_transformers(Desk(folder, device="cuda", max_step_tokens=40, max_sequences=24), module)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_nothing_is_compiled_while_it_serves(family: str, tmp_path: Path) -> None:
    """Neither for a prompt of any length, nor for any number of sequences, nor for any wish."""
    folder = make(family, tmp_path / family)
    engine = start(folder, device="cuda", kv_blocks=4000, max_sequences=24, max_step_tokens=512)
    random, kinds = (
        Random(3),
        [
            greedy(20),
            SamplingParams(temperature=1, seed=1, top_p=0.9, max_tokens=30),
            SamplingParams(temperature=1, seed=2, top_k=4, min_p=0.1, repetition_penalty=1.2, logprobs=3, max_tokens=9),
        ],
    )
    system = engine.systems[0].tokens
    with compiled() as seen:
        for count, longest in ((1, 1), (1, 200), (3, 250), (24, 40), (60, 250)):
            streams = []
            with paused(engine):
                for number in range(count):
                    prompt = Prompt((*system, *words(number, random.randint(1, longest))), len(system))
                    streams.append(engine.stream(Request(prompt, random.choice(kinds))))
            assert all(read(stream).reason == "length" for stream in streams)
    engine.stop()
    assert not seen


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The names of kernels that Triton compiles meanwhile."""
    from triton import knobs

    names: list[str] = []
    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = lambda **about: names.append(about["fn"].name)
        yield names
