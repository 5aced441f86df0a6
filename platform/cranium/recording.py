"""What of a study goes to MLflow, and when. It never costs the work: what cannot be sent now is sent next time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cranium import store, track
from cranium.config import fingerprint
from cranium.store import Artefact
from cranium.study import Study, Tell

if TYPE_CHECKING:
    from cranium.sweep import Grid

JOURNALS = ("journal", "monitor/journal")  # of a pretraining: its steps, and the looks at its teacher
LIVE_SECONDS = 10.0  # how often a running pretraining is sent on


@contextlib.contextmanager
def _tracking(study: Study) -> Iterator[None]:
    try:
        yield
    except track.TrackingError as error:
        again = "run the same command again when it answers"
        study.note(f"MLflow was not reached, so its runs are late ({error}); the journals are kept: {again}")


def _tracker(study: Study) -> track.Tracker:
    study.tracker = study.tracker or track.Tracker(study.machine.tracking, study.exp.name)
    return study.tracker


def _mark(study: Study, made: Artefact) -> Path:
    """What of an artefact MLflow has: a file per tracking store, so that a second run need not ask."""
    folder = study.machine.store / "tracked" / fingerprint(study.machine.tracking)[:8]
    return folder / f"{made.id.replace('/', '-')}.json"


def runs(study: Study, made: Artefact) -> dict[str, str]:
    """MLflow's run ids of an artefact: `run`, or `run` and one per cell folder. Empty when it was not tracked."""
    mark = _mark(study, made)
    return dict(json.loads(mark.read_text())) if mark.is_file() else {}


def _tags(study: Study, **more: str) -> dict[str, str]:
    return {"experiment": study.exp.name, "config": fingerprint(study.exp)[:16], "git": git(), **more}


def git() -> str:
    """The commit this package runs from, `-dirty` with changes; its version when it is no clone."""
    from cranium import __version__

    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return f"v{__version__}"


def _pretrain_run(study: Study, init: str, made: Artefact) -> str:
    assert study.exp.pretrain
    manifest = ",".join(
        Artefact(Path(study.made[f"ingest {c}"])).path.name
        for c in study.exp.pretrain.cohorts
        if f"ingest {c}" in study.made
    )
    run = _tracker(study).run(
        made.id,
        f"pretrain {init}",
        _tags(study, stage="pretrain", init=init, manifest=manifest, artefact=made.id),
    )
    _tracker(study).params(run, track.flatten(study.exp.pretrain.model_dump(mode="json")))
    return run


def live(study: Study, init: str, made: Artefact, tell: Tell) -> Tell:
    """Pass progress on, and every few seconds the journal to MLflow, so that curves can be watched."""
    state: dict[str, Any] = {"run": None, "next": time.monotonic() + LIVE_SECONDS}

    def both(done: int, total: int, text: str) -> None:
        tell(done, total, text)
        if time.monotonic() >= state["next"]:
            with _tracking(study):
                state["run"] = state["run"] or _pretrain_run(study, init, made)
                for folder in JOURNALS:
                    _tracker(study).replay(state["run"], made.path / folder)
            state["next"] = time.monotonic() + LIVE_SECONDS

    return both


def pretrained(study: Study, init: str, made: Artefact, fresh: bool) -> None:
    from cranium import checkup  # imports torch, which takes seconds

    if _mark(study, made).is_file() and not fresh:
        return
    with study.stage(f"track {init}"), _tracking(study):
        run = _pretrain_run(study, init, made)
        tracker = _tracker(study)
        for folder in JOURNALS:
            tracker.replay(run, made.path / folder)
        tracker.log(run, {"sys/seconds": made.manifest()["seconds"]}, _start_tags(made))
        tracker.artefact(run, made.path / "resolved.yaml")
        tracker.artefact(run, made.path / checkup.PAGE)
        tracker.finish(run)
        store.write_atomic(_mark(study, made), json.dumps({"run": run}))


def _start_tags(made: Artefact) -> dict[str, str]:
    """Where a pretraining's first weights came from and how they fitted, for its run."""
    start = made.manifest()["start"]
    return {f"start.{key}": track.plain(start[key]) for key in start if start[key] not in (None, "", [])}


def swept(study: Study, grid: Grid, fresh: bool) -> None:
    if _mark(study, grid.artefact).is_file() and not fresh:
        return
    with study.stage("track sweep") as tell, _tracking(study):
        tracker = _tracker(study)
        assert study.exp.sweep
        parent = tracker.run(
            grid.artefact.id,
            f"sweep {study.exp.name}",
            _tags(study, stage="sweep", artefact=grid.artefact.id),
        )
        tracker.params(parent, track.flatten(study.exp.sweep.model_dump(mode="json")))
        ids, commit = {"run": parent}, git()
        for done, work in enumerate(grid.works, 1):
            cell = work.cell.model_dump(mode="json")
            tags = {k: track.plain(v) for k, v in cell.items()} | {
                "stage": "adapt",
                "git": commit,
                **dict(work.tags),
            }
            manifest = store.read_manifest(work.folder)
            scores = {k: v for k, v in manifest["metrics"].items() if v is not None}
            scores |= {k: float(manifest["counts"][k]) for k in ("n_train", "n_test")}
            key = Artefact(work.folder).id
            ids[work.folder.name] = tracker.record(
                key, work.cell.name, parent, tags, track.flatten(cell), scores
            )
            tell(done, len(grid.works), "runs")
        tracker.log(parent, {"cells": float(len(grid.works))})
        tracker.artefact(parent, grid.artefact.path / "resolved.yaml")
        tracker.artefact(parent, grid.artefact.path / "splits.json")
        tracker.finish(parent)
        store.write_atomic(_mark(study, grid.artefact), json.dumps(ids))
