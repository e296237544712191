"""The command line: `chatpage serve` and `chatpage chat`. Flags and their help are made from `Settings`."""

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from chatpage.errors import ChatPageError, RequestError, SettingError
from chatpage.schedule.params import SamplingParams
from chatpage.settings import Settings, allowed, flag

DESCRIPTION = "A chat page on a paged KV cache that you can watch."
EPILOG = (
    "Every flag can also be set in the environment: --block-size is CHATPAGE_BLOCK_SIZE. "
    "The page is at /, an OpenAI-compatible API at /v1, the panel alone at /panel/."
)

CHAT_DESCRIPTION = (
    "Chat with a model here in the terminal, on the same engine. Answers stream to stdout, everything else goes to "
    "stderr; where stdin is no terminal, each line of it is a message: echo 'What is a block?' | chatpage chat"
)
CHAT_EPILOG = (
    "While chatting: /blocks draws the block table; /retry, /edit and /branches ask again, and keep what was there; "
    "/help shows all. Ctrl-C stops an answer, Ctrl-D ends. The settings, not the sampling, can also be set in the "
    "environment: --block-size is CHATPAGE_BLOCK_SIZE."
)
CHAT_SETTINGS = (  # those that have an effect without a server and without other people
    "model",
    "system_prompt",
    "device",
    "dtype",
    "attention",
    "block_size",
    "kv_blocks",
    "kv_memory",
    "max_model_len",
    "max_step_tokens",
    "trace",
    "paranoid",
)
CHAT_HELP = {"system_prompt": "What the model is told before the chat. Left out, the model's own."}
# One turn runs at a time, and the pool has room for more, so that branches stay; the table rests as long as it takes.
CHAT_FIXED: dict[str, Any] = {"max_sequences": 8, "session_ttl": 10**6, "sharing": "system"}

SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "how freely the answer is drawn, from 0 (always the likeliest token) to 2; default 0.7"),
    "top_p": (float, "draw from the likeliest tokens that together have this probability; default 0.95"),
    "top_k": (int, "draw from so many of the likeliest tokens; 0, the default, is all"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest one; 0, the default, drops none"),
    "repetition_penalty": (float, "above 1, tokens of the question or answer become less likely; default 1"),
    "presence_penalty": (float, "above 0, tokens of the answer become less likely; default 0"),
    "frequency_penalty": (float, "above 0, tokens of the answer become less likely each time; default 0"),
    "seed": (int, "the same seed gives the same answers to the same questions; left out, a new draw each time"),
    "max_tokens": (int, "longest answer, in tokens; left out, to the end of the context"),
    "stop": (str, "end an answer before this text; may be repeated"),
}
SAMPLING_DEFAULTS = {"temperature": 0.7, "top_p": 0.95}  # those of the page


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as every other one: a sentence, without the usage lines."""

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument (--\S+): (expected one argument|ignored explicit argument)", message)
        if named:
            wanted = "needs a value" if named[2].startswith("expected") else "is on or off, and takes no value"
            raise SettingError(f"{named[1]} {wanted}.")
        raise SettingError(message[:1].upper() + message[1:].rstrip(".") + ".")


def main(argv: Sequence[str] | None = None) -> int:
    """`chatpage …`. Returns the exit status: 2, and one sentence on stderr, for a mistake that the user can mend."""
    return _run(_commands(), sys.argv[1:] if argv is None else argv)


def serve(argv: Sequence[str] | None = None) -> int:
    """`python app.py …`, which is `chatpage serve …`."""
    parser = _Parser(prog="python app.py", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    _make_serve(parser)
    return _run(parser, sys.argv[1:] if argv is None else argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    try:
        values, unknown = parser.parse_known_args(argv)
        given = vars(values)
        given.pop("command", None)
        run, names = given.pop("run"), given.pop("names")
        if unknown:
            raise SettingError(_unknown(unknown[0], names))
        return run(given)
    except ChatPageError as error:
        print(f"chatpage: {error}", file=sys.stderr)
        return 2


def _serve(given: dict[str, Any]) -> int:
    settings = Settings(**given)
    settings.require_possible()

    from chatpage.launch import launch  # late: torch and Gradio take seconds, and --help needs neither

    launch(settings)
    return 0


def _chat(given: dict[str, Any]) -> int:
    params = _sampling({name: given.pop(name) for name in SAMPLING if name in given})
    settings = Settings(**given, **CHAT_FIXED)
    if len(settings.system_prompt) > 1:
        raise SettingError(f"--system-prompt is given {len(settings.system_prompt)} times; a chat has one.")
    settings.require_possible()

    from chatpage.terminal import chat

    return chat(settings, params)


# -- the commands and their flags --------------------------------------------------------------------------------------


def _commands() -> argparse.ArgumentParser:
    parser = _Parser(prog="chatpage", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _make_serve(
        commands.add_parser(
            "serve", help="load a model and serve the page", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
        )
    )
    chat = commands.add_parser(
        "chat", help="chat here, in the terminal", description=CHAT_DESCRIPTION, epilog=CHAT_EPILOG, allow_abbrev=False
    )
    chat.set_defaults(run=_chat, names=[*CHAT_SETTINGS, *SAMPLING])
    _add_sampling(chat)
    _add_settings(chat.add_argument_group("settings"), CHAT_SETTINGS, CHAT_HELP)
    return parser


def _make_serve(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_serve, names=list(Settings.model_fields))
    _add_settings(parser, Settings.model_fields, {})


def _add_settings(parser: argparse._ActionsContainer, names: Iterable[str], explained: dict[str, str]) -> None:
    """One flag for each setting, explained by its description if not here.

    Values stay text: `Settings` alone says what is allowed.
    """
    for name in names:
        field = Settings.model_fields[name]
        default = field.get_default(call_default_factory=True)
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        notes = []
        if isinstance(default, bool):
            options["action"] = "store_true"
        else:
            options["metavar"] = name.rsplit("_", 1)[-1].upper()
            notes += [allowed(name)] if allowed(name) != "text" else []
        if isinstance(default, list):
            options["action"] = "append"
        elif default is not None and not isinstance(default, bool):
            notes.append(f"default {default}")
        remark = f" ({'; '.join(notes)})" if notes else ""
        parser.add_argument(
            flag(name), help=f"{explained.get(name, field.description)}{remark}".replace("%", "%%"), **options
        )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    for name, (_, explained) in SAMPLING.items():
        action = "append" if name == "stop" else "store"
        metavar = name.rsplit("_", 1)[-1].upper()
        group.add_argument(
            flag(name), dest=name, default=argparse.SUPPRESS, action=action, metavar=metavar, help=explained
        )


def _sampling(given: dict[str, Any]) -> SamplingParams:
    """How answers are drawn. `SamplingParams` alone says what is allowed, in the words of a request."""
    wishes: dict[str, Any] = dict(SAMPLING_DEFAULTS)
    for name, value in given.items():
        kind = SAMPLING[name][0]
        try:
            wishes[name] = tuple(value) if kind is str else kind(value)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise SettingError(f"{flag(name)} is {value!r}; it must be {number}.") from None
    try:
        return SamplingParams(**wishes)
    except RequestError as error:
        name = str(error.param)
        raise SettingError(str(error).replace(name, flag(name), 1)) from None


def _unknown(argument: str, names: Iterable[str]) -> str:
    if not argument.startswith("--"):
        return f"{argument!r} is not a flag; see --help for what is."
    written = argument.split("=")[0]
    near = difflib.get_close_matches(written, [flag(name) for name in names], n=1, cutoff=0)
    return f"{written} is not a setting; did you mean {near[0]}?"
