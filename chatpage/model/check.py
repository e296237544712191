"""What a model does with attention is seen by running it, never guessed from its configuration.

`probe` runs a few tokens and records what each layer hands over; the pool gets its shapes from that. `self_check`
compares the model under transformers' own attention with the same model over a paged pool. What differs is refused.
Neither runs long texts through the model: `visible` asks transformers' own masks what the last tokens of the longest
context see, and `probe` whether keys stay the same beside one of that length.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import eager_mask

from chatpage.errors import ModelError
from chatpage.model.attention import NAME, Attention, AttentionCall, attending, forward, logits_at
from chatpage.model.batch import Batch, Draw, Inputs, Row
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

Forward = Callable[[Inputs, Attention], Tensor]  # logits (rows, vocabulary) of each row's last token

# Asks for a row's logits; nothing is drawn here.
_ANY_DRAW = Draw(SamplingParams(temperature=0), seed=0, choice=0, position=0)


# The attention function that only looks at the masks which transformers' eager attention would obey.
MASKED = "chatpage-masked"
LOOKERS = 4  # tokens that are asked what they see


class NotFinite(ModelError):
    """A number is too large for the model's dtype, or is none at all."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a dry forward saw: for each layer the shape of its keys and values, and how it asks for attention."""

    layers: tuple[LayerShape, ...]
    calls: tuple[AttentionCall, ...]

    @property
    def windows(self) -> set[int]:
        return {call.window for call in self.calls if call.window is not None}


@dataclass(slots=True)
class _Recorder:
    """Attends to nothing, and remembers what it was given: (tokens, heads or kv_heads, key_size) of each layer."""

    shapes: list[LayerShape] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        self.shapes.append(LayerShape(kv_heads=key.shape[1], key_size=key.shape[2], value_size=value.shape[2]))
        self.queries.append(query.clone())
        self.keys.append(key.clone())
        self.calls.append(call)
        return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])


def probe(module: PreTrainedModel) -> Probe:
    """Run five tokens without attention.

    Raises:
        ModelError: the model fails at that, or its layers do not all call the attention function.
    """
    seen = _record(module, [0, 1, 2, 3, 4])
    if not seen.shapes:
        raise ModelError(f"models of the family {_family(module)} have no attention that can be replaced.")
    expected = module.config.get_text_config(decoder=True).num_hidden_layers
    if len(seen.shapes) < expected:
        raise ModelError(
            f"models of the family {_family(module)} remember more than keys and values: of {expected} layers only "
            f"{len(seen.shapes)} attend."
        )
    return Probe(tuple(seen.shapes), tuple(seen.calls))


def check_keys(module: PreTrainedModel, longest: int) -> None:
    """See that the keys of some tokens are the same beside a token at the end of the longest context.

    Raises:
        ModelError: they are not, so that keys of one step would not go with those of another.
        NotFinite: they are no numbers.
    """
    alone = _record(module, [0, 1, 2, 3, 4])
    beside = _record(module, [0, 1, 2, 3, longest - 1])
    if not all(keys.isfinite().all() for keys in alone.keys):
        raise NotFinite(f"the model's keys are not finite numbers in {_name(module.dtype)}; try another --dtype.")
    allowed = 4 * torch.finfo(module.dtype).eps
    for one, other in zip(alone.keys, beside.keys, strict=True):
        kept, found = one[:4].float(), other[:4].float()
        if not (found - kept).norm() <= allowed * kept.norm():
            raise ModelError(
                f"models of the family {_family(module)} change a sequence's keys when another one is {longest} tokens "
                "long."
            )


@torch.inference_mode()
def _record(module: PreTrainedModel, positions: list[int]) -> _Recorder:
    """What the layers hand over for tokens at these positions."""
    recorder = _Recorder()
    where = torch.tensor([positions], device=module.device)
    with _blamed(module), attending(recorder):
        logits_at(module, torch.zeros_like(where), where, where[0, :1])
    return recorder


