"""What is shared is computed once: counted at the embedding, and read from the pool's own tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from chatpage.conversation import Conversation
from chatpage.engine import Engine
from chatpage.model.batch import Drawn, Row
from chatpage.schedule.request import Request
from chatpage.text.template import ChatTemplate
from tests.checkpoints import tokenizer
from tests.engine.harness import Answer, Steps, ask, blocks, greedy, held, inside, intercept, paused, read

QUESTION = "What is a block table?"
OTHER = "You are a pirate."


def system_prompt(block_size: int, *, aligned: bool) -> str:
    """A text whose tokens, with what the template puts around it, end on a block's edge; or inside a block."""
    template = ChatTemplate(tokenizer())
    texts = ("You are kind" + "." * n for n in range(2 * block_size))
    return next(text for text in texts if (len(template.system_prefix(text)) % block_size == 0) == aligned)


@contextmanager
def entering(engine: Engine) -> Iterator[list[int]]:
    """How many tokens enter the model, a number a step."""
    counts: list[int] = []
    embedding = engine.core.runner.loaded.module.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].numel()))
    try:
        yield counts
    finally:
        hook.remove()


def entered(engine: Engine, text: str, **how: object) -> tuple[int, Answer]:
    """Ask for one token: everything that enters the model then is a prompt's. Returns how many, and the answer."""
    with entering(engine) as counts:
        answer = read(ask(engine, text, greedy(1), **how))  # pyright: ignore[reportArgumentType]
        return sum(counts), answer


