"""Runs of one tracking store in another: `cranium track move`, from a laptop's sqlite into a group's server.

Experiments keep their names. A run keeps its params, tags, every point of its metrics, artefacts, times and status; its
id is new, and the old one is its tag `cranium.moved_from`. What was moved before is left as it is, so the same command
goes on with a move that was interrupted. The old store is only read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from cranium import track

MOVED, WHOLE = "cranium.moved_from", "cranium.moved_whole"


def move(source: str, target: str, tell: Callable[[int, int, str], None]) -> dict[str, int]:
    """Bring every run of `source` that is not deleted into `target`: how many were moved, how many were there.

    Raises `track.TrackingError` when one of them cannot be reached or refuses.
    """
    counts = {"moved": 0, "there": 0}
    with track.reaching(source):
        old = track.connected(source)
        every = [(e.name, list(_runs(old, e.experiment_id))) for e in _pages(old.search_experiments)]
    total = sum(len(runs) for _, runs in every)
    for experiment, runs in every:
        if not runs:
            continue
        tracker = track.Tracker(target, experiment)
        ids: dict[str, str] = {}
        for run in sorted(runs, key=lambda run: track.PARENT in run.data.tags):  # parents first
            with track.reaching(target):
                ids[run.info.run_id], fresh = _moved(old, tracker, run, ids)
            counts["moved" if fresh else "there"] += 1
            tell(sum(counts.values()), total, "runs")
    return counts


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _runs(old: Any, experiment_id: str) -> Iterator[Any]:
    yield from _pages(
        lambda page_token: old.search_runs(
            [experiment_id], order_by=["start_time ASC"], page_token=page_token
        )
    )


def _moved(old: Any, tracker: track.Tracker, run: Any, ids: dict[str, str]) -> tuple[str, bool]:
    """The run's id in the new store, and whether anything of it had to be sent."""
    info, data, new = run.info, run.data, tracker.client
    found = tracker.found({MOVED: info.run_id})
    if found is None and track.KEY in data.tags:  # its journal may have been sent there already
        own = {name: data.tags[name] for name in (track.KEY, track.STORE) if name in data.tags}
        found = tracker.found(own)
    if found is not None and WHOLE in found.data.tags:
        return str(found.info.run_id), False
    tags = {**data.tags, MOVED: info.run_id}
    if parent := ids.get(data.tags.get(track.PARENT, "")):
        tags[track.PARENT] = parent
    if found is None:
        found = new.create_run(tracker.experiment_id, info.start_time, tags, info.run_name)
    run_id = str(found.info.run_id)
    points = [
        (name, point.value, point.timestamp, point.step)
        for name in data.metrics
        for point in old.get_metric_history(info.run_id, name)
    ]
    params = {name: value for name, value in data.params.items() if name not in found.data.params}
    tracker.send(
        run_id, points, params, tags
    )  # a point that is there already is known by name, time, step and value
    if old.list_artifacts(info.run_id):
        with tempfile.TemporaryDirectory(prefix="cranium-move-") as folder:
            new.log_artifacts(run_id, old.download_artifacts(info.run_id, "", folder))
    if info.status != "RUNNING":
        new.set_terminated(run_id, info.status, info.end_time)
    new.set_tag(run_id, WHOLE, "true")
    return run_id, True
