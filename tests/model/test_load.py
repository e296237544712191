"""What loads, with what numbers; and what is refused, in one sentence."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatpage.model.check as check
import chatpage.model.load as load_module
from chatpage.errors import ModelError, SettingError
from chatpage.model.fused import FusedModel
from chatpage.model.kv import LayerShape
from chatpage.model.load import choose_device, choose_dtype, load
from chatpage.model.reference import ReferenceAttention
from tests.checkpoints import make


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A llama checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "spoilt"))


def edit(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(path: str | Path, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        load(path, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("llama", LayerShape(kv_heads=2, key_size=16, value_size=16)),
        ("deepseek_v2", LayerShape(kv_heads=4, key_size=24, value_size=12)),
    ],
)
def test_shapes_are_seen_not_guessed(family, shape, loaded):
    model = loaded(family)
    assert model.layers == (shape,) * 3
    assert (model.name, model.max_positions, model.vocab_size) == (family, 512, 320)
    assert (model.stop_token_ids, model.notes) == (frozenset({1}), [])
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert not model.module.training


def test_stop_tokens_of_all_sources(copy):
    edit(copy / "generation_config.json", eos_token_id=[7, 9])
    assert load(copy, device="cpu").stop_token_ids == {1, 7, 9}


def test_paths_are_strings_too(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert load("./spoilt", device="cpu").name == load("spoilt", device="cpu").name == "spoilt"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_half_precision(family, dtype, checkpoint):
    model = load(checkpoint(family), device="cpu", dtype=dtype)
    assert str(model.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("path", ["./no/such/folder", "/no/such/folder", "~/no-such-folder", Path("no-such-folder")])
def test_a_missing_folder(path):
    refused(path, r"^model '.*no.such.folder' is not a folder that exists")


def test_a_file(copy):
    refused(copy / "config.json", "is a file; give the folder")


def test_an_empty_folder(tmp_path):
    refused(tmp_path, "has no config.json")


def test_a_config_that_is_not_json(copy):
    (copy / "config.json").write_text("{")
    refused(copy, "cannot be read as JSON")


def test_pickled_weights(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    refused(copy, "no weights in safetensors files")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_lies_beside_a_model(file, copy):
    (copy / "evil.py").write_text("raise SystemExit('this ran')")
    edit(copy / file, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]})
    refused(copy, f"its own code to be run \\(auto_map in {file}\\)")


def test_an_encoder_decoder(copy):
    edit(copy / "config.json", model_type="t5", is_encoder_decoder=True)
    refused(copy, "'t5' is an encoder-decoder")


def test_an_unknown_family(copy):
    edit(copy / "config.json", model_type="no_such_family")
    refused(copy, "no_such_family")


def test_truncated_weights(copy):
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused(copy, "cannot be used")


def test_missing_weights(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "lack 1 of the weights, model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(value, copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "model.layers.2.mlp.up_proj.weight holds values that are not finite")


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    refused(make("llama", tmp_path, vocab_size=300), "tokenizer has 320 tokens, but the model knows only 300")


def test_tied_weights_are_not_missing(tmp_path):
    assert load(make("llama", tmp_path, tie_word_embeddings=True), device="cpu").notes == []


@pytest.mark.parametrize("family", ["bloom", "gptj", "mamba"])
def test_families_that_do_not_call_our_attention(family, checkpoint):
    refused(checkpoint(family), "attention (that can )?be replaced")


def test_a_family_that_sees_what_comes_after(checkpoint):
    refused(checkpoint("bert"), "'bert' do not see the tokens before each token, and only them")


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError, match="--device is cuda, but"):
        choose_device("cuda")


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "has_bfloat16", "chosen"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
        ("float16", False, torch.float16),
        ("float32", False, torch.float32),
    ],
)
def test_the_dtype_on_a_gpu(dtype, has_bfloat16, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert choose_dtype(dtype, GPU) is chosen


def test_a_dtype_that_the_gpu_does_not_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(SettingError) as caught:
        choose_dtype("bfloat16", GPU)
    assert str(caught.value) == "--dtype is bfloat16, which this GPU does not have; use float16, float32 or auto."


@pytest.fixture
def old_gpu(monkeypatch) -> None:
    """What is loaded gets the dtype of a GPU without bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(load_module, "choose_dtype", lambda dtype, device: choose_dtype(dtype, GPU))


