"""Metrics by step in plain files: whoever computes appends to a journal, and whoever tracks or draws reads it.

Lines are whole or dropped, an attempt has a segment of its own, and what a later attempt did again is void.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cranium.config import UserError


@dataclass(frozen=True)
class Entry:
    step: int
    metrics: Mapping[str, float]
    time: float  # seconds since the epoch
    attempt: str


class Journal:
    """Append metrics to a segment of one attempt: `<folder>/<start, ns>-<attempt>.jsonl`, a JSON object a line.

    Segments sort in the order they were begun, also where the clock was set back in between.

    `resume` is the first step this attempt makes: entries of older segments from there on are void, because the
    checkpoint it resumed from is older than they are.
    """

    def __init__(self, folder: Path, attempt: str | None = None, resume: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt or uuid.uuid4().hex[:8]
        begun = max((int(path.name.partition("-")[0]) for path in folder.glob("*.jsonl")), default=0)
        self.path = folder / f"{max(time.time_ns(), begun + 1):020d}-{self.attempt}.jsonl"
        self._file: TextIO = self.path.open("x", buffering=1)
        self._write({"resume": resume, "attempt": self.attempt})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        plain = {name: float(value) for name, value in values.items()}
        self._write({"step": int(step), "metrics": plain, "time": time.time(), "attempt": self.attempt})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")  # one write a line: the buffer is flushed at its end
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> list[Entry]:
    """All valid entries in step order: segments oldest first, each cutting its elders at the step it resumed from.

    The last line of a segment may be torn by a kill and is dropped; damage anywhere else raises `UserError(JOURNAL)`.
    """
    entries: list[Entry] = []
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        whole = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is nothing, or torn
        for number, line in enumerate(whole, 1):
            try:
                content = json.loads(line)
                if "resume" in content:
                    entries = [entry for entry in entries if entry.step < content["resume"]]
                else:
                    entries.append(
                        Entry(content["step"], content["metrics"], content["time"], content["attempt"])
                    )
            except (ValueError, KeyError, TypeError) as error:
                raise UserError("JOURNAL", f"{path}, line {number} is damaged ({error})", 1) from error
    return sorted(entries, key=lambda entry: entry.step)
