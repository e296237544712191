"""`chatpage chat`: the same engine for one person, in a terminal.

Answers and what commands draw go to stdout, everything else (progress, figures, mistakes) to stderr. Where stdin or
stdout is no terminal, each line is a message or a command, and there is no prompt.
"""

import contextlib
import difflib
import os
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from chatpage.conversation import Conversation, Exchange
from chatpage.engine import Engine
from chatpage.errors import ChatPageError, RequestError
from chatpage.events import Event, SequenceView, Snapshot
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta
from chatpage.settings import Settings
from chatpage.stream import Stream

POLL_SECONDS = 0.1
STOP_SECONDS = 10.0  # for the step that runs when the chat ends
PLAIN_COLUMNS = 120  # where no terminal says how wide it is
BAR = 8  # characters of a block's fill
INTERRUPTED = 130  # the exit status of a program that Ctrl-C has ended

# A model may write anything, and a terminal obeys control characters: only newline and tab are let through.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

COMMANDS = {
    "/blocks": "draw this chat's block table: which block of the pool holds what, and with whom it is shared",
    "/retry": "answer the last question again; the answer that it has stays in a branch of its own",
    "/edit N TEXT": "ask TEXT in place of question N; what came after that stays in a branch of its own",
    "/branches": "draw all questions as a tree; * marks the branch you are in",
    "/switch N": "go to the branch with question N",
    "/clear": "forget everything and begin anew",
    "/help": "show this",
    "/quit": "end, as Ctrl-D does",
}


