"""What a model does with attention is seen by running it, never guessed from its configuration.

`probe` runs a few tokens and records what each layer hands over; the pool gets its shapes from that. `self_check`
compares the model under transformers' own attention with the same model over a paged pool. What differs is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatpage.errors import ModelError
from chatpage.model.attention import NAME, forward, logits_at
from chatpage.model.batch import Batch, Draw, Row
from chatpage.model.kv import KVPool, LayerShape
from chatpage.model.reference import ReferenceAttention
from chatpage.schedule.params import SamplingParams

TOKENS = 24  # of each of the two sequences that are compared, where no window asks for more
PAST_WINDOW = 8  # tokens that no longer see the first one
LONGEST = 1024
# Tokens times parameters of a comparison that takes a few seconds.
AFFORDABLE = {"cpu": 2e10, "cuda": 1e13}
BLOCK_SIZE = 4
CHUNK = 7
DECODES = 3

# Logits may differ by so many times what one more rounding in every layer does to them, and always by so much of their
# spread. Measured: 0.1 to 1 times without fault; with wrong attention over 2 in bfloat16, 80,000 in float32.
ROUNDING = 2.0
NEGLIGIBLE = 1e-4

# Asks for a row's logits; nothing is drawn here.
_ANY_DRAW = Draw(SamplingParams(temperature=0), seed=0, choice=0, position=0)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a dry forward saw: a shape for each layer, and the windows that the layers ask for."""

    layers: tuple[LayerShape, ...]
    windows: frozenset[int]


@dataclass(slots=True)
class _Recorder:
    """Attends to nothing, and remembers what it was asked."""

    calls: list[int] = field(default_factory=list)
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: set[int] = field(default_factory=set)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.calls.append(layer)
        self.shapes[layer] = LayerShape(kv_heads=key.shape[1], key_size=key.shape[2], value_size=value.shape[2])
        if window is not None:
            self.windows.add(window)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


@torch.inference_mode()
def probe(module: PreTrainedModel) -> Probe:
    """Run four tokens without attention.

    Raises:
        ModelError: the model's layers do not all call the attention function, each once.
    """
    recorder = _Recorder()
    row = Row(tokens=[0, 1, 2, 3], start=0, table=[1], sample=_ANY_DRAW)
    forward(module, Batch.build([row], block_size=BLOCK_SIZE, device=module.device), recorder)
    family = module.config.model_type
    if not recorder.calls:
        raise ModelError(
            f"models of the family {family!r} do not let their attention be replaced (AttentionInterface)."
        )
    expected = module.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(recorder.calls) != list(range(expected)):
        raise ModelError(
            f"models of the family {family!r} keep more than keys and values of each layer: "
            f"{len(recorder.calls)} attention calls from {len(recorder.shapes)} of {expected} layers."
        )
    return Probe(tuple(recorder.shapes[layer] for layer in range(expected)), frozenset(recorder.windows))


def self_check(module: PreTrainedModel, found: Probe, *, max_positions: int) -> list[str]:
    """Compare transformers' own attention with the paged one on two sequences that run side by side.

    Chunks, decodes, scattered blocks; past every window, as far as that is affordable.

    Returns:
        Notes on what could not be tried.

    Raises:
        ModelError: the logits differ, or are not finite.
    """
    length, notes = _length(module, max_positions, found.windows)
    random = torch.Generator().manual_seed(0)
    sequences = torch.randint(vocabulary(module), (2, length), generator=random)
    expected = _own_logits(module, sequences)
    if not expected.isfinite().all():
        raise ModelError(f"the model's logits are not finite numbers in {_name(module.dtype)}; try another --dtype.")
    difference = _difference(_paged_logits(module, found.layers, sequences.tolist()), expected)
    with _rounding(module):
        allowed = max(NEGLIGIBLE, ROUNDING * _difference(_own_logits(module, sequences), expected))
    if not difference <= allowed:
        raise ModelError(
            f"models of the family {module.config.model_type!r} give other logits with paged attention than with their "
            f"own: they differ by {difference:.2g} of their spread, and rounding to {_name(module.dtype)} explains no "
            f"more than {allowed:.2g}."
        )
    return notes


