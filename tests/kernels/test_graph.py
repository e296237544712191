"""Whole steps as they are recorded: frames, forms and orders, with a model, against the same without any of it.

A CPU records nothing, so each size runs anew here; all else is as on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chatpage.model import graph, plan
from chatpage.model.attention import Attention
from chatpage.model.batch import Drawn, Inputs, Row
from chatpage.model.frame import Form, Frame
from chatpage.model.fused import FusedModel
from chatpage.model.fused_kernels import KernelModel, _rotation_by_kernel
from chatpage.model.graph import Graphs
from chatpage.model.load import load
from chatpage.model.paged import PagedAttention
from chatpage.model.step import Launched
from chatpage.schedule.params import SamplingParams
from tests.checkpoints import make
from tests.engine.desk import Desk, Tokens, words
from tests.engine.harness import Answer, read
from tests.kernels.conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="a GPU records steps in truth, which tests/engine/test_gpu.py looks at")

SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "max_sequences": 8,
    "max_step_tokens": 40,
    "max_model_len": 200,
    "kv_blocks": 150,
    "system_prompt": ["You know how blocks are shared, and say so in a few short words. " * 2],
}
PROMPTS: list[Tokens] = [words(length, length) for length in (1, 30, 9)]


class Replay:
    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


@dataclass
class Done:
    given: list[Drawn]

    def drawn(self) -> list[Drawn]:
        return self.given


class Anew(Graphs):
    """Notes which forms were run."""

    forms: list[Form]

    def _record(self, say: Callable[[str], None]) -> dict:
        self.forms = []
        return {size: Replay(partial(self._note_and_run, frame)) for size, frame in self._frames.items()}

    def launch(self, rows: list[Row]) -> Launched | None:
        """A CPU has what it computes at once, where the next launch will write over it."""
        launched = super().launch(rows)
        return Done(launched.drawn()) if launched else None

    def _note_and_run(self, frame: Frame) -> None:
        self.forms.append(frame.size.form)
        self._run(frame)


class Buffer:
    def __init__(self, length: int) -> None:
        self.numbers = torch.full((length,), 7, dtype=torch.int32).numpy()

    def wait(self) -> None:
        pass

    def upload(self, target: Tensor, length: int) -> None:
        target[:length] = torch.from_numpy(self.numbers[:length])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Desk]:
    """A desk whose steps are what a GPU would replay."""
    monkeypatch.setattr(graph, "Graphs", Anew)
    monkeypatch.setattr(graph, "Buffer", Buffer)
    monkeypatch.setattr(plan, "_pays", lambda *args: True)  # what is so short is shared as well

    def begin(folder: Path) -> Desk:
        desk = Desk(folder, **SETTINGS)
        runner = desk.core.runner
        fused = desk.core.loaded.fused
        if fused:
            runner._forward = KernelModel(fused).forward
        runner._attention = PagedAttention
        blocks = SETTINGS["max_model_len"] // SETTINGS["block_size"]
        runner.record_steps(max_tokens=SETTINGS["max_step_tokens"], max_blocks=blocks, say=lambda detail: None)
        return desk

    return begin


def forms(desk: Desk) -> list[Form]:
    graphs = desk.core.runner._graphs
    assert isinstance(graphs, Anew)
    return graphs.forms


def answers(desk: Desk, prompts: list[Tokens], **wishes: Any) -> list[Answer]:
    """All of them asked at once."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 5} | wishes)
    streams = [desk.submit(tokens, params=params) for tokens in prompts]
    desk.finish()
    return [read(stream) for stream in streams]


