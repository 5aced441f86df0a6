"""What of a study goes to MLflow, and when. It never costs the work: what cannot be sent now is sent next time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cranium import meters, store, track
from cranium.config import Stack, fingerprint
from cranium.store import Artefact
from cranium.study import Study, Tell

if TYPE_CHECKING:
    from cranium.sweep import Grid, Work

JOURNALS = ("journal", "monitor/journal")  # of a pretraining: its steps, and the looks at its teacher
LIVE_SECONDS = 10.0  # how often a running stage is sent on
SEARCH = ("trials", "ended_early", "diverged", "epochs", "validation_auroc", "declared_validation_auroc")
LOCKED = ("pretrain", "sweep")  # stages whose artefact is locked while it is made
PART = ".part.json"  # of a mark: what of a sweep was sent so far


@contextlib.contextmanager
def _tracking(study: Study) -> Iterator[None]:
    try:
        yield
    except track.TrackingError as error:
        again = "run the same command again when it answers"
        study.note(f"MLflow was not reached, so its runs are late ({error}); the journals are kept: {again}")


def _tracker(study: Study) -> track.Tracker:
    whole = study.whole
    if whole.tracker is None:
        machine = study.machine
        with track.reaching(machine.tracking):  # the store's name is a file
            own = store.identity(machine.store)
        tracker = track.Tracker(machine.tracking, study.exp.name, own)
        _reap(study, tracker)
        whole.tracker = tracker
    return whole.tracker


def _reap(study: Study, tracker: track.Tracker) -> None:
    """Runs of this store that nobody works on any more are KILLED: SIGKILL leaves nobody to say so.

    Whoever works holds the artefact's lock. One that is done is none of them: its end is yet to be sent.
    """
    for run in tracker.running():
        stage, _, name = run.key.partition("/")
        made = Artefact(study.machine.store / stage / name)
        ours = stage in LOCKED and name == Path(name).name and made.path.is_dir()  # whatever a server says
        if ours and not made.done and not store.is_held(study.machine.store, made.id):
            tracker.log(run.id, {}, {track.GONE: "its process was gone when the next command looked"})
            tracker.finish(run.id, "KILLED", _last_sign(made.path, _mark(study, made).with_suffix(PART)))


def _last_sign(folder: Path, sent: Path) -> float | None:
    """When something was last written of a work, in seconds since the epoch: its own files, or what is sent of it."""
    times = []
    for path in (sent, folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # another command may be at it by now
            times.append(path.stat().st_mtime)
    return max(times, default=None)


def _mark(study: Study, made: Artefact) -> Path:
    """What of an artefact MLflow has: a file per tracking store, so that a second run need not ask."""
    folder = study.machine.store / "tracked" / fingerprint(study.machine.tracking)[:8]
    return folder / f"{made.id.replace('/', '-')}.json"


def runs(study: Study, made: Artefact) -> dict[str, str]:
    """MLflow's run ids of an artefact: `run`, or `run` and one per cell folder. Empty when it was not tracked."""
    mark = _mark(study, made)
    return dict(json.loads(mark.read_text())) if mark.is_file() else {}


def _labels(study: Study, made: Artefact) -> dict[str, str]:
    return {"experiment": study.exp.name, "run": made.path.name}


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
        Artefact(Path(study.made[named])).path.name
        for c in study.exp.pretrain.cohorts
        if (named := study.named(f"ingest {c}")) in study.made
    )
    run = _tracker(study).run(
        made.id,
        study.named(f"pretrain {init}"),
        _tags(
            study,
            stage="pretrain",
            init=init,
            stack=study.exp.ingest.stack,
            manifest=manifest,
            artefact=made.id,
        ),
    )
    _tracker(study).params(run, track.flatten(study.exp.pretrain.model_dump(mode="json")))
    return run


@contextlib.contextmanager
def live(study: Study, init: str, made: Artefact, tell: Tell) -> Iterator[Tell]:
    """Pass progress on, and every few seconds the journal to MLflow, so that curves can be watched.

    Left by an error the run is FAILED, by a signal KILLED; the next attempt takes it up again.
    """
    run: str | None = None
    due = sent = time.monotonic()
    due += LIVE_SECONDS

    def send() -> None:
        nonlocal run, sent
        run = run or _pretrain_run(study, init, made)
        for folder in JOURNALS:
            points = _tracker(study).replay(run, made.path / folder)
            meters.put("cranium_tracking_points_total", points, _labels(study, made))
        sent = time.monotonic()

    def both(done: int, total: int, text: str) -> None:
        nonlocal due
        tell(done, total, text)
        if time.monotonic() >= due:
            with _tracking(study):
                send()
            due = time.monotonic() + LIVE_SECONDS
        meters.put("cranium_tracking_lag_seconds", time.monotonic() - sent, _labels(study, made))

    try:
        yield both
    except BaseException as error:
        if run is not None:
            with _tracking(study):
                send()
                _tracker(study).finish(run, _status(error))
        raise


def _status(error: BaseException) -> str:
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def pretrained(study: Study, init: str, made: Artefact, fresh: bool, ask: bool = False) -> None:
    from cranium import health_page  # imports torch, which takes seconds

    if _mark(study, made).is_file() and not fresh:
        return
    with study.stage(study.named(f"track {init}")), _tracking(study):
        run = _pretrain_run(study, init, made)
        tracker = _tracker(study)
        for folder in JOURNALS:
            tracker.replay(run, made.path / folder, ask)
        tracker.log(run, {"sys/seconds": made.manifest()["seconds"]}, _start_tags(made))
        for name in ("resolved.yaml", health_page.PAGE):
            if (made.path / name).is_file():  # a page that could not be drawn costs nothing else
                tracker.artefact(run, made.path / name)
        tracker.finish(run)
        store.write_atomic(_mark(study, made), json.dumps({"run": run}))


