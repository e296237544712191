"""The heart of the engine, without a thread: model, pool, scheduler and turns, one step at a time.

    submit ─▶ scheduler ─▶ step ─▶ model ─▶ token ─▶ text ─▶ stream
                  │                                    │
                block tables ─▶ events ─▶ listeners    └─ ended? its table rests

Where the model runs on a device of its own, a step stays in flight while the next one is scheduled and launched, and
is delivered then. Where it does not, every step is delivered before the next one is scheduled; nothing else differs.

Everything here belongs to the one thread that calls it.
"""

import logging
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from chatpage import tutor
from chatpage.cache.pool import BlockPool
from chatpage.errors import ModelError, RequestError, SettingError
from chatpage.events import Event, EventLog, Snapshot
from chatpage.model.batch import Draw, Drawn, Row
from chatpage.model.kv import empty_cache, lacks_memory
from chatpage.model.load import load
from chatpage.model.step import Launched
from chatpage.pace import Pace
from chatpage.schedule.beam import Beams, BeamSearch
from chatpage.schedule.group import BeamGroup
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, FinishReason, Prompt, Request
from chatpage.schedule.scheduler import Chunk, Scheduler, Step
from chatpage.schedule.sequence import Sequence
from chatpage.schedule.session import Session
from chatpage.settings import Settings
from chatpage.startup import Startup
from chatpage.stream import Stream
from chatpage.text.answer import Answer
from chatpage.text.template import ChatTemplate
from chatpage.trace import Trace
from chatpage.turn import Search, Turn

log = logging.getLogger(__name__)

Listener = Callable[[Snapshot | None, list[Event]], None]

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant. Answer briefly and clearly, and say so when you do not know."
FAILED = Drawn(error="The step that computed this answer failed; please try again.")
MADE_WAY = 8  # times that a sequence makes way for others before its next token
NO_MEMORY = Drawn(error="There is too little memory left for the next token of this answer; please try again later.")


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """An operator's system prompt; `tokens` are those that every conversation under it begins with."""

    name: str
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Raised:
    """What could not be launched, or not be computed."""

    error: Exception

    def drawn(self) -> list[Drawn]:
        raise self.error


@dataclass(slots=True)
class Flight:
    """A step that was launched, and is not delivered yet.

    Attributes:
        launched: None where it must run again, because the step before did not write what this one read.
        is_copied: whether its block copies were made; otherwise it cannot run again.
        stays: whether it may stay in flight while the next step is scheduled.
    """

    step: Step
    launched: Launched | None
    is_copied: bool
    stays: bool

    def spoil(self) -> None:
        """The step before failed."""
        self.stays = False
        if self.is_copied:
            self.launched = None