def texts(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize(("family", "overlaps"), [("llama", True), ("qwen3", False), ("gemma2", True)])
def test_recorded_steps_answer_as_plain_ones(
    family: str, overlaps: bool, recorded: Callable[[Path], Desk], tmp_path: Path
) -> None:
    """Together and one after the other: decodes alone, behind the system prompt, and beside chunks."""
    folder = make(family, tmp_path / family)
    plain, desk = Desk(folder, **SETTINGS), recorded(folder)
    desk.core.runner.overlaps = overlaps
    for prompts in (PROMPTS, PROMPTS[2:3]):
        assert texts(answers(desk, prompts)) == texts(answers(plain, prompts))
    assert {Form.MIXED, Form.SHARED, Form.ALONE} == set(forms(desk)), "not all forms have run"


def test_logits_are_computed_where_a_step_keeps_them(
    recorded: Callable[[Path], Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nothing is packed: no copy is made. What is drawn afterwards finds them there."""
    monkeypatch.setattr(FusedModel, "pack", lambda fused: None)
    forward, in_place = KernelModel.forward, []

    def watched(model: KernelModel, batch: Inputs, attention: Attention) -> Tensor:
        logits = forward(model, batch, attention)
        in_place.extend([logits is batch.logits] if batch.logits is not None else [])
        return logits

    monkeypatch.setattr(KernelModel, "forward", watched)
    folder = make("llama", tmp_path / "llama")
    plain, desk = Desk(folder, **SETTINGS), recorded(folder)
    wishes = {"repetition_penalty": 1.3}
    assert texts(answers(desk, PROMPTS, **wishes)) == texts(answers(plain, PROMPTS, **wishes))
    assert in_place
    assert all(in_place)


class Rotary(torch.nn.Module):
    """As Llama's, but for what is done with the angles (tokens, head_size / 2) in between."""

    attention_scaling = 1.0

    def __init__(self, inv_freq: Tensor, spread: Callable[[Tensor, torch.dtype], Tensor]) -> None:
        super().__init__()
        self.inv_freq, self._spread = inv_freq, spread

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = self._spread(positions[..., None] * self.inv_freq, hidden.dtype)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


@pytest.mark.parametrize(
    ("spread", "is_replaced"),
    [
        (lambda angles, dtype: torch.cat([angles, angles], -1), True),
        (lambda angles, dtype: torch.cat([angles, angles], -1).to(dtype), False),
        (lambda angles, dtype: angles.repeat_interleave(2, -1), False),
    ],
    ids=["as Llama", "in half precision", "neighbours"],
)
def test_a_rotation_is_replaced_by_one_that_is_the_same(
    spread: Callable[[Tensor, torch.dtype], Tensor], is_replaced: bool, tmp_path: Path
) -> None:
    fused = load(make("llama", tmp_path / "llama"), device="cpu", dtype="float16").fused
    assert fused
    assert _rotation_by_kernel(fused)
    fused.rotary = Rotary(fused.rotary.inv_freq, spread)
    assert bool(_rotation_by_kernel(fused)) == is_replaced


def test_a_short_chunk_behind_many_tokens_is_a_group_of_decodes(
    recorded: Callable[[Path], Desk], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("llama", tmp_path / "llama")
    plain, desk = Desk(folder, **SETTINGS), recorded(folder)
    monkeypatch.setattr(plan, "LEAST_BEFORE", len(desk.system))
    wishes: dict[str, Any] = {"temperature": 0.9, "seed": 3, "logprobs": 2}
    expected, found = (answers(each, [words(5, 5), words(6, 2)], **wishes) for each in (plain, desk))
    assert texts(found) == texts(expected)
    assert logprobs(found) == pytest.approx(logprobs(expected), abs=1e-4)
    assert Form.MIXED not in forms(desk)


def logprobs(answers: list[Answer]) -> list[float]:
    return [given.logprob for answer in answers for delta in answer.deltas for given in delta.logprobs]


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 1.3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "logit_bias": ((20, 3.0),)},
    ],
)
def test_recorded_steps_draw_as_plain_ones(
    wishes: dict[str, Any], recorded: Callable[[Path], Desk], tmp_path: Path
) -> None:
    """In the step, or after it where the logits are changed first."""
    folder = make("llama", tmp_path / "llama")
    plain, desk = Desk(folder, **SETTINGS), recorded(folder)
    expected, found = (answers(each, PROMPTS, seed=11, **wishes) for each in (plain, desk))
    assert texts(found) == texts(expected)
