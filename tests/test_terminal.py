"""`chatpage chat`: through a pipe, in a terminal, and what it draws."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatpage.cli import CHAT_SETTINGS, SAMPLING, main
from chatpage.conversation import Exchange
from chatpage.engine import Engine
from chatpage.schedule.params import SamplingParams
from chatpage.schedule.request import Delta, Prompt
from chatpage.settings import Settings, flag
from chatpage.stream import Stream
from chatpage.terminal import Chat, CtrlC, Watch, figures, note, printable, tree_lines

ROOT = Path(__file__).parents[1]
CHAT = [sys.executable, "-c", "import sys; from chatpage.cli import main; sys.exit(main())", "chat"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
GREEDY = SamplingParams(temperature=0, max_tokens=12)

posix = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are there on POSIX systems")


# -- as a process ------------------------------------------------------------------------------------------------------


def test_a_message_a_line_through_a_pipe() -> None:
    lines = ["What is a block?", "", "/retry", " /blocks is a command", "/switch 9", "/blocks"]
    done = subprocess.run(
        [*CHAT, "--temperature", "0", "--trace", os.devnull],
        cwd=ROOT,
        env=ENVIRONMENT,
        input="\n".join(lines).encode() + b"\n\xff\xfe\n",
        capture_output=True,
        timeout=120,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "\x1b" not in out + err
    first, again, *rest = out.splitlines()
    assert first == again
    assert first.startswith("A block is")
    assert any(line.startswith("logical  physical") for line in rest)
    assert any("system prompt, pinned" in line for line in rest)
    assert any("copied on write from" in line for line in rest)

    said = err.splitlines()
    assert "Loading the bundled model …" in said
    assert any("chatpage-tutor is ready on cpu in float32" in line for line in said)
    told = [line for line in said if "prompt tokens found in the cache" in line]
    assert len(told) == 4, "one line for each answer, the one to unreadable bytes too"
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s \([\d.]+ a second\); (\d+) of \1 prompt tokens found .+", told[1])
    assert "The question is '9'; it must be a number from 1 to 3." in said
    assert said[-1] == told[-1], "nothing is said at exit"
    assert done.returncode == 1, "not everything could be done"


@posix
def test_ctrl_c_stops_the_answer_and_keeps_the_chat() -> None:
    """The key itself, in a pseudo-terminal. The invariants of a large pool make every step slow enough to stop."""
    with Terminal("--paranoid", "--kv-blocks", 3000, "--temperature", 0) as terminal:
        terminal.expect("1> ")
        terminal.type("What is a block?\n")
        terminal.expect("A bl")
        terminal.type("\x03")
        figures = terminal.expect("found in the cache; stopped.")
        assert int(re.findall(r"(\d+) tokens? in", figures)[-1]) < 40
        terminal.expect("2> ")
        terminal.type("/edit 1 What is a slot?\n")
        terminal.expect("found in the cache.")
        terminal.expect("3> ")
        terminal.type("/branches\n")
        terminal.expect("  1  ├─ What is a block?")
        terminal.expect("* 2  └─ What is a slot?")
        terminal.expect("3> ")
        terminal.press("\x03")  # meant for an answer that has just ended: the chat goes on
        terminal.expect("3> ")
        terminal.type("/quit now\n")
        assert terminal.end() == 0


class Terminal:
    """A chat at the other end of a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        import pty

        self._master, slave = pty.openpty()
        self._unread = ""
        self.process = subprocess.Popen(
            [*CHAT, *map(str, arguments)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def press(self, key: str) -> None:
        """Press a key until something comes: readline is deaf between its prompt and its first wait for one."""
        for _ in range(30):
            self.type(key)
            if select.select([self._master], [], [], 2)[0]:
                return

    def expect(self, text: str) -> str:
        """Read until this text has come. Returns what came before it."""
        deadline = time.monotonic() + 60
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not come, but {self._unread!r}"
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        before, self._unread = self._unread.split(text, 1)
        return before + text

    def end(self) -> int:
        """The exit status. What is still written must be read, or nothing ends."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end: {self._unread!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._unread += os.read(self._master, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    return self.process.wait(20)
        return self.process.returncode


def _take_terminal() -> None:
    """In the new process: keys of this terminal reach it as signals, also where the tests run in the background."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# -- the flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "hot"], "--temperature is 'hot'; it must be a number."),
        (["--temperature", "3"], "--temperature is 3.0; it must be a number from 0 to 2."),
        (["--top-k", "1.5"], "--top-k is '1.5'; it must be a whole number."),
        (["--max-tokens", "0"], "--max-tokens is 0; it must be a whole number from 1 to 2147483647."),
        (["--stop", ""], "--stop holds ''; each must be a string of 1 to 64 characters."),
        (["--block-size", "0"], "--block-size is '0'; it must be a whole number from 1 to 255."),
        (["--port", "80"], "--port is not a setting; did you mean --"),
        (["--temprature", "1"], "--temprature is not a setting; did you mean --temperature?"),
        (["Hello?"], "'Hello?' is not a flag; see --help for what is."),
        (["--system-prompt", "a", "--system-prompt", "b"], "--system-prompt is given 2 times; a chat has one."),
        (["--model", "/no/such"], "--model is '/no/such'; it must be a folder that exists, or an id of the Hub."),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["chat", *arguments])
    shown = capsys.readouterr()
    assert (status, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith(f"chatpage: {said}")


def test_help_tells_what_a_chat_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in [*CHAT_SETTINGS, *SAMPLING]:
        assert flag(name) in shown
    for name in ("host", "port", "api_key", "panel_scope", "max_queue", "session_ttl"):
        assert flag(name) not in shown
    assert "/blocks" in shown


# -- a chat on an engine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[Engine, Watch]]:
    engine, watch = Engine(Settings(device="cpu", kv_blocks=64, max_model_len=512, sharing="system")), Watch()
    engine.subscribe(watch.hear)
    engine.start()
    engine.wait_ready(120)
    yield engine, watch
    engine.stop()


@pytest.fixture
def chat(started: tuple[Engine, Watch]) -> Iterator[Chat]:
    chat = Chat(started[0], GREEDY, started[1])
    yield chat
    chat.talk.close()


def type_in(chat: Chat, monkeypatch: pytest.MonkeyPatch, *lines: str) -> int:
    monkeypatch.setattr(sys, "stdin", [f"{line}\n" for line in lines])
    return chat.run()


def test_the_block_table(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything in it is what the engine says."""
    assert type_in(chat, monkeypatch, "/blocks", "What is a block?") == 0
    assert capsys.readouterr().out.startswith("This chat holds no blocks yet.\nSystem prompt: ")
    type_in(chat, monkeypatch, "/blocks")
    head, columns, *rows, system, pool = capsys.readouterr().out.splitlines()
    described = chat.engine.describe(chat.talk.session.view_token)
    assert described is not None
    tokens = described["sequences"][0]["tokens"]
    blocks, pinned = list(dict.fromkeys(token["block"] for token in tokens)), chat.engine.core.pool.pinned
    assert head.startswith(f"{len(tokens)} tokens in {len(blocks)} blocks of 16 slots; ")
    assert columns.split() == ["logical", "physical", "fill", "refs", "held", "text"]
    read = [re.fullmatch(r" +(\d+) +(\d+)  \[([#.]{8})\] (\d+)/16 +(\d)  (.{24})(.*)", row) for row in rows]
    assert [(int(row[1]), int(row[2])) for row in read if row] == list(enumerate(blocks))
    for row in filter(None, read):
        block = int(row[2])
        assert int(row[4]) == chat.engine.core.pool.fill[block]
        assert int(row[5]) == chat.engine.core.pool.ref[block] == 1
        assert (row[6].strip() == "system prompt, pinned") == (block in pinned)
    assert sum("copied on write from" in row for row in rows) == 1
    assert str(max(pinned)) in system
    assert pool.startswith(f"Pool: 64 blocks: {len(blocks) + 1} used ({len(pinned)} pinned), ")


def test_a_fork_shows_as_shared(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(chat, monkeypatch, "What is a block?")
    fork = chat.talk.fork(1)
    assert list(fork.say("And a slot?", GREEDY))
    capsys.readouterr()
    type_in(chat, monkeypatch, "/blocks")
    assert "shared with 1 more" in capsys.readouterr().out
    fork.close()


def test_commands_that_cannot_be_obeyed(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "/retry",
        "/edit",
        "/edit 1 Hi",
        "/switch x",
        "/bloks",
        "/block",
        "One",
        "/edit 1",
        "/edit 1 Two",
        "/edit 1 Hi",
    ]
    assert type_in(chat, monkeypatch, *lines) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "found in the cache" not in line]
    assert told == [
        "There is no question yet that could be answered again.",
        "The question is ''; nothing was asked yet.",
        "The question is '1'; nothing was asked yet.",
        "The question is 'x'; nothing was asked yet.",
        "/bloks is not a command; did you mean /blocks? (A space before it makes it a message.)",
        "/block is not a command; did you mean /blocks? (A space before it makes it a message.)",
        "The message is empty.",
        "Question 1 is in another branch; /switch 1 goes there.",
    ]


def test_quit_and_clear(chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(chat, monkeypatch, "One", "/clear", "/branches", "/help", "/quit", "Never asked")
    assert chat.talk.asked == []
    assert "/edit N TEXT" in capsys.readouterr().out


def test_an_answer_cannot_command_the_terminal(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evil(text: str, params: SamplingParams) -> Stream:
        stream = Stream(lambda: None)
        stream.put(
            Delta("done", text="a\x1b]0;title\x07\tb\r\n\x9b31mc\x7f é\x00", finish_reason="error", error="\x1bNo.")
        )
        return stream

    monkeypatch.setattr(chat.talk, "say", evil)
    assert type_in(chat, monkeypatch, "Hi") == 1
    shown = capsys.readouterr()
    assert shown.out == "a]0;title\tb\n31mc é\n"
    assert shown.err.endswith("; failed.\nNo.\n")


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_printable_lets_all_text_through() -> None:
    text = "".join(chr(code) for code in range(32, 127)) + "\n\t é 한국어 👩‍💻"
    assert printable(text) == text
    assert printable("".join(map(chr, [*range(32), *range(127, 160)]))) == "\t\n"


def test_figures() -> None:
    last = Delta("done", prompt_tokens=1, cached_tokens=1, completion_tokens=1, finish_reason="stop")
    assert figures(last, 0.5) == "1 token in 0.5 s (2.0 a second); 1 of 1 prompt token found in the cache."
    last = Delta("done", prompt_tokens=48, cached_tokens=40, completion_tokens=12, finish_reason="length")
    assert figures(last, 0.5).endswith("; 40 of 48 prompt tokens found in the cache; cut off at its longest length.")


def test_the_tree() -> None:
    asked: list[Exchange] = []
    for question, before in [("a", 0), ("b\x1b\n c", 1), ("d", 1), ("e", 2), ("f", 2), ("g", 0), ("h", 5), ("i", 3)]:
        asked.append(Exchange(question, Prompt(()), asked[before - 1] if before else None))
    assert tree_lines(asked, [asked[0], asked[2]]) == [
        "* 1  ├─ a",
        "  2  │  ├─ b c",
        "  4  │  │  ├─ e",
        "  5  │  │  └─ f",
        "  7  │  │     h",
        "* 3  │  └─ d",
        "  8  │     i",
        "  6  └─ g",
    ]
    assert tree_lines([], []) == []


def test_a_deep_tree_is_drawn_too() -> None:
    asked: list[Exchange] = []
    for number in range(3000):
        asked.append(Exchange(str(number), Prompt(()), asked[-1] if asked else None))
    assert len(tree_lines(asked, asked[:1])) == 3000


def test_notes_are_dim_in_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    note("quiet")
    assert capsys.readouterr().err == "quiet\n"


def test_the_second_ctrl_c_interrupts() -> None:
    pressed: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with CtrlC(lambda: pressed.append("stop")) as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert (pressed, ctrl_c.pressed) == (["stop"], True)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
