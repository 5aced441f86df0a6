"""Scans and a finished cell -> class probabilities or a label map of each, a picture, and where it is from.

A scan goes the way of ingest with the preprocessing that the cell was trained on (`new_scans.py`), then through the
weights it learnt with and what it learnt. In a tree what does not fit is left out and told, and all else is done.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from cranium import new_scans, predict_classification, predict_segmentation, store
from cranium.config import Machine, UserError
from cranium.figures.page import Table
from cranium.finished_cell import Trained
from cranium.new_scans import Refused, Seen, Spec

TABLE = "predictions.csv"
SUFFIX = {"segmentation": "dseg", "classification": "pred"}
PARTS = {  # of a cell's own cohorts -> what a reader must know
    "test": "{who} of the cell's test fold",
    "external": "{who} of the cell's external cohort",
    "training": "{who} of the cell's own cohort: it may have learnt from it",
}

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Predicted:
    """One session: its JSON, and what that says."""

    path: Path
    about: Mapping[str, Any]


def predict(
    machine: Machine, made: Trained, spec: Spec, tell: Tell = lambda done, total, text: None
) -> tuple[list[Predicted], list[Refused]]:
    """Predict every session asked for, each into files of its name in `spec.out`, and all into `predictions.csv`.

    What a tree holds and does not fit is told, not predicted; where nothing fits, and of scans that are named one by
    one, it is raised: `UserError(CONTRASTS | REJECTED | WEIGHTS | NO_HEAD | ...)`.
    """
    wanted, refused = new_scans.asked(made, spec)
    match made.manifest["task"]["task"]:
        case "segmentation":
            model: Any = predict_segmentation.Model(made, machine)
        case _:
            model = predict_classification.Model(made, machine)
    done: list[Predicted] = []
    spec.out.mkdir(parents=True, exist_ok=True)
    for number, session in enumerate(wanted):
        tell(number, len(wanted), session["subject"])
        with tempfile.TemporaryDirectory() as work:
            try:
                seen = new_scans.read(made, machine, session, Path(work))
            except UserError as error:
                if not spec.bids or error.code != "REJECTED":
                    raise
                refused.append(Refused(session["subject"], session["session"], error.code, str(error)))
                continue
        done.append(_written(made, seen, model.predict(seen, spec.out), spec.out))
    tell(len(wanted), len(wanted), "sessions")
    if not done:
        raise UserError("REJECTED", f"none of {len(wanted)} sessions can be used; {refused[-1].reason}", 3)
    store.write_atomic(spec.out / TABLE, table(done).text)
    return done, refused


def _written(made: Trained, seen: Seen, found: Mapping[str, Any], out: Path) -> Predicted:
    sources = json.loads(seen.row["sources"])
    about = {
        "subject": seen.row["subject"],
        "session": seen.row["session"],
        "contrasts": seen.contrasts(made),
        **found,
        "scans": sources,
        "known": made.known(sources),
        "warnings": json.loads(seen.row["warnings"]),
        "mask_quality": json.loads(seen.row["mask_quality"]),
    }
    path = out / f"{seen.name}_{SUFFIX[made.manifest['task']['task']]}.json"
    store.write_atomic(path, json.dumps(about, indent=1))
    return Predicted(path, about)


def table(done: list[Predicted]) -> Table:
    """A row a session: its class probabilities and the most probable class, or ml of each class; and what is odd."""
    names = list(done[0].about.get("probabilities") or done[0].about["ml"])
    probable = "probabilities" in done[0].about
    columns = ("subject", "session", "contrasts", *(n if probable else f"{n} ml" for n in names))
    rows = []
    for about in (one.about for one in done):
        values = about["probabilities"] if probable else about["ml"]
        row = [about["subject"], about["session"], " ".join(about["contrasts"]), *(values[n] for n in names)]
        rows.append((*row, *([about["most_probable"]] if probable else []), "; ".join(notes(about))))
    return Table((*columns, *(["most probable"] if probable else []), "notes"), tuple(rows), "predictions")


def notes(about: Mapping[str, Any]) -> list[str]:
    """What a reader of a prediction must know, in words."""
    told = [f"{one['contrast']}: {one['code']}" for one in about["warnings"]]
    if known := about["known"]:
        told.insert(0, PARTS[known["part"]].format(who=f"subject {known['subject']}"))
    return told


def show(
    made: Trained, done: list[Predicted], refused: list[Refused], spec: Spec, console: rich.console.Console
) -> None:
    """What came out, for people."""
    found = table(done)
    shown = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=made.cell.path.name, title_justify="left")
    for name in found.columns:
        numeric = isinstance(found.rows[0][found.columns.index(name)], float)
        shown.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in found.rows:
        shown.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(shown)
    for one in refused:
        who = f"{one.subject} {one.session}".strip()
        console.print(f"left out: {who}: {one.code}, {one.reason}", markup=False, soft_wrap=True)
    console.print(f"{len(done)} predicted; files in {spec.out}. Not a medical device.", soft_wrap=True)