@contextmanager
def _blamed(module: PreTrainedModel) -> Iterator[None]:
    """An error of the model's own code, which meets here what it was not written for, says no more than that."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"models of the family {_family(module)} cannot do without masks or a cache of their own "
            f"({type(error).__name__}: {said})."
        ) from error


def _family(module: PreTrainedModel) -> str:
    return repr(module.config.model_type)


def visible(module: PreTrainedModel, found: Probe, longest: int) -> int:
    """Up to which length, `longest` at most, each token sees what transformers' masks and cache let it see.

    Raises:
        ModelError: there is no such length; tokens see what comes after them, say.
    """
    longest = min([longest, *_forgetful(module, found)])
    module.set_attn_implementation(MASKED)
    try:
        if _sees_alike(module, found, longest):
            return longest
        alike, different = 0, longest
        while different - alike > 1:
            middle = (alike + different) // 2
            if _sees_alike(module, found, middle):
                alike = middle
            else:
                different = middle
    finally:
        module.set_attn_implementation(NAME)
    if not alike:
        raise ModelError(
            f"models of the family {_family(module)} do not see the tokens before each token, and only them."
        )
    return alike


def _forgetful(module: PreTrainedModel, found: Probe) -> list[int]:
    """How many tokens the cache of `generate` keeps, in layers that do not ask for a window of this size."""
    with _blamed(module):
        layers = DynamicCache(config=module.config.get_text_config(decoder=True)).layers
    kept = {getattr(layer, "sliding_window", None) for layer in layers}
    return [size for size in kept if size and size not in found.windows]


@torch.inference_mode()
def _sees_alike(module: PreTrainedModel, found: Probe, length: int) -> bool:
    """Whether the last tokens of a sequence of this length see the same in all layers."""
    tokens = min(LOOKERS, length)
    positions = torch.arange(length - tokens, length, device=module.device)[None]
    past = Cache(layers=[_Past(length - tokens) for _ in found.layers])
    look = _Look(length)
    token = _current_look.set(look)
    try:
        with _blamed(module):
            module(input_ids=torch.zeros_like(positions), position_ids=positions, past_key_values=past, use_cache=True)
    finally:
        _current_look.reset(token)
    return look.alike


class _Past(CacheLayerMixin):
    """Pretends that so many tokens went before, and hands out none of them."""

    is_sliding = False

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


@dataclass(slots=True)
class _Look:
    """One forward's look at the masks: whether so far all layers see of `length` tokens what they should."""

    length: int
    alike: bool = True


_current_look: ContextVar[_Look] = ContextVar("_current_look")


