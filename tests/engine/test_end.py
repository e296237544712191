"""However the engine ends, nobody waits for ever, and it does not pretend to be alive."""

from collections.abc import Callable

import pytest
import torch

from chatpage.engine import Engine
from chatpage.events import Snapshot
from chatpage.model import step as model_step
from chatpage.schedule.request import Delta
from tests.engine.harness import ask, greedy, paused, read

pytestmark = pytest.mark.usefixtures("overlaps")


def test_a_model_that_gives_only_nan_is_not_alive(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = model_step.begin_sampling
    monkeypatch.setattr(
        model_step, "begin_sampling", lambda logits, draws: begin(torch.full_like(logits, torch.nan), draws)
    )
    with paused(engine):
        streams = [ask(engine, "One"), ask(engine, "Two")]
    assert [read(stream).reason for stream in streams] == ["error", "error"]
    engine._thread.join(10)
    assert engine.status == "failed"


def test_readers_are_told_where_the_events_do_not_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with paused(engine):
        streams = [ask(engine, "One"), ask(engine, "Two")]

        def fail(*_: object) -> None:
            raise ValueError("event 9 cannot follow event 7")

        monkeypatch.setattr(Snapshot, "apply_all", fail)
    assert [read(stream).reason for stream in streams] == ["error", "error"]
    engine._thread.join(10)
    assert engine.status == "failed"


def test_a_listener_that_raises_keeps_nobody_waiting(launch: Callable[..., Engine]) -> None:
    engine = launch()
    alone = read(ask(engine, "Two", greedy(8))).tokens

    def fail(delta: Delta) -> None:
        raise ValueError("out of luck")

    with paused(engine):
        streams = [ask(engine, "One", greedy(8), listener=fail), ask(engine, "Two", greedy(8))]
    assert [read(stream).reason for stream in streams] == ["length", "length"]
    assert read(ask(engine, "Two", greedy(8))).tokens == alone