def chat(settings: Settings, params: SamplingParams) -> int:
    """Load the model, talk until the input ends, and end the engine. Returns the exit status.

    Raises:
        ChatPageError: the model or a setting cannot be used.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]: they are text files
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    engine, watch = Engine(settings), Watch()
    engine.subscribe(watch.hear)
    engine.start()
    try:
        _wait_ready(engine)
        return Chat(engine, params, watch).run()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answers has gone; nothing may be flushed to there at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends already
        engine.stop(STOP_SECONDS)


def _wait_ready(engine: Engine) -> None:
    said = ""
    while engine.status == "starting":
        time.sleep(POLL_SECONDS)
        if engine.status == "starting" and engine.detail != said:
            said = engine.detail
            note(f"{said} …")
    engine.wait_ready()
    slots = f"{engine.num_blocks} blocks of {engine.block_size} slots"
    note(f"{engine.model_name} is ready on {engine.device} in {engine.dtype}: {slots}. /help shows what you can do.")
    for line in engine.notes:
        note(line)


class Chat:
    """One conversation, its commands, and what is shown of it."""

    def __init__(self, engine: Engine, params: SamplingParams, watch: "Watch") -> None:
        self.engine = engine
        self.params = params
        self.watch = watch
        self.talk = Conversation(engine)
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.failures = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/blocks": self._blocks,
            "/retry": self._retry,
            "/edit": self._edit,
            "/branches": self._branches,
            "/switch": self._switch,
            "/clear": self._clear,
            "/help": self._help,
        }

    def run(self) -> int:
        """Read and answer until the end. Where nobody watches, the status is 1 if anything could not be answered."""
        for line in self._typed() if self.interactive else sys.stdin:
            if line.split()[:1] == ["/quit"]:
                break
            try:
                self._obey(line.rstrip("\r\n"))
            except ChatPageError as error:
                self._complain(str(error))
        return 1 if self.failures and not self.interactive else 0

    def _typed(self) -> Iterator[str]:
        """What is typed line by line, up to Ctrl-D. Ctrl-C clears the line: it may have been meant for an answer."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives `input` a history and keys to edit with
        while True:
            try:
                line = input(f"{len(self.talk.asked) + 1}> ")
            except KeyboardInterrupt:
                print()
                note("Ctrl-D or /quit ends the chat.")
            except EOFError:
                break
            else:
                yield line
        print()

    def _obey(self, line: str) -> None:
        """Answer a message, or do what a command says; a line that begins with a space is always a message."""
        if not line.startswith("/"):
            if line.strip():
                self._answer(lambda: self.talk.say(line.strip(), self.params))
            return
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1, cutoff=0)[0]
            raise RequestError(f"{name} is not a command; did you mean {near}? (A space before it makes it a message.)")
        self._commands[name](rest.strip())

    def _complain(self, sentence: str) -> None:
        self.failures += 1
        note(sentence)

    # -- an answer ------------------------------------------------------------------------------------------------

    def _answer(self, begin: Callable[[], Stream]) -> None:
        """Show an answer as it comes, and its figures after it. Ctrl-C stops it, and the chat goes on."""
        began, delta = time.monotonic(), None
        with CtrlC(self.talk.stop) if self.interactive else contextlib.nullcontext() as ctrl_c:
            stream = begin()
            if ctrl_c and ctrl_c.pressed:  # before there was anything to stop
                stream.cancel()
            for delta in stream:
                print(printable(delta.text), end="", flush=True)
        assert delta is not None
        print(flush=True)
        note(figures(delta, time.monotonic() - began))
        if delta.error:
            self._complain(delta.error)

    # -- commands -------------------------------------------------------------------------------------------------

    def _retry(self, _: str) -> None:
        self._answer(lambda: self.talk.regenerate(self.params))

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        exchange, shown = self._numbered(number), self.talk.shown
        if exchange not in shown:
            raise RequestError(f"Question {number} is in another branch; /switch {number} goes there.")
        self._answer(lambda: self.talk.edit(2 * shown.index(exchange), text.strip(), self.params))

    def _switch(self, rest: str) -> None:
        self.talk.show(self._numbered(rest))
        shown, asked = self.talk.shown, self.talk.asked
        print(printable(shown[-1].text))
        note(f"You are in the branch {' - '.join(str(asked.index(exchange) + 1) for exchange in shown)}.")

    def _branches(self, _: str) -> None:
        for line in tree_lines(self.talk.asked, self.talk.shown):
            print(line[: _columns()])

    def _clear(self, _: str) -> None:
        self.talk.clear()

    def _help(self, _: str) -> None:
        for usage, explained in COMMANDS.items():
            print(f"{usage:<14}{explained}")
        print("Ctrl-C stops an answer. A line that begins with a space is a message, whatever follows.")

    def _blocks(self, _: str) -> None:
        session = self.talk.session
        described = self.engine.describe(session.view_token)
        assert described is not None  # the view token is that of the chat's own session
        texts = {place["id"]: [token["text"] for token in place["tokens"]] for place in described["sequences"]}
        for line in self.watch.drawing(session.id, texts):
            print(line[: _columns()])

    def _numbered(self, number: str) -> Exchange:
        asked = self.talk.asked
        if not number.isdecimal() or not 1 <= int(number) <= len(asked):
            allowed = f"it must be a number from 1 to {len(asked)}" if asked else "nothing was asked yet"
            raise RequestError(f"The question is {number!r}; {allowed}.")
        return asked[int(number) - 1]


class CtrlC:
    """While this lasts, the first Ctrl-C calls `stop`; the second one interrupts as usual."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self.pressed = False
        self._stop = stop

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._stop()


# -- what is shown -----------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters other than newline and tab."""
    return text.translate(CONTROL)


def note(line: str) -> None:
    """A line that is no answer, on stderr; dim where that is a terminal."""
    line = printable(line)
    fancy = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    print(f"\x1b[2m{line}\x1b[0m" if fancy else line, file=sys.stderr, flush=True)


def figures(last: Delta, seconds: float) -> str:
    """`12 tokens in 0.5 s (24.0 a second); 40 of 48 prompt tokens found in the cache.`"""
    count = last.completion_tokens
    ended = {"abort": "; stopped", "length": "; cut off at its longest length", "error": "; failed"}
    return (
        f"{_counted(count, 'token')} in {seconds:.1f} s ({count / max(seconds, 1e-9):.1f} a second); "
        f"{last.cached_tokens} of {_counted(last.prompt_tokens, 'prompt token')} found in the cache"
        f"{ended.get(last.finish_reason or '', '')}."
    )


