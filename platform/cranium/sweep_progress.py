"""How far a sweep is, read from the store alone: which of its cells are done, which failed, whether it is running.

A sweep lists its cells before the first of them, a cell that failed says why in its folder until it is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cranium import store
from cranium.store import Artefact

CELLS = "cells.json"  # of a sweep
FAILURE = "failure.json"  # of a cell


@dataclass(frozen=True)
class Progress:
    """Cells by what became of them; every cell is in one of the three."""

    done: int
    failed: int
    missing: int
    running: bool  # a process of this file system holds the sweep's lock
    eta: float | None  # seconds, by the cells that were done since it started

    @property
    def cells(self) -> int:
        return self.done + self.failed + self.missing


def announce(sweep: Artefact, cells: Iterable[Path]) -> None:
    """Write down which cells a sweep has."""
    sweep.path.mkdir(parents=True, exist_ok=True)
    store.write_atomic(sweep.path / CELLS, json.dumps([cell.name for cell in cells]))


def failed(cell: Path, reason: str) -> None:
    cell.mkdir(parents=True, exist_ok=True)
    store.write_atomic(cell / FAILURE, json.dumps({"reason": reason}))


def broken(cells: Iterable[Path]) -> int:
    """How many of these, which are not done, have failed."""
    return sum((cell / FAILURE).is_file() for cell in cells)


def mended(cells: Iterable[Path]) -> None:
    """Take back what was said of cells that are done by now."""
    for cell in cells:
        if Artefact(cell).done:
            (cell / FAILURE).unlink(missing_ok=True)


def of(root: Path, sweep: Artefact) -> Progress | None:
    """None where a sweep has not begun. root: the store it lies in."""
    try:
        cells = [root / "adapt" / name for name in json.loads((sweep.path / CELLS).read_text())]
    except FileNotFoundError:
        return None
    since = _running_since(root, sweep)
    ended = [manifest.stat().st_mtime for cell in cells if (manifest := cell / store.MANIFEST).is_file()]
    lost = broken(cell for cell in cells if not Artefact(cell).done)
    left, eta = len(cells) - len(ended), None
    if since is not None and (lately := sum(at >= since for at in ended)):
        eta = left * (time.time() - since) / lately
    return Progress(len(ended), lost, left - lost, since is not None, eta)


def _running_since(root: Path, sweep: Artefact) -> float | None:
    """When the process that sweeps took the lock; None when none holds it."""
    if not store.is_held(root, sweep.id):
        return None
    return store.lock_file(root, sweep.id).stat().st_mtime