def _look(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends to nothing, and compares the mask with what paged attention lets these queries see."""
    look = _current_look.get()
    look.alike &= _is_causal(attention_mask, query.shape[2], look.length, sliding_window)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(MASKED, _look)
AttentionMaskInterface.register(MASKED, eager_mask)


def _is_causal(mask: Tensor | None, queries: int, length: int, window: int | None) -> bool:
    """Whether a mask (…, queries, length) shows the last queries all before them, in the window; a bias is no mask."""
    if mask is None or mask.shape[-1] != length:
        return False
    keys = torch.arange(length, device=mask.device)
    last = keys[-queries:, None]
    expected = keys <= last
    if window is not None:
        expected &= keys > last - window
    shown = mask if mask.dtype == torch.bool else mask == 0
    return bool((shown == expected).all())


def self_check(module: PreTrainedModel, found: Probe, *, max_positions: int) -> list[str]:
    """Compare transformers' own attention with the paged one on two sequences that run side by side.

    Chunks, decodes, scattered blocks; past every window, as far as that is affordable.

    Returns:
        Notes on what could not be tried.

    Raises:
        ModelError: the logits differ.
        NotFinite: they are no numbers.
    """
    length, notes = _length(module, max_positions, found.windows)
    random = torch.Generator().manual_seed(0)
    sequences = torch.randint(vocabulary(module), (2, length), generator=random)
    expected = _own_logits(module, sequences)
    if not expected.isfinite().all():
        raise NotFinite(f"the model's logits are not finite numbers in {_name(module.dtype)}; try another --dtype.")
    difference = _difference(_paged_logits(module, partial(forward, module), found.layers, sequences), expected)
    allowed = _allowed(module, sequences, expected)
    if not difference <= allowed:
        raise ModelError(
            f"models of the family {_family(module)} give other logits with paged attention than with their "
            f"own: they differ by {difference:.2g} of their spread, and rounding to {_name(module.dtype)} explains no "
            f"more than {allowed:.2g}."
        )
    return notes


def agrees(module: PreTrainedModel, compute: Forward, found: Probe, longest: int) -> bool:
    """Whether another way to compute the model gives its logits over a paged pool, in contexts of any length."""
    sequences = torch.randint(vocabulary(module), (2, TOKENS), generator=torch.Generator().manual_seed(1))
    expected = _own_logits(module, sequences)
    difference = _difference(_paged_logits(module, compute, found.layers, sequences), expected)
    return difference <= _allowed(module, sequences, expected) and _asks_alike(module, compute, longest)


def attends_alike(
    module: PreTrainedModel,
    compute: Forward,
    layers: tuple[LayerShape, ...],
    attention: Callable[[KVPool, Batch], Attention],
) -> bool:
    """Whether the model's logits stay the same with another attention over the paged pool."""
    sequences = torch.randint(vocabulary(module), (2, TOKENS), generator=torch.Generator().manual_seed(2))
    expected = _own_logits(module, sequences)
    difference = _difference(_paged_logits(module, compute, layers, sequences, attention), expected)
    return difference <= _allowed(module, sequences, expected)


@torch.inference_mode()
def draws_alike(
    draw: Callable[[Tensor, Tensor, Tensor, Tensor], None], device: torch.device, dtype: torch.dtype, vocabulary: int
) -> bool:
    """Whether a kernel (see `chatpage.kernels.draw.draw`) draws what it must where only four tokens are possible."""
    possible = sorted({0, vocabulary // 3, vocabulary // 2, vocabulary - 1})
    if len(possible) < 4:
        return True
    #          temperature, top_k, top_p, min_p
    expected = {
        (0.0, 0, 1.0, 0.0): possible[0],
        (1.0, 0, 1.0, 0.0): possible[2],
        (1.0, 2, 1.0, 0.0): possible[1],
        (1.0, 0, 0.5, 0.0): possible[1],
        (1.0, 0, 1.0, 1.0): possible[2],
        (2.0, 3, 0.9, 0.5): possible[1],
    }
    logits = torch.full((len(expected) + 1, vocabulary), -torch.inf, dtype=dtype, device=device)
    logits[:, possible] = 1.0
    logits[-1, 0] = torch.nan
    wishes = torch.tensor([*expected, (1.0, 0, 1.0, 0.0)], dtype=torch.float32, device=device)
    points = torch.full((len(logits),), 0.6, dtype=torch.float64, device=device)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=device)
    draw(logits, wishes, points, tokens)
    return tokens.tolist() == [*expected.values(), -1]


@torch.inference_mode()
def _asks_alike(module: PreTrainedModel, compute: Forward, longest: int) -> bool:
    """Whether both ask attention with the same queries and keys, at the end of the longest context too."""
    batch = Batch.build([Row([0] * 5, 0, [1, 2])], block_size=BLOCK_SIZE, device=module.device)
    batch = replace(batch, positions=torch.tensor([0, 1, 2, 3, longest - 1], device=module.device))
    own, other = _Recorder(), _Recorder()
    forward(module, batch, own)
    compute(batch, other)
    asked = zip(own.queries + own.keys, other.queries + other.keys, strict=True)
    layers = 2 * list(range(1, len(own.keys) + 1))  # each adds its rounding
    rounding = 4 * torch.finfo(module.dtype).eps
    return all(
        bool((b.float() - a.float()).norm() <= layer * rounding * a.float().norm())
        for layer, (a, b) in zip(layers, asked, strict=True)
    )


def _allowed(module: PreTrainedModel, sequences: Tensor, expected: Tensor) -> float:
    """How far the logits of a sound model may be from these, which are its own."""
    with _rounding(module):
        return max(NEGLIGIBLE, ROUNDING * _difference(_own_logits(module, sequences), expected))


def vocabulary(module: PreTrainedModel) -> int:
    """How many tokens have an embedding."""
    return cast(nn.Embedding, module.get_input_embeddings()).num_embeddings


def _length(module: PreTrainedModel, max_positions: int, windows: set[int]) -> tuple[int, list[str]]:
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
def _paged_logits(
    module: PreTrainedModel,
    compute: Forward,
    layers: tuple[LayerShape, ...],
    sequences: Tensor,
    attention: Callable[[KVPool, Batch], Attention] | None = None,
) -> Tensor:
    """The same logits from a paged pool. Each sequence starts one step after the one before it."""
    per_sequence = -(-sequences.shape[1] // BLOCK_SIZE)
    pool = KVPool(layers, per_sequence * len(sequences), BLOCK_SIZE, module.device, module.dtype)
    scattered = (torch.randperm(pool.num_blocks, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    spans = _spans(sequences.shape[1])
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(len(spans) + len(sequences) - 1):
        rows, owners = [], []
        for i, tokens in enumerate(sequences.tolist()):
            if 0 <= step - i < len(spans):
                span = spans[step - i]
                table = scattered[i * per_sequence : (i + 1) * per_sequence]
                rows.append(Row(tokens[span.start : span.stop], span.start, table, sample=_ANY_DRAW))
                owners.append(i)
        batch = Batch.build(rows, block_size=BLOCK_SIZE, device=module.device)
        for index, row in zip(batch.order, compute(batch, (attention or ReferenceAttention)(pool, batch)), strict=True):
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