def tree_lines(asked: Sequence[Exchange], shown: Sequence[Exchange]) -> list[str]:
    """Every question with its number, indented where branches part; * marks those that are shown.

    * 1  What is a block?
      2  ├─ And a slot?
      3  │  Why?
    * 4  └─ And a page?
    """
    numbers = {exchange: number for number, exchange in enumerate(asked, 1)}
    after: dict[Exchange | None, list[Exchange]] = defaultdict(list)
    for exchange in asked:
        after[exchange.before].append(exchange)
    lines: list[str] = []
    waiting: list[tuple[Exchange, str, str]] = []  # with what is drawn before it, and before all that follows it

    def expect(before: Exchange | None, indent: str) -> None:
        for exchange in reversed(after[before]):
            lead, more = ("└─ ", "   ") if exchange is after[before][-1] else ("├─ ", "│  ")
            parts = len(after[before]) > 1
            waiting.append((exchange, indent + lead, indent + more) if parts else (exchange, indent, indent))

    expect(None, "")
    while waiting:
        exchange, lead, indent = waiting.pop()
        mark = "*" if exchange in shown else " "
        question = printable(" ".join(exchange.question.split()))
        lines.append(f"{mark}{numbers[exchange]:>{len(str(len(asked))) + 1}}  {lead}{question}")
        expect(exchange, indent)
    return lines


class Watch:
    """The state of all blocks, from the events, and which block was copied from which.

    It hears on the engine's thread, and is asked on another one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view: Snapshot | None = None
        self._sources: dict[int, int] = {}

    def hear(self, snapshot: Snapshot | None, events: list[Event]) -> None:
        with self._lock:
            self._view = snapshot or self._view
            assert self._view is not None
            self._view.apply_all(events)
            for event in events:
                if event.kind == "copy":
                    self._sources[event.block] = event.source
                elif event.kind == "allocate":
                    self._sources.pop(event.block, None)

    def drawing(self, session: int, texts: dict[int, list[str]]) -> list[str]:
        """A session's block table.

        Args:
            session: the pseudonym that it has in the events.
            texts: for each of its sequences the text of each token.
        """
        with self._lock:
            view = self._view
            assert view is not None
            here = view.sessions.get(session)
            lines = [] if here else ["This chat holds no blocks yet."]
            for sequence in here.sequences.values() if here else ():
                lines += self._table(view, sequence, texts.get(sequence.id, []))
            counts = view.counts()
        for system in view.system.values():
            lines.append(f"System prompt: {system.tokens} tokens in blocks {_numbers(system.table)}, pinned.")
        lines.append(
            f"Pool: {view.num_blocks} blocks: {counts['used']} used ({counts['pinned']} pinned), {counts['idle']} idle "
            f"(findable: other branches, ended turns), {counts['free']} free."
        )
        return lines

    def _table(self, view: Snapshot, sequence: SequenceView, texts: list[str]) -> Iterator[str]:
        size, count = view.block_size, len(sequence.table)
        yield (
            f"{_counted(sequence.tokens, 'token')} in {_counted(count, 'block')} of {size} slots; "
            f"{_counted(count * size - sequence.tokens, 'slot')} empty."
        )
        yield f"logical  physical  {'fill':<{BAR + 11}}refs  {'held':<24}text"
        for logical, block in enumerate(sequence.table):
            fill = view.fill[block]
            drawn = ("#" * round(BAR * fill / size)).ljust(BAR, ".")
            text = printable("".join(texts[logical * size : (logical + 1) * size]))
            yield (
                f"{logical:>7}  {block:>8}  [{drawn}] {f'{fill}/{size}':<8}{view.ref[block]:>4}  "
                f"{self._held(view, block):<24}{text.replace(chr(10), ' ').replace(chr(9), ' ')}"
            )

    def _held(self, view: Snapshot, block: int) -> str:
        """By whom a block is held beside this sequence; if by nobody, where it comes from."""
        if block in view.pinned():
            return "system prompt, pinned"
        if view.ref[block] > 1:
            return f"shared with {view.ref[block] - 1} more"
        return f"copied on write from {self._sources[block]}" if block in self._sources else "by this chat alone"


def _columns() -> int:
    """How many characters of a drawing fit into a line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_COLUMNS


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _numbers(table: list[int]) -> str:
    return ", ".join(map(str, table))