def vocabulary(module: PreTrainedModel) -> int:
    """How many tokens have an embedding."""
    return cast(nn.Embedding, module.get_input_embeddings()).num_embeddings


def _length(module: PreTrainedModel, max_positions: int, windows: frozenset[int]) -> tuple[int, list[str]]:
    """How many tokens to compare, and a note for each window that this does not pass."""
    parameters = module.num_parameters()
    longest = min(max_positions, LONGEST, max(TOKENS, int(AFFORDABLE[module.device.type] / parameters)))
    length, notes = min(TOKENS, max_positions), []
    for window in sorted(window for window in windows if window < max_positions):
        if window + PAST_WINDOW <= longest:
            length = max(length, window + PAST_WINDOW)
        else:
            notes.append(f"The check at load did not reach past the attention window of {window} tokens.")
    return length, notes


def _spans(length: int) -> list[range]:
    """How a sequence is cut into rows: a long chunk if need be, three of CHUNK tokens, the last tokens one by one."""
    decodes = max(1, length - DECODES)
    chunks = max(0, decodes - 3 * CHUNK)
    edges = sorted({0, chunks, *range(chunks, decodes, CHUNK), *range(decodes, length + 1)})
    return [range(start, end) for start, end in pairwise(edges)]


def _own_logits(module: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Logits (sequences, spans, vocabulary) of each span's last token, under transformers' own attention and masks."""
    module.set_attn_implementation("eager")
    try:
        ids = sequences.to(module.device)
        positions = torch.arange(ids.shape[1], device=module.device).expand_as(ids)
        wanted = torch.tensor([span[-1] for span in _spans(ids.shape[1])], device=module.device)
        with torch.inference_mode():
            return logits_at(module, ids, positions, wanted)
    finally:
        module.set_attn_implementation(NAME)


@torch.inference_mode()
def _paged_logits(module: PreTrainedModel, layers: tuple[LayerShape, ...], sequences: list[list[int]]) -> Tensor:
    """The same logits from a paged pool. Each sequence starts one step after the one before it."""
    per_sequence = -(-len(sequences[0]) // BLOCK_SIZE)
    pool = KVPool(layers, per_sequence * len(sequences), BLOCK_SIZE, module.device, module.dtype)
    scattered = (torch.randperm(pool.num_blocks, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    spans = _spans(len(sequences[0]))
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(len(spans) + len(sequences) - 1):
        rows, owners = [], []
        for i, tokens in enumerate(sequences):
            if 0 <= step - i < len(spans):
                span = spans[step - i]
                table = scattered[i * per_sequence : (i + 1) * per_sequence]
                rows.append(Row(tokens[span.start : span.stop], span.start, table, sample=_ANY_DRAW))
                owners.append(i)
        batch = Batch.build(rows, block_size=BLOCK_SIZE, device=module.device)
        for index, row in zip(batch.order, forward(module, batch, ReferenceAttention(pool, batch)), strict=True):
            logits[owners[index]].append(row)
    return torch.stack([torch.stack(rows) for rows in logits])


@contextmanager
def _rounding(module: PreTrainedModel) -> Iterator[None]:
    """Let every layer with weights err by about one rounding more than it does anyway."""
    step = torch.finfo(module.dtype).eps / 2
    random = torch.Generator(device=module.device).manual_seed(0)

    def err(_module: nn.Module, _inputs: object, out: object) -> object:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        noise = torch.randn(out.shape, generator=random, device=out.device)
        return (out.float() * (1 + step * noise)).to(out.dtype)

    weighted = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    hooks = [part.register_forward_hook(err) for part in weighted]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _difference(found: Tensor, expected: Tensor) -> float:
    """How far logits are from what is expected, as a share of the expected ones' spread around their mean.

    The median over the tokens, since rounding may send one of them to another expert.
    """
    found, expected = found.float(), expected.float()
    spread = expected - expected.mean(dim=-1, keepdim=True)
    return ((found - expected).norm(dim=-1) / spread.norm(dim=-1).clamp(min=1e-20)).median().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
