"""What every benchmark prints: where and of what it was measured, then a row for each thing."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

ROOT = Path(__file__).parent.parent


def header(**about: Any) -> dict[str, Any]:
    """Versions, machine and commit; `about` goes on top."""
    return {
        **about,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **_gpu(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
    }


def show(about: dict[str, Any], rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """The header and a table; or one JSON object a line, the header first."""
    show_header(about, as_json=as_json)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *[[_text(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for number, line in enumerate(cells):
        _print_line(line, widths)
        if not number:
            _print_rule(widths)


def show_header(about: dict[str, Any], *, as_json: bool) -> None:
    print(json.dumps(about) if as_json else "  ".join(f"{name}: {value}" for name, value in about.items()), flush=True)


class Table:
    """Rows that are printed as they come, so that a run which is cut off still tells what it found.

    The columns are those of the first row. A later row may lack some. The head comes again after another table's rows.
    """

    _last: ClassVar["Table | None"] = None  # that printed

    def __init__(self, title: str, *, as_json: bool) -> None:
        self.title = title
        self.rows: list[dict[str, Any]] = []
        self._as_json = as_json
        self._widths: dict[str, int] = {}

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._as_json:
            print(json.dumps({"table": self.title, **row}), flush=True)
            return
        if not self._widths:
            self._widths = {name: max(len(name), len(_text(value))) for name, value in row.items()}
        widths = list(self._widths.values())
        if Table._last is not self:
            print(f"\n{self.title}\n", flush=True)
            _print_line(list(self._widths), widths)
            _print_rule(widths)
            Table._last = self
        _print_line([_text(row.get(name, "")) for name in self._widths], widths)


def _print_line(cells: Sequence[str], widths: Sequence[int]) -> None:
    print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |", flush=True)


def _print_rule(widths: Sequence[int]) -> None:
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|", flush=True)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _commit() -> str:
    """Of the checkout; where that has no history, what COMMIT in the environment says."""
    if commit := _git("rev-parse", "--short", "HEAD"):
        return commit + ("+changes" if _git("status", "--porcelain") else "")
    return os.environ.get("COMMIT", "unknown")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": f"{found.name}, {found.multi_processor_count} SMs, {found.L2_cache_size >> 20} MiB L2",
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
