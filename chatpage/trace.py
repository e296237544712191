"""A trace: everything that happened to the blocks, as JSON lines, to be looked at later.

The first line is a snapshot (`{"snapshot": …}`), every other one an event (`{"event": …}`) as on `/kv/events`. It holds
no text and no token ids.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chatpage.errors import SettingError
from chatpage.events import Event, Snapshot


class Trace:
    """Writes a trace file. A listener for `Engine.subscribe`.

    Raises:
        SettingError: the file cannot be written; also when it is called.
    """

    def __init__(self, path: str, *, sharing: str) -> None:
        self._path = path
        self._sharing = sharing
        with self._refusal():
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - open as long as the engine runs

    def __call__(self, snapshot: Snapshot | None, events: list[Event]) -> None:
        with self._refusal():
            if snapshot is not None:
                self._write({"snapshot": snapshot.to_json(scope="full", sharing=self._sharing)})
            for event in events:
                self._write({"event": event.to_json()})
            self._file.flush()

    @contextmanager
    def _refusal(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SettingError(f"--trace is {self._path!r}, which cannot be written: {error.strerror}.") from error

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
