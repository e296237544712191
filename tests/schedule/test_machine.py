"""The state machine: on the scheduler as it is, and on schedulers with one fault each, all of which it must find."""

import inspect
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from chatpage.cache.table import BlockTable
from chatpage.schedule.group import BeamGroup
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from tests.schedule.machine import SchedulerMachine, walk

TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def walks(seeds: Iterable[int]) -> int:
    return sum(walk(seed) for seed in seeds)


def test_walks() -> None:
    assert walks(range(300)) > 50_000  # operations; with the cache's, some 10^5


# -- faults: each is one line of the scheduler, a sequence or a table, wrong -------------------------------------------

# Walks in which a copy is made of what fails; in which several replies rest beside one that fails, or one of them rests
# after another session; in which the first reply comes back after others have, or rests before they begin; in which a
# search fails of which something rests; in which searches make way for another one; and in
# which a beam, chunk by chunk, comes back to a pool that cannot hold its search.
RARE = [4160, 2899, 408, 665, 1145, 60, 125, 489, 3387, 32010]

OWNERS = Scheduler, Step, Chunk, Sequence, BeamGroup, BlockTable  # the first of them that has the method, or is named

# name, method, what stands there, what stands there instead
# fmt: off
FAULTS = [
    ("leaves what failed to be found", "distrust", 'self.pool.unpublish(block, "its computation failed")', "pass"),
    ("lets those go on who hold what failed", "distrust",
     'self.preempt(holder, "a block that it held failed")', "pass"),
    ("lets tables rest that hold what failed", "distrust",
     'self._wake(sequence, "a block that it held failed")', "pass"),
    ("looks at one resting reply only for what failed", "distrust", "in session.resting]:", "in session.resting[:1]]:"),
    ("takes back the system prompt with what failed", "distrust", " - self.pool.pinned", ""),
    ("lets the table rest that failed", "fail", "self._leave(sequence, reason)", "self._rest(sequence, reason)"),
    ("fails twice", "fail", 'sequence.state in ("resting", "done")', "False"),
    ("ends twice", "end", 'sequence.state in ("resting", "done")', "False"),
    ("keeps the end of a turn to itself", "end", "tail=True", "tail=False"),
    ("lets nothing rest", "end", "sequence.session.keeps and", "False and"),
    ("counts on those who are gone", "_dequeue", "sequence.session.active -= 1", "pass"),
    ("leaves a released table among the resting", "_wake", "del self.resting[session]", "pass"),
    ("gives credit for having been away", "submit", "session.served = max(", "max("),
    ("has no budget", "_run", "min(budget, length - start)", "length - start"),
    ("writes again what was found", "_run", "start - 1, 1, False", "start - 1, 1, True"),
    ("runs the newest first", "schedule", "list(self.running)", "list(reversed(self.running))"),
    ("starts somebody while others lose their blocks", "schedule", "step.preempted or", ""),
    ("makes who decodes wait for whole prompts", "_budget", "most // 2", "most"),
    ("makes prompts wait for many who decode", "_budget", "2 * decodes", "decodes"),
    ("draws after every chunk", "_run", "reaches_end and sequence.draws", "sequence.draws"),
    ("draws after a system prompt", "_run", "reaches_end and sequence.draws", "reaches_end"),
    ("never says that it decodes", "_run", 'sequence.state != "decode"', "False"),
    ("publishes what failed", "finish", "if not chunk.is_wanted:", "if False:"),
    ("computes what was found", "finish", "if chunk.stores:", "if True:"),
    ("serves for nothing", "finish", "sequence.session.served += chunk.count", "pass"),
    ("publishes nothing", "finish", "sequence.table.publish(sequence.tokens, sequence.computed)", "pass"),
    ("publishes a step too early", "finish", "sequence.computed)", "sequence.computed + 1)"),
    ("preempts while tables rest", "_append", "if self._release_longest_resting():", "if False:"),
    ("ends what would fit later", "_append",
     " and all(s is victim or _waits_for(s, victim) for s in self.running)", ""),
    ("takes the blocks of one that can only end", "_append",
     "step.exhausted.append(sequence)  # it has taken from all others\n                return False",
     "step.exhausted.append(sequence)"),
    ("forgets a copy", "_append", "step.copies.append(copied)", "pass"),
    ("preempts the oldest", "_victim", "reversed(self.running)", "self.running"),
    ("forgets who was preempted first", "preempt", "self.preempted.sort(key=lambda s: s.age)", "pass"),
    ("takes no blocks from the preempted", "preempt", 'sequence.table.release("preempted")', "pass"),
    ("believes that the preempted are computed", "preempt", "sequence.computed = 0", "pass"),
    ("wakes the shortest rested", "_release_longest_resting", "iter(self.resting)", "reversed(self.resting)"),
    ("has no limit of sequences", "_places", "self.max_sequences - others - sum(beams.values())", "self.max_sequences"),
    ("overtakes those who wait for a block", "_admit_others", "places -= taken", "pass"),
    ("pushes others out for new ones", "_admit_others", "if not self._has_room(sequence, matches):", "if False:"),
    ("starts others before one that has no room", "_admit_others",
     "break\n            self._admit(sequence, seq", "continue\n            self._admit(sequence, seq"),
    ("starts new ones before the preempted are back", "_by_turn", "if self.preempted:", "if False:"),
    ("does not look at what was served", "_by_turn", "(s.session.served, s.id)", "s.id"),
    ("prefers whom it has served most", "_by_turn", "(s.session.served, s.id)", "(-s.session.served, s.id)"),
    ("lets some wait as long as others come", "_by_turn", "self._admitted % PATIENCE == PATIENCE - 1", "False"),
    ("loses patience at once", "_by_turn", "self._admitted % PATIENCE == PATIENCE - 1", "True"),
    ("forgets whom it has admitted", "_admit", "self._admitted += 1", "pass"),
    ("counts anew what was found when one comes back", "_admit", "if sequence.cached is None:", "if True:"),
    ("keeps the last table while the next turn runs", "_admit", "self.wake(", "id(str)  # ("),
    ("runs the latest admitted last", "_start", "self.running.sort(key=lambda s: s.age)", "pass"),
    ("waits for ever", "_awaits_block", "other.is_running and other.computed < end", "other.computed < end"),
    ("waits for what is there", "_awaits_block", "other.computed < end", "True"),
    ("computes for each what is asked twice", "_must_await", "return filler is not None", "return False"),
    ("waits for one who computes something else", "_must_await", "s.tokens[:end] == wanted and", ""),
    ("waits for a block that is no whole one", "_must_await", " if len(wanted) == end else None", ""),
    ("waits for one in another domain", "_share", "a.table.domain == b.table.domain and", ""),
    ("waits for one under another system prompt", "_share", "a.system_tokens == b.system_tokens and", ""),
    ("counts what is found as room too", "_fits", "len(released) - revived", "len(released)"),
    ("has no room for a copy", "_fits", "needed += is_held(matches[-1][0].block)", "pass"),
    ("does not know that resting tables make way", "_has_room", "bool(self.resting)", "False"),
    ("takes what runs for what rests", "_held_by_resting", "n == self.pool.ref[block] and", ""),
    # what is appended in place
    ("writes what others hold", "append_in_place", "pool.ref[block] > 1", "False"),
    ("writes what can be found", "append_in_place", "pool.node[block] is not None", "False"),
    ("writes behind the last block", "append_in_place", "<= size - count", "< size"),
    ("writes into a full block", "append_in_place", "0 < self", "0 <= self"),
    ("appends twice", "append_in_place", "return True", "return False"),
    # several replies to one prompt
    ("computes the prompt for each reply", "submit_reply",
     "sequence.origin, sequence.turn, sequence.choice = origin, origin.turn, choice",
     "sequence.turn, sequence.choice = origin.turn, choice"),
    ("takes each reply for the first one", "submit_reply",
     "sequence.origin, sequence.turn, sequence.choice = origin, origin.turn, choice",
     "sequence.origin, sequence.turn = origin, origin.turn"),
    ("forgets the limit of the other replies", "submit_reply", "limit=origin.limit", "limit=None"),
    ("forgets the seed of the other replies", "submit_reply", "seed=origin.seed", "seed=0"),
    ("does not share the system prompt with the other replies", "submit_reply",
     "tuple(origin.tokens), origin.system_tokens", "tuple(origin.tokens), 0"),
    ("does not queue the other replies", "submit_reply", "self._queue(sequence)", "pass"),
    ("does not count those who are here", "_queue", "sequence.session.active += 1", "pass"),
    ("says nothing when a reply rests", "_rest",
     'self._become(sequence, "resting", reason)', 'sequence.state = "resting"'),
    ("lets one reply rest only", "_rest", "session.resting.append(sequence)", "session.resting = [sequence]"),
    ("counts the rest from the first reply that ended", "_rest", "self.resting.move_to_end(session)", "pass"),
    ("does not note since when a session rests", "_rest", "session.rested_at = time.monotonic()", "pass"),
    ("takes what rests of a turn from its other replies", "_admit", ", but=sequence.turn", ""),
    ("takes each reply for a turn", "submit_reply",
     "sequence.origin, sequence.turn, sequence.choice = origin, origin.turn, choice",
     "sequence.origin, sequence.choice = origin, choice"),
    ("keeps the last turn while the next one runs", "wake", "sequence.turn != but", "but is None"),
    ("keeps every reply", "keep", "sequence.choice != choice", "False"),
    ("keeps the replies that were not chosen", "keep", "sequence.choice != choice", "sequence.choice == choice"),
    ("forgets all replies with the one that it releases", "_wake",
     "session.resting.remove(sequence)", "session.resting.clear()"),
    ("forgets a session with the first reply that it releases", "_wake", "if not session.resting:", "if True:"),
    ("does not know of all that rests", "tables", "in session.resting]", "in session.resting[:1]]"),
    ("counts one resting reply of each session as room", "_held_by_resting",
     "in session.resting]", "in session.resting[:1]]"),
    ("starts replies before their prompt is computed", "_admit_others", "or self._awaits_prompt(sequence)", ""),
    ("forks what is in flight", "_awaits_prompt", "origin.computed <", "origin.table.length <"),
    ("lets replies wait for one token more", "_awaits_prompt", "origin.computed <", "origin.computed <="),
    ("lets replies wait for one that rests", "_awaits_prompt", '("resting", "done")', '("done",)'),
    ("lets replies wait for one that is gone", "_awaits_prompt", '("resting", "done")', '("resting",)'),
    ("lets preempted replies wait for the first one", "_awaits_prompt",
     'origin is None or sequence.state != "queued"', "origin is None"),
    ("never forks", "_may_fork", "sequence.origin is not None", "False"),
    ("forks again for the preempted", "_may_fork", 'sequence.state == "queued" and ', ""),
    ("forks what does not run", "_may_fork", " and sequence.origin.is_running", ""),
    ("forks although the pool is full", "_admit_others", "if not (self.pool.available or self.resting):", "if False:"),
    ("does not know that resting tables make way for a fork", "_admit_others", " or self.resting)", ")"),
    ("starts others before a fork that has no room", "_admit_others",
     "break\n            self._admit(sequence, self._f", "continue\n            self._admit(sequence, self._f"),
    ("forks more than the prompt", "_fork", "sequence.prompt_length", "sequence.origin.table.length"),
    ("forks whole blocks only", "_fork",
     "sequence.prompt_length", "sequence.prompt_length // self.pool.block_size * self.pool.block_size"),
    ("computes again what is forked", "_admit", "sequence.computed = found", "sequence.computed = 0"),
    # with a step in flight
    ("waits although it may write", "must_copy", " and self._must_copy_last(0)", ""),
    ("waits before a block of its own", "must_copy", "self.length % self.pool.block_size != 0 and ", ""),
    ("preempts out of a step in flight", "_append", "if victim.is_in_flight:", "if False:"),
    ("gives newer ones what an older one lacks", "schedule", "or step.lacks_room:", "or False:"),
    ("starts somebody while an older one lacks room", "schedule", "or step.lacks_room)", ")"),
    ("computes what comes after the last token", "_run", "length == sequence.limit", "False"),
    ("copies away what a row in flight reads", "_append", "sequence.pending and sequence.table.must_copy", "False"),
    ("waits for a copy although nothing is in flight", "_append", "sequence.pending and ", ""),
    ("does not know that a token is on its way", "_run", "sequence.pending += draws", "pass"),
    ("forgets that a token has come", "finish", "sequence.pending -= chunk.draws", "pass"),
    ("forgets the token on its way", "length", "+ self.pending", ""),
    ("does not know that a row in flight draws", "is_in_flight", "self.pending > 0 or", ""),
    ("does not know that a row in flight writes", "is_in_flight", "or self.computed < self.table.length", ""),
    ("draws with penalties for what it does not know", "is_awaited", "chunk.sequence.looks_back", "False"),
    ("publishes what is in flight", "finish",
     "publish(sequence.tokens, sequence.computed)", "publish(sequence.tokens, sequence.table.length)"),
    ("takes what is in flight for computed", "finish",
     "sequence.computed += chunk.count", "sequence.computed = sequence.table.length"),
    ("ends with what is in flight", "end", "truncate(sequence.computed,", "truncate(sequence.table.length,"),
    ("lets those who ended have what was in flight", "_dequeue", "sequence.drop_pending()", "pass"),
    ("lets those who lost their blocks have what was in flight", "preempt", "sequence.drop_pending()", "pass"),
    ("waits for a token that was dropped", "drop_pending", "self.pending = 0", "pass"),
    ("delivers what was dropped", "is_wanted", "self.life == self.sequence.life", "True"),
    ("delivers what was dropped to those who run again", "is_wanted",
     "self.life == self.sequence.life", "self.sequence.is_running"),
    ("trusts a copy of what failed", "distrust", "if source in suspects", "if False"),
    ("computes again what a row in flight computes", "_must_await", "s.computed < end", "s.table.length < end"),
    # searches
    ("has one beam only", "submit", "width=width", "width=1"),
    ("draws a token of a search", "submit", "candidates=candidates", "candidates=0"),
    ("takes what was generated for a beam's prompt", "branch", "= parent.prompt_length,", "= child.prompt_length,"),
    ("does not know what a beam has computed", "branch", "parent.computed, parent.cached", "0, parent.cached"),
    ("forgets what a beam has found", "branch", "parent.cached\n", "None\n"),
    ("takes each beam for a turn", "branch", "= parent.turn,", "= child.turn,"),
    ("has a beam of no width", "branch", "parent.width,", "1,"),
    ("draws a token of a beam", "branch", "parent.candidates\n", "0\n"),
    ("does not look at what beams go on with", "branch", "= parent.looks_back,", "= False,"),
    ("takes a beam for a new turn", "branch", "parent.state\n", '"queued"\n'),
    ("does not count the beams of a session", "branch", "session.active += 1", "pass"),
    ("runs the latest beams last", "branch", "self._start(child)", "self.running.append(child)"),
    ("does not run a beam", "branch", "self._start(child)", "pass"),
    ("forgets the limit of beams", "branch", "limit=parent.limit", "limit=None"),
    ("forgets the seed of beams", "branch", "seed=parent.seed", "seed=1"),
    ("forks the prompt of a beam only", "branch", "parent.computed, session", "parent.prompt_length, session"),
    ("does not share the system prompt with beams", "branch",
     "tuple(parent.tokens), parent.system_tokens", "tuple(parent.tokens), 0"),
    ("goes on with a beam that was dropped", "drop", "self._dequeue(sequence)", "pass"),
    ("keeps the blocks of a beam that was dropped", "drop", "self._leave(sequence, reason)", "pass"),
    ("lets a beam that was dropped rest", "drop", "self._leave(sequence, reason)", "self._rest(sequence, reason)"),
    ("keeps a table that nobody wants", "let_go", 'sequence.state == "resting"', "False"),
    ("releases a table that does not rest", "let_go", 'sequence.state == "resting"', "True"),
    ("goes on with a beam before the others", "schedule", " and not sequence.waits", ""),
    ("lets beams wait that lost their blocks", "drop_pending", "self.waits = False", "pass"),
    ("takes the latest beams for the newest", "age", "self.turn, self.id", "self.id, self.turn"),
    ("has room for one beam of a search", "_admit_others", "else sequence.width", "else 1"),
    ("needs all places again for each beam", "_admit_others",
     "sequence.width > 1 and self._has_place(sequence.turn)", "False"),
    ("lets searches have the places of others", "_admit_others", "taken > max(places, 0)", "places <= 0"),
    ("holds back who has a place while fewer may run", "_admit_others", "taken > max(places, 0)", "taken > places"),
    ("lets all wait for one who has no place", "_admit_others", " and not self._nobody_computes()", ""),
    ("lets beams come back without a place", "_has_place", "running.turn == turn", "True"),
    ("gives a place to each search", "_places", "sum(beams.values())", "len(beams)"),
    ("counts the places of each beam", "_places",
     "sum(beams.values())", "sum(s.width for s in self.running if s.width > 1)"),
    ("takes beams for others", "_places", "sum(s.width == 1 for s in self.running)", "len(self.running)"),
    ("lets all wait for one that has no room", "_admit_others", "if self._nobody_computes():", "if False:"),
    ("clears the way although others run", "_admit_others", "if self._nobody_computes():", "if True:"),
    ("clears the way as soon as somebody waits", "_nobody_computes", "all(", "any("),
    ("says that beams have moved on", "take", "return False", "return True"),
    ("says that beams wait", "take", "return True", "return False"),
    ("starts a beam again and again that will never fit", "_append", " or _waits_for(s, victim)", ""),
    ("lets a beam clear the way of its own search", "_clear_the_way", "if s.turn != sequence.turn), None", "), None"),
    ("clears the oldest out of the way", "_clear_the_way", "reversed(self.running)", "self.running"),
    ("clears all out of the way", "_clear_the_way", "if s.turn == newest", "if s.turn != sequence.turn"),
    ("clears one beam out of the way", "_clear_the_way", "if s.turn == newest]", "if s.turn == newest][-1:]"),
    ("says nothing of those who clear the way", "_clear_the_way", "step.preempted.append(beam)", "pass"),
    ("waits for one that will never fit", "_clear_the_way", "step.exhausted.append(sequence)", "pass"),
    ("keeps beams in flight", "Sequence.__init__", "or candidates > 0", ""),
    ("does not let beams wait", "take", "= candidates, True", "= candidates, False"),
    ("does not wait for the other beams", "take", "all(other.waits for other in self.live)", "True"),
    ("waits for one beam only", "take", "all(other.waits for other in self.live)",
     "sum(other.waits for other in self.live) > 1"),
    ("mistakes one beam for another", "_move_on", "for beam in self.live])", "for beam in reversed(self.live)])"),
    ("forks for what will not rest", "_move_on", " if self._session.keeps else []", ""),
    ("lets nothing rest before the end", "_move_on", "self._newly_finished() if self._session.keeps else []", "[]"),
    ("does not drop beams", "_move_on", "if parent not in heirs", "if False"),
    ("drops those that have one heir", "_move_on", "if parent not in heirs", "if len(heirs.get(parent, ())) < 2"),
    ("has the beams in another order", "_move_on",
     "beam.tokens] for beam in self.search.live", "beam.tokens] for beam in reversed(self.search.live)"),
    ("goes on with what has finished", "_move_on", "self._rest(tokens, sequences[tokens])", "pass"),
    ("keeps what was worse than the answers", "_move_on",
     "self.search.finished if self.live else self.search.best", "self.search.finished"),
    ("keeps the answers so far only", "_move_on",
     "self.search.finished if self.live else self.search.best", "self.search.best"),
    ("keeps whatever has finished", "_move_on",
     "self._drop_worse(self.search.finished if self.live else self.search.best)", "pass"),
    ("lets rest what was worse than the answers", "_newly_finished",
     "self.search.best if self.search.is_over else ", ""),
    ("lets what rests finish again", "_newly_finished", " if tokens not in self._rested", ""),
    ("forgets the next token of a beam", "_hand_down", "heir.tokens.append(tokens[-1])", "pass"),
    ("lets beams wait for ever", "_hand_down", "heir.waits = False", "pass"),
    ("hands the same tokens to all", "_hand_down",
     "heir.tokens.append(tokens[-1])", "heir.tokens.append(heirs[0][-1])"),
    ("drops what has finished", "BeamGroup._rest", "self._scheduler.end(", "self._scheduler.drop("),
    ("forgets what rests", "BeamGroup._rest", "self._rested[tokens] = beam", "pass"),
    ("never releases what is worse", "_drop_worse", "self._scheduler.let_go(", "hasattr("),
    ("lets no live beam rest", "BeamGroup.end", "self._rest(tokens, beam)", "self._scheduler.drop(beam, reason)"),
    ("lets all live beams rest", "BeamGroup.end",
     "self._scheduler.drop(beam, reason)", "self._scheduler.end(beam, reason)"),
    ("leaves live beams behind", "BeamGroup.end", "self._scheduler.drop(beam, reason)", "pass"),
    ("keeps at its end what is worse", "BeamGroup.end", "self._drop_worse(best)", "pass"),
    ("does not number its answers", "BeamGroup.end", "self._rested[tokens].choice = choice", "pass"),
    ("has live beams after its end", "BeamGroup.end", "self.live = []", "pass"),
    ("has live beams after a failure", "BeamGroup.fail", "live, self.live = self.live, []", "live = self.live"),
    ("fails one beam only", "BeamGroup.fail", "for beam in live for", "for beam in live[:1] for"),
    ("drops what failed", "BeamGroup.fail",
     "self._scheduler.fail(beam, reason)", "[self._scheduler.drop(beam, reason)][:0]"),
    ("lets rest what had finished before it failed", "BeamGroup.fail", "self._drop_worse([])", "pass"),
    ("says that beams were preempted that failed", "BeamGroup.fail", " if holder not in live]", "]"),
]
# fmt: on


@pytest.mark.parametrize(("method", "right", "wrong"), [fault[1:] for fault in FAULTS], ids=[f[0] for f in FAULTS])
def test_the_machine_finds_a_scheduler_that(
    method: str, right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[Scheduler.__module__]
    *of, method = method.split(".")
    owners = [owner for owner in OWNERS if method in vars(owner) and of in ([], [owner.__name__])]
    owner = next(iter(owners), module)
    whole = inspect.getattr_static(owner, method)
    function: Any = whole.fget if isinstance(whole, property) else whole
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) == 1, f"{method} has changed; its fault must change too"
    defined: dict[str, object] = {}
    exec(source.replace(right, wrong), dict(vars(sys.modules[function.__module__])), defined)
    monkeypatch.setattr(owner, method, defined[method])
    assert is_found([*RARE, *range(400)])


def is_found(seeds: Iterable[int]) -> bool:
    """Whether one of the walks fails, with whatever it raises."""
    try:
        walks(seeds)
    except Exception:
        return True
    return False