def catch_up(study: Study, pretrainings: Mapping[Stack, Mapping[str, Artefact]]) -> None:
    """Send what MLflow has not heard of these, which are done: it was away, and may be back."""
    for stack, view in study.views().items():
        for init, made in pretrainings[stack].items():
            pretrained(view, init, made, fresh=False)


def sync(study: Study, pretrainings: Mapping[Stack, Mapping[str, Artefact]], grid: Grid | None) -> None:
    """Send whatever MLflow lacks of these, which are done: it was wiped, or put back as it was some time ago."""
    for stack, view in study.views().items():
        for init, made in pretrainings[stack].items():
            pretrained(view, init, made, fresh=True, ask=True)
    if grid is not None and grid.artefact.done:
        mark = _mark(study, grid.artefact)
        for file in (mark, mark.with_suffix(PART)):
            file.unlink(missing_ok=True)
        swept(study, grid, {})


def _start_tags(made: Artefact) -> dict[str, str]:
    """Where a pretraining's first weights came from and how they fitted, for its run."""
    start = made.manifest()["start"]
    return {f"start.{key}": track.plain(start[key]) for key in start if start[key] not in (None, "", [])}


@contextlib.contextmanager
def sweeping(study: Study, grid: Grid, tell: Tell) -> Iterator[Tell]:
    """Pass progress on, and every few seconds the cells that are done to MLflow: the grid can be watched as it fills.

    Left by an error the sweep's run is FAILED, by a signal KILLED; the next attempt takes it up again.
    """
    due = sent = time.monotonic()
    due += LIVE_SECONDS

    def both(done: int, total: int, text: str) -> None:
        nonlocal due, sent
        tell(done, total, text)
        if time.monotonic() >= due:
            with _tracking(study):
                ids = _send_cells(study, grid, {}, seconds=LIVE_SECONDS / 4)
                sent = time.monotonic() if len(ids) > done else sent  # the parent's, and one for each cell
            due = time.monotonic() + LIVE_SECONDS
        meters.put("cranium_tracking_lag_seconds", time.monotonic() - sent, _labels(study, grid.artefact))

    try:
        yield both
    except BaseException as error:
        with _tracking(study):
            _tracker(study).finish(_sweep_run(study, grid), _status(error))
        raise


def swept(study: Study, grid: Grid, failures: Mapping[str, str]) -> None:
    """All cells of a sweep; `failures` (folder name -> reason) are runs too, and FAILED."""
    mark = _mark(study, grid.artefact)
    if mark.is_file():
        return
    with study.stage("track sweep") as tell, _tracking(study):
        tracker = _tracker(study)
        ids = _send_cells(study, grid, failures, tell=tell)
        parent = ids["run"]
        tracker.log(parent, {"cells": float(len(grid.works) - len(failures))})
        for name in ("resolved.yaml", "splits.json"):
            if (grid.artefact.path / name).is_file():
                tracker.artefact(parent, grid.artefact.path / name)
        tracker.finish(parent, "FAILED" if failures else "FINISHED")
        if not failures:
            store.write_atomic(mark, json.dumps(ids))
            mark.with_suffix(PART).unlink()


def _sweep_run(study: Study, grid: Grid) -> str:
    assert study.exp.sweep
    run = _tracker(study).run(
        grid.artefact.id,
        f"sweep {study.exp.name}",
        _tags(study, stage="sweep", artefact=grid.artefact.id),
    )
    _tracker(study).params(run, track.flatten(study.exp.sweep.model_dump(mode="json")))
    return run


def _send_cells(
    study: Study,
    grid: Grid,
    failures: Mapping[str, str],
    seconds: float = float("inf"),
    tell: Tell = lambda done, total, text: None,
) -> dict[str, str]:
    """Send the cells that are done and not yet sent, for about so long; returns the run ids known by then."""
    until = time.monotonic() + seconds
    sent = _mark(study, grid.artefact).with_suffix(PART)
    ids: dict[str, str] = json.loads(sent.read_text()) if sent.is_file() else {}
    ids["run"] = _sweep_run(study, grid)
    commit = git()
    try:
        for done, work in enumerate(grid.works, 1):
            if time.monotonic() > until:
                break
            if work.folder.name in failures:
                _send_cell(study, work, ids["run"], commit, failures[work.folder.name])
            elif work.folder.name not in ids and Artefact(work.folder).done:
                ids[work.folder.name] = _send_cell(study, work, ids["run"], commit)
            tell(done, len(grid.works), "runs")
    finally:
        store.write_atomic(sent, json.dumps(ids))
    return ids


def _send_cell(study: Study, work: Work, parent: str, commit: str, failure: str = "") -> str:
    cell = work.cell.model_dump(mode="json")
    tags = {k: track.plain(v) for k, v in cell.items()} | {"stage": "adapt", "git": commit, **dict(work.tags)}
    params, scores = track.flatten(cell), dict[str, float]()
    if failure:
        tags["failure"] = failure
    else:
        manifest = store.read_manifest(work.folder)
        scores = {k: v for k, v in manifest["metrics"].items() if v is not None}
        scores |= {k: float(manifest["counts"][k]) for k in ("n_train", "n_test")}
        if search := manifest.get("search"):
            scores |= {f"search/{k}": float(search[k]) for k in SEARCH if search.get(k) is not None}
            params |= track.flatten(search.get("settings", {}), "searched.")
    return _tracker(study).record(
        Artefact(work.folder).id,
        work.cell.name,
        parent,
        tags,
        params,
        scores,
        "FAILED" if failure else "FINISHED",
    )