# -- the system prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_a_new_session_computes_all_but_the_system_prompt(
    launch: Callable[..., Engine], block_size: int, aligned: bool
) -> None:
    engine = launch(block_size=block_size, system_prompt=system_prompt(block_size, aligned=aligned))
    system = engine.systems[0].tokens
    assert (len(system) % block_size == 0) == aligned
    for number in range(1, 4):
        steps, session = Steps(engine), engine.open_session()
        count, answer = entered(engine, QUESTION, session=session)
        assert answer.last.cached_tokens == len(system)
        assert count == answer.last.prompt_tokens - len(system)
        assert [len(steps.kinds("copy")), len(steps.copies)] == ([0, 0] if aligned else [1, 1])
        full = [number] * (len(system) // block_size)  # sessions that hold each of the full blocks, this one included
        assert [event.ref for event in steps.kinds("share")] == (full if aligned else [*full, 1])
        engine.unsubscribe(steps._hear)


def test_what_follows_the_first_token_is_one_token_a_step(engine: Engine) -> None:
    with entering(engine) as counts:
        answer = read(ask(engine, QUESTION, greedy(9)))
    assert counts == [answer.last.prompt_tokens - answer.last.cached_tokens] + [1] * 8


def test_the_second_turn_computes_only_its_own_tokens(engine: Engine) -> None:
    conversation = Conversation(engine)
    with entering(engine) as counts:
        first = read(conversation.say(QUESTION, greedy(9)))
        counts.clear()
        second = read(conversation.say("And a slot?", greedy(5)))
    closing, follow_up = (
        engine.template.end_of_turn,
        engine.template.follow_up([{"role": "user", "content": "And a slot?"}]),
    )
    assert follow_up is not None
    never_ran = 1  # the last token that was drawn
    assert counts == [never_ran + len(closing) + len(follow_up)] + [1] * 4
    assert second.last.cached_tokens == first.last.prompt_tokens + 8


def test_several_system_prompts_are_all_shared(launch: Callable[..., Engine]) -> None:
    engine = launch(system_prompt=["You are kind.", "You are kind, and brief."])
    for system in engine.systems:
        count, answer = entered(engine, QUESTION, system=system.text)
        assert answer.last.cached_tokens == len(system.tokens) > 0
        assert count == answer.last.prompt_tokens - len(system.tokens)


def test_a_system_message_that_is_not_registered_stays_private(engine: Engine) -> None:
    registered = engine.systems[0].text
    assert entered(engine, QUESTION, system=registered)[1].last.cached_tokens == len(engine.systems[0].tokens)
    for strange in (OTHER, registered + " ", registered[:-1]):
        for _ in range(2):
            count, answer = entered(engine, QUESTION, system=strange)
            assert answer.last.cached_tokens == 0
            assert count == answer.last.prompt_tokens


# -- sharing domains ---------------------------------------------------------------------------------------------------


def of_two_sessions(engine: Engine) -> tuple[Answer, Answer]:
    """Two sessions ask the same, one after the other."""
    first, second = (read(ask(engine, QUESTION, greedy(9), session=engine.open_session())) for _ in range(2))
    assert first.tokens == second.tokens
    return first, second


def test_sessions_share_only_the_system_prompt(launch: Callable[..., Engine]) -> None:
    engine = launch(sharing="system")
    assert [a.last.cached_tokens for a in of_two_sessions(engine)] == [len(engine.systems[0].tokens)] * 2


def test_sessions_share_all_identical_text(launch: Callable[..., Engine]) -> None:
    engine = launch(sharing="all")
    with entering(engine) as counts:
        first, second = of_two_sessions(engine)
    assert first.last.cached_tokens == len(engine.systems[0].tokens)
    assert second.last.cached_tokens == second.last.prompt_tokens
    assert counts[9:] == [1] * 9, "the prompt's last token runs again for its logits, and nothing else of it"


def test_sessions_share_all_identical_text_under_a_strange_system_prompt(launch: Callable[..., Engine]) -> None:
    engine = launch(sharing="all")
    found = [read(ask(engine, QUESTION, greedy(9), system=OTHER)).last for _ in range(2)]
    assert [delta.cached_tokens for delta in found] == [0, found[0].prompt_tokens]


def test_sessions_share_nothing(launch: Callable[..., Engine]) -> None:
    engine = launch(sharing="off")
    assert blocks(engine)["pinned"] == 0
    assert [a.last.cached_tokens for a in of_two_sessions(engine)] == [0, 0]


@pytest.mark.parametrize("sharing", ["system", "all", "off"])
def test_ones_own_text_is_found_again(launch: Callable[..., Engine], sharing: str) -> None:
    engine = launch(sharing=sharing)
    session = engine.open_session()
    for known in (False, True):
        answer = read(ask(engine, QUESTION, greedy(9), session=session)).last
        assert (answer.cached_tokens == answer.prompt_tokens) == known


@pytest.mark.parametrize(("owners", "shared"), [(("a", "a"), True), (("a", "b"), False), ((None, None), False)])
def test_requests_without_a_session_share_by_owner(
    engine: Engine, owners: tuple[str | None, str | None], shared: bool
) -> None:
    prompt = engine.prompt([{"role": "user", "content": QUESTION}])
    found = [read(engine.stream(Request(prompt, greedy(9), owner=owner))).last.cached_tokens for owner in owners]
    assert found == [prompt.system_tokens, len(prompt.tokens) if shared else prompt.system_tokens]


# -- read from the tensors ---------------------------------------------------------------------------------------------


def held_bytes(engine: Engine, block: int, slots: int) -> list[Tensor]:
    """Keys and values of a block's first slots, in all layers."""
    pool = engine.core.runner.pool
    return [layer[block, :slots].clone() for layer in (*pool.keys, *pool.values)]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_system_prompts_bytes_never_change(engine: Engine) -> None:
    pool, size = engine.core.pool, engine.block_size
    before = {block: held_bytes(engine, block, size) for block in pool.pinned}
    assert len(before) == -(-len(engine.systems[0].tokens) // size)
    assert all(layer[: pool.fill[block]].any(dim=(1, 2)).all() for block in before for layer in before[block])
    with paused(engine):
        streams = [ask(engine, f"{n} {QUESTION}", session=engine.open_session()) for n in range(4)]
    for stream in streams:
        read(stream)
    assert all(same(held, held_bytes(engine, block, size)) for block, held in before.items())


def test_no_step_writes_what_others_can_see(launch: Callable[..., Engine]) -> None:
    """Before and after every step of a crowd that shares a pool too small for it."""
    engine = launch(sharing="all", kv_blocks=60, max_model_len=96, max_step_tokens=16)
    pool, checked = engine.core.pool, set()
    copy = engine.core.runner.copy

    def guarded(rows: list[Row], compute: Callable[[list[Row]], list[Drawn]]) -> list[Drawn]:
        written = {row.table[p // 4] for row in rows if row.store for p in range(row.start, row.context)}
        fills = {b: len(node.tokens) if (node := pool.node[b]) else pool.fill[b] for b in range(1, pool.num_blocks + 1)}
        frozen = {b for b in fills if pool.ref[b] > 1 or b in pool.pinned or pool.node[b]}
        assert not frozen & written
        before = {block: held_bytes(engine, block, fills[block]) for block in frozen}
        drawn = compute(rows)
        assert all(same(held, held_bytes(engine, block, fills[block])) for block, held in before.items())
        checked.update(frozen)
        return drawn

    def guarded_copy(pairs: list[tuple[int, int]]) -> None:
        assert all(pool.ref[target] == 1 and pool.node[target] is None for _, target in pairs)
        copy(pairs)

    engine.core.runner.copy = guarded_copy
    intercept(engine.core.runner, guarded)
    with paused(engine):
        streams = [ask(engine, QUESTION[: 8 + n], greedy(12), session=engine.open_session()) for n in range(12)]
    assert {read(stream).reason for stream in streams} == {"length"}
    assert len(checked) > 20
    assert engine.core.view.counters["copied"] > 3


def test_a_copied_blocks_head_is_its_sources(engine: Engine) -> None:
    steps = Steps(engine)
    read(ask(engine, QUESTION, session=engine.open_session()))
    inside(engine, engine.core._hand_out_events)
    (copy,) = steps.kinds("copy")
    assert steps.copies == [(copy.source, copy.block)]
    assert copy.fill == len(engine.systems[0].tokens) % engine.block_size > 0
    source, target = (held_bytes(engine, block, engine.block_size) for block in (copy.source, copy.block))
    assert all(torch.equal(a[: copy.fill], b[: copy.fill]) for a, b in zip(source, target, strict=True))
    assert not same(source, target), "the copy was written on, the source was not"


# -- between turns -----------------------------------------------------------------------------------------------------


def test_after_a_stop_nothing_of_the_turn_runs_and_its_table_rests(engine: Engine) -> None:
    conversation = Conversation(engine)
    stream = conversation.say(QUESTION, greedy(200))
    written = ""
    for delta in stream:
        written += delta.text
        if delta.completion_tokens >= 5 and delta.state != "done":
            conversation.stop()
    assert delta.finish_reason == "abort"
    assert delta.completion_tokens < 200
    assert conversation.messages[-1] == {"role": "assistant", "content": written}

    steps = Steps(engine)
    (session,) = engine.core.scheduler.resting
    assert session.id == conversation.session.id
    [rested] = session.resting
    table = rested.table
    assert table.length == delta.prompt_tokens + delta.completion_tokens - 1, "the last drawn token never ran"
    assert blocks(engine)["resting"] == len(table.blocks) - len(engine.systems[0].tokens) // engine.block_size
    read(ask(engine, "Another one", greedy(5)))
    assert not {row.table[-1] for rows in steps.rows for row in rows} & set(table.blocks)
    assert session.resting == [rested]
    assert rested.table is table


def test_a_closed_session_holds_nothing(engine: Engine) -> None:
    session = engine.open_session()
    running = engine.open_session()
    read(ask(engine, QUESTION, session=session))
    stream = ask(engine, QUESTION, greedy(200), session=running)
    next(iter(stream))
    assert held(engine) > 0
    engine.close_session(session.key)
    engine.close_session(running.key)
    engine.close_session(running.key)
    assert list(stream)[-1].finish_reason == "abort"
    counts = blocks(engine)
    assert counts["used"] == counts["pinned"]
    assert counts["shared"] == counts["resting"] == 0
