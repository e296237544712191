"""How long a context and how large a pool an engine gives itself."""

from collections.abc import Callable

import pytest

from chatpage import core
from chatpage.engine import Engine
from chatpage.errors import SettingError


def test_a_context_that_the_memory_does_not_hold_is_shortened_with_a_note(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = launch(max_model_len=None)
    block_bytes = whole.core.runner.pool.bytes_per_block
    monkeypatch.setattr(core, "free_memory", lambda device: 11 * block_bytes)
    small = launch(kv_memory=1.0, kv_blocks=None, max_model_len=None, system_prompt=["Be brief."])
    assert (small.num_blocks, small.max_model_len) == (10, 10 * small.block_size)
    assert small.max_model_len < whole.max_model_len
    assert any(str(small.max_model_len) in note for note in small.notes)


def test_a_context_that_was_asked_for_is_never_shortened(
    launch: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "free_memory", lambda device: 2**20)
    with pytest.raises(SettingError, match="--max-model-len"):
        launch(max_model_len=512, kv_blocks=None, kv_memory=0.1)


def test_more_blocks_than_memory_is_one_sentence(launch: Callable[..., Engine]) -> None:
    with pytest.raises(SettingError, match=r"--kv-blocks is 9000000000000, .* do not fit"):
        launch(kv_blocks=9 * 10**12)
