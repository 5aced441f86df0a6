"""What a search tried for one cell, kept beside it: a file a trial, and which of them won.

A trial's file is all there is of its past: a search that was killed reads it instead of training again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cranium import place, store
from cranium.config import Finetune, UserError

FOLDER = "search"  # of a cell's
RECORD = "search.json"
TIE = 1e-6  # of AUROC, for a log-loss that is 1 lower: decides between equals only
WORST = -1.0  # of a trial that diverged: below every AUROC

Settings = Mapping[str, float | str]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and the AUROC and log-loss of the validation subjects after each epoch."""

    settings: Settings
    curve: tuple[tuple[float, float], ...] = ()
    diverged: str = ""  # why, if it did

    def score(self, epochs: int | None = None) -> float:
        """Of the best of the first epochs (None: of all): AUROC, of equals the one with the lowest log-loss."""
        if self.diverged and epochs is None:
            return WORST
        return max((auroc - TIE * loss for auroc, loss in self.curve[:epochs]), default=WORST)


def read(cell: Path, number: int) -> Trial | None:
    """A trial as far as it came, or None."""
    try:
        kept = json.loads(place.read(_file(cell, number)))
    except FileNotFoundError:
        return None
    return Trial(kept["settings"], tuple((a, b) for a, b in kept["curve"]), kept["diverged"])


def write(cell: Path, number: int, trial: Trial) -> None:
    kept = {"settings": dict(trial.settings), "curve": trial.curve, "diverged": trial.diverged}
    file = _file(cell, number)
    file.parent.mkdir(parents=True, exist_ok=True)
    store.write_atomic(file, json.dumps(kept, sort_keys=True))


def _file(cell: Path, number: int) -> Path:
    return cell / FOLDER / f"{number:04d}.json"


def conclude(cell: Path, spec: Finetune) -> None:
    """Write down what was spent and who won: the best score, of equals the earliest. All trials must have ended."""
    assert spec.search
    tried = [read(cell, number) for number in range(spec.search.trials)]
    whole = [trial for trial in tried if trial is not None]
    assert len(whole) == len(tried), "a trial has no file"
    store.write_atomic(cell / RECORD, json.dumps(_record(spec, whole), indent=1, sort_keys=True))


def _record(spec: Finetune, tried: Sequence[Trial]) -> dict[str, Any]:
    assert spec.search
    scores = [trial.score() for trial in tried]
    won = scores.index(max(scores))
    best = tried[won]
    short = [t for t in tried if not t.diverged and len(t.curve) < spec.with_settings(t.settings).epochs]
    return {
        "trials": len(tried),
        "ended_early": len(short),
        "diverged": sum(bool(trial.diverged) for trial in tried),
        "epochs": sum(len(trial.curve) for trial in tried),
        "seed": spec.search.seed,
        "winner": won,
        "settings": dict(best.settings),
        "validation_auroc": max((auroc for auroc, _ in best.curve), default=None),
        "declared_validation_auroc": max((auroc for auroc, _ in tried[0].curve), default=None),
    }


def concluded(cell: Path) -> bool:
    return (cell / RECORD).is_file()


def settled(spec: Finetune, cell: Path, can_select: bool) -> tuple[Finetune, dict[str, Any] | None]:
    """The settings a cell is learnt with, and the record of the search that found them, if one was asked for.

    Where nobody can be held out to select by, the declared settings stand. Raises `UserError(NOT_SEARCHED)`.
    """
    if not spec.search:
        return spec, None
    if not can_select:
        return spec.with_settings({}), {"trials": 0, "why": "no subject could be spared: as declared"}
    if not concluded(cell):
        raise UserError("NOT_SEARCHED", f"the search of {cell.name} is not over; run `cranium sweep`", 1)
    record = json.loads(place.read(cell / RECORD))
    return spec.with_settings(record["settings"]), record