class Core:
    """Loads a model, computes the system prompts, and then serves turns step by step.

    Args:
        say: is told, in a few words, what start-up does.

    Raises:
        ChatPageError: the model or a setting cannot be used.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.sharing = settings.resolved_sharing
        say(f"Loading {settings.model or 'the bundled model'}")
        self.loaded = load(
            settings.model or tutor.path(),
            device=settings.device,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
        )
        self.model_name = self.loaded.name if settings.model else "chatpage-tutor"
        self.notes = list(self.loaded.notes)
        self.tokenizer = self.loaded.tokenizer
        self.stop_token_ids = self.loaded.stop_token_ids
        self.template = ChatTemplate(self.tokenizer)
        self.token_text = lru_cache(maxsize=65_536)(lambda token: self.tokenizer.decode([token]))
        texts = settings.system_prompt or [self._default_system_prompt()]
        systems = [self._system_prompt(number, text) for number, text in enumerate(texts, 1)]
        longest = max(len(system.tokens) for system in systems)
        started = Startup(self.loaded, settings, say, shortest=longest + 2)
        self.runner, self.max_model_len = started.runner, started.max_model_len
        self.notes += started.notes
        self._events: list[Event] = []  # since they were handed out last
        events = EventLog()
        events.listeners.append(self._events.append)
        self.pool = BlockPool(self.runner.pool.num_blocks, settings.block_size, events)
        self.scheduler = Scheduler(
            self.pool, max_sequences=settings.max_sequences, max_step_tokens=settings.max_step_tokens
        )
        self._pace = Pace(self.scheduler)
        self.view = Snapshot.empty(
            events,
            block_size=settings.block_size,
            num_blocks=self.pool.num_blocks,
            bytes_per_block=self.runner.pool.bytes_per_block,
            max_model_len=self.max_model_len,
        )
        self.counts: Counter[str] = Counter()
        self.turns: dict[int, Turn] = {}
        self._flight: Flight | None = None
        self._listeners: list[Listener] = []
        self._outbox: list[tuple[Stream, Delta]] = []  # told after the events: nobody knows more than the panel
        if settings.trace:
            self.add_listener(Trace(settings.trace, sharing=self.sharing))
        say("Computing the system prompt")
        self.systems = [self._compute_system_prompt(number, system) for number, system in enumerate(systems, 1)]

    # -- system prompts -------------------------------------------------------------------------------------------

    def _default_system_prompt(self) -> str:
        """The model's own, or none where its template takes none."""
        text = tutor.system_prompt() if self.settings.model is None else DEFAULT_SYSTEM_PROMPT
        try:
            self.template.system_prefix(text)
        except RequestError:
            self.notes.append("This model's chat template takes no system prompt.")
            return ""
        return text

    def _system_prompt(self, number: int, text: str) -> SystemPrompt:
        name = "default" if number == 1 else f"system prompt {number}"
        self.template.remember(text)
        return SystemPrompt(name, text, tuple(self.template.system_prefix(text)))

    def _compute_system_prompt(self, number: int, system: SystemPrompt) -> SystemPrompt:
        """Compute a system prompt once, and pin it, so that no session computes it again."""
        if len(system.tokens) + 1 >= self.max_model_len:
            raise SettingError(
                f"--system-prompt number {number} has {len(system.tokens)} tokens; it must leave room for a "
                f"question and an answer in a context of {self.max_model_len}."
            )
        if self.sharing != "off" and system.tokens:
            self._prefill_and_pin(system)
        return system

    def _prefill_and_pin(self, system: SystemPrompt) -> None:
        session = Session(0, domain=None, keeps=False)
        prompt = Prompt(system.tokens, len(system.tokens))
        sequence = self.scheduler.submit(session, prompt, SamplingParams(), draws=False)
        while sequence.computed < len(sequence.tokens):
            step = self.scheduler.schedule()
            if step.exhausted:
                raise self._too_many_system_prompts()
            self._flight = self._launch(step)
            self.settle()
        sequence.table.publish(sequence.tokens, sequence.computed, tail=True)
        for logical, block in enumerate(sequence.table.blocks):
            self.pool.pin(block, logical=logical, at=len(system.tokens), name=system.name)
        self.scheduler.end(sequence, "the system prompt is computed")
        self._hand_out_events()

    def _too_many_system_prompts(self) -> SettingError:
        texts, size = self.settings.system_prompt, self.pool.block_size
        needed = 1 + sum(-(-len(self.template.system_prefix(text)) // size) for text in texts)  # one is for a question
        return SettingError(
            f"--system-prompt is given {len(texts)} times, and --kv-blocks is {self.pool.num_blocks}, which is too few "
            f"for that: use --kv-blocks {needed}, or shorten or leave out a --system-prompt."
        )

    # -- turns ----------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def submit(self, request: Request, session: Session | None, *streams: Stream) -> None:
        """Queue a turn, with a reply for each stream. One that is refused gets a `done` delta that says why."""
        params, length = request.params, len(request.prompt.tokens)
        refusal = self._refusal(session)
        if session is None or refusal:
            refused = Delta("done", prompt_tokens=length, finish_reason="error", error=refusal)
            self._outbox += [(stream, refused) for stream in streams]
            return
        limits = (self.max_model_len - length, params.max_tokens, self.settings.max_output_tokens)
        limit = min(limit for limit in limits if limit is not None)
        new_answer = partial(
            Answer,
            self.tokenizer,
            stop_token_ids=self.stop_token_ids.union(params.stop_token_ids),
            stops=(*params.stop, *self.template.stops),
            limit=limit,
            min_tokens=params.min_tokens,
        )
        self.counts["prompt_tokens"] += length
        if request.beams:
            turns = [self._begin_search(request, request.beams, session, limit, new_answer, list(streams))]
        else:
            turns = self._begin_replies(request, session, limit, new_answer, streams)
        for turn in turns:
            self.turns[turn.sequences[0].id] = turn
            self._tell(turn, turn.delta("queued"))

    def _begin_replies(
        self,
        request: Request,
        session: Session,
        limit: int,
        new_answer: Callable[[], Answer],
        streams: tuple[Stream, ...],
    ) -> list[Turn]:
        params, length = request.params, len(request.prompt.tokens)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        first = self.scheduler.submit(session, request.prompt, params, seed=seed, limit=length + limit)
        others = [self.scheduler.submit_reply(first, choice) for choice in range(1, len(streams))]
        return [Turn(reply, new_answer(), stream) for reply, stream in zip((first, *others), streams, strict=True)]

    def _begin_search(
        self,
        request: Request,
        beams: Beams,
        session: Session,
        limit: int,
        new_answer: Callable[[], Answer],
        streams: list[Stream],
    ) -> Turn:
        params, length = request.params, len(request.prompt.tokens)
        stops = self.stop_token_ids.union(params.stop_token_ids)
        search = BeamSearch(beams, stop_token_ids=stops, max_tokens=limit)
        first = self.scheduler.submit(
            session, request.prompt, params, limit=length + limit, width=beams.width, candidates=search.candidates
        )
        return Search(first, BeamGroup(self.scheduler, search, first), new_answer, streams)

    @staticmethod
    def _refusal(session: Session | None) -> str | None:
        if session is None:
            return "The session was closed."
        if session.keeps and session.active:
            return "This session has a turn that is still running; wait for it, or stop it."
        return None

    def cancel(self, stream: Stream) -> None:
        """End the turn of this stream, if it runs or waits. All answers of a search end together."""
        turn = next((turn for turn in self.turns.values() if stream in turn.streams), None)
        if turn is not None:
            self._finish(turn, "abort")

    def close(self, session: Session) -> None:
        """End a session's turn and release its blocks."""
        for turn in self._turns_of(session):
            self._finish(turn, "abort")
        self.scheduler.wake(session, "the session was closed")

    def keep(self, session: Session, choice: int) -> None:
        """End and release all replies of a session's newest turn but one, if it has that one."""
        live = {turn: turn.sequences[0] for turn in self._turns_of(session)}
        newest = max((sequence.turn for sequence in (*live.values(), *session.resting)), default=0)
        if not any((s.turn, s.choice) == (newest, choice) for s in (*live.values(), *session.resting)):
            return
        for turn, sequence in live.items():
            if sequence.turn == newest and sequence.choice != choice:
                self._finish(turn, "abort")
        if any(sequence.turn == newest for sequence in session.resting):
            self.scheduler.keep(session, choice)

    def _turns_of(self, session: Session) -> list[Turn]:
        return [turn for turn in self._all_turns() if turn.session is session]

    def _all_turns(self) -> list[Turn]:
        """Each once, however many sequences it has."""
        return list(dict.fromkeys(self.turns.values()))

    def expire(self, rested_before: float) -> None:
        """Release tables that rest since before this moment of the monotonic clock."""
        resting = self.scheduler.resting
        while resting and (longest := next(iter(resting))).rested_at <= rested_before:
            self.scheduler.wake(longest, "the session expired")

    def end_all(self, error: str | None) -> None:
        """Tell every reader that nothing more will come: the turn was cut off, or failed with this error.

        What is in flight is not waited for.
        """
        self._flight = None
        for turn in self._all_turns():
            try:
                self._finish(turn, "error" if error else "abort", error=error)
            except Exception:  # the other readers wait too
                log.exception("A turn could not be ended in order")
        try:
            self._hand_out()
        except Exception:  # the readers were told all the same
            log.exception("The events of the end do not fit")

    # -- watching -------------------------------------------------------------------------------------------------

    def add_listener(self, listener: Listener) -> None:
        """Call `listener(snapshot, [])` now, with a copy of its own, and `listener(None, events)` after each step."""
        self._hand_out_events()
        listener(deepcopy(self.view), [])
        self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    def places(self, session: Session) -> list[tuple[int, list[int], list[int]]]:
        """Id, tokens that have a slot, and block table of each of a session's sequences."""
        sequences = [sequence for turn in self._turns_of(session) for sequence in turn.sequences]
        sequences += session.resting
        return [(s.id, s.tokens[: s.table.length], list(s.table.blocks)) for s in sequences]

    def check(self) -> None:
        """Prove the cache's invariants, and that the events tell the same story as the pool."""
        self.pool.check(self.scheduler.tables())
        assert list(self.view.ref) == self.pool.ref, "the events and the pool disagree on references"
        assert list(self.view.fill) == self.pool.fill, "the events and the pool disagree on fills"

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Launch what the scheduler chooses, deliver what was in flight meanwhile, and tell readers and listeners.

        Returns:
            Whether anything came of it.

        Raises:
            RuntimeError: the model computes nothing any more.
        """
        step = self.scheduler.schedule()
        self._tell_preempted(step.preempted)
        for sequence in step.exhausted:
            self._finish(self.turns[sequence.id], "length")
        if self._outbox:  # who was cancelled or preempted need not wait for the model
            self._hand_out()
        behind, self._flight = self._flight, self._launch(step)
        if behind:
            self._deliver(behind)
        if self._flight and not self._flight.stays:
            self.settle()
        self._hand_out()
        if self.settings.paranoid:
            self.check()
        return bool(step.chunks or step.preempted or step.exhausted or behind)

    def settle(self) -> None:
        """Wait for the step in flight, if there is one, and deliver it."""
        flight, self._flight = self._flight, None
        if flight:
            self._deliver(flight)

    def _hand_out(self) -> None:
        """Tell the listeners, then the readers, who hear it whatever becomes of the events."""
        try:
            self._hand_out_events()
        finally:
            outbox, self._outbox = self._outbox, []
            for stream, delta in outbox:
                stream.put(delta)
            Stream.wake([stream for stream, _ in outbox])

    # -- from the scheduler to the device -------------------------------------------------------------------------

    def _launch(self, step: Step) -> Flight | None:
        """Begin to compute a step, behind the one in flight. None where there is nothing to compute."""
        if not step.chunks:
            return None
        is_copied = False
        try:
            self.runner.copy(step.copies)
            is_copied = True
            launched = self.runner.launch(self._rows(step.chunks))
        except Exception as error:
            return Flight(step, Raised(error), is_copied, stays=False)
        return Flight(step, launched, is_copied, stays=self.runner.overlaps and not step.is_awaited)

    def _rows(self, chunks: list[Chunk]) -> list[Row]:
        in_flight = self._flight.step.chunks if self._flight else ()
        places = {chunk.sequence: place for place, chunk in enumerate(in_flight)}
        return [
            self._row(chunk, places[chunk.sequence] if chunk.end > len(chunk.sequence.tokens) else None)
            for chunk in chunks
        ]

    def _row(self, chunk: Chunk, source: int | None = None) -> Row:
        """With a source, the token is still on the device."""
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        tokens = sequence.tokens[start:end] if source is None else [0]
        draw = self._draw(sequence, end) if chunk.draws else None
        return Row(tokens, start, sequence.table.blocks, chunk.stores, draw, source)

    def _draw(self, sequence: Sequence, position: int) -> Draw:
        params = sequence.params
        is_too_short = position - sequence.prompt_length < params.min_tokens
        banned = self.stop_token_ids.union(params.stop_token_ids) if is_too_short else ()
        tokens, prompt_length = sequence.tokens, sequence.prompt_length
        return Draw(
            params, sequence.seed, sequence.choice, position, tokens, prompt_length, banned, sequence.candidates
        )

    def _read(self, flight: Flight) -> list[Drawn]:
        """What each chunk gave; an error for those whose computation raises.

        Raises:
            RuntimeError: all of them fail, and so does a token that nobody asked for.
        """
        chunks = flight.step.chunks
        drawn = _attempt(flight.launched.drawn) if flight.launched else self._run_again(chunks)
        if isinstance(drawn, Exception):
            if self._flight:
                self._flight.spoil()
            drawn = self._recover(flight, drawn)
        wanted = (given for chunk, given in zip(chunks, drawn, strict=True) if chunk.is_wanted)
        are_broken = (given.error is not None and given is not NO_MEMORY for given in wanted)
        if next(are_broken, False) and all(are_broken):  # there is one, and so are all
            if self._flight:  # no row can have its token from there, once something else has run
                self._flight.stays = False
            self.runner.require_sound()
        return drawn

    def _recover(self, flight: Flight, error: Exception) -> list[Drawn]:
        """What can be had of a step that raised."""
        chunks = flight.step.chunks
        if not flight.is_copied:
            return self._give_up(chunks, error)
        if not lacks_memory(error):
            return self._run_apart(chunks, error)
        log.warning("Memory was lacking for a step of %d sequences (%s)", len(chunks), error)
        empty_cache()  # often that is enough
        return self._run_again(chunks)

    def _run_again(self, chunks: list[Chunk]) -> list[Drawn]:
        """Run them without those whose blocks may be somebody else's by now."""
        wanted = [chunk for chunk in chunks if chunk.is_wanted]
        given = iter(self._run(wanted) if wanted else [])
        return [next(given) if chunk.is_wanted else Drawn() for chunk in chunks]

    def _run(self, chunks: list[Chunk]) -> list[Drawn]:
        drawn = _attempt(lambda: self.runner.run([self._row(chunk) for chunk in chunks]))
        if isinstance(drawn, Exception):
            return self._run_apart(chunks, drawn)
        self._pace.fits(sum(chunk.count for chunk in chunks))
        return drawn

    def _run_apart(self, chunks: list[Chunk], error: Exception) -> list[Drawn]:
        """Run those that raised together in halves, until only those are left out that raise alone."""
        if lacks_memory(error):
            self._pace.is_lacking()
            empty_cache()
        if len(chunks) > 1:
            log.warning("A step of %d sequences failed (%r); it runs again in halves", len(chunks), error)
            half = len(chunks) // 2
            return [*self._run_again(chunks[:half]), *self._run_again(chunks[half:])]
        if lacks_memory(error) and chunks[0].count > 1:
            return [self._run_in_two(chunks[0])]
        return self._give_up(chunks, error)

    def _run_in_two(self, chunk: Chunk) -> Drawn:
        """Run a chunk that does not fit into memory as two smaller ones, one after the other."""
        half = chunk.count // 2
        [given] = self._run([replace(chunk, count=half, draws=False)])
        if given.error:
            return given
        [given] = self._run([replace(chunk, start=chunk.start + half, count=chunk.count - half)])
        return given

    def _give_up(self, chunks: list[Chunk], error: Exception) -> list[Drawn]:
        log.error("The computation of %d sequences failed", len(chunks), exc_info=error)
        return [NO_MEMORY if lacks_memory(error) else FAILED] * len(chunks)

    # -- and back -------------------------------------------------------------------------------------------------

    def _deliver(self, flight: Flight) -> None:
        """Read a step, end whom it fails, publish what it computed, and hand out what it drew."""
        step, drawn = flight.step, self._read(flight)
        results = list(zip(step.chunks, drawn, strict=True))
        broken = [(chunk, given.error) for chunk, given in results if given.error]
        self._make_way([chunk.sequence for chunk, error in broken if error == NO_MEMORY.error and chunk.is_wanted])
        self._pace.next_step()
        self._end_broken({chunk.sequence: error for chunk, error in broken if chunk.is_wanted})
        self.scheduler.finish(step)
        self.counts["steps"] += 1
        self.counts["computed_tokens"] += sum(chunk.count for chunk in step.chunks)
        generated = 0
        for chunk, given in results:
            turn = self.turns.get(chunk.sequence.id)
            if turn is None or not chunk.is_wanted:
                continue
            if given.token is None and not given.candidates:
                self._tell(turn, turn.delta("prefill"))
            else:
                generated += 1
                self._add(turn, chunk.sequence, given)
        self.counts["generated_tokens"] += generated

    def _make_way(self, sequences: list[Sequence]) -> None:
        """Preempt those for whose next token there was no memory: it may be there when others have ended.

        Who has no memory alone either, or again and again, is left to end.
        """
        lacking: defaultdict[Turn, list[Sequence]] = defaultdict(list)
        for sequence in sequences:
            if turn := self.turns.get(sequence.id):
                lacking[turn].append(sequence)
        is_alone = len({self.turns.get(sequence.id) for sequence in self.scheduler.running}) == 1
        for turn, beams in lacking.items():
            length = len(beams[0].tokens)
            if turn.made_way_at != length:
                turn.made_way, turn.made_way_at = 0, length
            if turn.made_way < (1 if is_alone else MADE_WAY):
                turn.made_way += 1
                for beam in beams:
                    self.scheduler.preempt(beam, "memory is full")
                self._tell_preempted(beams)

    def _end_broken(self, errors: dict[Sequence, str]) -> None:
        """End those whose computation failed; who held one of their blocks computes again."""
        if not errors:
            return
        copies = self._flight.step.copies if self._flight else ()
        culprits, preempted = self.scheduler.distrust(list(errors), copies)
        self._tell_preempted(preempted)
        for sequence in culprits:
            if sequence.state != "done":  # it has not failed with another beam
                self._fail(sequence, errors[sequence])

    def _fail(self, sequence: Sequence, error: str) -> None:
        turn = self.turns.get(sequence.id)
        if turn is None:
            raise ModelError(f"The system prompt cannot be computed: {error}")
        self._finish(turn, "error", error=error)

    def _add(self, turn: Turn, sequence: Sequence, drawn: Drawn) -> None:
        """What a step gave to an answer, which may end by it."""
        before = turn.sequences
        news = turn.add(sequence, drawn)
        if news is None:
            return
        if turn.sequences is not before:  # some beams were dropped, and others forked
            for beam in before:
                del self.turns[beam.id]
            self.turns.update({beam.id: turn for beam in turn.sequences})
        if news.finish_reason is None:
            self._tell(turn, news)
        else:
            self._finish(turn, news.finish_reason, news=news)

    def _finish(self, turn: Turn, reason: FinishReason, *, error: str | None = None, news: Delta | None = None) -> None:
        for sequence in turn.sequences:
            del self.turns[sequence.id]
        try:
            self._tell_preempted(turn.end(self.scheduler, reason))
        finally:  # whatever is wrong with the cache, nobody waits for ever
            self.counts["cached_tokens"] += turn.found
            for stream, delta in zip(turn.streams, turn.last(reason, error, news), strict=True):
                self.counts[delta.finish_reason or reason] += 1
                self._outbox.append((stream, delta))

    def _tell(self, turn: Turn, delta: Delta) -> None:
        for stream in turn.streams:
            self._outbox.append((stream, delta))

    def _tell_preempted(self, sequences: list[Sequence]) -> None:
        for turn in dict.fromkeys(self.turns[sequence.id] for sequence in sequences):
            self._tell(turn, turn.delta("preempted"))

    def _hand_out_events(self) -> None:
        if not self._events:
            return
        events = self._events[:]
        self._events.clear()
        self.view.apply_all(events)
        for listener in self._listeners[:]:
            try:
                listener(None, events)
            except Exception:  # a full disk or a closed event loop is no reason to end anybody's answer
                log.exception("A listener failed; it hears no more")
                self._listeners.remove(listener)


def _attempt(compute: Callable[[], list[Drawn]]) -> list[Drawn] | Exception:
    """What was computed, or what was raised."""
    try:
        return compute()
    except Exception as error:
        return _without_frames(error)


def _without_frames(error: Exception) -> Exception:
    """An error that says that memory is lacking must not hold on to what the frames that it passed have allocated."""
    if lacks_memory(error):
        link: BaseException | None = error
        while link is not None:
            link.__traceback__ = None
            link = link.__cause__ or link.__context__
    return error
