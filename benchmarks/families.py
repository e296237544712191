"""Which families of transformers the engine runs, and what it says to the others.

    python -m benchmarks.families [--json] [--write] [FAMILY …]

Every type that AutoModelForCausalLM knows gets a tiny random checkpoint (tests/families.py). transformers answers some
prompts in a process that never imports chatpage; the engine answers them in another, in chunks of 7 tokens and blocks
of 4, all at once; the answers must be the same, token for token. What the engine refuses, it refuses at its own door.

--json prints a line of JSON for each family. --write makes docs/families.md of all of them, which nobody edits by hand.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.families import ANSWER, PROMPTS, TYPES, configuration, generate, make_family

TABLE = Path(__file__).parents[1] / "docs" / "families.md"
SECONDS = 120  # that one process may take
MEMORY = 12 * 2**30  # bytes of address space
LARGEST = 60_000_000  # parameters of a checkpoint that is worth its time

LIVELY = 20  # different tokens in all answers, of which each would hardly be right by chance

WORKS, REFUSED, DIFFERS, NOT_TRIED, ENCODER_DECODER = "works", "refused", "differs", "not tried", "encoder-decoder"


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one family; `remark` says why, or what to know of one that works."""

    family: str
    result: str
    remark: str = ""


def main(arguments: list[str]) -> int:
    """Try the families that are named, or all; 1 if one gave other answers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="types of models; all of them, if none is named")
    parser.add_argument("--json", action="store_true", help="print each row as a line of JSON")
    parser.add_argument("--write", action="store_true", help="make docs/families.md of all families")
    chosen = parser.parse_args(arguments)
    if chosen.write and chosen.families:
        parser.error("--write makes the table of all families; leave out their names.")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for family in chosen.families or TYPES:
        rows.append(row := try_family(family))
        print(json.dumps(asdict(row)) if chosen.json else f"{row.family}: {row.result} {row.remark}", flush=True)
    if chosen.write:
        TABLE.write_text(table(rows), encoding="utf-8")
    return int(any(row.result == DIFFERS for row in rows))


def try_family(family: str) -> Row:
    """Make it, ask transformers, ask the engine."""
    root = Path(tempfile.mkdtemp())
    try:
        made = limited(_make, family, root / family)
        if "value" not in made:
            return Row(family, NOT_TRIED, f"no tiny checkpoint can be made: {made['error']}")
        if made["value"]:
            return Row(family, *made["value"])
        theirs, ours = limited(generate, root / family), limited(_ask_engine, root / family)
        return _compared(family, theirs, ours)
    finally:
        shutil.rmtree(root)


def _compared(family: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Row:
    if "value" not in ours:
        return Row(family, DIFFERS, f"the engine fails: {ours['error']}")
    answers, notes, refusal = ours["value"]
    if refusal:
        return Row(family, REFUSED, refusal)
    if "value" not in theirs:
        return Row(family, NOT_TRIED, f"transformers' own generate fails: {theirs['error']}")
    if answers != theirs["value"]:
        return Row(family, DIFFERS, "other tokens than generate's")
    different = len({token for tokens in answers for token in tokens})
    if different < LIVELY:
        notes.append(f"Little evidence: all answers together have {different} different tokens.")
    return Row(family, WORKS, " ".join(notes))


def _make(family: str, folder: Path) -> tuple[str, str] | None:
    """Save the checkpoint, or say what the row is without one."""
    config = configuration(family)
    if config.is_encoder_decoder:
        return ENCODER_DECODER, ""
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    if parameters > LARGEST:
        return NOT_TRIED, f"its smallest checkpoint here would have {parameters / 1e6:,.0f} million parameters"
    make_family(family, folder)
    return None


def _ask_engine(folder: Path) -> tuple[list[list[int]], list[str], str]:
    """Answers, notes, and the sentence of a refusal."""
    # Not above: the process that asks transformers must never see chatpage, which registers an attention of its own.
    from chatpage.errors import ChatPageError
    from tests.model.families import answer

    try:
        return *answer(folder), ""
    except ChatPageError as error:
        return [], [], re.sub(r"^model '[^']*' cannot be used: ", "", str(error))


def limited(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Call it in a process of its own, within limits: {"value": …} of what JSON can hold, or {"error": a sentence}."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)
        try:
            answer: dict[str, Any] = {"value": function(*arguments)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answered = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answered) if answered else {"error": f"it ended with {os.waitstatus_to_exitcode(status)}"}


def table(rows: list[Row]) -> str:
    """docs/families.md."""
    counts = Counter(row.result for row in rows)
    parts = [
        "# Families of models",
        "Made by `python -m benchmarks.families --write`; do not edit. "
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, "
        f"Python {platform.python_version()}, {len(rows)} types of `AutoModelForCausalLM`.",
        "Each type got a tiny random checkpoint, with windows shorter than most prompts where its layers name their "
        "windows. "
        f"{len(PROMPTS)} prompts of {min(PROMPTS)} to {max(PROMPTS)} tokens were answered at once, in fp32 on a CPU, "
        f"in chunks of 7 tokens and blocks of 4; the {ANSWER} tokens of each greedy answer are compared with those of "
        "`generate` under transformers' own attention, in a process without ChatPage. "
        "A model is refused when it is loaded, with the sentence below, if what it computes cannot be shown to be the "
        "same. A real checkpoint goes through the same check. Encoders "
        "that can be decoders (`is_decoder`) were made so.",
    ]
    titles = {
        DIFFERS: "Gives other answers",
        WORKS: "Works: the same tokens",
        REFUSED: "Refused",
        NOT_TRIED: "Not tried",
    }
    for result, title in titles.items():
        chosen = [row for row in rows if row.result == result]
        if chosen:
            lines = [f"| `{row.family}` | {row.remark.replace('|', ' ')} |" for row in chosen]
            parts.append(f"## {title} ({counts[result]})\n\n| family | remark |\n|---|---|\n" + "\n".join(lines))
    encoders = ", ".join(f"`{row.family}`" for row in rows if row.result == ENCODER_DECODER)
    parts.append(f"## Encoder-decoders ({counts[ENCODER_DECODER]})\n\nRefused, all for that reason: {encoders}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
