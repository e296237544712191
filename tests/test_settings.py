"""Settings: from keywords, the environment and flags; and the sentence about a wrong one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chatpage.cli import main, serve
from chatpage.errors import SettingError
from chatpage.settings import Settings, allowed, flag


def test_defaults():
    settings = Settings()
    assert (settings.host, settings.port, settings.block_size, settings.kv_memory) == ("127.0.0.1", 7860, 16, 0.85)
    assert (settings.max_sequences, settings.max_step_tokens, settings.max_queue) == (256, 2048, 64)
    assert (settings.model, settings.system_prompt, settings.api_key, settings.trace) == (None, [], None, None)


@pytest.mark.parametrize(
    ("host", "sharing", "scope"),
    [
        ("127.0.0.1", "all", "full"),
        ("127.0.0.2", "all", "full"),
        ("::1", "all", "full"),
        ("localhost", "all", "full"),
        ("0.0.0.0", "system", "aggregate"),
        ("chat.example", "system", "aggregate"),
    ],
)
def test_auto_follows_the_host(host: str, sharing: str, scope: str):
    settings = Settings(host=host)
    assert (settings.resolved_sharing, settings.resolved_scope) == (sharing, scope)
    chosen = Settings(host=host, sharing="off", panel_scope="self")
    assert (chosen.resolved_sharing, chosen.resolved_scope) == ("off", "self")


def test_in_a_space(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SPACE_ID", "me/chat")
    settings = Settings()
    assert (settings.host, settings.port) == ("0.0.0.0", 7860)
    assert (settings.resolved_sharing, settings.resolved_scope) == ("system", "aggregate")


def test_where_a_value_comes_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHATPAGE_BLOCK_SIZE", "8")
    monkeypatch.setenv("CHATPAGE_SYSTEM_PROMPT", "Hello, you.")
    monkeypatch.setenv("CHATPAGE_PARANOID", "1")
    monkeypatch.setenv("CHATPAGE_KV_BLOCKS", "")
    settings = Settings()
    assert (settings.block_size, settings.system_prompt) == (8, ["Hello, you."])
    assert (settings.paranoid, settings.kv_blocks) == (True, None)
    assert Settings(block_size=4).block_size == 4
    assert Settings(system_prompt="One").system_prompt == ["One"]
    assert Settings(model=Path("folder")).model == "folder"


@pytest.mark.parametrize("variable", ["CHATPAGE_BLOK_SIZE", "chatpage_blok_size", "CHATPAGE_Block_Sise"])
def test_a_misspelt_variable(variable: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(variable, "8")
    with pytest.raises(SettingError) as caught:
        Settings()
    assert str(caught.value) == f"{variable} in the environment is not a setting; did you mean CHATPAGE_BLOCK_SIZE?"


def test_variables_of_other_programs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_CHATPAGE_BLOK_SIZE", "8")
    monkeypatch.setenv("CHATPAGES", "8")
    for name, field in Settings.model_fields.items():
        if field.annotation is int:
            monkeypatch.setenv(f"CHATPAGE_{name.upper()}", "8")
    assert Settings().block_size == Settings().port == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "/no/such"}, "--model is '/no/such'; it must be a folder that exists, or an id of the Hub."),
        ({"model": "./app.py"}, "--model is './app.py'; it must be a folder that exists, or an id of the Hub."),
        ({"model": "tests"}, "--model is 'tests', a folder without config.json; it must hold a model."),
        ({"trace": "/no/such/trace"}, "--trace is '/no/such/trace'; it must be a file in a folder that exists."),
        ({"trace": "tests"}, "--trace is 'tests', which is a folder; it must be a file."),
        (
            {"max_model_len": 10**6},
            "--max-model-len is 1000000, but this model's contexts end at 1024 tokens.",
        ),
        (
            {"max_model_len": 100, "kv_blocks": 3},
            "--kv-blocks is 3, but one sequence of --max-model-len 100 tokens takes 7 blocks of 16.",
        ),
    ],
)
def test_what_cannot_be_is_known_before_anything_is_loaded(
    settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(SettingError) as caught:
        Settings(**settings).require_possible()
    assert str(caught.value) == said
    given = [word for name, value in settings.items() for word in (flag(name), str(value))]
    assert main(["serve", *given]) == 2
    assert capsys.readouterr().err == f"chatpage: {said}\n"


def test_what_may_be_is_left_to_loading(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    for settings in (
        {"model": tmp_path, "max_model_len": 100, "kv_blocks": 7},
        {"model": "someone/some-model", "max_model_len": 10**6},
        {"trace": "trace.jsonl"},
        {"kv_blocks": 1},
    ):
        Settings(**settings).require_possible()
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 64}}')
    with pytest.raises(SettingError, match="contexts end at 64 tokens"):
        Settings(model=tmp_path, max_model_len=65).require_possible()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("block_size", 0, "--block-size is 0; it must be a whole number from 1 to 255."),
        ("block_size", "x", "--block-size is 'x'; it must be a whole number from 1 to 255."),
        ("kv_memory", 1.5, "--kv-memory is 1.5; it must be a number above 0 and at most 1."),
        ("kv_blocks", 0, "--kv-blocks is 0; it must be a whole number from 1 up."),
        ("device", "tpu", "--device is 'tpu'; it must be auto, cpu or cuda."),
        ("panel_scope", "all", "--panel-scope is 'all'; it must be auto, full, aggregate, self or off."),
        ("system_prompt", " ", "--system-prompt is ' '; it must be a text that is not blank."),
        ("port", 70000, "--port is 70000; it must be a whole number from 0 to 65535."),
        ("paranoid", "maybe", "--paranoid is 'maybe'; it must be on or off."),
        ("api_key", "a secret", "--api-key must be printable ASCII characters without spaces."),
        ("bloksize", 3, "bloksize is not a setting; did you mean block_size?"),
    ],
)
def test_one_sentence_about_a_wrong_value(name: str, value: object, said: str):
    with pytest.raises(SettingError) as caught:
        Settings(**{name: value})
    assert str(caught.value) == said


def test_a_key_is_never_shown():
    assert "hunter2" not in repr(Settings(api_key="hunter2"))


def test_settings_do_not_change():
    with pytest.raises(Exception, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--block-size", "0"], "--block-size is '0'; it must be"),
        (["--blok-size", "3"], "--blok-size is not a setting; did you mean --block-size?"),
        (["--blok-size=3"], "--blok-size is not a setting"),
        (["folder"], "'folder' is not a flag"),
        (["--port"], "--port needs a value."),
        (["--paranoid=1"], "--paranoid is on or off, and takes no value."),
    ],
)
def test_a_mistake_on_the_command_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    for run in (serve, lambda given: main(["serve", *given])):
        status = run(arguments)
        shown = capsys.readouterr()
        assert (status, shown.out) == (2, "")
        assert shown.err.startswith(f"chatpage: {said}")
        assert shown.err.count("\n") == 1


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert flag(name) in shown
        assert str(field.description) in shown
        assert allowed(name) in shown or allowed(name) in ("text", "on or off")


def test_importing_the_cache_loads_neither_torch_nor_gradio():
    code = "import sys, chatpage.cache, chatpage.cli; print(*{'torch', 'gradio', 'transformers'} & sys.modules.keys())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "\n"


def test_the_names_of_the_package():
    import chatpage

    assert chatpage.Settings is Settings
    assert all(getattr(chatpage, name) for name in chatpage.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        chatpage.Nothing  # noqa: B018