@pytest.mark.usefixtures("old_gpu")
def test_a_gpu_without_bfloat16_computes_in_float16(checkpoint):
    model = load(checkpoint("llama"), device="cpu")
    assert (model.dtype, model.notes) == (
        torch.float16,
        ["This GPU has no bfloat16, so the model runs in float16."],
    )
    assert load(checkpoint("llama"), device="cpu", dtype="float16").notes == []


def make_large(folder: Path, *names: str) -> None:
    """Weights of so many times the size."""
    weights = load_file(folder / "model.safetensors")
    for name in names:
        weights[f"model.layers.1.{name}.weight"] *= 3e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(
    ("large", "reason"),
    [
        (["mlp.up_proj"] * 2, "mlp.up_proj.weight holds values that are not finite numbers in torch.float16"),
        (["mlp.up_proj", "mlp.gate_proj"], "keys are not finite numbers in float16; try another --dtype"),
    ],
    ids=["a weight", "a product"],
)
def test_a_model_too_large_for_float16_computes_in_float32(large, reason, copy):
    make_large(copy, *large)
    model = load(copy, device="cpu")
    assert (model.dtype, model.notes) == (
        torch.float32,
        ["This GPU has no bfloat16, and in float16 the model's numbers overflow, so it runs in float32."],
    )
    with pytest.raises(ModelError, match=reason):
        load(copy, device="cpu", dtype="float16")


@pytest.mark.usefixtures("old_gpu")
def test_weights_that_are_finite_in_no_dtype(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(copy, "not finite numbers in torch.float32")


@pytest.mark.parametrize("where", ["_check_weights", "probe", "visible", "self_check"])
def test_a_model_that_does_not_fit_into_memory(where, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB.")

    monkeypatch.setattr(load_module, where, fail)
    refused(checkpoint("llama"), r"it does not fit into the memory of the device \([\d,]+ MiB are free\)")


def test_a_window_that_layers_do_not_hand_over(checkpoint):
    model = load(checkpoint("phimoe"), device="cpu")
    assert model.max_positions == 16
    assert model.notes == [
        "Contexts end at 16 tokens: past them transformers hides or forgets others than the layers say."
    ]


def test_positions_that_depend_on_the_batch(checkpoint):
    model = load(checkpoint("phi3"), device="cpu")
    assert model.max_positions == 64
    assert "longrope" in model.notes[0]


def break_attention(monkeypatch, **wrong) -> None:
    """Paged attention with some of its settings replaced."""

    class Broken(ReferenceAttention):
        def attend(self, layer, query, key, value, call):
            return super().attend(layer, query, key, value, replace(call, **wrong))

    monkeypatch.setattr(check, "ReferenceAttention", Broken)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gemma2", {"window": None}),
        ("gemma2", {"window": 9}),
        ("gemma2", {"softcap": None}),
        ("gpt_oss", {"sinks": None}),
        ("llama", {"scaling": 0.35}),
    ],
)
def test_wrong_attention_is_noticed(family, wrong, dtype, checkpoint, monkeypatch):
    break_attention(monkeypatch, **wrong)
    with pytest.raises(ModelError, match="give other logits"):
        load(checkpoint(family), device="cpu", dtype=dtype)


def test_the_check_reaches_past_long_windows(tmp_path, monkeypatch):
    folder = make("gemma2", tmp_path, sliding_window=300)
    assert load(folder, device="cpu").notes == []
    break_attention(monkeypatch, window=None)
    refused(folder, "give other logits")


def test_a_window_too_long_to_check_is_noted(tmp_path):
    folder = make("gemma2", tmp_path, sliding_window=1100, max_position_embeddings=2048)
    assert load(folder, device="cpu").notes == [
        "The check at load did not reach past the attention window of 1100 tokens."
    ]


def test_the_check_is_quick(tmp_path, monkeypatch):
    """Less than two seconds of one core for two million parameters."""
    monkeypatch.setattr(FusedModel, "pack", lambda model: None)  # the module itself is checked once more
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
    model = load(make("llama", tmp_path, **sizes), device="cpu")
    assert model.module.num_parameters() > 1.5e6
    start = time.process_time()
    check.self_check(model.module, check.probe(model.module), max_positions=model.max_positions)
    assert time.process_time() - start < 2
