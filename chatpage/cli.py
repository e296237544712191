"""The command line: `chatpage serve`. Flags and their help are made from `Settings`."""

import argparse
import difflib
import gc
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from chatpage.errors import ChatPageError, SettingError
from chatpage.settings import Settings, allowed, flag

DESCRIPTION = "A chat page on a paged KV cache that you can watch."
EPILOG = (
    "Every flag can also be set in the environment: --block-size is CHATPAGE_BLOCK_SIZE. "
    "The page is at /, an OpenAI-compatible API at /v1, the panel alone at /panel/."
)


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
    _add_settings(parser)
    return _run(parser, sys.argv[1:] if argv is None else argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    try:
        values, unknown = parser.parse_known_args(argv)
        if unknown:
            raise SettingError(_unknown(unknown[0]))
        given = vars(values)
        given.pop("command", None)
        settings = Settings(**given)

        from chatpage.launch import launch  # late: torch and Gradio take seconds, and --help needs neither

        launch(settings)
        gc.freeze()  # the process ends now: to collect all of torch first would take seconds
    except ChatPageError as error:
        print(f"chatpage: {error}", file=sys.stderr)
        return 2
    return 0


def _commands() -> argparse.ArgumentParser:
    parser = _Parser(prog="chatpage", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    served = commands.add_parser(
        "serve", help="load a model and serve the page", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    _add_settings(served)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting. Values stay text here: `Settings` alone says what is allowed."""
    for name, field in Settings.model_fields.items():
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
        parser.add_argument(flag(name), help=f"{field.description}{remark}".replace("%", "%%"), **options)


def _unknown(argument: str) -> str:
    if not argument.startswith("--"):
        return f"{argument!r} is not a flag; see --help for what is."
    written = argument.split("=")[0]
    near = difflib.get_close_matches(written, [flag(name) for name in Settings.model_fields], n=1, cutoff=0)
    return f"{written} is not a setting; did you mean {near[0]}?"
