"""What every benchmark prints: where and of what it was measured, then a row for each thing."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent


def header(**about: Any) -> dict[str, Any]:
    """Versions, machine and commit; `about` goes on top."""
    return {
        **about,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
    }


def show(about: dict[str, Any], rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """The header and a table; or one JSON object a line, the header first."""
    if as_json:
        for line in (about, *rows):
            print(json.dumps(line))
        return
    print("  ".join(f"{name}: {value}" for name, value in about.items()))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *[[_text(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
