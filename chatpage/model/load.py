"""A model from a folder or from the hub, ready for the paged engine, or one sentence that says why it cannot be.

Weights come from safetensors only, and no code that lies beside a model is ever run.
"""

import gc
import json
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from chatpage.errors import ModelError, SettingError
from chatpage.model import rope
from chatpage.model.attention import NAME, forward
from chatpage.model.check import Forward, NotFinite, Probe, agrees, check_keys, probe, self_check, visible, vocabulary
from chatpage.model.fused import FusedModel, NotUsual
from chatpage.model.kv import LayerShape, free_memory, lacks_memory, mib
from chatpage.model.product import packing_pays

log = logging.getLogger(__name__)

# Where neither the configuration nor the tokenizer says how long a context may be.
DEFAULT_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that passed its check.

    Attributes:
        name: of its folder, or its id on the hub.
        module: the transformers model, in eval mode on its device; its attention is ours. On a CPU `fused` may have
            taken over its weights: it computes nothing any more then.
        fused: the same in fewer operations, where it is the usual decoder.
        tokenizer: the one saved with it.
        layers: what each layer stores for a token.
        max_positions: tokens that a sequence may have.
        vocab_size: tokens that have an embedding; ids of prompts must be below.
        stop_token_ids: tokens that end an answer.
        device, dtype: of the weights, and of the pool.
        notes: sentences that whoever runs the page should read.
    """

    name: str
    module: PreTrainedModel
    fused: FusedModel | None
    tokenizer: Tokenizer
    layers: tuple[LayerShape, ...]
    max_positions: int
    vocab_size: int
    stop_token_ids: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    notes: list[str]

    @property
    def forward(self) -> Forward:
        """What computes a batch's logits."""
        return self.fused.forward if self.fused else partial(forward, self.module)


def load(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", max_model_len: int | None = None
) -> LoadedModel:
    """Load the model at `path`, a folder or the id of a model on the hub, and check it.

    Args:
        path: "./here", "~/there" and names of folders that exist are folders; all else is an id.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: "auto" (float32 on a CPU; bfloat16 on a GPU that has it, else float16, else float32), "float32",
            "float16" or "bfloat16".
        max_model_len: how long contexts are wished to be; positions that depend on it are chosen accordingly.

    Raises:
        ModelError: there is no such model, its files are wrong, or paged attention cannot run it.
        SettingError: the device is not there, or has no such dtype.
    """
    source = _source(path)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    try:
        if dtype == "auto" and chosen_dtype is torch.float16:
            return _load_without_bfloat16(source, chosen_device, max_model_len)
        return _load(source, chosen_device, chosen_dtype, max_model_len)
    except Exception as error:
        if lacks_memory(error):
            raise ModelError(
                f"model {str(path)!r} cannot be used: it does not fit into the memory of the device "
                f"({mib(free_memory(chosen_device))} are free); use a smaller model, or another --device."
            ) from None
        if isinstance(error, ModelError):
            raise ModelError(f"model {str(path)!r} cannot be used: {error}") from error
        raise


def _load_without_bfloat16(source: str, device: torch.device, max_model_len: int | None) -> LoadedModel:
    """In float16, or in float32 where the model has numbers that float16 has no room for."""
    try:
        loaded = _load(source, device, torch.float16, max_model_len)
        note = "This GPU has no bfloat16, so the model runs in float16."
    except NotFinite:
        loaded = None
        note = "This GPU has no bfloat16, and in float16 the model's numbers overflow, so it runs in float32."
    if loaded is None:
        gc.collect()  # the first try may hold memory still
        loaded = _load(source, device, torch.float32, max_model_len)
    loaded.notes.insert(0, note)
    return loaded


def _load(source: str, device: torch.device, dtype: torch.dtype, max_model_len: int | None) -> LoadedModel:
    config = _config(source)
    tokenizer = _tokenizer(source)
    module = _module(source, config, device, dtype)
    _check_weights(module)
    vocab_size = _vocab_size(module, tokenizer)
    max_positions, notes = rope.pin(module, _max_positions(config, tokenizer), max_model_len)
    found = probe(module)
    check_keys(module, max_positions)
    if (longest := visible(module, found, max_positions)) < max_positions:
        max_positions = longest
        notes.append(
            f"Contexts end at {longest} tokens: past them transformers hides or forgets others than the layers say."
        )
    notes += self_check(module, found, max_positions=max_positions)
    return LoadedModel(
        name=Path(source).resolve().name if Path(source).is_dir() else source,
        module=module,
        fused=_fused(module, found, max_positions),
        tokenizer=tokenizer,
        layers=found.layers,
        max_positions=max_positions,
        vocab_size=vocab_size,
        stop_token_ids=_stop_token_ids(module, tokenizer),
        device=device,
        dtype=dtype,
        notes=notes,
    )


def choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device is cuda, but torch finds no CUDA GPU here; use cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # With its index, as tensors report it.
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    has_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bfloat16" and not has_bfloat16:
        raise SettingError("--dtype is bfloat16, which this GPU does not have; use float16, float32 or auto.")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _source(path: str | Path) -> str:
    """The folder, or the id on the hub; a folder is looked at before transformers is asked."""
    text = str(path)
    folder = Path(text).expanduser()
    if not folder.exists():
        if isinstance(path, Path) or text.startswith((".", "/", "~")):
            raise ModelError(
                f"model {text!r} is not a folder that exists; give a folder with a model, or an id of the hub."
            )
        return text
    if not folder.is_dir():
        raise ModelError(f"model {text!r} is a file; give the folder that it lies in.")
    if not (folder / "config.json").exists():
        raise ModelError(f"model {text!r} has no config.json; give a folder that save_pretrained wrote.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"model {text!r} has no weights in safetensors files; pickled weights are not loaded.")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).exists() and "auto_map" in _json(folder / name):
            raise ModelError(f"model {text!r} wants its own code to be run (auto_map in {name}), which is never done.")
    return str(folder)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(file)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{str(file)!r} holds no JSON object.")
    return content


def _config(source: str) -> PreTrainedConfig:
    config = _ask(AutoConfig, source)
    if getattr(config, "auto_map", None):
        raise ModelError("it wants its own code to be run (auto_map in config.json), which is never done.")
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type!r} is an encoder-decoder; only decoders can chat here.")
    return config


def _tokenizer(source: str) -> Tokenizer:
    return _ask(AutoTokenizer, source)


def _module(source: str, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    module, report = _ask(
        AutoModelForCausalLM,
        source,
        config=config,
        attn_implementation=NAME,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"its files lack {len(missing)} of the weights, {missing[0]} among them.")
    return module.to(device).eval()


def _ask(loader: Any, source: str, **options: Any) -> Any:
    """`from_pretrained` of transformers, which raises many kinds of errors for wrong files."""
    try:
        return loader.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        if isinstance(error, KeyError) and error.args == (NAME,):
            family = getattr(options.get("config"), "model_type", "")
            raise ModelError(f"models of the family {family!r} do not let their attention be replaced.") from error
        raise ModelError(_first_sentence(error)) from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _fused(module: PreTrainedModel, found: Probe, longest: int) -> FusedModel | None:
    """The fused model, where this one is the usual decoder."""
    try:
        fused = FusedModel(module, found.calls)
        if agrees(module, fused.forward, found, longest):
            if packing_pays(fused.products):
                fused.pack()
            return fused
    except NotUsual:
        pass
    except Exception as error:  # modules with the usual names may do anything
        log.info("The usual names, but not the usual decoder: %r", error)
    return None


def _check_weights(module: PreTrainedModel) -> None:
    for name, weight in module.named_parameters():
        if not weight.numel() or not weight.is_floating_point():
            continue
        low, high = torch.aminmax(weight)
        if not (low.isfinite() and high.isfinite()):
            raise NotFinite(f"its weight {name} holds values that are not finite numbers in {weight.dtype}.")


def _vocab_size(module: PreTrainedModel, tokenizer: Tokenizer) -> int:
    rows = vocabulary(module)
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        raise ModelError(f"its tokenizer has {tokens} tokens, but the model knows only {rows}.")
    return rows


def _max_positions(config: PreTrainedConfig, tokenizer: Tokenizer) -> int:
    """How many positions the model says it knows."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min(tokenizer.model_max_length, DEFAULT_POSITIONS) if positions is None else positions


def _stop_token_ids(module: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """What the generation config, the config and the tokenizer call the end."""
    ids: set[int] = set()
    for source in (module.generation_config, module.config.get_text_config(decoder=True), tokenizer):
        end = getattr(source, "eos_token_id", None)
        ids.update(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return frozenset(ids)
